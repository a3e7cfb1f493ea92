//! Why there is no connection, and why there is no stream: whose fault it was, in a sentence. A refusal keeps its status
//! and its reason.

use std::{rc::Rc, time::Duration};

use http::StatusCode;

use super::limit::Limited;
use crate::{
    config::Protocol,
    model::{
        end::EndReason,
        flow::{FarEnd, Target},
    },
    sinks::dial::DialError,
};

/// What may be the matter where TCP connects and TLS is not answered.
const LONG_HELLO: &str = ": TCP connected, and the TLS ClientHello was not answered; with its post-quantum key exchange it takes \
                          up to two segments, of which some networks drop one: key_exchange = [\"x25519\"] in [identity] keeps it \
                          within one";

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// TCP did not connect.
    #[error("{0}")]
    Dial(Rc<DialError>),
    /// The upstream that it goes through has no stream to it: whose fault that was, it says itself.
    #[error("{0}")]
    Outer(Rc<TunnelError>),
    /// TLS failed: what failed, in a sentence.
    #[error("TLS with {endpoint} failed: {why}")]
    Tls {
        /// The peer.
        endpoint: Target,
        /// Which check failed, and on which side.
        why: String,
    },
    /// The peer does not speak HTTP as we do, or not to us.
    #[error("{} with {endpoint} failed: {why}", protocol.name())]
    Http {
        /// The version that we speak.
        protocol: Protocol,
        /// The peer.
        endpoint: Target,
        /// What it did.
        why: String,
    },
    /// No answer in time.
    #[error("{endpoint} did not complete the handshakes within {after:?}{}", if *long_hello { LONG_HELLO } else { "" })]
    Timeout {
        /// The peer.
        endpoint: Target,
        /// The time allowed.
        after: Duration,
        /// Nothing has answered a ClientHello that takes two segments.
        long_hello: bool,
    },
    /// Too many flows wait for this peer.
    #[error("{most} flows are waiting for a connection to {endpoint} already")]
    Overflow {
        /// The peer.
        endpoint: Target,
        /// How many may.
        most: usize,
    },
    /// No permit for a stream became free.
    #[error("{}", if *barred { format!("{endpoint} allows no streams (SETTINGS_MAX_CONCURRENT_STREAMS is 0)") } else { format!("no stream to {endpoint} became free within {after:?}") })]
    Waited {
        /// The peer.
        endpoint: Target,
        /// How long that was waited for.
        after: Duration,
        /// The peer allows none on a connection that is up.
        barred: bool,
    },
    /// The upstream has as many connections as it may.
    #[error("the limit of {most} connections is reached")]
    Limit {
        /// How many.
        most: usize,
    },
    /// There is nobody to be.
    #[error("{0}")]
    Identity(String),
    /// The pool is gone.
    #[error("shutting down")]
    Shutdown,
}

impl ConnectError {
    /// Whether nothing is known of the endpoint: the reason is on this side, or on the way there.
    pub fn is_ours(&self) -> bool {
        match self {
            Self::Overflow { .. } | Self::Limit { .. } | Self::Identity(_) | Self::Shutdown => true,
            Self::Waited { barred, .. } => !barred,
            Self::Outer(why) => matches!(
                **why,
                TunnelError::Connect { .. }
                    | TunnelError::NoEndpoint { .. }
                    | TunnelError::Empty { .. }
                    | TunnelError::Limit { .. }
            ),
            Self::Dial(_) | Self::Tls { .. } | Self::Http { .. } | Self::Timeout { .. } => false,
        }
    }
}

/// Why there is no stream.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TunnelError {
    /// No endpoint could be connected to: the upstream's fault, or the network's.
    #[error("upstream {upstream}: {source}")]
    Connect {
        /// Which.
        upstream: String,
        /// The last endpoint's failure.
        #[source]
        source: ConnectError,
    },
    /// Every endpoint has failed repeatedly and is being probed.
    #[error("upstream {upstream}: no endpoint is left, all have failed repeatedly (last: {last})")]
    NoEndpoint {
        /// Which.
        upstream: String,
        /// The last failure.
        last: String,
    },
    /// Nothing is known of any endpoint, or that there is none.
    #[error("upstream {upstream} has no endpoints: {why}")]
    Empty {
        /// Which.
        upstream: String,
        /// What was found out.
        why: String,
    },
    /// As much as this upstream gets.
    #[error("upstream {upstream}: the limit of {most} {what} is reached")]
    Limit {
        /// Which.
        upstream: String,
        /// What is limited.
        what: Limited,
        /// This worker's share.
        most: usize,
    },
    /// The far end said no.
    #[error("{peer} refused {target}: {status}{}", detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused {
        /// Who refused.
        peer: FarEnd,
        /// What was asked for.
        target: Target,
        /// The status.
        status: StatusCode,
        /// Its `proxy-status` (RFC 9209).
        detail: Option<String>,
    },
    /// The far end did not answer the CONNECT in time.
    #[error("{peer} did not answer CONNECT {target} within {after:?}")]
    Timeout {
        /// Who was asked.
        peer: FarEnd,
        /// What for.
        target: Target,
        /// The time allowed.
        after: Duration,
    },
    /// The stream or its connection broke before the answer.
    #[error("{peer} dropped CONNECT {target}: {why}")]
    Dropped {
        /// Who was asked.
        peer: FarEnd,
        /// What for.
        target: Target,
        /// How.
        why: String,
    },
    /// The target cannot be written as an `:authority`.
    #[error("{target} cannot be asked for: {why}")]
    Request {
        /// The target.
        target: Target,
        /// Why.
        why: String,
    },
}

impl TunnelError {
    /// Which of the ends it is.
    pub fn reason(&self) -> EndReason {
        match self {
            Self::Connect { source: ConnectError::Tls { .. }, .. } => EndReason::UpstreamTls,
            Self::Connect { .. } => EndReason::UpstreamUnreachable,
            Self::NoEndpoint { .. } => EndReason::NoHealthyEndpoint,
            Self::Empty { .. } => EndReason::NoEndpoint,
            Self::Limit { .. } => EndReason::UpstreamLimit,
            Self::Refused { .. } => EndReason::UpstreamRefused,
            Self::Timeout { .. } => EndReason::UpstreamTimeout,
            Self::Dropped { .. } => EndReason::UpstreamLost,
            Self::Request { .. } => EndReason::BadRequest,
        }
    }

    /// Whether the gateway is to blame, or may be: it says that it is, or says nothing (Envoy's "gateway failure").
    pub(super) fn is_the_gateways(&self) -> bool {
        use StatusCode as S;
        match self {
            Self::Timeout { .. } | Self::Dropped { .. } => true,
            Self::Refused { status, .. } => {
                matches!(*status, S::BAD_GATEWAY | S::SERVICE_UNAVAILABLE | S::GATEWAY_TIMEOUT)
            }
            _ => false,
        }
    }
}

/// Why a health check did not succeed.
#[derive(Debug)]
pub enum CheckError {
    /// The endpoint's fault, or the network's.
    Failed(String),
    /// At a limit of ours: nothing is known.
    Inconclusive,
}

impl From<ConnectError> for CheckError {
    fn from(e: ConnectError) -> Self {
        if e.is_ours() { Self::Inconclusive } else { Self::Failed(e.to_string()) }
    }
}
