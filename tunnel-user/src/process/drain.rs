//! Draining: the phases of a shutdown, and the owner of tasks.
//!
//! # Invariants
//! - Every task is in a [`Tasks`]; dropping it ends the task.
//! - Nothing waits for ever.

use std::{cell::RefCell, future::Future};

use tokio::{sync::watch, task::JoinSet};

/// What the daemon is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Taking connections.
    Run,
    /// Taking none; those that are there go on.
    Drain,
    /// Dropping those that are left.
    Stop,
}

/// Tells everybody.
#[derive(Clone, Debug)]
pub struct Trigger(watch::Sender<Phase>);

/// Hears of it.
#[derive(Clone, Debug)]
pub struct Watch(watch::Receiver<Phase>);

/// A trigger and its watch, in [`Phase::Run`].
pub fn channel() -> (Trigger, Watch) {
    let (tell, told) = watch::channel(Phase::Run);
    (Trigger(tell), Watch(told))
}

impl Trigger {
    /// Another one that hears of it.
    pub fn watch(&self) -> Watch {
        Watch(self.0.subscribe())
    }

    /// Moves on, never back. Nobody may be left to hear it.
    pub fn enter(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let on = *now < phase;
            *now = phase.max(*now);
            on
        });
    }
}

impl Watch {
    /// Whether the phase is past [`Phase::Run`].
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() != Phase::Run
    }

    /// Ready once the phase is past [`Phase::Run`].
    pub async fn draining(&mut self) {
        // A trigger that is gone means stop.
        let _gone = self.0.wait_for(|p| *p != Phase::Run).await;
    }

    /// Ready once the phase is [`Phase::Stop`].
    pub async fn stopping(&mut self) {
        let _gone = self.0.wait_for(|p| *p == Phase::Stop).await;
    }
}

/// Tasks of one worker, ended when dropped.
#[derive(Default)]
pub struct Tasks(RefCell<JoinSet<()>>);

impl Tasks {
    /// Starts one.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let mut tasks = self.0.borrow_mut();
        // Those that have ended, so that they do not pile up.
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(task);
    }

    /// Waits until none is left.
    pub async fn ended(&self) {
        std::future::poll_fn(|cx| {
            let mut tasks = self.0.borrow_mut();
            loop {
                match tasks.poll_join_next(cx) {
                    std::task::Poll::Ready(Some(_)) => {}
                    std::task::Poll::Ready(None) => return std::task::Poll::Ready(()),
                    std::task::Poll::Pending => return std::task::Poll::Pending,
                }
            }
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Once flows are to be ended at once, a later order to drain gives them no more time.
    #[tokio::test]
    async fn the_order_to_stop_is_not_taken_back_by_a_later_order_to_drain() {
        let (trigger, mut watch) = channel();
        trigger.clone().enter(Phase::Stop);
        trigger.enter(Phase::Drain);
        watch.draining().await;
        watch.stopping().await;
    }
}
