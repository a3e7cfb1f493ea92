//! Frames (RFC 9114 section 7), as they come on a stream in whatever pieces.
//!
//! # Invariants
//! - DATA is passed on as it comes; of any other frame no more is kept than its bound.
//! - A frame of a kind that does not belong on the stream is an error before its payload is read; one of an unknown kind is
//!   skipped (RFC 9114 section 9).

use bytes::{Bytes, BytesMut};

use super::{Code, HEADERS, ProtocolError, varint};

/// The most of a frame on a control stream: sixty settings of the longest kind.
pub const CONTROL_MAX: usize = 1024;
/// The most bytes in front of a payload: two integers.
const HEAD_MAX: usize = 2 * varint::LONGEST;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(pub u64);

impl Kind {
    /// Bytes of a message's content.
    pub const DATA: Self = Self(0x00);
    /// A header section.
    pub const HEADERS: Self = Self(0x01);
    /// A push is not wanted.
    pub const CANCEL_PUSH: Self = Self(0x03);
    /// What a peer takes.
    pub const SETTINGS: Self = Self(0x04);
    /// A push is announced.
    pub const PUSH_PROMISE: Self = Self(0x05);
    /// No requests after this one.
    pub const GOAWAY: Self = Self(0x07);
    /// How many pushes there may be.
    pub const MAX_PUSH_ID: Self = Self(0x0d);

    /// Of HTTP/2, without a meaning here (RFC 9114 section 7.2.8).
    fn is_reserved(self) -> bool {
        matches!(self.0, 0x02 | 0x06 | 0x08 | 0x09)
    }

    /// What is done with one of these on a stream.
    fn on(self, stream: On) -> Result<Treatment, ProtocolError> {
        let unexpected =
            Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "a frame that does not belong there"));
        match (stream, self) {
            (_, kind) if kind.is_reserved() => unexpected,
            (On::Request, Self::DATA) => Ok(Treatment::Pass),
            (On::Request, Self::HEADERS) => Ok(Treatment::Keep(HEADERS)),
            (On::Control, Self::SETTINGS | Self::GOAWAY | Self::MAX_PUSH_ID | Self::CANCEL_PUSH) => {
                Ok(Treatment::Keep(CONTROL_MAX))
            }
            (On::Request, Self::SETTINGS | Self::GOAWAY | Self::MAX_PUSH_ID | Self::CANCEL_PUSH)
            | (_, Self::PUSH_PROMISE)
            | (On::Control, Self::DATA | Self::HEADERS) => unexpected,
            _ => Ok(Treatment::Skip),
        }
    }
}

enum Treatment {
    /// Its payload is handed out as it comes.
    Pass,
    /// It is handed out when it is whole; it may have so many bytes.
    Keep(usize),
    Skip,
}

/// The kind of stream that frames come on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// A request and its response.
    Request,
    /// A peer's control stream.
    Control,
}

/// What comes on a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// Bytes of a DATA frame.
    Data(Bytes),
    /// A whole frame.
    Frame(Kind, Bytes),
    /// A frame with more bytes than are taken: nothing behind it can be read.
    TooLong(Kind),
}

#[derive(Debug)]
enum State {
    Head,
    Pass(u64),
    Keep(Kind, usize, BytesMut),
    Skip(u64),
    Over,
}

/// Reads frames.
#[derive(Debug)]
pub struct Frames {
    on: On,
    state: State,
    /// The beginning of a head that is not whole.
    head: BytesMut,
    input: Bytes,
}

impl Frames {
    /// At the beginning of a stream, or of its frames.
    pub fn new(on: On) -> Self {
        Self { on, state: State::Head, head: BytesMut::new(), input: Bytes::new() }
    }

    /// Takes the next bytes of the stream. To be called when [`item`](Self::item) has nothing more.
    pub fn push(&mut self, bytes: Bytes) {
        if self.input.is_empty() {
            self.input = bytes;
            return;
        }
        let mut both = BytesMut::with_capacity(self.input.len() + bytes.len());
        both.extend_from_slice(&self.input);
        both.extend_from_slice(&bytes);
        self.input = both.freeze();
    }

    /// The next item that is whole; of DATA whatever there is.
    pub fn item(&mut self) -> Result<Option<Item>, ProtocolError> {
        loop {
            match &mut self.state {
                State::Over => return Ok(None),
                State::Head => {
                    let Some((kind, length)) = self.next_head() else { return Ok(None) };
                    self.state = match kind.on(self.on)? {
                        Treatment::Pass => State::Pass(length),
                        Treatment::Skip => State::Skip(length),
                        Treatment::Keep(most) => match usize::try_from(length) {
                            Ok(length) if length <= most => State::Keep(kind, length, BytesMut::new()),
                            _ => {
                                self.state = State::Over;
                                return Ok(Some(Item::TooLong(kind)));
                            }
                        },
                    };
                }
                State::Pass(0) | State::Skip(0) => self.state = State::Head,
                State::Pass(left) => {
                    let data = take(&mut self.input, left);
                    return Ok((!data.is_empty()).then_some(Item::Data(data)));
                }
                State::Skip(left) => {
                    if take(&mut self.input, left).is_empty() {
                        return Ok(None);
                    }
                }
                State::Keep(kind, length, kept) => {
                    let mut left = (*length - kept.len()) as u64;
                    kept.extend_from_slice(&take(&mut self.input, &mut left));
                    if left > 0 {
                        return Ok(None);
                    }
                    let item = Item::Frame(*kind, std::mem::take(kept).freeze());
                    self.state = State::Head;
                    return Ok(Some(item));
                }
            }
        }
    }

    fn next_head(&mut self) -> Option<(Kind, u64)> {
        let before = self.head.len();
        let more = self.input.len().min(HEAD_MAX - before);
        self.head.extend_from_slice(&self.input[..more]);
        let parsed = varint::get(&self.head).and_then(|(kind, first)| {
            let (length, second) = varint::get(&self.head[first..])?;
            Some((Kind(kind), length, first + second))
        });
        let Some((kind, length, whole)) = parsed else {
            self.input.clear();
            return None;
        };
        let _read = self.input.split_to(whole - before);
        self.head.clear();
        Some((kind, length))
    }

    /// The stream has ended here: that is an error within a frame (RFC 9114 section 7.1).
    pub fn end(&self) -> Result<(), ProtocolError> {
        match self.state {
            State::Over | State::Pass(0) | State::Skip(0) => Ok(()),
            State::Head if self.head.is_empty() => Ok(()),
            _ => Err(ProtocolError::new(Code::FRAME_ERROR, "a stream that ends within a frame")),
        }
    }

    /// What was pushed and not looked at yet.
    pub fn has_input(&self) -> bool {
        !self.input.is_empty()
    }
}

fn take(from: &mut Bytes, left: &mut u64) -> Bytes {
    let n = usize::try_from(*left).map_or(from.len(), |left| left.min(from.len()));
    *left -= n as u64;
    from.split_to(n)
}

/// Appends what stands in front of a payload.
pub fn put_head(out: &mut BytesMut, kind: Kind, length: usize) {
    varint::put(out, kind.0);
    varint::put(out, length as u64);
}
