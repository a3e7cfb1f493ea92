//! Rate limit for log lines that peers or applications can cause. The first of a burst are written, the rest is counted.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// How long a burst is: what was left out is told that often.
pub const BURST: Duration = Duration::from_secs(1);
/// Lines of one kind in a burst: 100 are more than anybody reads, and at 230 bytes each not 2 GB a day.
pub const LINES_MAX: u32 = 100;

/// One kind of line.
#[derive(Debug)]
pub struct Repeats {
    most: u32,
    since: Cell<Option<Instant>>,
    written: Cell<u32>,
    left_out: Cell<u64>,
}

impl Default for Repeats {
    fn default() -> Self {
        Self::new(LINES_MAX)
    }
}

impl Repeats {
    /// At most so many lines in a [`BURST`].
    pub fn new(most: u32) -> Self {
        Self { most, since: Cell::default(), written: Cell::default(), left_out: Cell::default() }
    }

    /// Whether this one is written.
    pub fn admit(&self) -> bool {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> bool {
        if self.since.get().is_none_or(|since| now.duration_since(since) >= BURST) {
            self.since.set(Some(now));
            self.written.set(0);
        }
        let written = self.written.get() < self.most;
        if written {
            self.written.set(self.written.get() + 1);
        } else {
            self.left_out.set(self.left_out.get() + 1);
        }
        written
    }

    /// How many were not written since this was last asked; nothing for none.
    pub fn left_out(&self) -> Option<u64> {
        Some(self.left_out.take()).filter(|n| *n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of many log lines of a kind within a second the first are written, and the others counted.
    #[test]
    fn the_first_of_a_burst_are_written_and_the_rest_is_counted() {
        let (repeats, start) = (Repeats::new(3), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let written = (0..10).filter(|i| repeats.admit_at(at(*i))).count();
        assert_eq!((written, repeats.left_out(), repeats.left_out()), (3, Some(7), None));
        assert!(repeats.admit_at(at(1000)), "another burst");
        assert_eq!(repeats.left_out(), None);
    }
}
