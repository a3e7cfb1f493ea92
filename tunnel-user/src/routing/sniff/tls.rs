//! The server name in a TLS client's ClientHello, parsed from the first bytes of a connection.
//!
//! Whether a server would accept the ClientHello is not judged. rustls's Acceptor judges it, and rejects TLS 1.2
//! clients that only their server should reject (without signature_algorithms, for one).
//!
//! # Invariants
//! - Every length is checked before it is used, and a ClientHello is complete before it is parsed.

use std::borrow::Cow;

use super::{BYTES_MAX, Parse};
use crate::model::flow::{HostName, Sniffed};

/// The type of a handshake record (RFC 8446 section 5.1).
pub(super) const HANDSHAKE: u8 = 22;
/// The major version of every record, whatever the version of TLS.
const MAJOR: u8 = 3;
/// The most bytes that one record carries (RFC 8446 section 5.1).
const RECORD_MAX: usize = 1 << 14;
/// The type of a ClientHello (RFC 8446 section 4).
const CLIENT_HELLO: u8 = 1;
/// The extension that holds the name (RFC 6066 section 3).
const SERVER_NAME: u16 = 0;
/// The only type of name that there is.
const HOST_NAME: u8 = 0;
/// The bytes of `random` (RFC 8446 section 4.1.2).
const RANDOM: usize = 32;

/// The bytes are no ClientHello, whatever follows.
struct NoHello;

/// Looks at bytes that begin with [`HANDSHAKE`].
pub(super) fn parse(bytes: &[u8]) -> Parse {
    match client_hello(bytes) {
        Ok(Some(found)) => Parse::Done(found),
        Ok(None) => Parse::More,
        Err(NoHello) => Parse::Done(Sniffed::Nothing),
    }
}

/// A ClientHello may come in any number of records.
fn client_hello(bytes: &[u8]) -> Result<Option<Sniffed>, NoHello> {
    let mut rest = bytes;
    let mut message = Cow::Borrowed(&[][..]);
    loop {
        if let Some(hello) = whole(&message)? {
            return Ok(Some(server_name(hello).map_or(Sniffed::Nothing, Sniffed::Sni)));
        }
        let (part, behind) = fragment(rest)?;
        if part.is_empty() {
            return Ok(None);
        }
        if message.is_empty() {
            message = Cow::Borrowed(part);
        } else {
            message.to_mut().extend_from_slice(part);
        }
        rest = behind;
    }
}

/// What the first record carries, as far as it is there, and what is behind it.
fn fragment(bytes: &[u8]) -> Result<(&[u8], &[u8]), NoHello> {
    let is = |at: usize, wanted: u8| bytes.get(at).is_none_or(|byte| *byte == wanted);
    if !is(0, HANDSHAKE) || !is(1, MAJOR) {
        return Err(NoHello);
    }
    let [_, _, _, high, low, payload @ ..] = bytes else { return Ok((&[], &[])) };
    match usize::from(u16::from_be_bytes([*high, *low])) {
        length @ 1..=RECORD_MAX => Ok(payload.split_at(payload.len().min(length))),
        // A handshake record is never empty (RFC 8446 section 5.1).
        _ => Err(NoHello),
    }
}

/// The body of the message, once all of it is there.
fn whole(message: &[u8]) -> Result<Option<&[u8]>, NoHello> {
    if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
        return Err(NoHello);
    }
    let [_, high, middle, low, body @ ..] = message else { return Ok(None) };
    let length = usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low);
    // Nobody would read that far.
    if length > BYTES_MAX { Err(NoHello) } else { Ok(body.get(..length)) }
}

/// The name that the client asks for; none where there is none, or more than one.
fn server_name(hello: &[u8]) -> Option<HostName> {
    let mut hello = Parts(hello);
    let _version = hello.take(2)?;
    let _random = hello.take(RANDOM)?;
    let _session = hello.behind_u8()?;
    let _cipher_suites = hello.behind_u16()?;
    let _compression_methods = hello.behind_u8()?;
    let mut extensions = Parts(hello.behind_u16()?);
    let mut found = None;
    while !extensions.0.is_empty() {
        let (kind, data) = (extensions.u16()?, extensions.behind_u16()?);
        if kind == SERVER_NAME && found.replace(data).is_some() {
            return None;
        }
    }
    let mut list = Parts(found?);
    let mut names = Parts(list.behind_u16()?);
    let (kind, name) = (names.u8()?, names.behind_u16()?);
    if kind != HOST_NAME || !names.0.is_empty() || !list.0.is_empty() {
        return None;
    }
    HostName::new(std::str::from_utf8(name).ok()?)
}

/// What is left of a structure of TLS (RFC 8446 section 3).
struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(front)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// What follows a length of one byte.
    fn behind_u8(&mut self) -> Option<&'a [u8]> {
        let length = self.u8()?;
        self.take(length.into())
    }

    /// What follows a length of two bytes.
    fn behind_u16(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?;
        self.take(length.into())
    }
}
