//! What rules that have nothing to do with a connection add to it.
//!
//! Per workload a picture with a panel for each way to run it (captured, uncaptured), a line per family. What is drawn is a
//! difference of two runs of the same round.

use crate::bench::{
    model::{Arm, Scenario, Task},
    report::words::plain,
    stats::{Metric, Summary},
};

use super::{
    Plot,
    lines::{self, Lines, Series},
    looks::{Look, Looks},
    panel_title,
    scale::{Kind, Scale},
    sheet::Sheet,
    titled, way,
};

pub(super) fn plots(scenario: &Scenario, looks: &Looks) -> Vec<Plot> {
    let mut workloads = Vec::new();
    for task in &scenario.workloads {
        if !workloads.contains(&task.workload) {
            workloads.push(task.workload);
        }
    }
    let tasks = |workload| scenario.workloads.iter().filter(move |t| t.workload == workload && !t.witness);
    workloads.into_iter().filter_map(|w| plot(scenario, looks, &tasks(w).collect::<Vec<_>>())).collect()
}

fn plot(scenario: &Scenario, looks: &Looks, tasks: &[&Task]) -> Option<Plot> {
    let base = &scenario.baseline()?.name;
    let families = families(scenario);
    let mut panels: Vec<(String, Vec<Series>)> = Vec::new();
    for task in tasks {
        let series = families.iter().filter_map(|family| {
            let (color, mark) = looks.of_family(family);
            let points = points(scenario, base, family, task);
            let look = Look { color, mark, hollow: false };
            (!points.is_empty()).then(|| Series { look, label: plain(family), points, marked: true })
        });
        let series: Vec<Series> = series.collect();
        if !series.is_empty() {
            let title =
                way(task).map_or_else(|| panel_title(task), |way| format!("Connections that are {way}"));
            panels.push((title, series));
        }
    }
    // One number of rules is no axis.
    if !panels.iter().any(|(_, all)| all.iter().any(|one| one.points.len() > 1)) {
        return None;
    }
    let what = plain(&tasks.first()?.title);
    let title = titled(scenario, &format!("what rules cost ({what})"));
    let about = format!(
        "Microseconds that the median (p50) is above “{}”, by the number of unrelated rules; lower is \
         better. Lines: median of the differences, round by round; bands: their middle half. Each panel has \
         its own scale.",
        plain(base)
    );
    let most = panels.iter().flat_map(|(_, all)| all).filter_map(|one| one.points.last()).map(|(x, _)| *x);
    let most = most.fold(0.0, f64::max);
    let panels = panels.into_iter().map(|(title, series)| {
        let y =
            Scale::from_zero(series.iter().flat_map(|one| one.points.iter().flat_map(|(_, s)| [s.q1, s.q3])));
        // Ticks where there are measurements, and nowhere else.
        let x = Scale::new(Kind::Counts, 0.0, most);
        let measured = x
            .ticks()
            .iter()
            .filter(|(n, _)| series.iter().any(|one| one.points.iter().any(|(x, _)| (x - n).abs() < 0.5)));
        let measured = measured.cloned().collect();
        Lines { title, series, x: x.at_these(measured), y: y.about(5) }
    });
    let panels: Vec<Lines> = panels.collect();
    let sheet = Sheet { title: &title, about: &about, key: Vec::new() };
    let svg = lines::draw(&sheet, &panels, ["unrelated rules", "µs added"]);
    let caption = "The rules that are counted are about other connections than those measured. A flat line \
                   means that what a connection costs does not depend on how many rules there are.";
    let caption = caption.to_owned();
    let word = tasks.first()?.workload.to_string();
    Some(Plot::new(scenario, &format!("rules-{word}"), title, caption, svg))
}

/// Those of which arms differ in rules, in their order.
fn families(scenario: &Scenario) -> Vec<&str> {
    let mut all: Vec<&str> = Vec::new();
    for arm in scenario.arms.iter().filter(|arm| arm.rules.is_some()) {
        if !all.contains(&arm.family.as_str()) {
            all.push(&arm.family);
        }
    }
    all
}

fn points(scenario: &Scenario, base: &str, family: &str, task: &Task) -> Vec<(f64, Summary)> {
    let mut arms: Vec<&Arm> = scenario.arms.iter().filter(|arm| arm.family == family).collect();
    arms.sort_by_key(|arm| arm.rules);
    let point = |arm: &Arm| {
        let pairs = scenario.pairs(base, &arm.name, &task.name, Metric::P50);
        Some((arm.rules? as f64, Summary::new(pairs.into_iter().map(|(under, over)| over - under))?))
    };
    arms.into_iter().filter_map(point).collect()
}
