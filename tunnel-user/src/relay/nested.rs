//! A stream of a tunnel as the byte stream under another connection: no socket, no task, no second buffer.
//!
//! # Invariants
//! - The leg's window is given back as its bytes are read from here, and what is written waits for the leg's room: the bounds
//!   are the leg's window one way, and `SENDING_MAX` and what the leg itself takes the other way.
//! - An end is an end, and a reset is an error.

use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    time::timeout,
};

use crate::{
    relay::{Broken, IntoLeg, Leg, Queue},
    transport::io::{Linger, Wire},
};

/// What one write takes, and so what waits here for the leg: as much as rustls seals ahead, and a frame.
const SENDING_MAX: usize = 64 * 1024;

/// See the module. It may be held twice, by the connection on it and by whoever waits for that one's end.
pub struct Nested<L>(Rc<RefCell<Below<L>>>);

struct Below<L> {
    leg: L,
    /// Taken from the leg, and not read yet. A leg without a window of its own is asked only when this is empty.
    received: Queue,
    /// How `received` ends, once that is known.
    end: Option<End>,
    /// Read already, and given back to the leg, before the caller that will say so knew that it wants them.
    ahead: usize,
    /// Taken from the caller, and not by the leg yet.
    sending: Queue,
    /// The leg was told that there is no more to send.
    finished: bool,
}

enum End {
    /// The peer has no more to say.
    Clean,
    /// It broke.
    Broken(Broken),
}

impl<L: Leg> Nested<L> {
    /// Over a leg, of which `received` has come already.
    pub fn new(leg: L, received: Queue) -> Self {
        Self(Rc::new(RefCell::new(Below {
            leg,
            received,
            end: None,
            ahead: 0,
            sending: Queue::default(),
            finished: false,
        })))
    }

    /// The same, to wait for its end after the connection on it has gone: see [`Linger`].
    pub fn held(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

/// The bytes of the flow that were read from it are given back to the leg once, though its relay says so again.
impl<L: Leg> IntoLeg for Nested<L> {
    type Leg = Self;

    fn into_leg(self, read: usize) -> Self {
        self.0.borrow_mut().ahead += read;
        self
    }
}

impl<L: Leg> Wire for Nested<L> {
    type Last = Self;

    fn share(&self) -> io::Result<Self> {
        Ok(self.held())
    }

    fn failed(&self) -> impl Future<Output = io::Error> {
        poll_fn(|cx| self.0.borrow_mut().poll_broken(cx).map(|why| to_io(&why)))
    }
}

impl<L: Leg> Linger for Nested<L> {
    /// Dropped before the peer's end, a stream of HTTP/2 is reset, and its last bytes may be lost.
    async fn linger(mut self, limit: Duration) {
        let mut scratch = [0; 1024];
        let until_closed = async { while self.read(&mut scratch).await.is_ok_and(|n| n > 0) {} };
        // The peer does not end: neither do we owe it more.
        let _gave_up = timeout(limit, until_closed).await;
        self.0.borrow_mut().leg.close();
    }
}

impl<L: Leg> Below<L> {
    /// The next bytes; `None` at the end.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<()>, &Broken>> {
        // A chunk may be empty.
        while self.received.is_empty() && self.end.is_none() {
            match ready!(self.leg.poll_recv(cx)) {
                Ok(Some(chunk)) => self.received.push(chunk),
                Ok(None) => self.end = Some(End::Clean),
                Err(why) => self.end = Some(End::Broken(why)),
            }
        }
        if !self.received.is_empty() {
            return Poll::Ready(Ok(Some(())));
        }
        match &self.end {
            Some(End::Broken(why)) => Poll::Ready(Err(why)),
            Some(End::Clean) | None => Poll::Ready(Ok(None)),
        }
    }

    /// While nobody reads: takes what comes, within the leg's window. h2 ends a connection on which small frames
    /// pile up unread (`Ahead` in relay/early.rs).
    fn take_what_comes(&mut self, cx: &mut Context<'_>) {
        while self.end.is_none() && self.leg.prefetches() {
            match self.leg.poll_recv(cx) {
                Poll::Ready(Ok(Some(chunk))) => self.received.push(chunk),
                Poll::Ready(Ok(None)) => self.end = Some(End::Clean),
                Poll::Ready(Err(why)) => self.end = Some(End::Broken(why)),
                Poll::Pending => return,
            }
        }
    }

    /// Hands down what waits; ready when nothing does.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !self.sending.is_empty() {
            match self.leg.poll_send(cx, &mut self.sending) {
                Poll::Ready(sent) => sent.map(drop)?,
                Poll::Pending => {
                    self.take_what_comes(cx);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        ready!(self.poll_sent(cx)).map_err(|why| to_io(&why))?;
        let offered: usize = bufs.iter().map(|buf| buf.len()).sum();
        let mut chunk = BytesMut::with_capacity(offered.min(SENDING_MAX));
        for buf in bufs {
            let room = SENDING_MAX - chunk.len();
            chunk.extend_from_slice(&buf[..buf.len().min(room)]);
        }
        let taken = chunk.len();
        self.sending.push(chunk.freeze());
        // What the leg has no room for goes with the next write or flush.
        if let Poll::Ready(Err(why)) = self.poll_sent(cx) {
            return Poll::Ready(Err(to_io(&why)));
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.take_what_comes(cx);
        if matches!(self.end, Some(End::Broken(_)))
            && let Some(End::Broken(why)) = self.end.take()
        {
            return Poll::Ready(why);
        }
        self.leg.poll_broken(cx)
    }

    /// `n` bytes went on to the reader.
    fn accepted(&mut self, n: usize) {
        let before = n.min(self.ahead);
        self.ahead -= before;
        self.leg.accepted(n - before);
    }
}

/// As whoever expects a socket takes it.
fn to_io(why: &Broken) -> io::Error {
    let kind = match why {
        Broken::Done => io::ErrorKind::BrokenPipe,
        Broken::Reset(_) => io::ErrorKind::ConnectionReset,
    };
    io::Error::new(kind, format!("the tunnel that it goes through: {why}"))
}

impl<L: Leg> AsyncRead for Nested<L> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut below = self.0.borrow_mut();
        if ready!(below.poll_next(cx)).map_err(to_io)?.is_some() {
            let before = buf.filled().len();
            while buf.remaining() > 0 && !below.received.is_empty() {
                // The front is closed first: it may be what is being packed.
                let front = below.received.front_len();
                buf.put_slice(&below.received.take(front.min(buf.remaining())));
            }
            let read = buf.filled().len() - before;
            below.accepted(read);
        }
        Poll::Ready(Ok(()))
    }
}

impl<L: Leg> AsyncWrite for Nested<L> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_sent(cx).map_err(|why| to_io(&why))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Leg::poll_finish(self.get_mut(), cx)) {
            Ok(()) | Err(Broken::Done) => Poll::Ready(Ok(())),
            Err(why) => Poll::Ready(Err(to_io(&why))),
        }
    }
}

/// The leg again, for a tunnel that is all that its connection carries (HTTP/1).
impl<L: Leg> Leg for Nested<L> {
    fn prefetches(&self) -> bool {
        false
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        let mut below = self.0.borrow_mut();
        match ready!(below.poll_next(cx)) {
            Ok(Some(())) => {
                let front = below.received.front_len();
                return Poll::Ready(Ok(Some(below.received.take(front))));
            }
            Ok(None) => return Poll::Ready(Ok(None)),
            Err(_) => {}
        }
        match below.end.take() {
            Some(End::Broken(why)) => Poll::Ready(Err(why)),
            Some(End::Clean) | None => Poll::Ready(Ok(None)),
        }
    }

    fn accepted(&mut self, n: usize) {
        self.0.borrow_mut().accepted(n);
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        let below = &mut *self.0.borrow_mut();
        ready!(below.poll_sent(cx))?;
        let sent = below.leg.poll_send(cx, queue);
        if sent.is_pending() {
            below.take_what_comes(cx);
        }
        sent
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let below = &mut *self.0.borrow_mut();
        ready!(below.poll_sent(cx))?;
        if !below.finished {
            ready!(below.leg.poll_finish(cx))?;
            below.finished = true;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.0.borrow_mut().poll_broken(cx)
    }

    fn unacknowledged(&self) -> u64 {
        self.0.borrow().leg.unacknowledged()
    }

    fn close(&mut self) {
        self.0.borrow_mut().leg.close();
    }

    fn release(&mut self) {
        self.0.borrow_mut().leg.release();
    }

    fn abort(&mut self) {
        self.0.borrow_mut().leg.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::relay::Cause;

    /// A leg by script: what it says, what it was told, how much room it has.
    #[derive(Default)]
    struct Script {
        says: VecDeque<Result<Option<Bytes>, Broken>>,
        accepted: usize,
        room: usize,
        sent: Vec<u8>,
        finished: usize,
    }

    impl Leg for Script {
        fn prefetches(&self) -> bool {
            true
        }

        fn poll_recv(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
            self.says.pop_front().map_or(Poll::Pending, Poll::Ready)
        }

        fn accepted(&mut self, n: usize) {
            self.accepted += n;
        }

        fn poll_send(&mut self, _cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
            let n = queue.front_len().min(self.room);
            if n == 0 {
                return Poll::Pending;
            }
            self.room -= n;
            self.sent.extend_from_slice(&queue.take(n));
            Poll::Ready(Ok(n))
        }

        fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
            self.finished += 1;
            Poll::Ready(Ok(()))
        }

        fn poll_broken(&mut self, _cx: &mut Context<'_>) -> Poll<Broken> {
            Poll::Pending
        }

        fn unacknowledged(&self) -> u64 {
            0
        }

        fn close(&mut self) {}

        fn release(&mut self) {}

        fn abort(&mut self) {}
    }

    fn chunk(bytes: &[u8]) -> Result<Option<Bytes>, Broken> {
        Ok(Some(Bytes::copy_from_slice(bytes)))
    }

    fn reset() -> Result<Option<Bytes>, Broken> {
        Err(Broken::Reset(Cause::Stream(h2::Reason::CANCEL)))
    }

    fn nested(says: impl IntoIterator<Item = Result<Option<Bytes>, Broken>>, room: usize) -> Nested<Script> {
        Nested::new(Script { says: says.into_iter().collect(), room, ..Script::default() }, Queue::default())
    }

    fn cx() -> Context<'static> {
        Context::from_waker(std::task::Waker::noop())
    }

    #[tokio::test]
    async fn the_window_is_given_back_as_bytes_are_read_and_never_twice() {
        let mut early = Queue::default();
        early.push(Bytes::from_static(b"ab"));
        let says = [chunk(b"cdef"), chunk(b""), chunk(b"gh"), Ok(None)];
        let leg = Script { says: says.into_iter().collect(), ..Script::default() };
        let mut nested = Nested::new(leg, early);
        let mut three = [0; 3];
        nested.read_exact(&mut three).await.unwrap();
        assert_eq!((&three, nested.0.borrow().leg.accepted), (b"abc", 3));
        // As the leg again, it is told of the last of those once more.
        let mut nested = nested.into_leg(1);
        assert!(matches!(nested.poll_recv(&mut cx()), Poll::Ready(Ok(Some(rest))) if rest == "def"));
        nested.accepted(4);
        assert_eq!(nested.0.borrow().leg.accepted, 6);
        assert!(matches!(nested.poll_recv(&mut cx()), Poll::Ready(Ok(Some(rest))) if rest == "gh"));
        assert!(matches!(nested.poll_recv(&mut cx()), Poll::Ready(Ok(None))));
    }

    #[tokio::test]
    async fn an_end_is_an_end_and_a_reset_is_an_error_behind_what_came_before_it() {
        let mut all = Vec::new();
        nested([chunk(b"all"), Ok(None)], 0).read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"all");
        let mut broken = nested([chunk(b"some"), reset()], 0);
        broken.read_exact(&mut [0; 4]).await.unwrap();
        for _ in 0..2 {
            let e = broken.read(&mut [0]).await.unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
            assert!(e.to_string().contains("stream reset"), "{e}");
        }
        assert!(matches!(nested([reset()], 0).poll_recv(&mut cx()), Poll::Ready(Err(Broken::Reset(_)))));
    }

    #[tokio::test]
    async fn what_is_written_waits_for_room_and_is_bounded() {
        let mut nested = nested([], 10);
        let offered: Vec<u8> = (0..=250).cycle().take(SENDING_MAX + 1).collect();
        assert_eq!(nested.write(&offered).await.unwrap(), SENDING_MAX);
        let poll = |nested: &mut Nested<Script>| Pin::new(nested).poll_write(&mut cx(), b"more");
        assert!(poll(&mut nested).is_pending(), "nothing is taken while something waits");
        assert!(Pin::new(&mut nested).poll_shutdown(&mut cx()).is_pending(), "nor is the end said before it");
        nested.0.borrow_mut().leg.room = usize::MAX;
        assert!(poll(&mut nested).is_ready());
        nested.shutdown().await.unwrap();
        nested.shutdown().await.unwrap();
        let leg = &nested.0.borrow().leg;
        assert_eq!(
            (leg.sent[..SENDING_MAX] == offered[..SENDING_MAX], &leg.sent[SENDING_MAX..]),
            (true, &b"more"[..])
        );
        assert_eq!(leg.finished, 1);
    }

    #[tokio::test]
    async fn while_nobody_reads_what_comes_is_taken_and_not_given_back() {
        let ones = std::iter::repeat_with(|| chunk(b"x")).take(1000);
        let mut full = nested(ones.chain([Ok(None)]), 0);
        assert_eq!(full.write(b"waits").await.unwrap(), 5);
        assert!(Pin::new(&mut full).poll_flush(&mut cx()).is_pending());
        assert!(full.0.borrow().leg.says.is_empty(), "all of it");
        assert_eq!(full.0.borrow().leg.accepted, 0);
        let mut all = Vec::new();
        full.read_to_end(&mut all).await.unwrap();
        assert_eq!((all.len(), full.0.borrow().leg.accepted), (1000, 1000));
        // The other way to be stuck: a relay whose other side takes nothing.
        let mut paused = nested([chunk(b"a"), reset()], 0);
        assert!(matches!(paused.poll_broken(&mut cx()), Poll::Ready(Broken::Reset(_))));
    }
}
