//! A comparison for a terminal, its result first.

use super::{Basis, Change, Comparison, FEWEST, Verdict};
use crate::bench::report::{
    number::{self, percent},
    table::{Ink, line, width},
    words::plain,
};

const HOW: [&str; 6] = [
    "The first arm of a scenario is compared by its values, every other arm by its ratio (×) to the",
    "first in the same round, so that what the machine did to both falls out; by values where the first",
    "has none.",
    "Noise: 3 standard errors of the difference of medians (from the quartiles), at least 2 %; ranks",
    "have to agree (Mann-Whitney). Of hundreds of metrics that did not change, about one in 500 is",
    "called changed all the same.",
];

const IN_TURNS: [&str; 6] = [
    "old is the other build. A change is the median of the ratios of two runs in the same round, one of",
    "each build, less 1.",
    "",
    "Noise: 3 standard errors of that median (from the quartiles), at least 2 %; ranks have to agree",
    "(Mann-Whitney). Of hundreds of metrics that did not change, about one in 500 is called changed all",
    "the same.",
];

impl Comparison {
    /// The summary, what makes the two hard to compare, and every metric, the most certain change first.
    pub fn text(&self, colour: bool) -> String {
        let ink = Ink(colour);
        let mut out = String::new();
        line(&mut out, &ink.bold(&self.summary()));
        let turns = self.old == self.new;
        let when = if turns {
            format!("two builds in turns, {}", plain(&self.new))
        } else {
            format!("from {} to {}", plain(&self.old), plain(&self.new))
        };
        line(&mut out, &ink.dim(&when));
        if !self.warnings.is_empty() {
            line(&mut out, "");
            line(&mut out, &ink.red("The two were not taken under the same conditions:"));
            for warning in &self.warnings {
                line(&mut out, &format!("  ! {warning}"));
            }
        }
        for (what, list) in [("Only in the newer", &self.added), ("Only in the older", &self.removed)] {
            if !list.is_empty() {
                line(&mut out, "");
                line(&mut out, &ink.yellow(&format!("{what}:")));
                for name in list {
                    line(&mut out, &format!("  {name}"));
                }
            }
        }
        line(&mut out, "");
        for text in if turns { IN_TURNS } else { HOW } {
            line(&mut out, &ink.dim(text));
        }
        self.rows(&mut out, ink);
        out
    }

    /// `3 better, 1 worse, 214 inside the noise, 12 with too few runs`.
    pub fn summary(&self) -> String {
        let mut text = [Verdict::Better, Verdict::Worse, Verdict::Inside]
            .map(|verdict| format!("{} {verdict}", self.count(verdict)))
            .join(", ");
        let few = self.count(Verdict::TooFew);
        if few > 0 {
            text.push_str(&format!(", {few} with too few runs (under {FEWEST}) to say"));
        }
        text
    }

    fn rows(&self, out: &mut String, ink: Ink) {
        let rows: Vec<[String; 7]> = self.changes.iter().map(row).collect();
        const HEAD: [&str; 7] =
            ["scenario, arm, workload", "metric", "old", "new", "change", "noise", "verdict"];
        let mut widths = HEAD.map(width);
        for row in &rows {
            for (widest, cell) in widths.iter_mut().zip(row) {
                *widest = (*widest).max(width(cell));
            }
        }
        let written = |row: [&str; 7]| {
            let cell = |(index, text): (usize, &str)| {
                let space = widths[index];
                match index {
                    0 | 1 | 6 => format!("{text:<space$}"),
                    _ => format!("{text:>space$}"),
                }
            };
            let cells: Vec<String> = row.into_iter().enumerate().map(cell).collect();
            cells.join("  ").trim_end().to_owned()
        };
        line(out, "");
        line(out, &ink.dim(&written(HEAD)));
        for (change, row) in self.changes.iter().zip(&rows) {
            let text = written(row.each_ref().map(String::as_str));
            let text = match change.verdict {
                Verdict::Better => ink.green(&text),
                Verdict::Worse => ink.red(&text),
                Verdict::Inside => text,
                Verdict::TooFew => ink.dim(&text),
            };
            line(out, &text);
        }
    }
}

fn row(change: &Change) -> [String; 7] {
    let value = |median: f64| match change.basis {
        Basis::Ratio => number::ratio(median),
        Basis::Value => number::of(change.metric, median),
    };
    let metric = match change.basis {
        Basis::Ratio => change.metric.to_string(),
        Basis::Value => number::heading(change.metric),
    };
    let verdict = match change.verdict {
        Verdict::TooFew => {
            format!("too few runs ({} and {}, {FEWEST} needed)", change.old.n, change.new.n)
        }
        verdict => verdict.to_string(),
    };
    [
        plain(&format!("{}, {}, {}", change.scenario, change.arm, change.task)),
        metric,
        value(change.old.median),
        value(change.new.median),
        change.change.map_or(number::NONE.to_owned(), percent),
        change.noise.map_or(number::NONE.to_owned(), |noise| format!("±{:.1} %", noise * 100.0)),
        verdict,
    ]
}
