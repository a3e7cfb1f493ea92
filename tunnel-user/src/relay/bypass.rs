//! A captured connection that may go past TCP: when it asks, and how its leg behaves once it does. An ordinary connection has
//! none of this.
//!
//! # Invariants
//! - No more is redirected to the application than surely fits, and nothing goes by TCP, nor does an end, before all of that
//!   was read.

use std::{
    future::Future as _,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    net::TcpStream,
    sync::oneshot::error::TryRecvError,
    time::{Sleep, sleep},
};
use tunnel_common::fastpath::bypass::{APPLICATION, Budget, DAEMON};

use crate::kernel::bypass::{Candidate, Pair, PendingPair};

/// Exchanges after which a connection asks. To look for who has its socket, judge a known program and join the sockets
/// takes 0.3 ms of another thread, which some 50 exchanges save (5 to 10 µs each): five times as many, so that a
/// connection that ends soon after has cost little.
const TURNS: u32 = 256;
/// They have to come within this time: who waits 40 ms for each does not notice what is saved.
const WINDOW: Duration = Duration::from_secs(10);
/// Bytes of an exchange, on average, above which copying outweighs what is saved.
const BULKY: u64 = 16 * 1024;
/// A direction whose reader did not keep up goes past TCP again after so many times as many exchanges.
const AGAIN: u32 = 8;
/// Attempts without a pause, while an application reads at this very moment.
const SPINS: u32 = 2;
/// The first pause, and the last one, of those that double: an application that does not read is looked at four times a
/// second.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// See [`PAUSE_MIN`].
const PAUSE_MAX: Duration = Duration::from_millis(256);

/// See the module.
pub(super) struct Hot {
    candidate: Candidate,
    state: State,
    /// Whether the last thing that happened was that something was sent.
    sent_last: bool,
    turns: u32,
    bytes: u64,
    since: Instant,
}

enum State {
    Watching,
    Requested(PendingPair),
    On(On),
    /// It was refused.
    Off,
}

/// Joined.
struct On {
    pair: Pair,
    /// What may still be redirected to the application; none while what is written goes by TCP.
    budget: Option<Budget>,
    /// The kernel had no memory for a message.
    refused: bool,
    /// Exchanges until it is redirected again.
    again: u32,
    /// What the application had offered to TCP when all of that had been read, and when a read last found nothing: one
    /// thread of it may offer a message, and be late with it, while another redirects.
    passed: u64,
    empty_at: u64,
    pause: Option<Pin<Box<Sleep>>>,
    pauses: u32,
    /// There was no memory for a write, so the runtime takes the socket for full, and may do so forever.
    misjudged: bool,
    /// Until it is tried again.
    retry: Option<Pin<Box<Sleep>>>,
    retries: u32,
}

impl Hot {
    pub(super) fn new(candidate: Candidate) -> Self {
        let state = State::Watching;
        Self { candidate, state, sent_last: false, turns: 0, bytes: 0, since: Instant::now() }
    }

    /// So much was read.
    pub(super) fn received(&mut self, n: usize, stream: &TcpStream) {
        self.bytes += n as u64;
        if self.sent_last {
            self.sent_last = false;
            self.turns += 1;
            self.turned(stream);
        }
    }

    /// An exchange is over.
    fn turned(&mut self, stream: &TcpStream) {
        match &mut self.state {
            State::Watching if self.turns >= TURNS => {
                if self.since.elapsed() < WINDOW && self.bytes < BULKY * u64::from(self.turns) {
                    self.state = self.candidate.ask(stream).map_or(State::Watching, State::Requested);
                }
                self.begin();
            }
            State::Requested(pending) => match pending.try_recv() {
                Ok(Ok(pair)) => {
                    pair.open(APPLICATION);
                    pair.open(DAEMON);
                    let (budget, passed) = (Some(Budget::default()), pair.passed(APPLICATION));
                    let again = TURNS * AGAIN;
                    let on = On {
                        pair,
                        budget,
                        refused: false,
                        again,
                        passed,
                        empty_at: passed,
                        pause: None,
                        pauses: 0,
                        misjudged: false,
                        retry: None,
                        retries: 0,
                    };
                    self.state = State::On(on);
                    self.begin();
                }
                Ok(Err(_)) | Err(TryRecvError::Closed) => self.state = State::Off,
                Err(TryRecvError::Empty) => {}
            },
            State::On(on) if on.budget.is_none() && self.turns >= on.again => {
                if self.bytes < BULKY * u64::from(self.turns) {
                    on.pair.open(DAEMON);
                    on.budget = Some(Budget::default());
                    on.again = on.again.saturating_mul(AGAIN);
                }
                self.begin();
            }
            State::Watching | State::On(_) | State::Off => {}
        }
    }

    fn begin(&mut self) {
        (self.turns, self.bytes, self.since) = (0, 0, Instant::now());
    }

    /// So much was written.
    pub(super) fn sent(&mut self, n: usize) {
        self.bytes += n as u64;
        self.sent_last = true;
        if let State::On(On { budget, retry, retries, .. }) = &mut self.state {
            (*retry, *retries) = (None, 0);
            if let Some(budget) = budget {
                budget.spend(u32::try_from(n).unwrap_or(u32::MAX));
            }
        }
    }

    /// Whether reading less than was asked for says that there is no more: not where both queues may have had something,
    /// because a read takes from one only. Then it is read until there is nothing.
    pub(super) fn short_is_all(&self) -> bool {
        match &self.state {
            State::On(on) => on.pair.passed(APPLICATION) == on.passed,
            // It may be joined at this moment, but nothing is redirected before we say so.
            State::Watching | State::Requested(_) | State::Off => true,
        }
    }

    /// What was offered to TCP, to be handed to [`Self::was_empty`]; to be asked before a read.
    pub(super) fn passed(&self) -> u64 {
        match &self.state {
            State::On(on) => on.pair.passed(APPLICATION),
            State::Watching | State::Requested(_) | State::Off => 0,
        }
    }

    /// A read found nothing. When two have in a row, and nothing was offered to TCP between them, all of that was read.
    pub(super) fn was_empty(&mut self, passed: u64) {
        if let State::On(on) = &mut self.state {
            if on.empty_at == passed {
                on.passed = passed;
            }
            on.empty_at = passed;
        }
    }

    /// A write would block. Where TCP has nothing on its way, it is memory that there was none of (`sk_msg_alloc`), and no
    /// edge tells when there is some: TCP, which may always have a little, does not need one. So it is tried again.
    pub(super) fn would_block(&mut self) {
        let State::On(on) = &mut self.state else { return };
        on.misjudged = !on.pair.has_unacked(DAEMON);
        on.retry = on.misjudged.then(|| Box::pin(sleep(pause_of(on.retries))));
        on.retries = on.retries.saturating_add(1);
    }

    /// Ready when the socket is to be written to although the runtime takes it for full.
    pub(super) fn poll_retry(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.state {
            State::On(On { misjudged: true, retry, .. }) => {
                retry.as_mut().map_or(Poll::Ready(()), |retry| retry.as_mut().poll(cx))
            }
            _ => Poll::Pending,
        }
    }

    /// A write has failed with ENOMEM: whether that was because it was to be redirected (`bpf_tcp_ingress`). What is
    /// written next waits until everything that was redirected has been read, and goes by TCP.
    pub(super) fn was_refused(&mut self) -> bool {
        let State::On(On { budget: Some(budget), refused, .. }) = &mut self.state else { return false };
        *budget = Budget::spent();
        *refused = true;
        true
    }

    /// Whether less may be written than there is room for, without the socket being full.
    pub(super) fn is_on(&self) -> bool {
        matches!(self.state, State::On(_))
    }

    /// How much may be written now, once anything may.
    pub(super) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        let State::On(on) = &mut self.state else { return Poll::Ready(usize::MAX) };
        let Some(budget) = &mut on.budget else { return Poll::Ready(usize::MAX) };
        // Where it keeps up.
        if !on.refused && budget.is_low() && on.pauses == 0 && on.pair.look().queued == 0 {
            *budget = Budget::default();
        }
        match budget.room() {
            0 => {}
            n => return Poll::Ready(usize::try_from(n).unwrap_or(usize::MAX)),
        }
        // It does not. TCP is better at waiting for it, but only behind what it has.
        ready!(self.poll_drained(cx));
        self.candidate.count_demoted();
        Poll::Ready(usize::MAX)
    }

    /// Ready when the application has read all that was redirected to it; from then on what is written goes by TCP.
    pub(super) fn poll_drained(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let State::On(on) = &mut self.state else { return Poll::Ready(()) };
        if on.budget.is_none() {
            return Poll::Ready(());
        }
        loop {
            if let Some(pause) = &mut on.pause {
                if pause.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                on.pause = None;
            }
            if on.pair.look().queued == 0 {
                on.pair.shut(DAEMON);
                (on.budget, on.refused, on.pauses) = (None, false, 0);
                self.begin();
                return Poll::Ready(());
            }
            on.pauses += 1;
            if on.pauses <= SPINS {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            on.pause = Some(Box::pin(sleep(pause_of(on.pauses - SPINS - 1))));
        }
    }
}

/// The pause after so many.
fn pause_of(before: u32) -> Duration {
    PAUSE_MIN.saturating_mul(1 << before.min(8)).min(PAUSE_MAX)
}

impl Drop for Hot {
    fn drop(&mut self) {
        if let State::On(on) = &self.state {
            let sum = |of: fn(&Pair, u32) -> u64| of(&on.pair, APPLICATION) + of(&on.pair, DAEMON);
            self.candidate.count_bytes(sum(Pair::redirected), sum(Pair::passed));
        }
    }
}
