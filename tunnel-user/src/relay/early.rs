//! What a client sends before its target has answered, sent ahead of the answer ("optimistic", RFC 9931).
//!
//! Enters: a client that waits, and streams that were asked for. Leaves: its bytes behind the request, and what the
//! relay goes on with. Invariant: at most [`EARLY_MAX`] bytes go ahead, and they are kept until the answer, so that
//! another stream gets them again, all of them and in order; the client's end goes behind them. It never goes ahead on
//! HTTP/1, where a proxy that refuses could take the bytes for its next request.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    mem,
    pin::pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;

use super::{Broken, Early, Leg, Queue, Sender};

/// What goes ahead of an answer, for one flow: the window that HTTP/2 begins with (RFC 9113 section 6.9.2), so what a
/// peer may be sent that has said nothing; and as much as one read of a socket.
pub const EARLY_MAX: usize = 64 * 1024;

/// A client whose target has not answered.
pub trait Source {
    /// Whether bytes may be taken while nobody has room for them: see [`Leg::may_prefetch`].
    fn prefetches(&self) -> bool;

    /// Has the next call find what has come just now: see [`Leg::ask_now`].
    fn ask_now(&mut self) {}

    /// The next bytes; `None` at its end.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>>;

    /// Ready when it aborts while nothing is being received from it.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Broken>;

    /// Whether what it sent before it reset its connection is owed to the target all the same. To a socket, the kernel
    /// has acknowledged those bytes; a request that is cancelled is not to be acted on.
    fn is_acknowledged(&self) -> bool {
        false
    }

    /// Whether it has sent something that was not taken yet.
    fn has_unread(&self) -> bool {
        false
    }
}

impl<L: Leg> Source for L {
    fn prefetches(&self) -> bool {
        self.may_prefetch()
    }

    fn ask_now(&mut self) {
        Leg::ask_now(self);
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        self.poll_recv(cx)
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.poll_broken(cx)
    }

    fn is_acknowledged(&self) -> bool {
        Leg::is_acknowledged(self)
    }

    fn has_unread(&self) -> bool {
        Leg::has_unread(self)
    }
}

/// See the module. Whoever asks for a stream sends from it, and whoever waits for that one hears the client leave: two
/// futures of one task, so none of them holds it beyond a poll.
pub struct Ahead<'c>(RefCell<Waiting<'c>>);

struct Waiting<'c> {
    client: &'c mut (dyn Source + 'c),
    /// Taken from the client, and on no stream.
    queue: Queue,
    /// On the stream that is being asked for, and how many bytes that are.
    kept: Queue,
    sent: usize,
    /// The client has ended.
    ended: bool,
    /// The stream was told so.
    finished: bool,
    /// A stream takes what comes.
    asking: bool,
    /// One has got its 200.
    answered: bool,
    /// The client has reset its connection behind bytes that are owed to the target.
    broken: Option<Broken>,
    /// It has, and what it sent has not all been read.
    gone: bool,
    /// The client has left.
    left: Option<Broken>,
}

impl<'c> Ahead<'c> {
    /// Of a client, from which `queue` has come already.
    pub fn new(client: &'c mut (dyn Source + 'c), queue: Queue) -> Self {
        Self(RefCell::new(Waiting {
            client,
            queue,
            kept: Queue::default(),
            sent: 0,
            ended: false,
            finished: false,
            asking: false,
            answered: false,
            broken: None,
            gone: false,
            left: None,
        }))
    }

    /// Waits for the answer to the request that opened a stream, and sends there meanwhile what the client sends, from
    /// its first byte.
    pub async fn until<T>(&self, send: &mut Sender, answer: impl Future<Output = T>) -> T {
        let mut answer = pin!(answer);
        let _asking = Asking::new(self);
        let mut is_new = true;
        poll_fn(|cx| {
            let answered = answer.as_mut().poll(cx);
            if answered.is_pending() {
                self.0.borrow_mut().send(cx, send, mem::take(&mut is_new));
            }
            answered
        })
        .await
    }

    /// Whether anything of the client's has gone ahead on the last stream.
    pub fn has_carried(&self) -> bool {
        self.0.borrow().sent > 0
    }

    /// The last stream that was asked for is open: what went ahead has arrived, or will.
    pub fn answered(&self) {
        let waiting = &mut *self.0.borrow_mut();
        waiting.answered = true;
        waiting.kept = Queue::default();
    }

    /// Ready when the client leaves. What it sends is taken here only where its window bounds it: h2 ends a connection
    /// on which small frames pile up unread.
    pub async fn left(&self) -> Broken {
        poll_fn(|cx| self.0.borrow_mut().poll_left(cx)).await
    }

    /// Whether the client has said anything yet, as far as that is known without asking its socket.
    pub async fn has_bytes(&self) -> bool {
        poll_fn(|cx| {
            let waiting = &mut *self.0.borrow_mut();
            waiting.take_what_comes(cx);
            Poll::Ready(!waiting.queue.is_empty())
        })
        .await
    }

    /// What the relay goes on with.
    pub fn into_early(self) -> Early {
        let mut waiting = self.0.into_inner();
        if !waiting.answered {
            waiting.begin_anew();
        }
        let Waiting { queue, sent, ended, broken, finished, .. } = waiting;
        Early { sent: queue, passed: sent, ended, broken, finished, ..Early::default() }
    }
}

/// While a stream takes what comes.
struct Asking<'a, 'c>(&'a Ahead<'c>);

impl<'a, 'c> Asking<'a, 'c> {
    fn new(ahead: &'a Ahead<'c>) -> Self {
        let waiting = &mut *ahead.0.borrow_mut();
        // The stream before was refused, if there was one.
        waiting.begin_anew();
        waiting.asking = true;
        waiting.client.ask_now();
        Self(ahead)
    }
}

impl Drop for Asking<'_, '_> {
    fn drop(&mut self) {
        self.0.0.borrow_mut().asking = false;
    }
}

impl Waiting<'_> {
    /// Nothing is on any stream.
    fn begin_anew(&mut self) {
        if self.sent > 0 {
            let mut behind = mem::replace(&mut self.queue, mem::take(&mut self.kept));
            while !behind.is_empty() {
                behind.front_len();
                self.queue.push(behind.take(usize::MAX));
            }
        }
        (self.sent, self.finished) = (0, false);
    }

    /// Whether the client's next bytes are wanted: a socket's are better left in the kernel while nobody takes them.
    fn wants_more(&self) -> bool {
        let has_room = self.asking && self.queue.is_empty() && self.sent < EARLY_MAX;
        !self.ended && self.broken.is_none() && self.left.is_none() && (has_room || self.client.prefetches())
    }

    fn take_what_comes(&mut self, cx: &mut Context<'_>) {
        while self.wants_more() {
            match self.client.poll_next(cx) {
                Poll::Ready(Ok(Some(chunk))) => self.queue.push(chunk),
                Poll::Ready(Ok(None)) => self.ended = true,
                Poll::Ready(Err(why)) if self.owes() => self.broken = Some(why),
                Poll::Ready(Err(why)) => self.left = Some(why),
                Poll::Pending => return,
            }
        }
    }

    /// Whether the client has sent anything that its target is to have, whatever became of the client since.
    fn owes(&self) -> bool {
        let has_sent = self.sent > 0 || !self.queue.is_empty() || self.client.has_unread();
        self.client.is_acknowledged() && has_sent
    }

    /// Sends what there is. A stream that `is_new` has no room before its request has left; what it is given now goes
    /// in the same write. The connection holds it once more until then, and no longer than it is kept here.
    fn send(&mut self, cx: &mut Context<'_>, to: &mut Sender, is_new: bool) {
        loop {
            self.take_what_comes(cx);
            let want = self.queue.front_len().min(EARLY_MAX - self.sent);
            if want == 0 {
                break;
            }
            let room = if is_new {
                want
            } else if let Poll::Ready(Some(Ok(room))) = to.poll_room(cx, want) {
                room
            } else {
                // Where the stream is gone, the answer says why.
                return;
            };
            let chunk = self.queue.take(room);
            self.sent += chunk.len();
            self.kept.push(chunk.clone());
            let _gone = to.send(chunk);
        }
        if self.ended && self.queue.is_empty() && !self.finished {
            self.finished = true;
            let _gone = to.end();
        }
    }

    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        // While a stream takes it, what comes was taken in the same poll.
        if !self.asking {
            self.take_what_comes(cx);
        }
        match self.left.take() {
            Some(why) => Poll::Ready(why),
            // It has gone, and the flow goes on without it.
            None if self.broken.is_some() || self.gone => Poll::Pending,
            // Whoever receives hears a reset too.
            None if self.asking && self.wants_more() => Poll::Pending,
            None => {
                let why = ready!(self.client.poll_gone(cx));
                if self.owes() {
                    self.gone = true;
                    return Poll::Pending;
                }
                Poll::Ready(why)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        collections::VecDeque,
        io::{self, IoSlice},
        pin::Pin,
        rc::Rc,
        time::Duration,
    };

    use http::{Method, Request, Response};
    use tokio::{
        io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex},
        task::{LocalSet, spawn_local},
        time::timeout,
    };

    use super::{super::Payload, *};

    /// A client that has said this, and says no more.
    struct Said(VecDeque<Option<Bytes>>);

    impl Source for Said {
        fn prefetches(&self) -> bool {
            false
        }

        fn poll_next(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
            self.0.pop_front().map_or(Poll::Pending, |said| Poll::Ready(Ok(said)))
        }

        fn poll_gone(&mut self, _cx: &mut Context<'_>) -> Poll<Broken> {
            Poll::Pending
        }
    }

    /// Counts what is written, in calls.
    struct Counted(DuplexStream, Rc<Cell<usize>>);

    impl AsyncRead for Counted {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Counted {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.1.set(self.1.get() + 1);
            Pin::new(&mut self.0).poll_write(cx, buf)
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.1.set(self.1.get() + 1);
            Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
        }

        fn is_write_vectored(&self) -> bool {
            true
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    type Streams = h2::server::Connection<DuplexStream, Bytes>;

    /// Both sides of a connection; what ours has written, in calls.
    async fn connected() -> (h2::client::SendRequest<Payload>, Streams, Rc<Cell<usize>>) {
        let (ours, theirs) = duplex(1 << 20);
        let writes = Rc::new(Cell::new(0));
        let ours = Counted(ours, Rc::clone(&writes));
        let (client, server) =
            tokio::join!(h2::client::Builder::new().handshake(ours), h2::server::handshake(theirs));
        let ((requests, mut connection), mut server) = (client.unwrap(), server.unwrap());
        let mut ping = connection.ping_pong().unwrap();
        spawn_local(async move { connection.await.unwrap() });
        // Once it is answered, nobody has anything more to say.
        tokio::select! {
            pong = ping.ping(h2::Ping::opaque()) => drop(pong.unwrap()),
            _ = server.accept() => panic!("nothing was asked"),
        }
        (requests, server, writes)
    }

    fn request() -> Request<()> {
        Request::builder().method(Method::CONNECT).uri("a:1").body(()).unwrap()
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let patience = Duration::from_secs(10);
        LocalSet::new().block_on(&runtime, async { timeout(patience, test).await.expect("in time") });
    }

    #[test]
    fn a_request_and_what_has_come_leave_in_one_write() {
        run(async {
            for bytes in [1, 300, 5000] {
                let (mut requests, mut server, writes) = connected().await;
                let before = writes.get();
                let asking = spawn_local(async move {
                    let mut client = Said([Some(Bytes::from(vec![7; bytes]))].into());
                    let ahead = Ahead::new(&mut client, Queue::default());
                    let (response, send) = requests.send_request(request(), false).unwrap();
                    let mut send = Sender::new(send);
                    ahead.until(&mut send, response).await.unwrap();
                    ahead.answered();
                    let early = ahead.into_early();
                    assert_eq!((early.passed, early.sent.is_empty(), early.ended), (bytes, true, false));
                    (requests, send)
                });
                let (asked, mut respond) = server.accept().await.unwrap().unwrap();
                let mut body = asked.into_body();
                let hear = async {
                    assert_eq!(body.data().await.unwrap().unwrap().len(), bytes);
                    assert_eq!(writes.get() - before, 1, "{bytes} bytes");
                    respond.send_response(Response::new(()), false).unwrap();
                    let _open = asking.await.unwrap();
                };
                tokio::select! {
                    () = hear => {}
                    _ = server.accept() => panic!("nothing more was asked"),
                }
            }
        });
    }

    #[test]
    fn what_was_refused_is_there_for_whoever_is_asked_or_dialled_next() {
        run(async {
            let (mut requests, mut server, _) = connected().await;
            spawn_local(async move {
                while let Some(Ok((_, mut respond))) = server.accept().await {
                    let refusal = Response::builder().status(502).body(()).unwrap();
                    respond.send_response(refusal, true).unwrap();
                }
            });
            let all: Vec<u8> = (0..=250).cycle().take(EARLY_MAX + 1000).collect();
            let parts = [0..1, 1..9, 9..5000, 5000..5001, 5001..all.len()];
            let said = parts.map(|part| Some(Bytes::copy_from_slice(&all[part])));
            let mut client = Said(said.into_iter().chain([None]).collect());
            let ahead = Ahead::new(&mut client, Queue::default());
            for _ in 0..3 {
                let (response, send) = requests.send_request(request(), false).unwrap();
                let mut send = Sender::new(send);
                let refused = ahead.until(&mut send, response).await.unwrap();
                assert_eq!(refused.status(), 502);
                let waiting = ahead.0.borrow();
                assert_eq!((waiting.sent, waiting.finished), (EARLY_MAX, false));
            }
            let mut early = ahead.into_early();
            assert_eq!((early.passed, early.finished), (0, false));
            let mut left = Vec::new();
            while !early.sent.is_empty() {
                early.sent.front_len();
                left.extend_from_slice(&early.sent.take(usize::MAX));
            }
            assert!(left == all, "{} bytes of {}", left.len(), all.len());
        });
    }
}
