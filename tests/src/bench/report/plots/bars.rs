//! Bars: throughput, and what it costs in processor time.
//!
//! A panel per workload with a bar per arm from 0, its value beside it. Panels share their scale where the subtitle does not
//! say otherwise.

use plotters::prelude::*;

use crate::{
    bench::{
        model::{Arm, Role, Run, Scenario, Task},
        report::{number::number, words::plain},
        stats::{Metric, Summary},
    },
    load::{Direction, Workload},
};

use super::{
    Plot,
    looks::{ENDS, INK, Look, Looks, Mark, SOFT, drawn},
    panel_title, ran,
    scale::Scale,
    sheet::{self, Area, Chart, Drawn, Sheet, WIDTH, label, mark, panel, stroke, text_width, widest},
    titled,
};

/// The height of a row, and of what is above and below the rows.
const ROW: u32 = 21;
const AROUND: u32 = 78;
/// The share of a row that is its bar, above and below the middle.
const BAR: f64 = 0.31;
/// Beside the longest bar, for its value.
const VALUE: u32 = 46;

/// What processor time is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Per {
    /// 10⁹ bytes of payload.
    Gigabyte,
    /// Operations.
    Thousand,
}

/// A bar: pieces from 0, its value, and how far rounds were apart.
struct Bar {
    pieces: Vec<(Option<Role>, f64)>,
    total: Summary,
    /// What iperf3 says of the same.
    witness: Option<f64>,
}

/// A panel: one workload.
struct Bars {
    title: String,
    bars: Vec<Option<Bar>>,
}

/// Panels in a grid.
struct Grid<'s> {
    scenario: &'s Scenario,
    looks: &'s Looks,
    arms: Vec<&'s Arm>,
    columns: usize,
    panels: Vec<Bars>,
    unit: &'static str,
    shared: bool,
}

/// Up and down, by the number of streams.
pub(super) fn throughput(scenario: &Scenario, looks: &Looks) -> Option<Plot> {
    let arms = arms(scenario);
    let bulk = |task: &&Task| matches!(task.workload, Workload::Bulk { .. });
    let mut tasks: Vec<&Task> = scenario.workloads.iter().filter(bulk).collect();
    let witnesses: Vec<&Task> = tasks.iter().copied().filter(|task| task.witness).collect();
    // Without the workload of its own beside it, the witness has a panel.
    tasks.retain(|task| {
        !task.witness || !scenario.workloads.iter().any(|t| !t.witness && t.workload == task.workload)
    });
    tasks.sort_by_key(|task| match task.workload {
        Workload::Bulk { streams, direction } => (direction == Direction::Down, streams),
        _ => (true, u32::MAX),
    });
    let ups = tasks
        .iter()
        .filter(|t| matches!(t.workload, Workload::Bulk { direction: Direction::Up, .. }))
        .count();
    let columns = ups.max(tasks.len() - ups).clamp(1, 3);
    let panels = tasks.iter().map(|task| Bars {
        title: panel_title(task),
        bars: arms
            .iter()
            .map(|arm| {
                let total = scenario.summary(&arm.name, &task.name, Metric::Gbits)?;
                let same = witnesses.iter().find(|w| w.workload == task.workload && w.name != task.name);
                let witness = same.and_then(|w| scenario.summary(&arm.name, &w.name, Metric::Gbits));
                Some(Bar { pieces: vec![(None, total.median)], total, witness: witness.map(|w| w.median) })
            })
            .collect(),
    });
    let panels: Vec<Bars> = panels.filter(|panel| panel.bars.iter().any(Option::is_some)).collect();
    let witnessed = panels.iter().flat_map(|p| p.bars.iter().flatten()).any(|bar| bar.witness.is_some());
    if panels.is_empty() {
        return None;
    }
    let title = titled(scenario, "throughput");
    let mut about =
        "Gbit/s of payload; more is better. Bars: median over rounds; whiskers: the middle half of \
                     them. All panels have one scale."
            .to_owned();
    if witnessed {
        about.push_str(" Rings: iperf3 on the same way, the outside witness.");
    }
    let grid = Grid { scenario, looks, arms, columns, panels, unit: "Gbit/s", shared: true };
    let sheet = Sheet { title: &title, about: &about, key: Vec::new() };
    let svg = grid.draw(&sheet);
    let caption = "Payload as the receiving application counts it; what TLS, HTTP/2 and TCP add is not in \
                   it. All parts of an arm, both ends included, share the machine's processors.";
    Some(Plot::new(scenario, "throughput", title, caption.to_owned(), svg))
}

/// By the part that used it.
pub(super) fn cpu(scenario: &Scenario, looks: &Looks, per: Per) -> Option<Plot> {
    let arms = arms(scenario);
    let metric = match per {
        Per::Gigabyte => Metric::CpuPerGb,
        Per::Thousand => Metric::CpuPerThousand,
    };
    let tasks = scenario.workloads.iter().filter(|task| Metric::of(task.workload).contains(&metric));
    let panels = tasks.map(|task| Bars {
        title: panel_title(task),
        bars: arms
            .iter()
            .map(|arm| {
                let total = scenario.summary(&arm.name, &task.name, metric)?;
                let runs = scenario.runs(&arm.name, &task.name);
                let piece = |role| Some((Some(role), part(runs, role, metric)?));
                Some(Bar { pieces: Role::ALL.into_iter().filter_map(piece).collect(), total, witness: None })
            })
            .collect(),
    });
    let panels: Vec<Bars> = panels.filter(|panel| panel.bars.iter().any(Option::is_some)).collect();
    if panels.is_empty() {
        return None;
    }
    let (what, name, unit, shared, scale) = match per {
        Per::Gigabyte => {
            ("processor time per gigabyte", "cpu-per-gb", "s/GB", true, "All panels have one scale.")
        }
        Per::Thousand => (
            "processor time per 1,000 operations",
            "cpu-per-1000",
            "s/1000",
            false,
            "Each panel has its own scale.",
        ),
    };
    let title = titled(scenario, what);
    let about = format!(
        "Processor seconds, user and system, of every part (cgroup cpu.stat); less is better. Medians over \
         rounds; the number and the whisker (the middle half of rounds) are of the sum. {scale}"
    );
    // Two titles side by side have to be legible; a third of the sheet is enough for most.
    let widest = panels.iter().map(|panel| text_width(&panel.title)).fold(0.0, f64::max);
    let columns = if panels.len() > 4 && widest < f64::from(WIDTH) / 3.6 { 3 } else { panels.len().min(2) };
    let grid = Grid { scenario, looks, arms, columns, panels, unit, shared };
    let about = format!("{about} {}", parts(&grid));
    let sheet = Sheet { title: &title, about: &about, key: Vec::new() };
    let svg = grid.draw(&sheet);
    let caption = "What the application (client), the proxies and the server used, stacked in the order in \
                   which a byte meets them. What the kernel does for packets outside of any process is in \
                   none of them.";
    Some(Plot::new(scenario, name, title, caption.to_owned(), svg))
}

fn arms(scenario: &Scenario) -> Vec<&Arm> {
    drawn(scenario).into_iter().filter(|arm| ran(scenario, &arm.name)).collect()
}

/// Of one part alone: the metric of runs in which it was the only one.
fn part(runs: &[Run], role: Role, metric: Metric) -> Option<f64> {
    let alone = runs.iter().filter_map(|run| {
        let seconds = *run.cpu.get(&role)?;
        metric.value(&Run { cpu: [(role, seconds)].into(), ..run.clone() })
    });
    Summary::new(alone).map(|summary| summary.median)
}

/// A part's colour: the proxies are in their arm's, both ends of it in grey.
fn shade(role: Option<Role>, look: Look) -> RGBAColor {
    match role {
        None => look.color.mix(0.85),
        Some(Role::Client) => ENDS[0].mix(1.0),
        Some(Role::Near) => look.color.mix(1.0),
        Some(Role::Far) => look.color.mix(0.55),
        Some(Role::Server) => ENDS[1].mix(1.0),
    }
}

/// What the pieces of a bar are, of those that there are.
fn parts(grid: &Grid<'_>) -> String {
    let used = |role: &Role| {
        let cells = || grid.scenario.cells.iter().flat_map(|cell| &cell.runs);
        cells().any(|run| run.cpu.contains_key(role))
    };
    let names = Role::ALL.into_iter().filter(used).map(|role| match role {
        Role::Client | Role::Server => format!("{role} (grey)"),
        Role::Near => format!("{role} (colour)"),
        Role::Far => format!("{role} (light)"),
    });
    format!("Pieces, from the left: {}.", names.collect::<Vec<_>>().join(", "))
}

impl Grid<'_> {
    fn draw(&self, sheet: &Sheet<'_>) -> String {
        let shared = scale(&self.panels);
        let height = ROW * u32::try_from(self.arms.len()).unwrap_or(u32::MAX) + AROUND;
        let grid = sheet::Grid { columns: self.columns, panels: self.panels.len(), height };
        sheet.draw(grid, |index, area| {
            let panel = &self.panels[index];
            let own = || scale(std::slice::from_ref(panel));
            self.panel(area, panel, if self.shared { shared.clone() } else { own() })
        })
    }

    fn panel(&self, area: &Area<'_>, bars: &Bars, scale: Scale) -> Drawn {
        let names: Vec<String> = self.arms.iter().map(|arm| plain(&arm.name)).collect();
        let left = widest(names.iter().map(String::as_str)) + 12;
        let axis = (scale.about(4), self.unit);
        let mut chart = panel(area, &bars.title, axis, (Scale::rows(names), ""), (left, VALUE))?;
        for (index, (arm, bar)) in self.arms.iter().zip(&bars.bars).enumerate() {
            let middle = index as f64 + 0.5;
            match bar {
                Some(bar) => self.bar(&mut chart, arm, bar, middle)?,
                None => label(&mut chart, (0.0, middle), "not measured", SOFT)?,
            }
        }
        Ok(())
    }

    fn bar(&self, chart: &mut Chart<'_, '_>, arm: &Arm, bar: &Bar, middle: f64) -> Drawn {
        let look = self.looks.of(self.scenario, arm);
        let mut from = 0.0;
        for (role, value) in &bar.pieces {
            let corners = [(from, middle - BAR), (from + value, middle + BAR)];
            chart.draw_series([Rectangle::new(corners, shade(*role, look).filled())])?;
            from += value;
        }
        let Summary { q1, q3, .. } = bar.total;
        chart.draw_series([PathElement::new([(q1, middle), (q3, middle)], stroke(INK, 1.4))])?;
        let mut end = q3.max(from);
        if let Some(witness) = bar.witness {
            let ring = Look { color: INK, mark: Mark::Circle, hollow: true };
            chart.draw_series([mark((witness, middle), ring)])?;
            end = end.max(witness);
        }
        label(chart, (end, middle), &number(bar.total.median), INK)
    }
}

fn scale(panels: &[Bars]) -> Scale {
    Scale::from_zero(panels.iter().flat_map(|p| p.bars.iter().flatten()).flat_map(|bar| {
        let pieces: f64 = bar.pieces.iter().map(|(_, v)| v).sum();
        [bar.total.q3, pieces, bar.witness.unwrap_or(0.0)]
    }))
}
