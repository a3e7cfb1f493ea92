//! What a worker writes of that which others can bring about as often as they like.
//!
//! Enters: each refusal. Leaves: whether its line is written, and later how many were not. Invariant: kinds are apart, so
//! that many of one hide none of another.

use crate::{observe::repeats::Repeats, sinks::upstream::TunnelError, sources::listener::request::Refusal};

/// One for each kind of line.
pub(super) struct Lines {
    /// Connections of peers that did not get as far as a request.
    pub(super) handshakes: Repeats,
    /// Connections to capture listeners that are no flows.
    pub(super) strays: Repeats,
    /// Times that a listener has as many tunnel connections as it takes.
    pub(super) full: Repeats,
    /// Captured connections that there is no place for.
    pub(super) crowded: Repeats,
    bad_requests: Repeats,
    denied: Repeats,
    dials: Repeats,
    upstreams: Repeats,
    limits: Repeats,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            handshakes: Repeats::default(),
            strays: Repeats::default(),
            full: Repeats::new(1),
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

impl Lines {
    /// Of flows that are refused for this kind of reason.
    pub(super) fn of(&self, refusal: &Refusal) -> &Repeats {
        match refusal {
            Refusal::Method(_)
            | Refusal::Authority(_)
            | Refusal::Head(_)
            | Refusal::Content(_)
            | Refusal::Host(_) => &self.bad_requests,
            Refusal::Denied(_) | Refusal::Route(_) | Refusal::NoRoute(_) | Refusal::Loop => &self.denied,
            Refusal::Dial(_) => &self.dials,
            Refusal::Tunnel(TunnelError::Limit { .. }) | Refusal::Limit(_) | Refusal::PeerLimit(_) => {
                &self.limits
            }
            Refusal::Tunnel(_) => &self.upstreams,
        }
    }

    /// Tells what was left out since it was last told.
    pub(super) fn tell(&self) {
        for (repeats, what) in [
            (&self.handshakes, "connections of peers that were not let in"),
            (&self.strays, "connections to capture listeners that were reset"),
            (&self.full, "connections of peers that had to wait for another one's end"),
            (&self.crowded, "captured connections that were reset at the limit of flows"),
            (&self.bad_requests, "requests that make no sense"),
            (&self.denied, "flows that policy or a route refused"),
            (&self.dials, "flows whose target was not reached"),
            (&self.upstreams, "flows that an upstream did not take"),
            (&self.limits, "flows that were refused at a limit"),
        ] {
            if let Some(suppressed) = repeats.left_out() {
                tracing::warn!(suppressed, "more {what}, each without a line of its own");
            }
        }
    }
}
