//! Traces: the spans of a flow (capture or listener, route, connect, queue, dial, handshake), sent to a collector by OTLP.
//!
//! Workers make the spans of sampled flows and hand them over; one thread sends them in batches.
//!
//! # Invariants
//! - No flow waits for a collector: a span that finds the queue full is dropped, and counted.
//! - A trace that a peer has begun is sampled if its `traceparent` says so (W3C Trace Context section 3.2.3.4), one that
//!   begins here by chance; what is passed on says the same.

mod export;
mod otlp;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, TrySendError},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

pub use self::export::{Connect, Exporter};
use super::{
    marks::{Made, Marks},
    stats::{Record, Via},
};
use crate::{
    config::Ratio,
    model::{
        end::{EndReason, Fault},
        flow::SourceKind,
    },
};

/// Spans that wait to be sent, with half a KiB each 2 MiB (the default of OpenTelemetry's batch processors is 2,048).
pub const QUEUE_MAX: usize = 4096;
/// A flow waited in a queue that is worth a span, even where no connection was made for it.
const QUEUE_SHOWN: Duration = Duration::from_millis(1);

/// Spans that a collector has taken since the start.
static EXPORTED: AtomicU64 = AtomicU64::new(0);
/// Spans that were dropped since the start.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Spans that a collector has taken since the start.
pub fn exported() -> u64 {
    EXPORTED.load(Ordering::Relaxed)
}

/// Spans that were dropped since the start: for want of room in the queue, or because no collector took them.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// The trace that a peer has sent (`traceparent`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The trace's id; not 0.
    pub id: u128,
    /// The peer's span.
    pub parent: u64,
    /// Its flags: bit 0 is "sampled".
    pub flags: u8,
}

/// The trace of a flow, and its own spans in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The trace's id.
    pub id: u128,
    /// What is passed on as flags.
    pub flags: u8,
    /// The span that it is part of.
    parent: Option<u64>,
    /// The span of the flow.
    flow: u64,
    /// The span of its request to the upstream, which is the next hop's parent; or of its dial.
    pub connect: u64,
}

impl Trace {
    /// Whether it has spans.
    pub const fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }
}

/// What workers trace by.
pub struct Tracer {
    sample: Ratio,
    queue: SyncSender<Message>,
    /// Spans that found the queue full, and were not reported yet.
    overflowed: Arc<AtomicU64>,
}

enum Message {
    Span(Box<Span>),
    /// To look at what else it was told.
    Wake,
}

/// One span.
#[derive(Clone, Debug)]
struct Span {
    trace: u128,
    id: u64,
    parent: Option<u64>,
    name: &'static str,
    kind: Kind,
    start: SystemTime,
    end: SystemTime,
    attributes: Vec<(&'static str, Attribute)>,
    error: Option<String>,
}

/// `SpanKind` of OTLP.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
enum Kind {
    Internal = 1,
    Server = 2,
    Client = 3,
}

#[derive(Clone, Debug)]
enum Attribute {
    Text(String),
    Number(i64),
}

impl Tracer {
    /// The trace of a flow that begins.
    pub fn begin(&self, received: Option<Received>) -> Trace {
        let span = || fastrand::u64(1..);
        let (flow, connect) = (span(), span());
        match received {
            Some(Received { id, parent, flags }) => Trace { id, flags, parent: Some(parent), flow, connect },
            None => {
                let flags = u8::from(self.sample.holds(fastrand::u32(..)));
                Trace { id: fastrand::u128(1..), flags, parent: None, flow, connect }
            }
        }
    }

    /// A flow has reached its target, or has failed to for this reason.
    pub fn reached(&self, record: &Record, started: Instant, marks: &Marks, failed: Option<EndReason>) {
        let Some(trace) = record.trace.as_deref().filter(|trace| trace.is_sampled()) else { return };
        let clock = Clock::now();
        let Some(routed) = marks.routed.get() else { return };
        let mut route = span(trace, "route", Kind::Internal, clock.range(started, routed));
        if let Some(number) = record.route {
            route.attributes.push(("tunnel.route.index", Attribute::Number(number as i64)));
        }
        text(&mut route, "tunnel.route.name", record.route_name.as_deref());
        let unrouted = matches!(failed, Some(EndReason::RouteDenied | EndReason::NoRoute));
        if let Some(reason) = failed.filter(|_| unrouted) {
            route.fail(reason, None);
        }
        self.put(route);
        if unrouted {
            return;
        }
        let until = marks.reached.get().unwrap_or(clock.instant);
        // Of a flow that failed it is not always known; whoever has waited for a connection wanted a tunnel.
        let tunnelled = matches!(record.via, Via::Tunnel { .. }) || marks.queued.get().is_some();
        let name = if tunnelled { "connect" } else { "dial" };
        let mut connect = span(trace, name, Kind::Client, clock.range(routed, until));
        connect.id = trace.connect;
        match &record.via {
            Via::Direct(addr) => connect.peer(&addr.to_string()),
            Via::Tunnel { upstream, peer, .. } => {
                text(&mut connect, "tunnel.upstream.name", Some(upstream));
                text(&mut connect, "tunnel.upstream.identity", record.identity.as_ref().map(|i| &*i.0));
                connect.peer(&peer.to_string());
            }
            Via::Nowhere => {}
        }
        text(&mut connect, "tunnel.destination", Some(&record.destination.to_string()));
        if let Some(reason) = failed {
            connect.fail(reason, record.detail.as_deref());
        }
        self.put(connect);
        let below = |name, kind, [from, until]: [Instant; 2]| {
            let mut span = span(trace, name, kind, clock.range(from, until));
            span.parent = Some(trace.connect);
            span
        };
        let made = marks.made.get();
        if let Some([from, until]) = marks.queued.get()
            && (made.is_some() || until.saturating_duration_since(from) >= QUEUE_SHOWN)
        {
            self.put(below("queue", Kind::Internal, [from, until]));
        }
        if let Some(Made { begun, connected, ready }) = made {
            self.put(below("dial", Kind::Client, [begun, connected]));
            self.put(below("handshake", Kind::Client, [connected, ready]));
        }
    }

    /// A flow has ended, or was refused.
    pub fn ended(&self, record: &Record, started: Instant) {
        let Some(trace) = record.trace.as_deref().filter(|trace| trace.is_sampled()) else { return };
        let clock = Clock::now();
        let name = match record.kind {
            SourceKind::Capture => "capture",
            SourceKind::Listener => "listener",
        };
        let mut flow = span(trace, name, Kind::Server, clock.range(started, clock.instant));
        (flow.id, flow.parent) = (trace.flow, trace.parent);
        text(&mut flow, "tunnel.source.name", record.source.as_deref());
        text(&mut flow, "tunnel.destination", Some(&record.destination.to_string()));
        text(&mut flow, "tunnel.client.identity", record.client_identity.as_ref().map(|i| &*i.0));
        text(&mut flow, "tunnel.host", record.host.as_deref());
        text(&mut flow, "client.address", Some(&record.client.0.ip().to_string()));
        text(&mut flow, "tunnel.end_reason", Some(record.reason.word()));
        let number = |n: u64| Attribute::Number(i64::try_from(n).unwrap_or(i64::MAX));
        flow.attributes.push(("client.port", Attribute::Number(record.client.0.port().into())));
        flow.attributes.push(("tunnel.bytes_sent", number(record.sent)));
        flow.attributes.push(("tunnel.bytes_received", number(record.received)));
        if record.reason.fault() != Fault::Nobody {
            flow.fail(record.reason, record.detail.as_deref());
        }
        self.put(flow);
    }

    fn put(&self, span: Span) {
        match self.queue.try_send(Message::Span(Box::new(span))) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.overflowed.fetch_add(1, Ordering::Relaxed);
                DROPPED.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// A span of a flow, below the flow's own.
fn span(trace: &Trace, name: &'static str, kind: Kind, [start, end]: [SystemTime; 2]) -> Span {
    let (trace, id, parent) = (trace.id, fastrand::u64(1..), Some(trace.flow));
    Span { trace, id, parent, name, kind, start, end, attributes: Vec::new(), error: None }
}

fn text(span: &mut Span, name: &'static str, value: Option<&str>) {
    span.attributes.extend(value.map(|value| (name, Attribute::Text(value.to_owned()))));
}

impl Span {
    /// Names as OpenTelemetry has them.
    fn peer(&mut self, peer: &str) {
        let (address, port) = peer.rsplit_once(':').unwrap_or((peer, ""));
        text(self, "server.address", Some(address.trim_matches(['[', ']'])));
        self.attributes.extend(port.parse().ok().map(|port| ("server.port", Attribute::Number(port))));
    }

    fn fail(&mut self, reason: EndReason, detail: Option<&str>) {
        text(self, "error.type", Some(reason.word()));
        self.error = Some(detail.unwrap_or_else(|| reason.meaning()).to_owned());
    }
}

/// The same moment by both clocks.
struct Clock {
    instant: Instant,
    time: SystemTime,
}

impl Clock {
    fn now() -> Self {
        Self { instant: Instant::now(), time: SystemTime::now() }
    }

    fn at(&self, instant: Instant) -> SystemTime {
        let ago = self.instant.saturating_duration_since(instant);
        self.time.checked_sub(ago).unwrap_or(UNIX_EPOCH)
    }

    fn range(&self, from: Instant, until: Instant) -> [SystemTime; 2] {
        [self.at(from), self.at(until)]
    }
}
