//! What both ends of our HTTP/2 connections allow their peers.
//!
//! The library enforces the protocol; what a peer may do within it, and how fast, is bounded here: [`Guarded`] stands between the
//! library and the byte stream, and [`FloodDetector`] weighs what passes.

mod flood;
mod frames;
mod guard;

pub use self::{
    flood::FloodDetector,
    guard::{Guarded, Role},
};

/// The largest DATA frame we take: with its header (RFC 9113 section 4.1) it fills four TLS records, and one read of the
/// other leg fills it.
pub const FRAME: u32 = 64 * 1024 - 9;
/// What small DATA frames may weigh that nobody has taken yet, by the measure of h2: 256 bytes each, less what is in them;
/// beyond it, it ends the connection. Flows take what has come after each turn of its connection, so it is what comes in
/// one: over TLS 256 KiB (`record::TURN`), in plaintext 128 reads (tokio) of 8 KiB; frames of one byte take ten.
pub const SMALL_FRAMES: usize = 32 << 20;
/// What one stream may have waiting for the socket.
pub const SEND_BUFFER: usize = 256 * 1024;
/// The most bytes of headers in one request or response.
pub const HEADERS: u32 = 16 * 1024;
/// Streams of our own whose reset the peer may not have seen yet, and so may still send on: with more, h2 takes what
/// comes for streams that it has forgotten for an attack. A burst of as many resets within a round trip.
pub const RESET_STREAMS_MAX: usize = 1000;
