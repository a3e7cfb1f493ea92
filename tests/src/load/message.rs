//! The messages that a client and the server exchange. A message is made of a number, and a *request* is a message that
//! also says its length, and whether it is the connection's last.
//!
//! A request's first byte is [`MORE`] or [`LAST`], followed by three bytes of its length, little-endian; or it has the
//! top bit set, and is the whole request, and the last. After the answer to a last request the server closes, and then
//! the client does. So the end that was dialled closes first, on each connection of a chain of proxies, and holds
//! TIME_WAIT, which takes up no ephemeral port there: the 28,232 that Linux has would otherwise be used up within 60
//! seconds, by the client as by a proxy that dials the target. (A SYN to a socket in TIME_WAIT is accepted when its
//! timestamp is newer: `tcp_timewait_state_process`, net/ipv4/tcp_minisocks.c.)
//!
//! # Invariants
//! - Two messages of a connection differ in every piece of 1,024 bytes, so that the answer to another message, or one
//!   put together of two, is not mistaken for the right one.

use std::io;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncRead, AsyncWriteExt as _},
    net::TcpStream,
};

use super::buffer::receive;

/// A request that is followed by others.
const MORE: u8 = 1;
/// A request after whose answer the server ends.
const LAST: u8 = 2;
/// Set in a request of one byte.
const BYTE: u8 = 0x80;
/// The kind and the length of a request.
const HEADER: usize = 4;
/// The shortest request but the one of one byte: its header and its number.
pub(super) const MIN: usize = HEADER + 8;
/// The longest, for its length has three bytes.
pub(super) const MAX: usize = (1 << 24) - 1;
/// What is numbered by itself.
const PIECE: usize = 1024;
/// What is written before anything is read; more, and the buffers on the way may be full of what nobody reads yet.
const AT_ONCE: usize = 64 * 1024;

/// What a server does about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// How long it is, and its answer.
    pub(super) size: usize,
    /// Whether the server ends after its answer.
    pub(super) last: bool,
}

impl Request {
    /// The request that begins with these bytes; nothing when there are too few of them to tell.
    pub(super) fn parse(bytes: &[u8]) -> io::Result<Option<Self>> {
        let size = |last| {
            let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
            let size = u32::from_le_bytes(*header) >> 8;
            match usize::try_from(size) {
                Ok(size) if size >= MIN => Ok(Some(Self { size, last })),
                _ => Err(io::Error::other(format!("a request of {size} bytes"))),
            }
        };
        match bytes.first() {
            None => Ok(None),
            Some(kind) if kind & BYTE != 0 => Ok(Some(Self { size: 1, last: true })),
            Some(&MORE) => size(false),
            Some(&LAST) => size(true),
            Some(kind) => Err(io::Error::other(format!("a request that begins with {kind:#04x}"))),
        }
    }
}

/// A message's bytes.
pub(super) fn message(size: usize) -> Vec<u8> {
    // Any bytes would do; these are not all the same.
    (0u8..=250).cycle().take(size).collect()
}

/// Gives a message its number, as far as there is room for it.
pub(super) fn number(message: &mut [u8], number: u64) {
    for piece in message.chunks_mut(PIECE) {
        let n = piece.len().min(8);
        piece[..n].copy_from_slice(&number.to_le_bytes()[..n]);
    }
}

/// Makes a request of a message; [`MIN`] to [`MAX`] bytes.
pub(super) fn request(message: &mut [u8], n: u64, last: bool) -> Result<()> {
    let size = message.len();
    ensure!((MIN..=MAX).contains(&size), "a request has {MIN} to {MAX} bytes, and not {size}");
    number(&mut message[HEADER..], n);
    let header = (u32::try_from(size)? << 8) | u32::from(if last { LAST } else { MORE });
    message[..HEADER].copy_from_slice(&header.to_le_bytes());
    Ok(())
}

/// The request of one byte: the only one that is answered when its first byte is there.
pub(super) fn byte(n: u64) -> [u8; 1] {
    [BYTE | n.to_le_bytes()[0]]
}

/// Sends a message, receives as much, and compares.
pub(super) async fn exchange(stream: &mut TcpStream, message: &[u8]) -> Result<()> {
    if message.len() <= AT_ONCE {
        stream.write_all(message).await.context("sending")?;
        return expect(stream, message).await;
    }
    let (mut from, mut to) = stream.split();
    let send = async { to.write_all(message).await.context("sending") };
    tokio::try_join!(send, expect(&mut from, message)).map(drop)
}

/// Receives exactly this.
pub(super) async fn expect<S: AsyncRead + Unpin>(stream: &mut S, message: &[u8]) -> Result<()> {
    let mut rest = message;
    while !rest.is_empty() {
        let at = message.len() - rest.len();
        match receive(stream, |_, bytes| compare(rest, at, bytes)).await.context("receiving")? {
            Some(n) => rest = &rest[n?..],
            None => bail!("the end after {at} bytes, where {} should be", message.len()),
        }
    }
    Ok(())
}

/// Expects the peer's end.
pub(super) async fn expect_end<S: AsyncRead + Unpin>(stream: &mut S) -> Result<()> {
    match receive(stream, |_, bytes| bytes.len()).await.context("waiting for the end")? {
        None => Ok(()),
        Some(n) => bail!("{n} bytes where the end should be"),
    }
}

fn compare(rest: &[u8], at: usize, bytes: &[u8]) -> Result<usize> {
    let wrong = rest.iter().zip(bytes).position(|(wanted, is)| wanted != is);
    let Some(wanted) = rest.get(..bytes.len()) else {
        bail!("{} bytes more than were sent", bytes.len() - rest.len())
    };
    if wanted != bytes {
        bail!("wrong byte at offset {} of an answer", at + wrong.unwrap_or_default());
    }
    Ok(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_how_long_it_is_and_whether_it_is_the_last() {
        let mut bytes = message(3000);
        request(&mut bytes, 7, false).unwrap();
        assert_eq!(Request::parse(&bytes).unwrap(), Some(Request { size: 3000, last: false }));
        assert_eq!(Request::parse(&bytes[..3]).unwrap(), None);
        request(&mut bytes, 7, true).unwrap();
        assert_eq!(Request::parse(&bytes).unwrap(), Some(Request { size: 3000, last: true }));
        assert_eq!(Request::parse(&byte(1)).unwrap(), Some(Request { size: 1, last: true }));
        assert!(Request::parse(&[0]).is_err());
        assert!(Request::parse(&[MORE, 1, 0, 0]).is_err());
        assert!(request(&mut bytes[..MIN - 1], 7, true).is_err());
    }

    #[test]
    fn two_messages_differ_in_every_piece() {
        let (mut one, mut two) = (message(3000), message(3000));
        request(&mut one, 1, false).unwrap();
        request(&mut two, 2, false).unwrap();
        for (one, two) in one[HEADER..].chunks(PIECE).zip(two[HEADER..].chunks(PIECE)) {
            assert_ne!(one, two);
        }
        assert_ne!(byte(1), byte(2));
    }
}
