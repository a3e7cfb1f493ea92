//! `tunnel flows`: the flows that a running daemon carries.

use std::{
    collections::HashMap,
    io::{self, Write},
    thread,
    time::{Duration, Instant},
};

use clap::Args;

use super::{
    client::{Client, DaemonArgs, encoded},
    table::{Table, amount, bytes},
};
use crate::{
    admin::FlowView,
    config::parse_duration,
    model::span::span,
    observe::flows::FlowId,
    process::exit::{Cause, Failure},
};

/// Moves the cursor to the corner, and clears what is below (ECMA-48, CUP and ED).
const CLEAR: &str = "\x1b[H\x1b[J";

/// Arguments of `tunnel flows`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel flows
  sudo tunnel flows --destination 10.0.0.5: --min-age 10m
  sudo tunnel flows --watch --upstream gateway
  sudo tunnel flows --kill 0-1234
  sudo tunnel flows --json | jq 'map(.sent) | add'")]
pub struct FlowsArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// Only flows whose destination contains this text, such as 10.0.0.5: or :443.
    #[arg(long, value_name = "TEXT")]
    pub destination: Option<String>,
    /// Only flows whose client's address contains this text.
    #[arg(long, value_name = "TEXT")]
    pub client: Option<String>,
    /// Only flows that came by this capture or listener.
    #[arg(long, value_name = "NAME")]
    pub source: Option<String>,
    /// Only flows through this upstream; "direct": those that the daemon dialled itself.
    #[arg(long, value_name = "NAME")]
    pub upstream: Option<String>,
    /// Only flows of an identity that contains this text.
    #[arg(long, value_name = "TEXT")]
    pub identity: Option<String>,
    /// Only flows of this route: its place in the configuration, from 0.
    #[arg(long, value_name = "N")]
    pub route: Option<usize>,
    /// Only flows that are at least this old, such as 10m.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub min_age: Option<Duration>,
    /// Only flows that have moved at least so many bytes.
    #[arg(long, value_name = "N")]
    pub min_bytes: Option<u64>,
    /// At most so many.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Print them again every second, with their rates, until interrupted.
    #[arg(long, conflicts_with = "json")]
    pub watch: bool,
    /// End the flow with this ID, with a reset of both sides.
    #[arg(long, value_name = "ID", conflicts_with_all = ["watch", "json"])]
    pub kill: Option<FlowId>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

impl FlowsArgs {
    fn path(&self) -> String {
        let text = |name, value: &Option<String>| value.as_ref().map(|v| format!("{name}={}", encoded(v)));
        let number = |name, value: Option<u64>| value.map(|v| format!("{name}={v}"));
        let parameters = [
            text("destination", &self.destination),
            text("client", &self.client),
            text("source", &self.source),
            text("upstream", &self.upstream),
            text("identity", &self.identity),
            number("route", self.route.map(|n| n as u64)),
            self.min_age.map(|age| format!("min_age={}ms", age.as_millis())),
            number("min_bytes", self.min_bytes),
            number("limit", self.limit.map(|n| n as u64)),
        ];
        format!("/flows?{}", parameters.into_iter().flatten().collect::<Vec<_>>().join("&"))
    }
}

/// Prints to `out`.
pub fn run(args: &FlowsArgs, mut out: impl Write) -> Result<(), Failure> {
    let client = Client::new(&args.daemon)?;
    if let Some(id) = args.kill {
        client.post(&format!("/flows/{id}/kill"))?;
        return write(&mut out, &format!("ended flow {id}\n")).map(drop);
    }
    let path = args.path();
    if args.json {
        return write(&mut out, &String::from_utf8_lossy(&client.get(&path)?)).map(drop);
    }
    let flows: Vec<FlowView> = client.read(&path)?;
    if !args.watch {
        return write(&mut out, &text(&flows, None)).map(drop);
    }
    let mut before = (Instant::now(), flows);
    loop {
        pause();
        let flows: Vec<FlowView> = client.read(&path)?;
        let now = Instant::now();
        let rates = Rates::new(&before.1, now.duration_since(before.0));
        if !write(&mut out, &format!("{CLEAR}{}", text(&flows, Some(&rates))))? {
            return Ok(());
        }
        before = (now, flows);
    }
}

/// Between two looks.
#[expect(clippy::disallowed_methods, reason = "a command that has nothing else to do, and no worker")]
fn pause() {
    thread::sleep(Duration::from_secs(1));
}

/// Whether somebody still reads.
fn write(out: &mut impl Write, text: &str) -> Result<bool, Failure> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Other(Cause::new(format!("standard output: {e}"), "")))
        }
        written => Ok(written.is_ok()),
    }
}

/// How fast flows are, since a moment before.
struct Rates<'f> {
    before: HashMap<&'f str, u64>,
    over: Duration,
}

impl<'f> Rates<'f> {
    fn new(before: &'f [FlowView], over: Duration) -> Self {
        Self { before: before.iter().map(|f| (f.id.as_str(), f.sent + f.received)).collect(), over }
    }

    /// Bytes in a second.
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    fn of(&self, flow: &FlowView) -> f64 {
        let before = self.before.get(flow.id.as_str()).copied().unwrap_or_default();
        (flow.sent + flow.received).saturating_sub(before) as f64 / self.over.as_secs_f64().max(0.001)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an age is positive and no age of the universe"
)]
fn text(flows: &[FlowView], rates: Option<&Rates<'_>>) -> String {
    let last = if rates.is_some() { "RATE" } else { "AGE" };
    let head = [
        "ID",
        "CLIENT",
        "DESTINATION",
        "SOURCE",
        "UPSTREAM",
        "ENDPOINT",
        "IDENTITY",
        "PATH",
        "SENT",
        "RECEIVED",
        last,
    ];
    let mut table = Table::new(&head, &[8, 9, 10]);
    let mut sorted: Vec<_> = flows.iter().collect();
    if let Some(rates) = rates {
        sorted.sort_by(|a, b| rates.of(b).total_cmp(&rates.of(a)));
    }
    let or_none = |text: &Option<String>, none: &str| text.clone().unwrap_or_else(|| none.to_owned());
    for flow in sorted {
        table.push([
            flow.id.clone(),
            flow.client.clone(),
            flow.destination.clone(),
            or_none(&flow.source, "-"),
            or_none(&flow.upstream, "direct"),
            or_none(&flow.endpoint, "-"),
            or_none(&flow.identity, "-"),
            flow.path.clone(),
            bytes(flow.sent),
            bytes(flow.received),
            match rates {
                Some(rates) => format!("{}/s", amount(rates.of(flow))),
                None => span((flow.age_ms / 1e3) as u64),
            },
        ]);
    }
    if table.is_empty() { "no flows\n".to_owned() } else { table.text() }
}
