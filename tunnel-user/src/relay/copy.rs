//! One direction of a flow, copied through this process.
//!
//! # Invariants
//! - What was received is sent, in order, for as long as the sink takes it, however the source ended.
//! - A source without a window of its own is read only while nothing waits to be sent.

use std::{
    cell::Cell,
    mem,
    ops::DerefMut,
    task::{Context, Poll},
};

use super::{
    Broken, Leg, Queue,
    ends::{State, Way, discard, finish, theirs},
};

/// Steps that one direction takes before the task lets the worker's others have a turn. At 64 KiB a step
/// that is 1 MiB, about 200 µs.
const STEPS: u32 = 16;

/// See the module.
pub(super) struct Direction<Q> {
    pub(super) queue: Q,
    /// Bytes at its front that did not come from the source.
    ours: usize,
    pub(super) state: State,
    /// Bytes were dropped because the sink took no more.
    pub(super) lost: bool,
}

impl<Q: DerefMut<Target = Queue>> Direction<Q> {
    /// With what is there already.
    pub(super) fn new(queue: Q, ours: usize, state: State) -> Self {
        Self { queue, ours, state, lost: false }
    }

    /// Whether nothing waits to be sent, and bytes may still come.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state, State::Open) && self.queue.is_empty()
    }

    /// The sink takes no more: what waits for it is dropped.
    pub(super) fn stop(&mut self, why: Option<Broken>) {
        self.lost |= !self.queue.is_empty();
        *self.queue = Queue::default();
        self.state.refuse(why);
    }
}

impl<S: Leg, D: Leg, Q: DerefMut<Target = Queue>> Way<S, D> for Direction<Q> {
    fn poll(&mut self, cx: &mut Context<'_>, src: &mut S, dst: &mut D, moved: &Cell<u64>) {
        for _ in 0..STEPS {
            while matches!(self.state, State::Open) && (src.prefetches() || self.queue.is_empty()) {
                match src.poll_recv(cx) {
                    Poll::Ready(Ok(Some(chunk))) => self.queue.push(chunk),
                    Poll::Ready(Ok(None)) => {
                        self.state = State::Draining;
                        self.queue.end();
                    }
                    Poll::Ready(Err(why)) => self.state = State::Failing(why),
                    Poll::Pending => break,
                }
            }
            match &mut self.state {
                State::Refused { source, .. } => {
                    self.lost |= discard(cx, src, source);
                    return;
                }
                State::Draining if self.queue.is_empty() => {
                    if let Some(ended) = finish(cx, dst) {
                        self.state = ended;
                    }
                    return;
                }
                _ if self.queue.is_empty() => return,
                _ => {}
            }
            match dst.poll_send(cx, &mut self.queue) {
                Poll::Ready(Ok(n)) => {
                    let n = theirs(&mut self.ours, n);
                    src.accepted(n);
                    moved.set(moved.get() + n as u64);
                }
                Poll::Ready(Err(why)) => self.stop(Some(why)),
                Poll::Pending => return,
            }
        }
        cx.waker().wake_by_ref();
    }

    fn state(&self) -> &State {
        &self.state
    }

    fn take_state(&mut self) -> State {
        mem::replace(&mut self.state, State::Done)
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    fn has_lost(&self) -> bool {
        self.lost
    }

    fn refuse(&mut self, why: Option<Broken>) {
        self.stop(why);
    }
}
