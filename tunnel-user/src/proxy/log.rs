//! Log lines that others can cause as often as they like: each kind is limited, and what was left out is counted.
//!
//! # Invariants
//! - Kinds are apart, so that many lines of one suppress none of another.

use super::Refusal;
use crate::{observe::repeats::Repeats, sinks::upstream::TunnelError};

/// One for each kind of line.
pub(super) struct LimitedLog {
    /// Connections of peers that did not get as far as a request.
    pub(super) handshakes: Repeats,
    /// Connections of peers that flooded them.
    pub(super) floods: Repeats,
    /// Connections to capture listeners that are no flows.
    pub(super) strays: Repeats,
    /// Times that a listener has as many tunnel connections as it takes.
    pub(super) full: Repeats,
    /// Requests that a policy in report mode would have decided otherwise.
    pub(super) reports: Repeats,
    /// Flows that are refused because the worker has as many as it takes.
    crowded: Repeats,
    bad_requests: Repeats,
    denied: Repeats,
    dials: Repeats,
    upstreams: Repeats,
    limits: Repeats,
}

impl Default for LimitedLog {
    fn default() -> Self {
        Self {
            handshakes: Repeats::default(),
            floods: Repeats::default(),
            strays: Repeats::default(),
            full: Repeats::new(1),
            reports: Repeats::default(),
            // All of them say the same.
            crowded: Repeats::new(1),
            bad_requests: Repeats::default(),
            denied: Repeats::default(),
            dials: Repeats::default(),
            upstreams: Repeats::default(),
            limits: Repeats::default(),
        }
    }
}

impl LimitedLog {
    /// Of flows that are refused for this kind of reason.
    pub(super) fn of(&self, refusal: &Refusal) -> &Repeats {
        match refusal {
            Refusal::Request(_) => &self.bad_requests,
            Refusal::Denied { .. } | Refusal::Route { .. } | Refusal::NoRoute(_) | Refusal::Loop => {
                &self.denied
            }
            Refusal::Dial(_) => &self.dials,
            Refusal::Limit(_) | Refusal::SourceLimit(_) => &self.crowded,
            Refusal::Tunnel(TunnelError::Limit { .. })
            | Refusal::PeerLimit(_)
            | Refusal::PeerRate(_)
            | Refusal::PeerMemory
            | Refusal::Memory => &self.limits,
            Refusal::Tunnel(_) => &self.upstreams,
        }
    }

    /// Tells what was left out since it was last told.
    pub(super) fn tell(&self) {
        for (repeats, what) in [
            (&self.handshakes, "rejected peer connections"),
            (&self.floods, "connections of peers that were closed because of a flood"),
            (&self.strays, "connections to capture listeners that were reset"),
            (&self.full, "connections of peers that had to wait for another one's end"),
            (&self.reports, "requests that a policy in report mode would have decided otherwise"),
            (&self.crowded, "flows that were refused at the limit of flows"),
            (&self.bad_requests, "requests that make no sense"),
            (&self.denied, "flows that policy or a route refused"),
            (&self.dials, "flows whose target was not reached"),
            (&self.upstreams, "flows that an upstream did not take"),
            (&self.limits, "flows that were refused at another limit"),
        ] {
            if let Some(suppressed) = repeats.left_out() {
                tracing::warn!(suppressed, "more {what}, each without a line of its own");
            }
        }
    }
}
