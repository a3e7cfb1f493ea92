//! Descriptors that a service manager has passed to this process (sd_listen_fds(3)).
//!
//! # Invariants
//! - They are taken once, before anything else opens a descriptor by number; a child does not inherit them.

#![expect(unsafe_code, reason = "descriptors that are known by their numbers only")]

use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// The first one (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;
/// The most that are taken: as many as a store holds (the kernel's limit of a message, and more than listeners need).
pub const PASSED_MAX: u32 = 4096;

/// Takes `count` of them, if this is the first call.
///
/// # Errors
/// When one of them is not open, or there are more than [`PASSED_MAX`].
pub fn take(count: u32) -> io::Result<Vec<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let last = i32::try_from(count.min(PASSED_MAX)).ok().map(|count| FIRST + count);
    let last = last.filter(|_| count <= PASSED_MAX).ok_or(io::ErrorKind::InvalidInput)?;
    for number in FIRST..last {
        // SAFETY: fcntl is asked whether it is open, and fails where it is not; nothing is done with it otherwise, and it is
        // borrowed for no longer than that.
        let passed = unsafe { BorrowedFd::borrow_raw(number) };
        let flags = fcntl_getfd(passed)?;
        fcntl_setfd(passed, flags | FdFlags::CLOEXEC)?;
    }
    // SAFETY: each is open, as the loop above has found, and is nobody else's: the manager has made them for this process
    // (LISTEN_PID), and the flag above sees to it that they are taken once.
    Ok((FIRST..last).map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}
