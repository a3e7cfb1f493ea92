//! Signals that end the daemon, the one that reloads its configuration, and the one after which log files are reopened.
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

/// SIGUSR1.
pub struct Reopen(Signal);

impl Reopen {
    /// Catches it from now on, in a runtime.
    pub fn new() -> io::Result<Self> {
        signal(SignalKind::user_defined1()).map(Self)
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        let _usr1 = self.0.recv().await;
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
