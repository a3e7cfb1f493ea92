//! Everything at a glance: every workload of every arm as a ratio to one of them.
//!
//! A row per workload, with the metric for which the workload is there. Right of 1× is worse; what is better when it is more has
//! been turned over.

use plotters::prelude::*;

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
    looks::{INK, Look, Looks, drawn},
    panel_title, ran,
    scale::Scale,
    sheet::{Area, Drawn, Grid, Sheet, WIDTH, mark, panel, stroke, widest},
    titled,
};

/// The height of a row, and of what is above and below the rows.
const ROW: u32 = 23;
const AROUND: u32 = 76;

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
    let sheet = Sheet::new(&title, &about, scenario, looks, &others);
    let height = ROW * u32::try_from(rows.len()).unwrap_or(u32::MAX) + AROUND;
    let svg = sheet.draw(Grid { columns: 1, panels: 1, height }, |_, area| {
        draw(area, &rows, &name, |arm| looks.of(scenario, arm))
    });
    Some(Plot::new(scenario, &format!("ratios-to-{}", base.name), title, caption, svg))
}

fn draw(area: &Area<'_>, rows: &[Row<'_>], base: &str, look: impl Fn(&Arm) -> Look) -> Drawn {
    let values = rows.iter().flat_map(|row| row.dots.iter().flat_map(|(_, s)| [s.q1, s.q3]));
    let scale = Scale::around(values.chain([0.9, 1.1])).about(8);
    let ticks = scale.ticks().iter().map(|(value, _)| (*value, short(*value))).collect();
    let labels = rows.iter().map(|row| row.label.as_str());
    let left = widest(labels).min(WIDTH / 2) + 20;
    let unit = format!("← better        ratio to {base}        worse →");
    let names = Scale::rows(rows.iter().map(|row| row.label.clone()));
    let mut chart = panel(area, "", (scale.at_these(ticks), &unit), (names, ""), (left, 26))?;
    let bottom = rows.len() as f64;
    chart.draw_series([PathElement::new([(1.0, 0.0), (1.0, bottom)], stroke(INK, 1.4))])?;
    for (index, row) in rows.iter().enumerate() {
        let y = index as f64 + 0.5;
        for (arm, dot) in &row.dots {
            let look = look(arm);
            chart.draw_series([PathElement::new([(dot.q1, y), (dot.q3, y)], stroke(look.color, 2.2))])?;
            chart.draw_series([mark((dot.median, y), look)])?;
        }
    }
    Ok(())
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
