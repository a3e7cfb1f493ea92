//! Waiting for what has no event that one could wait for.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// What takes longer is broken: several times what a loaded two-core machine needs for the slowest step.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How often it is looked.
const POLL: Duration = Duration::from_millis(5);

/// Whether a wait was in vain: what is known about the processes is shown then, as when a test panics.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Whether this test is failing, as far as can be known before it returns.
pub fn failing() -> bool {
    thread::panicking() || FAILED.load(Ordering::Relaxed)
}

/// Looks until `look` returns something; fails, saying `what`, when that takes longer than `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() > end {
            FAILED.store(true, Ordering::Relaxed);
            bail!("waited {limit:?} for {what}, in vain");
        }
        pause(POLL);
    }
}

/// Waits until a counter that has begun to count has stood still for two seconds.
pub fn stopped(counter: &AtomicU64) -> Result<()> {
    let (mut last, mut since) = (0, Instant::now());
    wait_for("a counter to stand still", 3 * PATIENCE, || {
        let now = counter.load(Ordering::Relaxed);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        (now > 0 && since.elapsed() > Duration::from_secs(2)).then_some(())
    })
}

/// Between two looks. Nothing else here may sleep.
#[expect(
    clippy::disallowed_methods,
    reason = "a thread of a test, not a worker; always in a loop with a deadline"
)]
fn pause(length: Duration) {
    thread::sleep(length);
}
