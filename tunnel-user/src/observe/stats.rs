//! Counters of a worker, and the records of flows that have ended, which `--stats` prints.
//!
//! # Invariants
//! - Each worker writes its own counters only; nothing on the data path crosses a core.
//! - No more than [`RECORDS_MAX`] records are kept.

use std::{
    cell::{Cell, RefCell},
    fmt::{self, Write as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Serialize, Serializer, ser::SerializeStructVariant as _};

use super::histogram::Histogram;
use super::{
    flows::{CurrentPath, Meter},
    marks::Phases,
    policies::PolicyCounters,
    traces::Trace,
};
use crate::model::{
    end::EndReason,
    flow::{ClientAddr, FarEnd, Identity, PeerAddr, SourceKind, Target},
};

/// Records that one worker keeps for `--stats`; later flows are counted only.
pub const RECORDS_MAX: usize = 50_000;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one worker. Only that worker writes them; anybody may read.
        #[derive(Debug, Default)]
        #[repr(align(128))] // two cache lines: the prefetcher fetches pairs
        pub struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
            /// Flows by how they ended.
            pub ended: Ended,
            /// Connections to listeners that were rejected, by the check that they failed.
            pub rejected: Rejected,
            /// How long things took.
            pub durations: Durations,
            /// What each policy did.
            pub policies: PolicyCounters,
        }

        impl Counters {
            /// Those that are no flows by how they ended, with their names.
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }

            /// Every counter with its name.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                let mut all = self.named();
                all.extend(EndReason::ALL.map(|reason| (reason.counter(), self.ended.of(reason).get())));
                all
            }
        }
    };
}

counters! {
    /// Flows that have reached their target.
    flows_opened,
    /// Of those: dialled from here, and not through an upstream.
    flows_dialled,
    /// Flows that reached their target, and have ended.
    flows,
    /// Of those: ended by a reset.
    flows_reset,
    /// Bytes from clients to targets.
    bytes_sent,
    /// Bytes from targets to clients.
    bytes_received,
    /// Of both: moved in the kernel, through pipes.
    bytes_piped,
    /// Directions that were copied because there was no pipe for them.
    pipes_missed,
    /// Flows whose two sockets a kernel program has joined.
    flows_spliced,
    /// Bytes of both directions that it sent on.
    bytes_spliced,
    /// Times that a flow went from being copied to the program.
    splice_promotions,
    /// Times that the daemon had to look, because the program's credit for a direction was used up.
    splice_credit_renewed,
    /// Times that a flow went back to being copied: its messages had become large, or its receiver slow.
    splice_demotions,
    /// Bytes that the program left to the daemon by way of a mailbox, because something waited in front of their socket.
    splice_mailed,
    /// Flows that went back to being copied for good because their mailbox was full (16 MiB), as it gets where the kernel's
    /// worker waits for a processor. The account of memory of their sockets may be wrong.
    splice_forced,
    /// Spliced sockets whose account of memory in the kernel was looked at just before they were closed.
    splice_accounts,
    /// Of those: the account was wrong. More than `splice_forced` explains (two sockets a flow) is a defect. The kernel may warn
    /// of either (inet_sock_destruct).
    splice_accounts_wrong,
    /// Flows that were copied because the program had no place for them.
    splice_no_slot,
    /// Flows that were copied because the kernel did not take their sockets.
    splice_refused,
    /// Refused by policy or by a route.
    denied,
    /// Targets that could not be reached.
    dial_failed,
    /// Upstreams that could not be reached, or that refused.
    tunnel_failed,
    /// CONNECT requests that were none.
    bad_requests,
    /// Peers that failed the handshake or were not let in.
    handshakes_failed,
    /// Of those: their place was needed for another.
    handshakes_evicted,
    /// Of those: their peer had as many connections as one gets.
    connections_over_limit,
    /// Of those: the memory for peers was in use.
    connections_without_memory,
    /// Accepted connections without an original destination.
    no_origin,
    /// Accepted connections whose original destination was our own capture listener.
    to_ourselves,
    /// Connections refused because the limit of flows was reached.
    over_limit,
    /// Tunnel connections accepted.
    tunnels_accepted,
    /// Of those: closed because their peer flooded them.
    tunnels_flooded,
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        // One writer: a load and a store are enough, and no lock prefix is needed.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Reads.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A counter for each [`EndReason`].
#[derive(Debug)]
pub struct Ended([Counter; EndReason::ALL.len()]);

impl Default for Ended {
    fn default() -> Self {
        Self(EndReason::ALL.map(|_| Counter::default()))
    }
}

impl Ended {
    /// That of one reason.
    pub fn of(&self, reason: EndReason) -> &Counter {
        // It has one for each.
        &self.0[reason as usize]
    }
}

/// Durations of one worker.
#[derive(Debug, Default)]
pub struct Durations {
    /// From the arrival of a flow until its target was reached.
    pub connect: Histogram,
    /// From there, too, until the first byte of its target.
    pub first_byte: Histogram,
    /// From there, too, until its end, of those that had reached their target.
    pub flow: Histogram,
    /// From the arrival of a connection at a listener until its handshake was complete.
    pub handshake: Histogram,
}

macro_rules! checks {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// What a connection to a listener has to pass before its first request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Check {
            $($(#[$doc])* $name,)*
        }

        impl Check {
            /// All of them.
            pub const ALL: [Self; [$($word),*].len()] = [$(Self::$name),*];

            /// The word by which programs know it.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }
        }
    };
}

checks! {
    /// TLS, or the certificate.
    Tls = "tls",
    /// What is spoken on it.
    Http = "http",
    /// The PROXY protocol in front of it.
    ProxyProtocol = "proxy_protocol",
    /// In time.
    Timeout = "timeout",
    /// Before its place was needed for another.
    Crowded = "crowded",
    /// The peer stayed.
    Gone = "gone",
    /// No flood of frames.
    Flood = "flood",
    /// Fewer connections of its peer than one gets.
    PeerConnections = "peer_connections",
    /// Memory for peers.
    Memory = "memory",
}

/// A counter for each [`Check`].
#[derive(Debug)]
pub struct Rejected([Counter; Check::ALL.len()]);

impl Default for Rejected {
    fn default() -> Self {
        Self(Check::ALL.map(|_| Counter::default()))
    }
}

impl Rejected {
    /// That of one check.
    pub fn by(&self, check: Check) -> &Counter {
        // It has one for each.
        &self.0[check as usize]
    }
}

/// How a flow left this process.
#[derive(Clone)]
pub enum Via {
    /// Dialled from here, at this address.
    Direct(PeerAddr),
    /// In a stream of a connection to this peer.
    Tunnel {
        /// The upstream's name.
        upstream: Arc<str>,
        /// Its endpoint.
        peer: FarEnd,
        /// The stream's number on its connection; none where the connection is the flow's alone.
        stream: Option<u64>,
    },
    /// It got nowhere.
    Nowhere,
}

impl Serialize for Via {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Direct(_) => to.serialize_unit_variant("Via", 0, "direct"),
            Self::Tunnel { upstream, peer, stream } => {
                let mut fields = to.serialize_struct_variant("Via", 1, "tunnel", 3)?;
                fields.serialize_field("upstream", &**upstream)?;
                fields.serialize_field("peer", &peer.to_string())?;
                fields.serialize_field("stream", stream)?;
                fields.end()
            }
            Self::Nowhere => to.serialize_unit_variant("Via", 2, "nowhere"),
        }
    }
}

impl fmt::Debug for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(_) => f.write_str("Direct"),
            Self::Nowhere => f.write_str("Nowhere"),
            Self::Tunnel { upstream, peer, stream } => {
                let mut shown = f.debug_struct("Tunnel");
                // As people write an address, and not as the type is made.
                shown.field("upstream", upstream).field("peer", &peer.to_string());
                shown.field("stream", stream).finish()
            }
        }
    }
}

/// What a flow wanted to reach.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A target.
    Target(Target),
    /// What was asked for, and is none.
    Unparsed(Box<str>),
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Target(target) => target.fmt(f),
            Self::Unparsed(text) => f.write_str(text),
        }
    }
}

/// One flow, after its end. What is known of it is kept as it is, and written out only for who reads it: most flows
/// are only counted.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// Where it was to go.
    #[serde(serialize_with = "shown")]
    pub destination: Destination,
    /// Who asked for it.
    #[serde(serialize_with = "shown")]
    pub client: ClientAddr,
    /// Who that proved to be.
    #[serde(serialize_with = "shown_if_known", skip_serializing_if = "Option::is_none")]
    pub client_identity: Option<Identity>,
    /// Whether it came by a capture or by a listener.
    #[serde(skip)]
    pub kind: SourceKind,
    /// The name of the capture, or of the listener, that it came by.
    #[serde(serialize_with = "shown_if_known")]
    pub source: Option<Arc<str>>,
    /// The name in the TLS or HTTP/1 that it carries, where a route asked for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Box<str>>,
    /// Which route took it: its place in the configuration, from 0. None where none did.
    pub route: Option<usize>,
    /// What the configuration calls that route.
    #[serde(serialize_with = "shown_if_known", skip_serializing_if = "Option::is_none")]
    pub route_name: Option<Arc<str>>,
    /// How it left.
    pub via: Via,
    /// Upstreams before that which were this process itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passed: Vec<String>,
    /// Who the far end proved to be.
    #[serde(serialize_with = "shown_if_known")]
    pub identity: Option<Identity>,
    /// By what its bytes were moved in the end.
    #[serde(skip)]
    pub path: CurrentPath,
    /// Bytes from the client.
    pub sent: u64,
    /// Bytes to the client.
    pub received: u64,
    /// The trace that it is part of, where traces are configured.
    #[serde(skip)]
    pub trace: Option<Box<Trace>>,
    /// How long its parts took.
    #[serde(flatten)]
    pub phases: Phases,
    /// From connect to end, in milliseconds.
    pub duration_ms: f64,
    /// How it ended.
    pub reason: EndReason,
    /// The name of the policy or the route that refused it, or has ended it.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "shown_if_known")]
    pub rule: Option<Arc<str>>,
    /// What else there is to say of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<Box<str>>,
}

fn shown<S: Serializer>(what: &impl fmt::Display, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(what)
}

fn shown_if_known<S: Serializer>(what: &Option<impl fmt::Display>, to: S) -> Result<S::Ok, S::Error> {
    match what {
        Some(what) => to.collect_str(what),
        None => to.serialize_none(),
    }
}

impl Record {
    /// A record of a flow that got nowhere, to be filled in.
    pub fn new(target: &Target, client: ClientAddr) -> Self {
        Self {
            destination: Destination::Target(target.clone()),
            client,
            client_identity: None,
            kind: SourceKind::Capture,
            source: None,
            host: None,
            route: None,
            route_name: None,
            via: Via::Nowhere,
            passed: Vec::new(),
            identity: None,
            path: CurrentPath::default(),
            sent: 0,
            received: 0,
            trace: None,
            phases: Phases::default(),
            duration_ms: 0.0,
            reason: EndReason::InternalError,
            rule: None,
            detail: None,
        }
    }

    /// It went through a tunnel.
    pub fn through(
        &mut self,
        upstream: &Arc<str>,
        peer: &FarEnd,
        stream: Option<u64>,
        identity: Option<&Identity>,
    ) {
        self.via = Via::Tunnel { upstream: Arc::clone(upstream), peer: peer.clone(), stream };
        self.identity = identity.cloned();
    }

    /// For the log: the upstreams that were this process itself, if there were any.
    pub fn passed(&self) -> Option<String> {
        (!self.passed.is_empty()).then(|| self.passed.join(", "))
    }

    /// It ended so.
    pub fn ended(&mut self, reason: EndReason, detail: Option<String>) {
        (self.reason, self.detail) = (reason, detail.map(String::into_boxed_str));
    }

    /// It has moved this.
    pub fn has_moved(&mut self, meter: &Meter) {
        (self.sent, self.received) = (meter.sent.get(), meter.received.get());
        (self.path, self.phases.first_byte) = (meter.path.get(), meter.first_byte.get());
    }

    /// It took this long; kept to the microsecond, so that a log line has no more digits than that.
    pub fn lasted(&mut self, duration: Duration) {
        self.duration_ms = (duration.as_secs_f64() * 1e6).round() / 1e3;
    }
}

/// The records of one worker.
#[derive(Debug, Default)]
pub struct Records {
    keep: bool,
    records: RefCell<Vec<Record>>,
    dropped: Cell<u64>,
}

impl Records {
    /// Keeps records only if somebody will ask.
    pub fn new(keep: bool) -> Self {
        Self { keep, ..Self::default() }
    }

    /// Adds one.
    pub fn push(&self, record: Record) {
        if !self.keep {
            return;
        }
        let mut records = self.records.borrow_mut();
        if records.len() < RECORDS_MAX {
            records.push(record);
        } else {
            self.dropped.set(self.dropped.get() + 1);
        }
    }

    /// All of them, and how many there was no room for.
    pub fn take(&self) -> (Vec<Record>, u64) {
        (self.records.take(), self.dropped.take())
    }
}

/// The table of `--stats`.
pub fn table(records: &[Record], dropped: u64) -> String {
    const HEAD: [&str; 9] =
        ["DESTINATION", "GATEWAY", "STREAM", "IDENTITY", "SENT", "RECEIVED", "TIME", "REASON", "DETAIL"];
    let rows: Vec<[String; 9]> = records
        .iter()
        .map(|r| {
            let (gateway, stream) = match &r.via {
                Via::Direct(_) => ("direct".to_owned(), "-".to_owned()),
                Via::Tunnel { peer, stream, .. } => {
                    (peer.to_string(), stream.map_or_else(|| "-".to_owned(), |n| n.to_string()))
                }
                Via::Nowhere => ("-".to_owned(), "-".to_owned()),
            };
            let gateway = r.passed().map_or(gateway.clone(), |passed| format!("{passed}, {gateway}"));
            [
                r.destination.to_string(),
                gateway,
                stream,
                r.identity.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
                bytes(r.sent),
                bytes(r.received),
                time(r.duration_ms),
                r.reason.to_string(),
                r.detail.as_deref().unwrap_or_default().to_owned(),
            ]
        })
        .collect();
    let mut widths = HEAD.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in std::iter::once(HEAD.map(str::to_owned)).chain(rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(i, (cell, width))| {
                // Numbers to the right.
                if matches!(i, 2 | 4..=6) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            })
            .collect();
        // Writing to a String does not fail.
        let _written = writeln!(out, "{}", cells.join("  ").trim_end());
    }
    if dropped > 0 {
        let _written = writeln!(out, "and {dropped} more");
    }
    out
}

/// Three digits and a unit, powers of 1024.
fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn time(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.1} ms") } else { format!("{:.2} s", ms / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::flow::PeerAddr;

    #[test]
    fn the_table_lines_up_and_says_what_was_left_out() {
        let mut record =
            Record::new(&"10.200.0.10:80".parse().unwrap(), ClientAddr("127.0.0.1:9".parse().unwrap()));
        let gateway = FarEnd::Socket(PeerAddr("10.77.0.2:15008".parse().unwrap()));
        record.through(&"gateway".into(), &gateway, Some(3), None);
        (record.sent, record.received) = (76, 52_428_800);
        record.ended(EndReason::TargetReset, Some("Connection reset by peer".to_owned()));
        record.lasted(Duration::from_micros(1234));
        let text = table(&[record], 2);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("10.200.0.10:80  10.77.0.2:15008"), "{text}");
        assert!(
            lines[1].contains("76 B") && lines[1].contains("50.0 MiB") && lines[1].contains("1.2 ms"),
            "{text}"
        );
        assert_eq!(lines[0].find("REASON"), lines[1].find("target_reset"));
        assert_eq!(lines[0].find("DETAIL"), lines[1].find("Connection reset"));
        assert_eq!(lines[2], "and 2 more");
    }

    /// A duration is shown in milliseconds with three digits behind the point at most.
    #[test]
    fn a_duration_has_microseconds_and_no_more() {
        let mut record = Record::new(&"a:1".parse().unwrap(), ClientAddr("127.0.0.1:9".parse().unwrap()));
        for (nanos, shown) in
            [(1_234_567, "1.235"), (100_000_049, "100"), (99, "0"), (73_000_000_111, "73000")]
        {
            record.lasted(Duration::from_nanos(nanos));
            assert_eq!(record.duration_ms.to_string(), shown);
        }
    }

    /// No more than [`RECORDS_MAX`] records are kept, and the others are counted.
    #[test]
    fn records_are_bounded() {
        let records = Records::new(true);
        let one = Record::new(&"a:1".parse().unwrap(), ClientAddr("127.0.0.1:9".parse().unwrap()));
        for _ in 0..RECORDS_MAX + 3 {
            records.push(one.clone());
        }
        let (kept, dropped) = records.take();
        assert_eq!((kept.len(), dropped), (RECORDS_MAX, 3));
    }
}
