//! How arms look: the same in every picture.
//!
//! Enters: a report. Leaves: a colour and a mark for each arm. Invariant: colours can be told apart by people
//! who are blind to some (Okabe and Ito, "Color universal design", 2008; without its yellow, which white
//! paper swallows), and marks by those who see none.

use crate::bench::model::{Arm, Report, Scenario};

use super::svg::{Mark, Paint};

const GREY: Paint = Paint { class: "grey", hex: "#6e6e6e" };
const BLUE: Paint = Paint { class: "blue", hex: "#0072b2" };
const ORANGE: Paint = Paint { class: "orange", hex: "#d98e00" };
const GREEN: Paint = Paint { class: "green", hex: "#009e73" };
const VERMILLION: Paint = Paint { class: "vermillion", hex: "#d55e00" };
const PURPLE: Paint = Paint { class: "purple", hex: "#b85c96" };
const SKY: Paint = Paint { class: "sky", hex: "#3a9fd6" };

/// Arms that never meet in a scenario share a colour. Blue is this project, grey is nobody in between.
const KNOWN: [(&str, Paint, Mark); 10] = [
    ("direct", GREY, Mark::Circle),
    ("ours", BLUE, Mark::Square),
    ("ebpf", BLUE, Mark::Square),
    ("pipe", BLUE, Mark::Square),
    ("ours-envoy", GREEN, Mark::Diamond),
    ("sk_skb", GREEN, Mark::Diamond),
    ("envoy", VERMILLION, Mark::Up),
    ("iptables", VERMILLION, Mark::Up),
    ("copy", ORANGE, Mark::Down),
    ("redsocks", PURPLE, Mark::Down),
];

/// For families that nobody foresaw, in the order in which they appear.
const OTHERS: [(Paint, Mark); 4] =
    [(SKY, Mark::Circle), (ORANGE, Mark::Up), (PURPLE, Mark::Diamond), (GREEN, Mark::Square)];

/// How an arm looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) paint: Paint,
    pub(super) mark: Mark,
    /// The fewest rules of its family, where there are several.
    pub(super) hollow: bool,
}

/// How all of them do.
pub(super) struct Looks {
    others: Vec<String>,
}

impl Looks {
    pub(super) fn new(report: &Report) -> Self {
        let mut others: Vec<String> = Vec::new();
        for arm in report.scenarios.iter().flat_map(|s| &s.arms) {
            if !KNOWN.iter().any(|(name, ..)| *name == arm.family) && !others.contains(&arm.family) {
                others.push(arm.family.clone());
            }
        }
        Self { others }
    }

    pub(super) fn of(&self, scenario: &Scenario, arm: &Arm) -> Look {
        let (paint, mark) = self.of_family(&arm.family);
        let fewer = |other: &Arm| other.family == arm.family && other.rules > arm.rules;
        Look { paint, mark, hollow: arm.rules.is_some() && scenario.arms.iter().any(fewer) }
    }

    pub(super) fn of_family(&self, family: &str) -> (Paint, Mark) {
        if let Some((_, paint, mark)) = KNOWN.iter().find(|(name, ..)| *name == family) {
            return (*paint, *mark);
        }
        let index = self.others.iter().position(|other| other == family).unwrap_or(0);
        OTHERS[index % OTHERS.len()]
    }
}

/// The arms to draw one by one: of a family that differs in rules, the fewest and the most.
pub(super) fn drawn(scenario: &Scenario) -> Vec<&Arm> {
    let outermost = |arm: &&Arm| {
        let family = || scenario.arms.iter().filter(|other| other.family == arm.family);
        let fewest = family().all(|other| other.rules >= arm.rules);
        let most = family().all(|other| other.rules <= arm.rules);
        fewest || most
    };
    scenario.arms.iter().filter(outermost).collect()
}
