//! Metrics as OpenMetrics 1.0 and as the text format of Prometheus (0.0.4), made when they are asked for.
//!
//! # Invariants
//! - Nothing is kept between two scrapes: what is counted is counted by the workers.
//! - An answer is bounded: labels are words of this program and names of the configuration, and of those at most
//!   [`NAMES_MAX`] of a kind. Istio's metrics alone, which are off by default and bounded too, have names that peers choose.
//! - A counter never falls while the daemon runs: one that not all workers have answered for is left out.

mod istio;
mod process;
pub(super) mod table;

use std::{collections::BTreeMap, fmt};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, prometheus_text, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use self::table::{self as m, Kind, Metric};
use super::{
    api::Requests,
    sight::{LiveTotals, Sight, Sums},
    view::Overview,
};
use crate::{
    model::end::{EndReason, Fault},
    observe::{
        histogram::{BOUNDS_US, Buckets},
        istio::Istio,
        totals,
    },
    process::panics,
    sinks::upstream::report::UpstreamReport,
};

/// Names of one kind (upstreams, captures) that have series of their own. Those beyond are together in one, "other".
const NAMES_MAX: usize = 500;
/// What others are called.
const OTHER: &str = "other";

/// Which text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus 0.0.4.
    Prometheus,
}

impl Format {
    /// What an `Accept` header wants: OpenMetrics where it is named and not refused, which Prometheus does since 2.5.
    pub(super) fn wanted(accept: Option<&str>) -> Self {
        let mut wanted = Self::Prometheus;
        for part in accept.unwrap_or_default().split(',') {
            let mut parameters = part.split(';').map(str::trim);
            let open =
                parameters.next().is_some_and(|t| t.eq_ignore_ascii_case("application/openmetrics-text"));
            if open && !parameters.any(|p| p.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0))) {
                wanted = Self::OpenMetrics;
            }
        }
        wanted
    }

    /// How an answer names it.
    pub(super) const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => prometheus_text::CONTENT_TYPE,
        }
    }
}

/// Everything that one answer is made of.
#[derive(Debug)]
pub(super) struct Scrape {
    sums: Sums,
    live: LiveTotals,
    /// None where not all workers have answered.
    istio: Option<Istio>,
    upstreams: BTreeMap<String, UpstreamReport>,
    /// Whether they are those of all workers.
    has_upstreams: bool,
    overview: std::sync::Arc<Overview>,
    ready: bool,
    draining: bool,
    process: process::Process,
    requests: Requests,
}

impl Scrape {
    /// Asks everybody.
    pub(super) async fn take(sight: &Sight, requests: Requests) -> Self {
        let (overview, _) = sight.overview().await;
        let (upstreams, has_upstreams) = sight.complete_upstreams().await;
        Self {
            ready: !sight.is_draining()
                && super::problems::of(&overview, &upstreams).iter().all(|p| !p.blocks_ready),
            upstreams,
            has_upstreams,
            overview,
            live: sight.live().await,
            istio: sight.istio().await,
            // After what has been waited for: it is at least as new.
            sums: sight.sums(),
            draining: sight.is_draining(),
            process: process::Process::now(),
            requests,
        }
    }

    /// The text.
    pub(super) fn text(self, format: Format) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut out = String::new();
        match format {
            Format::OpenMetrics => text::encode(&mut out, &registry)?,
            Format::Prometheus => prometheus_text::encode(&mut out, &registry)?,
        }
        Ok(out)
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(encoder);
        self.process(&mut out)?;
        self.flows(&mut out)?;
        self.sources(&mut out)?;
        if self.has_upstreams {
            self.upstreams(&mut out)?;
        }
        self.identities(&mut out)?;
        let Some(counted) = &self.istio else { return Ok(()) };
        // With more than one, which of them a flow was carried by is not known here.
        let own = match self.overview.identities.as_slice() {
            [only] => only.identity.as_deref(),
            _ => None,
        };
        istio::write(&mut out, counted, own)
    }
}

impl Scrape {
    fn process(&self, out: &mut Out<'_>) -> fmt::Result {
        let Overview { version, kernel, started_at, workers, reloads, .. } = &*self.overview;
        out.gauge(&m::BUILD_INFO, [([&**version, &**kernel], 1)])?;
        out.gauge(&m::START_TIME, [([], *started_at)])?;
        out.seconds(&m::CPU, self.process.cpu)?;
        out.gauge(&m::RESIDENT, [([], self.process.resident)])?;
        out.gauge(&m::OPEN_FDS, [([], self.process.open_fds)])?;
        out.gauge(&m::MAX_FDS, [([], self.process.max_fds)])?;
        out.gauge(&m::WORKERS, [([], *workers as u64)])?;
        out.gauge(&m::READY, [([], self.ready.into())])?;
        out.gauge(&m::DRAINING, [([], self.draining.into())])?;
        out.counter(&m::PANICS, [([], panics::count())])?;
        out.counter(&m::RELOADS, [(["success"], reloads.succeeded), (["failure"], reloads.failed)])?;
        out.gauge(&m::RELOAD_OK, [([], reloads.last_error.is_none().into())])?;
        out.gauge(&m::RELOADED_AT, [([], reloads.last_success_at)])?;
        let totals: BTreeMap<_, _> = totals::all().into_iter().collect();
        let of = |name| totals.get(name).copied().unwrap_or_default();
        let lines = [(["written"], of("access_log_lines")), (["lost"], of("access_log_lost"))];
        out.counter(&m::ACCESS_LOG_LINES, lines)?;
        out.counter(&m::LOG_LINES_LOST, [([], of("log_lines_lost"))])?;
        out.counter(&m::SPANS, [(["exported"], of("spans_exported")), (["dropped"], of("spans_dropped"))])?;
        let requests = self.requests.by_code();
        out.counter(&m::ADMIN_REQUESTS, requests.iter().map(|(code, n)| ([code.as_str()], *n)))
    }

    fn flows(&self, out: &mut Out<'_>) -> fmt::Result {
        let Self { sums, live, .. } = self;
        out.counter(&m::FLOWS_OPENED, [([], sums.of("flows_opened"))])?;
        if self.has_upstreams {
            let mut routed = Named::default();
            self.upstreams.iter().for_each(|(name, report)| routed.add(name, report.totals.streams_opened));
            let routed = routed.0.iter().map(|(name, n)| ([*name], *n));
            out.counter(&m::FLOWS_ROUTED, routed.chain([(["direct"], sums.of("flows_dialled"))]))?;
        }
        let ended = sums.ended.iter().map(|(reason, n)| {
            let fault = match reason.fault() {
                Fault::Nobody => "nobody",
                Fault::Client => "client",
                Fault::Upstream => "upstream",
                Fault::Us => "us",
            };
            ([reason.word(), fault], *n)
        });
        out.counter(&m::FLOWS_ENDED, ended)?;
        out.gauge(&m::FLOWS_LIVE, live.by_path().map(|(path, n)| ([path.word()], n as u64)))?;
        out.gauge(&m::FLOWS_PENDING, [([], live.active.saturating_sub(live.flows()) as u64)])?;
        out.gauge(&m::FLOWS_LIMIT, [([], live.flows_max as u64)])?;
        if live.is_complete {
            let bytes = [(["sent"], live.totals.sent), (["received"], live.totals.received)];
            out.counter(&m::FLOW_BYTES, bytes)?;
        }
        let kernel = [(["pipe"], sums.of("bytes_piped")), (["splice"], sums.of("bytes_spliced"))];
        out.counter(&m::KERNEL_BYTES, kernel)?;
        let events = [
            "pipes_missed",
            "flows_spliced",
            "splice_promotions",
            "splice_credit_renewed",
            "splice_demotions",
            "splice_no_slot",
            "splice_refused",
        ];
        out.counter(&m::RELAY_EVENTS, events.map(|event| ([event], sums.of(event))))?;
        out.counter(&m::FLOWS_RESET, [([], sums.of("flows_reset"))])?;
        out.histogram(&m::CONNECT_SECONDS, [([], &sums.connect)])?;
        out.histogram(&m::FIRST_BYTE_SECONDS, [([], &sums.first_byte)])?;
        out.histogram(&m::FLOW_SECONDS, [([], &sums.flow)])
    }

    fn sources(&self, out: &mut Out<'_>) -> fmt::Result {
        let sums = &self.sums;
        out.counter(&m::LISTENER_CONNECTIONS, [([], sums.of("tunnels_accepted"))])?;
        out.counter(&m::LISTENER_REJECTED, sums.rejected.iter().map(|(check, n)| ([check.word()], *n)))?;
        out.histogram(&m::HANDSHAKE_SECONDS, [([], &sums.handshake)])?;
        let decisions = sums.policies.iter().map(|((policy, decision), n)| ([&**policy, *decision], *n));
        out.counter(&m::POLICY_DECISIONS, decisions)?;
        if self.live.is_complete {
            let memory = self.live.memory;
            out.gauge(&m::MEMORY_BUDGET, [([], memory.budget)])?;
            out.gauge(&m::MEMORY_HELD, [([], memory.held)])?;
            out.counter(&m::WINDOWS_SHRUNK, [([], memory.shrunk)])?;
        }
        let ended = |of: EndReason| -> u64 {
            sums.ended.iter().filter(|(reason, _)| *reason == of).map(|(_, n)| n).sum()
        };
        let refused = [
            (["process"], ended(EndReason::MemoryLimit)),
            (["peer"], ended(EndReason::PeerMemory)),
            (["connection"], sums.of("connections_without_memory")),
        ];
        out.counter(&m::MEMORY_REFUSED, refused)?;
        let captures = &self.overview.captures[..self.overview.captures.len().min(NAMES_MAX)];
        let each = |of: fn(&super::view::Capture) -> u64| captures.iter().map(move |c| ([c.label()], of(c)));
        out.gauge(&m::CAPTURE_ATTACHED, each(|c| c.attached.into()))?;
        out.gauge(&m::CAPTURE_PRESENT, each(|c| c.present.into()))?;
        out.gauge(&m::CAPTURE_NAMESPACES, each(|c| c.namespaces as u64))?;
        out.gauge(&m::CAPTURE_PROCESSES, each(|c| c.processes as u64))?;
        out.counter(&m::CAPTURE_LEFT, each(|c| c.left))?;
        let events = captures
            .iter()
            .flat_map(|c| c.counters.iter().map(move |(event, n)| ([c.label(), event.as_str()], *n)));
        out.counter(&m::CAPTURE_EVENTS, events)
    }

    fn upstreams(&self, out: &mut Out<'_>) -> fmt::Result {
        // What an upstream has of each, those beyond the limit together.
        let mut all = BTreeMap::<&str, UpstreamReport>::new();
        for (name, report) in &self.upstreams {
            let name = if all.len() < NAMES_MAX { name } else { OTHER };
            all.entry(name).or_default().add(report.clone());
        }
        let states = all.iter().flat_map(|(name, report)| {
            let (mut available, mut ejected, mut unhealthy) = (0, 0, 0);
            for endpoint in &report.endpoints {
                let state = match endpoint {
                    e if e.ejected > 0 => &mut ejected,
                    e if e.unhealthy > 0 => &mut unhealthy,
                    _ => &mut available,
                };
                *state += 1;
            }
            [
                ([*name, "available"], available),
                ([*name, "ejected"], ejected),
                ([*name, "unhealthy"], unhealthy),
            ]
        });
        out.gauge(&m::UPSTREAM_ENDPOINTS, states)?;
        let connections = all.iter().flat_map(|(name, UpstreamReport { totals, .. })| {
            [([*name, "open"], totals.connections as u64), ([*name, "connecting"], totals.dialing as u64)]
        });
        out.gauge(&m::UPSTREAM_CONNECTIONS, connections)?;
        out.gauge(&m::UPSTREAM_STREAMS, all.iter().map(|(name, r)| ([*name], r.totals.streams as u64)))?;
        out.gauge(&m::UPSTREAM_PENDING, all.iter().map(|(name, r)| ([*name], r.totals.waiting as u64)))?;
        let results = |name, good, bad| [([name, "success"], good), ([name, "failure"], bad)];
        let connects = all
            .iter()
            .flat_map(|(name, r)| results(*name, r.totals.connections_opened, r.totals.connect_failures));
        out.counter(&m::UPSTREAM_CONNECTED, connects)?;
        let requests =
            all.iter().flat_map(|(name, r)| results(*name, r.totals.streams_opened, r.totals.streams_failed));
        out.counter(&m::UPSTREAM_OPENED, requests)?;
        out.counter(&m::UPSTREAM_EJECTIONS, all.iter().map(|(name, r)| ([*name], r.totals.ejections)))?;
        out.histogram(&m::UPSTREAM_CONNECT_SECONDS, all.iter().map(|(name, r)| ([*name], &r.connect)))
    }

    fn identities(&self, out: &mut Out<'_>) -> fmt::Result {
        let leaves = || {
            let identities = self.overview.identities.iter().take(NAMES_MAX);
            identities.filter_map(|i| i.chain.first().map(|leaf| (i.name.as_str(), leaf)))
        };
        let seconds = |at: i64| u64::try_from(at).unwrap_or_default();
        let ends = leaves().map(|(name, leaf)| ([name], seconds(leaf.not_after)));
        out.gauge(&m::CERTIFICATE_EXPIRY, ends)?;
        out.gauge(&m::CERTIFICATE_BEGIN, leaves().map(|(name, leaf)| ([name], seconds(leaf.not_before))))
    }
}

/// Sums by names of the configuration, at most [`NAMES_MAX`].
#[derive(Default)]
struct Named<'n>(BTreeMap<&'n str, u64>);

impl<'n> Named<'n> {
    fn add(&mut self, name: &'n str, n: u64) {
        let name = if self.0.len() < NAMES_MAX || self.0.contains_key(name) { name } else { OTHER };
        *self.0.entry(name).or_default() += n;
    }
}

/// Writes metrics of the table.
struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn counter<'l, const N: usize>(
        &mut self,
        metric: &Metric,
        series: impl IntoIterator<Item = ([&'l str; N], u64)>,
    ) -> fmt::Result {
        self.each(metric, Kind::Counter, series, |n, encoder| ConstCounter::new(n).encode(encoder))
    }

    fn gauge<'l, const N: usize>(
        &mut self,
        metric: &Metric,
        series: impl IntoIterator<Item = ([&'l str; N], u64)>,
    ) -> fmt::Result {
        self.each(metric, Kind::Gauge, series, |n, encoder| {
            ConstGauge::new(i64::try_from(n).unwrap_or(i64::MAX)).encode(encoder)
        })
    }

    /// A counter of seconds.
    fn seconds(&mut self, metric: &Metric, seconds: f64) -> fmt::Result {
        self.each(metric, Kind::Counter, [([], seconds)], |n, encoder| ConstCounter::new(n).encode(encoder))
    }

    fn histogram<'l, const N: usize>(
        &mut self,
        metric: &Metric,
        series: impl IntoIterator<Item = ([&'l str; N], &'l Buckets)>,
    ) -> fmt::Result {
        self.each(metric, Kind::Histogram, series, |buckets, mut encoder| {
            let bounds = BOUNDS_US.iter().map(|us| seconds(*us)).chain([f64::INFINITY]);
            let counts: Vec<_> = bounds.zip(buckets.counts).collect();
            encoder.encode_histogram::<[(&str, &str); 0]>(
                seconds(buckets.sum_us),
                buckets.count(),
                &counts,
                None,
            )
        })
    }

    /// Nothing where there is no series.
    fn each<'l, T, const N: usize>(
        &mut self,
        metric: &Metric,
        kind: Kind,
        series: impl IntoIterator<Item = ([&'l str; N], T)>,
        write: impl Fn(T, MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        debug_assert!(metric.kind == kind && metric.labels.len() == N, "{}", metric.name);
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let kind = match kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
        };
        let mut family = self.0.encode_descriptor(metric.name, metric.help, None, kind)?;
        for (values, what) in series {
            let labels: Vec<(&str, &str)> = metric.labels.iter().copied().zip(values).collect();
            if labels.is_empty() {
                let encoder = family.encode_family(&[] as &[(&str, &str); 0])?;
                write(what, encoder)?;
            } else {
                write(what, family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "2^53 microseconds are 285 years")]
fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrape() -> Scrape {
        let upstreams = (0..NAMES_MAX + 20).map(|i| (format!("u{i:04}"), UpstreamReport::default()));
        Scrape {
            sums: Sums { ended: vec![(EndReason::Closed, 3)], ..Sums::default() },
            live: LiveTotals { is_complete: true, ..LiveTotals::default() },
            istio: Some(Istio::default()),
            upstreams: upstreams.collect(),
            has_upstreams: true,
            overview: std::sync::Arc::new(Overview {
                version: "a\"b\\c\nd".to_owned(),
                ..Overview::default()
            }),
            ready: true,
            draining: false,
            process: process::Process::now(),
            requests: Requests::default(),
        }
    }

    #[test]
    fn names_beyond_the_limit_share_one_series() {
        let text = scrape().text(Format::Prometheus).unwrap();
        let series = text.lines().filter(|l| l.starts_with("tunnel_upstream_streams{")).count();
        assert_eq!(series, NAMES_MAX + 1);
        assert!(text.contains("tunnel_upstream_streams{upstream=\"other\"} 0"));
    }

    /// Less than before would be taken for a restart of the daemon.
    #[test]
    fn counters_that_not_all_workers_have_answered_for_are_left_out() {
        let families = [
            "tunnel_flow_bytes_total",
            "tunnel_flows_routed_total",
            "tunnel_memory_held_bytes",
            "tunnel_memory_windows_shrunk_total",
            "tunnel_upstream_connects_total",
        ];
        let all = scrape().text(Format::Prometheus).unwrap();
        let mut scrape = scrape();
        (scrape.live.is_complete, scrape.has_upstreams, scrape.istio) = (false, false, None);
        let some = scrape.text(Format::Prometheus).unwrap();
        for family in families {
            assert!(all.contains(family) && !some.contains(family), "{family} in {some}");
        }
        assert!(some.contains("tunnel_flows_ended_total"), "what is read and not asked is there");
    }

    #[test]
    fn both_formats_name_counters_as_they_have_to_and_escape_labels() {
        let prometheus = scrape().text(Format::Prometheus).unwrap();
        assert!(prometheus.contains("# TYPE tunnel_flows_ended_total counter\n"), "{prometheus}");
        assert!(prometheus.contains("tunnel_flows_ended_total{reason=\"closed\",fault=\"nobody\"} 3\n"));
        assert!(prometheus.contains(r#"version="a\"b\\c\nd""#), "{prometheus}");
        let open = scrape().text(Format::OpenMetrics).unwrap();
        assert!(open.contains("# TYPE tunnel_flows_ended counter\n") && open.ends_with("# EOF\n"));
        assert!(open.contains("tunnel_flow_duration_seconds_bucket{le=\"+Inf\"} 0\n"), "{open}");
    }

    #[test]
    fn the_format_is_that_which_is_accepted() {
        let openmetrics =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        assert_eq!(Format::wanted(Some(openmetrics)), Format::OpenMetrics);
        for accept in [None, Some("*/*"), Some("text/plain"), Some("application/openmetrics-text;q=0")] {
            assert_eq!(Format::wanted(accept), Format::Prometheus, "{accept:?}");
        }
    }
}
