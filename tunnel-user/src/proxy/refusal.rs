//! Why a flow was not carried, and the status that says so.
//!
//! # Invariants
//! - One table maps every reason to its status and its error in `proxy-status` (RFC 9209).

use std::fmt;

use http::{HeaderValue, Response, StatusCode, header::ALLOW};

use crate::{
    sinks::{
        dial::DialError,
        upstream::{TunnelError, in_process::OpenError},
    },
    sources::{Answer, listener::request::RequestError},
};

/// How this intermediary calls itself in `proxy-status`.
const SELF: &str = "tunnel";

/// Why a flow was not carried.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request asks for nothing that is a target. The client's fault.
    #[error("{0}")]
    Request(#[from] RequestError),
    /// Policy or a route says no.
    #[error("{0}")]
    Denied(String),
    /// The request has passed here before. The operator's fault, somewhere along the chain.
    #[error("the request has passed this tunnel before: it goes around in a loop")]
    Loop,
    /// The target could not be reached.
    #[error("{0}")]
    Dial(#[from] DialError),
    /// The next hop could not be reached, or refused.
    #[error("{0}")]
    Tunnel(#[from] TunnelError),
    /// As many flows as this worker takes. Ours.
    #[error("the limit of {0} flows is reached (daemon.max_flows)")]
    Limit(usize),
    /// As many flows as one peer gets of them. The peer's.
    #[error("the limit of {0} flows of one peer is reached")]
    PeerLimit(usize),
}

impl From<OpenError> for Refusal {
    fn from(e: OpenError) -> Self {
        match e {
            OpenError::Loop => Self::Loop,
            OpenError::Upstream(e) => Self::Tunnel(e),
            OpenError::Unknown(target) => Self::Denied(format!("{target} is refused: its upstream is gone")),
        }
    }
}

/// Where a status comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From here: the proxy error type (RFC 9209 section 2.3).
    Error(&'static str),
    /// From the next hop: what it answered (RFC 9209 section 2.1.5).
    Received(StatusCode),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(error) => write!(f, "error={error}"),
            Self::Received(status) => write!(f, "received-status={}", status.as_u16()),
        }
    }
}

impl Refusal {
    /// The status, and what `proxy-status` says of where it comes from.
    pub fn status(&self) -> (StatusCode, Origin) {
        let (status, error) = match self {
            Self::Request(error) => (error.status(), "http_request_error"),
            Self::Denied(_) => (StatusCode::FORBIDDEN, "http_request_denied"),
            // RFC 5842 section 7.2.
            Self::Loop => (StatusCode::LOOP_DETECTED, "proxy_loop_detected"),
            Self::Dial(DialError::Resolve { .. }) => (StatusCode::BAD_GATEWAY, "dns_error"),
            Self::Dial(DialError::ResolveTimeout { .. }) => (StatusCode::GATEWAY_TIMEOUT, "dns_timeout"),
            Self::Dial(DialError::Refused { .. }) => (StatusCode::BAD_GATEWAY, "connection_refused"),
            Self::Dial(DialError::Unreachable { .. }) => {
                (StatusCode::SERVICE_UNAVAILABLE, "destination_ip_unroutable")
            }
            Self::Dial(DialError::Timeout { .. }) => (StatusCode::GATEWAY_TIMEOUT, "connection_timeout"),
            Self::Dial(DialError::Local { .. }) => (StatusCode::SERVICE_UNAVAILABLE, "proxy_internal_error"),
            Self::Tunnel(
                TunnelError::Connect { .. } | TunnelError::NoEndpoint { .. } | TunnelError::Empty { .. },
            ) => (StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable"),
            // The next hop's word is passed on.
            Self::Tunnel(TunnelError::Refused { status, .. }) => return (*status, Origin::Received(*status)),
            Self::Tunnel(TunnelError::Timeout { .. }) => {
                (StatusCode::GATEWAY_TIMEOUT, "http_response_timeout")
            }
            Self::Tunnel(TunnelError::Dropped { .. }) => (StatusCode::BAD_GATEWAY, "connection_terminated"),
            Self::Tunnel(TunnelError::Request { .. }) => (StatusCode::BAD_REQUEST, "http_request_error"),
            Self::Tunnel(TunnelError::Limit { .. }) | Self::Limit(_) | Self::PeerLimit(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "connection_limit_reached")
            }
        };
        (status, Origin::Error(error))
    }
}

impl Answer for Refusal {
    fn response(&self) -> Response<()> {
        let (status, origin) = self.status();
        let mut response = Response::new(());
        *response.status_mut() = status;
        let text = format!("{SELF}; {origin}; details=\"{}\"", sf_string(&self.to_string()));
        // sf_string leaves only what a header may hold.
        if let Ok(value) = HeaderValue::try_from(text) {
            response.headers_mut().insert("proxy-status", value);
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("CONNECT"));
        }
        response
    }
}

/// The inside of a structured field string (RFC 8941 section 3.3.3): printable ASCII, with quotes and
/// backslashes escaped. What is not printable becomes `?`, so that a name cannot end the header.
fn sf_string(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            ' '..='~' => out.push(c),
            _ => out.push('?'),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use std::{io, time::Duration};

    use super::*;
    use crate::{
        model::flow::{FarEnd, Target},
        sinks::upstream::limit::Limited,
    };

    #[test]
    fn every_failure_has_its_status_and_says_why() {
        let addr = "192.0.2.1:80".parse().unwrap();
        let t: Target = "a.example:80".parse().unwrap();
        let resolve = DialError::Resolve { name: "a".into(), source: io::ErrorKind::NotFound.into() };
        let unreachable = DialError::Unreachable { addr, source: io::ErrorKind::HostUnreachable.into() };
        let timeout = DialError::Timeout { target: t, after: Duration::from_secs(1) };
        for (refusal, status, error) in [
            (Refusal::Denied("no".into()), 403, "http_request_denied"),
            (Refusal::Loop, 508, "proxy_loop_detected"),
            (resolve.into(), 502, "dns_error"),
            (DialError::Refused { addr }.into(), 502, "connection_refused"),
            (unreachable.into(), 503, "destination_ip_unroutable"),
            (timeout.into(), 504, "connection_timeout"),
            (Refusal::Limit(1), 503, "connection_limit_reached"),
            (
                TunnelError::Limit { upstream: "a".into(), what: Limited::Streams, most: 2 }.into(),
                503,
                "connection_limit_reached",
            ),
            (
                TunnelError::Empty { upstream: "a".into(), why: "gone".into() }.into(),
                503,
                "destination_unavailable",
            ),
        ] {
            let response = refusal.response();
            assert_eq!(response.status().as_u16(), status, "{refusal}");
            let shown = response.headers()["proxy-status"].to_str().unwrap();
            assert!(shown.starts_with(&format!("tunnel; error={error}; details=\"")), "{shown}");
        }
    }

    #[test]
    fn what_the_next_hop_answered_is_passed_on_as_received() {
        for status in [StatusCode::FORBIDDEN, StatusCode::SERVICE_UNAVAILABLE] {
            let refused = TunnelError::Refused {
                peer: FarEnd::Through("gw.example:15008".parse().unwrap()),
                target: "a.example:80".parse().unwrap(),
                status,
                detail: None,
            };
            let response = Refusal::from(refused).response();
            assert_eq!(response.status(), status);
            let shown = response.headers()["proxy-status"].to_str().unwrap();
            let start = format!("tunnel; received-status={}; details=\"", status.as_u16());
            assert!(shown.starts_with(&start), "{shown}");
        }
    }

    #[test]
    fn details_cannot_leave_their_quotes() {
        assert_eq!(sf_string("a\"; error=ok\\\r\nx: y é"), "a\\\"; error=ok\\\\??x: y ?");
    }
}
