//! One HTTP/2 CONNECT stream as a leg (RFC 9113 section 8.5).
//!
//! # Invariants
//! - The window is given back only as the other side accepts.
//! - Capacity of the connection is reserved only for bytes that are in hand, so an idle stream takes none from the others.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream};

use super::{Broken, Cause, Leg, Queue, Sender};
use crate::transport::window::Share;

/// What its peer sends on a stream.
pub struct Body {
    /// The bytes.
    pub recv: RecvStream,
    /// The stream's part of what its connection holds.
    pub share: Share,
}

impl Drop for Body {
    fn drop(&mut self) {
        // What was not taken, or not passed on, goes back to the connection's window with the stream.
        let unreturned = self.recv.flow_control().used_capacity();
        self.share.returned(unreturned);
    }
}

/// See the module.
pub struct H2Leg {
    send: Sender,
    body: Body,
    /// What is sent when the other leg breaks.
    on_abort: Reason,
}

impl H2Leg {
    /// A stream that we opened: the other leg is the application, and CANCEL says it has gone.
    pub fn client(send: Sender, recv: RecvStream, share: Share) -> Self {
        Self { send, body: Body { recv, share }, on_abort: Reason::CANCEL }
    }

    /// A stream that we serve: a TCP error of the target's is CONNECT_ERROR (RFC 9113 section 8.5).
    pub fn server(send: Sender, body: Body) -> Self {
        Self { send, body, on_abort: Reason::CONNECT_ERROR }
    }

    /// The stream's number on its connection.
    pub fn id(&self) -> u32 {
        self.body.recv.stream_id().as_u32()
    }

    /// Ready when the peer resets the stream: for the time before the relay starts.
    pub async fn broken(&mut self) -> Broken {
        std::future::poll_fn(|cx| self.poll_broken(cx)).await
    }
}

/// What an error means. Of a connection that is lost, the connection knows better why than one of its streams.
pub fn stream_broken(e: &h2::Error, share: &Share) -> Broken {
    match e.reason() {
        Some(Reason::NO_ERROR) if e.is_reset() => Broken::Done,
        Some(reason) if e.is_reset() => Broken::Reset(Cause::Stream(reason)),
        _ => {
            let why = share.why_lost().map_or_else(|| e.to_string(), |why| why.to_string());
            Broken::Reset(if share.was_flooded() { Cause::Flood(why) } else { Cause::Connection(why) })
        }
    }
}

impl Leg for H2Leg {
    fn prefetches(&self) -> bool {
        true
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        match ready!(self.body.recv.poll_data(cx)) {
            Some(Ok(chunk)) => {
                self.body.share.received(chunk.len());
                Poll::Ready(Ok(Some(chunk)))
            }
            None => Poll::Ready(Ok(None)),
            Some(Err(e)) => Poll::Ready(match stream_broken(&e, &self.body.share) {
                // All that was sent has been received: END_STREAM came before the reset.
                Broken::Done => Ok(None),
                why => Err(why),
            }),
        }
    }

    fn accepted(&mut self, n: usize) {
        self.body.share.passed_on(n);
        // Fails only for more than was received.
        let released = self.body.recv.flow_control().release_capacity(n);
        debug_assert!(released.is_ok(), "released more than was received");
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        let room = match ready!(self.send.poll_room(cx, queue.front_len())) {
            Some(Ok(room)) => room,
            Some(Err(e)) => return Poll::Ready(Err(stream_broken(&e, &self.body.share))),
            None => return Poll::Ready(Err(self.gone(cx))),
        };
        let chunk = queue.take(room);
        let n = chunk.len();
        match self.send.send(chunk) {
            Ok(()) => Poll::Ready(Ok(n)),
            Err(_) => Poll::Ready(Err(self.gone(cx))),
        }
    }

    fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        // Fails only on a stream that is closed, which the receiving direction tells apart.
        let _closed = self.send.end();
        Poll::Ready(Ok(()))
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        match ready!(self.send.poll_reset(cx)) {
            Ok(Reason::NO_ERROR) => Poll::Ready(Broken::Done),
            Ok(reason) => Poll::Ready(Broken::Reset(Cause::Stream(reason))),
            Err(e) => Poll::Ready(stream_broken(&e, &self.body.share)),
        }
    }

    fn unacknowledged(&self) -> u64 {
        self.send.unsent() as u64
    }

    fn close(&mut self) {}

    fn release(&mut self) {
        // Behind END_STREAM it says that nothing has failed (RFC 9113 section 8.1).
        self.send.reset(if self.send.has_ended() { Reason::NO_ERROR } else { self.on_abort });
    }

    fn abort(&mut self) {
        self.send.reset(self.on_abort);
    }
}

impl H2Leg {
    /// Why a stream that takes no more bytes does not.
    fn gone(&mut self, cx: &mut Context<'_>) -> Broken {
        match self.poll_broken(cx) {
            Poll::Ready(why) => why,
            Poll::Pending => Broken::Reset(Cause::Stream(Reason::STREAM_CLOSED)),
        }
    }
}
