//! Signals that this process receives.
//!
//! Enters: what the kernel delivers. Leaves: the one that ends the daemon. Invariant: from the moment that
//! it is made, none is lost. It never handles what a command in the foreground should get.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT.
pub struct Terminate {
    term: Signal,
    int: Signal,
}

impl Terminate {
    /// Catches them from now on, in a runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one, and says which it was.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}
