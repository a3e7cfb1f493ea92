//! What `tunnel top` shows: the daemon's latest answer, rates since the one before, and what the operator has typed.
//!
//! # Invariants
//! - The selection is a flow and not a line: it moves with its flow when the order changes, and ends with the daemon whose flow
//!   it is.
//! - No more than [`HISTORY_MAX`] throughputs are kept.

use std::{
    collections::{HashMap, VecDeque},
    time::Instant,
};

use clap::ValueEnum;
use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde::Serialize;

use crate::admin::{FlowView, Status, view::Upstream};

/// More than any terminal has columns.
const HISTORY_MAX: usize = 1024;
/// Lines that page up and page down move.
const PAGE: usize = 10;

/// By what flows are sorted, the most first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Sort {
    /// Bytes in a second, both directions.
    #[default]
    Rate,
    /// Bytes since it began, both directions.
    Bytes,
    /// Since when it runs.
    Age,
}

/// What a daemon has said.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) status: Status,
    pub(super) flows: Vec<FlowView>,
    pub(super) at: Instant,
}

/// A flow, and how fast it is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    #[serde(flatten)]
    pub(super) flow: FlowView,
    /// Bytes in a second.
    pub(super) sent_per_second: f64,
    pub(super) received_per_second: f64,
}

impl Row {
    pub(super) fn rate(&self) -> f64 {
        self.sent_per_second + self.received_per_second
    }

    fn holds(&self, text: &str) -> bool {
        let FlowView { id, client, destination, path, source, upstream, endpoint, identity, .. } = &self.flow;
        let optional = [source, upstream, endpoint, identity].into_iter().flatten();
        [id, client, destination, path].into_iter().chain(optional).any(|field| field.contains(text))
    }
}

/// An upstream, and how many streams it opens.
#[derive(Clone, Debug, Serialize)]
pub(super) struct UpstreamRow {
    #[serde(flatten)]
    pub(super) upstream: Upstream,
    pub(super) streams_opened_per_second: f64,
}

/// Throughput of the whole daemon, in bytes a second.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Throughput {
    pub(super) sent: f64,
    pub(super) received: f64,
}

/// What the keyboard is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    #[default]
    Normal,
    /// The filter is typed.
    Filter,
    /// Whether this flow is to end.
    Confirm { id: String, destination: String },
}

/// What is to be done after a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    Showing,
    Quitting,
    /// The flow with this ID is to end.
    Ending(String),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) sort: Sort,
    pub(super) filter: String,
    pub(super) paused: bool,
    pub(super) mode: Mode,
    /// What was done last, or failed.
    pub(super) said: Option<String>,
    /// Why the daemon does not answer.
    pub(super) lost: Option<String>,
    latest: Option<Sample>,
    pub(super) rows: Vec<Row>,
    pub(super) upstreams: Vec<UpstreamRow>,
    pub(super) now: Throughput,
    /// Both directions, the latest first.
    pub(super) history: VecDeque<u64>,
    /// Seconds that rates are taken over.
    over: f64,
    selected: Option<String>,
}

impl Model {
    pub(super) fn new(sort: Sort, filter: String) -> Self {
        Self {
            sort,
            filter,
            paused: false,
            mode: Mode::Normal,
            said: None,
            lost: None,
            latest: None,
            rows: Vec::new(),
            upstreams: Vec::new(),
            now: Throughput::default(),
            history: VecDeque::new(),
            over: 0.0,
            selected: None,
        }
    }

    /// The daemon's status, once it has answered.
    pub(super) fn status(&self) -> Option<&Status> {
        self.latest.as_ref().map(|sample| &sample.status)
    }

    /// Takes in an answer. While it is paused it is let go.
    pub(super) fn take(&mut self, sample: Sample) {
        self.lost = None;
        // Of another process, which has taken over, all numbers begin again, and a flow with the same ID is another flow.
        let process = |sample: &Sample| (sample.status.overview.pid, sample.status.overview.started_at);
        let same = self.latest.as_ref().is_none_or(|before| process(before) == process(&sample));
        if !same {
            self.selected = None;
            self.paused = false;
            if matches!(self.mode, Mode::Confirm { .. }) {
                self.mode = Mode::Normal;
                self.said = Some("nothing was ended: this is another daemon".to_owned());
            }
        }
        if self.paused {
            return;
        }
        let before = self.latest.take().filter(|_| same);
        let over = before.as_ref().map(|b| sample.at.duration_since(b.at).as_secs_f64().max(0.001));
        let flows = before.as_ref().map(|before| {
            before.flows.iter().map(|f| (f.id.as_str(), (f.sent, f.received))).collect::<HashMap<_, _>>()
        });
        let row = |flow: &FlowView| {
            let (sent, received) =
                flows.as_ref().and_then(|f| f.get(flow.id.as_str()).copied()).unwrap_or_default();
            // Of the first answer, on average since the flow began.
            let over = over.unwrap_or((flow.age_ms / 1e3).max(1.0));
            Row {
                sent_per_second: per(flow.sent, sent, over),
                received_per_second: per(flow.received, received, over),
                flow: flow.clone(),
            }
        };
        self.rows = sample.flows.iter().map(row).collect();
        let opened: HashMap<_, _> = before
            .iter()
            .flat_map(|b| &b.status.upstream_reports)
            .map(|u| (u.name.as_str(), u.totals.streams_opened))
            .collect();
        let upstream = |upstream: &Upstream| UpstreamRow {
            streams_opened_per_second: over.map_or(0.0, |over| {
                let before = opened.get(upstream.name.as_str()).copied();
                per(upstream.totals.streams_opened, before.unwrap_or_default(), over)
            }),
            upstream: upstream.clone(),
        };
        self.upstreams = sample.status.upstream_reports.iter().map(upstream).collect();
        self.now = match (&before, over) {
            (Some(before), Some(over)) => Throughput {
                sent: per(sample.status.flows.sent, before.status.flows.sent, over),
                received: per(sample.status.flows.received, before.status.flows.received, over),
            },
            _ => Throughput { sent: sample.status.rates.sent, received: sample.status.rates.received },
        };
        if let Some(over) = over {
            self.over = over;
            self.history.truncate(HISTORY_MAX - 1);
            self.history.push_front(whole(self.now.sent + self.now.received));
        }
        drop(opened);
        self.latest = Some(sample);
        self.order();
    }

    /// The daemon has not answered. What it said last stays.
    pub(super) fn lost(&mut self, why: String) {
        self.lost = Some(why);
    }

    /// What came of something that was wanted.
    pub(super) fn say(&mut self, what: Result<String, String>) {
        self.said = Some(what.unwrap_or_else(|e| e));
    }

    fn order(&mut self) {
        let key = |row: &Row| match self.sort {
            Sort::Rate => row.rate(),
            #[expect(clippy::cast_precision_loss, reason = "an order of what is shown with three digits")]
            Sort::Bytes => (row.flow.sent + row.flow.received) as f64,
            Sort::Age => row.flow.age_ms,
        };
        // Those that are alike stand still: by their IDs.
        let by = |a: &Row, b: &Row| key(b).total_cmp(&key(a)).then_with(|| a.flow.id.cmp(&b.flow.id));
        let mut rows = std::mem::take(&mut self.rows);
        rows.sort_by(by);
        self.rows = rows;
    }

    /// The flows that the filter lets through, in order.
    pub(super) fn shown(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.holds(&self.filter))
    }

    /// The line of the selected flow, if it is shown.
    pub(super) fn selected(&self) -> Option<usize> {
        let id = self.selected.as_deref()?;
        self.shown().position(|row| row.flow.id == id)
    }

    fn select(&mut self, of: impl Fn(usize, usize) -> usize) {
        let Some(last) = self.shown().count().checked_sub(1) else {
            self.selected = None;
            return;
        };
        let line = of(self.selected().unwrap_or_default(), last).min(last);
        let id = self.shown().nth(line).map(|row| row.flow.id.clone());
        self.selected = id;
    }

    /// Does what a key says.
    pub(super) fn key(&mut self, key: KeyEvent) -> Doing {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && key.code == KeyCode::Char('c') {
            return Doing::Quitting;
        }
        self.said = None;
        match std::mem::take(&mut self.mode) {
            Mode::Filter => self.key_of_filter(key.code),
            Mode::Confirm { id, .. } => {
                if matches!(key.code, KeyCode::Char('y' | 'Y')) {
                    return Doing::Ending(id);
                }
                self.said = Some("nothing was ended".to_owned());
            }
            Mode::Normal if control => {}
            Mode::Normal => return self.key_of_normal(key.code),
        }
        Doing::Showing
    }

    fn key_of_filter(&mut self, code: KeyCode) {
        self.mode = Mode::Filter;
        match code {
            KeyCode::Enter => self.mode = Mode::Normal,
            KeyCode::Esc => {
                self.filter.clear();
                self.mode = Mode::Normal;
            }
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(c) => self.filter.push(c),
            _ => {}
        }
    }

    fn key_of_normal(&mut self, code: KeyCode) -> Doing {
        match code {
            KeyCode::Char('q') => return Doing::Quitting,
            KeyCode::Char('r') => self.sort = Sort::Rate,
            KeyCode::Char('b') => self.sort = Sort::Bytes,
            KeyCode::Char('a') => self.sort = Sort::Age,
            KeyCode::Char('/') => self.mode = Mode::Filter,
            KeyCode::Char(' ' | 'p') => self.paused = !self.paused,
            KeyCode::Esc => self.filter.clear(),
            // The first press selects the first line.
            KeyCode::Down if self.selected().is_none() => self.select(|_, _| 0),
            KeyCode::Down => self.select(|line, _| line + 1),
            KeyCode::Up => self.select(|line, _| line.saturating_sub(1)),
            KeyCode::PageDown => self.select(|line, _| line + PAGE),
            KeyCode::PageUp => self.select(|line, _| line.saturating_sub(PAGE)),
            KeyCode::Home => self.select(|_, _| 0),
            KeyCode::End => self.select(|_, last| last),
            KeyCode::Char('k') => match self.selected().and_then(|line| self.shown().nth(line)) {
                Some(Row { flow, .. }) => {
                    self.mode = Mode::Confirm { id: flow.id.clone(), destination: flow.destination.clone() };
                }
                None => self.said = Some("select a flow first, with the arrow keys".to_owned()),
            },
            _ => {}
        }
        self.order();
        Doing::Showing
    }

    /// All of it, for programs.
    pub(super) fn json(&self) -> String {
        #[derive(Serialize)]
        struct All<'m> {
            version: &'m str,
            pid: u32,
            state: &'m str,
            ready: bool,
            seconds: f64,
            live: usize,
            connecting: usize,
            sent_per_second: f64,
            received_per_second: f64,
            upstreams: &'m [UpstreamRow],
            flows: Vec<&'m Row>,
        }
        let Some(status) = self.status() else { return String::new() };
        let all = All {
            version: &status.overview.version,
            pid: status.overview.pid,
            state: &status.state,
            ready: status.ready,
            seconds: self.over,
            live: status.flows.live,
            connecting: status.flows.pending,
            sent_per_second: self.now.sent,
            received_per_second: self.now.received,
            upstreams: &self.upstreams,
            flows: self.shown().collect(),
        };
        // Texts and numbers can always be written.
        serde_json::to_string_pretty(&all).unwrap_or_default() + "\n"
    }
}

/// Of a counter, in a second.
#[expect(clippy::cast_precision_loss, reason = "a rate is shown with three digits")]
fn per(now: u64, before: u64, over: f64) -> f64 {
    now.saturating_sub(before) as f64 / over
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "no rate is negative, or 2^64")]
fn whole(rate: f64) -> u64 {
    rate as u64
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;

    pub(crate) fn flow(id: &str, to: &str, sent: u64, age_s: f64) -> FlowView {
        FlowView {
            id: id.to_owned(),
            destination: to.to_owned(),
            client: "10.0.0.1:40000".to_owned(),
            path: "copy".to_owned(),
            upstream: Some("gateway".to_owned()),
            sent,
            age_ms: age_s * 1e3,
            ..FlowView::default()
        }
    }

    pub(crate) fn sample(pid: u32, at: Instant, flows: Vec<FlowView>) -> Sample {
        let mut status = Status { ready: true, ..Status::default() };
        status.overview.pid = pid;
        status.flows.sent = flows.iter().map(|f| f.sent).sum();
        status.flows.live = flows.len();
        Sample { status, flows, at }
    }

    fn model(flows: [FlowView; 3], later: [FlowView; 3]) -> Model {
        let mut model = Model::new(Sort::Rate, String::new());
        let start = Instant::now();
        model.take(sample(1, start, flows.into()));
        model.take(sample(1, start + Duration::from_secs(2), later.into()));
        model
    }

    fn three() -> Model {
        model(
            [flow("0-1", "a:1", 0, 10.0), flow("0-2", "b:2", 1000, 30.0), flow("1-1", "c:3", 50, 20.0)],
            [flow("0-1", "a:1", 500, 12.0), flow("0-2", "b:2", 1000, 32.0), flow("1-1", "c:3", 150, 22.0)],
        )
    }

    fn ids(model: &Model) -> Vec<&str> {
        model.shown().map(|row| row.flow.id.as_str()).collect()
    }

    fn press(model: &mut Model, keys: &str) -> Doing {
        let mut doing = Doing::Showing;
        for key in keys.chars() {
            let code = match key {
                '↓' => KeyCode::Down,
                '\n' => KeyCode::Enter,
                '␛' => KeyCode::Esc,
                c => KeyCode::Char(c),
            };
            doing = model.key(code.into());
        }
        doing
    }

    #[test]
    fn flows_are_sorted_by_rate_bytes_or_age() {
        let mut model = three();
        assert_eq!(ids(&model), ["0-1", "1-1", "0-2"]);
        assert!((model.rows[0].sent_per_second - 250.0).abs() < 1e-9);
        assert!((model.now.sent - 300.0).abs() < 1e-9, "{:?}", model.now);
        press(&mut model, "b");
        assert_eq!(ids(&model), ["0-2", "0-1", "1-1"]);
        press(&mut model, "a");
        assert_eq!(ids(&model), ["0-2", "1-1", "0-1"]);
        press(&mut model, "r");
        assert_eq!(ids(&model), ["0-1", "1-1", "0-2"]);
    }

    #[test]
    fn a_filter_is_typed_and_cleared_and_its_letters_are_no_commands() {
        let mut model = three();
        assert_eq!(press(&mut model, "/b:2q"), Doing::Showing);
        assert_eq!(ids(&model), [""; 0]);
        model.key(KeyCode::Backspace.into());
        assert_eq!(ids(&model), ["0-2"]);
        press(&mut model, "\n");
        assert_eq!((ids(&model), model.mode.clone()), (vec!["0-2"], Mode::Normal));
        press(&mut model, "␛");
        assert_eq!(ids(&model).len(), 3);
        assert_eq!(press(&mut model, "q"), Doing::Quitting);
    }

    #[test]
    fn the_selected_flow_is_ended_after_a_yes_only() {
        let mut model = three();
        assert_eq!(press(&mut model, "k"), Doing::Showing);
        assert!(model.said.as_deref().is_some_and(|said| said.contains("select")));
        assert_eq!(press(&mut model, "↓↓kn"), Doing::Showing);
        // It moves with its flow.
        press(&mut model, "b");
        assert_eq!(model.selected(), Some(2));
        assert_eq!(press(&mut model, "ky"), Doing::Ending("1-1".to_owned()));
        // Return is no yes.
        assert_eq!(press(&mut model, "k\n"), Doing::Showing);
    }

    #[test]
    fn what_is_paused_stands_still_and_another_process_begins_again() {
        let mut model = three();
        press(&mut model, " ");
        model.take(sample(1, Instant::now() + Duration::from_secs(9), Vec::new()));
        assert_eq!(ids(&model).len(), 3);
        press(&mut model, " ");
        model.lost("no daemon listens there".to_owned());
        assert_eq!(ids(&model).len(), 3);
        // Its flow 0-1 is another one.
        model.take(sample(2, Instant::now() + Duration::from_secs(10), vec![flow("0-1", "z:9", 100, 0.1)]));
        assert!(model.lost.is_none());
        assert!((model.rows[0].sent_per_second - 100.0).abs() < 1e-9, "{:?}", model.rows);
    }

    /// IDs begin again with each daemon.
    #[test]
    fn a_flow_of_another_daemon_is_not_ended_in_place_of_the_selected_one() {
        for restarted in [false, true] {
            let mut model = three();
            press(&mut model, "↓k");
            let mut next = sample(1, Instant::now(), vec![flow("0-1", "z:9", 100, 0.1)]);
            if restarted {
                // The same pid, given again.
                next.status.overview.started_at = 7;
            } else {
                next.status.overview.pid = 2;
            }
            press(&mut model, "n k");
            assert!(model.paused && matches!(model.mode, Mode::Confirm { .. }));
            model.take(next);
            assert_eq!((ids(&model), model.selected(), model.paused), (vec!["0-1"], None, false));
            assert_eq!(press(&mut model, "y"), Doing::Showing);
            assert_eq!(press(&mut model, "ky"), Doing::Showing);
        }
    }

    #[test]
    fn json_holds_rates_beside_what_is_known_of_a_flow() {
        let json: serde_json::Value = serde_json::from_str(&three().json()).unwrap();
        assert_eq!(json["flows"][0]["destination"], "a:1");
        assert_eq!(json["flows"][0]["sent_per_second"], 250.0);
        assert_eq!((json["live"].as_u64(), json["ready"].as_bool()), (Some(3), Some(true)));
    }
}
