//! Policies at work: asked for each request, counted by name, and asked again about live flows when they change.
//!
//! # Invariants
//! - A live flow ends when a configuration comes into force of which a policy or a route denies it, or no policy allows it. That a
//!   route is gone ends nothing: what it sent somewhere goes on.

use std::net::SocketAddr;

use super::{Proxy, Refusal, Setup, Shared};
use crate::{
    model::{
        admission::{Admission, HeldHead, Onward},
        end::EndReason,
        flow::{Direction, Head, SourceKind, Target, Transport},
    },
    observe::{
        flows::{Cause, LiveFlow},
        policies::PolicyHits,
    },
    routing::{
        flow::Flow,
        index::{NOBODY, RuleId},
        policy::{Denied, Permit, Request},
        router::Decision,
    },
};

impl Setup {
    fn hits(&self, rule: RuleId) -> Option<&PolicyHits> {
        self.policies.get(rule).map(|hits| &**hits)
    }

    /// Of the policy that refuses.
    fn hits_of(&self, refusal: &Refusal) -> Option<&PolicyHits> {
        let (Refusal::Denied { .. }, Some(rule)) = (refusal, refusal.rule()) else { return None };
        let place = self.shared.policies.names().iter().position(|name| name == rule)?;
        self.hits(place)
    }

    fn count_denied(&self, denied: &Denied) {
        if let Denied::Rule { place, .. } = denied
            && let Some(hits) = self.hits(*place)
        {
            hits.denied.add(1);
        }
    }

    fn count_allowed(&self, rule: RuleId) {
        if let Some(hits) = self.hits(rule) {
            hits.allowed.add(1);
        }
    }
}

impl Proxy {
    /// Whether a peer may ask for a target.
    pub(super) fn check<'a>(&self, setup: &'a Setup, request: Request<'a>) -> Result<Permit<'a>, Refusal> {
        let checked = setup.shared.policies.check_target(request);
        let literal = match request.target {
            Target::Addr(addr) => Some(*addr),
            Target::Name(..) => None,
        };
        self.report(setup, request, literal, checked.is_ok());
        match &checked {
            Ok(permit) => permit.rule().into_iter().for_each(|rule| setup.count_allowed(rule)),
            Err(denied) => setup.count_denied(denied),
        }
        checked.map_err(|denied| Refusal::denied(&denied, request.target))
    }

    /// Whether a target may be passed on to a next hop, which resolves it itself.
    pub(super) fn pass_on(&self, setup: &Setup, permit: &Permit<'_>) -> Result<(), Refusal> {
        permit.allows_unresolved().map(drop).map_err(|denied| {
            setup.count_denied(&denied);
            Refusal::denied(&denied, permit.request().target)
        })
    }

    /// Whether another one may be too, which the peer has named since.
    pub(super) fn pass_on_too(
        &self,
        setup: &Setup,
        permit: &Permit<'_>,
        named: &Target,
    ) -> Result<(), Refusal> {
        permit.allows_too(named).map(drop).map_err(|denied| {
            setup.count_denied(&denied);
            Refusal::denied(&denied, named)
        })
    }

    /// Of the addresses that a target resolved to, those that may be dialled. At least one, if there was any.
    pub(super) fn allowed(
        &self,
        setup: &Setup,
        permit: &Permit<'_>,
        addrs: &mut Vec<SocketAddr>,
    ) -> Result<(), Refusal> {
        let request = permit.request();
        // Of a literal address, and of a name as a name, that was asked before.
        let asked = match request.target {
            Target::Addr(_) => true,
            Target::Name(..) => setup.shared.policies.would_differ(request, None, true).is_some(),
        };
        let (mut rule, mut why, mut reported) = (None, None, asked);
        addrs.retain(|addr| {
            let allowed = permit.allows_addr(*addr);
            reported = reported || self.report(setup, request, Some(*addr), allowed.is_ok());
            match &allowed {
                Ok(by) => rule = rule.or(Some(*by)),
                Err(denied) => why = Some(denied.clone()),
            }
            allowed.is_ok()
        });
        if let (true, Some(why)) = (addrs.is_empty(), why) {
            setup.count_denied(&why);
            return Err(Refusal::denied(&why, request.target));
        }
        // What was allowed as it is written has been counted.
        if let (None, Some(rule)) = (permit.rule(), rule) {
            setup.count_allowed(rule);
        }
        Ok(())
    }

    /// Counts and logs what a policy in report mode would have decided otherwise; whether there was one.
    fn report(&self, setup: &Setup, request: Request<'_>, addr: Option<SocketAddr>, allowed: bool) -> bool {
        let policies = &setup.shared.policies;
        let Some(rule) = policies.would_differ(request, addr, allowed) else { return false };
        if let Some(hits) = setup.hits(rule) {
            hits.reported.add(1);
        }
        if self.log.reports.admit() {
            tracing::info!(
                target: "tunnel::flow",
                rule = policies.names().get(rule).map(|name| &**name),
                would = if allowed { "deny" } else { "allow" },
                destination = %request.target,
                address = addr.map(tracing::field::display),
                client = %request.who.client(),
                identity = request.who.identity().map(tracing::field::display),
                "policy in report mode would decide otherwise"
            );
        }
        true
    }

    /// Ends the flows that the configuration in force no longer allows.
    pub(super) fn review(&self) {
        let setup = self.setup();
        let ended = self.flows.end_because(EndReason::PolicyChanged, |flow| self.ends(&setup, flow));
        if ended > 0 {
            tracing::info!(flows = ended, "ended flows that policies or routes no longer allow");
        }
    }

    /// Why a live flow is to end, if a configuration that has come into force since it was admitted refuses it.
    pub(super) fn ends(&self, setup: &Setup, flow: &LiveFlow) -> Option<Cause> {
        let refusal = self.refuses(setup, flow.admissions())?;
        setup.hits_of(&refusal).into_iter().for_each(|hits| hits.ended.add(1));
        Some(Cause { rule: refusal.rule().cloned(), detail: Some(refusal.to_string()) })
    }

    /// Why a flow that was admitted with this would be refused now.
    pub(super) fn refuses(&self, setup: &Setup, admissions: &[Admission]) -> Option<Refusal> {
        admissions.iter().find_map(|admission| refuses(&setup.shared, admission).err())
    }

    /// The same of one that has not been answered yet, and is counted as denied.
    pub(super) fn denies(&self, setup: &Setup, admissions: &[Admission]) -> Option<Refusal> {
        let refusal = self.refuses(setup, admissions)?;
        setup.hits_of(&refusal).into_iter().for_each(|hits| hits.denied.add(1));
        Some(refusal)
    }
}

/// Policies' word and the routes' on what was admitted before.
fn refuses(shared: &Shared, admission: &Admission) -> Result<(), Refusal> {
    let Admission { source, name, client, identity, server_name, target, head, sniffed, onward } = admission;
    let wanted = shared.policies.needs_headers() || shared.router.needs_headers();
    let headers = head.as_ref().filter(|_| wanted).map(HeldHead::headers).unwrap_or_default();
    let head = head.as_ref().map(|head| Head { version: head.version(), headers: &headers });
    let peer;
    let (direction, peer) = match source {
        SourceKind::Capture => (Direction::Outbound, &NOBODY),
        SourceKind::Listener => {
            let who = shared.policies.peer(identity.clone(), *client);
            let denied = |denied: Denied| Refusal::denied(&denied, target);
            let request = Request { who: &who, target, headers: head.map(|head| head.headers) };
            let permit = shared.policies.check_target(request).map_err(denied)?;
            match onward {
                Onward::Dialled(addr) => permit.allows_addr(*addr).map_err(denied)?,
                Onward::Unresolved(named) => {
                    if let Some(named) = named {
                        permit.allows_too(named).map_err(denied)?;
                    }
                    permit.allows_unresolved().map_err(denied)?
                }
            };
            peer = shared.router.peer(identity.as_ref());
            (Direction::Inbound, &peer)
        }
    };
    let flow = Flow {
        transport: Transport::Tcp,
        direction,
        source: *source,
        name: name.as_deref(),
        target,
        client: *client,
        identity: identity.as_ref(),
        peer,
        server_name: server_name.as_deref(),
        request: head,
        sniffed: sniffed.as_ref(),
    };
    match shared.router.decide(&flow, 0) {
        Decision::Deny { route } => Err(Refusal::by_route(target, shared.router.name(route))),
        _ => Ok(()),
    }
}
