//! Reaches the target of a flow: the router, and what it says.
//!
//! Enters: a flow that policy has let through as far as its target. Leaves: a sink, or why there is none.
//! Invariant: what a listener's peer reaches is within its permit, whatever a route does. It never moves a byte.

use std::time::Duration;

use super::{Worker, setup::Setup};
use crate::{
    dial::{self, DialError},
    flow::{Flow, Target},
    listener::request::Refusal,
    policy::{self, Permit},
    relay::TcpLeg,
    route::Decision,
    stats::{Record, Via},
    tunnel::{
        self, Next,
        headers::{Ask, is_loop},
    },
};

/// Where a flow goes on.
pub(super) enum Sink {
    Direct(TcpLeg),
    Tunnel(tunnel::Stream),
}

impl Worker {
    /// Reaches the target: through an upstream, or by dialling. What came through a listener does so only as
    /// far as `permit` goes; captured applications are the operator's own.
    pub(super) async fn reach(
        &self,
        setup: &Setup,
        flow: &Flow<'_>,
        dial_timeout: Duration,
        permit: Option<Permit<'_>>,
        record: &mut Record,
    ) -> Result<Sink, Refusal> {
        let random = (self.trace.random() >> 32) as u32;
        let target = flow.target;
        match setup.shared.router.decide(flow, random) {
            Decision::Upstream { upstream, terms } => {
                if let Some(permit) = permit {
                    permit.allows_unresolved().map_err(|e| Refusal::Denied(e.to_string()))?;
                }
                let pseudonym = &setup.shared.pseudonym;
                let upstream =
                    setup.upstreams.get(upstream).ok_or_else(|| denied(target, "its upstream is gone"))?;
                let ask = Ask { target, client: Some(flow.client), received: flow.request, pseudonym, terms };
                let upstream = match upstream {
                    Next::Tunnel(upstream) => upstream,
                    // Boxed, because it comes here again.
                    Next::Itself(itself) => {
                        return Box::pin(self.hand_over(setup, itself, flow, &ask, record)).await;
                    }
                };
                // What is dialled here goes around no further.
                if flow.request.is_some_and(|r| is_loop(r.headers, pseudonym)) {
                    return Err(Refusal::Loop);
                }
                let stream = upstream.connect(&ask).await?;
                record.through(upstream.name(), &stream.peer, stream.number(), stream.identity.as_ref());
                Ok(Sink::Tunnel(stream))
            }
            Decision::Dial { instead, terms } => {
                let sink =
                    dial(setup, target, instead, terms.timeout.unwrap_or(dial_timeout), permit).await?;
                record.via = Via::Direct;
                Ok(sink)
            }
            Decision::Deny => Err(denied(target, "a route denies it")),
            Decision::NoRoute => Err(denied(target, "no route takes it")),
        }
    }
}

/// Dials the target, or what a route dials in its place. Then the target itself is not resolved, so a name
/// has to be allowed as a name.
async fn dial(
    setup: &Setup,
    target: &Target,
    instead: Option<&Target>,
    dial_timeout: Duration,
    permit: Option<Permit<'_>>,
) -> Result<Sink, Refusal> {
    let refused = |e: policy::Denied| Refusal::Denied(e.to_string());
    if let (Some(_), Some(permit)) = (instead, &permit) {
        permit.allows_unresolved().map_err(refused)?;
    }
    let dialled = instead.unwrap_or(target);
    let deadline = tokio::time::Instant::now() + dial_timeout;
    let resolved = tokio::time::timeout_at(deadline, dial::resolve(dialled)).await;
    let timed_out = |_| DialError::Timeout { target: dialled.clone(), after: dial_timeout };
    let mut addrs = resolved.map_err(timed_out)??;
    let mut why = None;
    if let Some(permit) = permit {
        let allowed = |addr| match instead {
            None => permit.allows_addr(addr),
            Some(to) => setup.shared.policies.allows_rewrite(to, addr),
        };
        addrs.retain(|addr| allowed(*addr).map_err(|e| why = Some(e)).is_ok());
    }
    if let (true, Some(why)) = (addrs.is_empty(), why) {
        return Err(refused(why));
    }
    let (stream, addr) = dial::connect(dialled, &addrs, setup.shared.mark, deadline, dial_timeout).await?;
    tracing::trace!(%target, %addr, "dialled");
    Ok(Sink::Direct(TcpLeg::new(stream)))
}

fn denied(target: &Target, why: &str) -> Refusal {
    Refusal::Denied(format!("{target} is refused: {why}"))
}
