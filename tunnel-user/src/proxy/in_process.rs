//! From one of our own routes to one of our own listeners, without a connection.
//!
//! Enters: a flow whose route names an upstream that is this process. Leaves: what that listener makes of it: a
//! sink, or why there is none. Invariant: it is asked what a peer with our certificate would be asked, and no flow
//! is handed over without end. It never queues, and starts no task.

use http::Version;

use super::{
    Proxy,
    reach::{Sink, Wish},
};
use crate::{
    model::flow::{Head, Source},
    observe::stats::Record,
    relay::Ahead,
    routing::{flow::Flow, policy, router::Decision},
    sinks::upstream::{
        Itself,
        headers::{Ask, handed_over},
    },
    sources::listener::request::Refusal,
};

/// How often one flow is handed over: more listeners than one process passes a flow through on purpose. Beyond
/// it, it goes around in a loop.
const HANDED_MAX: usize = 8;

impl Proxy {
    /// Goes on as though a peer had asked the listener.
    pub(super) async fn hand_over(
        &self,
        to: &Itself,
        wish: &Wish<'_>,
        ask: &Ask<'_>,
        record: &mut Record,
        ahead: Option<&Ahead<'_>>,
    ) -> Result<Sink, Refusal> {
        if record.passed.len() >= HANDED_MAX {
            return Err(Refusal::Loop);
        }
        record.passed.push(to.name.clone());
        let target = ask.authority();
        let identity = to.identity().map_err(|why| {
            Refusal::Denied(format!(
                "{target} is refused: listener \"{}\" would not let us in: {why}",
                to.listener
            ))
        })?;
        if record.identity.is_none() {
            record.identity.clone_from(&identity);
        }
        let (shared, refused) = (&wish.setup.shared, |e: policy::Denied| Refusal::Denied(e.to_string()));
        let peer = shared.router.peer(identity.as_ref());
        let policies = shared.policies.peer(identity.clone());
        let permit = shared.policies.check_target(&policies, target).map_err(refused)?;
        let headers = handed_over(ask);
        let version = ask.received.map_or(Version::HTTP_2, |received| received.version);
        let flow = Flow {
            source: Source::Listener,
            name: Some(&to.listener),
            target,
            identity: identity.as_ref(),
            peer: &peer,
            server_name: None,
            request: Some(Head { version, headers: &headers }),
            ..wish.flow
        };
        let dial_timeout = ask.terms.timeout.unwrap_or(to.dial_timeout);
        let wish = Wish { setup: wish.setup, flow, permit: Some(permit), dial_timeout };
        match self.route(&wish) {
            // Its client would have to be answered first, and that is for the route before.
            Decision::Look => Err(Refusal::Route(format!(
                "{target} is refused: the route at listener \"{}\" depends on what the connection carries, and the \
                 one that led there has not looked at it",
                to.listener
            ))),
            decision => self.reach(&wish, decision, record, ahead).await,
        }
    }
}
