//! Why there is no stream.
//!
//! Enters: what happened on the way. Leaves: whose fault it was, in a sentence. Invariant: a refusal keeps its status
//! and its reason. It never decides what is tried again.

use std::time::Duration;

use http::StatusCode;

use super::{connect::ConnectError, limit::Limited};
use crate::model::{
    end::EndReason,
    flow::{FarEnd, Target},
};

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
