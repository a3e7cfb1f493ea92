//! What is received on a stream: a head, and the bytes of a tunnel behind it.

use std::{
    future::poll_fn,
    mem,
    pin::pin,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Wake, Waker, ready},
};

use bytes::Bytes;
use quinn::{Connection, ReadError, RecvStream};

use super::{Broken, Cause, HELD_MAX, HELD_SHORT, lost, reset_with, wire_code};
use crate::{
    process::memory::Account,
    transport::{
        http3::{
            Code, ProtocolError,
            frame::{Frames, Item, Kind, On},
        },
        quic,
    },
};

/// What is taken from quinn at once.
const CHUNK: usize = 64 * 1024;

/// Why there is no head.
#[derive(Debug)]
pub enum HeadFailure {
    /// The stream ended before it.
    Incomplete,
    /// It has more bytes than are taken.
    TooLong,
    /// The peer has reset its stream, with this code.
    Reset(Code),
    /// The connection is lost, or was closed because of what came.
    Lost(String),
}

/// Wakes whoever waits for a reset. Where the stream's end has come already, quinn keeps the waker that `received_reset` was
/// polled with as long as the connection, and a task's own would keep the task.
#[derive(Default)]
struct Waits(Mutex<Option<Waker>>);

impl Waits {
    fn set(&self, waker: Option<Waker>) -> Option<Waker> {
        mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), waker)
    }
}

impl Wake for Waits {
    fn wake(self: Arc<Self>) {
        if let Some(waker) = self.set(None) {
            waker.wake();
        }
    }
}

/// One direction of a stream.
pub struct Receiver {
    connection: Connection,
    stream: RecvStream,
    frames: Frames,
    /// Handed out, and not taken by the other side; counted in the account.
    held: usize,
    account: Rc<Account>,
    /// It has come to its end, in order or not.
    ended: bool,
    /// The peer has reset it, with this code.
    reset: Option<quinn::VarInt>,
    waits: Arc<Waits>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        drop(self.waits.set(None));
        self.account.sent(self.held as u64);
    }
}

impl Receiver {
    pub(super) fn new(connection: Connection, stream: RecvStream, account: Rc<Account>) -> Self {
        let (frames, waits) = (Frames::new(On::Request), Arc::default());
        Self { connection, stream, frames, held: 0, account, ended: false, reset: None, waits }
    }

    pub(super) fn id(&self) -> u64 {
        self.stream.id().into()
    }

    /// The next of what the peer has sent; `None` at its end.
    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Item>, ReadFailure>> {
        loop {
            if let Some(item) = self.frames.item().map_err(ReadFailure::Wrong)? {
                return Poll::Ready(Ok(Some(item)));
            }
            match ready!(pin!(self.stream.read_chunk(CHUNK, true)).poll(cx)) {
                Ok(Some(chunk)) => self.frames.push(chunk.bytes),
                Ok(None) => {
                    self.ended = true;
                    self.frames.end().map_err(ReadFailure::Wrong)?;
                    return Poll::Ready(Ok(None));
                }
                Err(e) => {
                    self.ended = true;
                    // quinn forgets a stream whose reset was told by `received_reset`.
                    let e = match (e, self.reset) {
                        (ReadError::ClosedStream, Some(code)) => ReadError::Reset(code),
                        (e, _) => e,
                    };
                    if let ReadError::Reset(code) = e {
                        self.reset = Some(code);
                    }
                    return Poll::Ready(Err(ReadFailure::Read(e)));
                }
            }
        }
    }

    /// The header section that comes first, or next: of a response there may be several (RFC 9114 section 4.1).
    pub async fn head(&mut self) -> Result<Bytes, HeadFailure> {
        let unexpected =
            ProtocolError::new(Code::FRAME_UNEXPECTED, "content in front of the headers that it belongs to");
        match poll_fn(|cx| self.poll_item(cx)).await {
            Ok(Some(Item::Frame(Kind::HEADERS, section))) => Ok(section),
            Ok(Some(Item::TooLong(_))) => Err(HeadFailure::TooLong),
            Ok(Some(Item::Data(_) | Item::Frame(..))) => Err(HeadFailure::Lost(self.wrong(&unexpected))),
            Ok(None) => Err(HeadFailure::Incomplete),
            Err(ReadFailure::Wrong(e)) => Err(HeadFailure::Lost(self.wrong(&e))),
            Err(ReadFailure::Read(ReadError::Reset(code))) => {
                Err(HeadFailure::Reset(Code(code.into_inner())))
            }
            Err(ReadFailure::Read(ReadError::ConnectionLost(e))) => {
                Err(HeadFailure::Lost(quic::why_lost(&e)))
            }
            Err(ReadFailure::Read(e)) => Err(HeadFailure::Lost(e.to_string())),
        }
    }

    /// Ends the connection because of what the peer has done; in words.
    pub fn wrong(&self, e: &ProtocolError) -> String {
        quic::close(&self.connection, e);
        e.to_string()
    }

    pub(super) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        if self.ended && !self.frames.has_input() {
            return Poll::Ready(self.reset.map_or(Ok(None), |code| Err(reset_with(code.into_inner()))));
        }
        // Whoever takes some of it polls again.
        if self.held >= if self.account.is_short() { HELD_SHORT } else { HELD_MAX } {
            return Poll::Pending;
        }
        match ready!(self.poll_item(cx)) {
            Ok(Some(Item::Data(bytes))) => {
                self.held += bytes.len();
                self.account.queue(bytes.len() as u64);
                Poll::Ready(Ok(Some(bytes)))
            }
            Ok(None) => Poll::Ready(Ok(None)),
            // A tunnel has no other frames (RFC 9114 section 4.4).
            Ok(Some(_)) => {
                let unexpected = ProtocolError::new(Code::FRAME_UNEXPECTED, "a frame that no tunnel has");
                Poll::Ready(Err(Broken::Reset(Cause::Connection(self.wrong(&unexpected)))))
            }
            Err(ReadFailure::Wrong(e)) => Poll::Ready(Err(Broken::Reset(Cause::Connection(self.wrong(&e))))),
            Err(ReadFailure::Read(e)) => Poll::Ready(Err(failed(&e))),
        }
    }

    pub(super) fn accepted(&mut self, n: usize) {
        let n = n.min(self.held);
        self.held -= n;
        self.account.sent(n as u64);
    }

    /// Ready when the peer has reset it, or the connection is lost, while it is not read.
    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        if self.ended {
            return Poll::Pending;
        }
        drop(self.waits.set(Some(cx.waker().clone())));
        let waker = Waker::from(Arc::clone(&self.waits));
        match ready!(pin!(self.stream.received_reset()).poll(&mut Context::from_waker(&waker))) {
            Ok(Some(code)) => {
                self.reset = Some(code);
                Poll::Ready(reset_with(code.into_inner()))
            }
            // It has come to its end, which is still to be read.
            Ok(None) => Poll::Pending,
            Err(quinn::ResetError::ConnectionLost(e)) => Poll::Ready(lost(&e)),
            Err(quinn::ResetError::ZeroRttRejected) => Poll::Ready(reset_with(Code::INTERNAL_ERROR.0)),
        }
    }

    /// What the peer still sends is not wanted.
    pub(super) fn stop(&mut self, code: Code) {
        self.ended = true;
        // Fails only on a stream that has ended.
        let _ended = self.stream.stop(wire_code(code));
    }
}

enum ReadFailure {
    /// The peer does not follow the protocol.
    Wrong(ProtocolError),
    Read(ReadError),
}

fn failed(e: &ReadError) -> Broken {
    match e {
        ReadError::Reset(code) => reset_with(code.into_inner()),
        ReadError::ConnectionLost(e) => lost(e),
        other => Broken::Reset(Cause::Connection(other.to_string())),
    }
}
