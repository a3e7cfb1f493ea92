//! Moves the bytes between the two legs of a flow, until both have ended or one has broken.
//!
//! Every flow can be copied; between two sockets of ours the bytes may stay in the kernel (`join.rs`, `pipe.rs`, `splice/`).
//! How a flow ends is decided in one place for all of them (`ends.rs`).
//!
//! # Invariants
//! - Bytes arrive once, in order, unchanged.
//! - What one side has not accepted is never more than the other side's window.
//! - EOF, reset and abort stay three different things.

mod bypass;
mod copy;
mod early;
mod ends;
mod h2;
mod h3;
mod join;
pub mod nested;
mod pipe;
mod queue;
mod sender;
mod silence;
mod splice;
mod tcp;
#[cfg(test)]
mod tests;
mod tls;

use std::{
    fmt, io, mem,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::net::TcpStream;

use self::{
    copy::Direction,
    ends::{State, run},
};
pub use self::{
    early::{Ahead, EARLY_MAX, EarlySource, EarlyStream},
    ends::RESET_LINGER,
    h2::{Body, H2Leg, stream_broken},
    h3::{H3Leg, HELD_MAX, HeadFailure, Open, Receiver},
    pipe::{PIPE_CAPACITY, PIPES_MAX, Piped, Pipes},
    queue::Queue,
    sender::{Payload, Sender},
    silence::give_up_silent_peers,
    splice::{INTERACTIVE_BYTES, INTERACTIVE_STREAK, Spliced, Splices, Unfit, probe},
    tcp::TcpLeg,
    tls::TlsLeg,
};
pub use crate::observe::flows::Meter;
use crate::{
    model::end::EndReason,
    observe::flows::CurrentPath,
    transport::{http3::Code, io::Wire, record::TlsStream},
};

/// One side of a flow, to be polled from one task.
pub trait Leg: 'static {
    /// Whether bytes may be taken before the other side has room. So it is where the peer's window bounds
    /// them anyway; a socket's bytes are better left in the kernel.
    fn prefetches(&self) -> bool;

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

    /// Ready when the peer aborts while nothing is being received from it. What it sent before can still be received,
    /// and the error behind it: this consumes neither.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken>;

    /// Whether what came before a reset was acknowledged to the peer, as the kernel does; a stream that is reset is cancelled.
    fn is_acknowledged(&self) -> bool {
        false
    }

    /// Of a leg that broke behind its end: whether that only says that its peer's kernel, which has had everything, does
    /// not remember the connection, and was asked by us.
    fn was_forgotten(&self) -> bool {
        false
    }

    /// Whether the peer has sent something that was not received yet, as far as that can be told without asking it.
    fn has_unread(&self) -> bool {
        false
    }

    /// Bytes that were sent and could still be lost: to a socket, those that the peer's kernel has not acknowledged, the
    /// end among them; to a stream, those that its connection has not taken.
    fn unacknowledged(&self) -> u64;

    /// Both directions ended cleanly: dropping the leg sends nothing more.
    fn close(&mut self);

    /// The peer has everything, the end included, and what it still sends is not wanted (RFC 9113 section 8.1;
    /// a socket that is closed answers with RST).
    fn release(&mut self);

    /// Ends both directions with a reset.
    fn abort(&mut self);

    /// Whether its bytes go past TCP.
    fn is_bypassed(&self) -> bool {
        false
    }
}

/// A connection that becomes a leg, once all that was to be said on it before has been said.
pub trait IntoLeg: Wire {
    /// The leg.
    type Leg: Leg;

    /// Everything that was written has been flushed. What was received and not read is the leg's; the last `read` bytes that
    /// were read belong to the flow, and the leg is told that they were [`accepted`](Leg::accepted) as of all others.
    fn into_leg(self, read: usize) -> Self::Leg;
}

impl IntoLeg for TcpStream {
    type Leg = TcpLeg;

    fn into_leg(self, _read: usize) -> TcpLeg {
        TcpLeg::new(self)
    }
}

impl<S: IntoLeg> IntoLeg for TlsStream<S> {
    type Leg = TlsLeg<S::Leg>;

    fn into_leg(self, _read: usize) -> Self::Leg {
        // The window below is given back as TLS takes records, whoever reads what is in them.
        let (below, session) = self.into_parts();
        TlsLeg::new(below.into_leg(0), session)
    }
}

/// Of whatever kind, where a relay for each is not worth it.
impl<L: Leg + ?Sized> Leg for Box<L> {
    fn prefetches(&self) -> bool {
        (**self).prefetches()
    }

    fn ask_now(&mut self) {
        (**self).ask_now();
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        (**self).poll_recv(cx)
    }

    fn accepted(&mut self, n: usize) {
        (**self).accepted(n);
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        (**self).poll_send(cx, queue)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        (**self).poll_finish(cx)
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        (**self).poll_broken(cx)
    }

    fn is_acknowledged(&self) -> bool {
        (**self).is_acknowledged()
    }

    fn was_forgotten(&self) -> bool {
        (**self).was_forgotten()
    }

    fn has_unread(&self) -> bool {
        (**self).has_unread()
    }

    fn unacknowledged(&self) -> u64 {
        (**self).unacknowledged()
    }

    fn close(&mut self) {
        (**self).close();
    }

    fn release(&mut self) {
        (**self).release();
    }

    fn abort(&mut self) {
        (**self).abort();
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
    /// An HTTP/3 error code.
    Http3(Code),
    /// The connection of HTTP/2 or HTTP/3 failed, or TLS did.
    Connection(String),
    /// The HTTP/2 connection was closed because its peer flooded it.
    Flood(String),
    /// This process, or its kernel program, has lost bytes.
    Ours(String),
    /// Bytes could not be put into the mailbox of a spliced flow.
    Overflow,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Reset(Cause::Tcp(e)) => write!(f, "{e}"),
            Self::Reset(Cause::Stream(reason)) => write!(f, "stream reset: {reason}"),
            Self::Reset(Cause::Http3(code)) => write!(f, "stream reset: {code}"),
            Self::Reset(Cause::Connection(e) | Cause::Flood(e)) => write!(f, "tunnel connection lost: {e}"),
            Self::Reset(Cause::Ours(e)) => f.write_str(e),
            Self::Reset(Cause::Overflow) => {
                f.write_str("bytes could not be put into the mailbox of a spliced flow")
            }
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
    /// This process ended it, so both were reset.
    Ended(EndReason),
}

impl Outcome {
    /// Which of the ends it is.
    pub fn reason(&self) -> EndReason {
        let (side, cause) = match self {
            Self::Closed => return EndReason::Closed,
            Self::Ended(reason) => return *reason,
            Self::Reset(Side::Client, Broken::Done) => return EndReason::ClientReset,
            Self::Reset(Side::Target, Broken::Done) => return EndReason::TargetReset,
            Self::Reset(side, Broken::Reset(cause)) => (side, cause),
        };
        match (side, cause) {
            (_, Cause::Ours(_)) => EndReason::InternalError,
            (_, Cause::Overflow) => EndReason::SpliceOverflow,
            (Side::Client, Cause::Tcp(e)) if e.kind() == io::ErrorKind::TimedOut => EndReason::ClientTimeout,
            (Side::Target, Cause::Tcp(e)) if e.kind() == io::ErrorKind::TimedOut => EndReason::TargetTimeout,
            (Side::Client, Cause::Tcp(_) | Cause::Stream(_) | Cause::Http3(_)) => EndReason::ClientReset,
            (Side::Target, Cause::Tcp(_) | Cause::Stream(_) | Cause::Http3(_)) => EndReason::TargetReset,
            (Side::Client, Cause::Flood(_)) => EndReason::ClientFlood,
            (Side::Client, Cause::Connection(_)) => EndReason::ClientLost,
            (Side::Target, Cause::Connection(_) | Cause::Flood(_)) => EndReason::UpstreamLost,
        }
    }

    /// What was on the wire, in words.
    pub fn detail(&self) -> Option<String> {
        match self {
            Self::Closed | Self::Ended(_) => None,
            Self::Reset(_, why) => Some(why.to_string()),
        }
    }
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
    /// Or it has reset its connection there.
    pub broken: Option<Broken>,
    /// The target's side was told so.
    pub finished: bool,
    /// From the target.
    pub received: Queue,
}

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
    /// What a worker has for it, or keeps: of pipes, or of pairs of mailboxes, no more than so many.
    pub fn new(kind: PathKind, before: Option<&Self>, pipes_max: usize) -> Self {
        match (kind, before) {
            (PathKind::Copy, _) => Self::Copy,
            (PathKind::Pipe, Some(Self::Pipe(pipes))) => Self::Pipe(Rc::clone(pipes)),
            (PathKind::Pipe, _) => Self::Pipe(Rc::new(Pipes::new(pipes_max))),
            (PathKind::Splice, Some(Self::Splice(splices))) => Self::Splice(Rc::clone(splices)),
            (PathKind::Splice, _) => match Splices::load(pipes_max) {
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
    let Early { sent, ours, passed, ended, broken, finished, received } = early;
    if *passed > 0 {
        client.accepted(*passed);
        meter.sent.set(*passed as u64);
    }
    if let Path::Pipe(pipes) = path
        && let Some((client, target)) = join::sockets(client, target)
    {
        // Apart, because few flows have them. A socket says its end again, but not its error.
        let (sent, received, broken) = (mem::take(sent), mem::take(received), broken.take());
        meter.path.set(CurrentPath::Pipe);
        let piped = async {
            let mut up = pipe::Through::new(pipes, sent, *ours, broken);
            let mut down = pipe::Through::new(pipes, received, 0, None);
            run(client, target, meter, &mut up, &mut down).await
        };
        return Box::pin(piped).await;
    }
    let state = match (broken.take(), ended, finished) {
        (Some(why), ..) => State::Failing(why),
        (None, _, true) => State::Done,
        (None, true, false) => {
            sent.end();
            State::Draining
        }
        (None, false, false) => State::Open,
    };
    let mut up = Direction::new(sent, *ours, state);
    let mut down = Direction::new(received, 0, State::Open);
    if let Path::Splice(splices) = path
        && let Some((client, target)) = join::sockets(client, target)
    {
        return Box::pin(splice::relay(client, target, up, down, meter, splices)).await;
    }
    run(client, target, meter, &mut up, &mut down).await
}
