//! Bypass: an application's socket and ours are joined past TCP, by a kernel program on a map of sockets.
//!
//! # Invariants
//! - A pair is in the map before its gates open, and its slot is not reused while a program may act on it.
//! - A socket is never removed from the map: that would drop what is queued.

mod holder;
mod judge;
mod promote;
mod slot;
#[cfg(test)]
#[expect(unsafe_code, reason = "calls of which the answer is what is tested")]
mod tests;
mod trial;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Map, SockHash},
    programs::{Program, ProgramError, RawTracePoint, RawTracePointRunOptions, SkMsg, TestRun as _},
};
use tunnel_common::{
    fastpath::bypass::{APPLICATION, DAEMON, SLOTS_MAX, Tag},
    names,
};

pub use self::promote::{Candidate, Counts, PendingPair, Promoter, Promotions, Refusal};
use self::slot::{SharedSide, SharedSlot};
use crate::kernel::btf::{self, OffsetsError};
use crate::kernel::{map::TypedMap, mapped::MappedArray, sys};

/// The program, as the build script made or found it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bypass.bpf.o"));

/// Why there is no bypass. None of it is the application's or a peer's fault.
#[derive(Debug, thiserror::Error)]
pub enum BypassError {
    /// The kernel is not known to be good.
    #[error("{0}")]
    Kernel(String),
    /// The kernel does not say where its fields are.
    #[error(transparent)]
    Offsets(#[from] OffsetsError),
    /// The object could not be parsed or its maps not be made.
    #[error("cannot load the maps of the bypass program: {0}")]
    Load(#[source] Box<EbpfError>),
    /// The verifier or the kernel refused the program.
    #[error("the kernel rejected the bypass program: {0}")]
    Program(#[source] Box<ProgramError>),
    /// The object has no such program or map: it was built from other sources than this daemon.
    #[error("the bypass object has no {0}: it was built for another version")]
    Missing(&'static str),
    /// The pairs could not be mapped.
    #[error("cannot map the pairs of the bypass program: {0}")]
    Slots(#[source] io::Error),
    /// A connection of our own was not treated as one should be.
    #[error("bypass failed its self-test on this kernel: {0}")]
    Proof(&'static str),
    /// That connection could not be made.
    #[error("cannot run the self-test of bypass: {0}")]
    Trial(#[source] io::Error),
    /// What finds the sockets could not start.
    #[error("cannot start bypass: {0}")]
    Start(#[source] io::Error),
}

impl BypassError {
    /// Whether this process lacks a privilege, rather than the kernel something.
    pub fn is_privilege(&self) -> bool {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(e) = cause {
            if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied) {
                return true;
            }
            cause = e.source();
        }
        false
    }
}

/// The program and its maps.
pub struct Bypass {
    /// Holds what the descriptors below belong to.
    ebpf: Ebpf,
    sockets: TypedMap<u64, u32>,
    tags: TypedMap<i32, Tag>,
    slots: MappedArray<SharedSlot>,
    free: Mutex<Free>,
}

/// Which places are free.
struct Free {
    given_back: Vec<u32>,
    never_used: u32,
    generation: u32,
}

impl Bypass {
    /// Loads the program; it acts on nothing until a pair is made.
    pub fn load() -> Result<Arc<Self>, BypassError> {
        let offsets = btf::of_sockets()?;
        let mut ebpf = EbpfLoader::new()
            .override_global(names::bypass::OFFSETS, &offsets, true)
            .load(OBJECT)
            .map_err(|e| BypassError::Load(Box::new(e)))?;
        let refused = |e| BypassError::Program(Box::new(e));
        let look: &mut RawTracePoint = match ebpf.program_mut(names::bypass::LOOK) {
            Some(Program::RawTracePoint(p)) => p,
            _ => return Err(BypassError::Missing(names::bypass::LOOK)),
        };
        look.load().map_err(refused)?;
        let missing = || BypassError::Missing(names::bypass::SOCKETS);
        let sockets = ebpf.take_map(names::bypass::SOCKETS).ok_or_else(missing)?;
        let sockets: SockHash<_, u64> = SockHash::try_from(sockets).map_err(|_| missing())?;
        let verdict: &mut SkMsg = match ebpf.program_mut(names::bypass::VERDICT) {
            Some(Program::SkMsg(p)) => p,
            _ => return Err(BypassError::Missing(names::bypass::VERDICT)),
        };
        verdict.load().map_err(refused)?;
        verdict.attach(sockets.fd()).map_err(refused)?;
        let sockets = TypedMap::new(dup(sockets.fd().as_fd())?).map_err(BypassError::Slots)?;
        let tags = TypedMap::new(fd_of(&ebpf, names::bypass::TAGS)?).map_err(BypassError::Slots)?;
        let slots =
            MappedArray::new(fd_of(&ebpf, names::bypass::SLOTS)?.as_fd()).map_err(BypassError::Slots)?;
        let free = Mutex::new(Free { given_back: Vec::new(), never_used: 0, generation: 0 });
        let bypass = Arc::new(Self { ebpf, sockets, tags, slots, free });
        trial::run(&bypass)?;
        Ok(bypass)
    }

    /// Joins two sockets that are connected to each other. Nothing is redirected until a gate is opened.
    pub fn pair(self: &Arc<Self>, application: BorrowedFd<'_>, ours: BorrowedFd<'_>) -> io::Result<Pair> {
        let (slot, generation) = self.take().ok_or(io::ErrorKind::QuotaExceeded)?;
        let pair = Pair { bypass: Arc::clone(self), slot, generation };
        let cookies = [sys::socket_cookie(application)?, sys::socket_cookie(ours)?];
        pair.claim(cookies);
        for (side, socket) in [(APPLICATION, application), (DAEMON, ours)] {
            let tag = Tag { slot, generation, side, reserved: 0 };
            self.tags.update(&socket.as_raw_fd(), &tag)?;
        }
        // Ours first: what it sends by TCP is right in any case, and the application's socket stays as it is when this
        // fails. Each is there once and for all: a socket in the map has no place in it a second time.
        for (cookie, socket) in [(cookies[1], ours), (cookies[0], application)] {
            self.sockets.insert(&cookie, &socket.as_raw_fd().cast_unsigned())?;
        }
        Ok(pair)
    }

    fn take(&self) -> Option<(u32, u32)> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match free.given_back.pop() {
            Some(slot) => slot,
            None if usize::try_from(free.never_used).is_ok_and(|n| n < SLOTS_MAX) => {
                free.never_used += 1;
                free.never_used - 1
            }
            None => return None,
        };
        // Never 0, which no socket's tag may find; after 2^32 pairs an old tag could find another's place only if
        // its socket still were there and sent.
        free.generation = free.generation.wrapping_add(1).max(1);
        Some((slot, free.generation))
    }

    fn look(&self, slot: u32) {
        let Some(Program::RawTracePoint(look)) = self.ebpf.program(names::bypass::LOOK) else { return };
        let mut options = RawTracePointRunOptions::new();
        options.args[0] = slot.into();
        if let Err(e) = look.test_run(options) {
            tracing::debug!("cannot inspect a pair of sockets: {e}");
        }
    }
}

/// Two sockets that are joined. Dropped, both go on by TCP.
pub struct Pair {
    bypass: Arc<Bypass>,
    slot: u32,
    generation: u32,
}

/// What waits in front of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What it has not read, as the kernel charges it. Of a socket that is gone: nothing.
    pub queued: u32,
}

impl Pair {
    fn slot(&self) -> &SharedSlot {
        self.bypass.slots.at(self.slot as usize)
    }

    fn claim(&self, cookies: [u64; 2]) {
        let slot = self.slot();
        for (side, cookie) in slot.sides.iter().zip(cookies) {
            side.clear(cookie);
        }
        slot.gates.store(0, Ordering::Relaxed);
        slot.generation.store(self.generation, Ordering::Release);
    }

    /// From now on what this side sends may be redirected.
    pub fn open(&self, side: u32) {
        self.slot().gates.fetch_or(1 << side, Ordering::Release);
    }

    /// From now on what this side sends goes by TCP.
    pub fn shut(&self, side: u32) {
        self.slot().gates.fetch_and(!(1 << side), Ordering::Release);
    }

    /// Bytes that this side sent past TCP.
    pub fn redirected(&self, side: u32) -> u64 {
        self.side(side).redirected.load(Ordering::Relaxed)
    }

    /// Bytes that it offered to TCP.
    pub fn passed(&self, side: u32) -> u64 {
        self.side(side).passed.load(Ordering::Relaxed)
    }

    /// Whether TCP has anything of this side on its way, or waits to send it.
    pub fn has_unacked(&self, side: u32) -> bool {
        self.bypass.look(self.slot);
        self.side(side).unacked.load(Ordering::Relaxed) > 0
    }

    fn side(&self, side: u32) -> &SharedSide {
        &self.slot().sides[usize::from(side != APPLICATION)]
    }

    /// What waits in front of the application. One that has not sent anything yet counts as gone: nothing was
    /// redirected to it then.
    pub fn look(&self) -> Waiting {
        self.bypass.look(self.slot);
        let side = self.side(APPLICATION);
        let queued = side.queued.load(Ordering::Relaxed);
        Waiting { queued: if side.alive.load(Ordering::Relaxed) == 0 { 0 } else { queued } }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let slot = self.slot();
        slot.gates.store(0, Ordering::Release);
        slot.generation.store(0, Ordering::Release);
        let mut free = self.bypass.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.given_back.push(self.slot);
    }
}

fn dup(fd: BorrowedFd<'_>) -> Result<OwnedFd, BypassError> {
    fd.try_clone_to_owned().map_err(BypassError::Slots)
}

fn fd_of(ebpf: &Ebpf, name: &'static str) -> Result<OwnedFd, BypassError> {
    match ebpf.map(name) {
        Some(Map::Array(data) | Map::SkStorage(data)) => dup(data.fd().as_fd()),
        _ => Err(BypassError::Missing(name)),
    }
}
