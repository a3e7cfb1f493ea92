//! How an upstream is reached, as the configuration says it.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue};

use super::{discovery::EndpointSource, limit::Limits};
use crate::{
    config::{Balance, Congestion, HealthCheck, OutlierDetection, UpstreamProtocol},
    identity::store::TlsStore,
    model::{
        names::{IdentityName, UpstreamName},
        trust::ServerCheck,
    },
    sinks::dial::Dialer,
};

/// One upstream, as configured.
#[derive(Clone, Debug)]
pub struct UpstreamSettings {
    /// Its name, for logs and statistics.
    pub name: String,
    /// Where it is.
    pub endpoints: EndpointSource,
    /// Through which other upstream it is reached.
    pub via: Option<UpstreamName>,
    /// Which endpoint is next.
    pub balance: Balance,
    /// What it speaks.
    pub protocol: UpstreamProtocol,
    /// TLS; `None`: plaintext.
    pub tls: Option<UpstreamTls>,
    /// Headers for every CONNECT request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// From the request to its answer: the far end dials in this time.
    pub response_timeout: Duration,
    /// Whether what a client sends goes ahead of the answer, where HTTP/2 is spoken.
    pub optimistic_data: bool,
    /// Its connections; those of HTTP/1 are made in the same way, and not kept.
    pub pool: PoolSettings,
    /// Which endpoints are ejected for what flows have met there.
    pub outlier: OutlierDetection,
    /// How endpoints are checked; `None`: they are not.
    pub check: Option<HealthCheck>,
    /// How much it gets from this worker.
    pub limits: Limits,
}

/// How an upstream is spoken to over TLS.
#[derive(Clone)]
pub struct UpstreamTls {
    /// Our certificate, and whom we trust.
    pub store: Arc<TlsStore>,
    /// The same for flows of captures that name an identity of their own.
    pub of_captures: Arc<BTreeMap<IdentityName, Arc<TlsStore>>>,
    /// What its certificate must say.
    pub check: ServerCheck,
}

impl fmt::Debug for UpstreamTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpstreamTls").field("check", &self.check).finish_non_exhaustive()
    }
}

impl UpstreamTls {
    /// Who we are for a flow whose capture says `identity`.
    pub fn store_for(&self, identity: Option<&IdentityName>) -> &Arc<TlsStore> {
        identity.and_then(|name| self.of_captures.get(name)).unwrap_or(&self.store)
    }
}

/// How the connections of one upstream are made and kept.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    /// Streams on one connection; the peer's limit counts too.
    pub max_streams: usize,
    /// Connections, those being made too.
    pub max_connections: usize,
    /// How they are made.
    pub connect: ConnectSettings,
    /// A connection without streams is closed after this.
    pub idle_timeout: Duration,
    /// Between two PINGs.
    pub keepalive_interval: Duration,
    /// A PING unanswered for this long means that the connection is lost.
    pub keepalive_timeout: Duration,
    /// Who decides how fast is sent over QUIC.
    pub congestion: Congestion,
}

/// How one connection is made.
#[derive(Clone, Debug)]
pub struct ConnectSettings {
    /// From the first SYN until the peer has answered: to TLS, and where HTTP/2 is spoken, on that.
    pub timeout: Duration,
    /// By which TCP connects.
    pub dialer: Dialer,
}
