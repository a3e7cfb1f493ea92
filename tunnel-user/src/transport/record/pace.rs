//! What handshakes of one worker take of its time, and how far each has come.
//!
//! # Invariants
//! - One handshake of a worker computes at a time, and before the next one does, the runtime has polled its driver: flows that
//!   are established go first, however many handshakes wait.

use std::{cell::Cell, rc::Rc};

use tokio::{sync::Semaphore, task::yield_now};

thread_local! {
    /// A worker is a thread.
    static TURNS: Turns = Turns(Rc::new(Semaphore::new(1)));
}

/// The turns of one worker's handshakes.
#[derive(Clone, Debug)]
struct Turns(Rc<Semaphore>);

/// How far a peer has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nothing was received from it that could be answered.
    #[default]
    Silent,
    /// It has said what a handshake begins with.
    Spoken,
    /// We have answered: what is left is its part.
    Answered,
}

/// One handshake among them.
#[derive(Clone, Debug)]
pub struct Pace {
    turns: Turns,
    stage: Rc<Cell<Stage>>,
}

impl Default for Pace {
    /// Of a connection on which nothing was said yet.
    fn default() -> Self {
        Self { turns: TURNS.with(Clone::clone), stage: Rc::default() }
    }
}

impl Pace {
    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.stage.get()
    }

    /// It has come so far.
    pub fn reached(&self, stage: Stage) {
        self.stage.set(self.stage.get().max(stage));
    }

    /// Computes in its turn.
    pub(super) async fn in_turn<T>(&self, compute: impl FnOnce() -> T) -> T {
        // It is never closed.
        let turn = self.turns.0.acquire().await;
        let computed = compute();
        yield_now().await;
        drop(turn);
        computed
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, time::Duration};

    use tokio::{
        runtime::{Builder, LocalOptions},
        task::{JoinSet, yield_now},
        time::timeout,
    };

    use super::*;

    #[test]
    fn between_two_handshakes_whatever_is_ready_has_its_turn() {
        let runtime =
            Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let order = Rc::new(RefCell::new(Vec::new()));
            let mut tasks = JoinSet::new();
            for _ in 0..50 {
                let (pace, order) = (Pace::default(), Rc::clone(&order));
                tasks.spawn_local(async move { pace.in_turn(|| order.borrow_mut().push('h')).await });
            }
            let flow = Rc::clone(&order);
            tasks.spawn_local(async move {
                for _ in 0..50 {
                    flow.borrow_mut().push('f');
                    yield_now().await;
                }
            });
            timeout(Duration::from_secs(10), async { while tasks.join_next().await.is_some() {} })
                .await
                .unwrap();
            let order: String = order.take().into_iter().collect();
            assert!(!order.contains("hhh"), "{order}");
        });
    }

    #[tokio::test]
    async fn a_handshake_that_is_given_up_gives_up_its_turn() {
        let (first, second) = (Pace::default(), Pace::default());
        drop(timeout(Duration::ZERO, first.in_turn(|| ())).await);
        timeout(Duration::from_secs(10), second.in_turn(|| ())).await.unwrap();
    }
}
