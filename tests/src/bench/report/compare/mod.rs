//! Whether anything has changed between two reports.
//!
//! For each metric that both have: what it was, what it is, and a [`Verdict`].
//!
//! # Invariants
//! - Fewer than [`FEWEST`] runs give no verdict, and a report compared with itself has not changed.
//! - What the spread of the runs explains is no change.
//!
//! # What is compared
//! The first arm of a scenario by its values; every other arm by its ratios to the first, each of two runs of
//! the same round. What the machine did to both, today or in the other report, falls out of a ratio. Where
//! the first arm has nothing to divide by (it has no proxies, so no memory of proxies), values are compared
//! instead.
//!
//! # What is noise
//! Hundreds of metrics are compared at once, so that a test at the usual 5 % would call dozens of them
//! changed. A change has to pass three:
//!
//! 1. The medians are further apart than [`SIGMAS`] standard errors of their difference. The standard error
//!    of a median is 1.2533 σ/√n for large n (√(π/2); exact for the normal distribution), σ is estimated as
//!    IQR/1.349 (that of the normal distribution) so that one run in which the machine was elsewhere does not
//!    hide what the others agree on, and those of the two medians add in quadrature.
//! 2. The ranks agree: Mann and Whitney's U, as a normal deviate with correction for continuity, is beyond
//!    [`DEVIATES`]. The first test alone is not enough: the IQR of seven values is now and then far too small
//!    by luck. Ranks do not care how values are distributed.
//! 3. The medians differ by [`FLOOR`] at least: where the linker and the loader have put things moves results
//!    by that much and more (Mytkowicz et al., "Producing wrong data without doing anything obviously
//!    wrong!", 2009), and no spread within a report shows it.
//!
//! In simulations (60,000 pairs of samples of one distribution: normal, Student's t with three degrees of
//! freedom, exponential, bimodal, normal with 10 % outliers; n from 7 to 21) the first test alone called
//! 0.6–7 % changed, both together 0.1–0.33 %: at most one of three hundred. A shift of 20 % in a normal
//! noise of 5 % was found in 96 % of cases at n = 7 and in 99 % at n = 9; one of 10 % in 34 % and 55 %, in
//! 71 % at n = 11.
//!
//! What no number of runs can show is that a machine was another one on that day: hence the warnings.

pub use beside::beside;

use crate::bench::{
    model::{Arm, Report, Scenario, Task},
    stats::{Better, Metric, Summary},
};

mod beside;
mod conditions;
mod text;

/// Fewer runs have no quartiles worth the name: with 7 on each side ranks can just
/// say something, when all of one are beyond all of the other.
pub const FEWEST: usize = 7;
/// Standard errors between medians.
const SIGMAS: f64 = 3.0;
/// Of a normal distribution, beyond which ranks disagree: 1 in 200 on both sides together.
const DEVIATES: f64 = 2.8;
/// A share of the old median.
const FLOOR: f64 = 0.02;

/// Two reports, compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// When the older was taken.
    pub old: String,
    /// When the newer was taken.
    pub new: String,
    /// What differs that is not the program: machine, settings, versions, ciphers, faults.
    pub warnings: Vec<String>,
    /// Every metric that both have, the most certain change first.
    pub changes: Vec<Change>,
    /// Arms and tasks that only the newer has.
    pub added: Vec<String>,
    /// Arms and tasks that only the older has.
    pub removed: Vec<String>,
}

/// A metric of a workload on an arm, then and now.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// [`Scenario::name`].
    pub scenario: String,
    /// [`Arm::name`].
    pub arm: String,
    /// [`Task::name`].
    pub task: String,
    /// Of what.
    pub metric: Metric,
    /// What `old` and `new` are.
    pub basis: Basis,
    /// Then.
    pub old: Summary,
    /// Now.
    pub new: Summary,
    /// From median to median, as a share of the old one; nothing when that is 0.
    pub change: Option<f64>,
    /// How much of a change has to be put down to noise, as a share of the old median; nothing when that is
    /// 0.
    pub noise: Option<f64>,
    /// How far the medians are apart, in units of that noise: 1 is the limit.
    pub significance: f64,
    /// What to make of it.
    pub verdict: Verdict,
}

/// What was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Values.
    Value,
    /// Ratios to the scenario's first arm in the same round.
    Ratio,
}

/// What to make of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It moved the good way.
    Better,
    /// It moved the bad way.
    Worse,
    /// Noise explains it.
    Inside,
    /// There are fewer than [`FEWEST`] runs on a side.
    TooFew,
}

/// Compares what both have.
pub fn compare(old: &Report, new: &Report) -> Comparison {
    let mut changes = Vec::new();
    for then in &old.scenarios {
        let Some(now) = new.scenarios.iter().find(|s| s.name == then.name) else { continue };
        for arm in then.arms.iter().filter(|arm| now.arms.iter().any(|a| a.name == arm.name)) {
            for task in then.workloads.iter().filter(|t| now.workloads.iter().any(|u| u.name == t.name)) {
                let metrics = Metric::of(task.workload).iter();
                changes.extend(metrics.filter_map(|metric| change(then, now, arm, task, *metric)));
            }
        }
    }
    let (removed, added) = conditions::only_in_one(old, new);
    Comparison {
        warnings: conditions::warnings(old, new),
        added,
        removed,
        ..Comparison::sorted(old.taken.clone(), new.taken.clone(), changes)
    }
}

fn change(then: &Scenario, now: &Scenario, arm: &Arm, task: &Task, metric: Metric) -> Option<Change> {
    let values = |s: &Scenario| -> Vec<f64> {
        s.runs(&arm.name, &task.name).iter().filter_map(|run| metric.value(run)).collect()
    };
    // Both sides have to be ratios to the same arm.
    let base = then.baseline().filter(|b| b.name != arm.name);
    let base = base.filter(|b| now.baseline().is_some_and(|other| other.name == b.name));
    let ratios = |s: &Scenario| base.map_or(Vec::new(), |b| s.ratios(&b.name, &arm.name, &task.name, metric));
    let (before, after) = (ratios(then), ratios(now));
    let (basis, before, after) = if before.is_empty() || after.is_empty() {
        (Basis::Value, values(then), values(now))
    } else {
        (Basis::Ratio, before, after)
    };
    let (old, new) = (Summary::new(before.iter().copied())?, Summary::new(after.iter().copied())?);
    let moved = new.median - old.median;
    let noise = (SIGMAS * standard_error(&old).hypot(standard_error(&new))).max(FLOOR * old.median.abs());
    let share = |of: f64| (old.median != 0.0).then(|| of / old.median.abs());
    let significance = if moved == 0.0 { 0.0 } else { moved.abs() / noise };
    let verdict = Verdict::of(metric, moved, significance, [&before, &after]);
    Some(Change {
        scenario: then.name.clone(),
        arm: arm.name.clone(),
        task: task.name.clone(),
        metric,
        basis,
        old,
        new,
        change: share(moved),
        noise: share(noise),
        significance,
        verdict,
    })
}

/// Of a median.
fn standard_error(summary: &Summary) -> f64 {
    1.2533 * summary.iqr() / 1.349 / (summary.n as f64).sqrt()
}

/// How far ranks are from mixed, in standard deviations, either way.
fn deviate(a: &[f64], b: &[f64]) -> f64 {
    let (n, m) = (a.len() as f64, b.len() as f64);
    let pairs = a.iter().flat_map(|x| b.iter().map(move |y| x.total_cmp(y)));
    let below: f64 = pairs
        .map(|order| match order {
            std::cmp::Ordering::Less => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Greater => 0.0,
        })
        .sum();
    let spread = (n * m * (n + m + 1.0) / 12.0).sqrt();
    if spread > 0.0 { ((below - n * m / 2.0).abs() - 0.5).max(0.0) / spread } else { 0.0 }
}

impl Comparison {
    /// Of these changes, the most certain first.
    fn sorted(old: String, new: String, mut changes: Vec<Change>) -> Self {
        changes.sort_by(|a, b| {
            (a.verdict.rank(), b.significance)
                .partial_cmp(&(b.verdict.rank(), a.significance))
                .unwrap_or(std::cmp::Ordering::Equal)
        });
        Self { old, new, warnings: Vec::new(), changes, added: Vec::new(), removed: Vec::new() }
    }

    /// How many metrics have this verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.changes.iter().filter(|change| change.verdict == verdict).count()
    }
}

impl Verdict {
    /// What to make of medians that are `moved` apart, `significance` times the noise, of these two samples.
    fn of(metric: Metric, moved: f64, significance: f64, samples: [&[f64]; 2]) -> Self {
        if samples.iter().any(|sample| sample.len() < FEWEST) {
            Self::TooFew
        } else if significance <= 1.0 || deviate(samples[0], samples[1]) <= DEVIATES {
            Self::Inside
        } else if (moved > 0.0) == (metric.better() == Better::Higher) {
            Self::Better
        } else {
            Self::Worse
        }
    }

    /// What a reader wants to see first.
    fn rank(self) -> u8 {
        match self {
            Self::Worse | Self::Better => 0,
            Self::Inside => 1,
            Self::TooFew => 2,
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::Inside => "inside the noise",
            Self::TooFew => "too few runs",
        })
    }
}

#[cfg(test)]
mod tests;
