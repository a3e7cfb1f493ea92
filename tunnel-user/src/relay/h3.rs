//! One HTTP/3 CONNECT stream as a leg (RFC 9114 section 4.4).
//!
//! Its two directions are two halves, each of which ends by itself: FIN is an end, RESET_STREAM a reset of what is received,
//! STOP_SENDING a reset of what is sent. A reset drops what its receiver has not read yet (RFC 9000 section 3.2), so it is sent
//! only once the peer has acknowledged what was sent before it, and what comes is read at once.
//!
//! # Invariants
//! - What has come and the other side has not taken is [`HELD_MAX`] at most, beyond the window below
//!   (`transport::quic::WINDOW`), and [`HELD_SHORT`] while memory is short.
//! - All of it is counted in the account of the peer.
//! - What was sent and is not acknowledged is `SEND_MAX` at most, and a frame.
//! - A leg that is dropped before its end resets its stream, and never ends it in order.

mod recv;
mod send;

use std::{
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream};

use self::send::Sender;
pub use self::{
    recv::{HeadFailure, Receiver},
    send::Open,
};
use super::{Broken, Cause, Leg, Queue};
use crate::{
    process::memory::{Account, Memory},
    transport::{
        http3::Code,
        quic::{WINDOW, why_lost, wire_code},
    },
};

/// What has come and the other side has not taken. It is read before anybody wants it, because a reset would drop it.
pub const HELD_MAX: usize = WINDOW as usize;

/// The same while memory is short, or the peer has taken half of its part. What is beyond it is lost when the peer resets.
const HELD_SHORT: usize = 64 * 1024;

/// See the module.
pub struct H3Leg {
    /// What is sent.
    pub send: Sender,
    /// What is received.
    pub recv: Receiver,
    /// What is sent when the other leg breaks.
    on_abort: Code,
    /// It has said all that it is to say.
    is_closed: bool,
}

impl H3Leg {
    /// A stream that we have opened: the other leg is the application, and a reset says that it has gone.
    pub fn client(connection: &Connection, streams: (SendStream, RecvStream), open: Open) -> Self {
        Self::new(connection, streams, open, Code::REQUEST_CANCELLED, &Memory::of_this_worker().own())
    }

    /// A stream that we serve, in the memory of its peer: a TCP error of the target's is H3_CONNECT_ERROR (RFC 9114 section 4.4).
    pub fn server(
        connection: &Connection,
        streams: (SendStream, RecvStream),
        open: Open,
        account: &Rc<Account>,
    ) -> Self {
        Self::new(connection, streams, open, Code::CONNECT_ERROR, account)
    }

    fn new(
        connection: &Connection,
        (send, recv): (SendStream, RecvStream),
        open: Open,
        on_abort: Code,
        account: &Rc<Account>,
    ) -> Self {
        let recv = Receiver::new(connection.clone(), recv, Rc::clone(account));
        let send = Sender::new(send, open, Rc::clone(account));
        Self { send, recv, on_abort, is_closed: false }
    }

    /// The stream's number on its connection.
    pub fn id(&self) -> u64 {
        self.recv.id()
    }

    /// Ends both directions with a code: not as a flow ends, but because of what the peer has said.
    pub fn reject(mut self, code: Code) {
        self.on_abort = code;
        self.abort();
    }
}

/// What an error code of the peer's means.
fn reset_with(code: u64) -> Broken {
    Broken::Reset(Cause::Http3(Code(code)))
}

fn lost(error: &quinn::ConnectionError) -> Broken {
    Broken::Reset(Cause::Connection(why_lost(error)))
}

impl Leg for H3Leg {
    fn prefetches(&self) -> bool {
        true
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        self.send.flush(cx);
        self.recv.poll_recv(cx)
    }

    fn accepted(&mut self, n: usize) {
        self.recv.accepted(n);
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        self.send.poll_send(cx, queue)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.send.poll_finish(cx)
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.send.flush(cx);
        match self.send.poll_stopped(cx) {
            Poll::Pending => self.recv.poll_reset(cx),
            stopped => stopped,
        }
    }

    fn unacknowledged(&self) -> u64 {
        self.send.unacknowledged()
    }

    fn close(&mut self) {
        self.is_closed = true;
    }

    fn release(&mut self) {
        if !self.send.has_ended() {
            return self.abort();
        }
        // Behind FIN it says that nothing has failed (RFC 9114 section 4.1).
        self.is_closed = true;
        self.recv.stop(Code::NO_ERROR);
    }

    fn abort(&mut self) {
        self.is_closed = true;
        // What has ended is delivered, and what the peer still sends is told that it is not wanted.
        if !self.send.has_ended() {
            self.send.reset(self.on_abort);
        }
        self.recv.stop(self.on_abort);
    }
}

impl Drop for H3Leg {
    fn drop(&mut self) {
        if !self.is_closed {
            self.abort();
        }
    }
}
