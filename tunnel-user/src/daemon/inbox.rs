//! What the control thread tells a worker.
//!
//! Enters: news for a worker. Leaves: the same, in their order, through a channel that is bounded. Invariant: nothing is
//! lost because a worker is behind: it waits here until there is room. What waits is bounded by the namespaces that can
//! have listeners (`LISTENERS` of the kernel programs, 4,096 for each capture).

use std::{cell::RefCell, collections::VecDeque};

use tokio::sync::mpsc::{Sender, error::TrySendError};

use crate::worker::More;

/// The way to one worker.
pub(super) struct Inbox {
    to: Sender<More>,
    waiting: RefCell<VecDeque<More>>,
}

impl Inbox {
    pub(super) fn new(to: Sender<More>) -> Self {
        Self { to, waiting: RefCell::default() }
    }

    /// Tells it now, or as soon as there is room and [`flush`](Self::flush) is called.
    pub(super) fn tell(&self, news: More) {
        self.waiting.borrow_mut().push_back(news);
        self.flush();
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&self) {
        let mut waiting = self.waiting.borrow_mut();
        while let Some(news) = waiting.pop_front() {
            match self.to.try_send(news) {
                Ok(()) => {}
                Err(TrySendError::Full(news)) => return waiting.push_front(news),
                // It has ended, and what it had with it; why, is said when it is joined.
                Err(TrySendError::Closed(_)) => return waiting.clear(),
            }
        }
    }

    /// Tells it behind everything that waits, and waits for the room.
    pub(super) async fn send(&self, news: More) {
        self.waiting.borrow_mut().push_back(news);
        loop {
            self.flush();
            if self.waiting.borrow().is_empty() {
                return;
            }
            // Room, or the end; either is found by the next look.
            let _room = self.to.reserve().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::worker::SourceId;

    #[tokio::test]
    async fn what_a_worker_that_is_behind_is_told_is_not_lost_and_stays_in_order() {
        const NEWS: u64 = 200;
        let (to, mut news) = mpsc::channel(64);
        let inbox = Inbox::new(to);
        for i in 0..NEWS {
            inbox.tell(More::Forget(SourceId(0), i));
        }
        let last = async {
            inbox.send(More::Forget(SourceId(0), NEWS)).await;
        };
        let taken = async {
            let mut seen = Vec::new();
            while seen.len() as u64 <= NEWS {
                let Some(More::Forget(_, i)) = news.recv().await else {
                    panic!("it ended after {}", seen.len())
                };
                seen.push(i);
            }
            seen
        };
        let ((), seen) = tokio::join!(last, taken);
        assert_eq!(seen, (0..=NEWS).collect::<Vec<_>>());
        drop(news);
        inbox.tell(More::Forget(SourceId(0), 0));
        assert!(inbox.waiting.borrow().is_empty(), "nothing is kept for a worker that has ended");
    }
}
