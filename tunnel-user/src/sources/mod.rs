//! Where flows come from: a capture, or a peer with a CONNECT request.
//!
//! A source accepts until its [`SourceHandle`] says to stop, and hands each flow to a [`FlowHandler`], together with the
//! [`PendingRequest`] by which that answers.

pub mod capture;
mod handler;
pub mod listener;

pub use handler::{Answer, Answered, Event, FlowHandler, Incoming, Peer, PendingRequest, SourceHandle};

use std::{io, time::Duration};

use tokio::time::sleep;

/// How long accepting waits after an error that is not the connection's: out of descriptors or memory.
const ACCEPT_BACK_OFF: Duration = Duration::from_millis(50);
/// Connections of one source that are accepted before others on its worker have a turn: with what each begins some 200 µs.
const ACCEPTS_PER_TURN: u32 = 4;

async fn back_off(e: &io::Error) {
    // The connection was gone before it was accepted: nothing is wrong here.
    if e.kind() != io::ErrorKind::ConnectionAborted {
        tracing::warn!("accepting failed: {e}");
        sleep(ACCEPT_BACK_OFF).await;
    }
}
