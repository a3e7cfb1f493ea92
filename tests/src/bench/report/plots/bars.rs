//! Bars: throughput, and what it costs in processor time.
//!
//! Enters: a scenario. Leaves: a panel per workload with a bar per arm from 0, its value beside it.
//! Invariant: panels share their scale where the subtitle does not say otherwise.

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
    looks::{Look, Looks, drawn},
    panel_title, ran,
    scale::Scale,
    sheet::{MARGIN, Sheet, WIDTH},
    svg::{Anchor, GRID, INK, Mark, Paint, SOFT, Svg, fitting, text_width},
    titled,
};

const ROW: f64 = 21.0;
const BAR: f64 = 13.0;
/// Beside the longest bar, for its value.
const VALUE: f64 = 46.0;
const GAP: f64 = 18.0;

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
    let mut sheet = Sheet::new(&title, &about);
    grid.draw(&mut sheet);
    let caption = "Payload as the receiving application counts it; what TLS, HTTP/2 and TCP add is not in \
                   it. All parts of an arm, both ends included, share the machine's processors.";
    Some(Plot::new(scenario, "throughput", title, caption.to_owned(), sheet.finish()))
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
    let columns = if panels.len() > 4 && widest < WIDTH / 3.6 { 3 } else { panels.len().min(2) };
    let grid = Grid { scenario, looks, arms, columns, panels, unit, shared };
    let mut sheet = Sheet::new(&title, &about);
    parts(&mut sheet, &grid);
    grid.draw(&mut sheet);
    let caption = "What the application (client), the proxies and the server used, stacked in the order in \
                   which a byte meets them. What the kernel does for packets outside of any process is in \
                   none of them.";
    Some(Plot::new(scenario, name, title, caption.to_owned(), sheet.finish()))
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

/// How dark a part is: the proxies are in their arm's colour, both ends of it in grey.
fn shade(role: Option<Role>, look: Look) -> (Paint, f64) {
    match role {
        None => (look.paint, 0.85),
        Some(Role::Client) => (SOFT, 0.5),
        Some(Role::Near) => (look.paint, 1.0),
        Some(Role::Far) => (look.paint, 0.55),
        Some(Role::Server) => (SOFT, 0.28),
    }
}

/// The key of parts, in the order in which they are stacked; the proxies' in the colour of each arm that has
/// some.
fn parts(sheet: &mut Sheet, grid: &Grid<'_>) {
    const SIDE: f64 = 12.0;
    sheet.y += 12.0;
    let mut x = MARGIN;
    let y = sheet.y;
    for role in Role::ALL {
        let runs = |arm: &&&Arm| {
            let cells = grid.scenario.cells.iter().filter(|cell| cell.arm == arm.name);
            cells.flat_map(|cell| &cell.runs).any(|run| run.cpu.contains_key(&role))
        };
        let mut shades: Vec<(Paint, f64)> = Vec::new();
        for arm in grid.arms.iter().filter(runs) {
            let shade = shade(Some(role), grid.looks.of(grid.scenario, arm));
            if !shades.contains(&shade) {
                shades.push(shade);
            }
        }
        if shades.is_empty() {
            continue;
        }
        for (paint, opacity) in shades {
            sheet.svg.paint(paint, |svg| svg.bar((x, y - 10.0), (SIDE, SIDE), opacity));
            x += SIDE;
        }
        let text = role.to_string();
        sheet.svg.paint(INK, |svg| svg.text(x + 6.0, y, Anchor::Start, &text));
        x += 6.0 + text_width(&text) + 18.0;
    }
    sheet.y += 8.0;
}

impl Grid<'_> {
    fn draw(&self, sheet: &mut Sheet) {
        let names: Vec<String> = self.arms.iter().map(|arm| plain(&arm.name)).collect();
        let name_room = names.iter().map(|name| text_width(name)).fold(0.0, f64::max) + 10.0;
        let columns = self.columns as f64;
        let wide = (WIDTH - 2.0 * MARGIN - name_room - GAP * (columns - 1.0)) / columns - VALUE;
        let all = |panels: &[Bars]| -> Scale {
            Scale::from_zero(panels.iter().flat_map(|p| p.bars.iter().flatten()).flat_map(|bar| {
                let pieces: f64 = bar.pieces.iter().map(|(_, v)| v).sum();
                [bar.total.q3, pieces, bar.witness.unwrap_or(0.0)]
            }))
        };
        let shared = all(&self.panels);
        for row in self.panels.chunks(self.columns) {
            let top = sheet.y + 36.0;
            for (index, name) in names.iter().enumerate() {
                let y = top + ROW * (index as f64 + 0.5);
                sheet.svg.paint(INK, |svg| svg.text(MARGIN + name_room - 8.0, y + 4.3, Anchor::End, name));
            }
            for (column, panel) in row.iter().enumerate() {
                let left = MARGIN + name_room + (wide + VALUE + GAP) * column as f64;
                let scale = if self.shared { shared } else { all(std::slice::from_ref(panel)) };
                self.panel(&mut sheet.svg, panel, scale, (left, top), wide);
            }
            sheet.y = top + ROW * names.len() as f64 + 26.0;
        }
    }

    fn panel(&self, svg: &mut Svg, panel: &Bars, scale: Scale, (left, top): (f64, f64), wide: f64) {
        let bottom = top + ROW * self.arms.len() as f64;
        let place = |value: f64| left + scale.at(value) * wide;
        svg.paint(INK, |svg| svg.bold(left, top - 9.0, 13.0, &fitting(&panel.title, wide + VALUE)));
        let ticks = scale.ticks(4);
        svg.paint(GRID, |svg| {
            for (value, _) in &ticks {
                svg.line((place(*value), top), (place(*value), bottom + 4.0), 1.0);
            }
        });
        svg.paint(SOFT, |svg| {
            for (index, (value, label)) in ticks.iter().enumerate() {
                let text =
                    if index + 1 == ticks.len() { format!("{label} {}", self.unit) } else { label.clone() };
                // The unit hangs over to the right, the number stays under its line.
                let shift = text_width(label) / 2.0;
                svg.text(place(*value) - shift, bottom + 18.0, Anchor::Start, &text);
            }
        });
        for (index, (arm, bar)) in self.arms.iter().zip(&panel.bars).enumerate() {
            let middle = top + ROW * (index as f64 + 0.5);
            let Some(bar) = bar else {
                svg.paint(SOFT, |svg| svg.text(left + 4.0, middle + 4.3, Anchor::Start, "not measured"));
                continue;
            };
            self.bar(svg, arm, bar, middle, &place);
        }
    }

    fn bar(&self, svg: &mut Svg, arm: &Arm, bar: &Bar, middle: f64, place: &dyn Fn(f64) -> f64) {
        let look = self.looks.of(self.scenario, arm);
        let mut from = 0.0;
        for (role, value) in &bar.pieces {
            let (paint, opacity) = shade(*role, look);
            let to = from + value;
            let size = (place(to) - place(from), BAR);
            svg.paint(paint, |svg| svg.bar((place(from), middle - BAR / 2.0), size, opacity));
            from = to;
        }
        let (q1, q3) = (place(bar.total.q1), place(bar.total.q3));
        svg.paint(INK, |svg| {
            svg.line((q1, middle), (q3, middle), 1.4);
            // Closer together, the ends would be a blot.
            for end in [q1, q3].into_iter().filter(|_| q3 - q1 > 3.0) {
                svg.line((end, middle - 3.0), (end, middle + 3.0), 1.4);
            }
        });
        let mut end = q3.max(place(from));
        if let Some(witness) = bar.witness {
            svg.paint(INK, |svg| svg.mark(place(witness), middle, Mark::Circle, true));
            end = end.max(place(witness) + 5.0);
        }
        svg.paint(INK, |svg| svg.text(end + 6.0, middle + 4.3, Anchor::Start, &number(bar.total.median)));
    }
}
