//! A rectangle with two axes and what is drawn against them.
//!
//! Enters: scales and values. Leaves: shapes on a sheet. Invariant: labels at the ends of lines do not lie
//! upon each other.

use crate::bench::stats::Summary;

use super::{
    looks::Look,
    scale::{Scale, Tick},
    svg::{Anchor, GRID, INK, SOFT, Stroke, Svg, fitting, text_width},
};

/// Between the baselines of two labels.
const LEADING: f64 = 14.0;
/// Below a panel, for ticks and what they count.
pub(super) const FOOT: f64 = 42.0;

/// Where it is, and what its axes are.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) x: Scale,
    pub(super) y: Scale,
}

/// What stands along an axis.
pub(super) struct Axis<'t> {
    pub(super) unit: &'t str,
    pub(super) ticks: &'t [Tick],
}

/// A line with what stands at its end.
pub(super) struct Series {
    pub(super) look: Look,
    pub(super) label: String,
    /// `x`, and the median and quartiles there.
    pub(super) points: Vec<(f64, Summary)>,
    /// Whether each point has a mark, or only the last.
    pub(super) marked: bool,
}

impl Panel {
    pub(super) fn place(&self, x: f64, y: f64) -> (f64, f64) {
        (self.left + self.x.at(x) * self.width, self.top + (1.0 - self.y.at(y)) * self.height)
    }

    /// Grid, ticks, and the words around them.
    pub(super) fn axes(&self, svg: &mut Svg, title: &str, [x, y]: [Axis<'_>; 2]) {
        let (right, bottom) = (self.left + self.width, self.top + self.height);
        svg.paint(INK, |svg| svg.bold(self.left, self.top - 26.0, 13.0, &fitting(title, self.width * 1.2)));
        svg.paint(GRID, |svg| {
            for (value, _) in y.ticks {
                let y = self.place(0.0, *value).1;
                svg.line((self.left, y), (right, y), 1.0);
            }
            for (value, _) in x.ticks {
                let x = self.left + self.x.at(*value) * self.width;
                svg.line((x, self.top), (x, bottom + 4.0), 1.0);
            }
        });
        svg.paint(SOFT, |svg| {
            svg.text(self.left, self.top - 9.0, Anchor::Start, y.unit);
            svg.text(right, bottom + 34.0, Anchor::End, x.unit);
            for (value, label) in y.ticks {
                svg.text(self.left - 7.0, self.place(0.0, *value).1 + 4.3, Anchor::End, label);
            }
            for (value, label) in x.ticks {
                let x = self.left + self.x.at(*value) * self.width;
                svg.text(x, bottom + 18.0, Anchor::Middle, label);
            }
        });
    }

    /// Bands first, then lines, then words: nothing hides a median.
    pub(super) fn series(&self, svg: &mut Svg, all: &[Series]) {
        for one in all.iter().filter(|one| one.points.len() > 1) {
            let upper = one.points.iter().map(|(x, s)| self.place(*x, s.q3));
            let lower = one.points.iter().rev().map(|(x, s)| self.place(*x, s.q1));
            let outline: Vec<(f64, f64)> = upper.chain(lower).collect();
            svg.paint(one.look.paint, |svg| svg.area(&outline, 0.15));
        }
        for one in all {
            let points: Vec<(f64, f64)> = one.points.iter().map(|(x, s)| self.place(*x, s.median)).collect();
            svg.paint(one.look.paint, |svg| {
                svg.polyline(&points, Stroke { width: 2.0, dashed: one.look.hollow });
                for (index, (x, y)) in points.iter().enumerate() {
                    if one.marked || index + 1 == points.len() {
                        svg.mark(*x, *y, one.look.mark, one.look.hollow);
                    }
                }
            });
        }
        self.labels(svg, all);
    }

    fn labels(&self, svg: &mut Svg, all: &[Series]) {
        let end = |one: &Series| one.points.last().map(|(x, s)| self.place(*x, s.median));
        let mut ends: Vec<(&Series, (f64, f64))> =
            all.iter().filter_map(|one| Some((one, end(one)?))).collect();
        ends.sort_by(|(_, a), (_, b)| a.1.total_cmp(&b.1));
        let places =
            apart(&ends.iter().map(|(_, end)| end.1).collect::<Vec<_>>(), self.top, self.top + self.height);
        let x = ends.iter().map(|(_, end)| end.0).fold(0.0, f64::max) + 18.0;
        for ((one, end), y) in ends.into_iter().zip(places) {
            svg.paint(one.look.paint, |svg| {
                if (y - end.1).abs() > 2.0 || x - end.0 > 20.0 {
                    svg.line((end.0 + 6.5, end.1), (x - 3.0, y), 0.8);
                }
                svg.text(x, y + 4.3, Anchor::Start, &one.label);
            });
        }
    }

    /// Room that labels at the ends need to the right of it.
    pub(super) fn label_room<'l>(labels: impl IntoIterator<Item = &'l str>) -> f64 {
        labels.into_iter().map(text_width).fold(0.0, f64::max) + 22.0
    }
}

/// Places as near to the wanted ones as can be, in their order, and not closer than a line of text.
fn apart(wanted: &[f64], top: f64, bottom: f64) -> Vec<f64> {
    // Labels that touch become a block, which stands where its members want to be on average.
    let mut blocks: Vec<(f64, usize)> = Vec::new();
    let height = |count: usize| LEADING * count.saturating_sub(1) as f64;
    for place in wanted {
        let mut block = (*place, 1);
        while let Some((centre, count)) = blocks.last().copied()
            && centre + height(count) / 2.0 + LEADING > block.0 - height(block.1) / 2.0
        {
            blocks.pop();
            let both = count + block.1;
            block = ((centre * count as f64 + block.0 * block.1 as f64) / both as f64, both);
        }
        blocks.push(block);
    }
    let all = blocks.into_iter().flat_map(|(centre, count)| {
        (0..count).map(move |index| centre - height(count) / 2.0 + LEADING * index as f64)
    });
    let mut places: Vec<f64> = all.collect();
    // What stands out at an end comes back in, and pushes the others.
    let mut limit = top;
    for place in &mut places {
        *place = place.max(limit);
        limit = *place + LEADING;
    }
    let mut limit = bottom.max(top + height(places.len()));
    for place in places.iter_mut().rev() {
        *place = place.min(limit);
        limit = *place - LEADING;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_keep_their_order_and_a_line_between_them() {
        assert_eq!(apart(&[10.0, 50.0], 0.0, 100.0), [10.0, 50.0]);
        assert_eq!(apart(&[40.0, 41.0, 42.0], 0.0, 100.0), [27.0, 41.0, 55.0]);
        assert_eq!(apart(&[2.0, 3.0], 0.0, 100.0), [0.0, 14.0]);
        assert_eq!(apart(&[98.0, 99.0], 0.0, 100.0), [86.0, 100.0]);
        assert_eq!(apart(&[], 0.0, 100.0), [0.0; 0]);
    }
}
