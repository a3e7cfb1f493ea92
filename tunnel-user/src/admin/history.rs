//! What has happened in the last hour: samples of the counters, and the rates that come of them.
//!
//! # Invariants
//! - No more than [`SAMPLES_MAX`] samples are kept.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::sight::AllTotals;
use crate::model::end::{EndReason, Fault};

/// Between two samples.
pub(super) const EVERY: Duration = Duration::from_secs(10);
/// An hour of them.
const SAMPLES_MAX: usize = 361;
/// Over how long rates are taken.
const RATE_OVER: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<Sample>);

#[derive(Clone, Debug)]
struct Sample {
    at: Instant,
    sent: u64,
    received: u64,
    opened: u64,
    live: usize,
    ended: [u64; EndReason::ALL.len()],
}

impl Sample {
    fn new(totals: &AllTotals) -> Self {
        let mut ended = [0; EndReason::ALL.len()];
        for (reason, n) in &totals.sums.ended {
            ended[*reason as usize] = *n;
        }
        Self {
            at: Instant::now(),
            sent: totals.live.totals.sent,
            received: totals.live.totals.received,
            opened: totals.sums.of("flows_opened"),
            live: totals.live.flows(),
            ended,
        }
    }
}

/// What happens in a second, over the last minute, or since the start where that is less.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// Seconds that it is taken over.
    pub over: f64,
    /// Bytes from clients.
    pub sent: f64,
    /// Bytes from targets.
    pub received: f64,
    /// Flows that reach their target.
    pub opened: f64,
    /// Flows that end otherwise than in order, by why, in the whole of the last hour.
    pub errors_last_hour: BTreeMap<String, u64>,
}

/// One interval of the history.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Point {
    /// Seconds before now that it ended.
    ago: f64,
    /// In a second of it.
    sent: f64,
    received: f64,
    opened: f64,
    /// Flows at its end.
    live: usize,
}

impl History {
    /// Adds a sample.
    pub(super) fn push(&mut self, totals: &AllTotals) {
        if self.0.len() == SAMPLES_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Sample::new(totals));
    }

    /// The rates until now.
    pub(super) fn rates(&self, totals: &AllTotals) -> Rates {
        let now = Sample::new(totals);
        let since = self.0.iter().find(|s| now.at.duration_since(s.at) <= RATE_OVER + EVERY / 2);
        let mut rates = Rates::default();
        if let Some(since) = since {
            let over = now.at.duration_since(since.at).as_secs_f64().max(0.001);
            rates = Rates {
                over,
                sent: per(now.sent, since.sent, over),
                received: per(now.received, since.received, over),
                opened: per(now.opened, since.opened, over),
                ..rates
            };
        }
        let none = [0; EndReason::ALL.len()];
        // All samples are of the last hour; before an hour has passed, everything is.
        let before = if self.0.len() < SAMPLES_MAX { None } else { self.0.front() };
        let before = before.map_or(&none, |s| &s.ended);
        for reason in EndReason::ALL.into_iter().filter(|r| r.fault() != Fault::Nobody) {
            let n = now.ended[reason as usize].saturating_sub(before[reason as usize]);
            if n > 0 {
                rates.errors_last_hour.insert(reason.word().to_owned(), n);
            }
        }
        rates
    }

    /// All intervals, the oldest first.
    pub(super) fn points(&self) -> Vec<Point> {
        let now = Instant::now();
        let pairs = self.0.iter().zip(self.0.iter().skip(1));
        let point = |(before, after): (&Sample, &Sample)| {
            let over = after.at.duration_since(before.at).as_secs_f64().max(0.001);
            Point {
                ago: now.duration_since(after.at).as_secs_f64(),
                sent: per(after.sent, before.sent, over),
                received: per(after.received, before.received, over),
                opened: per(after.opened, before.opened, over),
                live: after.live,
            }
        };
        pairs.map(point).collect()
    }
}

/// Of a counter, in a second.
#[expect(clippy::cast_precision_loss, reason = "a rate is shown with three digits")]
fn per(now: u64, before: u64, over: f64) -> f64 {
    now.saturating_sub(before) as f64 / over
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(sent: u64, resets: u64) -> AllTotals {
        let mut totals = AllTotals::default();
        totals.live.totals.sent = sent;
        totals.sums.ended = vec![(EndReason::Closed, 7), (EndReason::TargetReset, resets)];
        totals
    }

    #[tokio::test(start_paused = true)]
    async fn rates_are_of_the_last_minute_and_errors_of_the_last_hour() {
        let mut history = History::default();
        for i in 0..400 {
            history.push(&totals(i * 1000, i));
            tokio::time::advance(EVERY).await;
        }
        let rates = history.rates(&totals(400_000, 400));
        assert!((rates.sent - 100.0).abs() < 1.0 && (rates.over - 60.0).abs() < 1.0, "{rates:?}");
        assert_eq!(rates.errors_last_hour.iter().collect::<Vec<_>>(), [(&"target_reset".to_owned(), &361)]);
        assert_eq!(history.points().len(), SAMPLES_MAX - 1);
    }
}
