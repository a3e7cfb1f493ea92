//! Signals that end the daemon, and the one that reloads its configuration.
//!
//! From the moment that this is created, none is lost.

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

/// SIGHUP.
pub struct Hangup(Signal);

impl Hangup {
    /// Catches it from now on, in a runtime.
    pub fn new() -> io::Result<Self> {
        signal(SignalKind::hangup()).map(Self)
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        let _hup = self.0.recv().await;
    }
}
