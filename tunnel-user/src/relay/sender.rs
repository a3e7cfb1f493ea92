//! The sending half of an HTTP/2 stream, and how much of what it was given is still with the connection.
//!
//! h2 drops what is queued on a stream when that is reset, and its interface does not say when the queue is empty: what
//! [`SendStream::capacity`] says is the window less what was given, whatever has left of it. So every chunk carries a
//! counter, which it leaves as its bytes are put into frames that the connection writes next.

use std::{
    cell::Cell,
    io::IoSlice,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::SendStream;

use super::EarlyStream;
use crate::process::memory::Account;

/// What DATA frames are made of.
#[derive(Debug)]
pub struct Payload {
    bytes: Bytes,
    /// It is the end too, which counts as one more.
    ends: bool,
    unsent: Unsent,
}

/// Bytes of one stream that its connection has taken and not put into frames yet.
#[derive(Clone, Debug)]
pub(super) struct Unsent(Rc<Waiting>);

#[derive(Debug)]
struct Waiting {
    bytes: Cell<usize>,
    /// Whose memory they take.
    account: Rc<Account>,
}

impl Unsent {
    fn new(account: &Rc<Account>) -> Self {
        Self(Rc::new(Waiting { bytes: Cell::default(), account: Rc::clone(account) }))
    }

    fn get(&self) -> usize {
        self.0.bytes.get()
    }

    fn more(&self, n: usize) {
        self.0.bytes.set(self.get() + n);
        self.0.account.queue(n as u64);
    }

    fn less(&self, n: usize) {
        let n = n.min(self.get());
        self.0.bytes.set(self.get() - n);
        self.0.account.sent(n as u64);
    }
}

impl Buf for Payload {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn chunks_vectored<'a>(&'a self, to: &mut [IoSlice<'a>]) -> usize {
        self.bytes.chunks_vectored(to)
    }

    fn advance(&mut self, n: usize) {
        self.bytes.advance(n);
        self.unsent.less(n);
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        self.unsent.less(self.bytes.len() + usize::from(self.ends));
    }
}

/// See the module.
pub struct Sender {
    stream: SendStream<Payload>,
    unsent: Unsent,
    ended: bool,
}

impl Sender {
    /// Of a stream to which nothing was given yet; what is, takes memory of `account`.
    pub fn new(stream: SendStream<Payload>, account: &Rc<Account>) -> Self {
        Self { stream, unsent: Unsent::new(account), ended: false }
    }

    /// Room on the stream for some of `want` bytes. `None`: it takes no more.
    pub(super) fn poll_room(
        &mut self,
        cx: &mut Context<'_>,
        want: usize,
    ) -> Poll<Option<Result<usize, h2::Error>>> {
        if !self.unsent.0.account.may_queue(self.unsent.get(), cx.waker()) {
            return Poll::Pending;
        }
        self.stream.reserve_capacity(want);
        while self.stream.capacity() == 0 {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                gone => return Poll::Ready(gone),
            }
        }
        Poll::Ready(Some(Ok(want.min(self.stream.capacity()))))
    }

    /// Gives bytes to the connection. Fails only on a stream that is closed.
    pub fn send(&mut self, bytes: Bytes) -> Result<(), h2::Error> {
        self.give(bytes, false)
    }

    /// Says that there is no more. Fails only on a stream that is closed.
    pub fn end(&mut self) -> Result<(), h2::Error> {
        self.ended = true;
        self.give(Bytes::new(), true)
    }

    fn give(&mut self, bytes: Bytes, ends: bool) -> Result<(), h2::Error> {
        self.unsent.more(bytes.len() + usize::from(ends));
        self.stream.send_data(Payload { bytes, ends, unsent: self.unsent.clone() }, ends)
    }

    /// Whether it was said that there is no more.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Bytes that were given and are not in a frame yet, and the end: a reset drops them.
    pub(super) fn unsent(&self) -> usize {
        self.unsent.get()
    }

    /// Ready when the peer resets the stream, or the connection is lost.
    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Result<h2::Reason, h2::Error>> {
        self.stream.poll_reset(cx)
    }

    /// Resets the stream, and drops what has not been sent.
    pub(super) fn reset(&mut self, reason: h2::Reason) {
        self.stream.send_reset(reason);
    }
}

/// Bytes that a closed stream does not take are nobody's: the answer says why it is closed.
impl EarlyStream for Sender {
    fn poll_room(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Option<usize>> {
        Self::poll_room(self, cx, want).map(|room| room.and_then(Result::ok))
    }

    fn send(&mut self, bytes: Bytes) {
        let _closed = Self::send(self, bytes);
    }

    fn end(&mut self) {
        let _closed = Self::end(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::memory::Memory;

    /// A chunk counts until its last byte is in a frame, in whatever pieces, and when it is dropped before that.
    #[test]
    fn a_chunk_counts_until_it_has_left() {
        let unsent = Unsent::new(&Memory::of_this_worker().own());
        let payload = |n: usize| {
            unsent.more(n);
            Payload { bytes: Bytes::from(vec![0; n]), ends: false, unsent: unsent.clone() }
        };
        let (mut one, two) = (payload(10), payload(5));
        one.advance(4);
        assert_eq!(unsent.get(), 11);
        drop(two);
        assert_eq!(unsent.get(), 6);
        one.advance(6);
        assert_eq!(unsent.get(), 0);
        drop(one);
        assert_eq!(unsent.get(), 0);
        unsent.more(1);
        drop(Payload { bytes: Bytes::new(), ends: true, unsent: unsent.clone() });
        assert_eq!(unsent.get(), 0);
    }
}
