//! Histograms of durations with one writer, which anybody may read.
//!
//! # Invariants
//! - Each has one writer; nothing on the data path takes a lock or writes to what another core writes to.

use std::{array, time::Duration};

use super::stats::Counter;

/// Upper bounds of the buckets in microseconds, but for the last one, which has none: from loopback to what operators set
/// timeouts to, about three for each factor of ten.
pub const BOUNDS_US: [u64; 20] = [
    100,
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    600_000_000,
    3_600_000_000,
];

/// Buckets, that without a bound included.
pub const BUCKETS: usize = BOUNDS_US.len() + 1;

/// See the module.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_us: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: array::from_fn(|_| Counter::default()), sum_us: Counter::default() }
    }
}

impl Histogram {
    /// Takes in one duration.
    pub fn observe(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        // A duration that is equal to a bound belongs below it (`le`).
        let bucket = BOUNDS_US.partition_point(|bound| *bound < us);
        self.buckets[bucket].add(1);
        self.sum_us.add(us);
    }

    /// What it holds now. While its writer goes on, the sum may be of one more than the buckets.
    pub fn read(&self) -> Buckets {
        Buckets { counts: array::from_fn(|i| self.buckets[i].get()), sum_us: self.sum_us.get() }
    }
}

/// What a histogram, or several together, held at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buckets {
    /// How many were in each bucket, and not in those below.
    pub counts: [u64; BUCKETS],
    /// Microseconds of all together.
    pub sum_us: u64,
}

impl Buckets {
    /// Takes in another one.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.sum_us = self.sum_us.wrapping_add(other.sum_us);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        let histogram = Histogram::default();
        for us in [0, 100, 101, 3_600_000_000, 3_600_000_001] {
            histogram.observe(Duration::from_micros(us));
        }
        let read = histogram.read();
        let full: Vec<_> = read.counts.iter().enumerate().filter(|(_, n)| **n > 0).collect();
        assert_eq!(full, [(0, &2), (1, &1), (BUCKETS - 2, &1), (BUCKETS - 1, &1)]);
        assert_eq!((read.count(), read.sum_us), (5, 201 + 2 * 3_600_000_000 + 1));
    }

    #[test]
    fn bounds_rise() {
        assert!(BOUNDS_US.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn several_are_added_up() {
        let (one, other) = (Histogram::default(), Histogram::default());
        one.observe(Duration::from_millis(1));
        other.observe(Duration::from_secs(7200));
        let mut both = one.read();
        both.add(&other.read());
        assert_eq!((both.count(), both.counts[3], both.counts[BUCKETS - 1]), (2, 1, 1));
    }
}
