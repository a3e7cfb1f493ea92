//! When the program moves a flow's bytes, and when not: both gates are opened, and shut, together.
//!
//! # Invariants
//! - A gate is opened only when everything that was kept is written, and everything that was sent on is accepted.
//! - Once both are shut, everything is passed to the sockets only when nothing waits in front of them.

use std::{io, net::TcpStream, sync::atomic::Ordering, time::Duration};

use tokio::time::Instant;
use tunnel_common::fastpath::splice::{FORCED, OVERHEAD, PASSING, SHUT, grant};

use super::{Look, Pair, half::was_left_alone};
use crate::{
    relay::{Broken, Direction, Queue, Side, ends::State, tcp::reset},
    transport::sockopt,
};

/// A flow whose messages have become larger than that on average goes back to being copied,
const BULK_MEAN: u64 = 8 * 1024;
/// once so many bytes have shown it.
const BULK_SEEN: u64 = 64 * 1024;
/// The least room of a socket for which the program is let go on; with less the flow is copied, and waits for its
/// socket like any other. A small message takes 2 KiB.
const ROOM_MIN: u64 = 16 * 1024;
/// The kernel's worker takes a buffer off its list after it has sent it, by an instruction or so: after this time since
/// nothing more is sent on, what was sent is off the list too.
pub(super) const GRACE: Duration = Duration::from_millis(20);

impl Pair {
    /// Opens both gates, now that everything that was kept is written, or leaves where that would not do.
    pub(super) fn open(
        &mut self,
        sockets: [&TcpStream; 2],
        ways: &[&mut Direction<&mut Queue>; 2],
    ) -> Result<Look, (Side, Broken)> {
        let by = |side| move |e: io::Error| (if side == 0 { Side::Client } else { Side::Target }, reset(e));
        let Self { map, slots, halves, leaving, .. } = self;
        let words = [slots.words(0), slots.words(1)];
        if slots.was_forced() {
            *leaving = true;
            return Ok(Look::More);
        }
        let mut grants = [0; 2];
        for side in 0..2 {
            let half = &mut halves[side];
            let (spent, redirected) =
                (words[side].spent.load(Ordering::Acquire), words[side].redirected.load(Ordering::Acquire));
            let (bytes, used) = (redirected - half.granted.0, spent - half.granted.1);
            let messages = (used - bytes) / OVERHEAD;
            let ended = matches!(ways[side].state, State::Done);
            let free = sockopt::room(sockets[1 - side]).map_err(by(1 - side))?;
            if (free < ROOM_MIN && !ended) || (bytes >= BULK_SEEN && bytes > messages * BULK_MEAN) {
                half.granted = (redirected, spent);
                *leaving = true;
            }
            grants[side] = free;
        }
        if *leaving {
            return Ok(Look::More);
        }
        // What a program decides from here on, it decides by what waits in front of its socket; what one has decided to pass
        // before is where it belongs once the lock has been had.
        let turned = [0, 1].map(|side| words[side].turned.swap(0, Ordering::SeqCst) != 0);
        for (side, socket) in sockets.iter().enumerate() {
            sockopt::settle(socket).map_err(by(side))?;
        }
        let mut look = Look::Settled;
        for side in 0..2 {
            let redirected = words[side].redirected.load(Ordering::Acquire);
            let accepted = sockopt::accepted(sockets[1 - side]).map_err(by(1 - side))?;
            if halves[side].ledger.gate() != Some(words[side].kept.load(Ordering::Acquire)) {
                look = Look::More;
            } else if !halves[side].ledger.is_drained(redirected, accepted) && look != Look::More {
                look = Look::Wait;
            }
        }
        if look != Look::Settled {
            // Nothing was sent on meanwhile, so that nothing waits in front of them is as true as it was.
            for side in 0..2 {
                if turned[side] {
                    words[side].turned.store(1, Ordering::SeqCst);
                }
            }
            return Ok(look);
        }
        for side in 0..2 {
            halves[side].was_clear = turned[side] || was_left_alone(halves, slots, side);
        }
        for side in 0..2 {
            let redirected = words[side].redirected.load(Ordering::Acquire);
            let spent = words[side].spent.load(Ordering::Acquire);
            let half = &mut halves[side];
            if spent > half.granted.1 {
                map.count(|done| done.credit += 1);
            }
            half.granted = (redirected, spent);
            half.opened = redirected;
            words[side].due.store(half.ledger.due(), Ordering::Release);
            words[side].limit.store(grant(spent, grants[side], map.credit), Ordering::Release);
            let mail = words[side].mail_spent.load(Ordering::Acquire);
            words[side].mail_limit.store(mail + map.mail, Ordering::Release);
        }
        for side in 0..2 {
            let gate = halves[side].ledger.gate().unwrap_or(SHUT);
            words[side].gate.store(gate, Ordering::SeqCst);
        }
        // What came meanwhile, and saw a gate shut for good, was told to nobody. Whoever has seen it so is through once the
        // lock has been had, and what it has kept shows.
        for (side, socket) in sockets.iter().enumerate() {
            sockopt::settle(socket).map_err(by(side))?;
            if Some(words[side].kept.load(Ordering::Acquire)) != halves[side].ledger.gate() {
                look = Look::More;
            }
        }
        Ok(look)
    }

    /// Shuts both gates: nothing more is sent on from here on.
    pub(super) fn shut(&mut self, sockets: [&TcpStream; 2]) -> Result<(), (Side, Broken)> {
        for side in 0..2 {
            self.slots.words(side).gate.store(SHUT, Ordering::SeqCst);
        }
        for (side, socket) in sockets.iter().enumerate() {
            let by = if side == 0 { Side::Client } else { Side::Target };
            sockopt::settle(socket).map_err(|e| (by, reset(e)))?;
        }
        (self.shut, self.drained) = (true, [None; 2]);
        Ok(())
    }

    /// Has everything passed to the sockets from here on, once both gates are shut: the program does it when it sees that
    /// nothing waits, and here it is seen where nothing comes.
    pub(super) fn turn(&mut self, sockets: [&TcpStream; 2]) -> Result<(), (Side, Broken)> {
        if !self.shut {
            return Ok(());
        }
        for (side, socket) in sockets.into_iter().enumerate() {
            let (words, from) = (self.slots.words(side), self.slots.words(1 - side));
            if words.turned.load(Ordering::SeqCst) != 0 {
                let gone = self.gone[side] || self.failed[side].is_some();
                if words.forced.load(Ordering::SeqCst) == FORCED
                    && (gone || self.halves[side].was_level(words.kept.load(Ordering::Acquire)))
                {
                    words.forced.store(PASSING, Ordering::SeqCst);
                }
                continue;
            }
            let by = |e| (if side == 0 { Side::Client } else { Side::Target }, reset(e));
            let gone = self.gone[side] || self.failed[side].is_some();
            let empty = gone || was_left_alone(&self.halves, &self.slots, side) || {
                let accepted = sockopt::accepted(socket).map_err(by)?;
                let ledger = &self.halves[1 - side].ledger;
                // Once it is, it stays so.
                ledger.is_drained(from.redirected.load(Ordering::Acquire), accepted)
                    && self.drained[side].get_or_insert_with(Instant::now).elapsed() >= GRACE
            };
            if empty {
                words.turned.store(1, Ordering::SeqCst);
                sockopt::settle(socket).map_err(by)?;
            }
        }
        Ok(())
    }
}
