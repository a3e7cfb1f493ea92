//! What idle connections hold.
//!
//! Enters: a scenario's idle workloads. Leaves: a panel per place (the proxies, the kernel), a line per arm
//! over the number of connections. Invariant: bytes are per connection, above what was held before they came.

use crate::{
    bench::{
        model::{Role, Scenario},
        report::words::plain,
        stats::{Metric, Summary},
    },
    load::Workload,
};

use super::{
    Plot,
    looks::{Looks, drawn},
    panel::{Axis, FOOT, Panel, Series},
    ran,
    scale::{Kind, Scale, range},
    sheet::{MARGIN, Sheet, WIDTH},
    titled,
};

const HEIGHT: f64 = 190.0;
const TICKS: f64 = 44.0;
const KIB: f64 = 1024.0;

/// A panel each.
const PLACES: [(&str, Metric); 4] = [
    ("Near proxy, resident", Metric::Resident(Role::Near)),
    ("Far proxy, resident", Metric::Resident(Role::Far)),
    ("Kernel, slabs (sockets themselves)", Metric::Slab),
    ("Kernel, TCP buffers", Metric::TcpMemory),
];

pub(super) fn plot(scenario: &Scenario, looks: &Looks) -> Option<Plot> {
    let arms: Vec<_> = drawn(scenario).into_iter().filter(|arm| ran(scenario, &arm.name)).collect();
    let mut tasks: Vec<(f64, &str)> = Vec::new();
    for task in &scenario.workloads {
        if let Workload::Idle { connections } = task.workload {
            tasks.push((connections.into(), &task.name));
        }
    }
    tasks.sort_by(|a, b| a.0.total_cmp(&b.0));
    let series = |metric: Metric| -> Vec<Series> {
        let of = |arm: &&crate::bench::model::Arm| {
            let kib = |s: Summary| Summary { median: s.median / KIB, q1: s.q1 / KIB, q3: s.q3 / KIB, n: s.n };
            let point = |(n, task): &(f64, &str)| Some((*n, kib(scenario.summary(&arm.name, task, metric)?)));
            let points: Vec<(f64, Summary)> = tasks.iter().filter_map(point).collect();
            // An arm without this proxy has nothing in it, which is not a measurement.
            let there = points.iter().any(|(_, s)| s.median != 0.0);
            let look = looks.of(scenario, arm);
            there.then(|| Series { look, label: plain(&arm.name), points, marked: true })
        };
        arms.iter().filter_map(of).collect()
    };
    let panels: Vec<(&str, Vec<Series>)> = PLACES
        .iter()
        .map(|(name, metric)| (*name, series(*metric)))
        .filter(|(_, all)| !all.is_empty())
        .collect();
    let counts = panels.iter().flat_map(|(_, all)| all).flat_map(|one| one.points.iter().map(|(n, _)| *n));
    let (fewest, most) = range(counts)?;
    let title = titled(scenario, "memory per idle connection");
    let about = "KiB per connection, by the number of connections, above what was held before they came; \
                 lower is better. Lines: median over rounds; bands: the middle half of them. Each panel has \
                 its own scale.";
    let mut sheet = Sheet::new(&title, about);
    sheet.arms(scenario, looks, &arms);
    let room = Panel::label_room(panels.iter().flat_map(|(_, all)| all.iter().map(|one| one.label.as_str())));
    let cell = (WIDTH - 2.0 * MARGIN) / 2.0;
    let x = Scale::new(Kind::Log, fewest, most);
    for row in panels.chunks(2) {
        let top = sheet.y + 50.0;
        for (column, (name, series)) in row.iter().enumerate() {
            let left = MARGIN + cell * column as f64 + TICKS;
            let values = series.iter().flat_map(|one| one.points.iter().flat_map(|(_, s)| [s.q1, s.q3]));
            let y = Scale::from_zero(values);
            let panel = Panel { left, top, width: cell - TICKS - room, height: HEIGHT, x, y };
            let measured: Vec<_> =
                tasks.iter().map(|(n, _)| (*n, crate::bench::report::number::tick(*n))).collect();
            let below = Axis { unit: "connections", ticks: &measured };
            let beside = Axis { unit: "KiB per connection", ticks: &y.ticks(5) };
            panel.axes(&mut sheet.svg, name, [below, beside]);
            panel.series(&mut sheet.svg, series);
        }
        sheet.y = top + HEIGHT + FOOT;
    }
    let caption = "Connections that carried 64 bytes both ways and then nothing. What a program or the \
                   kernel takes once, and not for each of them, weighs less the more there are. What the \
                   kernel holds is of the whole machine: both ends and everything between.";
    Some(Plot::new(scenario, "memory", title, caption.to_owned(), sheet.finish()))
}
