//! A flow between two sockets of ours, moved by a kernel program while it exchanges short messages.
//!
//! A flow begins with being copied, is promoted to the program only while it is idle, and is copied again where anything is
//! in the way. While the program moves the bytes this task sleeps: its sockets are out of the runtime's epoll, and a second
//! one reports only ends, resets, and what the program passes to this process (`map.rs`).
//!
//! What arrives at a socket while something waits in front of it comes by its mailbox (`mailbox.rs`).
//!
//! # Invariants
//! - No socket is ever taken out of the kernel's map: that drops what is queued in front of it. Closing it does.

mod mailbox;
mod map;
mod overlap;
mod pair;

use std::{future::poll_fn, io, net::TcpStream, rc::Rc, task::Poll};

use tunnel_common::fastpath::splice::{FLOOD, HOLE, STUCK};

pub use self::map::{Spliced, Splices, Unfit, probe};
use self::{
    map::{NoSlotPair, SlotPair, SpliceMap},
    pair::Pair,
};
use super::{
    Broken, Cause, Direction, Meter, Outcome, Queue, Side, TcpLeg,
    ends::{Ended, Linger, conclude, step},
    tcp::{Taken, let_arrive},
};
use crate::observe::flows::CurrentPath;

/// Bytes that one wake-up moves, in either direction, in an interactive flow; more is bulk, which is copied for less.
pub const INTERACTIVE_BYTES: u64 = 8 * 1024;
/// Wake-ups in a row that move no more than that, before a flow goes to the program: connect, an exchange and a close
/// have 2 to 4.
pub const INTERACTIVE_STREAK: u32 = 16;

/// Runs a flow to its end.
pub(super) async fn relay(
    client: &mut TcpLeg,
    target: &mut TcpLeg,
    mut up: Direction<&mut Queue>,
    mut down: Direction<&mut Queue>,
    meter: &Meter,
    splices: &Splices,
) -> Outcome {
    let map = splices.map();
    // In this order, because they are dropped in the other one: what a socket receives once it has no slots is dropped,
    // and then it is emptied and closed.
    let mut taken: Option<[Taken; 2]>;
    let mut joined = Joined::Not;
    // Dropped first: what the program has moved by then is counted, whoever ends the flow.
    let mut counted = None;
    loop {
        let is_interactive = !matches!(joined, Joined::Never { .. });
        let streak = is_interactive.then_some(map.streak);
        let ended = copy(client, target, meter, &mut up, &mut down, streak, joined.slots()).await;
        if let Some(ended) = ended {
            return conclude(client, target, ended);
        }
        taken = match (client.take(&map.accounts), target.take(&map.accounts)) {
            (Ok(client), Ok(target)) => Some([client, target]),
            // There is nothing left that could be copied.
            (Err(e), _) => return Outcome::Reset(Side::Client, ours(&e)),
            (_, Err(e)) => return Outcome::Reset(Side::Target, ours(&e)),
        };
        let Some([own, theirs]) = &taken else { continue };
        joined = match joined {
            Joined::Not => join(map, own, theirs, meter),
            other => other,
        };
        if let Joined::Yes(pair) = &mut joined {
            counted.get_or_insert_with(|| meter.count_kernel(pair.slots().uncounted_by_others()));
            map.count(|done| done.promotions += 1);
            meter.path.set(CurrentPath::Splice);
            let moved = [&meter.sent, &meter.received];
            match pair.run([own, theirs], moved, [&mut up, &mut down]).await {
                Ok(true) => {
                    let_arrive(&**own);
                    let_arrive(&**theirs);
                    return Outcome::Closed;
                }
                Ok(false) => {
                    meter.path.set(CurrentPath::Copy);
                    map.count(|done| done.demotions += 1);
                }
                // Dropping the sockets resets both.
                Err((side, why)) => return Outcome::Reset(side, why),
            }
        }
        let Some([own, theirs]) = taken.take() else { continue };
        if let Joined::Yes(pair) = joined {
            let [own, theirs] = pair.failed();
            client.has_failed(own);
            target.has_failed(theirs);
            joined = if pair.slots().was_forced() {
                map.count(|done| done.forced += 1);
                Joined::Never { slots: Some(pair.into_slots()) }
            } else {
                Joined::Yes(pair)
            };
        }
        if let Err(e) = client.put(own) {
            return Outcome::Reset(Side::Client, ours(&e));
        }
        if let Err(e) = target.put(theirs) {
            return Outcome::Reset(Side::Target, ours(&e));
        }
    }
}

/// Copies until the flow has ended, or until it is interactive and idle: none.
async fn copy(
    client: &mut TcpLeg,
    target: &mut TcpLeg,
    meter: &Meter,
    up: &mut Direction<&mut Queue>,
    down: &mut Direction<&mut Queue>,
    streak: Option<u32>,
    slots: Option<&SlotPair>,
) -> Option<Ended> {
    let moved = || meter.sent.get() + meter.received.get();
    let (mut interactive, mut before) = (0, moved());
    let mut linger = Linger::default();
    poll_fn(|cx| {
        if let Some(why) = slots.and_then(|slots| slots.broken(cx)) {
            return Poll::Ready(Some(Ended::Reset(Side::Client, broken(why))));
        }
        if let Poll::Ready(ended) = step(cx, client, target, meter, up, down, &mut linger) {
            return Poll::Ready(Some(ended));
        }
        let Some(streak) = streak else { return Poll::Pending };
        match moved() - before {
            0 => return Poll::Pending,
            1..=INTERACTIVE_BYTES => interactive += 1,
            _ => interactive = 0,
        }
        before = moved();
        // Sockets are taken only while both directions are open (sock_map_sk_state_allowed). When the first byte of the
        // target came is known only of what is copied.
        let has_answered = meter.received.get() > 0;
        if interactive >= streak && has_answered && up.is_idle() && down.is_idle() {
            return Poll::Ready(None);
        }
        Poll::Pending
    })
    .await
}

/// What has become of a flow's sockets.
enum Joined {
    Not,
    Yes(Box<Pair>),
    /// They are copied for good.
    Never {
        slots: Option<SlotPair>,
    },
}

impl Joined {
    fn slots(&self) -> Option<&SlotPair> {
        match self {
            Self::Not => None,
            Self::Yes(pair) => Some(pair.slots()),
            Self::Never { slots } => slots.as_ref(),
        }
    }
}

/// The runtime did not let go of a socket, or did not take it again.
fn ours(e: &io::Error) -> Broken {
    Broken::Reset(Cause::Ours(e.to_string()))
}

/// Bytes are gone: the program could not leave out what had come before, or had no room for what came.
fn broken(why: u64) -> Broken {
    let (why, bytes) = (why >> 32 << 32, why & u64::from(u32::MAX));
    if why == FLOOD {
        return Broken::Reset(Cause::Overflow);
    }
    Broken::Reset(Cause::Ours(match why {
        HOLE => format!("{bytes} bytes are missing in front of a buffer that was to be spliced"),
        STUCK => {
            format!("{bytes} bytes that came before could not be taken off a buffer that was to be spliced")
        }
        _ => "the kernel's fields can no longer be read".to_owned(),
    }))
}

/// Gives both sockets to the program.
fn join(map: &Rc<SpliceMap>, client: &TcpStream, target: &TcpStream, meter: &Meter) -> Joined {
    let slots = match SlotPair::take(map, client, target) {
        Ok(slots) => slots,
        Err(NoSlotPair::Full) => {
            map.count(|done| done.no_slot += 1);
            return Joined::Never { slots: None };
        }
        Err(NoSlotPair::Unmailed(why)) => {
            tracing::debug!("a flow has no mailboxes: {why}");
            map.count(|done| done.no_slot += 1);
            return Joined::Never { slots: None };
        }
        Err(NoSlotPair::Refused(why, slots)) => {
            tracing::debug!("a flow's sockets cannot be joined: {why}");
            map.count(|done| done.refused += 1);
            return Joined::Never { slots };
        }
    };
    match Pair::new(map, slots, [client, target], meter) {
        Ok(pair) => {
            map.count(|done| done.flows += 1);
            Joined::Yes(Box::new(pair))
        }
        Err(slots) => Joined::Never { slots: Some(slots) },
    }
}
