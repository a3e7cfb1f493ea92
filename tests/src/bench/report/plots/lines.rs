//! Lines over an axis, in panels: medians, and the middle half of rounds as bands.

use plotters::prelude::*;

use crate::bench::stats::Summary;

use super::{
    looks::Look,
    scale::Scale,
    sheet::{Area, Drawn, Grid, Sheet, label, mark, panel, stroke, widest},
};

/// A line with what stands at its end.
pub(super) struct Series {
    pub(super) look: Look,
    pub(super) label: String,
    /// `x`, and the median and quartiles there.
    pub(super) points: Vec<(f64, Summary)>,
    /// Whether each point has a mark, or only the last.
    pub(super) marked: bool,
}

/// A panel.
pub(super) struct Lines {
    pub(super) title: String,
    pub(super) series: Vec<Series>,
    pub(super) x: Scale,
    pub(super) y: Scale,
}

/// Between the middles of two labels, as a share of a panel's height.
const APART: f64 = 0.075;
/// Beside the data, for ticks and what they count.
const LEFT: u32 = 62;

/// Panels in two columns.
pub(super) fn draw(sheet: &Sheet<'_>, panels: &[Lines], [x_unit, y_unit]: [&str; 2]) -> String {
    let labels = panels.iter().flat_map(|p| &p.series).map(|one| one.label.as_str());
    let right = widest(labels) + 20;
    let grid = Grid { columns: panels.len().min(2), panels: panels.len(), height: 290 };
    sheet.draw(grid, |index, area| one(area, &panels[index], [x_unit, y_unit], right))
}

fn one(area: &Area<'_>, lines: &Lines, [x_unit, y_unit]: [&str; 2], right: u32) -> Drawn {
    let axes = [(lines.x.clone(), x_unit), (lines.y.clone(), y_unit)];
    let [x, y] = axes;
    let mut chart = panel(area, &lines.title, x, y, (LEFT, right))?;
    // Bands first, then lines, then words: nothing hides a median.
    for one in lines.series.iter().filter(|one| one.points.len() > 1) {
        let upper = one.points.iter().map(|(x, s)| (*x, s.q3));
        let lower = one.points.iter().rev().map(|(x, s)| (*x, s.q1));
        let outline: Vec<(f64, f64)> = upper.chain(lower).collect();
        chart.draw_series([Polygon::new(outline, one.look.color.mix(0.15))])?;
    }
    for one in &lines.series {
        let points: Vec<(f64, f64)> = one.points.iter().map(|(x, s)| (*x, s.median)).collect();
        let style = stroke(one.look.color, 2.0);
        if one.look.hollow {
            chart.draw_series(DashedLineSeries::new(points.iter().copied(), 50, 30, style))?;
        } else {
            chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
        }
        let skipped = if one.marked { 0 } else { points.len().saturating_sub(1) };
        chart.draw_series(points.iter().skip(skipped).map(|at| mark(*at, one.look)))?;
    }
    // The names stand right of the panel, each as near to the end of its line as the others allow.
    let mut ends: Vec<(f64, &Series)> =
        lines.series.iter().filter_map(|one| Some((lines.y.at(one.points.last()?.1.median), one))).collect();
    ends.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let places = apart(&ends.iter().map(|(at, _)| *at).collect::<Vec<_>>());
    let edge = lines.x.value_at(1.0);
    for ((_, one), place) in ends.into_iter().zip(places) {
        label(&mut chart, (edge, lines.y.value_at(place)), &one.label, one.look.color)?;
    }
    Ok(())
}

/// Places on an axis from 0 to 1, in order, as near to the wanted ones as can be, and not closer than [`APART`].
fn apart(wanted: &[f64]) -> Vec<f64> {
    // Upwards, then from the top back down where that went too far.
    let mut places: Vec<f64> = Vec::new();
    for place in wanted {
        let lowest = places.last().map_or(0.0, |last| last + APART);
        places.push(place.max(lowest));
    }
    let mut highest = 1.0_f64.max(APART * wanted.len().saturating_sub(1) as f64);
    for place in places.iter_mut().rev() {
        *place = place.min(highest);
        highest = *place - APART;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Labels keep their order, and do not lie on each other.
    #[test]
    fn labels_keep_their_order_and_a_line_between_them() {
        assert_eq!(apart(&[0.1, 0.5]), [0.1, 0.5]);
        assert_eq!(apart(&[0.0, 0.01]), [0.0, APART]);
        assert_eq!(apart(&[0.99, 1.0]), [1.0 - APART, 1.0]);
        let crowd = apart(&[0.5; 20]);
        assert!(crowd.windows(2).all(|pair| pair[1] - pair[0] > APART * 0.99), "{crowd:?}");
        assert_eq!(apart(&[]), [0.0; 0]);
    }
}
