//! Waiting for a moment, to a few microseconds.
//!
//! The timers of tokio have a granularity of a millisecond (`tokio::time`): at 2,000 requests per second two would
//! start at a time, and wait for each other. A timer of the kernel that is waited for like a socket is late by what it
//! takes the kernel to wake a thread, no more, and costs one system call per moment. Measured on an idle two-core
//! virtual machine: late by 19 µs (50 %), 27 µs (90 %), 63 µs (99 %). It counts as latency, on every arm alike.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use tokio::io::{Interest, unix::AsyncFd};

/// A timer.
#[derive(Debug)]
pub(super) struct Pace {
    timer: AsyncFd<Timer>,
}

/// What tokio asks of a descriptor.
#[derive(Debug)]
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Pace {
    pub(super) fn new() -> Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).context("making a timer")?;
        // SAFETY: the descriptor is the timer's own, always the same, and open until the timer drops, which it does
        // inside of the `AsyncFd`: nothing takes it out.
        let timer = unsafe { AsyncFd::register_with_interest(Timer(timer), Interest::READABLE) };
        Ok(Self { timer: timer.map_err(io::Error::from)? })
    }

    /// Waits for a moment; if it is past, other tasks are still let run now and then.
    pub(super) async fn until(&mut self, moment: Instant) -> Result<()> {
        loop {
            let left = moment.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                tokio::task::coop::consume_budget().await;
                return Ok(());
            }
            // To set it again takes back that it has expired (timerfd_setup, fs/timerfd.c): nothing need be read.
            let once = Expiration::OneShot(TimeSpec::from_duration(left));
            self.timer.get_ref().0.set(once, TimerSetTimeFlags::empty())?;
            self.timer.readable().await?.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heavy_a_moment_is_met_closer_than_a_timer_of_tokio_could() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut late: Vec<Duration> = runtime.block_on(async {
            let mut pace = Pace::new().unwrap();
            let (start, mut late) = (Instant::now(), Vec::new());
            for moment in (1..=500).map(|n| start + n * Duration::from_micros(700)) {
                pace.until(moment).await.unwrap();
                late.push(Instant::now() - moment);
            }
            late
        });
        late.sort_unstable();
        let at = |percent: usize| late[late.len() * percent / 100];
        println!("late by {:?} (50 %), {:?} (90 %), {:?} (99 %)", at(50), at(90), at(99));
        assert!(at(50) < Duration::from_micros(500), "late by {:?}", at(50));
    }
}
