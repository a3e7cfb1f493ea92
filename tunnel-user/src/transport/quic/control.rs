//! The streams of one direction on a connection: the control streams of both ends, and those of QPACK, on which nothing is to
//! be said (RFC 9114 section 6.2, RFC 9204 section 4.2).
//!
//! # Invariants
//! - A peer that does not follow the protocol ends its connection, with the code that says how.
//! - As many of a peer's streams are read at once as it may open.

use std::{cell::RefCell, rc::Rc};

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream};
use tokio::task::JoinSet;

use super::wire_code;
use crate::transport::http3::{
    Code, ProtocolError,
    frame::{self, Frames, Item, Kind, On},
    settings::{self, Settings},
    varint,
};

/// Which end this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It makes requests.
    Client,
    /// It answers them.
    Server,
}

/// What a peer has said on its control stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// What it takes.
    Settings(Settings),
    /// It takes no requests from this stream on (of a server); it wants no pushes from this one on (of a client).
    Goaway(u64),
}

/// How long a peer may take to give room for GOAWAY.
const GOAWAY_WAIT: std::time::Duration = std::time::Duration::from_secs(1);
/// The kinds of streams of one direction.
const CONTROL: u64 = 0x00;
const PUSH: u64 = 0x01;
const ENCODER: u64 = 0x02;
const DECODER: u64 = 0x03;

/// Our control stream. Held as long as the connection lives: its end would be an error.
#[derive(Debug)]
pub struct Control(SendStream);

impl Control {
    /// Opens it, and says what we take.
    pub async fn open(connection: &Connection) -> Result<Self, ConnectionError> {
        let mut stream = connection.open_uni().await?;
        let mut out = BytesMut::new();
        varint::put(&mut out, CONTROL);
        settings::ours(&mut out);
        // Fails only with the connection, which says so itself.
        let _gone = stream.write_chunk(out.freeze()).await;
        Ok(Self(stream))
    }

    /// Says that requests from this stream on are not taken (RFC 9114 section 5.2).
    pub async fn goaway(&mut self, first_refused: u64) {
        let (mut payload, mut out) = (BytesMut::new(), BytesMut::new());
        varint::put(&mut payload, first_refused);
        frame::put_head(&mut out, Kind::GOAWAY, payload.len());
        out.extend_from_slice(&payload);
        // A peer that gives no room for it is not waited for: nothing follows on this stream.
        let _late = tokio::time::timeout(GOAWAY_WAIT, self.0.write_chunk(out.freeze())).await;
    }
}

/// Ends a connection because of what the peer has done.
pub fn close(connection: &Connection, why: &ProtocolError) {
    connection.close(wire_code(why.code), why.why.as_bytes());
}

/// Reads what the peer says on its streams of one direction until the connection ends; why. What is wrong ends the connection.
pub async fn watch(connection: &Connection, role: Role, heard: Rc<dyn Fn(Heard)>) -> Ended {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let mut reading = JoinSet::new();
    loop {
        let wrong = tokio::select! {
            stream = connection.accept_uni() => match stream {
                Ok(stream) => {
                    reading.spawn_local(read(stream, role, Rc::clone(&seen), Rc::clone(&heard)));
                    continue;
                }
                Err(why) => return Ended::Lost(why),
            },
            Some(read) = reading.join_next() => match read {
                Ok(Err(wrong)) => wrong,
                _ => continue,
            },
        };
        close(connection, &wrong);
        return Ended::Wrong(wrong);
    }
}

/// How a connection has ended.
#[derive(Clone, Debug)]
pub enum Ended {
    /// The peer has done something wrong.
    Wrong(ProtocolError),
    /// It was closed, by either end, or lost.
    Lost(ConnectionError),
}

type Seen = Rc<RefCell<Vec<u64>>>;

/// Reads one stream to its end.
async fn read(
    mut stream: RecvStream,
    role: Role,
    seen: Seen,
    heard: Rc<dyn Fn(Heard)>,
) -> Result<(), ProtocolError> {
    let mut start = BytesMut::new();
    let (kind, length) = loop {
        if let Some(kind) = varint::get(&start) {
            break kind;
        }
        match next(&mut stream).await {
            Next::Bytes(more) => start.extend_from_slice(&more),
            // Nothing has been said (RFC 9114 section 6.2).
            Next::End | Next::Reset | Next::Lost => return Ok(()),
        }
    };
    let rest = start.freeze().slice(length..);
    if matches!(kind, CONTROL | ENCODER | DECODER) {
        let mut seen = seen.borrow_mut();
        if seen.contains(&kind) {
            return Err(ProtocolError::new(
                Code::STREAM_CREATION_ERROR,
                "a second stream of a kind that there is one of",
            ));
        }
        seen.push(kind);
    }
    match kind {
        CONTROL => control(stream, rest, role, &heard).await,
        PUSH if role == Role::Server => {
            Err(ProtocolError::new(Code::STREAM_CREATION_ERROR, "a push stream of a client"))
        }
        PUSH => Err(ProtocolError::new(Code::ID_ERROR, "a push that was not allowed")),
        ENCODER => {
            instructions(stream, rest, |byte| byte != SET_NO_CAPACITY, Code::QPACK_ENCODER_STREAM_ERROR).await
        }
        DECODER => {
            instructions(stream, rest, |byte| byte & 0xc0 != CANCELLATION, Code::QPACK_DECODER_STREAM_ERROR)
                .await
        }
        _ => {
            // Of a kind that is there to be ignored, or that we do not know.
            let _gone = stream.stop(wire_code(Code::STREAM_CREATION_ERROR));
            Ok(())
        }
    }
}

/// The peer's dynamic table gets no room (RFC 9204 section 4.3.1): what it has anyway.
const SET_NO_CAPACITY: u8 = 0x20;
/// A request whose fields nobody will decode any more (RFC 9204 section 4.4.2).
const CANCELLATION: u8 = 0x40;

/// Reads a stream of QPACK, on which only one instruction is allowed, of which each says the same: nothing.
async fn instructions(
    mut stream: RecvStream,
    first: Bytes,
    is_wrong: impl Fn(u8) -> bool,
    code: Code,
) -> Result<(), ProtocolError> {
    let mut bytes = first;
    // Within an integer of more than one byte.
    let mut goes_on = false;
    loop {
        for byte in bytes {
            if goes_on {
                goes_on = byte & 0x80 != 0;
            } else if is_wrong(byte) {
                return Err(ProtocolError::new(code, "an instruction for a dynamic table that has no room"));
            } else {
                goes_on = code == Code::QPACK_DECODER_STREAM_ERROR && byte & 0x3f == 0x3f;
            }
        }
        bytes = match next(&mut stream).await {
            Next::Bytes(more) => more,
            Next::Lost => return Ok(()),
            Next::End | Next::Reset => return Err(CLOSED),
        };
    }
}

const CLOSED: ProtocolError =
    ProtocolError::new(Code::CLOSED_CRITICAL_STREAM, "the end of a stream that the connection needs");

/// Reads the peer's control stream.
async fn control(
    mut stream: RecvStream,
    first: Bytes,
    role: Role,
    heard: &Rc<dyn Fn(Heard)>,
) -> Result<(), ProtocolError> {
    let mut frames = Frames::new(On::Control);
    frames.push(first);
    let (mut has_settings, mut last) = (false, None);
    loop {
        while let Some(item) = frames.item()? {
            let (kind, payload) = match item {
                Item::Frame(kind, payload) => (kind, payload),
                Item::TooLong(_) | Item::Data(_) => {
                    return Err(ProtocolError::new(
                        Code::EXCESSIVE_LOAD,
                        "a frame on the control stream that is too long",
                    ));
                }
            };
            if (kind == Kind::SETTINGS) == has_settings {
                return Err(match has_settings {
                    true => ProtocolError::new(Code::FRAME_UNEXPECTED, "SETTINGS a second time"),
                    false => ProtocolError::new(
                        Code::MISSING_SETTINGS,
                        "a control stream that does not begin with SETTINGS",
                    ),
                });
            }
            let number = || {
                varint::only(&payload)
                    .ok_or(ProtocolError::new(Code::FRAME_ERROR, "a frame that does not hold one number"))
            };
            match kind {
                Kind::SETTINGS => {
                    has_settings = true;
                    heard(Heard::Settings(settings::parse(payload)?));
                }
                Kind::GOAWAY => {
                    let id = number()?;
                    // Requests of clients have these numbers (RFC 9000 section 2.1).
                    if role == Role::Client && id % 4 != 0 {
                        return Err(ProtocolError::new(
                            Code::ID_ERROR,
                            "GOAWAY with a number that no request has",
                        ));
                    }
                    if last.replace(id).is_some_and(|before| before < id) {
                        return Err(ProtocolError::new(
                            Code::ID_ERROR,
                            "GOAWAY with a larger number than before",
                        ));
                    }
                    heard(Heard::Goaway(id));
                }
                Kind::MAX_PUSH_ID if role == Role::Client => {
                    return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "MAX_PUSH_ID of a server"));
                }
                // Nothing is pushed here.
                _ => drop(number()?),
            }
        }
        match next(&mut stream).await {
            Next::Bytes(more) => frames.push(more),
            Next::Lost => return Ok(()),
            Next::End | Next::Reset => return Err(CLOSED),
        }
    }
}

enum Next {
    Bytes(Bytes),
    End,
    Reset,
    Lost,
}

async fn next(stream: &mut RecvStream) -> Next {
    match stream.read_chunk(frame::CONTROL_MAX, true).await {
        Ok(Some(chunk)) => Next::Bytes(chunk.bytes),
        Ok(None) => Next::End,
        Err(ReadError::Reset(_)) => Next::Reset,
        Err(_) => Next::Lost,
    }
}
