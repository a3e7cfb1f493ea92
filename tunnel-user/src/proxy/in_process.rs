//! From one of our own routes to one of our own listeners, without a connection.
//!
//! # Invariants
//! - The flow is allowed what a peer with our certificate would be allowed at the listener.
//! - No flow is dispatched without end: see [`HOPS_MAX`].

use http::Version;

use super::{
    Proxy, Refusal,
    reach::{FlowRequest, Sink},
};
use crate::{
    model::flow::{Direction, Head, SourceKind},
    observe::stats::Record,
    relay::Ahead,
    routing::{flow::Flow, policy, router::Decision},
    sinks::upstream::{
        InProcessUpstream,
        headers::{Ask, handed_over},
        in_process::DispatchInProcess,
    },
};

/// How often one flow is dispatched in this process: more listeners than one process passes a flow through on purpose. Beyond
/// it, it goes around in a loop.
const HOPS_MAX: usize = 8;

/// A flow on its way to a listener of this process.
pub(super) struct Hop<'a, 'c> {
    pub(super) proxy: &'a Proxy,
    pub(super) request: &'a FlowRequest<'a>,
    pub(super) record: &'a mut Record,
    pub(super) ahead: Option<&'a Ahead<'c>>,
}

impl DispatchInProcess for Hop<'_, '_> {
    type Sink = Sink;
    type Error = Refusal;

    async fn dispatch_in_process(self, to: &InProcessUpstream, ask: &Ask<'_>) -> Result<Sink, Refusal> {
        let Self { proxy, request, record, ahead } = self;
        if record.passed.len() >= HOPS_MAX {
            return Err(Refusal::Loop);
        }
        record.passed.push(to.name.clone());
        let target = ask.authority();
        let identity = to.identity(ask.identity).map_err(|why| {
            Refusal::Denied(format!(
                "{target} is refused: listener \"{}\" would reject our certificate: {why}",
                to.listener
            ))
        })?;
        if record.identity.is_none() {
            record.identity.clone_from(&identity);
        }
        let (shared, refused) = (&request.setup.shared, |e: policy::Denied| Refusal::Denied(e.to_string()));
        let peer = shared.router.peer(identity.as_ref());
        let policies = shared.policies.peer(identity.clone());
        let permit = shared.policies.check_target(&policies, target).map_err(refused)?;
        let headers = handed_over(ask);
        let version = ask.received.map_or(Version::HTTP_2, |received| received.version);
        let flow = Flow {
            direction: Direction::Inbound,
            source: SourceKind::Listener,
            name: Some(&to.listener),
            target,
            identity: identity.as_ref(),
            peer: &peer,
            server_name: None,
            request: Some(Head { version, headers: &headers }),
            ..request.flow
        };
        let dial_timeout = ask.terms.timeout.unwrap_or(to.dial_timeout);
        let request = FlowRequest { flow, permit: Some(permit), dial_timeout, ..*request };
        match proxy.route(&request) {
            // Its client would have to be answered first, and that is for the route before.
            Decision::NeedsSniff => Err(Refusal::Route(format!(
                "{target} is refused: the route at listener \"{}\" depends on what the connection carries, and the \
                 one that led there has not sniffed it",
                to.listener
            ))),
            // Boxed, because it comes here again.
            decision => Box::pin(proxy.reach(&request, decision, record, ahead)).await,
        }
    }
}
