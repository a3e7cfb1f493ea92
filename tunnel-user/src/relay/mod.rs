//! Moves the bytes between the two legs of a flow.
//!
//! Enters: two legs whose handshakes are done. Leaves: how the flow ended, and how much it moved.
//! Invariant: bytes arrive once, in order, unchanged; what one side has not accepted is never more than
//! the other side's window; EOF, reset and abort stay three different things. It never dials.
//!
//! Every flow can be copied; between two sockets of ours the bytes may stay in the kernel
//! (`pipe.rs`). How a flow ends is decided here for both.

mod bypass;
mod early;
mod h2;
mod pipe;
mod queue;
mod splice;
mod tcp;
#[cfg(test)]
mod tests;
mod tls;

use std::{
    cell::Cell,
    fmt,
    future::poll_fn,
    io, mem,
    ops::DerefMut,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::net::TcpStream;

pub use self::{
    early::{Ahead, EARLY_MAX, Source},
    h2::{H2Leg, Waiting},
    pipe::{PIPE_CAPACITY, PIPES_MAX, Piped, Pipes},
    queue::Queue,
    splice::{CHATTY_BYTES, CHATTY_STREAK, Spliced, Splices, Unfit, probe},
    tcp::{TcpLeg, broken},
    tls::TlsLeg,
};
use crate::transport::{io::Wire, record::TlsStream};

/// One side of a flow, to be polled from one task.
pub trait Leg {
    /// Whether bytes may be taken before the other side has room. So it is where the peer's window bounds
    /// them anyway; a socket's bytes are better left in the kernel.
    const PREFETCH: bool;

    /// The same of this very leg, where its type stands for several kinds.
    fn may_prefetch(&self) -> bool {
        Self::PREFETCH
    }

    /// The next [`poll_recv`](Self::poll_recv) asks the peer's socket, even where the runtime has not heard yet that
    /// something has come: it hears when it looks at epoll again.
    fn ask_now(&mut self) {}

    /// The next bytes; `None` at EOF (FIN, END_STREAM, or close_notify).
    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>>;

    /// The other side has taken `n` bytes: the peer may send as many more.
    fn accepted(&mut self, n: usize);

    /// Sends from the front of `queue`, as much as there is room for: at least one byte, or pending.
    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>>;

    /// Everything was sent: FIN, END_STREAM, or close_notify. To be asked again until it is ready.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>>;

    /// Ready when the peer aborts while nothing is being received from it.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken>;

    /// Both directions ended cleanly: dropping the leg sends nothing more.
    fn close(&mut self);

    /// Ends both directions with a reset.
    fn abort(&mut self);

    /// The leg as a socket of ours, whose bytes are raw.
    fn as_tcp(&mut self) -> Option<&mut TcpLeg> {
        None
    }
}

/// A connection that becomes a leg, once all that was to be said on it before has been said.
pub trait IntoLeg: Wire {
    /// The leg.
    type Leg: Leg;

    /// Everything that was written has been flushed. What was received and not read is the leg's.
    fn into_leg(self) -> Self::Leg;
}

impl IntoLeg for TcpStream {
    type Leg = TcpLeg;

    fn into_leg(self) -> TcpLeg {
        TcpLeg::new(self)
    }
}

impl IntoLeg for TlsStream<TcpStream> {
    type Leg = TlsLeg<TcpLeg>;

    fn into_leg(self) -> Self::Leg {
        let (stream, session) = self.into_parts();
        TlsLeg::new(TcpLeg::new(stream), session)
    }
}

/// How a leg ended other than by EOF.
#[derive(Debug)]
pub enum Broken {
    /// The peer has all it wants and said so: END_STREAM followed by RST_STREAM(NO_ERROR), as Envoy ends
    /// a stream whose target closed first (RFC 9113 section 8.1). Clean.
    Done,
    /// RST, RST_STREAM or a lost connection.
    Reset(Cause),
}

/// What a reset looked like on the wire.
#[derive(Debug)]
pub enum Cause {
    /// A socket error.
    Tcp(io::Error),
    /// An HTTP/2 error code.
    Stream(::h2::Reason),
    /// The HTTP/2 connection failed, or TLS did.
    Connection(String),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Reset(Cause::Tcp(e)) => write!(f, "{e}"),
            Self::Reset(Cause::Stream(reason)) => write!(f, "stream reset: {reason}"),
            Self::Reset(Cause::Connection(e)) => write!(f, "tunnel connection lost: {e}"),
        }
    }
}

/// Which leg broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The application, or the peer that sent the CONNECT.
    Client,
    /// The tunnel, or the target.
    Target,
}

/// How a flow ended.
#[derive(Debug)]
pub enum Outcome {
    /// EOF both ways.
    Closed,
    /// One leg was reset, so the other was too.
    Reset(Side, Broken),
    /// This process stopped, so both were reset.
    Stopped,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Stopped => f.write_str("reset: stopped at the drain deadline"),
            Self::Reset(Side::Client, why) => write!(f, "reset by client: {why}"),
            Self::Reset(Side::Target, why) => write!(f, "reset by target: {why}"),
        }
    }
}

/// Bytes that a flow has moved, readable while it runs.
#[derive(Debug, Default)]
pub struct Meter {
    /// From the client to the target.
    pub sent: Cell<u64>,
    /// From the target to the client.
    pub received: Cell<u64>,
}

/// What has moved before the relay began. Where it has not been sent on, it goes first.
#[derive(Default)]
pub struct Early {
    /// From the client.
    pub sent: Queue,
    /// Bytes at the front of `sent` that are our own: the client gets no window for them.
    pub ours: usize,
    /// Bytes from the client that the target's side has been given already.
    pub passed: usize,
    /// The client has ended, behind all of these.
    pub ended: bool,
    /// The target's side was told so.
    pub finished: bool,
    /// From the target.
    pub received: Queue,
}

/// Steps that one direction takes before the task lets the worker's others have a turn. At 64 KiB a step
/// that is 1 MiB, about 200 µs.
const STEPS: u32 = 16;

/// How bytes are moved between two sockets of ours; everything else is copied.
#[derive(Clone)]
pub enum Path {
    /// Through this process.
    Copy,
    /// Through pipes.
    Pipe(Rc<Pipes>),
    /// By a kernel program while they chat, and else through this process.
    Splice(Rc<Splices>),
}

impl Path {
    /// What a worker has for it, or keeps: of pipes no more than so many.
    pub fn new(kind: PathKind, before: Option<&Self>, pipes_max: usize) -> Self {
        match (kind, before) {
            (PathKind::Copy, _) => Self::Copy,
            (PathKind::Pipe, Some(Self::Pipe(pipes))) => Self::Pipe(Rc::clone(pipes)),
            (PathKind::Pipe, _) => Self::Pipe(Rc::new(Pipes::new(pipes_max))),
            (PathKind::Splice, Some(Self::Splice(splices))) => Self::Splice(Rc::clone(splices)),
            (PathKind::Splice, _) => match Splices::load() {
                Ok(splices) => Self::Splice(Rc::new(splices)),
                // It was tried before the workers were told to.
                Err(e) => {
                    tracing::error!("this worker copies: {}", e.summary());
                    Self::Copy
                }
            },
        }
    }
}

/// A [`Path`] that is still to be made, by each worker for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// [`Path::Copy`]
    Copy,
    /// [`Path::Pipe`]
    Pipe,
    /// [`Path::Splice`]
    Splice,
}

/// Runs a flow to its end, by `path` where both legs are sockets, else by copying. Everything is borrowed: an argument
/// of a future takes its room once as such and once as what it becomes, in every idle flow.
pub async fn relay<C: Leg, T: Leg>(
    client: &mut C,
    target: &mut T,
    early: &mut Early,
    meter: &Meter,
    path: &Path,
) -> Outcome {
    let Early { sent, ours, passed, ended, finished, received } = early;
    if *passed > 0 {
        client.accepted(*passed);
        meter.sent.set(*passed as u64);
    }
    if let Path::Pipe(pipes) = path
        && let (Some(client), Some(target)) = (client.as_tcp(), target.as_tcp())
    {
        client.stay_with_tcp();
        target.stay_with_tcp();
        // Apart, because few flows have them. A socket says its end again.
        let (sent, received) = (mem::take(sent), mem::take(received));
        let piped = async {
            let mut up = pipe::Through::new(pipes, sent, *ours);
            let mut down = pipe::Through::new(pipes, received, 0);
            run(client, target, meter, &mut up, &mut down).await
        };
        return Box::pin(piped).await;
    }
    let state = match (ended, finished) {
        (_, true) => State::Done,
        (true, false) => State::Draining,
        (false, false) => State::Open,
    };
    if state == State::Draining {
        sent.end();
    }
    let mut up = Direction { state, ..Direction::new(sent, *ours) };
    let mut down = Direction::new(received, 0);
    if let Path::Splice(splices) = path
        && let (Some(client), Some(target)) = (client.as_tcp(), target.as_tcp())
    {
        client.stay_with_tcp();
        target.stay_with_tcp();
        return Box::pin(splice::relay(client, target, up, down, meter, splices)).await;
    }
    run(client, target, meter, &mut up, &mut down).await
}

/// One direction of a flow, in one of the ways to move its bytes.
trait Way<S: Leg, D: Leg> {
    /// Moves what can be moved. The error says whether it was the source that broke.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        src: &mut S,
        dst: &mut D,
        moved: &Cell<u64>,
    ) -> Result<(), (bool, Broken)>;

    /// Whether the source is not being polled for bytes.
    fn is_deaf(&self) -> bool;

    /// Whether its end was passed on.
    fn is_done(&self) -> bool;
}

async fn run<C: Leg, T: Leg>(
    client: &mut C,
    target: &mut T,
    meter: &Meter,
    up: &mut impl Way<C, T>,
    down: &mut impl Way<T, C>,
) -> Outcome {
    let ended = poll_fn(|cx| step(cx, client, target, meter, up, down)).await;
    conclude(client, target, ended)
}

/// Moves what can be moved both ways; ready when both have ended, or with the side that broke.
fn step<C: Leg, T: Leg>(
    cx: &mut Context<'_>,
    client: &mut C,
    target: &mut T,
    meter: &Meter,
    up: &mut impl Way<C, T>,
    down: &mut impl Way<T, C>,
) -> Poll<Result<(), (Side, Broken)>> {
    let sent = up
        .poll(cx, client, target, &meter.sent)
        .map_err(|(at_source, why)| (if at_source { Side::Client } else { Side::Target }, why));
    if let Err(reset) = sent {
        return Poll::Ready(Err(reset));
    }
    let received = down
        .poll(cx, target, client, &meter.received)
        .map_err(|(at_source, why)| (if at_source { Side::Target } else { Side::Client }, why));
    if let Err(reset) = received {
        return Poll::Ready(Err(reset));
    }
    if up.is_done() && down.is_done() {
        return Poll::Ready(Ok(()));
    }
    // A direction that is not reading would not hear of a reset.
    if up.is_deaf()
        && let Poll::Ready(why) = client.poll_broken(cx)
        && let Broken::Reset(_) = why
    {
        return Poll::Ready(Err((Side::Client, why)));
    }
    if down.is_deaf()
        && let Poll::Ready(why) = target.poll_broken(cx)
        && let Broken::Reset(_) = why
    {
        return Poll::Ready(Err((Side::Target, why)));
    }
    Poll::Pending
}

/// Closes both legs, or aborts the one that did not break.
fn conclude(client: &mut impl Leg, target: &mut impl Leg, ended: Result<(), (Side, Broken)>) -> Outcome {
    match ended {
        Ok(()) => {
            client.close();
            target.close();
            Outcome::Closed
        }
        Err((side, why)) => {
            match side {
                Side::Client => target.abort(),
                Side::Target => client.abort(),
            }
            Outcome::Reset(side, why)
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Bytes may still come.
    Open,
    /// EOF was received; what is queued is still to be sent.
    Draining,
    /// EOF was passed on, or the sink wants no more.
    Done,
}

/// Everything was sent: says so; whether that is done. The error is of the sink.
fn finish(cx: &mut Context<'_>, dst: &mut impl Leg) -> Result<bool, (bool, Broken)> {
    match dst.poll_finish(cx) {
        Poll::Ready(Ok(()) | Err(Broken::Done)) => Ok(true),
        Poll::Ready(Err(why)) => Err((false, why)),
        Poll::Pending => Ok(false),
    }
}

/// How many of `n` bytes that were sent came from the source. Our own went first.
fn theirs(ours: &mut usize, n: usize) -> usize {
    let first = n.min(*ours);
    *ours -= first;
    n - first
}

/// One direction of a flow, copied.
struct Direction<Q> {
    queue: Q,
    /// Bytes at its front that did not come from the source.
    ours: usize,
    state: State,
}

impl<Q: DerefMut<Target = Queue>> Direction<Q> {
    /// With what is there already.
    fn new(queue: Q, ours: usize) -> Self {
        Self { queue, ours, state: State::Open }
    }

    /// Whether nothing waits to be sent, and bytes may still come.
    fn is_idle(&self) -> bool {
        self.state == State::Open && self.queue.is_empty()
    }
}

impl<S: Leg, D: Leg, Q: DerefMut<Target = Queue>> Way<S, D> for Direction<Q> {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        src: &mut S,
        dst: &mut D,
        moved: &Cell<u64>,
    ) -> Result<(), (bool, Broken)> {
        for _ in 0..STEPS {
            if self.state == State::Done {
                return Ok(());
            }
            while self.state == State::Open && (S::PREFETCH || self.queue.is_empty()) {
                match src.poll_recv(cx) {
                    Poll::Ready(Ok(Some(chunk))) => self.queue.push(chunk),
                    Poll::Ready(Ok(None)) => {
                        self.state = State::Draining;
                        self.queue.end();
                    }
                    Poll::Ready(Err(why)) => return Err((true, why)),
                    Poll::Pending => break,
                }
            }
            if self.queue.is_empty() {
                if self.state == State::Open {
                    return Ok(());
                }
                if finish(cx, dst)? {
                    self.state = State::Done;
                }
                return Ok(());
            }
            match dst.poll_send(cx, &mut self.queue) {
                Poll::Ready(Ok(n)) => {
                    let n = theirs(&mut self.ours, n);
                    src.accepted(n);
                    moved.set(moved.get() + n as u64);
                }
                Poll::Ready(Err(Broken::Done)) => {
                    // Nobody wants the rest. The client learns it from the kernel, which answers bytes
                    // that come for a closed socket with RST.
                    *self.queue = Queue::default();
                    self.state = State::Done;
                    return Ok(());
                }
                Poll::Ready(Err(why)) => return Err((false, why)),
                Poll::Pending => return Ok(()),
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    fn is_deaf(&self) -> bool {
        self.state != State::Open || !self.queue.is_empty()
    }

    fn is_done(&self) -> bool {
        self.state == State::Done
    }
}
