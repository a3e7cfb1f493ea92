//! What a report says about itself in words, the same for the terminal and for the page: plain text, one line each, not yet
//! escaped for HTML. Nothing in it moves a terminal's cursor.

use crate::bench::{
    model::{Arm, Report, Scenario, State, Task},
    stats::Metric,
};

use super::number::{bytes, duration};

/// One line without anything that a terminal would obey: errors quote what programs wrote.
pub(super) fn plain(text: &str) -> String {
    // Cc, and what reverses the direction of writing.
    let unsafe_char = |c: char| {
        c.is_control()
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
    };
    let spaced: String = text.chars().map(|c| if unsafe_char(c) { ' ' } else { c }).collect();
    spaced.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Why an arm has no numbers, or not all of them; nothing when it has.
pub(super) fn absence(arm: &Arm) -> Option<String> {
    match &arm.state {
        State::Ran => None,
        // "not built yet" says it all.
        State::Missing(why) if why.starts_with("not ") => Some(plain(why)),
        State::Missing(why) => Some(plain(&format!("not installed: {why}"))),
        State::Failed(why) => Some(plain(&format!("failed: {why}"))),
    }
}

/// Arms that did not run, for a caption.
pub(super) fn absent(scenario: &Scenario) -> Option<String> {
    let all: Vec<String> = scenario
        .arms
        .iter()
        .filter_map(|arm| match arm.state {
            State::Ran => None,
            State::Missing(_) => Some(format!("{} (missing)", plain(&arm.name))),
            State::Failed(_) => Some(format!("{} (failed)", plain(&arm.name))),
        })
        .collect();
    (!all.is_empty()).then(|| format!("Not here: {}.", all.join(", ")))
}

/// What can be shown of a task: iperf3 knows nothing but bytes, the rest is [`Metric::of`] its workload.
pub(super) fn metrics(scenario: &Scenario, task: &Task) -> Vec<Metric> {
    let measured = |metric: &Metric| {
        scenario.arms.iter().any(|arm| scenario.summary(&arm.name, &task.name, *metric).is_some())
    };
    Metric::of(task.workload).iter().copied().filter(measured).collect()
}

/// How many runs the fullest cell of a task has.
pub(super) fn rounds(scenario: &Scenario, task: &Task) -> usize {
    scenario.cells.iter().filter(|c| c.task == task.name).map(|c| c.runs.len()).max().unwrap_or(0)
}

/// When, how, and for how long.
pub(super) fn taken(report: &Report) -> String {
    let s = &report.settings;
    plain(&format!(
        "{}, {} ({}, {} of each, {} of each proxy, seed {})",
        report.taken,
        duration(report.seconds),
        s.extent,
        count(s.rounds.into(), "round"),
        count(s.workers.into(), "thread"),
        s.seed
    ))
}

/// On what.
pub(super) fn machine(report: &Report) -> String {
    let m = &report.machine;
    plain(&format!(
        "{}, {}, {}, Linux {}, {}, {}",
        m.cpu,
        count(m.cores.into(), "core"),
        bytes(m.memory as f64),
        m.kernel,
        m.system,
        m.congestion_control
    ))
}

/// `1 core`, `2 cores`.
pub(super) fn count(n: u64, what: &str) -> String {
    format!("{} {what}{}", super::number::grouped(&n.to_string()), if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_wrote_does_not_reach_the_terminal_as_it_was() {
        assert_eq!(plain("a\x1b[31m\nb\u{202e}c\r\n\td"), "a [31m b c d");
    }
}
