//! What an upstream's configuration says of its endpoints: where they come from, how they are watched, and how much
//! they get.
//!
//! The file that names endpoints is read elsewhere, again and again.

use std::{
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use serde_json::{Value as Json, json};

use super::{
    UpstreamProtocol,
    reader::{Cell, Reader, Value},
    section::section,
};
use crate::model::flow::Target;

/// Endpoints of one upstream: consistent hashing looks at each of them for every flow, in less than the time of a
/// system call or two.
pub const ENDPOINTS_MAX: usize = 1000;
/// Failures in a row after which an endpoint is ejected. One may be chance.
const CONSECUTIVE_FAILURES: NonZeroU32 = NonZeroU32::new(3).expect("not 0");
/// The first wait before an ejected endpoint is tried again.
const BASE_EJECTION_TIME: Duration = Duration::from_millis(100);
/// The longest: a restarted endpoint is found within this.
const MAX_EJECTION_TIME: Duration = Duration::from_secs(1);
/// Between two checks of one endpoint by one worker.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// How long one check may take: endpoints are near.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// Checks in a row that have to fail: one lost packet is no illness.
const UNHEALTHY_THRESHOLD: NonZeroU32 = NonZeroU32::new(3).expect("not 0");
/// Checks in a row that have to succeed afterwards.
const HEALTHY_THRESHOLD: NonZeroU32 = NonZeroU32::new(2).expect("not 0");

/// Where the endpoints of an upstream come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Discovery {
    /// They are listed; a name among them is resolved when it is connected to, and is one endpoint.
    #[default]
    Static,
    /// They are listed; each address of a name is an endpoint, and names are resolved again and again.
    Dns,
    /// They stand in this file, which is read again when it changes.
    File(PathBuf),
}

/// The word behind `discovery`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Static,
    Dns,
}

/// Reads `endpoints`, `endpoints_file` and `discovery`.
pub(super) fn read(r: &mut Reader<'_>) -> Option<(Vec<Target>, Discovery)> {
    let endpoints: Option<Vec<Target>> =
        r.optional("endpoints", "Addresses: HOST:PORT. Either this or endpoints_file.");
    let file = r.optional::<PathBuf>(
        "endpoints_file",
        "A file with one HOST:PORT on each line, # for comments; reloaded when it changes. Either this or endpoints.",
    );
    let method = r.default(
        "discovery",
        "What a name among the endpoints stands for: \"static\", one endpoint, resolved when it is connected to; \"dns\", an endpoint for each of its addresses, resolved again when their time to live is over.",
        Method::Static,
    );
    if r.has("self") {
        return Some((Vec::new(), Discovery::Static));
    }
    if r.has("endpoints_file") {
        if r.has("endpoints") {
            r.wrong("endpoints_file", "stands beside endpoints: only one of them can be meant");
        }
        if r.has("discovery") {
            r.wrong("discovery", "has no meaning with endpoints_file: the file says when they change");
        }
        return Some((Vec::new(), Discovery::File(file?)));
    }
    r.demand("endpoints");
    let endpoints = endpoints?;
    if endpoints.is_empty() {
        r.wrong("endpoints", "is empty: there is nothing to connect to");
    }
    if endpoints.len() > ENDPOINTS_MAX {
        r.wrong("endpoints", format!("has more than {ENDPOINTS_MAX}"));
    }
    let discovery = match method {
        Method::Static => Discovery::Static,
        Method::Dns => Discovery::Dns,
    };
    if discovery == Discovery::Dns && !endpoints.iter().any(|e| matches!(e, Target::Name(..))) {
        r.wrong("discovery", "is \"dns\", and endpoints has no name: there is nothing to resolve");
    }
    Some((endpoints, discovery))
}

/// A share of a hundred, and not nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percent(u8);

impl Percent {
    /// All of it.
    pub const ALL: Self = Self(100);

    /// Whether this share holds a number of which each is as likely.
    pub fn holds(self, random: u64) -> bool {
        random % 100 < u64::from(self.0)
    }

    /// This share of `n`, rounded down.
    pub fn of(self, n: usize) -> usize {
        n.saturating_mul(self.0.into()) / 100
    }
}

impl Value for Percent {
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 1, "maximum": 100 })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        cell.integer(1, 100).and_then(|n| u8::try_from(n).ok()).map(Self)
    }
    fn show(&self) -> Json {
        json!(self.0)
    }
}

section! {
    /// `[upstream.outlier_detection]`: which endpoints are left out for what flows have met there. The names are Envoy's.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct OutlierDetection {
        /// Consecutive failed connections after which the endpoint is ejected.
        consecutive_failures: default NonZeroU32 = CONSECUTIVE_FAILURES,
        /// Consecutive answers to CONNECT of 502, 503 or 504, or missing answers, after which the endpoint is ejected.
        /// Default: they do not count, because a gateway gives them for targets behind it.
        consecutive_gateway_failures: optional NonZeroU32,
        /// How long an endpoint is ejected before it is probed; doubled each time.
        base_ejection_time: default Duration = BASE_EJECTION_TIME,
        /// Upper bound of the ejection time.
        max_ejection_time: default Duration = MAX_EJECTION_TIME,
        /// Percentage of endpoints that may be ejected at a time, rounded down.
        max_ejection_percent: default Percent = Percent::ALL,
    }
    check |r| {
        if base_ejection_time > max_ejection_time {
            let key = if r.has("base_ejection_time") { "base_ejection_time" } else { "max_ejection_time" };
            r.wrong(key, "base_ejection_time is longer than max_ejection_time");
        }
    }
    defaults new;
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self::new()
    }
}

/// How an endpoint is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckKind {
    /// By a TCP connection, closed at once.
    Tcp,
    /// By a PING on a connection as flows have it.
    Ping,
}

section! {
    /// `[upstream.health_check]`: endpoints are asked whether they are well before a flow finds out. The names are Envoy's.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct HealthCheck {
        /// How: "tcp", by a connection that is closed at once, from the far end of the upstream that it goes through if there is
        /// one; "ping", by an HTTP/2 PING, or over HTTP/3 by a stream of a
        /// reserved type, on a connection as flows have it, with TLS if they have that.
        kind as "type": required CheckKind,
        /// Interval at which each worker checks each endpoint, plus or minus up to a tenth.
        interval: default Duration = CHECK_INTERVAL,
        /// Timeout of a check.
        timeout: default Duration = CHECK_TIMEOUT,
        /// Consecutive failed checks after which the endpoint gets no new flows.
        unhealthy_threshold: default NonZeroU32 = UNHEALTHY_THRESHOLD,
        /// Consecutive successful checks after which it gets flows again.
        healthy_threshold: default NonZeroU32 = HEALTHY_THRESHOLD,
    }
    check |r| {}
}

/// Reports a check that the upstream's protocol does not have.
pub(super) fn check_health(r: &Reader<'_>, protocol: UpstreamProtocol, check: Option<&HealthCheck>) {
    if protocol == UpstreamProtocol::H3 && check.is_some_and(|c| c.kind == CheckKind::Tcp) {
        r.wrong(
            "health_check",
            "is of type \"tcp\", which tells nothing of HTTP/3: \"ping\" checks a connection as flows have it",
        );
    }
    if protocol == UpstreamProtocol::H1 && check.is_some_and(|c| c.kind == CheckKind::Ping) {
        r.wrong(
            "health_check",
            "is of type \"ping\", which HTTP/1 does not have: \"tcp\" checks a connection",
        );
    }
}

section! {
    /// `[upstream.limits]`, in the whole process; shared out to the workers, rounded up.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    pub struct Limits {
        /// Maximum of concurrent connections, including those being opened.
        connections: optional NonZeroUsize,
        /// Maximum of concurrent flows, including those being opened.
        streams: optional NonZeroUsize,
        /// Maximum of flows that wait for a connection.
        pending: optional NonZeroUsize,
    }
    check |r| {}
}

#[cfg(test)]
mod tests {
    use super::super::tests::{mistakes, parse};
    use super::*;

    /// One upstream with these lines; the first of them is line 6.
    fn with(lines: &str) -> String {
        format!(
            "[[listener]]\naddress = \"[::]:15008\"\ntls = false\n[[upstream]]\nname = \"east\"\n{lines}\ntls = false\n\
             [[route]]\nto = [{{ upstream = \"east\" }}]\n"
        )
    }

    #[test]
    fn endpoints_are_listed_resolved_or_in_a_file() {
        let of = |lines: &str| parse(&with(lines)).unwrap_or_else(|e| panic!("{e}")).upstreams.remove(0);
        let listed = of("endpoints = [\"gw.test:1\", \"10.0.0.1:2\"]");
        assert_eq!((listed.endpoints.len(), &listed.discovery), (2, &Discovery::Static));
        let named = of("endpoints = [\"gw.test:1\", \"10.0.0.1:2\"]\ndiscovery = \"dns\"");
        assert_eq!((named.endpoints.len(), &named.discovery), (2, &Discovery::Dns));
        let filed = of("endpoints_file = \"east.endpoints\"");
        assert_eq!(filed.discovery, Discovery::File("etc/east.endpoints".into()));
        assert!(filed.endpoints.is_empty());
        assert_ne!(listed, named);
        assert_eq!(
            listed,
            of("endpoints = [\"gw.test:1\", \"10.0.0.1:2\"]"),
            "the same text is the same upstream"
        );
    }

    /// Without keys for them there are no health checks and no limits but those that always were.
    #[test]
    fn health_and_limits_have_defaults_that_change_nothing() {
        let of = |lines: &str| parse(&with(lines)).unwrap_or_else(|e| panic!("{e}")).upstreams.remove(0);
        let plain = of("endpoints = [\"10.0.0.1:2\"]");
        assert_eq!(plain.outlier_detection, OutlierDetection::default());
        assert_eq!((&plain.health_check, &plain.limits), (&None, &Limits::default()));
        let full = of(
            "endpoints = [\"10.0.0.1:2\"]\noutlier_detection = { consecutive_gateway_failures = 5, \
                       base_ejection_time = \"1s\", max_ejection_time = \"30s\", max_ejection_percent = 50 }\n\
                       health_check = { type = \"ping\", interval = \"2s\" }\nlimits = { streams = 7 }",
        );
        assert_eq!(full.outlier_detection.consecutive_gateway_failures, NonZeroU32::new(5));
        assert_eq!(full.outlier_detection.max_ejection_percent.of(5), 2);
        let check = full.health_check.unwrap();
        assert_eq!(
            (check.kind, check.interval, check.timeout),
            (CheckKind::Ping, Duration::from_secs(2), CHECK_TIMEOUT)
        );
        assert_eq!(full.limits.streams, NonZeroUsize::new(7));
    }

    #[test]
    fn what_has_no_meaning_beside_another_key_is_said() {
        let endpoints = "endpoints = [\"10.0.0.1:2\"]";
        for (lines, said) in [
            ("".to_owned(), "4:1: upstream.endpoints: is missing".to_owned()),
            ("endpoints = []".to_owned(), "6:13: upstream.endpoints: is empty: there is nothing to connect to".to_owned()),
            (
                format!("{endpoints}\nendpoints_file = \"a\""),
                "7:18: upstream.endpoints_file: stands beside endpoints: only one of them can be meant".to_owned(),
            ),
            (
                "endpoints_file = \"a\"\ndiscovery = \"dns\"".to_owned(),
                "7:13: upstream.discovery: has no meaning with endpoints_file: the file says when they change".to_owned(),
            ),
            (
                format!("{endpoints}\ndiscovery = \"dns\""),
                "7:13: upstream.discovery: is \"dns\", and endpoints has no name: there is nothing to resolve".to_owned(),
            ),
            (
                format!("endpoints = [{}]", "\"a.test:1\", ".repeat(ENDPOINTS_MAX + 1)),
                "6:13: upstream.endpoints: has more than 1000".to_owned(),
            ),
            (
                format!("{endpoints}\noutlier_detection = {{ base_ejection_time = \"2s\" }}"),
                "7:44: upstream.outlier_detection.base_ejection_time: base_ejection_time is longer than max_ejection_time"
                    .to_owned(),
            ),
            (
                format!("{endpoints}\noutlier_detection = {{ max_ejection_percent = 101 }}"),
                "7:46: upstream.outlier_detection.max_ejection_percent: must be from 1 to 100, not 101".to_owned(),
            ),
            (
                format!("{endpoints}\nhealth_check = {{ interval = \"1s\" }}"),
                "7:16: upstream.health_check.type: is missing".to_owned(),
            ),
            (
                format!("{endpoints}\nprotocol = \"h1\"\nhealth_check = {{ type = \"ping\" }}"),
                "8:16: upstream.health_check: is of type \"ping\", which HTTP/1 does not have: \"tcp\" checks a connection"
                    .to_owned(),
            ),
            (
                format!("{endpoints}\nlimits = {{ streams = 0 }}"),
                "7:22: upstream.limits.streams: must be from 1 to 2147483647, not 0".to_owned(),
            ),
        ] {
            assert_eq!(mistakes(&with(&lines)), [said], "{lines}");
        }
    }
}
