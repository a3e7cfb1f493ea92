//! Turns of a task: how a connection that always has more to do lets everything else on its worker go first.
//!
//! A task that wakes itself runs again before the runtime polls epoll, as often as the runtime's event interval allows, and
//! whoever has something to say meanwhile is not heard. One that waits for the driver runs after all that epoll has found.

use std::{
    future::Future as _,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

/// Wakes a task after the runtime has polled its I/O driver.
#[derive(Debug)]
pub struct AfterDriver(Arc<Passed>);

#[derive(Debug)]
struct Passed {
    passed: AtomicBool,
    waker: Waker,
}

impl Wake for Passed {
    fn wake(self: Arc<Self>) {
        self.passed.store(true, Ordering::Relaxed);
        self.waker.wake_by_ref();
    }
}

impl AfterDriver {
    /// The task of `cx` is woken then; until then it is its part to return [`Poll::Pending`], whoever else wakes it.
    pub fn new(cx: &Context<'_>) -> Self {
        let passed = Arc::new(Passed { passed: AtomicBool::new(false), waker: cx.waker().clone() });
        let waker = Waker::from(Arc::clone(&passed));
        // Polled once, it hands the waker to the runtime, which wakes it when it has polled its driver.
        let handed = pin!(tokio::task::yield_now()).poll(&mut Context::from_waker(&waker));
        debug_assert_eq!(handed, Poll::Pending, "it yields");
        Self(passed)
    }

    /// Whether the driver has been polled since.
    pub fn has_passed(&self) -> bool {
        self.0.passed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::poll_fn, rc::Rc};

    use tokio::{
        net::UdpSocket,
        runtime::{Builder, LocalOptions},
        task::spawn_local,
    };

    use super::*;

    /// A task that always has more to do lets a socket that became readable go first, although the runtime would poll epoll
    /// only every 61 tasks.
    #[test]
    fn whatever_the_driver_finds_goes_before_a_task_that_waits_for_it() {
        let runtime =
            Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let heard = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let addr = heard.local_addr().unwrap();
            let (turns, stop) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
            let (counted, ends) = (Rc::clone(&turns), Rc::clone(&stop));
            let busy = spawn_local(async move {
                let mut waiting: Option<AfterDriver> = None;
                poll_fn(|cx| {
                    if ends.get() {
                        return Poll::Ready(());
                    }
                    if waiting.as_ref().is_none_or(AfterDriver::has_passed) {
                        counted.set(counted.get() + 1);
                        waiting = Some(AfterDriver::new(cx));
                    }
                    Poll::Pending
                })
                .await;
            });
            let mut buf = [0; 8];
            for _ in 0..10 {
                let before = turns.get();
                std::net::UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", addr).unwrap();
                heard.recv_from(&mut buf).await.unwrap();
                assert!(turns.get() - before <= 2, "{} turns of the busy task", turns.get() - before);
            }
            stop.set(true);
            busy.await.unwrap();
        });
    }
}
