//! A report as pictures.
//!
//! SVG by plotters, each complete in itself and small, for the page and for the repository: one way to draw both, and no script
//! in either (docs/adr/0014).
//!
//! # Invariants
//! - An arm has one colour and one mark in all of them.
//! - What was not measured is not drawn, and the caption says so.
//! - Bars start at 0.

use crate::bench::model::{Report, Scenario, Task};

use super::words::{absent, plain};

mod bars;
mod curves;
mod lines;
mod looks;
mod memory;
mod ratio;
mod rules;
mod scale;
mod sheet;

/// A picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plot {
    /// [`Scenario::name`] of what it shows.
    pub scenario: String,
    /// Its file's name without `.svg`: `chain-latency`.
    pub name: String,
    /// What it shows.
    pub title: String,
    /// How to read it, and what is not in it.
    pub caption: String,
    /// The picture.
    pub svg: String,
}

/// All that there is data for.
pub fn plots(report: &Report) -> Vec<Plot> {
    let looks = looks::Looks::new(report);
    let mut all = Vec::new();
    for scenario in &report.scenarios {
        // The first arm, and the one that the others could take the place of; where arms differ in rules, a
        // second one would be any.
        let several = if scenario.arms.iter().any(|arm| arm.rules.is_some()) { 1 } else { 2 };
        let bases = scenario.arms.iter().filter(|arm| ran(scenario, &arm.name)).take(several);
        for base in bases {
            all.extend(ratio::plot(scenario, &looks, &base.name));
        }
        all.extend(rules::plots(scenario, &looks));
        all.extend(curves::plot(scenario, &looks));
        all.extend(bars::throughput(scenario, &looks));
        all.extend(bars::cpu(scenario, &looks, bars::Per::Gigabyte));
        all.extend(bars::cpu(scenario, &looks, bars::Per::Thousand));
        all.extend(memory::plot(scenario, &looks));
    }
    all
}

/// Every workload of a scenario as a ratio to an arm of choice; nothing when that has no numbers.
pub fn ratios(report: &Report, scenario: &str, base: &str) -> Option<Plot> {
    let looks = looks::Looks::new(report);
    let scenario = report.scenarios.iter().find(|s| s.name == scenario)?;
    ratio::plot(scenario, &looks, base)
}

impl Plot {
    fn new(scenario: &Scenario, what: &str, title: String, caption: String, svg: String) -> Self {
        let safe = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
        let name = format!("{}-{what}", scenario.name).chars().map(safe).collect();
        let caption = match absent(scenario) {
            Some(absent) => format!("{caption} {absent}"),
            None => caption,
        };
        Self { scenario: scenario.name.clone(), name, title, caption, svg }
    }
}

fn ran(scenario: &Scenario, arm: &str) -> bool {
    scenario.cells.iter().any(|cell| cell.arm == arm && !cell.runs.is_empty())
}

/// What a panel or a row shows: the title of a task, and `captured` of `connect:1 captured` where that lacks
/// it.
fn panel_title(task: &Task) -> String {
    let title = plain(&task.title);
    match way(task) {
        Some(way) if !title.contains(&way) => format!("{title}, {way}"),
        _ => title,
    }
}

/// `captured`, of `connect:1 captured`.
fn way(task: &Task) -> Option<String> {
    let (_, way) = task.name.split_once(' ').filter(|_| !task.witness)?;
    Some(plain(way))
}

/// What stands above a picture of a scenario.
fn titled(scenario: &Scenario, what: &str) -> String {
    format!("{}: {what}", plain(&scenario.title))
}

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(super) use tests::well_formed;
