//! What two reports do not have in common: a line for each thing that differs and is not a measurement.
//!
//! It is not decided whether the comparison is worth anything: a new version of the program is what most are made for.

use std::collections::BTreeSet;

use crate::bench::{
    model::{Report, Scenario, Tls},
    report::{
        number::bytes,
        words::{count, plain},
    },
};

/// What else than the numbers has changed.
pub(super) fn warnings(old: &Report, new: &Report) -> Vec<String> {
    let mut all = Vec::new();
    let mut differ = |what: &str, a: &str, b: &str| {
        if a != b {
            all.push(plain(&format!("{what}: {a} → {b}")));
        }
    };
    let (m, n) = (&old.machine, &new.machine);
    differ("processor", &m.cpu, &n.cpu);
    differ("cores", &m.cores.to_string(), &n.cores.to_string());
    // A kernel that reserves a little more for itself is no other machine.
    if m.memory.abs_diff(n.memory) > m.memory / 50 {
        differ("memory", &bytes(m.memory as f64), &bytes(n.memory as f64));
    }
    differ("kernel", &m.kernel, &n.kernel);
    differ("system", &m.system, &n.system);
    differ("congestion control", &m.congestion_control, &n.congestion_control);
    let (s, t) = (&old.settings, &new.settings);
    differ("extent", &s.extent, &t.extent);
    differ("threads of each proxy", &s.workers.to_string(), &t.workers.to_string());
    let programs: BTreeSet<&String> = old.versions.keys().chain(new.versions.keys()).collect();
    for program in programs {
        let version = |report: &Report| report.versions.get(program).map_or("none".to_owned(), Clone::clone);
        differ(program, &version(old), &version(new));
    }
    for (then, now) in scenarios(old, new) {
        differ(&format!("{}: the arm of ratios", then.name), first(then), first(now));
        for arm in &then.arms {
            let Some(other) = now.arms.iter().find(|a| a.name == arm.name) else { continue };
            if arm.tls != other.tls {
                differ(&format!("{}, {}: TLS", then.name, arm.name), &tls(&arm.tls), &tls(&other.tls));
            }
        }
    }
    for (which, report) in [("older", old), ("newer", new)] {
        if !report.faults.is_empty() {
            all.push(format!("the {which} benchmark failed: {}", count(report.faults.len() as u64, "fault")));
        }
    }
    all
}

/// Arms and tasks with numbers in one of them only: the old one's, the new one's.
pub(super) fn only_in_one(old: &Report, new: &Report) -> (Vec<String>, Vec<String>) {
    (missing(old, new), missing(new, old))
}

/// What `there` has and `here` has not, in the words of the largest thing that is missing.
fn missing(there: &Report, here: &Report) -> Vec<String> {
    let mut all = Vec::new();
    for scenario in &there.scenarios {
        let Some(other) = here.scenarios.iter().find(|s| s.name == scenario.name) else {
            all.push(format!("scenario {}", plain(&scenario.name)));
            continue;
        };
        let runs = |s: &Scenario, arm: &str| s.cells.iter().any(|c| c.arm == arm && !c.runs.is_empty());
        let name = plain(&scenario.name);
        for arm in scenario.arms.iter().filter(|arm| runs(scenario, &arm.name) && !runs(other, &arm.name)) {
            all.push(format!("{name}: arm {}", plain(&arm.name)));
        }
        for task in scenario.workloads.iter().filter(|t| !other.workloads.iter().any(|o| o.name == t.name)) {
            all.push(format!("{name}: {}", plain(&task.name)));
        }
        for cell in scenario.cells.iter().filter(|cell| !cell.runs.is_empty()) {
            let known = runs(other, &cell.arm) && other.workloads.iter().any(|o| o.name == cell.task);
            if known && other.runs(&cell.arm, &cell.task).is_empty() {
                all.push(format!("{name}: {} on {}", plain(&cell.task), plain(&cell.arm)));
            }
        }
    }
    all
}

fn scenarios<'r>(old: &'r Report, new: &'r Report) -> impl Iterator<Item = (&'r Scenario, &'r Scenario)> {
    let other = |then: &&'r Scenario| new.scenarios.iter().find(|now| now.name == then.name);
    old.scenarios.iter().filter_map(move |then| Some((then, other(&then)?)))
}

fn first(scenario: &Scenario) -> &str {
    scenario.baseline().map_or("none", |arm| &arm.name)
}

fn tls(tls: &Option<Tls>) -> String {
    tls.as_ref().map_or("none".to_owned(), |t| format!("{}, {}, {}", t.version, t.cipher, t.group))
}
