//! Signals that this process receives.
//!
//! Enters: what the kernel delivers. Leaves: the one that ends the daemon. Invariant: a second one does
//! not wait for anything. It never handles what a command in the foreground should get.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Waits for SIGTERM or SIGINT, and says which.
pub async fn terminate() -> io::Result<&'static str> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = term.recv() => Ok("SIGTERM"),
        _ = int.recv() => Ok("SIGINT"),
    }
}
