//! How arms look: the same in every picture.
//!
//! Colours can be told apart by people who are blind to some (Okabe and Ito, "Color universal design", 2008; without its
//! yellow, which white paper swallows), and marks by those who see none. The page's style sheet knows each colour by its value,
//! and turns it over in the dark.

use plotters::style::RGBColor;

use crate::bench::model::{Arm, Report, Scenario};

/// Words, axes.
pub(super) const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
/// Words that explain.
pub(super) const SOFT: RGBColor = RGBColor(0x5f, 0x63, 0x68);
/// Lines behind the data.
pub(super) const GRID: RGBColor = RGBColor(0xe4, 0xe6, 0xe8);
/// Behind everything.
pub(super) const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xff);
/// Parts of an arm that are not proxies.
pub(super) const ENDS: [RGBColor; 2] = [RGBColor(0x9a, 0x9d, 0xa1), RGBColor(0xc9, 0xcb, 0xce)];

const GREY: RGBColor = RGBColor(0x6e, 0x6e, 0x6e);
const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const ORANGE: RGBColor = RGBColor(0xd9, 0x8e, 0x00);
const GREEN: RGBColor = RGBColor(0x00, 0x9e, 0x73);
const VERMILLION: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
const PURPLE: RGBColor = RGBColor(0xb8, 0x5c, 0x96);
const SKY: RGBColor = RGBColor(0x3a, 0x9f, 0xd6);

/// What stands for an arm beside its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Circle,
    Square,
    Diamond,
    Up,
    Down,
}

impl Mark {
    /// In pixels around its place.
    pub(super) fn corners(self) -> Vec<(f64, f64)> {
        match self {
            Self::Circle => (0..16)
                .map(|n| (f64::from(n) * std::f64::consts::TAU / 16.0).sin_cos())
                .map(|(x, y)| (x * 4.0, y * 4.0))
                .collect(),
            Self::Square => vec![(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)],
            Self::Diamond => vec![(0.0, -5.2), (5.2, 0.0), (0.0, 5.2), (-5.2, 0.0)],
            Self::Up => vec![(0.0, -5.0), (4.8, 3.8), (-4.8, 3.8)],
            Self::Down => vec![(0.0, 5.0), (4.8, -3.8), (-4.8, -3.8)],
        }
    }
}

/// Arms that never meet in a scenario share a colour. Blue is this project, grey is nobody in between.
const KNOWN: [(&str, RGBColor, Mark); 10] = [
    ("direct", GREY, Mark::Circle),
    ("ours", BLUE, Mark::Square),
    ("ebpf", BLUE, Mark::Square),
    ("pipe", BLUE, Mark::Square),
    ("ours-envoy", GREEN, Mark::Diamond),
    ("splice", GREEN, Mark::Diamond),
    ("envoy", VERMILLION, Mark::Up),
    ("iptables", VERMILLION, Mark::Up),
    ("copy", ORANGE, Mark::Down),
    ("redsocks", PURPLE, Mark::Down),
];

/// For families that nobody foresaw, in the order in which they appear.
const OTHERS: [(RGBColor, Mark); 4] =
    [(SKY, Mark::Circle), (ORANGE, Mark::Up), (PURPLE, Mark::Diamond), (GREEN, Mark::Square)];

/// How an arm looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) color: RGBColor,
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
        let (color, mark) = self.of_family(&arm.family);
        let fewer = |other: &Arm| other.family == arm.family && other.rules > arm.rules;
        Look { color, mark, hollow: arm.rules.is_some() && scenario.arms.iter().any(fewer) }
    }

    pub(super) fn of_family(&self, family: &str) -> (RGBColor, Mark) {
        if let Some((_, color, mark)) = KNOWN.iter().find(|(name, ..)| *name == family) {
            return (*color, *mark);
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
