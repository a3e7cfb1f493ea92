//! The record layer of TLS 1.3 (RFC 8446 section 5), after rustls has completed the handshake.
//!
//! rustls verifies the peer and derives every key; records are sealed and opened with them here, each sequence number once.
//!
//! rustls's own record layer copies each record three times, into freshly allocated memory, and reads 4 to 8 KiB at a time. This
//! one seals from where the bytes are to where the socket takes them, opens where they were received, and reads and writes eight
//! records at once.

mod buffer;
mod handshake;
mod keys;
mod pace;
mod session;
mod stream;

pub use self::{
    handshake::{Agreed, accept, accept_at, connect},
    pace::{Pace, Stage},
    session::{Next, RecordError, Session},
    stream::TlsStream,
};

/// The most plaintext in one record (RFC 8446 section 5.1).
pub const PLAIN_MAX: usize = 1 << 14;
/// In front of a record: type, version, length.
const HEADER: usize = 5;
/// Of all cipher suites of TLS 1.3 that we speak.
const TAG: usize = 16;
/// A record of ours as it is sent, when it is full.
const SEALED_MAX: usize = HEADER + PLAIN_MAX + 1 + TAG;
/// Kept free of data for what is said beside it: a new key, an alert, an end, each once.
const ASIDE: usize = 4 * (HEADER + 8 + 1 + TAG);
/// The most that may follow the header of a peer's record (RFC 8446 section 5.2).
const CIPHERTEXT_MAX: usize = PLAIN_MAX + 256;

/// What a record carries (RFC 8446 section 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Content {
    Alert = 21,
    Handshake = 22,
    Data = 23,
}
