//! Everything at a glance: every workload of every arm as a ratio to one of them.
//!
//! Enters: a scenario and an arm. Leaves: a row per workload, with the metric for which the workload is
//! there. Invariant: right of 1× is worse; what is better when it is more has been turned over.

use crate::bench::{
    model::{Arm, Scenario, Task},
    report::{
        number::ratio,
        words::{metrics, plain},
    },
    stats::{Better, Summary},
};

use super::{
    Plot,
    looks::{Looks, drawn},
    panel_title, ran,
    scale::Scale,
    sheet::{MARGIN, Sheet, WIDTH},
    svg::{Anchor, GRID, INK, SOFT, text_width},
    titled,
};

const ROW: f64 = 23.0;
/// Beside the data, for the outermost marks.
const AIR: f64 = 26.0;

struct Row<'s> {
    label: String,
    dots: Vec<(&'s Arm, Summary)>,
}

pub(super) fn plot(scenario: &Scenario, looks: &Looks, base: &str) -> Option<Plot> {
    let arms: Vec<&Arm> = drawn(scenario).into_iter().filter(|arm| ran(scenario, &arm.name)).collect();
    let base = scenario.arms.iter().find(|arm| arm.name == base)?;
    let others: Vec<&Arm> = arms.iter().copied().filter(|arm| arm.name != base.name).collect();
    let rows: Vec<Row<'_>> =
        scenario.workloads.iter().filter_map(|task| row(scenario, base, &others, task)).collect();
    if rows.is_empty() {
        return None;
    }
    let name = plain(&base.name);
    let title = titled(scenario, &format!("every workload as a ratio to {name}"));
    let caption = format!(
        "Every workload by the metric that it is there for. A mark at 2× takes twice as long, twice as much, \
         or does half as much in the same time as {name}."
    );
    let about = format!(
        "Right of 1× is worse than {name}, left of it better; logarithmic. What is better when it is more \
         (throughput, rates) is turned over. Marks: median of the ratios, round by round; lines: their \
         middle half."
    );
    let mut sheet = Sheet::new(&title, &about);
    sheet.arms(scenario, looks, &others);
    let label_room = rows.iter().map(|row| text_width(&row.label)).fold(0.0, f64::max).min(WIDTH * 0.45);
    let left = MARGIN + label_room + AIR;
    let wide = WIDTH - MARGIN - AIR - left;
    let values = rows.iter().flat_map(|row| row.dots.iter().flat_map(|(_, s)| [s.q1, s.q3]));
    let scale = Scale::around(values.chain([0.9, 1.1]));
    let place = |value: f64| left + scale.at(value) * wide;
    let top = sheet.y + 26.0;
    let bottom = top + ROW * rows.len() as f64;
    let ticks = scale.ticks(8);
    sheet.svg.paint(GRID, |svg| {
        for (value, _) in &ticks {
            svg.line((place(*value), top - 4.0), (place(*value), bottom + 4.0), 1.0);
        }
        for index in 0..rows.len() {
            let y = top + ROW * (index as f64 + 0.5);
            svg.line((left - AIR / 2.0, y), (left + wide, y), 1.0);
        }
    });
    sheet.svg.paint(INK, |svg| svg.line((place(1.0), top - 4.0), (place(1.0), bottom + 4.0), 1.4));
    sheet.svg.paint(SOFT, |svg| {
        for (value, _) in &ticks {
            svg.text(place(*value), bottom + 20.0, Anchor::Middle, &short(*value));
        }
        svg.text(place(1.0) + 8.0, top - 9.0, Anchor::Start, "worse →");
        if scale.at(1.0) * wide > text_width("← better") {
            svg.text(place(1.0) - 8.0, top - 9.0, Anchor::End, "← better");
        }
    });
    for (index, row) in rows.iter().enumerate() {
        let y = top + ROW * (index as f64 + 0.5);
        sheet.svg.paint(INK, |svg| svg.text(left - AIR, y + 4.3, Anchor::End, &row.label));
        for (arm, dot) in &row.dots {
            let look = looks.of(scenario, arm);
            sheet.svg.paint(look.paint, |svg| {
                svg.line((place(dot.q1), y), (place(dot.q3), y), 2.2);
                svg.mark(place(dot.median), y, look.mark, look.hollow);
            });
        }
    }
    sheet.y = bottom + 24.0;
    Some(Plot::new(scenario, &format!("ratios-to-{}", base.name), title, caption, sheet.finish()))
}

fn row<'s>(scenario: &Scenario, base: &Arm, others: &[&'s Arm], task: &Task) -> Option<Row<'s>> {
    let metric = metrics(scenario, task).into_iter().next()?;
    let dot = |arm: &&'s Arm| {
        let ratios = scenario.ratios(&base.name, &arm.name, &task.name, metric);
        let worse = ratios.into_iter().filter(|r| *r > 0.0).map(|r| match metric.better() {
            Better::Lower => r,
            Better::Higher => 1.0 / r,
        });
        Some((*arm, Summary::new(worse)?))
    };
    let dots: Vec<_> = others.iter().filter_map(dot).collect();
    (!dots.is_empty()).then(|| Row { label: format!("{}: {metric}", panel_title(task)), dots })
}

/// `0.5×`, `2×`.
fn short(value: f64) -> String {
    let text = ratio(value);
    let digits = text.trim_end_matches('×');
    let digits =
        if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    format!("{digits}×")
}
