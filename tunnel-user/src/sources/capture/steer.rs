//! The steering program of a network namespace: it gives captured connections, whatever loopback address they go to, to our
//! listening sockets.
//!
//! One copy is loaded for each namespace, because no helper tells a program of this type in which one it runs. It is small:
//! that takes 0.3 ms.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
};

use aya_obj::{Object, generated::bpf_insn};
use tunnel_common::names::{FLOWS, SOCKETS, STEER, STEER_LANES, STEER_NETNS};

use crate::kernel::sys::{self, AttachType};

/// The program, as the build script made or found it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steer.bpf.o"));
/// `BPF_LD | BPF_DW | BPF_IMM`: the constant is in this instruction and in the one that follows it (linux/bpf_common.h).
const LD_IMM64: u8 = 0x18;

/// Why captured destinations cannot be told apart.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// The object is not one of this program's.
    #[error("the steering object does not fit this daemon: {0}")]
    Object(String),
    /// The verifier refused it, or this process may not load it.
    #[error("the kernel refused the steering program: {0}")]
    Load(#[source] io::Error),
    /// It could not be attached.
    #[error("attaching the steering program to the network namespace failed: {}", explain(.0))]
    Attach(#[source] io::Error),
}

/// `NETNS_BPF_MAX_PROGS` of kernel/bpf/net_namespace.c: 64 programs of this type in one namespace.
fn explain(e: &io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::E2BIG) => {
            "64 programs of this kind are attached there already, which is the most (bpftool net)".to_owned()
        }
        _ => e.to_string(),
    }
}

/// The maps of a capture that the program looks into.
#[derive(Clone, Copy, Debug)]
pub struct Maps<'a> {
    /// The captured connections.
    pub flows: BorrowedFd<'a>,
    /// Our listening sockets.
    pub sockets: BorrowedFd<'a>,
}

/// The program, attached to one namespace. Dropped, it is detached.
#[derive(Debug)]
pub struct Steering {
    _link: OwnedFd,
}

impl Steering {
    /// Loads a copy for the namespace with this cookie, and attaches it there.
    pub fn attach(
        netns: BorrowedFd<'_>,
        cookie: u64,
        generation: u32,
        lanes: u16,
        maps: &Maps<'_>,
    ) -> Result<Self, SteerError> {
        let mut code = instructions(maps).map_err(|e| SteerError::Object(e.to_string()))?;
        let both = u64::from(generation) << 32 | u64::from(lanes);
        for (placeholder, value) in [(STEER_NETNS, cookie), (STEER_LANES, both)] {
            if replace(&mut code, placeholder, value) == 0 {
                return Err(SteerError::Object("a constant is missing".to_owned()));
            }
        }
        let program = load(&code)?;
        let link = sys::link_create(program.as_fd(), netns, AttachType::SkLookup);
        link.map(|link| Self { _link: link }).map_err(SteerError::Attach)
    }
}

/// Whether the kernel takes the program. It is loaded and thrown away.
pub(super) fn probe(maps: &Maps<'_>) -> Result<(), SteerError> {
    let code = instructions(maps).map_err(|e| SteerError::Object(e.to_string()))?;
    load(&code).map(drop)
}

fn load(code: &[bpf_insn]) -> Result<OwnedFd, SteerError> {
    let code: Vec<[u8; 8]> = code.iter().map(bytes).collect();
    sys::load_sk_lookup(STEER, &code).map_err(SteerError::Load)
}

/// The program's instructions, with these maps.
fn instructions(maps: &Maps<'_>) -> Result<Vec<bpf_insn>, Box<dyn std::error::Error>> {
    let mut object = Object::parse(OBJECT)?;
    let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    let fds: HashMap<&str, RawFd> =
        HashMap::from([(FLOWS, maps.flows.as_raw_fd()), (SOCKETS, maps.sockets.as_raw_fd())]);
    let declared = std::mem::take(&mut object.maps);
    let mut known = Vec::new();
    for (name, map) in &declared {
        let fd = fds.get(name.as_str()).ok_or_else(|| format!("map {name} is not known"))?;
        known.push((name.as_str(), *fd, map));
    }
    object.relocate_maps(known.into_iter(), &text)?;
    object.relocate_calls(&text)?;
    let program = object.programs.get(STEER).ok_or("it has no such program")?;
    let function = object.functions.get(&program.function_key()).ok_or("its program has no code")?;
    Ok(function.instructions.clone())
}

/// Puts a value in place of a constant; how often it was there.
fn replace(code: &mut [bpf_insn], placeholder: u64, value: u64) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "two halves")]
    let halves = |n: u64| [n & 0xffff_ffff, n >> 32].map(|half| (half as u32).cast_signed());
    let ([old_low, old_high], [low, high]) = (halves(placeholder), halves(value));
    let mut found = 0;
    for i in 1..code.len() {
        let (first, second) = (code[i - 1], code[i]);
        if first.code == LD_IMM64 && first.src_reg() == 0 && first.imm == old_low && second.imm == old_high {
            (code[i - 1].imm, code[i].imm) = (low, high);
            found += 1;
        }
    }
    found
}

/// An instruction as the kernel takes it (`struct bpf_insn`).
fn bytes(insn: &bpf_insn) -> [u8; 8] {
    // Two fields of four bits: the first one is the lower half where the least significant bit comes first.
    let (dst, src) = (insn.dst_reg(), insn.src_reg());
    let registers = if cfg!(target_endian = "little") { src << 4 | dst } else { dst << 4 | src };
    let [off0, off1] = insn.off.to_ne_bytes();
    let [imm0, imm1, imm2, imm3] = insn.imm.to_ne_bytes();
    [insn.code, registers, off0, off1, imm0, imm1, imm2, imm3]
}
