//! Bypass: an application's socket and ours are joined past TCP, by a kernel program on a map of sockets.
//!
//! # Invariants
//! - A pair is in the map before its gates open, and its slot is not reused while a program may act on it.
//! - A socket is never removed from the map: that would drop what is queued.

mod holder;
mod judge;
mod promote;
#[cfg(test)]
mod tests;
mod trial;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Map, SockHash},
    programs::{Program, ProgramError, RawTracePoint, RawTracePointRunOptions, SkMsg, TestRun as _},
};
use tunnel_common::{
    fastpath::bypass::{APPLICATION, DAEMON, SLOTS_MAX, Side, Slot, Tag},
    names,
};

pub use self::promote::{Asked, Candidate, Counts, Promoter, Promotions, Refusal};
use crate::kernel::btf::{self, OffsetsError};
use crate::kernel::sys;

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
    sockets: OwnedFd,
    tags: OwnedFd,
    slots: Slots,
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
        let sockets = dup(sockets.fd().as_fd())?;
        let tags = fd_of(&ebpf, names::bypass::TAGS)?;
        let slots = Slots::map(fd_of(&ebpf, names::bypass::SLOTS)?.as_fd()).map_err(BypassError::Slots)?;
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
            sys::map_update(self.tags.as_fd(), &socket.as_raw_fd(), &tag)?;
        }
        // Ours first: what it sends by TCP is right in any case, and the application's socket stays as it is when this
        // fails. Each is there once and for all: a socket in the map has no place in it a second time.
        for (cookie, socket) in [(cookies[1], ours), (cookies[0], application)] {
            sys::map_insert(self.sockets.as_fd(), &cookie, &socket.as_raw_fd().cast_unsigned())?;
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
        self.bypass.slots.at(self.slot)
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

/// A slot as it lies in memory that the kernel writes too.
#[repr(C)]
struct SharedSlot {
    generation: AtomicU32,
    gates: AtomicU32,
    sides: [SharedSide; 2],
}

#[repr(C)]
struct SharedSide {
    cookie: AtomicU64,
    sock: AtomicU64,
    redirected: AtomicU64,
    passed: AtomicU64,
    burst: AtomicU32,
    queued: AtomicU32,
    unread: AtomicU32,
    unacked: AtomicU32,
    alive: AtomicU32,
    reserved: AtomicU32,
}

const _: () =
    assert!(size_of::<SharedSlot>() == size_of::<Slot>() && size_of::<SharedSide>() == size_of::<Side>());

impl SharedSide {
    fn clear(&self, cookie: u64) {
        for word in [&self.sock, &self.redirected, &self.passed] {
            word.store(0, Ordering::Relaxed);
        }
        for word in [&self.burst, &self.queued, &self.unread, &self.unacked, &self.alive] {
            word.store(0, Ordering::Relaxed);
        }
        self.cookie.store(cookie, Ordering::Relaxed);
    }
}

/// All slots.
struct Slots(NonNull<SharedSlot>);

// SAFETY: the memory is mapped until it is dropped, and made of atomics only.
unsafe impl Send for Slots {}
// SAFETY: as above.
unsafe impl Sync for Slots {}

impl Slots {
    const LEN: usize = SLOTS_MAX * size_of::<Slot>();

    fn map(array: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                Self::LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                array.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at.cast()).map(Self).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn at(&self, slot: u32) -> &SharedSlot {
        let index = usize::try_from(slot).map_or(0, |n| n.min(SLOTS_MAX - 1));
        // SAFETY: inside the mapping, which has SLOTS_MAX of them one after the other (an array's values lie at multiples
        // of eight, which their size is), aligned, and of types for which every bit pattern is a value.
        unsafe { self.0.add(index).as_ref() }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: what `map` mapped, and nobody has a reference into it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), Self::LEN) };
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
