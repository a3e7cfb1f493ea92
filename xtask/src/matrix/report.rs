//! What a run has shown, as a table or as JSON.
//!
//! # Invariants
//! - A kernel is good only if everything that was planned was seen to pass; what was not heard of did not pass.
//! - No number stands for what was not measured.

use std::fmt::Write as _;

use serde::Serialize;

use super::events::{Finding, Outcome, Trial};
use crate::run::{bold, dim, green, red};

/// What one kernel has shown.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    /// What was asked for.
    pub(super) kernel: String,
    /// As `uname -r` says in it; the package's name for it, if it said nothing.
    pub(super) release: String,
    /// The package's version.
    pub(super) version: String,
    /// How long it took to run its first program, by its own clock.
    pub(super) booted_seconds: Option<f64>,
    /// How long all of it took.
    pub(super) seconds: f64,
    /// What `tunnel doctor` said.
    pub(super) doctor: Vec<Finding>,
    /// How many tests were to be run.
    pub(super) planned: usize,
    /// Those that were begun.
    pub(super) tests: Vec<Trial>,
    /// What the kernel complained of outside of them.
    pub(super) warnings: Vec<String>,
    /// What else went wrong.
    pub(super) faults: Vec<String>,
}

impl Verdict {
    /// Whether everything was as it should be.
    pub(super) fn good(&self) -> bool {
        self.faults.is_empty() && self.passed() == self.planned && self.all_warnings().next().is_none()
    }

    fn passed(&self) -> usize {
        self.tests.iter().filter(|trial| trial.outcome == Outcome::Passed).count()
    }

    /// Of those that passed, how many not at once.
    fn later(&self) -> String {
        match self.tests.iter().filter(|t| t.outcome == Outcome::Passed && t.attempts > 1).count() {
            0 => String::new(),
            n => format!(", {n} at the second attempt"),
        }
    }

    /// Each with where it belongs.
    fn all_warnings(&self) -> impl Iterator<Item = (&str, &str)> {
        let outside = self.warnings.iter().map(|text| ("outside of tests", text.as_str()));
        let inside =
            self.tests.iter().flat_map(|t| t.warnings.iter().map(|text| (t.name.as_str(), text.as_str())));
        outside.chain(inside)
    }
}

/// For programs.
pub(super) fn json(verdicts: &[Verdict]) -> serde_json::Result<String> {
    serde_json::to_string_pretty(verdicts)
}

/// For people.
pub(super) fn text(verdicts: &[Verdict]) -> String {
    let mut out = String::new();
    let mut rows = vec![["kernel", "package", "booted", "tests", "warnings", "time"].map(str::to_owned)];
    for verdict in verdicts {
        rows.push([
            verdict.release.clone(),
            verdict.version.clone(),
            verdict.booted_seconds.map_or_else(|| "no".to_owned(), |s| format!("{s:.0} s")),
            format!("{} of {} passed{}", verdict.passed(), verdict.planned, verdict.later()),
            verdict.all_warnings().count().to_string(),
            format!(
                "{:.0} min {:02.0} s",
                (verdict.seconds / 60.0).floor(),
                (verdict.seconds % 60.0).floor()
            ),
        ]);
    }
    // A `String` takes what is written to it.
    let _ = writeln!(out, "{}", table(&rows));
    let _ = writeln!(out, "{}", bold("What `tunnel doctor` says there"));
    let _ = writeln!(out, "{}", table(&features(verdicts)));
    for verdict in verdicts {
        details(verdict, &mut out);
    }
    out
}

/// A row per question, a column per kernel.
fn features(verdicts: &[Verdict]) -> Vec<Vec<String>> {
    let mut checks: Vec<&str> = Vec::new();
    for finding in verdicts.iter().flat_map(|v| &v.doctor) {
        if !checks.contains(&finding.check.as_str()) {
            checks.push(&finding.check);
        }
    }
    let mut rows = vec![
        std::iter::once("").chain(verdicts.iter().map(|v| v.release.as_str())).map(str::to_owned).collect(),
    ];
    for check in checks {
        let answer = |verdict: &Verdict| {
            let finding = verdict.doctor.iter().find(|f| f.check == check);
            finding.map_or_else(|| "-".to_owned(), |f| format!("{}: {}", f.level, shortened(&f.found)))
        };
        rows.push(std::iter::once(check.to_owned()).chain(verdicts.iter().map(answer)).collect());
    }
    rows
}

/// What fits into a column.
fn shortened(text: &str) -> String {
    const WIDTH: usize = 44;
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() <= WIDTH {
        return line.to_owned();
    }
    line.chars().take(WIDTH - 1).chain(['…']).collect()
}

fn table<R: AsRef<[String]>>(rows: &[R]) -> String {
    let columns = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0);
    let width = |at: usize| {
        rows.iter().filter_map(|r| r.as_ref().get(at)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (row, line) in rows.iter().enumerate() {
        let cells = line.as_ref().iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        out.push_str(&if row == 0 { dim(line.trim_end()) } else { line.trim_end().to_owned() });
        out.push('\n');
    }
    out
}

/// What went wrong, if anything.
fn details(verdict: &Verdict, out: &mut String) {
    let release = &verdict.release;
    let passed_later = |t: &&Trial| t.outcome == Outcome::Passed && t.attempts > 1;
    for trial in verdict.tests.iter().filter(passed_later) {
        let _ = writeln!(out, "{release}: {} failed once:\n{}", trial.name, trial.output.trim_end());
    }
    for trial in verdict.tests.iter().filter(|trial| trial.blind) {
        let _ = writeln!(
            out,
            "{release}: the kernel's log was NOT checked, it has warned before: {}",
            trial.name
        );
    }
    if verdict.good() {
        let _ = writeln!(out, "{} {release}", green("ok "));
        return;
    }
    for fault in &verdict.faults {
        let _ = writeln!(out, "{} {release}: {fault}", red("bad"));
    }
    for trial in verdict.tests.iter().filter(|trial| trial.outcome != Outcome::Passed) {
        let what = match trial.outcome {
            Outcome::Passed => "passed",
            Outcome::Failed => "failed",
            Outcome::TimedOut => "took too long",
            Outcome::Stuck => "cannot be killed",
            Outcome::CutOff => "was under way when the machine ended",
        };
        let _ = writeln!(out, "{} {release}: {} {what}, {:.1} s", red("bad"), trial.name, trial.seconds);
        let _ = writeln!(out, "{}", trial.output.trim_end());
    }
    for (place, text) in verdict.all_warnings() {
        let _ = writeln!(out, "{} {release}: the kernel complained, {place}:\n{text}", red("bad"));
    }
    let unseen = verdict.planned - verdict.tests.len().min(verdict.planned);
    if unseen > 0 {
        let _ = writeln!(out, "{} {release}: {unseen} tests were not begun", red("bad"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(outcome: Outcome, planned: usize) -> Verdict {
        let trial = Trial {
            name: "a::b".into(),
            outcome,
            attempts: 1,
            seconds: 1.0,
            output: "said".into(),
            ..Trial::default()
        };
        let finding = Finding { check: "kernel".into(), level: "ok".into(), found: "6.1".into() };
        Verdict {
            kernel: "6.1".into(),
            release: "6.1.0-1-amd64".into(),
            version: "6.1.1-1".into(),
            booted_seconds: Some(18.0),
            seconds: 61.0,
            doctor: vec![finding],
            planned,
            tests: vec![trial],
            warnings: vec![],
            faults: vec![],
        }
    }

    #[test]
    fn a_kernel_is_good_only_if_all_that_was_planned_was_seen_to_pass_without_a_warning() {
        assert!(verdict(Outcome::Passed, 1).good());
        assert!(!verdict(Outcome::Passed, 2).good());
        for outcome in [Outcome::Failed, Outcome::TimedOut, Outcome::Stuck, Outcome::CutOff] {
            assert!(!verdict(outcome, 1).good(), "{outcome:?}");
        }
        let mut warned = verdict(Outcome::Passed, 1);
        warned.tests[0].warnings.push("WARNING: CPU: 0".into());
        assert!(!warned.good());
        let mut faulty = verdict(Outcome::Passed, 1);
        faulty.faults.push("it did not boot".into());
        assert!(!faulty.good());
        let mut blind = verdict(Outcome::Passed, 1);
        blind.tests[0].blind = true;
        assert!(blind.good());
        let shown = text(&[verdict(Outcome::Failed, 2), warned, blind]);
        for part in [
            "a::b failed",
            "said",
            "1 tests were not begun",
            "WARNING: CPU: 0",
            "ok: 6.1",
            "NOT checked, it has warned before: a::b",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
    }
}
