//! HTTP/2 stream windows: bandwidth × delay, within bounds.
//!
//! What arrives between a PING and its answer fills one round trip. Multiplied by the round-trip time of an idle path, it is bandwidth
//! × delay: where the window limits a stream, the window itself, so that it doubles with each round trip; where it does not, a
//! window of twice as much is what the stream has use for, and no more.
//!
//! # Invariants
//! - A window is never outside its bounds.
//! - Windows shrink for all streams when much is held, so that stuck streams leave the others theirs.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use tokio::time::Instant;

use super::http2::FloodDetector;
use crate::process::memory::{Account, LEAST_WINDOW, Memory};

/// The window of a stream at first: 1 MiB carries 400 Mbit/s over 20 ms, and what one core seals over 1 ms.
pub const WINDOW_START: u32 = 1 << 20;
/// The most it grows to: what Envoy offers, 6.7 Gbit/s over 20 ms.
pub const WINDOW_MAX: u32 = 16 << 20;
/// What it shrinks to while too much is held: four frames of ours, so that a stream still flows.
pub const WINDOW_MIN: u32 = 256 * 1024;
/// What the streams of one connection hold before windows shrink to the least: four streams that are stuck with the
/// largest window.
pub const HELD_MAX: u32 = 4 * WINDOW_MAX;

/// What a peer may send on all streams of one connection: what they may hold, the largest window on its way while the
/// peer is being told of a smaller one (it is twice what arrives in a round trip), and the least window for each. So
/// stuck streams never take the window from the others.
pub const fn connection_window(streams: u32) -> u32 {
    /// The most that HTTP/2 has (RFC 9113 section 6.9.1).
    const MAX: u32 = (1 << 31) - 1;
    let all = WINDOW_MAX.saturating_mul(streams);
    let bound = WINDOW_MIN.saturating_mul(streams).saturating_add(HELD_MAX + WINDOW_MAX);
    let least = if all < bound { all } else { bound };
    if least > MAX { MAX } else { least }
}

/// Round trips below this have no use for more than the first window: it carries 8 Gbit/s over one, more than a core
/// seals. What they seem to take is mostly what processes wait for their turn.
const SHORT: Duration = Duration::from_millis(1);
/// Between a PING and the next one: at least and at most. In between it is asked again when as much time has passed as
/// since the last time that something changed.
const AGAIN_MIN: Duration = Duration::from_millis(10);
const AGAIN_MAX: Duration = Duration::from_secs(1);
/// After this long a longer round trip is believed, if nothing was in its way: paths change. Linux has it the same
/// (`net.ipv4.tcp_min_rtt_wlen`).
const TRIPS: Duration = Duration::from_secs(300);
/// Of the window: less, and nothing was in the way.
const FREE: u32 = 16;

/// What the streams of one connection have received, and what of it has not been passed on.
#[derive(Debug)]
pub struct Traffic {
    received: Cell<u64>,
    held: Cell<u64>,
    /// Bytes of DATA frames that have come, taken or not, and of which the connection's window was given back.
    arrived: Cell<u64>,
    returned: Cell<u64>,
    streams: Cell<u32>,
    lost: RefCell<Option<Rc<str>>>,
    flood: FloodDetector,
    /// Whose memory it is.
    account: RefCell<Rc<Account>>,
}

impl Default for Traffic {
    /// Of a connection whose memory is our own.
    fn default() -> Self {
        Self {
            received: Cell::default(),
            held: Cell::default(),
            arrived: Cell::default(),
            returned: Cell::default(),
            streams: Cell::default(),
            lost: RefCell::default(),
            flood: FloodDetector::default(),
            account: RefCell::new(Memory::of_this_worker().own()),
        }
    }
}

impl Traffic {
    /// From now on its memory is a peer's.
    pub fn charge(&self, account: &Rc<Account>) {
        self.account.replace(Rc::clone(account));
    }

    /// Whose memory it is.
    pub fn account(&self) -> Rc<Account> {
        Rc::clone(&self.account.borrow())
    }

    /// Bytes received since the beginning.
    pub fn received(&self) -> u64 {
        self.received.get()
    }

    /// Bytes received that the other side has not taken.
    pub fn held(&self) -> u64 {
        self.held.get()
    }

    /// The connection was lost, for this reason.
    pub fn lost(&self, why: &str) {
        self.lost.borrow_mut().get_or_insert_with(|| why.into());
    }

    /// So many bytes of DATA have come, whoever takes them.
    pub(super) fn arrived(&self, n: u32) {
        self.arrived.set(self.arrived.get() + u64::from(n));
    }

    /// Bytes that have come and of which the connection's window was not given back: what streams hold, and what is still in the
    /// library because nobody has taken it. What the library itself gives back, of streams that it does not know, is not known.
    pub fn unreturned(&self) -> u64 {
        self.arrived.get().saturating_sub(self.returned.get())
    }

    /// Its streams.
    pub fn streams(&self) -> u32 {
        self.streams.get()
    }

    /// Whether the peer floods the connection.
    pub const fn flood(&self) -> &FloodDetector {
        &self.flood
    }

    /// The part of a new stream.
    pub fn share(self: &Rc<Self>) -> Share {
        self.streams.set(self.streams.get() + 1);
        Share { traffic: Rc::clone(self), account: self.account(), held: 0 }
    }
}

/// One stream's part of it. Dropped, it holds nothing more.
#[derive(Debug)]
pub struct Share {
    traffic: Rc<Traffic>,
    account: Rc<Account>,
    held: u64,
}

impl Share {
    /// Why the connection was lost, once it was.
    pub fn why_lost(&self) -> Option<Rc<str>> {
        self.traffic.lost.borrow().clone()
    }

    /// Whether that was because its peer flooded it.
    pub fn was_flooded(&self) -> bool {
        self.traffic.flood.detected().is_some()
    }

    /// So many bytes have come.
    pub fn received(&mut self, n: usize) {
        let n = n as u64;
        self.held += n;
        self.traffic.received.set(self.traffic.received.get() + n);
        self.traffic.held.set(self.traffic.held.get() + n);
        self.account.hold(n);
    }

    /// Whose memory it takes.
    pub const fn account(&self) -> &Rc<Account> {
        &self.account
    }

    /// The window of so many bytes was given back.
    pub fn returned(&self, n: usize) {
        self.traffic.returned.set(self.traffic.returned.get() + n as u64);
    }

    /// So many of them have been passed on.
    pub fn passed_on(&mut self, n: usize) {
        self.returned(n);
        let n = (n as u64).min(self.held);
        self.held -= n;
        self.traffic.held.set(self.traffic.held.get() - n);
        self.account.release(n);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.traffic.held.set(self.traffic.held.get() - self.held);
        self.account.release(self.held);
        self.traffic.streams.set(self.traffic.streams.get() - 1);
    }
}

/// The windows of one connection's streams: all have the same.
#[derive(Debug)]
pub struct Windows {
    /// What the peer was told last.
    announced: u32,
    /// Twice the largest product of bandwidth and delay that was measured, or the first window.
    wanted: u32,
    shortest: Shortest,
    /// The PING under way: when it left, and what had been received by then.
    asked: Option<(Instant, u64)>,
    /// What has to be received before another PING is worth it.
    worth: u64,
    /// Since when nothing has changed; not before this is asked again.
    settled: Option<(Instant, Instant)>,
}

impl Default for Windows {
    fn default() -> Self {
        Self {
            announced: WINDOW_START,
            wanted: WINDOW_START,
            shortest: Shortest::default(),
            asked: None,
            // The first one at once, before anything is in its way.
            worth: 0,
            settled: None,
        }
    }
}

impl Windows {
    /// Whether enough has come for a PING to tell something new: half a window, so there is none but the first while
    /// nothing flows, and the peer has always sent us DATA in between.
    pub fn is_worth_a_ping(&self, received: u64) -> bool {
        received >= self.worth && self.asked.is_none()
    }

    /// The same, and whether it is time.
    pub fn wants_ping(&mut self, received: u64, now: Instant) -> bool {
        if !self.is_worth_a_ping(received) {
            return false;
        }
        match self.settled {
            Some((_, again)) if now < again => false,
            // It could have been asked long ago: what flows now is something else.
            Some((_, again)) if now - again > AGAIN_MAX => {
                self.settled = None;
                true
            }
            _ => true,
        }
    }

    /// A PING has left, for whatever reason.
    pub fn asked(&mut self, received: u64, now: Instant) {
        self.asked = Some((now, received));
    }

    /// It was answered.
    pub fn answered(&mut self, received: u64, now: Instant) {
        let Some((at, before)) = self.asked.take() else { return };
        let took = (now - at).max(Duration::from_nanos(1));
        let came = received - before;
        let shortest = self.shortest.heard(took, came < u64::from(self.announced / FREE), now);
        let product = u128::from(came) * shortest.as_nanos() / took.as_nanos();
        let twice = u32::try_from(2 * product).unwrap_or(WINDOW_MAX).clamp(WINDOW_START, WINDOW_MAX);
        // In steps, so that a peer is told four times at most.
        let twice = twice.next_power_of_two();
        let since = match self.settled {
            // Of the first answer nobody knows yet how long it should have taken.
            Some((since, _)) if shortest < SHORT || twice <= self.wanted => since,
            Some(_) => {
                self.wanted = twice;
                now
            }
            None => now,
        };
        self.settled = Some((since, now + (now - since).clamp(AGAIN_MIN, AGAIN_MAX)));
        self.worth = received + u64::from(self.announced / 2);
    }

    /// What the peer is to be told, if it is not what it was told last. `held` is what the streams hold together; `short`: there
    /// is little memory for all of them.
    pub fn change(&self, held: u64, short: bool) -> Option<u32> {
        if short {
            return (self.announced > WINDOW_MIN).then_some(WINDOW_MIN);
        }
        let most = allowed(held).min(self.wanted);
        if most < self.announced {
            return Some(most);
        }
        // Growing again takes twice the room, so that it does not go back and forth.
        let ample = allowed(held.saturating_mul(2)).min(self.wanted);
        (ample > self.announced).then_some(ample)
    }

    /// The peer is told.
    pub fn told(&mut self, window: u32) {
        self.announced = window;
    }

    /// What the peer was told last.
    pub fn announced(&self) -> u32 {
        self.announced
    }
}

/// The room of a connection at first: as much as one of its streams has.
const ROOM_START: u32 = WINDOW_START;

/// The window of a connection, of which all its streams take: what they hold, and room for what is on its way.
///
/// The room begins small and doubles each time that as much has come, so that a connection takes memory as it uses it.
#[derive(Debug)]
pub struct ConnectionWindow {
    account: Rc<Account>,
    /// All that its streams can use.
    most: u32,
    room: u32,
    announced: u32,
    /// What had come when the room was last made larger.
    grown_at: u64,
}

impl ConnectionWindow {
    /// Of a connection with so many streams, whose peer was told of no window yet.
    pub fn new(account: &Rc<Account>, streams: u32) -> Self {
        account.take(u64::from(LEAST_WINDOW));
        Self {
            account: Rc::clone(account),
            most: connection_window(streams),
            room: LEAST_WINDOW,
            announced: LEAST_WINDOW,
            grown_at: 0,
        }
    }

    /// What the peer is to be told, if it is not what it was told last.
    pub fn change(&mut self, received: u64, held: u64) -> Option<u32> {
        if self.room == LEAST_WINDOW || received - self.grown_at >= u64::from(self.room) {
            self.grow(received);
        }
        let held = u32::try_from(held).unwrap_or(u32::MAX);
        let wanted = self.room.saturating_add(held).min(self.most);
        if wanted > self.announced {
            // What the streams hold may take all that the peer has.
            let more = wanted - self.announced;
            if more < self.room / 4 || !self.account.try_take(u64::from(more), self.account.most()) {
                return None;
            }
        } else {
            let less = self.announced - wanted;
            if less == 0 || less < self.room / 2 {
                return None;
            }
            self.account.give_back(u64::from(less));
        }
        self.announced = wanted;
        Some(wanted)
    }

    /// Only while half of what the peer may take is free, so that its other connections get theirs.
    fn grow(&mut self, received: u64) {
        self.grown_at = received;
        let next = if self.room == LEAST_WINDOW { ROOM_START } else { (self.room * 2).min(WINDOW_MAX) };
        let fits = self.account.taken() + u64::from(next - self.room) <= self.account.most() / 2;
        if fits && !self.account.memory().is_short() {
            self.room = next;
        }
    }
}

impl Drop for ConnectionWindow {
    fn drop(&mut self) {
        self.account.give_back(u64::from(self.announced));
    }
}

/// The largest window while so much is held: what is left, as a power of two.
fn allowed(held: u64) -> u32 {
    let left = u32::try_from(held).map_or(0, |held| HELD_MAX.saturating_sub(held));
    let power = if left == 0 { 0 } else { 1 << left.ilog2() };
    power.clamp(WINDOW_MIN, WINDOW_MAX)
}

/// The shortest round trip, and when it was measured. One behind a full queue says how long the queue is.
#[derive(Debug, Default)]
struct Shortest(Option<(Duration, Instant)>);

impl Shortest {
    fn heard(&mut self, took: Duration, free: bool, now: Instant) -> Duration {
        let shortest = match self.0 {
            Some((shortest, at)) if took > shortest && !(free && now - at >= TRIPS) => (shortest, at),
            _ => (took, now),
        };
        self.0 = Some(shortest);
        shortest.0
    }
}

#[cfg(test)]
mod tests;
