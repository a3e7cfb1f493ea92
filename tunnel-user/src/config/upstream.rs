//! `[[upstream]]`: a gateway or proxy that flows are tunnelled through.

use std::{num::NonZeroU32, time::Duration};

use http::{HeaderName, HeaderValue};
use rustls_pki_types::ServerName;

use super::{
    Congestion, Discovery, HealthCheck, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, Limits, OutlierDetection,
    Protocol, UpstreamProtocol, endpoints, section::section,
};
use crate::model::{
    flow::Target,
    names::{IdentityName, UpstreamName},
    san::SanPattern,
    trust::{ClientCheck, ServerCheck},
};

/// CONNECT streams on one connection to an upstream. RFC 9113 section 6.5.2 advises that peers allow no
/// fewer than 100, so nobody should refuse it.
pub const UPSTREAM_STREAMS: NonZeroU32 = NonZeroU32::new(100).expect("not 0");
/// How long a connection to an endpoint may take, TLS included: endpoints are near, and the application
/// waits.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection without streams is kept. Less than the 100 to 350 s after which firewalls and
/// load balancers of the clouds forget connections.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// How long an upstream may take to answer CONNECT: the gateway's dial timeout, and the way there.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);

/// Keys of connections that many flows share.
const H2_ONLY: [&str; 4] = ["max_streams", "idle_timeout", "keepalive_interval", "keepalive_timeout"];

section! {
    /// `[[upstream]]`
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Upstream {
        /// Name, for routes.
        name: required UpstreamName,
        /// The HTTP version to speak: "h2", many flows on one connection; "h1", a connection for each flow;
        /// "h3", many flows on one connection over QUIC, in which none waits for the lost packets of another; "auto", "h2", and
        /// "h3" where an endpoint offers it (RFC 7838) and UDP gets through.
        protocol: default UpstreamProtocol = UpstreamProtocol::H2,
        /// Whether to use TLS. Without TLS there are no identities.
        tls: default bool = true,
        /// Who we are to it, where it is spoken to over TLS.
        identity: other IdentityName = IdentityName::default(),
        /// Where it is; at least one, unless a file says it, or it is this process itself.
        endpoints: other Vec<Target> = Vec::new(),
        /// Where its endpoints come from.
        discovery: other Discovery = Discovery::Static,
        /// How an endpoint is picked: "least_request", the one with fewer flows of two picked by chance; "round_robin", each in
        /// turn; "random", by chance; "consistent_hash", the same for the same target.
        balance: default Balance = Balance::LeastRequest,
        /// Server name to send (SNI) and, without verify, to verify. Default: the host of the endpoint.
        sni: optional ServerName<'static>,
        /// Names (SAN); its certificate must have one of them. Empty: the certificate must be valid for sni or the
        /// endpoint.
        verify: default Vec<SanPattern> = Vec::new(),
        /// Headers to add to every CONNECT request, such as baggage.
        headers: default Vec<(HeaderName, HeaderValue)> = Vec::new(),
        /// Maximum of concurrent CONNECT streams on one connection.
        max_streams: default NonZeroU32 = UPSTREAM_STREAMS,
        /// Timeout for connecting, including TLS.
        connect_timeout: default Duration = CONNECT_TIMEOUT,
        /// How long to keep a connection without streams.
        idle_timeout: default Duration = IDLE_TIMEOUT,
        /// Who decides how fast is sent over HTTP/3: "cubic", "bbr". Over TCP it is the kernel.
        congestion_control: default Congestion = Congestion::Cubic,
        /// Interval of PINGs on an idle connection.
        keepalive_interval: default Duration = KEEPALIVE_INTERVAL,
        /// Timeout for the answer to a PING.
        keepalive_timeout: default Duration = KEEPALIVE_TIMEOUT,
        /// Timeout for the answer to a CONNECT request.
        response_timeout: default Duration = RESPONSE_TIMEOUT,
        /// Whether to send a client's first bytes with the CONNECT request, before its answer, which saves a round trip. false for a
        /// peer that does not accept DATA before its 200, or forwards it over HTTP/1 without waiting for one. Over HTTP/1 nothing
        /// is sent before the answer.
        optimistic_data: default bool = true,
        /// When an endpoint is ejected because flows failed there.
        outlier_detection: section OutlierDetection,
        /// Active health checks of every endpoint. Default: none.
        health_check: maybe HealthCheck,
        /// Limits for the whole process; each worker has its share, rounded up. Flows that exceed them are rejected at
        /// once. Default: no limit.
        limits: section Limits,
        /// Which other upstream its connections go through. That one is another process, and does not come back here.
        via: other Option<UpstreamName> = None,
        /// It is this process: nothing else of this is used then.
        in_process: other Option<InProcess> = None,
    }
    check |r| {
        let identity = r.optional(
            "identity",
            "Name of the identity that it is shown, and whose CA certificates it is verified with; those of a capture take precedence for its flows. Default: the only identity, or the one named \"default\".",
        ).unwrap_or(identity);
        let found = endpoints::read(r);
        endpoints::check_health(r, protocol, health_check.as_ref());
        if !tls {
            for key in ["sni", "verify", "identity"] {
                if r.has(key) {
                    r.wrong(key, "has no meaning with tls = false: servers show certificates in TLS only");
                }
            }
        }
        if protocol == UpstreamProtocol::H1 {
            for key in H2_ONLY {
                if r.has(key) {
                    let why = "over HTTP/1 each flow has a connection of its own";
                    r.wrong(key, format!("has no meaning with protocol = \"h1\": {why}"));
                }
            }
        }
        if protocol.all().any(|p| p == Protocol::H3) {
            let name = protocol.name();
            if !tls {
                r.wrong("protocol", format!("is \"{name}\", which there is with TLS only"));
            }
            if r.has("via") {
                let why = "QUIC goes over UDP, which no other upstream carries";
                r.wrong("via", format!("has no meaning with protocol = \"{name}\": {why}"));
            }
        } else if r.has("congestion_control") {
            r.wrong(
                "congestion_control",
                "has no meaning without protocol = \"h3\" or \"auto\": over TCP it is the kernel's",
            );
        }
        if protocol == UpstreamProtocol::H1 && r.has("optimistic_data") {
            let why = "over HTTP/1 nothing is sent before the answer, which a proxy could take for its next request";
            r.wrong("optimistic_data", format!("has no meaning with protocol = \"h1\": {why}"));
        }
        let (endpoints, discovery) = found?;
    }
    defaults named;
}

impl Upstream {
    /// An upstream with the defaults.
    pub fn new(name: UpstreamName, endpoints: Vec<Target>) -> Self {
        Self { endpoints, ..Self::named(name) }
    }

    /// What its endpoints must prove; without TLS nothing.
    pub fn check(&self) -> Option<ServerCheck> {
        self.tls.then(|| ServerCheck { name: self.sni.clone(), san: self.verify.clone() })
    }
}

/// How an endpoint is picked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// The one with fewer streams, of two picked at random.
    #[default]
    LeastRequest,
    /// Each in turn.
    RoundRobin,
    /// By chance.
    Random,
    /// The same for the same target, as long as it is available.
    ConsistentHash,
}

/// An upstream that is this process: flows go to one of its listeners, as a peer's would.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InProcess {
    /// The listener's name.
    pub listener: String,
    /// What its clients must prove; without TLS nothing.
    pub check: Option<ClientCheck>,
    /// How long a dial for it may take.
    pub dial_timeout: Duration,
}
