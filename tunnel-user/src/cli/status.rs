//! `tunnel status`: what a running daemon is doing, on one screen.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;

use super::{
    client::{Client, DaemonArgs},
    table::{Table, amount, printable},
};
use crate::{
    admin::{
        Overview, Status,
        view::{Privileges, Problem, Severity, ThreadPrivileges},
    },
    model::span::span,
    process::exit::Failure,
};

/// Arguments of `tunnel status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel status
  sudo tunnel status --config /etc/tunnel/agent.toml
  sudo tunnel status --json | jq '.problems'")]
pub struct StatusArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// The text, and whether the daemon is ready.
pub fn run(args: &StatusArgs) -> Result<(String, bool), Failure> {
    let client = Client::new(&args.daemon)?;
    let status: Status = client.read("/status")?;
    let text = if args.json {
        String::from_utf8_lossy(&client.get("/status")?).into_owned()
    } else {
        text(&status, now())
    };
    Ok((text, status.ready))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

fn text(status: &Status, now: u64) -> String {
    let Status { overview, flows, rates, .. } = status;
    let mut out = String::new();
    let ready = if status.ready { "ready" } else { "NOT READY" };
    out += &format!(
        "tunnel {}: {}, {ready}, pid {}, up {}, {} workers, {}\n",
        overview.version,
        status.state,
        overview.pid,
        span(now.saturating_sub(overview.started_at)),
        overview.workers,
        overview.kernel
    );
    if let Some(file) = &overview.config_file {
        let reloads = &overview.reloads;
        let since = span(now.saturating_sub(reloads.last_success_at));
        let (done, failed) = (reloads.succeeded, reloads.failed);
        out += &format!(
            "configuration {}, in force for {since} ({done} reloads, {failed} failed)\n",
            file.display()
        );
    }
    out += &privileges(&overview.privileges);
    out += &format!(
        "flows {} of {} live, {} connecting, {} since the start; {:.1}/s, {}/s sent, {}/s received in the last {:.0} s\n",
        flows.live,
        overview.flows_max,
        flows.pending,
        flows.opened,
        rates.opened,
        amount(rates.sent),
        amount(rates.received),
        rates.over
    );
    if !rates.errors_last_hour.is_empty() {
        let errors: Vec<_> =
            rates.errors_last_hour.iter().map(|(reason, n)| format!("{reason} {n}")).collect();
        out += &format!("errors of the last hour: {}\n", errors.join(", "));
    }
    if status.overview_age > 0 {
        out +=
            &format!("what follows is {} old: the control loop does not answer\n", span(status.overview_age));
    }
    for table in [captures(overview), listeners(overview), upstreams(status), identities(overview, now)] {
        if !table.is_empty() {
            out.push('\n');
            out += &table.text();
        }
    }
    if !status.problems.is_empty() {
        out += "\nPROBLEMS\n";
        for Problem { severity, what, remedy, .. } in &status.problems {
            let mark = if *severity == Severity::Error { "error" } else { "warning" };
            out += &format!("{mark}: {}\n", printable(what));
            if !remedy.is_empty() {
                out += &format!("  {}\n", printable(remedy));
            }
        }
    }
    out
}

fn privileges(all: &Privileges) -> String {
    let of = |thread: &ThreadPrivileges| {
        let mut parts = vec![match &thread.capabilities[..] {
            [] => "no capabilities".to_owned(),
            names => names.join(" "),
        }];
        parts.extend(thread.no_new_privs.then(|| "no_new_privs".to_owned()));
        parts.extend((thread.seccomp != "none").then(|| format!("seccomp {}", thread.seccomp)));
        parts.extend(thread.landlock.map(|version| format!("landlock {version}")));
        parts.join(", ")
    };
    let dumps = if all.core_dumps { "core dumps" } else { "no core dumps" };
    format!(
        "user {}, {dumps}
  workers: {}
  control: {}
",
        all.user,
        all.workers.as_ref().map_or_else(|| "unknown: the one that was looked at has ended".to_owned(), of),
        of(&all.control)
    )
}

fn captures(overview: &Overview) -> Table {
    let mut table =
        Table::new(&["CAPTURE", "CGROUP", "STATE", "NAMESPACES", "PROCESSES", "CAPTURED"], &[3, 4, 5]);
    for capture in &overview.captures {
        let state = match (capture.present, capture.attached) {
            (false, _) => "waits for its cgroup",
            (true, true) => "capturing",
            (true, false) => "NOT ATTACHED",
        };
        let captured = capture.counters.get("captured").copied().unwrap_or_default();
        table.push([
            capture.name.clone().unwrap_or_else(|| "-".to_owned()),
            capture.group.clone(),
            state.to_owned(),
            capture.namespaces.to_string(),
            capture.processes.to_string(),
            captured.to_string(),
        ]);
    }
    table
}

fn listeners(overview: &Overview) -> Table {
    let mut table = Table::new(&["LISTENER", "ADDRESS", "FOR", "TLS"], &[]);
    for listener in &overview.listeners {
        table.push([
            listener.name.clone().unwrap_or_else(|| "-".to_owned()),
            listener.address.clone(),
            listener.kind.clone(),
            if listener.tls { "yes" } else { "no" }.to_owned(),
        ]);
    }
    table
}

fn upstreams(status: &Status) -> Table {
    let head = ["UPSTREAM", "ENDPOINT", "STATE", "CONNECTIONS", "STREAMS", "OPENED", "FAILED", "LAST ERROR"];
    let mut table = Table::new(&head, &[3, 4, 5, 6]);
    for upstream in &status.upstream_reports {
        let totals = &upstream.totals;
        if upstream.endpoints.is_empty() {
            let why = upstream.unavailable.clone().unwrap_or_default();
            let (opened, failed) = (totals.streams_opened.to_string(), totals.streams_failed.to_string());
            let none = || "-".to_owned();
            table.push([
                upstream.path.clone(),
                none(),
                "no endpoint".to_owned(),
                none(),
                none(),
                opened,
                failed,
                why,
            ]);
        }
        for (i, endpoint) in upstream.endpoints.iter().enumerate() {
            let state = match endpoint {
                e if e.ejected > 0 && e.available == 0 => "ejected",
                e if e.unhealthy > 0 && e.available == 0 => "unhealthy",
                e if e.ejected + e.unhealthy > 0 => "partly out",
                _ => "available",
            };
            let first = |text: String| if i == 0 { text } else { String::new() };
            table.push([
                first(upstream.path.clone()),
                endpoint.address.clone(),
                state.to_owned(),
                endpoint.connections.to_string(),
                endpoint.streams.to_string(),
                first(totals.streams_opened.to_string()),
                first(totals.streams_failed.to_string()),
                endpoint.last_error.clone(),
            ]);
        }
    }
    table
}

fn identities(overview: &Overview, now: u64) -> Table {
    let mut table = Table::new(&["IDENTITY", "NAME", "EXPIRES IN", "FROM"], &[]);
    for identity in &overview.identities {
        let ends =
            identity.chain.first().and_then(|leaf| u64::try_from(leaf.not_after).ok()).unwrap_or_default();
        let expires = if ends < now { format!("EXPIRED {} ago", span(now - ends)) } else { span(ends - now) };
        table.push([
            identity.name.clone(),
            identity.identity.clone().unwrap_or_else(|| "-".to_owned()),
            expires,
            identity.origin.clone(),
        ]);
    }
    table
}
