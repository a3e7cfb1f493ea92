//! The connections of one key, and the flows that wait for a permit on one of them.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
};

use tokio::sync::oneshot;

use super::{Checkout, Entry};
use crate::sinks::upstream::{ConnectError, connection::Connection, pick};

/// What tells a flow that waits.
type Tell<C> = oneshot::Sender<Result<Checkout<C>, ConnectError>>;

/// See the module.
pub(super) struct Slot<C: Connection> {
    pub(super) connections: RefCell<Vec<Rc<Entry<C>>>>,
    pub(super) dialing: Cell<usize>,
    /// In the order in which they came.
    pub(super) waiting: RefCell<VecDeque<(u64, Tell<C>)>>,
    /// The number of the next one that waits.
    next: Cell<u64>,
    /// Permits are being given out, and there is one more.
    serving: Cell<bool>,
    again: Cell<bool>,
}

impl<C: Connection> Default for Slot<C> {
    fn default() -> Self {
        Self {
            connections: RefCell::default(),
            dialing: Cell::default(),
            waiting: RefCell::default(),
            next: Cell::default(),
            serving: Cell::default(),
            again: Cell::default(),
        }
    }
}

/// A flow that waits; no longer when it is dropped.
pub(super) struct Waiting<'s, C: Connection> {
    slot: &'s Slot<C>,
    number: u64,
}

impl<'s, C: Connection> Waiting<'s, C> {
    /// Behind all others.
    pub(super) fn new(slot: &'s Slot<C>, tell: Tell<C>) -> Self {
        let number = slot.next.replace(slot.next.get() + 1);
        slot.waiting.borrow_mut().push_back((number, tell));
        Self { slot, number }
    }
}

impl<C: Connection> Drop for Waiting<'_, C> {
    fn drop(&mut self) {
        let mut waiting = self.slot.waiting.borrow_mut();
        if let Ok(at) = waiting.binary_search_by_key(&self.number, |(number, _)| *number) {
            waiting.remove(at);
        }
    }
}

impl<C: Connection> Slot<C> {
    /// A permit on a connection that has one.
    pub(super) fn checkout(&self) -> Option<Checkout<C>> {
        let connections = self.connections.borrow();
        let room = |c: &Rc<Entry<C>>| if c.connection.is_overdue() { 0 } else { c.free() };
        let found =
            pick::with_room(&connections, room).or_else(|| pick::with_room(&connections, |c| c.free()));
        found.map(Checkout::new)
    }

    /// Whether a connection is up that takes no streams at all: its peer allows none.
    pub(super) fn is_barred(&self) -> bool {
        self.connections.borrow().iter().any(|c| c.connection.is_barred())
    }

    /// Whether it is time to open the next connection.
    pub(super) fn is_nearly_full(&self) -> bool {
        pick::is_nearly_full(&self.connections.borrow(), |c| c.free(), |c| c.connection.max_streams())
    }

    /// Gives free permits to those who wait, in order.
    pub(super) fn serve(&self) {
        // A flow that went away while it waited gives its permit back, which comes here again.
        if self.serving.replace(true) {
            return self.again.set(true);
        }
        loop {
            self.again.set(false);
            while !self.waiting.borrow().is_empty()
                && let Some(checkout) = self.checkout()
            {
                let next = self.waiting.borrow_mut().pop_front();
                if let Some((_, next)) = next {
                    drop(next.send(Ok(checkout)));
                }
            }
            if !self.again.get() {
                break;
            }
        }
        self.serving.set(false);
    }

    /// Everybody who waits gets the error.
    pub(super) fn fail(&self, why: &ConnectError) {
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        for (_, next) in waiting {
            drop(next.send(Err(why.clone())));
        }
    }
}
