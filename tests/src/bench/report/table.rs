//! A report as a table for a terminal of a given width, with colours or without any escape sequence. An arm without numbers has
//! its reason in their place.

use crate::bench::{
    model::{Arm, Report, Scenario, State, Task},
    stats::Metric,
};

use super::{
    number::{self, heading},
    words::{absence, count, machine, metrics, plain, rounds, taken},
};

/// A narrower terminal wraps; every table has at least one column.
const NARROWEST: usize = 60;
const INDENT: usize = 4;
const GAP: usize = 3;
/// Of ` ± `.
const SIGN: usize = 3;

/// Per scenario and task a row per arm: medians, ± interquartile ranges, ratios to the first arm.
pub fn table(report: &Report, width: u16, colour: bool) -> String {
    let page = Page { width: usize::from(width).max(NARROWEST), ink: Ink(colour) };
    let mut out = String::new();
    let ink = page.ink;
    line(&mut out, &ink.bold("Benchmark"));
    for (what, text) in [("taken", taken(report)), ("machine", machine(report))] {
        page.wrap(&mut out, &format!("{what:<9}"), &text);
    }
    let versions: Vec<String> =
        report.versions.iter().map(|(name, v)| plain(&format!("{name} {v}"))).collect();
    if !versions.is_empty() {
        page.wrap(&mut out, &format!("{:<9}", "versions"), &versions.join(", "));
    }
    page.wrap(
        &mut out,
        &format!("{:<9}", "numbers"),
        "median ± interquartile range over rounds; ratio to the scenario's first arm, round by round",
    );
    if !report.faults.is_empty() {
        line(&mut out, "");
        let headline = format!("This benchmark failed: {}", count(report.faults.len() as u64, "fault"));
        line(&mut out, &ink.red(&headline));
        for fault in &report.faults {
            page.wrap(&mut out, "  ! ", &plain(fault));
        }
    }
    if let Some(footprint) = &report.footprint {
        line(&mut out, "");
        line(&mut out, &ink.bold("Before it carries anything"));
        for (what, much) in footprint.rows() {
            line(&mut out, &format!("    {what:<44}{much}"));
        }
    }
    for scenario in &report.scenarios {
        page.scenario(&mut out, scenario);
    }
    out
}

struct Page {
    width: usize,
    ink: Ink,
}

/// A column: a metric, and what it says of each arm.
struct Column {
    heading: String,
    cells: Vec<Option<[String; 3]>>,
    widths: [usize; 3],
}

impl Page {
    fn scenario(&self, out: &mut String, scenario: &Scenario) {
        line(out, "");
        let title = plain(&scenario.title);
        let rule = "─".repeat(self.width.saturating_sub(width(&title) + width(&scenario.name) + 4).max(3));
        line(
            out,
            &format!(
                "{} {} {}",
                self.ink.bold(&title),
                self.ink.dim(&format!("({})", plain(&scenario.name))),
                self.ink.dim(&rule)
            ),
        );
        self.wrap(out, "", &plain(&scenario.about));
        for arm in &scenario.arms {
            if let Some(why) = absence(arm) {
                self.wrap(out, &format!("{}: ", plain(&arm.name)), &why);
            }
        }
        for task in &scenario.workloads {
            self.task(out, scenario, task);
        }
    }

    fn task(&self, out: &mut String, scenario: &Scenario, task: &Task) {
        let most = rounds(scenario, task);
        line(out, "");
        let about = format!("{}, {}", plain(&task.name), count(most as u64, "run"));
        line(out, &format!("  {}  {}", self.ink.bold(&plain(&task.title)), self.ink.dim(&about)));
        let names: Vec<String> = scenario.arms.iter().map(|arm| plain(&arm.name)).collect();
        let name_width = names.iter().map(|n| width(n)).max().unwrap_or(0).max(6);
        let columns = self.columns(scenario, task, INDENT + name_width);
        let mut head = " ".repeat(INDENT + name_width);
        for column in &columns {
            let [value, spread, ratio] = column.widths;
            let end = value + spread;
            head.push_str(&format!("{:GAP$}{:>end$}{:ratio$}", "", column.heading, ""));
        }
        if !columns.is_empty() {
            line(out, &self.ink.dim(head.trim_end()));
        }
        for (index, (arm, name)) in scenario.arms.iter().zip(&names).enumerate() {
            let start = format!("{:INDENT$}{name:<name_width$}", "");
            if columns.iter().all(|column| column.cells[index].is_none()) {
                line(out, &format!("{start}   {}", self.reason(arm, name_width)));
                continue;
            }
            let mut row = start;
            for column in &columns {
                row.push_str(&self.cell(column, index));
            }
            let runs = scenario.runs(&arm.name, &task.name).len();
            if runs < most {
                row.push_str(&self.ink.yellow(&format!("   {} only", count(runs as u64, "run"))));
            }
            line(out, row.trim_end());
        }
    }

    fn cell(&self, column: &Column, index: usize) -> String {
        let [value, spread, ratio] = column.widths;
        match &column.cells[index] {
            Some([v, s, r]) => {
                // The sign stands under the sign above it.
                let s = format!(" ± {s:>0$}", spread - SIGN);
                format!("{:GAP$}{v:>value$}{}{r:>ratio$}", "", self.ink.dim(&s))
            }
            None => format!("{:GAP$}{:>value$}{:spread$}{:ratio$}", "", number::NONE, "", ""),
        }
    }

    /// As many metrics as fit, the headline first.
    fn columns(&self, scenario: &Scenario, task: &Task, start: usize) -> Vec<Column> {
        let mut used = start;
        let mut columns: Vec<Column> = Vec::new();
        for metric in headlines(metrics(scenario, task)) {
            let column = Column::new(scenario, task, metric);
            used += GAP + column.widths.iter().sum::<usize>();
            if used > self.width && !columns.is_empty() {
                break;
            }
            columns.push(column);
        }
        columns
    }

    fn reason(&self, arm: &Arm, name_width: usize) -> String {
        let room = self.width.saturating_sub(INDENT + name_width + 3).max(20);
        let text = absence(arm).unwrap_or_else(|| "not run".to_owned());
        let text = clipped(&text, room);
        match arm.state {
            State::Failed(_) => self.ink.red(&text),
            State::Missing(_) | State::Ran => self.ink.yellow(&text),
        }
    }

    /// Wrapped at words, indented like the first line.
    fn wrap(&self, out: &mut String, start: &str, text: &str) {
        let indent = width(start);
        let mut current = start.to_owned();
        let mut empty = true;
        for word in text.split(' ') {
            if !empty && width(&current) + 1 + width(word) > self.width {
                line(out, current.trim_end());
                current = " ".repeat(indent);
                empty = true;
            }
            if !empty {
                current.push(' ');
            }
            current.push_str(word);
            empty = false;
        }
        line(out, current.trim_end());
    }
}

impl Column {
    fn new(scenario: &Scenario, task: &Task, metric: Metric) -> Self {
        let cell = |arm: &Arm| {
            let summary = scenario.summary(&arm.name, &task.name, metric)?;
            let ratio = scenario.ratio(&arm.name, &task.name, metric);
            Some([
                number::of(metric, summary.median),
                number::spread(metric, summary.iqr()),
                ratio.map_or(String::new(), |r| format!("  {}", number::ratio(r.median))),
            ])
        };
        let cells: Vec<_> = scenario.arms.iter().map(cell).collect();
        let heading = heading(metric);
        let widest = |part: usize| cells.iter().flatten().map(|c| width(&c[part])).max().unwrap_or(0);
        let (value, spread, ratio) = (widest(0), widest(1) + SIGN, widest(2));
        let value = value.max(width(&heading).saturating_sub(spread));
        Self { heading, cells, widths: [value, spread, ratio] }
    }
}

/// The 90th percentile gives way to what says more.
fn headlines(metrics: Vec<Metric>) -> Vec<Metric> {
    let (late, mut first): (Vec<_>, Vec<_>) = metrics.into_iter().partition(|m| *m == Metric::P90);
    first.extend(late);
    first
}

/// Colours, or none.
#[derive(Clone, Copy)]
pub(super) struct Ink(pub(super) bool);

impl Ink {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(super) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    pub(super) fn red(self, text: &str) -> String {
        self.with("1;31", text)
    }

    pub(super) fn green(self, text: &str) -> String {
        self.with("1;32", text)
    }

    pub(super) fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }
}

pub(super) fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

/// Columns of a terminal; nothing in a report is wider than one.
pub(super) fn width(text: &str) -> usize {
    text.chars().count()
}

pub(super) fn clipped(text: &str, room: usize) -> String {
    if width(text) <= room {
        return text.to_owned();
    }
    text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::fixture;

    #[test]
    fn every_line_fits_and_numbers_end_under_each_other() {
        let report = fixture::report();
        for wide in [100, 120] {
            let text = table(&report, wide, false);
            assert!(!text.contains('\x1b'));
            for line in text.lines() {
                assert!(width(line) <= usize::from(wide), "{wide}: {line}");
            }
        }
        assert!(table(&report, 110, true).contains("\x1b[1m"));
    }

    #[test]
    fn an_arm_that_did_not_run_says_why_and_has_no_zero() {
        let text = table(&fixture::report(), 110, false);
        assert!(
            text.contains("redsocks     not installed: redsocks is not in PATH: apt-get install redsocks")
        );
        assert!(text.contains("failed: exited with 1: <b>bind</b>: Address in use [31m \"&\""));
        assert!(text.contains("sk_skb   not built yet"));
        assert!(text.contains("This benchmark failed: 1 fault"));
        assert!(!text.contains(" 0 ±"));
    }
}
