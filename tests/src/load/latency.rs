//! Records durations and summarizes their distribution.
//!
//! # Invariants
//! - What was recorded is in the distribution, to three significant digits. A duration that is too long for it is an
//!   error, never a smaller number.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;

use super::Latency;

/// The longest: twice what may pass without any progress.
const LONGEST: u64 = 60 * 1_000_000_000;
/// Of every duration, so many digits are kept.
const DIGITS: u8 = 3;
/// The points of a curve, of which some 60 are left where several have the same value: more no plot shows.
const POINTS: u32 = 72;

/// Takes durations from several tasks.
#[derive(Clone, Debug)]
pub(super) struct Recorder(Arc<Mutex<Histogram<u64>>>);

impl Recorder {
    pub(super) fn new() -> Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Histogram::new_with_bounds(1, LONGEST, DIGITS)?))))
    }

    pub(super) fn record(&self, took: Duration) -> Result<()> {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        ensure!(nanoseconds <= LONGEST, "it took {took:?}: there is no room for more than a minute");
        let mut histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nothing takes no time, and there is no bucket for it.
        Ok(histogram.record(nanoseconds.max(1))?)
    }

    /// What was recorded.
    pub(super) fn latency(&self) -> Latency {
        latency(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn latency(histogram: &Histogram<u64>) -> Latency {
    let at = |quantile| histogram.value_at_quantile(quantile);
    Latency {
        count: histogram.len(),
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        p999: at(0.999),
        max: histogram.max(),
        curve: curve(histogram),
    }
}

/// Points that lie the closer the nearer they are to the slowest.
fn curve(histogram: &Histogram<u64>) -> Vec<(f64, u64)> {
    if histogram.is_empty() {
        return Vec::new();
    }
    // The distance to the slowest is halved this often until there is one left.
    let halvings = histogram.len().ilog2() + 1;
    let points = histogram.iter_quantiles((POINTS / halvings).max(2));
    let mut curve: Vec<(f64, u64)> = Vec::new();
    for point in points {
        let (quantile, value) = (point.quantile(), point.value_iterated_to());
        match curve.last_mut() {
            Some(last) if last.1 == value => last.0 = quantile,
            _ => curve.push((quantile, value)),
        }
    }
    curve
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_rises_from_the_fastest_to_the_slowest() {
        let recorder = Recorder::new().unwrap();
        for n in 1..=100_000 {
            recorder.record(Duration::from_micros(n)).unwrap();
        }
        let latency = recorder.latency();
        assert_eq!(latency.count, 100_000);
        let near = |is: u64, micros: u64| is.abs_diff(micros * 1000) <= micros;
        assert!(near(latency.p50, 50_000) && near(latency.p99, 99_000), "{latency:?}");
        let curve = &latency.curve;
        assert!((30..=72).contains(&curve.len()), "{} points", curve.len());
        assert!(curve.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1), "{curve:?}");
        assert!(near(curve[0].1, 1), "{curve:?}");
        assert_eq!(curve.last(), Some(&(1.0, latency.max)));
    }

    #[test]
    fn nothing_recorded_is_no_curve_and_what_is_too_long_is_an_error() {
        let recorder = Recorder::new().unwrap();
        assert_eq!(recorder.latency(), Latency::default());
        assert!(recorder.record(Duration::from_secs(61)).is_err());
    }
}
