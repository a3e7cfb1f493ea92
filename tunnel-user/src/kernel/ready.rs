//! Descriptors that the runtime waits for.

#![expect(unsafe_code, reason = "tokio wants to be told that a descriptor stays the same")]

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor with the runtime of the thread, for reading.
pub fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: `AsyncFd` owns the descriptor; an `OwnedFd` has the same one as long as it lives, and closes it only when it is
    // dropped, which `AsyncFd` does after it has deregistered it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}
