//! A picture: title, key, and a grid of panels, drawn by plotters.
//!
//! Every picture is [`WIDTH`] wide, about as wide as GitHub shows a page. plotters places everything at whole pixels: it is
//! given ten of them for each, and the document says how large they are.

use plotters::{
    coord::Shift,
    element::ComposedElement,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use crate::bench::{
    model::{Arm, Scenario},
    report::{html::escape, words::plain},
};

use super::{
    looks::{INK, Look, Looks, PAPER, SOFT},
    scale::Scale,
};

/// Of every picture.
pub(super) const WIDTH: u32 = 880;
/// Around it.
const MARGIN: u32 = 16;
/// plotters' pixels of each of ours.
const FINE: u32 = 10;
/// By how much plotters writes a size smaller than it was told.
const SHRUNK: f64 = 1.24;
/// Of all words but titles.
const SIZE: f64 = 12.0;
const FONT: &str = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif";

/// A part of a picture.
pub(super) type Area<'s> = DrawingArea<SVGBackend<'s>, Shift>;
/// A panel with its axes.
pub(super) type Chart<'a, 's> = ChartContext<'a, SVGBackend<'s>, Cartesian2d<Scale, Scale>>;
/// Drawing into a string fails only for a panel without room, which none has.
pub(super) type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;
/// What stands for an arm, at a place.
pub(super) type Mark<'s, At> =
    ComposedElement<At, SVGBackend<'s>, Polygon<(i32, i32)>, PathElement<(i32, i32)>>;

/// What is around the panels.
pub(super) struct Sheet<'t> {
    pub(super) title: &'t str,
    pub(super) about: &'t str,
    pub(super) key: Vec<(Look, String)>,
}

/// A grid of panels of one size.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) columns: usize,
    pub(super) panels: usize,
    /// Of each, in pixels.
    pub(super) height: u32,
}

impl<'t> Sheet<'t> {
    /// With a key of arms.
    pub(super) fn new(
        title: &'t str,
        about: &'t str,
        scenario: &Scenario,
        looks: &Looks,
        arms: &[&Arm],
    ) -> Self {
        let key = arms.iter().map(|arm| (looks.of(scenario, arm), named(arm))).collect();
        Self { title, about, key }
    }

    /// The picture; `panel` draws the panel of each number.
    pub(super) fn draw(&self, grid: Grid, panel: impl FnMut(usize, &Area<'_>) -> Drawn) -> String {
        let about = lines(self.about, f64::from(WIDTH - 2 * MARGIN));
        let key = self.rows();
        let head = 44 + 18 * units(about.len()) + 20 * units(key.len());
        let rows = units(grid.panels.div_ceil(grid.columns));
        let height = head + rows * grid.height + MARGIN / 2;
        let mut svg = String::new();
        let backend = SVGBackend::with_string(&mut svg, (WIDTH * FINE, height * FINE));
        let drawn = self.fill(backend.into_drawing_area(), &about, &key, head, grid, panel);
        drawn.expect("a string takes everything, and every panel has room");
        document(&svg, height, self.title)
    }

    fn fill(
        &self,
        root: Area<'_>,
        about: &[String],
        key: &[Vec<(u32, Look, &str)>],
        head: u32,
        grid: Grid,
        mut panel: impl FnMut(usize, &Area<'_>) -> Drawn,
    ) -> Drawn {
        root.fill(&PAPER)?;
        text(&root, (MARGIN, 24), self.title, font(15.5).style(FontStyle::Bold).color(&INK))?;
        let mut y = 24;
        for line in about {
            y += 18;
            text(&root, (MARGIN, y), line, font(SIZE).color(&SOFT))?;
        }
        y += 4;
        for row in key {
            y += 20;
            for (x, look, words) in row {
                root.draw(&mark((fine(x + 5), fine(y - 4)), *look))?;
                text(&root, (x + 16, y), words, font(SIZE).color(&INK))?;
            }
        }
        let (_, body) = root.split_vertically(head * FINE);
        let (body, _) = body.split_vertically(units(grid.panels.div_ceil(grid.columns)) * grid.height * FINE);
        let body = body.margin(0, 0, MARGIN * FINE, MARGIN * FINE);
        let rows = grid.panels.div_ceil(grid.columns);
        for (index, area) in body.split_evenly((rows, grid.columns)).iter().enumerate().take(grid.panels) {
            panel(index, area)?;
        }
        root.present()
    }

    /// Entries of the key with their places, in as many rows as it takes.
    fn rows(&self) -> Vec<Vec<(u32, Look, &str)>> {
        let mut rows: Vec<Vec<(u32, Look, &str)>> = Vec::new();
        let mut x = WIDTH;
        for (look, words) in &self.key {
            let wide = 36 + whole(text_width(words));
            if x + wide - 20 > WIDTH - MARGIN {
                rows.push(Vec::new());
                x = MARGIN;
            }
            if let Some(row) = rows.last_mut() {
                row.push((x, *look, words));
            }
            x += wide;
        }
        rows
    }
}

/// A panel with its title, axes and grid. `left` and `right` are the room beside the data, in pixels.
pub(super) fn panel<'a, 's>(
    area: &'a Area<'s>,
    title: &str,
    (x, x_unit): (Scale, &str),
    (y, y_unit): (Scale, &str),
    (left, right): (u32, u32),
) -> Result<Chart<'a, 's>, DrawingAreaErrorKind<std::io::Error>> {
    let (ticks_x, ticks_y) = (x.ticks().len(), y.ticks().len());
    let (has_lines, below) = (!y.is_rows(), if x_unit.is_empty() { 22 } else { 38 });
    let mut chart = ChartBuilder::on(area)
        .caption(
            fitting(title, f64::from(area.dim_in_pixel().0 / FINE)),
            font(13.0).style(FontStyle::Bold).color(&INK),
        )
        .margin_right(right * FINE)
        .margin_bottom(8 * FINE)
        .x_label_area_size(below * FINE)
        .y_label_area_size(left * FINE)
        .build_cartesian_2d(x, y)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_labels(ticks_x.max(1))
        .y_labels(ticks_y.max(1))
        .max_light_lines(0)
        .bold_line_style(super::looks::GRID.stroke_width(FINE))
        .axis_style(super::looks::GRID.stroke_width(FINE))
        .set_all_tick_mark_size(0)
        .set_tick_mark_size(LabelAreaPosition::Left, 5 * FINE)
        .label_style(font(SIZE).color(&SOFT))
        .axis_desc_style(font(SIZE).color(&SOFT));
    if !has_lines {
        mesh.disable_y_mesh().y_label_style(font(SIZE).color(&INK));
    }
    if !x_unit.is_empty() {
        mesh.x_desc(x_unit);
    }
    if !y_unit.is_empty() {
        mesh.y_desc(y_unit);
    }
    mesh.draw()?;
    Ok(chart)
}

/// Words in a chart, beside a place.
pub(super) fn label(chart: &mut Chart<'_, '_>, at: (f64, f64), words: &str, color: RGBColor) -> Drawn {
    let style = font(SIZE).color(&color).pos(Pos::new(HPos::Left, VPos::Center));
    chart.draw_series([EmptyElement::at(at) + Text::new(clean(words), (fine(10), 0), style)])?;
    Ok(())
}

/// What stands for an arm, at a place.
pub(super) fn mark<'s, At>(at: At, look: Look) -> Mark<'s, At> {
    let corners: Vec<(i32, i32)> =
        look.mark.corners().into_iter().map(|(x, y)| (tenths(x), tenths(y))).collect();
    let outline: Vec<(i32, i32)> = corners.iter().chain(corners.first()).copied().collect();
    let inside = if look.hollow { PAPER } else { look.color };
    EmptyElement::at(at)
        + Polygon::new(corners, inside.filled())
        + PathElement::new(outline, look.color.stroke_width(FINE + FINE / 2))
}

/// A line of so many pixels.
pub(super) fn stroke(color: RGBColor, width: f64) -> ShapeStyle {
    color.stroke_width(tenths(width).unsigned_abs())
}

/// How wide a text will be at most, near enough: DejaVu Sans is among the widest that will be met.
pub(super) fn text_width(text: &str) -> f64 {
    text.chars().map(|c| if "iljtfrI.,:;|' ()1".contains(c) { 0.42 } else { 0.62 }).sum::<f64>() * SIZE
}

/// The room that the longest of these takes, in pixels.
pub(super) fn widest<'w>(words: impl IntoIterator<Item = &'w str>) -> u32 {
    whole(words.into_iter().map(text_width).fold(0.0, f64::max))
}

/// What there is room for, with a sign that there was more.
pub(super) fn fitting(text: &str, room: f64) -> String {
    let text = clean(text);
    if text_width(&text) <= room {
        return text;
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

/// `envoy: Envoy → Envoy, iptables`.
fn named(arm: &Arm) -> String {
    let (name, title) = (plain(&arm.name), plain(&arm.title));
    if title == name || title.is_empty() { name } else { format!("{name}: {title}") }
}

fn font(size: f64) -> FontDesc<'static> {
    FontDesc::new(FontFamily::SansSerif, size * f64::from(FINE) * SHRUNK, FontStyle::Normal)
}

fn text(root: &Area<'_>, (x, y): (u32, u32), words: &str, style: TextStyle<'_>) -> Drawn {
    let style = style.pos(Pos::new(HPos::Left, VPos::Bottom));
    root.draw(&Text::new(clean(words), (fine(x), fine(y)), style))
}

/// Without what XML has no way to write; plotters escapes the rest.
fn clean(words: &str) -> String {
    words
        .chars()
        .map(|c| if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') { '\u{fffd}' } else { c })
        .collect()
}

/// The document for a page: in our pixels, with a title for those who do not see it.
fn document(svg: &str, height: u32, title: &str) -> String {
    // Said once for all words, or by default; plotters says them of each element.
    let said = [" font-family=\"sans-serif\"", " opacity=\"1\"", " stroke=\"none\""];
    let svg = said.iter().fold(svg.to_owned(), |svg, words| svg.replace(words, ""));
    let body = svg.split_once('>').map_or("", |(_, body)| body);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" role=\"img\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {} {}\" font-family=\"{FONT}\">\n<title>{}</title>{body}",
        WIDTH * FINE,
        height * FINE,
        escape(title)
    )
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

fn fine(pixels: u32) -> i32 {
    pixels.saturating_mul(FINE).try_into().unwrap_or(i32::MAX)
}

fn units(count: usize) -> u32 {
    count.try_into().unwrap_or(u32::MAX)
}

#[expect(clippy::cast_possible_truncation, reason = "pixels of a picture")]
fn tenths(pixels: f64) -> i32 {
    (pixels * f64::from(FINE)).round() as i32
}

fn whole(pixels: f64) -> u32 {
    tenths(pixels).unsigned_abs() / FINE + 1
}
