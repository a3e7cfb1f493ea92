//! One direction of a spliced flow, as the daemon sees it: what it has read of what the program kept, in its order.
//!
//! # Invariants
//! - What was mailed since the gates were opened is read before what was passed.

use std::{
    io::{self, Read as _},
    net::TcpStream,
    sync::atomic::Ordering,
};

use bytes::Bytes;
use tokio::time::Instant;
use tunnel_common::fastpath::splice::{FORCED, Ledger, PASSING};

use super::{ENDS_MAX, SlotPair, SpliceMap, gates::GRACE};
use crate::relay::{Broken, Direction, Queue, RESET_LINGER, tcp::reset};

/// One read of what the program has passed, and all that is held of it at a time.
pub(in crate::relay::splice) const READ_MAX: usize = 64 * 1024;
/// Reads that are dropped before others have a turn.
const DROPPED_MAX: u32 = 16;

/// What is known of one direction.
#[derive(Default)]
pub(super) struct Half {
    pub(super) ledger: Ledger,
    /// What the meter said when copying began, or went on.
    pub(super) mark: u64,
    /// At the last grant: bytes sent on, and credit used.
    pub(super) granted: (u64, u64),
    /// Ends that did not fit, since something was read, and when the first came.
    pub(super) ends: Option<(u32, Instant)>,
    /// Bytes that were read from the mailbox,
    pub(super) mail_read: u64,
    /// and those that are in the counters.
    pub(super) mail_counted: u64,
    /// What it had sent on when the gates were opened.
    pub(super) opened: u64,
    /// Nothing waited in front of its source then.
    pub(super) was_clear: bool,
    /// Where something was passed behind what waited: what was kept when everything had been read, and when that was.
    pub(super) level: Option<(u64, Instant)>,
}

/// What a read has found.
pub(super) enum Read {
    Some,
    Full,
    Nothing,
    End,
    /// With the error's number.
    Broken(i32, Broken),
}

/// Whether nothing waited in front of this side's socket when the gates were opened, and nothing was sent on to it since.
pub(super) fn was_left_alone(halves: &[Half; 2], slots: &SlotPair, side: usize) -> bool {
    halves[side].was_clear
        && halves[1 - side].opened == slots.words(1 - side).redirected.load(Ordering::Acquire)
}

/// Whether all that comes from here on is passed to this side's socket, where it can be read at once, and nothing is left in
/// its mailbox.
pub(super) fn has_turned(half: &Half, slots: &SlotPair, side: usize) -> bool {
    let words = slots.words(side);
    words.turned.load(Ordering::SeqCst) != 0
        && words.forced.load(Ordering::SeqCst) != FORCED
        && half.mail_read == words.mailed.load(Ordering::Acquire)
}

impl Half {
    /// An end does not fit what has arrived: whether it is given up. `forced`: what is in front of it waits for the kernel's worker.
    pub(super) fn waits_too_long_for_its_end(&mut self, forced: bool) -> bool {
        let (looks, since) = self.ends.get_or_insert_with(|| (0, Instant::now()));
        if forced {
            return since.elapsed() >= RESET_LINGER;
        }
        *looks += 1;
        *looks > ENDS_MAX
    }

    /// Whether so much was kept, and all of it read, for as long as the kernel's worker takes to take the last buffer off its
    /// list.
    pub(super) fn was_level(&mut self, kept: u64) -> bool {
        if !self.ledger.has_read(kept) {
            self.level = None;
            return false;
        }
        let level = self.level.filter(|level| level.0 == kept).unwrap_or_else(|| (kept, Instant::now()));
        self.level = Some(level);
        level.1.elapsed() >= GRACE
    }

    /// Reads what the program has kept, in its order, once what was read before is written.
    pub(super) fn read(
        &mut self,
        map: &SpliceMap,
        slots: &SlotPair,
        side: usize,
        src: &TcpStream,
        way: &mut Direction<&mut Queue>,
    ) -> Read {
        if !way.queue.is_empty() {
            return Read::Some;
        }
        let words = slots.words(side);
        let mut scratch = map.scratch.borrow_mut();
        loop {
            // In this order: once it has turned nothing more is mailed, and what is passed comes behind all mail.
            let turned = words.turned.load(Ordering::SeqCst) != 0;
            let mail = words.mailed.load(Ordering::Acquire) - self.mail_read;
            let read = if mail > 0 {
                let most = usize::try_from(mail).unwrap_or(READ_MAX).min(READ_MAX);
                slots.boxes().read(side, &mut scratch[..most])
            } else if turned {
                (&mut &*src).read(&mut scratch)
            } else {
                // Nothing was passed; but it may have ended, or turned since.
                match src.peek(&mut scratch[..1]) {
                    Ok(1..) => continue,
                    other => other,
                }
            };
            match read {
                Ok(0) => return Read::End,
                Ok(n) => {
                    self.ledger.took(n as u64);
                    self.mail_read += if mail > 0 { n as u64 } else { 0 };
                    way.queue.push(Bytes::copy_from_slice(&scratch[..n]));
                    return if n < READ_MAX { Read::Some } else { Read::Full };
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Read::Nothing,
                Err(e) => return Read::Broken(e.raw_os_error().unwrap_or(libc::ECONNRESET), reset(e)),
            }
        }
    }

    /// Takes what the mailbox has, for a sink that takes nothing now: whoever copies reads no mailbox.
    pub(super) fn take_mail(
        &mut self,
        map: &SpliceMap,
        slots: &SlotPair,
        side: usize,
        way: &mut Direction<&mut Queue>,
    ) -> io::Result<()> {
        let mut scratch = map.scratch.borrow_mut();
        while slots.words(side).mailed.load(Ordering::Acquire) > self.mail_read {
            match slots.boxes().read(side, &mut scratch) {
                Ok(n) => {
                    self.ledger.took(n as u64);
                    self.mail_read += n as u64;
                    way.queue.push(Bytes::copy_from_slice(&scratch[..n]));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Drops what the program has kept: nobody takes it. An end or an error is left to whoever copies.
    pub(super) fn forget(&mut self, map: &SpliceMap, slots: &SlotPair, side: usize, src: &TcpStream) {
        let mut scratch = map.scratch.borrow_mut();
        while let Ok(n) = slots.boxes().read(side, &mut scratch) {
            self.mail_read += n as u64;
        }
        let words = slots.words(side);
        // What is dropped need not be seen to be all.
        if words.forced.load(Ordering::SeqCst) == FORCED {
            words.forced.store(PASSING, Ordering::SeqCst);
        }
        if !has_turned(self, slots, side) {
            return;
        }
        for _ in 0..DROPPED_MAX {
            match src.peek(&mut scratch[..1]) {
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
            // There is something, so this is neither an end nor an error.
            let _dropped = (&mut &*src).read(&mut scratch);
        }
    }
}
