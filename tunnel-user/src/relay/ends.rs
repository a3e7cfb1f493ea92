//! How a flow ends, whatever moves its bytes.
//!
//! A leg ends in one of two ways in each direction: what it sends ends in order (FIN, END_STREAM, close_notify) or breaks
//! (RST, RST_STREAM, a lost connection), and it takes everything or at some point takes no more.
//!
//! # Invariants
//! - An error behind an end discards nothing that came before that end: an orderly end wins. (A closed application's
//!   kernel forgets its socket after `tcp_fin_timeout`, and answers what comes later with RST.)
//! - An error of one direction discards nothing of the other: who takes no more is still heard to its end.
//! - A reset is passed on behind all that was received before it, once the other side's kernel has acknowledged that, as
//!   the kernel itself would have kept it. A reader that does not read holds it up for [`RESET_LINGER`] at most.
//! - A socket is closed only when nothing that was sent on it can be lost by that: closing a socket with unread bytes sends
//!   RST and drops what is queued (`__tcp_close`, net/ipv4/tcp.c).

use std::{
    cell::Cell,
    future::{Future as _, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

use super::{Broken, Leg, Meter, Outcome, Side};
use crate::observe::flows::CurrentPath;

/// How long the bytes in front of a reset may stay where they are, without one of them moving on, before the reset goes
/// ahead of them: as long as Linux keeps a closed connection that the peer has not closed (`TCP_FIN_TIMEOUT`, tcp.h).
pub const RESET_LINGER: Duration = Duration::from_secs(60);
/// Nothing tells that a peer's kernel has acknowledged something, so it is looked at after this time, and then after twice
/// as much each time,
const LOOK_MIN: Duration = Duration::from_millis(1);
/// up to this: an end that had to wait comes at most that much later.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// How far one direction has got.
#[derive(Debug)]
pub(super) enum State {
    /// Bytes may still come.
    Open,
    /// The source has ended; what is queued is still to be sent, and the end behind it.
    Draining,
    /// The end was passed on.
    Done,
    /// The source broke; what came before is still to be sent.
    Failing(Broken),
    /// The sink takes no more.
    Refused {
        /// What it said; `None` where the other direction knows.
        why: Option<Broken>,
        /// What has become of the source since.
        source: Source,
    },
}

/// What is known of the source of a direction whose sink takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Bytes may still come, and are dropped.
    Open,
    /// It has ended in order: its peer may still acknowledge what the other direction has sent.
    Ended,
    /// It is broken: nobody acknowledges anything any more.
    Broken,
}

impl State {
    /// The sink takes no more. What was known of the source before that is kept.
    pub(super) fn refuse(&mut self, why: Option<Broken>) {
        *self = match std::mem::replace(self, Self::Done) {
            Self::Failing(first) => Self::Refused { why: Some(first), source: Source::Broken },
            Self::Draining | Self::Done => Self::Refused { why, source: Source::Ended },
            Self::Open => Self::Refused { why, source: Source::Open },
            Self::Refused { why: before, source } => Self::Refused { why: before.or(why), source },
        };
    }
}

/// One direction of a flow, in one of the ways to move its bytes.
pub(super) trait Way<S: Leg, D: Leg> {
    /// Moves what can be moved.
    fn poll(&mut self, cx: &mut Context<'_>, src: &mut S, dst: &mut D, moved: &Cell<u64>);

    /// How far it has got.
    fn state(&self) -> &State;

    /// The same, once nothing more is to be done.
    fn take_state(&mut self) -> State;

    /// Whether nothing waits to be sent.
    fn is_empty(&self) -> bool;

    /// Whether bytes were dropped that the sink did not take.
    fn has_lost(&self) -> bool;

    /// The sink takes no more.
    fn refuse(&mut self, why: Option<Broken>);

    /// Whether the source is not being polled for bytes.
    fn reads_paused(&self) -> bool {
        !matches!(self.state(), State::Open) || !self.is_empty()
    }
}

/// Everything was sent: says so; what has become of the direction, once that is done.
pub(super) fn finish(cx: &mut Context<'_>, dst: &mut impl Leg) -> Option<State> {
    match dst.poll_finish(cx) {
        Poll::Ready(Ok(()) | Err(Broken::Done)) => Some(State::Done),
        Poll::Ready(Err(why)) => Some(State::Refused { why: Some(why), source: Source::Ended }),
        Poll::Pending => None,
    }
}

/// Chunks that are dropped before the worker's others have a turn.
const DROPPED_MAX: u32 = 16;

/// Drops what comes from a source whose bytes nobody takes: it may read what is on its way to it only once it has written
/// what it has. Whether there was anything.
pub(super) fn discard(cx: &mut Context<'_>, src: &mut impl Leg, source: &mut Source) -> bool {
    let mut dropped = false;
    for _ in 0..DROPPED_MAX {
        if *source != Source::Open {
            return dropped;
        }
        match src.poll_recv(cx) {
            Poll::Ready(Ok(Some(chunk))) => {
                dropped |= !chunk.is_empty();
                src.accepted(chunk.len());
            }
            Poll::Ready(Ok(None)) => *source = Source::Ended,
            Poll::Ready(Err(_)) => *source = Source::Broken,
            Poll::Pending => return dropped,
        }
    }
    cx.waker().wake_by_ref();
    dropped
}

/// How many of `n` bytes that were sent came from the source. Our own went first.
pub(super) fn theirs(ours: &mut usize, n: usize) -> usize {
    let first = n.min(*ours);
    *ours -= first;
    n - first
}

/// What the end of a flow is.
#[derive(Debug)]
pub(super) enum Ended {
    /// Both directions ended in order.
    Closed,
    /// One leg was reset, and the other has, or will never have, what came before.
    Reset(Side, Broken),
    /// One leg ended in order and then took no more; the other has all of it. Why, and whether that cost anybody a byte.
    Released(Side, Option<Broken>, bool),
}

/// Runs a flow to its end.
pub(super) async fn run<C: Leg, T: Leg>(
    client: &mut C,
    target: &mut T,
    meter: &Meter,
    up: &mut impl Way<C, T>,
    down: &mut impl Way<T, C>,
) -> Outcome {
    let mut linger = Linger::default();
    let ended = poll_fn(|cx| {
        let ended = step(cx, client, target, meter, up, down, &mut linger);
        if client.is_bypassed() {
            meter.path.set(CurrentPath::Bypass);
        }
        ended
    });
    let ended = ended.await;
    conclude(client, target, ended)
}

/// Moves what can be moved both ways; ready when the flow has ended.
pub(super) fn step<C: Leg, T: Leg>(
    cx: &mut Context<'_>,
    client: &mut C,
    target: &mut T,
    meter: &Meter,
    up: &mut impl Way<C, T>,
    down: &mut impl Way<T, C>,
    linger: &mut Linger,
) -> Poll<Ended> {
    loop {
        up.poll(cx, client, target, &meter.sent);
        down.poll(cx, target, client, &meter.received);
        meter.note();
        // A reset is one of both directions. One that is refused is polled once more, to drop what comes from its source:
        // nothing else would wake it.
        let refused = |state: &State| matches!(state, State::Refused { .. });
        if matches!(up.state(), State::Failing(_)) && !refused(down.state()) {
            down.refuse(None);
            continue;
        }
        if matches!(down.state(), State::Failing(_)) && !refused(up.state()) {
            up.refuse(None);
            continue;
        }
        // A leg that is not being read would not be heard.
        if up.reads_paused()
            && !refused(down.state())
            && let Poll::Ready(why) = client.poll_broken(cx)
        {
            down.refuse(Some(why));
            continue;
        }
        if down.reads_paused()
            && !refused(up.state())
            && let Poll::Ready(why) = target.poll_broken(cx)
        {
            up.refuse(Some(why));
            continue;
        }
        break;
    }
    let moved = meter.sent.get() + meter.received.get();
    let at_client = || Unacknowledged { now: client.unacknowledged(), moved };
    let at_target = || Unacknowledged { now: target.unacknowledged(), moved };
    let ready = match (up.state(), down.state()) {
        (State::Done, State::Done) => return Poll::Ready(Ended::Closed),
        (State::Refused { .. }, State::Refused { .. }) => true,
        // What the other direction has sent will not be acknowledged: not what was under way when the connection broke.
        (State::Done | State::Failing(_), State::Refused { source: Source::Broken, .. })
        | (State::Refused { source: Source::Broken, .. }, State::Done | State::Failing(_)) => true,
        (State::Failing(_), _) if up.is_empty() => linger.poll(cx, at_target(), true).is_ready(),
        (_, State::Failing(_)) if down.is_empty() => linger.poll(cx, at_client(), true).is_ready(),
        (State::Done, State::Refused { .. }) => linger.poll(cx, at_target(), false).is_ready(),
        (State::Refused { .. }, State::Done) => linger.poll(cx, at_client(), false).is_ready(),
        // What came before a reset is on its way, or has not been read yet.
        (State::Failing(_), _)
        | (_, State::Failing(_))
        | (State::Open, State::Refused { why: Some(Broken::Reset(_)), .. })
        | (State::Refused { why: Some(Broken::Reset(_)), .. }, State::Open) => {
            linger.poll_stuck(cx, moved).is_ready()
        }
        _ => false,
    };
    if !ready {
        return Poll::Pending;
    }
    let lost = up.has_lost() || down.has_lost();
    Poll::Ready(match (up.take_state(), down.take_state()) {
        (State::Failing(why), _) => Ended::Reset(Side::Client, why),
        (_, State::Failing(why)) => Ended::Reset(Side::Target, why),
        // Who has broken in both directions knew it first where the other direction was told without a reason.
        (State::Refused { why: Some(why), .. }, State::Refused { why: None, .. }) => {
            Ended::Reset(Side::Client, why)
        }
        // That a side wants no more is no reset: the other side's is.
        (
            State::Refused { why: Some(Broken::Done), .. },
            State::Refused { why: Some(why @ Broken::Reset(_)), .. },
        ) => Ended::Reset(Side::Client, why),
        (State::Refused { why: Some(why), .. }, State::Open | State::Refused { .. }) => {
            Ended::Reset(Side::Target, why)
        }
        (State::Open | State::Refused { .. }, State::Refused { why: Some(why), .. }) => {
            Ended::Reset(Side::Client, why)
        }
        (State::Refused { why, .. }, _) => Ended::Released(Side::Target, why, lost),
        (_, State::Refused { why, .. }) => Ended::Released(Side::Client, why, lost),
        _ => Ended::Closed,
    })
}

/// Closes both legs, or aborts the one that did not break.
pub(super) fn conclude(client: &mut impl Leg, target: &mut impl Leg, ended: Ended) -> Outcome {
    match ended {
        Ended::Closed => {
            client.close();
            target.close();
            Outcome::Closed
        }
        Ended::Reset(side, why) => {
            match side {
                Side::Client => target.abort(),
                Side::Target => client.abort(),
            }
            Outcome::Reset(side, why)
        }
        Ended::Released(side, why, lost) => {
            // A reset behind an end is passed on as what it is: the kernel tells it to who writes or waits for errors, and
            // who reads still gets everything, and then the end.
            let is_reset = matches!(why, Some(Broken::Reset(_)));
            match side {
                Side::Client if is_reset && !client.was_forgotten() => target.abort(),
                Side::Client => target.release(),
                Side::Target if is_reset && !target.was_forgotten() => client.abort(),
                Side::Target => client.release(),
            }
            match why {
                Some(why @ Broken::Reset(_)) if lost => Outcome::Reset(side, why),
                _ => Outcome::Closed,
            }
        }
    }
}

/// What one leg has been sent and could still lose.
struct Unacknowledged {
    now: u64,
    /// Bytes of the flow that have moved.
    moved: u64,
}

/// Waits for what is to arrive in front of an end. It holds nothing until there is such an end.
#[derive(Default)]
pub(super) struct Linger(Option<Box<Lingering>>);

struct Lingering {
    /// Changes with every byte that gets on.
    mark: u64,
    /// When it is given up.
    until: Instant,
    look: Duration,
    sleep: Pin<Box<Sleep>>,
}

impl Linger {
    fn at(&mut self, mark: u64) -> &mut Lingering {
        let now = Instant::now();
        let lingering = self.0.get_or_insert_with(|| {
            let until = now + RESET_LINGER;
            Box::new(Lingering { mark, until, look: LOOK_MIN, sleep: Box::pin(sleep_until(until)) })
        });
        if lingering.mark != mark {
            (lingering.mark, lingering.until) = (mark, now + RESET_LINGER);
        }
        lingering
    }

    /// Ready when everything is acknowledged, or, `bounded`, when nothing gets on any more.
    fn poll(&mut self, cx: &mut Context<'_>, bytes: Unacknowledged, bounded: bool) -> Poll<()> {
        if bytes.now == 0 {
            return Poll::Ready(());
        }
        let lingering = self.at(bytes.moved.wrapping_sub(bytes.now));
        let now = Instant::now();
        if bounded && now >= lingering.until {
            return Poll::Ready(());
        }
        lingering.sleep.as_mut().reset(now + lingering.look);
        lingering.look = (lingering.look * 2).min(LOOK_MAX);
        if lingering.sleep.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Ready when nothing has moved for too long.
    fn poll_stuck(&mut self, cx: &mut Context<'_>, moved: u64) -> Poll<()> {
        let lingering = self.at(moved);
        let until = lingering.until;
        lingering.sleep.as_mut().reset(until);
        lingering.sleep.as_mut().poll(cx)
    }
}
