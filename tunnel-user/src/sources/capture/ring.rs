//! The ring buffers that the kernel programs of a capture write to: their log, and connections from network namespaces without
//! a listener. Whoever polls them is woken when something was written, and not before.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    task::{Context, Poll, ready},
};

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;
use tunnel_common::capture::Missing;

use super::bpf::Capture;
use crate::kernel::ready;

/// The rings of one capture's programs.
pub struct Rings {
    log: Option<EbpfLogger<&'static dyn log::Log>>,
    events: Option<RingBuf<MapData>>,
    missing: Vec<Missing>,
    wakes: Vec<Wake>,
}

impl Rings {
    /// Those of programs that were just loaded, in a runtime.
    pub fn new(capture: &mut Capture) -> Self {
        let (log, events) = (capture.take_log(), capture.take_events().ok());
        let wakes = log.iter().map(Wake::new).chain(events.iter().map(Wake::new)).filter_map(|wake| {
            // Whoever polls looks now and then all the same.
            wake.map_err(|e| tracing::warn!("a ring of the kernel programs cannot be watched: {e}")).ok()
        });
        let wakes = wakes.collect();
        Self { log, events, missing: Vec::new(), wakes }
    }

    /// Ready when something was written since the last time.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        // All of them, so that each wakes up whoever polls.
        let written = self.wakes.iter().filter(|wake| wake.poll(cx).is_ready()).count();
        if written > 0 { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Logs what was written, and keeps what is told of namespaces without listeners.
    pub fn read(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        if let Some(events) = &mut self.events {
            while let Some(event) = events.next() {
                self.missing.extend(Missing::parse(&event));
            }
        }
    }

    /// Connections that came from namespaces without listeners, since the last time.
    pub fn take_missing(&mut self) -> Vec<Missing> {
        std::mem::take(&mut self.missing)
    }
}

/// Tells when a ring has something.
pub(super) struct Wake(AsyncFd<OwnedFd>);

impl Wake {
    /// Watches a ring. Its reader stays with the caller.
    pub(super) fn new(ring: &impl AsFd) -> io::Result<Self> {
        let fd = ring.as_fd().try_clone_to_owned()?;
        ready::readable(fd).map(Self)
    }

    /// Ready when something was written since the last time.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.0.poll_read_ready(cx))?.clear_ready();
        Poll::Ready(Ok(()))
    }
}
