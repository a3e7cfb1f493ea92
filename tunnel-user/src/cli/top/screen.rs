//! What `tunnel top` looks like.
//!
//! # Invariants
//! - In any size it shows the flows first: what has no room is left out, the least useful column first.
//! - What a peer chose (names, identities) is shown as text, never as a terminal's command.

use ratatui_core::{
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    terminal::Frame,
    text::{Line, Span},
};
use ratatui_widgets::{
    paragraph::Paragraph,
    sparkline::{RenderDirection, Sparkline},
    table::{Cell, Row as TableRow, Table, TableState},
};

use super::{
    super::table::{Table as TextTable, amount, bytes, printable},
    model::{Mode, Model, Row, Sort},
};
use crate::model::span::span;

/// Upstreams that have a line of their own.
const UPSTREAMS_MAX: usize = 6;

/// Whether there are colours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    colours: bool,
}

impl Look {
    /// As the environment wants it: <https://no-color.org>.
    #[expect(
        clippy::disallowed_methods,
        reason = "what a terminal's user wants is said there, and read once"
    )]
    pub(super) fn of_environment() -> Self {
        Self { colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }

    fn with(self, style: Style, colour: Color) -> Style {
        if self.colours { style.fg(colour) } else { style }
    }

    fn head(self) -> Style {
        self.with(Style::new().add_modifier(Modifier::BOLD), Color::Cyan)
    }

    fn alarm(self) -> Style {
        self.with(Style::new().add_modifier(Modifier::BOLD), Color::Red)
    }
}

/// A column of flows.
struct Column {
    name: &'static str,
    /// Of its cells, without what remains.
    width: u16,
    /// Those with a higher number go first where there is no room.
    rank: u8,
    right: bool,
    text: fn(&Row) -> String,
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an age is positive and no age of the universe"
)]
fn age(row: &Row) -> String {
    span((row.flow.age_ms / 1e3) as u64)
}

fn per_second(rate: f64) -> String {
    format!("{}/s", amount(rate))
}

fn or(text: Option<&String>, none: &str) -> String {
    text.map_or(none, String::as_str).to_owned()
}

/// In the order that they stand in.
const COLUMNS: [Column; 10] = [
    Column { name: "ID", width: 9, rank: 6, right: false, text: |row| row.flow.id.clone() },
    Column { name: "CLIENT", width: 21, rank: 5, right: false, text: |row| row.flow.client.clone() },
    Column {
        name: "DESTINATION",
        width: 21,
        rank: 0,
        right: false,
        text: |row| row.flow.destination.clone(),
    },
    Column {
        name: "SOURCE",
        width: 12,
        rank: 8,
        right: false,
        text: |row| or(row.flow.source.as_ref(), "-"),
    },
    Column {
        name: "UPSTREAM",
        width: 12,
        rank: 4,
        right: false,
        text: |row| or(row.flow.upstream.as_ref(), "direct"),
    },
    Column {
        name: "IDENTITY",
        width: 24,
        rank: 9,
        right: false,
        text: |row| or(row.flow.identity.as_ref(), "-"),
    },
    Column { name: "PATH", width: 6, rank: 3, right: false, text: |row| row.flow.path.clone() },
    Column { name: "SENT", width: 11, rank: 1, right: true, text: |row| per_second(row.sent_per_second) },
    Column {
        name: "RECEIVED",
        width: 11,
        rank: 2,
        right: true,
        text: |row| per_second(row.received_per_second),
    },
    Column {
        name: "TOTAL  AGE",
        width: 21,
        rank: 7,
        right: true,
        text: |row| format!("{} {:>10}", bytes(row.flow.sent + row.flow.received), age(row)),
    },
];

/// Those that fit in so many columns of a terminal, a space apart.
fn fitting(width: u16) -> Vec<&'static Column> {
    let mut columns: Vec<_> = COLUMNS.iter().collect();
    let needed = |columns: &[&Column]| columns.iter().map(|c| c.width + 1).sum::<u16>().saturating_sub(1);
    while columns.len() > 1 && needed(&columns) > width {
        let worst = (0..columns.len()).max_by_key(|i| columns[*i].rank).unwrap_or_default();
        columns.remove(worst);
    }
    columns
}

/// Draws it.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model, look: Look) {
    let area = frame.area();
    let upstreams = model.upstreams.len().min(UPSTREAMS_MAX);
    // The flows, their head and the lines above and below come first.
    let spark = if area.height >= 12 { 3 } else { 0 };
    let upstreams = if area.height >= 20 && upstreams > 0 { as_rows(upstreams) + 2 } else { 0 };
    let [head, throughput, sparkline, middle, flows, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(spark),
        Constraint::Length(upstreams),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(title(model, look), head);
    frame.render_widget(Paragraph::new(rates(model)), throughput);
    if spark > 0 {
        let style = look.with(Style::new(), Color::Green);
        let bars = Sparkline::default().data(model.history.iter()).style(style);
        frame.render_widget(bars.direction(RenderDirection::RightToLeft), sparkline);
    }
    if upstreams > 0 {
        draw_upstreams(frame, middle, model, look);
    }
    draw_flows(frame, flows, model, look);
    frame.render_widget(footer(model, look), foot);
}

fn as_rows(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

fn title(model: &Model, look: Look) -> Line<'static> {
    let Some(status) = model.status() else { return Line::default() };
    let state = if status.ready { "ready" } else { "NOT READY" };
    let style = if status.ready { Style::new() } else { look.alarm() };
    let mut spans = vec![
        Span::styled(format!("tunnel {}", printable(&status.overview.version)), look.head()),
        Span::raw(format!(" pid {} ", status.overview.pid)),
        Span::styled(state, style),
        Span::raw(format!(
            "  flows {} of {}, {} connecting",
            status.flows.live, status.overview.flows_max, status.flows.pending
        )),
    ];
    if model.paused {
        spans.push(Span::styled("  PAUSED", look.alarm()));
    }
    if let Some(why) = &model.lost {
        let why = why.lines().next().unwrap_or_default();
        spans.insert(0, Span::styled(format!("RECONNECTING: {} ", printable(why)), look.alarm()));
    }
    Line::from(spans)
}

fn rates(model: &Model) -> String {
    let peak = model.history.iter().max().copied().unwrap_or_default();
    format!(
        "{} sent, {} received, peak {}",
        per_second(model.now.sent),
        per_second(model.now.received),
        format_args!("{}/s", bytes(peak))
    )
}

fn draw_upstreams(frame: &mut Frame<'_>, area: Rect, model: &Model, look: Look) {
    let head = ["UPSTREAM", "ENDPOINTS", "CONNECTIONS", "STREAMS", "WAITING", "OPENED", "FAILED"];
    let rows = model.upstreams.iter().take(UPSTREAMS_MAX).map(|row| {
        let (upstream, totals) = (&row.upstream, &row.upstream.totals);
        let available = upstream.endpoints.iter().filter(|e| e.available > 0).count();
        let cells = [
            printable(&upstream.path),
            format!("{available} of {}", upstream.endpoints.len()),
            totals.connections.to_string(),
            totals.streams.to_string(),
            totals.waiting.to_string(),
            format!("{:.1}/s", row.streams_opened_per_second),
            totals.streams_failed.to_string(),
        ];
        let style = if available == 0 { look.alarm() } else { Style::new() };
        TableRow::new(cells.map(Cell::from)).style(style)
    });
    let widths = [
        Constraint::Fill(1),
        Constraint::Length(9),
        Constraint::Length(11),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(8),
        Constraint::Length(8),
    ];
    frame.render_widget(Table::new(rows, widths).header(TableRow::new(head).style(look.head())), area);
}

fn draw_flows(frame: &mut Frame<'_>, area: Rect, model: &Model, look: Look) {
    let columns = fitting(area.width);
    let cell = |column: &Column, text: String| {
        let line = Line::from(text);
        Cell::from(if column.right { line.right_aligned() } else { line })
    };
    let head = TableRow::new(columns.iter().map(|c| cell(c, c.name.to_owned()))).style(look.head());
    let selected = model.selected();
    // No more than fit are made.
    let visible = usize::from(area.height.saturating_sub(1)).max(1);
    let first = selected.map_or(0, |line| line.saturating_sub(visible - 1));
    let rows = model.shown().skip(first).take(visible);
    let rows = rows.map(|row| TableRow::new(columns.iter().map(|c| cell(c, printable(&(c.text)(row))))));
    // What remains is the destination's, which is a name as often as an address.
    let widths = columns.iter().map(|c| match c.rank {
        0 => Constraint::Fill(1),
        _ => Constraint::Length(c.width),
    });
    let table = Table::new(rows, widths).header(head);
    let table = table.row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(selected.map(|line| line - first));
    frame.render_stateful_widget(table, area, &mut state);
}

fn footer(model: &Model, look: Look) -> Line<'static> {
    match &model.mode {
        Mode::Filter => Line::from(format!("filter: {}_  (Enter keeps it, Esc clears it)", model.filter)),
        Mode::Confirm { id, destination } => Line::styled(
            format!("End flow {id} to {}? Both sides are reset. y/N", printable(destination)),
            look.alarm(),
        ),
        Mode::Normal => {
            if let Some(said) = &model.said {
                return Line::styled(printable(said), look.alarm());
            }
            let sort = match model.sort {
                Sort::Rate => "rate",
                Sort::Bytes => "bytes",
                Sort::Age => "age",
            };
            let filter = match model.filter.as_str() {
                "" => String::new(),
                text => format!("  filter \"{}\"", printable(text)),
            };
            Line::from(format!(
                "sorted by {sort}{filter}  q quit  r rate  b bytes  a age  / filter  space pause  k end"
            ))
        }
    }
}

/// The same as lines, for `--once`.
pub(super) fn text(model: &Model) -> String {
    let mut out = String::new();
    let look = Look { colours: false };
    out += &format!("{}\n{}\n", title(model, look), rates(model));
    let head = COLUMNS.map(|column| column.name);
    let mut table = TextTable::new(&head, &[7, 8, 9]);
    for row in model.shown() {
        table.push(COLUMNS.iter().map(|column| (column.text)(row)));
    }
    if !table.is_empty() {
        out.push('\n');
        out += &table.text();
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui_core::{backend::TestBackend, terminal::Terminal};

    use super::{
        super::model::tests::{flow, sample},
        *,
    };

    fn model() -> Model {
        let mut model = Model::new(Sort::Rate, String::new());
        let start = Instant::now();
        let flows =
            |sent| vec![flow("0-1", "10.0.0.5:443", sent, 61.0), flow("0-2", "evil\x1b[2J:1", 0, 1.0)];
        for i in 0..30_u64 {
            model.take(sample(7, start + Duration::from_secs(i), flows(i * i * 1000)));
        }
        model
    }

    fn drawn(model: &Model, width: u16, height: u16, colours: bool) -> (String, bool) {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, Look { colours })).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let coloured = buffer.content().iter().any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset);
        (terminal.backend().to_string(), coloured)
    }

    #[test]
    fn the_fastest_flow_stands_first_and_a_name_does_not_command_the_terminal() {
        let (text, coloured) = drawn(&model(), 120, 24, true);
        assert!(coloured);
        let line = |what: &str| text.lines().position(|line| line.contains(what));
        assert!(line("10.0.0.5:443") < line("evil\\u{1b}[2J:1") && line("10.0.0.5:443").is_some(), "{text}");
        assert!(text.contains("55.7 KiB/s") && text.contains("1 min 1 s") && text.contains('█'), "{text}");
        assert!(!drawn(&model(), 120, 24, false).1);
    }

    #[test]
    fn a_narrow_terminal_shows_destinations_and_rates_and_a_tiny_one_does_not_fail() {
        let (text, _) = drawn(&model(), 48, 8, true);
        assert!(text.contains("10.0.0.5:443") && text.contains("55.7 KiB/s"), "{text}");
        assert!(!text.contains("CLIENT"), "{text}");
        for width in 1..60 {
            for height in 1..14 {
                drawn(&model(), width, height, true);
            }
        }
    }

    #[test]
    fn a_selected_line_far_below_is_visible() {
        let mut model = Model::new(Sort::Age, String::new());
        let flows = (0..100).map(|i| flow(&format!("0-{i:03}"), &format!("d{i:03}:1"), 0, 1.0)).collect();
        model.take(sample(7, Instant::now(), flows));
        model.key(crossterm::event::KeyCode::End.into());
        assert!(drawn(&model, 80, 24, true).0.contains("d099:1"));
    }

    #[test]
    fn lines_for_once_have_every_column() {
        let text = text(&model());
        assert!(text.contains("IDENTITY") && text.contains("55.7 KiB/s") && !text.contains('\x1b'), "{text}");
    }
}
