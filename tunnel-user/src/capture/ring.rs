//! Rings that the kernel programs write to.
//!
//! Enters: a ring buffer's descriptor. Leaves: a wake-up when there is something in it. Invariant: nothing
//! wakes up while nothing is written. It never reads the ring itself.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    task::{Context, Poll, ready},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Tells when a ring has something.
pub struct Wake(AsyncFd<OwnedFd>);

impl Wake {
    /// Watches a ring. Its reader stays with the caller.
    pub fn new(ring: &impl AsFd) -> io::Result<Self> {
        let fd = ring.as_fd().try_clone_to_owned()?;
        debug_assert!(fd.as_raw_fd() >= 0);
        // SAFETY: the descriptor is a duplicate that belongs to the AsyncFd, and stays open and the same
        // as long as that lives.
        unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map(Self).map_err(Into::into)
    }

    /// Ready when something was written since the last time.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.0.poll_read_ready(cx))?.clear_ready();
        Poll::Ready(Ok(()))
    }
}
