//! What is around the data: title, key, and where panels go.
//!
//! Enters: words. Leaves: a document with a place left for panels. Invariant: every sheet is [`WIDTH`] wide,
//! about as wide as GitHub shows a page, so that letters keep their size there.

use crate::bench::{
    model::{Arm, Scenario},
    report::words::plain,
};

use super::{
    looks::{Look, Looks},
    svg::{Anchor, INK, SIZE, SOFT, Svg, text_width},
};

/// Of every picture.
pub(super) const WIDTH: f64 = 880.0;
/// Around it.
pub(super) const MARGIN: f64 = 16.0;

/// A document of which the upper part is done.
pub(super) struct Sheet {
    pub(super) svg: Svg,
    title: String,
    /// Where the next thing goes.
    pub(super) y: f64,
}

impl Sheet {
    pub(super) fn new(title: &str, about: &str) -> Self {
        let mut svg = Svg::new();
        svg.paint(INK, |svg| svg.bold(MARGIN, 27.0, 15.5, title));
        let mut y = 27.0;
        svg.paint(SOFT, |svg| {
            for line in lines(about, WIDTH - 2.0 * MARGIN) {
                y += 18.0;
                svg.text(MARGIN, y, Anchor::Start, &line);
            }
        });
        Self { svg, title: title.to_owned(), y: y + 12.0 }
    }

    /// What colours and marks mean, in as many rows as it takes.
    pub(super) fn key(&mut self, entries: &[(Look, String)]) {
        let mut x = MARGIN;
        self.y += 12.0;
        for (look, text) in entries {
            let wide = 16.0 + text_width(text) + 20.0;
            if x > MARGIN && x + wide - 20.0 > WIDTH - MARGIN {
                x = MARGIN;
                self.y += 20.0;
            }
            let y = self.y;
            self.svg.paint(look.paint, |svg| svg.mark(x + 5.0, y - 4.3, look.mark, look.hollow));
            self.svg.paint(INK, |svg| svg.text(x + 16.0, y, Anchor::Start, text));
            x += wide;
        }
        self.y += 12.0;
    }

    /// The same for arms, by name and title.
    pub(super) fn arms(&mut self, scenario: &Scenario, looks: &Looks, arms: &[&Arm]) {
        let entries: Vec<(Look, String)> =
            arms.iter().map(|arm| (looks.of(scenario, arm), named(arm))).collect();
        self.key(&entries);
    }

    pub(super) fn finish(self) -> String {
        let Self { svg, title, y } = self;
        svg.finish(WIDTH, y + MARGIN / 2.0, &title)
    }
}

/// `envoy: Envoy → Envoy, iptables`.
fn named(arm: &Arm) -> String {
    let (name, title) = (plain(&arm.name), plain(&arm.title));
    if title == name || title.is_empty() { name } else { format!("{name}: {title}") }
}

/// Wrapped at words.
fn lines(text: &str, room: f64) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match all.last_mut() {
            Some(line) if text_width(line) + text_width(word) + SIZE / 2.0 < room => {
                line.push(' ');
                line.push_str(word);
            }
            _ => all.push(word.to_owned()),
        }
    }
    all
}
