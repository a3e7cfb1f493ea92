//! HTTP/3 as far as CONNECT needs it (RFC 9114): frames, SETTINGS, QPACK without a dynamic table (RFC 9204), and the heads of
//! requests and responses.
//!
//! # Invariants
//! - Nothing here allocates more than a peer may make us: the length of a header section, and of each frame on a control
//!   stream, is bounded before it is read.
//! - The dynamic table of QPACK has no room: no header section ever waits for another stream.

mod fields;
pub mod frame;
mod huffman;
pub mod message;
pub mod qpack;
pub mod settings;
pub mod varint;

use std::fmt;

/// The most bytes of headers in one request or response, as RFC 9114 section 4.2.2 counts them; as over HTTP/2.
pub const HEADERS: usize = super::http2::HEADERS as usize;

/// An error code of HTTP/3 (RFC 9114 section 8.1) or QPACK (RFC 9204 section 6).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Code(pub u64);

/// The codes that have names, and these.
macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl Code {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// What the RFC calls it.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    /// Nothing is wrong.
    NO_ERROR = 0x100, "H3_NO_ERROR";
    /// The peer violates the protocol, in a way that has no code of its own.
    GENERAL_PROTOCOL_ERROR = 0x101, "H3_GENERAL_PROTOCOL_ERROR";
    /// Something failed here.
    INTERNAL_ERROR = 0x102, "H3_INTERNAL_ERROR";
    /// A stream of a kind that the peer may not open.
    STREAM_CREATION_ERROR = 0x103, "H3_STREAM_CREATION_ERROR";
    /// A stream was closed that the connection needs.
    CLOSED_CRITICAL_STREAM = 0x104, "H3_CLOSED_CRITICAL_STREAM";
    /// A frame that is not allowed there.
    FRAME_UNEXPECTED = 0x105, "H3_FRAME_UNEXPECTED";
    /// A frame that is malformed.
    FRAME_ERROR = 0x106, "H3_FRAME_ERROR";
    /// More than this end takes.
    EXCESSIVE_LOAD = 0x107, "H3_EXCESSIVE_LOAD";
    /// An identifier that is not in use, or no longer.
    ID_ERROR = 0x108, "H3_ID_ERROR";
    /// SETTINGS that are malformed.
    SETTINGS_ERROR = 0x109, "H3_SETTINGS_ERROR";
    /// A control stream that does not begin with SETTINGS.
    MISSING_SETTINGS = 0x10a, "H3_MISSING_SETTINGS";
    /// A request that was not processed: it may be made again.
    REQUEST_REJECTED = 0x10b, "H3_REQUEST_REJECTED";
    /// A request, or its tunnel, that nobody wants any more.
    REQUEST_CANCELLED = 0x10c, "H3_REQUEST_CANCELLED";
    /// A request that ends before it is whole.
    REQUEST_INCOMPLETE = 0x10d, "H3_REQUEST_INCOMPLETE";
    /// A request or response that is malformed.
    MESSAGE_ERROR = 0x10e, "H3_MESSAGE_ERROR";
    /// The connection behind a CONNECT request was reset.
    CONNECT_ERROR = 0x10f, "H3_CONNECT_ERROR";
    /// The request is to be made over another version.
    VERSION_FALLBACK = 0x110, "H3_VERSION_FALLBACK";
    /// A header section that cannot be decoded.
    QPACK_DECOMPRESSION_FAILED = 0x200, "QPACK_DECOMPRESSION_FAILED";
    /// An instruction on the encoder's stream that is not allowed.
    QPACK_ENCODER_STREAM_ERROR = 0x201, "QPACK_ENCODER_STREAM_ERROR";
    /// An instruction on the decoder's stream that is not allowed.
    QPACK_DECODER_STREAM_ERROR = 0x202, "QPACK_DECODER_STREAM_ERROR";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "error code {:#x}", self.0),
        }
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a connection ends that does not follow the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why} ({code})")]
pub struct ProtocolError {
    /// What the peer hears.
    pub code: Code,
    /// What it has done.
    pub why: &'static str,
}

impl ProtocolError {
    /// With a code and a reason.
    pub const fn new(code: Code, why: &'static str) -> Self {
        Self { code, why }
    }
}

#[cfg(test)]
mod tests;
