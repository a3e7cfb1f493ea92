//! Flows whose route depends on what their client sends first.
//!
//! Enters: a client that takes itself for connected. Leaves: a flow that has ended, booked. Invariant: policy has
//! allowed its target before a byte is looked at, and a refusal is a reset. It never sees flows that are routed
//! without a look.

use std::time::Instant;

use super::{Worker, reach::Wish};
use crate::{
    flow::Flow,
    inspect::inspect,
    relay::{Ahead, Leg, Outcome, Queue},
    stats::Record,
};

impl Worker {
    /// Looks at what the client sends, asks the router again, and carries the flow. `early`: what it has sent.
    pub(super) async fn look_and_carry(
        &self,
        leg: &mut impl Leg,
        mut early: Queue,
        wish: Wish<'_>,
        mut record: Record,
        started: Instant,
    ) {
        let mut stop = self.stop.clone();
        let looked = tokio::select! {
            biased;
            looked = inspect(leg, &mut early, wish.setup.shared.inspect_timeout) => Some(looked),
            () = stop.stopping() => None,
        };
        let inside = match looked {
            Some(Ok(inside)) => inside,
            Some(Err(_)) => return self.left(record, started),
            None => {
                leg.abort();
                record.outcome = Outcome::Stopped.to_string().into();
                return self.book(record, started);
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
            Some(Ok((sink, early))) => self.relay(leg, early, sink, record, started).await,
            Some(Err(refusal)) => {
                leg.abort();
                self.refused(&refusal, record, wish.flow.identity, started);
            }
            None => self.left(record, started),
        }
    }
}
