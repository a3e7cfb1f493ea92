//! Why a flow was not carried, and how that is answered: with the status of its [`EndReason`], and with what went wrong in
//! `proxy-status` (RFC 9209).

use std::sync::Arc;

use http::{HeaderValue, Response, StatusCode, header::ALLOW};

use crate::{
    model::{end::EndReason, flow::Target},
    routing::policy::Denied,
    sinks::{
        dial::DialError,
        upstream::{TunnelError, failover::OpenError},
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
    /// No policy allows it, or one denies it.
    #[error("{detail}")]
    Denied {
        /// For the operator.
        detail: String,
        /// For the peer, who learns no policy's name and nothing that a name resolved to.
        public: String,
        /// The name of the policy that denies it.
        rule: Option<Arc<str>>,
    },
    /// A route denies it.
    #[error("{detail}")]
    Route {
        /// For the operator.
        detail: String,
        /// For the peer.
        public: String,
        /// The name of the route.
        rule: Option<Arc<str>>,
    },
    /// No route matches it.
    #[error("{0} is refused: no route takes it")]
    NoRoute(Target),
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
    /// As many flows as one capture gets of them. Ours.
    #[error("the limit of {0} flows of one capture is reached (daemon.max_flows)")]
    SourceLimit(usize),
    /// As many flows as one peer gets of them. The peer's.
    #[error("the limit of {0} flows of one peer is reached")]
    PeerLimit(usize),
    /// As many new flows as one peer gets in a second. The peer's.
    #[error(
        "the limit of {0} new flows of one peer in a second is reached (daemon.limits.peer_flows_per_second)"
    )]
    PeerRate(u32),
    /// As much memory as one peer gets is in use. The peer's.
    #[error("the memory for one peer is in use (daemon.limits.peer_memory)")]
    PeerMemory,
    /// As much memory as there is for peers is in use. Ours.
    #[error("the memory for peers is in use (daemon.limits.memory)")]
    Memory,
}

impl From<OpenError> for Refusal {
    fn from(e: OpenError) -> Self {
        match e {
            OpenError::Loop => Self::Loop,
            OpenError::Upstream(e) => Self::Tunnel(e),
            OpenError::Unknown(target) => Self::NoRoute(target),
        }
    }
}

impl Refusal {
    /// A policy's, of a request for `target`.
    pub fn denied(denied: &Denied, target: &Target) -> Self {
        let (detail, public) = (denied.to_string(), denied.public(target));
        Self::Denied { detail, public, rule: denied.rule().cloned() }
    }

    /// Because a listener of this process would not accept our certificate.
    pub fn not_accepted(detail: String) -> Self {
        Self::Denied { public: detail.clone(), detail, rule: None }
    }

    /// Because a route denies it.
    pub fn by_route(target: &Target, route: Arc<str>) -> Self {
        let detail = format!("{target} is refused: route \"{route}\" denies it");
        let public = format!("{target} is refused: a route denies it");
        Self::Route { detail, public, rule: Some(route) }
    }

    /// The name of the policy or the route that refuses it.
    pub fn rule(&self) -> Option<&Arc<str>> {
        match self {
            Self::Denied { rule, .. } | Self::Route { rule, .. } => rule.as_ref(),
            _ => None,
        }
    }

    /// What the peer is told.
    fn public(&self) -> String {
        match self {
            Self::Denied { public, .. } | Self::Route { public, .. } => public.clone(),
            other => other.to_string(),
        }
    }

    /// Which of the ends it is.
    pub fn reason(&self) -> EndReason {
        match self {
            Self::Request(e) => e.reason(),
            Self::Denied { .. } => EndReason::PolicyDenied,
            Self::Route { .. } => EndReason::RouteDenied,
            Self::NoRoute(_) => EndReason::NoRoute,
            Self::Loop => EndReason::Loop,
            Self::Dial(e) => e.reason(),
            Self::Tunnel(e) => e.reason(),
            Self::Limit(_) | Self::SourceLimit(_) => EndReason::FlowLimit,
            Self::PeerLimit(_) => EndReason::PeerLimit,
            Self::PeerRate(_) => EndReason::PeerRate,
            Self::PeerMemory => EndReason::PeerMemory,
            Self::Memory => EndReason::MemoryLimit,
        }
    }

    /// What is answered: the status of the reason, or the next hop's own, which is passed on.
    pub fn status(&self) -> StatusCode {
        self.received().or(self.reason().status()).unwrap_or(StatusCode::BAD_GATEWAY)
    }

    /// What the next hop answered.
    fn received(&self) -> Option<StatusCode> {
        if let Self::Tunnel(TunnelError::Refused { status, .. }) = self { Some(*status) } else { None }
    }
}

impl Answer for Refusal {
    fn response(&self) -> Response<()> {
        let status = self.status();
        let mut response = Response::new(());
        *response.status_mut() = status;
        let cause = match (self.received(), self.reason().proxy_error()) {
            // RFC 9209 section 2.1.5.
            (Some(received), _) => format!("received-status={}", received.as_u16()),
            (None, error) => format!("error={}", error.unwrap_or("proxy_internal_error")),
        };
        let text = format!("{SELF}; {cause}; details=\"{}\"", sf_string(&self.public()));
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
    use crate::{model::flow::FarEnd, sinks::upstream::limit::Limited};

    #[test]
    fn every_failure_has_its_status_and_says_why() {
        let addr = "192.0.2.1:80".parse().unwrap();
        let t: Target = "a.example:80".parse().unwrap();
        let resolve = DialError::Resolve { name: "a".into(), source: io::ErrorKind::NotFound.into() };
        let unreachable = DialError::Unreachable { addr, source: io::ErrorKind::HostUnreachable.into() };
        let timeout = DialError::Timeout { target: t, after: Duration::from_secs(1) };
        for (refusal, status, error) in [
            (Refusal::not_accepted("no".into()), 403, "http_request_denied"),
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
