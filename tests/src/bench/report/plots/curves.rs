//! Latency by percentile.
//!
//! A panel per workload, a line per arm. A line ends where fewer than [`BEYOND`] measurements lie beyond it.

use crate::{
    bench::{
        model::{Run, Scenario},
        report::words::plain,
        stats::Summary,
    },
    load::Latency,
};

use super::{
    Plot,
    lines::{self, Lines, Series},
    looks::{Looks, drawn},
    panel_title, ran,
    scale::{Kind, Scale, nines},
    sheet::Sheet,
    titled,
};

/// Over all rounds: with fewer, a percentile is an anecdote.
const BEYOND: f64 = 10.0;
/// Points per factor of ten: enough for the eye, few enough for the file.
const POINTS: u32 = 8;
/// More nines than that no benchmark of seconds measures.
const MOST: u32 = 5;

pub(super) fn plot(scenario: &Scenario, looks: &Looks) -> Option<Plot> {
    let arms: Vec<_> = drawn(scenario).into_iter().filter(|arm| ran(scenario, &arm.name)).collect();
    let panels = scenario.workloads.iter().filter_map(|task| {
        let series = arms.iter().filter_map(|arm| {
            let points = merged(scenario.runs(&arm.name, &task.name));
            let label = plain(&arm.name);
            (points.len() > 1).then(|| Series { look: looks.of(scenario, arm), label, points, marked: false })
        });
        let series: Vec<Series> = series.collect();
        let last = series.iter().filter_map(|one| one.points.last()).map(|(q, _)| *q).fold(0.0, f64::max);
        let y = Scale::around(series.iter().flat_map(|one| one.points.iter().map(|(_, s)| s.median)));
        let x = Scale::new(Kind::Nines, 0.0, last);
        (!series.is_empty()).then(|| Lines { title: panel_title(task), series, x, y })
    });
    let panels: Vec<Lines> = panels.collect();
    if panels.is_empty() {
        return None;
    }
    let title = titled(scenario, "latency by percentile");
    let about = "Microseconds, logarithmic; lower is better. Lines: median over rounds at each percentile; \
                 bands: the middle half of rounds. Each panel has its own scale.";
    let sheet = Sheet::new(&title, about, scenario, looks, &arms);
    let svg = lines::draw(&sheet, &panels, ["percentile", "µs"]);
    let caption = "The axis stretches towards 100 %, so that as much room is between \
                   90 and 99 as between 99 and 99.9. Where a line rises steeply, few are slow by \
                   much. A line ends where fewer than ten measurements lie beyond it.";
    Some(Plot::new(scenario, "latency", title, caption.to_owned(), svg))
}

/// Quantile by quantile, the median and quartiles over runs.
fn merged(runs: &[Run]) -> Vec<(f64, Summary)> {
    let curves: Vec<&Latency> = runs.iter().filter_map(|run| run.outcome.latency.as_ref()).collect();
    let total: u64 = curves.iter().map(|latency| latency.count).sum();
    let all = (0..=MOST * POINTS).map(|step| 1.0 - 10f64.powf(-f64::from(step) / f64::from(POINTS)));
    let certain = all.filter(|q| (1.0 - q) * total as f64 >= BEYOND);
    certain.filter_map(|q| Some((q, Summary::new(curves.iter().filter_map(|c| at(c, q)))?))).collect()
}

/// In microseconds, between two points of the curve by how many nines they have.
fn at(latency: &Latency, quantile: f64) -> Option<f64> {
    let curve = &latency.curve;
    let index = curve.partition_point(|(q, _)| *q < quantile).min(curve.len().checked_sub(1)?);
    let micros = |nanos: u64| nanos as f64 / 1e3;
    let (next, high) = curve[index];
    let Some((before, low)) = index.checked_sub(1).map(|i| curve[i]).filter(|_| next < 1.0) else {
        return Some(micros(high));
    };
    let (from, to) = (nines(before), nines(next));
    let share = if to > from { ((nines(quantile) - from) / (to - from)).clamp(0.0, 1.0) } else { 1.0 };
    Some(micros(low) + (micros(high) - micros(low)) * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_read_between_its_points_and_not_beyond_them() {
        let curve = vec![(0.0, 10_000), (0.9, 20_000), (0.99, 30_000), (1.0, 99_000)];
        let latency = Latency { count: 100, curve, ..Latency::default() };
        let found =
            [0.0, 0.9, 1.0 - 10f64.powf(-1.5), 0.99, 0.999, 1.0].map(|q| at(&latency, q).unwrap().round());
        assert_eq!(found, [10.0, 20.0, 25.0, 30.0, 99.0, 99.0]);
        assert_eq!(at(&Latency::default(), 0.5), None);
    }
}
