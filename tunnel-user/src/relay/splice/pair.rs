//! A flow whose two sockets the program has: hears what it passes, writes what has to go ahead of it, and lets it go on.
//!
//! # Invariants
//! - What the program passes is written before the program goes on, and nothing is written or ended ahead of what it has
//!   sent on.
//! - What it may have under way is what the other socket has room for.

mod gates;
mod half;

use std::{
    cell::Cell,
    io::{self, Write as _},
    net::TcpStream,
    rc::Rc,
    sync::atomic::Ordering,
    time::Duration,
};

use tokio::{
    task::yield_now,
    time::{Instant, sleep},
};
use tunnel_common::fastpath::splice::{FORCED, Ledger, SHUT};

pub(super) use self::half::READ_MAX;
use self::half::{Half, Read, has_turned};
use super::{
    broken,
    map::{SlotPair, SpliceMap},
};
use crate::{
    relay::{
        Broken, Direction, Meter, Queue, RESET_LINGER, Side,
        ends::State,
        silence,
        tcp::{reset, shut_down},
    },
    transport::sockopt,
};

/// What the kernel's worker has to do is looked at again after this time, and then after twice as much each time,
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// up to this.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// How often an end that does not fit what has arrived is looked at again before the flow is reset; one that the kernel's worker
/// keeps waiting, for want of a processor, as long as a reset would be.
const ENDS_MAX: u32 = 64;

/// Both directions of a flow whose sockets the program has.
pub(super) struct Pair {
    map: Rc<SpliceMap>,
    slots: SlotPair,
    /// By the side at which each begins: 0 is the client's.
    halves: [Half; 2],
    /// The first error of each socket that was told other than by a read.
    failed: [Option<i32>; 2],
    /// The sockets whose connections are gone: nothing comes from them, and nothing in front of them gets on.
    gone: [bool; 2],
    /// It goes back to being copied,
    leaving: bool,
    /// and both gates are shut for it.
    shut: bool,
    /// Since when all that was sent on to each socket is known to be accepted, once they are shut.
    drained: [Option<Instant>; 2],
}

/// What one look at a direction has found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// It is the program's, or has ended.
    Settled,
    /// It could be the program's.
    Ready,
    /// There is more to do at once.
    More,
    /// The kernel has something to do first.
    Wait,
}

type Ends<T> = Result<T, (bool, Broken)>;

fn at_source(e: io::Error) -> (bool, Broken) {
    (true, reset(e))
}

fn at_sink(e: io::Error) -> (bool, Broken) {
    (false, reset(e))
}

impl Pair {
    /// Of two sockets that the program has, the client's first, which have copied what the meter says. Fails where one of
    /// them cannot be asked.
    pub(super) fn new(
        map: &Rc<SpliceMap>,
        slots: SlotPair,
        [client, target]: [&TcpStream; 2],
        meter: &Meter,
    ) -> Result<Self, SlotPair> {
        let half = |dst, moved: &Cell<u64>| -> io::Result<Half> {
            let ledger = Ledger::new(sockopt::accepted_exactly(dst)?);
            Ok(Half { ledger, mark: moved.get(), was_clear: true, ..Half::default() })
        };
        match (half(target, &meter.sent), half(client, &meter.received)) {
            (Ok(up), Ok(down)) => {
                let (halves, map) = ([up, down], Rc::clone(map));
                Ok(Self {
                    map,
                    slots,
                    halves,
                    failed: [None; 2],
                    gone: [false; 2],
                    leaving: false,
                    shut: false,
                    drained: [None; 2],
                })
            }
            _ => Err(slots),
        }
    }

    /// Its slots, for a flow that is copied from now on.
    pub(super) fn into_slots(self) -> SlotPair {
        self.slots
    }

    /// Its slots.
    pub(super) fn slots(&self) -> &SlotPair {
        &self.slots
    }

    /// The first error of each socket that was told other than by a read.
    pub(super) fn failed(&self) -> [Option<i32>; 2] {
        self.failed
    }

    /// Lets the program move the bytes, until the flow has ended cleanly (true) or is to be copied (false): then `ways`
    /// hold what was read and not written.
    pub(super) async fn run(
        &mut self,
        sockets: [&TcpStream; 2],
        moved: [&Cell<u64>; 2],
        mut ways: [&mut Direction<&mut Queue>; 2],
    ) -> Result<bool, (Side, Broken)> {
        (self.leaving, self.shut, self.drained) = (false, false, [None; 2]);
        for (half, moved) in self.halves.iter_mut().zip(moved) {
            half.ledger.copied(moved.get() - half.mark);
        }
        self.slots.watch(sockets).map_err(|e| (Side::Client, reset(e)))?;
        let mut pause = PAUSE_MIN;
        let mut suspects = [false; 2];
        // Bytes that were taken in front of a reset, and since when none was.
        let mut stuck = (0, Instant::now());
        loop {
            for side in 0..2 {
                self.hear(side, sockets[side], &ways)?;
                if self.failed[side].is_some() && !matches!(ways[1 - side].state, State::Refused { .. }) {
                    ways[1 - side]
                        .stop(self.failed[side].map(|errno| reset(io::Error::from_raw_os_error(errno))));
                    self.leaving = true;
                }
                // A reset is one of both directions.
                if matches!(ways[side].state, State::Failing(_))
                    && !matches!(ways[1 - side].state, State::Refused { .. })
                {
                    ways[1 - side].stop(None);
                }
            }
            self.leaving |= self.slots.was_forced();
            if self.leaving && !self.shut {
                self.shut(sockets)?;
            }
            self.turn(sockets)?;
            let mut looks = [Look::Settled; 2];
            for side in 0..2 {
                let look = self.look(side, sockets[side], sockets[1 - side], moved[side], &mut *ways[side]);
                looks[side] = look.map_err(|(at_source, why)| {
                    let client = at_source == (side == 0);
                    (if client { Side::Client } else { Side::Target }, why)
                })?;
            }
            if ways.iter().all(|way| matches!(way.state, State::Done)) {
                return Ok(true);
            }
            if !looks.contains(&Look::More) && !looks.contains(&Look::Wait) && looks.contains(&Look::Ready) {
                looks[0] = self.open(sockets, &ways)?;
            }
            if self.leaving && !self.shut {
                continue;
            }
            if looks.contains(&Look::More) {
                pause = PAUSE_MIN;
                yield_now().await;
            } else if looks.contains(&Look::Wait) {
                if let Some(side) = (0..2).find(|side| matches!(ways[*side].state, State::Failing(_))) {
                    let taken = sockopt::accepted(sockets[1 - side]).unwrap_or(0);
                    if taken != stuck.0 || stuck.1.elapsed() > RESET_LINGER * 2 {
                        stuck = (taken, Instant::now());
                    } else if stuck.1.elapsed() >= RESET_LINGER {
                        // What is in front of it does not move: it goes ahead.
                        let by = if side == 0 { Side::Client } else { Side::Target };
                        return Err((by, reset(io::ErrorKind::ConnectionReset.into())));
                    }
                }
                tokio::select! {
                    () = self.slots.happened() => {}
                    () = sleep(pause) => pause = (pause * 2).min(PAUSE_MAX),
                }
            } else if self.shut {
                self.slots.unwatch(sockets);
                for (half, moved) in self.halves.iter_mut().zip(moved) {
                    half.mark = moved.get();
                }
                return Ok(false);
            } else {
                pause = PAUSE_MIN;
                tokio::select! {
                    () = self.slots.happened() => {}
                    () = sleep(silence::period()) => self.give_up_silent(sockets, &mut ways, &mut suspects),
                }
            }
        }
    }

    /// Gives up a peer that does not answer, as is done where flows are copied.
    fn give_up_silent(
        &mut self,
        sockets: [&TcpStream; 2],
        ways: &mut [&mut Direction<&mut Queue>; 2],
        suspects: &mut [bool; 2],
    ) {
        for side in 0..2 {
            let silent = silence::seems_silent(sockets[side]);
            if silent && suspects[side] {
                self.failed[side].get_or_insert(libc::ETIMEDOUT);
                if matches!(ways[side].state, State::Open) {
                    ways[side].state = State::Failing(reset(silence::timed_out()));
                }
            }
            suspects[side] = silent;
        }
    }

    /// Notes an error of a socket that is not being read, which nobody would hear of otherwise.
    fn hear(
        &mut self,
        side: usize,
        socket: &TcpStream,
        ways: &[&mut Direction<&mut Queue>; 2],
    ) -> Result<(), (Side, Broken)> {
        if matches!(ways[side].state, State::Open) && ways[side].queue.is_empty() {
            return Ok(());
        }
        let by = if side == 0 { Side::Client } else { Side::Target };
        if let Some(e) = socket2::SockRef::from(socket).take_error().map_err(|e| (by, reset(e)))? {
            self.failed[side].get_or_insert(e.raw_os_error().unwrap_or(libc::ECONNRESET));
        }
        Ok(())
    }

    /// Does for one direction what there is to do.
    fn look(
        &mut self,
        side: usize,
        src: &TcpStream,
        dst: &TcpStream,
        moved: &Cell<u64>,
        way: &mut Direction<&mut Queue>,
    ) -> Ends<Look> {
        let Self { map, slots, halves, failed, gone, leaving, shut, .. } = self;
        let (half, words) = (&mut halves[side], slots.words(side));
        let left = *shut;
        let why = words.broken.load(Ordering::Acquire);
        if why != 0 {
            return Err((true, broken(why)));
        }
        // Before it is read: what is kept from here on is told again.
        words.told.store(0, Ordering::SeqCst);
        let mut more = false;
        match way.state {
            State::Open => match half.read(map, slots, side, src, way) {
                // It is told as an end, once what came before it was read.
                Read::Broken(errno, _) if !half.ledger.has_read(words.kept.load(Ordering::Acquire)) => {
                    gone[side] = true;
                    failed[side].get_or_insert(errno);
                    (more, *leaving) = (true, true);
                }
                Read::Broken(_, why) => {
                    gone[side] = true;
                    way.state = State::Failing(why);
                    (more, *leaving) = (true, true);
                }
                Read::Some => (more, half.ends) = (true, None),
                // Much has come at once.
                Read::Full => (more, *leaving, half.ends) = (true, true, None),
                Read::Nothing if half.ledger.has_read(words.kept.load(Ordering::Acquire)) => {}
                // Its mailbox does not have it yet.
                Read::Nothing => return Ok(Look::Wait),
                Read::End => {
                    let kept = words.kept.load(Ordering::Acquire);
                    if !half.ledger.has_read(kept) || sockopt::unread(src).map_err(at_source)? > 0 {
                        let forced = words.forced.load(Ordering::SeqCst) == FORCED;
                        if half.waits_too_long_for_its_end(forced) {
                            return Err(at_source(io::ErrorKind::ConnectionAborted.into()));
                        }
                        return Ok(Look::Wait);
                    }
                    way.state = match failed[side] {
                        None | Some(libc::EPIPE) => State::Draining,
                        Some(errno) => State::Failing(reset(io::Error::from_raw_os_error(errno))),
                    };
                }
            },
            State::Draining | State::Done | State::Failing(_) | State::Refused { .. } => {}
        }
        // After this, which takes the lock under which the program runs.
        sockopt::settle(src).map_err(at_source)?;
        let redirected = words.redirected.load(Ordering::Acquire);
        moved.set(moved.get() + slots.uncounted(side));
        let mail = half.mail_read - std::mem::replace(&mut half.mail_counted, half.mail_read);
        map.count(|done| done.mailed += mail);
        let level = way.queue.is_empty();
        let open = words.gate.load(Ordering::Relaxed) == half.ledger.gate().unwrap_or(SHUT);
        let settled = match way.state {
            State::Done => true,
            State::Refused { .. } => {
                // Its source may read what is on its way to it only once it has written what it has.
                half.forget(map, slots, side, src);
                true
            }
            State::Open => level && open && !left,
            State::Draining | State::Failing(_) => false,
        };
        if settled {
            return Ok(match (more, left) {
                (true, _) => Look::More,
                (false, true) if !matches!(way.state, State::Done) && !has_turned(half, slots, side) => {
                    Look::Wait
                }
                (false, _) => Look::Settled,
            });
        }
        if !half.ledger.is_drained(redirected, sockopt::accepted(dst).map_err(at_sink)?) {
            return Ok(Look::Wait);
        }
        while !way.queue.is_empty() {
            match way.queue.with_slices(|slices| (&mut &*dst).write_vectored(slices)) {
                Ok(n) => {
                    way.queue.advance(n);
                    half.ledger.gave(n as u64);
                    moved.set(moved.get() + n as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // Its room is waited for by copying, once the other direction is shut too.
                    *leaving = true;
                    if !left {
                        return Ok(Look::More);
                    }
                    half.take_mail(map, slots, side, way).map_err(at_source)?;
                    return Ok(if has_turned(half, slots, side) { Look::Settled } else { Look::Wait });
                }
                Err(e) => {
                    failed[1 - side].get_or_insert(e.raw_os_error().unwrap_or(libc::ECONNRESET));
                    return Ok(Look::More);
                }
            }
        }
        match way.state {
            State::Draining => {
                if let Err(why) = shut_down(dst) {
                    way.stop(Some(why));
                    *leaving = true;
                } else {
                    way.state = State::Done;
                }
                return Ok(Look::Settled);
            }
            // What comes after it is the same whoever moves the bytes.
            State::Failing(_) => return Ok(Look::Settled),
            State::Open | State::Done | State::Refused { .. } => {}
        }
        // Most often it has read everything by then, and need not be asked again.
        if more && (*leaving || !half.ledger.has_read(words.kept.load(Ordering::Acquire))) {
            return Ok(Look::More);
        }
        if left {
            return Ok(if has_turned(half, slots, side) { Look::Settled } else { Look::Wait });
        }
        // What came before the program had the socket, and a read has not had handed to it, would wait for what comes next.
        if sockopt::unread(src).map_err(at_source)? > 0 {
            return Ok(Look::Wait);
        }
        Ok(Look::Ready)
    }
}
