//! What idle connections hold.
//!
//! A panel per place (the proxies, the kernel), a line per arm over the number of connections. Bytes are per connection, above
//! what was held before they came.

use crate::{
    bench::{
        model::{Role, Scenario},
        report::{number::tick, words::plain},
        stats::{Metric, Summary},
    },
    load::Workload,
};

use super::{
    Plot,
    lines::{self, Lines, Series},
    looks::{Looks, drawn},
    ran,
    scale::{Kind, Scale, range},
    sheet::Sheet,
    titled,
};

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
    let measured: Vec<_> = tasks.iter().map(|(n, _)| (*n, tick(*n))).collect();
    let panels = panels.into_iter().map(|(title, series)| {
        let values = series.iter().flat_map(|one| one.points.iter().flat_map(|(_, s)| [s.q1, s.q3]));
        let y = Scale::from_zero(values).about(5);
        let x = Scale::new(Kind::Log, fewest, most).at_these(measured.clone());
        Lines { title: title.to_owned(), series, x, y }
    });
    let panels: Vec<Lines> = panels.collect();
    let sheet = Sheet::new(&title, about, scenario, looks, &arms);
    let svg = lines::draw(&sheet, &panels, ["connections", "KiB per connection"]);
    let caption = "Connections that carried 64 bytes both ways and then nothing. What a program or the \
                   kernel takes once, and not for each of them, weighs less the more there are. What the \
                   kernel holds is of the whole machine: both ends and everything between.";
    Some(Plot::new(scenario, "memory", title, caption.to_owned(), svg))
}
