//! SVG, written.
//!
//! Enters: shapes and words, in pixels from the top left. Leaves: a document. Invariant: it is well-formed
//! whatever the words are. Colours are `color` of a group with a class, everything in it is `currentColor`:
//! complete in a file, and a style sheet around it can turn it over.

use std::fmt::Write as _;

use crate::bench::report::html::escape;

/// A colour and the class by which a page finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Paint {
    /// `blue`.
    pub(super) class: &'static str,
    /// `#0072b2`.
    pub(super) hex: &'static str,
}

/// Words, axes.
pub(super) const INK: Paint = Paint { class: "ink", hex: "#222222" };
/// Words that explain.
pub(super) const SOFT: Paint = Paint { class: "soft", hex: "#5f6368" };
/// Lines behind the data.
pub(super) const GRID: Paint = Paint { class: "grid", hex: "#e4e6e8" };
/// Behind everything.
const PAPER: Paint = Paint { class: "paper", hex: "#ffffff" };

/// Of all words but titles.
pub(super) const SIZE: f64 = 12.5;

/// Which end of a text is at its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stroke {
    pub(super) width: f64,
    pub(super) dashed: bool,
}

/// What stands for an arm beside its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Circle,
    Square,
    Diamond,
    Up,
    Down,
}

/// A document in the making.
pub(super) struct Svg {
    body: String,
}

impl Svg {
    pub(super) fn new() -> Self {
        Self { body: String::new() }
    }

    /// The document, so large, with what a screen reader says of it.
    pub(super) fn finish(self, width: f64, height: f64, title: &str) -> String {
        let (w, h) = (short(width), short(height));
        let Paint { class, hex } = PAPER;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" role=\"img\" width=\"{w}\" \
             height=\"{h}\" viewBox=\"0 0 {w} {h}\" font-family=\"system-ui, -apple-system, 'Segoe UI', \
             Helvetica, Arial, 'DejaVu Sans', sans-serif\" font-size=\"{SIZE}\" \
             fill=\"currentColor\">\n<title>{}</title>\n<g class=\"{class}\" color=\"{hex}\"><rect \
             width=\"{w}\" height=\"{h}\"/></g>\n{}</svg>\n",
            escape(title),
            self.body
        )
    }

    /// Everything that `draw` draws, in a colour.
    pub(super) fn paint(&mut self, paint: Paint, draw: impl FnOnce(&mut Self)) {
        let _ = write!(self.body, "<g class=\"{}\" color=\"{}\">", paint.class, paint.hex);
        draw(self);
        self.body.push_str("</g>\n");
    }

    pub(super) fn text(&mut self, x: f64, y: f64, anchor: Anchor, text: &str) {
        self.styled(x, y, anchor, "", text);
    }

    pub(super) fn bold(&mut self, x: f64, y: f64, size: f64, text: &str) {
        self.styled(
            x,
            y,
            Anchor::Start,
            &format!(" font-weight=\"600\" font-size=\"{}\"", short(size)),
            text,
        );
    }

    fn styled(&mut self, x: f64, y: f64, anchor: Anchor, style: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let _ = write!(
            self.body,
            "<text x=\"{}\" y=\"{}\"{anchor}{style}>{}</text>",
            short(x),
            short(y),
            escape(text)
        );
    }

    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), width: f64) {
        let _ = write!(
            self.body,
            "<path d=\"M{} {}L{} {}\" stroke=\"currentColor\" stroke-width=\"{}\"/>",
            short(from.0),
            short(from.1),
            short(to.0),
            short(to.1),
            short(width)
        );
    }

    pub(super) fn polyline(&mut self, points: &[(f64, f64)], stroke: Stroke) {
        let dashes = if stroke.dashed { " stroke-dasharray=\"5 3\"" } else { "" };
        let _ = write!(
            self.body,
            "<path d=\"{}\" fill=\"none\" stroke=\"currentColor\" stroke-width=\"{}\" \
             stroke-linejoin=\"round\"{dashes}/>",
            path(points),
            short(stroke.width)
        );
    }

    /// A surface through which the grid can be seen.
    pub(super) fn area(&mut self, points: &[(f64, f64)], opacity: f64) {
        let _ = write!(self.body, "<path d=\"{}Z\" opacity=\"{opacity}\"/>", path(points));
    }

    pub(super) fn bar(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), opacity: f64) {
        let opacity = if opacity < 1.0 { format!(" opacity=\"{opacity}\"") } else { String::new() };
        let _ = write!(
            self.body,
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"{opacity}/>",
            short(x),
            short(y),
            short(width.max(0.0)),
            short(height)
        );
    }

    pub(super) fn mark(&mut self, x: f64, y: f64, mark: Mark, hollow: bool) {
        let polygon = |corners: &[(f64, f64)]| {
            let moved: Vec<(f64, f64)> = corners.iter().map(|(dx, dy)| (x + dx, y + dy)).collect();
            format!("<path d=\"{}Z\"", path(&moved))
        };
        let shape = match mark {
            Mark::Circle => format!("<circle cx=\"{}\" cy=\"{}\" r=\"4\"", short(x), short(y)),
            Mark::Square => polygon(&[(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)]),
            Mark::Diamond => polygon(&[(0.0, -5.2), (5.2, 0.0), (0.0, 5.2), (-5.2, 0.0)]),
            Mark::Up => polygon(&[(0.0, -5.0), (4.8, 3.8), (-4.8, 3.8)]),
            Mark::Down => polygon(&[(0.0, 5.0), (4.8, -3.8), (-4.8, -3.8)]),
        };
        self.body.push_str(&shape);
        self.body.push_str(match hollow {
            true => " class=\"hollow\" fill=\"#ffffff\" stroke=\"currentColor\" stroke-width=\"1.6\"/>",
            false => "/>",
        });
    }
}

/// How wide a text will be at most, near enough: DejaVu Sans is among the widest that will be met.
pub(super) fn text_width(text: &str) -> f64 {
    text.chars().map(|c| if "iljtfrI.,:;|' ()1".contains(c) { 0.42 } else { 0.62 }).sum::<f64>() * SIZE
}

/// What there is room for, with a sign that there was more.
pub(super) fn fitting(text: &str, room: f64) -> String {
    if text_width(text) <= room {
        return text.to_owned();
    }
    let mut clipped = String::new();
    for c in text.chars() {
        if text_width(&clipped) + text_width("W…") > room {
            break;
        }
        clipped.push(c);
    }
    format!("{}…", clipped.trim_end())
}

/// Relative after the first point, which is shorter; rounding does not add up, as each step is from what was
/// written.
fn path(points: &[(f64, f64)]) -> String {
    let tenth = |v: f64| (v * 10.0).round() / 10.0;
    let mut text = String::new();
    let mut last = (0.0, 0.0);
    for (index, (x, y)) in points.iter().map(|(x, y)| (tenth(*x), tenth(*y))).enumerate() {
        let (command, dx, dy) = match index {
            0 => ("M", x, y),
            1 => ("l", x - last.0, y - last.1),
            _ => (" ", x - last.0, y - last.1),
        };
        let _ = write!(text, "{command}{} {}", short(dx), short(dy));
        last = (x, y);
    }
    text
}

/// A tenth of a pixel is as much as anybody sees.
fn short(value: f64) -> String {
    let text = format!("{value:.1}");
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}
