//! Whether two builds that took turns in one benchmark differ: `--beside`.
//!
//! Two reports of one machine differ by what the machine did in between, which is often more than what is looked for.
//! Here each run has a twin of the other build in the same round, seconds away, and a figure is the ratio of the two.

use super::{Basis, Change, Comparison, FLOOR, SIGMAS, Verdict, standard_error};
use crate::bench::{
    model::{Arm, Report, Scenario, Task},
    plan::OTHER,
    stats::{Metric, Summary},
};

/// Compares every arm with the arm of the other build.
///
/// A change has to pass the same three tests as one between two reports: the median of the ratios is further from 1 than
/// three of its standard errors, and than 2 %; and the ranks of the ratios and of their inverses agree.
pub fn beside(report: &Report) -> Comparison {
    let mut changes = Vec::new();
    for scenario in &report.scenarios {
        for arm in &scenario.arms {
            let other = format!("{}{OTHER}", arm.name);
            if !scenario.arms.iter().any(|arm| arm.name == other) {
                continue;
            }
            for task in &scenario.workloads {
                let metrics = Metric::of(task.workload).iter();
                changes.extend(metrics.filter_map(|metric| change(scenario, &other, arm, task, *metric)));
            }
        }
    }
    Comparison::sorted(report.taken.clone(), report.taken.clone(), changes)
}

fn change(scenario: &Scenario, other: &str, arm: &Arm, task: &Task, metric: Metric) -> Option<Change> {
    let ratios = scenario.ratios(other, &arm.name, &task.name, metric);
    let ratio = Summary::new(ratios.iter().copied())?;
    let (old, new) =
        (scenario.summary(other, &task.name, metric)?, scenario.summary(&arm.name, &task.name, metric)?);
    let moved = ratio.median - 1.0;
    let noise = (SIGMAS * standard_error(&ratio)).max(FLOOR);
    let inverses: Vec<f64> = ratios.iter().map(|ratio| 1.0 / ratio).collect();
    let significance = moved.abs() / noise;
    let verdict = Verdict::of(metric, moved, significance, [&ratios, &inverses]);
    Some(Change {
        scenario: scenario.name.clone(),
        arm: arm.name.clone(),
        task: task.name.clone(),
        metric,
        basis: Basis::Value,
        old,
        new,
        change: Some(moved),
        noise: Some(noise),
        significance,
        verdict,
    })
}
