//! Heads of HTTP/1 messages.
//!
//! # Invariants
//! - A head is complete before it is parsed, and no longer than [`HEAD_MAX`].
//! - What follows the head is returned unparsed.

use std::io;

use bytes::{Buf as _, BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The longest head: as many bytes as an HTTP/2 peer may send us in headers.
pub const HEAD_MAX: usize = 16 * 1024;
/// The most fields in one head, as hyper has it.
pub const FIELDS_MAX: usize = 100;
/// What is asked of the stream at a time: most heads fit.
const STEP: usize = 1024;

/// Why bytes are no head that we take. The sender's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// They are not HTTP/1 (RFC 9112).
    #[error("malformed HTTP/1 head: {0}")]
    Syntax(httparse::Error),
    /// Its first line has not ended where the whole head had to.
    #[error("request line longer than {HEAD_MAX} bytes")]
    LineTooLong,
    /// It has not ended where it had to.
    #[error("head longer than {HEAD_MAX} bytes")]
    TooLong,
    /// It has too many fields.
    #[error("head with more than {FIELDS_MAX} fields")]
    TooManyFields,
}

impl From<httparse::Error> for HeadError {
    fn from(e: httparse::Error) -> Self {
        match e {
            httparse::Error::TooManyHeaders => Self::TooManyFields,
            other => Self::Syntax(other),
        }
    }
}

/// Why there is no head.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// What came is none.
    #[error("{0}")]
    Head(#[from] HeadError),
    /// The stream ended before the head did.
    #[error("the connection was closed before the head was complete")]
    Closed,
    /// The stream broke.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Fields for a parser to fill.
pub fn no_fields<'a>() -> [httparse::Header<'a>; FIELDS_MAX] {
    [httparse::EMPTY_HEADER; FIELDS_MAX]
}

/// Reads until `parse` finds a whole head at the front of `buf`, and takes that off; what is left has come
/// behind it. `parse` returns the head and its length, and is asked after each read: whoever sends a byte at a
/// time pays more for each than we do for looking again. The caller bounds the time.
pub async fn read_head<T>(
    stream: &mut (impl AsyncRead + Unpin),
    buf: &mut BytesMut,
    parse: impl Fn(&[u8]) -> Result<Option<(T, usize)>, HeadError>,
) -> Result<T, ReadError> {
    loop {
        if let Some((head, length)) = parse(buf)? {
            buf.advance(length);
            return Ok(head);
        }
        let room = HEAD_MAX.saturating_sub(buf.len());
        if room == 0 {
            // Empty lines in front of the first are not it (RFC 9112 section 2.2).
            let first = buf.trim_ascii_start();
            return Err(
                if first.contains(&b'\n') { HeadError::TooLong } else { HeadError::LineTooLong }.into()
            );
        }
        buf.reserve(STEP.min(room));
        if stream.read_buf(&mut (&mut *buf).limit(room)).await? == 0 {
            return Err(ReadError::Closed);
        }
    }
}
