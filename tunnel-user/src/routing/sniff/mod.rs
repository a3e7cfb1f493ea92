//! Sniffs what a client sends first: the server name in its TLS, or the host of its HTTP/1 request.
//!
//! # Invariants
//! - It ends within its limit of time and [`BYTES_MAX`]; what it does not understand is nothing found, and never an error.
//! - Every byte that was read is kept, in order and unchanged.

mod http;
mod tls;

use std::{future::poll_fn, time::Duration};

use tokio::time::timeout;

use crate::{
    model::flow::Sniffed,
    relay::{Broken, Leg, Queue},
};

/// The most bytes that are looked at: one whole TLS record (RFC 8446 section 5.1), which a ClientHello fits with
/// post-quantum key shares (2 KiB) and a session ticket beside them; and as much as the head of any HTTP/1
/// message of ours.
pub const BYTES_MAX: usize = 16 * 1024;

/// What the first bytes of a connection say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parse {
    /// Nothing yet: more bytes may change that.
    More,
    /// This, whatever follows.
    Done(Sniffed),
}

/// Parses the first bytes of a connection. TLS begins with a handshake record, HTTP/1 with a method in capital
/// letters; what begins otherwise is neither, from its first byte.
pub fn parse(bytes: &[u8]) -> Parse {
    match bytes.first() {
        None => Parse::More,
        Some(&tls::HANDSHAKE) => tls::parse(bytes),
        Some(b'A'..=b'Z') => http::parse(bytes),
        Some(_) => Parse::Done(Sniffed::Nothing),
    }
}

/// Reads from `leg` until its first bytes have said what they are, for `limit` at most. `early` holds what was
/// read before, and then what was read here too. An end is left for the relay to pass on: a leg says it again.
pub async fn sniff(leg: &mut impl Leg, early: &mut Queue, limit: Duration) -> Result<Sniffed, Broken> {
    let mut seen = Vec::new();
    early.with_slices(|slices| slices.iter().for_each(|slice| note(&mut seen, slice)));
    let reading = async {
        loop {
            if let Parse::Done(found) = parse(&seen) {
                return Ok(found);
            }
            if seen.len() >= BYTES_MAX {
                return Ok(Sniffed::Nothing);
            }
            let Some(chunk) = poll_fn(|cx| leg.poll_recv(cx)).await? else {
                return Ok(Sniffed::Nothing);
            };
            note(&mut seen, &chunk);
            early.push(chunk);
        }
    };
    // A client that waits for its server to speak is not kept waiting for longer.
    timeout(limit, reading).await.unwrap_or(Ok(Sniffed::Nothing))
}

fn note(seen: &mut Vec<u8>, bytes: &[u8]) {
    let room = BYTES_MAX - seen.len();
    seen.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

#[cfg(test)]
mod tests;
