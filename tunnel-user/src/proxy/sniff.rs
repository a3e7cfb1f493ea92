//! Flows whose route depends on what their client sends first.
//!
//! Enters: a client that takes itself for connected. Leaves: what its flow goes on with, if it does. Invariant: policy has
//! allowed its target before a byte is looked at, and a refusal is a reset. It never sees flows that are routed
//! without a look.

use std::time::Instant;

use super::{Going, Proxy, reach::Wish};
use crate::{
    model::end::EndReason,
    observe::stats::Record,
    relay::{Ahead, Leg, Queue},
    routing::{flow::Flow, sniff::inspect},
};

impl Proxy {
    /// Looks at what the client sends, asks the router again, and reaches the target. `early`: what it has sent. A flow
    /// that does not go on is booked.
    pub(super) async fn look_and_reach(
        &self,
        leg: &mut impl Leg,
        mut early: Queue,
        wish: Wish<'_>,
        mut record: Record,
        started: Instant,
    ) -> Option<Box<Going>> {
        let mut stop = self.stop.clone();
        let looked = tokio::select! {
            biased;
            looked = inspect(leg, &mut early, wish.setup.shared.inspect_timeout) => Some(looked),
            () = stop.stopping() => None,
        };
        let inside = match looked {
            Some(Ok(inside)) => inside,
            Some(Err(_)) => {
                self.left(record, started);
                return None;
            }
            None => {
                leg.abort();
                record.ended(EndReason::DrainTimeout, None);
                self.book(record, started);
                return None;
            }
        };
        tracing::debug!(target = %wish.flow.target, ?inside, "looked at");
        let wish = Wish { flow: Flow { inside: Some(&inside), ..wish.flow }, ..wish };
        let decision = self.route(&wish);
        let ahead = Ahead::new(leg, early);
        let reached = tokio::select! {
            biased;
            reached = self.reach(&wish, decision, &mut record, Some(&ahead)) => {
                Some(reached.map(|sink| (sink, ahead.into_early())))
            }
            _ = ahead.left() => None,
        };
        match reached {
            Some(Ok((sink, early))) => return Some(Box::new(Going { sink, early, record, started })),
            Some(Err(refusal)) => {
                leg.abort();
                self.refused(&refusal, record, wish.flow.identity, started);
            }
            None => self.left(record, started),
        }
        None
    }
}
