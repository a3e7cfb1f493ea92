//! Logs and counts panics, of any task or thread.
//!
//! A panic ends its task and not the process; without this hook, one whose result nobody reads would be lost.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    panic::{self, PanicHookInfo},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

static PANICS: AtomicU64 = AtomicU64::new(0);

/// Logs and counts them from now on, in the whole process, in place of what the standard library prints.
pub fn install() {
    panic::set_hook(Box::new(note));
}

/// How many there were.
pub fn count() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

fn note(panic: &PanicHookInfo<'_>) {
    PANICS.fetch_add(1, Ordering::Relaxed);
    let what = panic.payload_as_str().unwrap_or("without a message");
    let thread = thread::current();
    let backtrace = Backtrace::capture();
    let backtrace =
        (backtrace.status() == BacktraceStatus::Captured).then(|| tracing::field::display(&backtrace));
    tracing::error!(
        thread = thread.name(),
        at = panic.location().map(tracing::field::display),
        backtrace,
        "a task panicked, which is a mistake in this program: {what}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::drain::Tasks;

    #[tokio::test]
    async fn a_panic_is_counted_though_nobody_asks_for_the_result_of_its_task() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                install();
                let (before, tasks) = (count(), Tasks::default());
                tasks.spawn(async { panic!("a test") });
                tasks.ended().await;
                // Other tests may panic beside this one.
                assert!(count() > before);
                drop(panic::take_hook());
            })
            .await;
    }
}
