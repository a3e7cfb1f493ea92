//! A notice from one task of a worker to another, without a lock: set any number of times, taken once.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
};

/// One waiter at a time hears of it; what is set while nobody waits is heard by the next.
#[derive(Debug, Default)]
pub(super) struct Signal {
    is_set: Cell<bool>,
    waiter: RefCell<Option<Waker>>,
}

impl Signal {
    /// Sets it.
    pub(super) fn set(&self) {
        self.is_set.set(true);
        // Apart: the borrow must end before anything is woken.
        let waiter = self.waiter.borrow_mut().take();
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }

    /// Ready once it is set, which it is no more then.
    pub(super) fn taken(&self) -> impl Future<Output = ()> {
        poll_fn(|cx| {
            if self.is_set.take() {
                return Poll::Ready(());
            }
            let mut waiter = self.waiter.borrow_mut();
            match &mut *waiter {
                Some(waiter) => waiter.clone_from(cx.waker()),
                None => *waiter = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
    }
}
