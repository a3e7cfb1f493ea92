//! `[traces]`: where spans of flows are sent, and of which traces.

use std::{fmt, time::Duration};

use http::{HeaderName, HeaderValue, Uri};
use serde_json::{Value as Json, json};

use super::{
    reader::{Cell, Value},
    section::section,
};
use crate::model::flow::Target;

/// Where a collector takes spans, below an address without a path (OTLP 1.9, "OTLP/HTTP Request").
const PATH: &str = "/v1/traces";
/// How long a collector may take for one request (OTLP exporter specification: OTEL_EXPORTER_OTLP_TIMEOUT).
const TIMEOUT: Duration = Duration::from_secs(10);

section! {
    /// `[traces]`: spans of flows, sent to a collector by OTLP (http/protobuf).
    #[derive(Clone, Debug, PartialEq)]
    pub struct Traces {
        /// URL of the collector: http://HOST:PORT, and a path unless it is /v1/traces. TLS is not supported: collectors run
        /// on the node.
        endpoint: required Collector,
        /// Share of the traces that begin here which are sampled, from 0.0 to 1.0. Of a trace that a peer has begun, its
        /// traceparent decides.
        sample: default Ratio = Ratio::ALL,
        /// The attribute service.name of the spans.
        service_name: default String = "tunnel".to_owned(),
        /// Headers of the requests to the collector.
        headers: default Vec<(HeaderName, HeaderValue)> = Vec::new(),
        /// Timeout for one request to the collector.
        timeout: default Duration = TIMEOUT,
    }
    check |r| {}
}

/// The URL of a collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    /// What is connected to.
    pub target: Target,
    /// What is asked for there.
    pub path: String,
}

impl fmt::Display for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.target, self.path)
    }
}

impl Value for Collector {
    fn schema() -> Json {
        json!({ "type": "string", "examples": ["http://127.0.0.1:4318"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let text = cell.text("a URL, http://HOST:PORT")?;
        let wrong = |why: &str| cell.wrong(format!("\"{text}\": {why}"));
        let Ok(url) = text.parse::<Uri>() else { return wrong("is not a URL") };
        match url.scheme_str() {
            Some("http") => {}
            Some("https") => return wrong("TLS to a collector is not supported: send to one on this node"),
            _ => return wrong("must begin with http://"),
        }
        let authority = url.authority().map(http::uri::Authority::as_str).unwrap_or_default();
        let target = match authority.parse() {
            Ok(target) => target,
            Err(e) => return wrong(&format!("{e}; OTLP over HTTP usually has port 4318")),
        };
        let path = match url.path_and_query().map(http::uri::PathAndQuery::as_str) {
            None | Some("" | "/") => PATH,
            Some(path) => path,
        };
        Some(Self { target, path: path.to_owned() })
    }
    fn show(&self) -> Json {
        json!(self.to_string())
    }
}

/// A share of what happens by chance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio(f64);

impl Ratio {
    /// Everything.
    pub const ALL: Self = Self(1.0);

    /// Whether this share holds a number of which each is as likely.
    pub fn holds(self, random: u32) -> bool {
        f64::from(random) < self.0 * (f64::from(u32::MAX) + 1.0)
    }
}

impl Value for Ratio {
    fn schema() -> Json {
        json!({ "type": "number", "minimum": 0, "maximum": 1 })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let ratio = cell.number("a number from 0.0 to 1.0")?;
        if (0.0..=1.0).contains(&ratio) { Some(Self(ratio)) } else { cell.wrong("must be from 0.0 to 1.0") }
    }
    fn show(&self) -> Json {
        json!(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::mistakes;

    #[test]
    fn a_collector_has_an_address_and_no_tls() {
        const REST: &str =
            "[[capture]]\nmode = \"redirect\"\nlisten = [\"127.0.0.1:1\"]\n[[route]]\nto = \"direct\"\n";
        for (keys, said) in [
            ("endpoint = \"https://c:4318\"", "TLS to a collector is not supported"),
            ("endpoint = \"http://c\"", "authority has no port; OTLP over HTTP usually has port 4318"),
            ("endpoint = \"c:4318\"", "must begin with http://"),
            ("endpoint = \"http://c:4318\"\nsample = 1.5", "must be from 0.0 to 1.0"),
            ("endpoint = \"http://c:4318\"\nsample = \"all\"", "must be a number from 0.0 to 1.0"),
        ] {
            let found = mistakes(&format!("[traces]\n{keys}\n{REST}"));
            assert!(found.len() == 1 && found[0].contains(said), "{keys}: {found:?}");
        }
    }

    #[test]
    fn a_ratio_of_nothing_holds_nothing_and_one_of_everything_all() {
        for (ratio, holds) in [(0.0, [false, false]), (1.0, [true, true]), (0.5, [true, false])] {
            assert_eq!([0, u32::MAX].map(|random| Ratio(ratio).holds(random)), holds, "{ratio}");
        }
    }
}
