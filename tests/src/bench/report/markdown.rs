//! A report as a part of a Markdown document, as GitHub shows it: it replaces what is between two markers, and some of its plots
//! are written beside it.
//!
//! # Invariants
//! - What is outside of the markers stays as it is, and what is between them is of one report.
//! - Text from the report is escaped: Markdown obeys none of it.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use crate::{
    bench::{
        model::{Report, Scenario, Task},
        stats::Metric,
    },
    load::Workload,
};

use super::{
    files::{self, WriteError},
    number::{self, NONE},
    plots::{Plot, plots},
    words::{absence, machine, plain, taken},
};

/// What a document has in front of the results, and behind them.
const BEGIN: &str = "<!-- results: written by `cargo xtask bench --publish` -->";
const END: &str = "<!-- end of results -->";

/// Why a document was not changed.
#[derive(Debug)]
pub enum PublishError {
    /// It could not be read.
    Read(PathBuf, io::Error),
    /// It has no place for results.
    NoMarkers(PathBuf),
    /// It, or a plot, could not be written.
    Write(WriteError),
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(path, e) => write!(f, "{}: {e}", path.display()),
            Self::NoMarkers(path) => {
                write!(f, "{} has no place for results: the lines {BEGIN} and {END}", path.display())
            }
            Self::Write(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for PublishError {}

/// Puts a report into `document`, and its plots into `folder`, which is relative to the document's own.
pub fn publish(report: &Report, document: &Path, folder: &str) -> Result<(), PublishError> {
    let text = fs::read_to_string(document).map_err(|e| PublishError::Read(document.to_owned(), e))?;
    let placed = between(&text, &results(report, folder));
    let placed = placed.ok_or_else(|| PublishError::NoMarkers(document.to_owned()))?;
    let home = document.parent().unwrap_or(Path::new(""));
    files::save_plots(&drawn(report), &home.join(folder)).map_err(PublishError::Write)?;
    files::replace(document, placed.as_bytes()).map_err(PublishError::Write)
}

fn between(text: &str, results: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{results}{END}{after}"))
}

fn results(report: &Report, folder: &str) -> String {
    let versions: Vec<String> = report.versions.iter().map(|(name, v)| format!("{name} {v}")).collect();
    let mut out = format!(
        "{}  \n{}  \n{}\n",
        escape(&taken(report)),
        escape(&machine(report)),
        escape(&versions.join(", "))
    );
    for fault in &report.faults {
        out.push_str(&format!("\n**Failed: {}**\n", escape(fault)));
    }
    if let Some(footprint) = &report.footprint {
        out.push_str("\n## Before it carries anything\n\n| | |\n|---|--:|\n");
        for (what, much) in footprint.rows() {
            out.push_str(&format!("| {what} | {much} |\n"));
        }
    }
    let drawn = drawn(report);
    for scenario in &report.scenarios {
        out.push_str(&format!("\n## {}\n{}\n\n", escape(&scenario.title), escape(&scenario.about)));
        out.push_str(&table(scenario));
        for arm in &scenario.arms {
            if let Some(why) = absence(arm) {
                out.push_str(&format!("\n`{}`: {}\n", plain(&arm.name), escape(&why)));
            }
        }
        for plot in drawn.iter().filter(|plot| plot.scenario == scenario.name) {
            out.push_str(&format!("\n![{}]({folder}/{}.svg)\n", escape(&plot.title), plot.name));
        }
    }
    out
}

/// The plots that a document shows: ratios to the first arm, what rules cost, and memory. The page of a report has all.
fn drawn(report: &Report) -> Vec<Plot> {
    let first = |scenario: &Scenario| scenario.arms.first().map_or_else(String::new, |arm| arm.name.clone());
    let bases: Vec<_> =
        report.scenarios.iter().map(|s| format!("{}-ratios-to-{}", s.name, first(s))).collect();
    let mut drawn = plots(report);
    drawn.retain(|plot| {
        bases.contains(&plot.name) || plot.name.contains("-rules-") || plot.name.ends_with("-memory")
    });
    drawn
}

/// A row per workload and figure, a column per arm: the median, and behind it the ratio to the first arm.
fn table(scenario: &Scenario) -> String {
    let mut out = String::from("| |");
    for arm in &scenario.arms {
        out.push_str(&format!(" {} |", escape(&arm.name)));
    }
    out.push_str("\n|---|");
    out.push_str(&"--:|".repeat(scenario.arms.len()));
    out.push('\n');
    for task in &scenario.workloads {
        for metric in headlines(task) {
            let cells: Vec<String> =
                scenario.arms.iter().map(|arm| cell(scenario, &arm.name, task, metric)).collect();
            if cells.iter().all(|cell| cell == NONE) {
                continue;
            }
            let unit = if number::in_bytes(metric) { String::new() } else { format!(", {}", metric.unit()) };
            out.push_str(&format!("| {}: {metric}{unit} | {} |\n", escape(&task.title), cells.join(" | ")));
        }
    }
    out
}

fn cell(scenario: &Scenario, arm: &str, task: &Task, metric: Metric) -> String {
    let Some(summary) = scenario.summary(arm, &task.name, metric) else { return NONE.to_owned() };
    let value = number::of(metric, summary.median);
    match scenario.ratio(arm, &task.name, metric) {
        Some(ratio) => format!("{value} ({}×)", number::number(ratio.median)),
        None => value,
    }
}

/// Fewer than the page has: what a decision would be made by.
fn headlines(task: &Task) -> Vec<Metric> {
    use Metric::*;
    // What is not captured passes no proxy.
    let passes = |name: &str| !name.ends_with(" excluded") && !name.ends_with(" uncaptured");
    match task.workload {
        Workload::Connect { .. } if !passes(&task.name) => vec![P50, P99],
        Workload::PingPong { .. } | Workload::Connect { at_once: 1 } => vec![P50, P99, ProxyCpuPerThousand],
        Workload::Connect { .. } => vec![PerSecond, P99, ProxyCpuPerThousand],
        Workload::FirstByte => vec![P50],
        Workload::Bulk { .. } | Workload::Soak { .. } => vec![Gbits, ProxyCpuPerGb],
        Workload::Crowd { bulk: None, .. } => vec![P50, P99],
        Workload::Crowd { .. } => vec![P50, P99, Gbits],
        Workload::Rate { .. } => vec![P50, P99, P999, ProxyCpuPerThousand],
        Workload::Idle { .. } => Metric::of(task.workload).iter().copied().take(4).collect(),
    }
}

/// Text that is nothing but text to Markdown.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in plain(text).chars() {
        if "\\`*_[]<>|#!&~".contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::fixture;

    #[test]
    fn a_report_stands_between_the_markers_and_nothing_else_changes() {
        let folder = tempfile::tempdir().unwrap();
        let document = folder.path().join("BENCHMARKS.md");
        fs::write(&document, format!("before\n{BEGIN}\nold\n{END}\nafter\n")).unwrap();
        let report = fixture::report();
        publish(&report, &document, "plots/here").unwrap();
        let text = fs::read_to_string(&document).unwrap();
        assert!(text.starts_with("before\n") && text.ends_with(&format!("{END}\nafter\n")), "{text}");
        assert!(!text.contains("\nold\n") && text.contains("## "), "{text}");
        for (at, _) in text.match_indices("(plots/here/") {
            let name = text[at + 1..].split(')').next().unwrap();
            assert!(folder.path().join(name).is_file(), "{name}");
        }
        publish(&report, &document, "plots/here").unwrap();
        assert_eq!(fs::read_to_string(&document).unwrap(), text);
    }

    #[test]
    fn a_document_without_markers_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let document = folder.path().join("README.md");
        fs::write(&document, "text").unwrap();
        let refused = publish(&fixture::report(), &document, "plots").unwrap_err();
        assert!(matches!(refused, PublishError::NoMarkers(_)), "{refused}");
        assert_eq!(fs::read_to_string(&document).unwrap(), "text");
    }

    #[test]
    fn what_markdown_would_obey_is_escaped() {
        assert_eq!(escape("a|b <img> `c` [d](e)"), r"a\|b \<img\> \`c\` \[d\](e)");
    }
}
