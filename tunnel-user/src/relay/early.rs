//! What a client sends before its target has answered, sent ahead of the answer ("optimistic", RFC 9931).
//!
//! # Invariants
//! - At most [`EARLY_MAX`] bytes go ahead, and they are kept until the answer, so that another stream gets them again, all
//!   of them and in order; the client's end goes behind them.
//! - Nothing goes ahead on HTTP/1, where a proxy that refuses could take the bytes for its next request.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    mem,
    pin::pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;

use super::{Broken, Early, Leg, Queue};

/// What goes ahead of an answer, for one flow: the window that HTTP/2 begins with (RFC 9113 section 6.9.2), so what a
/// peer may be sent that has said nothing; and as much as one read of a socket.
pub const EARLY_MAX: usize = 64 * 1024;

/// A client whose target has not answered.
pub trait EarlySource {
    /// Whether bytes may be taken while nobody has room for them: see [`Leg::prefetches`].
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

/// A stream that was asked for, as far as it takes what goes ahead of its answer. What it does not take is lost, and the
/// answer says why.
pub trait EarlyStream {
    /// Room for some of `want` bytes; `None`: it takes no more.
    fn poll_room(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Option<usize>>;

    /// Gives it bytes.
    fn send(&mut self, bytes: Bytes);

    /// Says that there is no more.
    fn end(&mut self);
}

impl<L: Leg> EarlySource for L {
    fn prefetches(&self) -> bool {
        Leg::prefetches(self)
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
pub struct Ahead<'c>(RefCell<State<'c>>);

struct State<'c> {
    client: &'c mut (dyn EarlySource + 'c),
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
    pub fn new(client: &'c mut (dyn EarlySource + 'c), queue: Queue) -> Self {
        Self(RefCell::new(State {
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
    pub async fn until<T>(&self, send: &mut impl EarlyStream, answer: impl Future<Output = T>) -> T {
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
        let State { queue, sent, ended, broken, finished, .. } = waiting;
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

impl State<'_> {
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
    fn send(&mut self, cx: &mut Context<'_>, to: &mut impl EarlyStream, is_new: bool) {
        loop {
            self.take_what_comes(cx);
            let want = self.queue.front_len().min(EARLY_MAX - self.sent);
            if want == 0 {
                break;
            }
            let room = if is_new {
                want
            } else if let Poll::Ready(Some(room)) = to.poll_room(cx, want) {
                room
            } else {
                // Where the stream is gone, the answer says why.
                return;
            };
            let chunk = self.queue.take(room);
            self.sent += chunk.len();
            self.kept.push(chunk.clone());
            to.send(chunk);
        }
        if self.ended && self.queue.is_empty() && !self.finished {
            self.finished = true;
            to.end();
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
mod tests;
