//! The terms of a route: times, and what the CONNECT request to an upstream says.
//!
//!
//! # Invariants
//! - No header that is the tunnel's own to set is copied, added, or taken out where it is needed.

use std::time::Duration;

use http::{HeaderName, HeaderValue};
use serde_json::{Value as Json, json};

use super::super::{
    reader::{At, Cell, Value},
    section::section,
    value::parse_header_name,
};
use crate::model::flow::Target;

/// How often a route may have a CONNECT request made again, at most. Each time waits for as long as the first, and the
/// application waits for all of them.
const RETRIES_MAX: u8 = 10;

/// On which terms a route sends a flow. The default changes nothing.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// How long the dial, or the answer to CONNECT, may take, in place of what is usual there.
    pub timeout: Option<Duration>,
    /// How often a CONNECT request that has failed is made again.
    pub retries: u8,
    /// What the CONNECT request asks for.
    pub authority: Authority,
    /// How the headers of the CONNECT request differ.
    pub headers: HeaderChanges,
    /// What is said in front of a connection that we dial.
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// A version of the PROXY protocol that we write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// Version 2, in bytes.
    V2,
}

/// How often a CONNECT request that has failed is made again.
pub(super) struct Retries(pub(super) u8);

impl Value for Retries {
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 0, "maximum": RETRIES_MAX })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        cell.integer(0, RETRIES_MAX.into()).and_then(|n| u8::try_from(n).ok()).map(Self)
    }
    fn show(&self) -> Json {
        json!(self.0)
    }
}

/// What a CONNECT request asks for. Where a name is wanted and none was found, it is the target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Authority {
    /// The target.
    #[default]
    Destination,
    /// The name that the carried TLS asks for, and the port of the target.
    Sni,
    /// The host of the carried HTTP/1 request, and the port of the target.
    Host,
    /// This.
    Is(Target),
}

section! {
    /// `[route.request_headers]`: changes of a CONNECT request's headers, in the order in which they are made.
    #[derive(Clone, Debug, Default)]
    pub struct HeaderChanges {
        /// Headers to copy from the received CONNECT request. baggage is always copied.
        copy: default Vec<HeaderName> [Vec<At<String>>] = Vec::new(),
        /// Headers to remove, wherever they come from.
        remove: default Vec<HeaderName> [Vec<At<String>>] = Vec::new(),
        /// Headers to add, after others were removed.
        add: default Vec<(HeaderName, HeaderValue)> = Vec::new(),
    }
    check |r| {
        let copied =
            |at: &At<String>| parse_header_name(&at.value).map_err(|e| r.wrong_at(at, e.to_string())).ok();
        let removed = |at: &At<String>| match at.value.parse::<HeaderName>() {
            Ok(name) if name == http::header::VIA => {
                r.wrong_at(at, "\"via\" has to stay: it is what loops are found by");
                None
            }
            Ok(name) => Some(name),
            Err(_) => {
                r.wrong_at(at, format!("\"{}\" is not a header name", at.value));
                None
            }
        };
        let copy: Vec<_> = copy.iter().map(copied).collect();
        let remove: Vec<_> = remove.iter().map(removed).collect();
        let copy = copy.into_iter().collect::<Option<_>>()?;
        let remove = remove.into_iter().collect::<Option<_>>()?;
    }
}

impl Authority {
    /// Whether it is what only the first bytes of the carried connection tell.
    pub fn needs_sniff(&self) -> bool {
        matches!(self, Self::Sni | Self::Host)
    }
}

impl Value for Authority {
    fn schema() -> Json {
        json!({ "type": "string", "examples": ["{destination}", "{sni}", "{host}", "web.internal:443"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        const WANTED: &str = "\"{destination}\", \"{sni}\", \"{host}\" or HOST:PORT";
        match cell.text(&format!("a string: {WANTED}"))? {
            "{destination}" => Some(Self::Destination),
            "{sni}" => Some(Self::Sni),
            "{host}" => Some(Self::Host),
            text if text.contains(['{', '}']) => cell.wrong(format!("must be {WANTED}, not \"{text}\"")),
            text => match text.parse() {
                Ok(target) => Some(Self::Is(target)),
                Err(e) => cell.wrong(format!("\"{text}\": {e}")),
            },
        }
    }
    fn show(&self) -> Json {
        match self {
            Self::Destination => json!("{destination}"),
            Self::Sni => json!("{sni}"),
            Self::Host => json!("{host}"),
            Self::Is(target) => json!(target.to_string()),
        }
    }
}
