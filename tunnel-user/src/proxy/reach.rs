//! Reaches the target of a flow, as the router decides: through an upstream, or by dialling.
//!
//! # Invariants
//! - What a listener's peer reaches is within its permit, whatever a route does.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{Proxy, Refusal, Setup, client::Account, in_process::Hop};
use crate::{
    config::{Authority, ProxyProtocol},
    identity::standing::EndOfStanding,
    model::{
        flow::{PeerAddr, Sniffed, Target},
        names::IdentityName,
    },
    observe::{
        marks::Marks,
        stats::{Record, Via},
    },
    relay::{Ahead, TcpLeg},
    routing::{
        flow::Flow,
        policy::{self, Permit},
        router::{Decision, another},
    },
    sinks::{
        dial::{self, DialError},
        upstream::{
            self,
            failover::{self, Opened},
            headers::Ask,
        },
    },
    transport::{
        proxy::Header,
        tcp::{Connected, FirstSpeaker},
    },
};

/// Where a flow goes on.
pub(super) enum Sink {
    /// What the target was dialled by, and what it is told before anything else.
    Direct(TcpLeg, Bytes),
    Tunnel(upstream::Stream),
}

impl Sink {
    /// When the flow is to end because the connection to the upstream has lost its standing.
    pub(super) fn end_of_flow(&mut self) -> Option<EndOfStanding> {
        match self {
            Self::Direct(..) => None,
            Self::Tunnel(stream) => stream.end.take(),
        }
    }
}

/// A flow that wants to go to its target.
#[derive(Clone, Copy)]
pub(super) struct FlowRequest<'a> {
    /// What it is carried by.
    pub(super) setup: &'a Setup,
    pub(super) flow: Flow<'a>,
    /// How far it may, when it came through a listener; captured applications are the operator's own.
    pub(super) permit: Option<Permit<'a>>,
    /// How long a dial may take, unless its route says otherwise.
    pub(super) dial_timeout: Duration,
    /// Who we are to upstreams for it, where its capture says so.
    pub(super) identity: Option<&'a IdentityName>,
    /// How far it has got.
    pub(super) marks: &'a Marks,
}

impl Proxy {
    /// Asks the router.
    pub(super) fn route<'a>(&self, request: &FlowRequest<'a>) -> Decision<'a> {
        let decision = request.setup.shared.router.decide(&request.flow, fastrand::u32(..));
        request.marks.routed.set(Some(Instant::now()));
        decision
    }

    /// Reaches the target, as the router has decided: through an upstream, or by dialling. What the client sends
    /// meanwhile may go `ahead` through an upstream.
    pub(super) async fn reach(
        &self,
        request: &FlowRequest<'_>,
        decision: Decision<'_>,
        record: &mut Record,
        ahead: Option<&Ahead<'_>>,
    ) -> Result<Sink, Refusal> {
        let FlowRequest { setup, flow, permit, dial_timeout, identity, marks } = *request;
        let target = flow.target;
        match decision {
            Decision::Upstream { route, upstream, shares, terms } => {
                setup.note_route(record, route);
                if let Some(permit) = permit {
                    permit.allows_unresolved().map_err(|e| Refusal::Denied(e.to_string()))?;
                }
                let pseudonym = &setup.shared.pseudonym;
                let named = match terms.authority {
                    Authority::Sni => flow.sniffed.and_then(Sniffed::sni),
                    Authority::Host => flow.sniffed.and_then(Sniffed::host),
                    Authority::Destination | Authority::Is(_) => None,
                };
                let named = named.map(|name| name.with_port(target.port()));
                // Unlike a name that the route itself holds, this one is the peer's word.
                if let (Some(permit), Some(named)) = (permit, &named) {
                    permit.allows_too(named).map_err(|e| Refusal::Denied(e.to_string()))?;
                }
                let instead =
                    if let Authority::Is(to) = &terms.authority { Some(to) } else { named.as_ref() };
                let (client, received) = (Some(flow.client), flow.request);
                let marks = Some(marks);
                let ask = Ask { target, instead, client, identity, received, pseudonym, terms, marks };
                let hop = Hop { proxy: self, request, record: &mut *record, ahead };
                let another = |tried: &[_]| another(shares, tried, fastrand::u32(..));
                match failover::open(&setup.upstreams, upstream, another, &ask, ahead, hop).await? {
                    Opened::Stream(upstream, stream) => {
                        let (number, identity) = (stream.number(), stream.identity.as_ref());
                        record.through(upstream.name(), &stream.peer, number, identity);
                        Ok(Sink::Tunnel(stream))
                    }
                    Opened::InProcess(sink) => Ok(sink),
                }
            }
            Decision::Dial { route, instead, terms } => {
                setup.note_route(record, route);
                let dial_timeout = terms.timeout.unwrap_or(dial_timeout);
                let first = match ahead {
                    _ if terms.proxy_protocol.is_some() => FirstSpeaker::Local,
                    Some(ahead) if ahead.has_bytes().await => FirstSpeaker::Local,
                    _ => FirstSpeaker::Unknown,
                };
                if let (Some(_), Some(permit)) = (instead, &permit) {
                    permit.allows_unresolved().map_err(|e| Refusal::Denied(e.to_string()))?;
                }
                let dialled = instead.unwrap_or(target);
                let deadline = tokio::time::Instant::now() + dial_timeout;
                let addrs = self.resolve(setup, dialled, &flow, deadline, dial_timeout).await?;
                let way = Way { dialled, addrs, first, deadline, allowed: dial_timeout };
                let (stream, addr) = dial(setup, target, instead, permit, way).await?;
                record.via = Via::Direct(PeerAddr(addr));
                let first = terms.proxy_protocol.map(|ProxyProtocol::V2| header(&flow, addr).encode());
                Ok(Sink::Direct(TcpLeg::connected(stream), first.unwrap_or_default()))
            }
            Decision::Deny => Err(Refusal::Route(format!("{target} is refused: a route denies it"))),
            // It has been sniffed already.
            Decision::NoRoute | Decision::NeedsSniff => Err(Refusal::NoRoute(target.clone())),
        }
    }

    /// The addresses of what is dialled. A name that somebody has to be asked for waits until its peer has a turn.
    async fn resolve(
        &self,
        setup: &Setup,
        dialled: &Target,
        flow: &Flow<'_>,
        deadline: tokio::time::Instant,
        allowed: Duration,
    ) -> Result<Vec<SocketAddr>, DialError> {
        if let Some(resolved) = dial::resolved(dialled) {
            return resolved;
        }
        let who = Account::of(flow.identity, flow.client);
        let asked = self.lookups.in_turn(&who, setup.shared.dialer.resolve(dialled));
        let late = |_| DialError::ResolveTimeout { name: dialled.to_string(), after: allowed };
        tokio::time::timeout_at(deadline, asked).await.map_err(late)?
    }
}

/// What is dialled, and how.
struct Way<'a> {
    dialled: &'a Target,
    addrs: Vec<SocketAddr>,
    first: FirstSpeaker,
    deadline: tokio::time::Instant,
    /// The time allowed for all of it.
    allowed: Duration,
}

/// Dials the target, or what a route dials in its place. Then the target itself is not resolved, so a name
/// has to be allowed as a name.
async fn dial(
    setup: &Setup,
    target: &Target,
    instead: Option<&Target>,
    permit: Option<Permit<'_>>,
    way: Way<'_>,
) -> Result<(Connected, SocketAddr), Refusal> {
    let Way { dialled, mut addrs, first, deadline, allowed: dial_timeout } = way;
    let refused = |e: policy::Denied| Refusal::Denied(e.to_string());
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
    let dialer = &setup.shared.dialer;
    let (stream, addr) = dialer.connect(dialled, &addrs, first, deadline, dial_timeout).await?;
    tracing::trace!(%target, %addr, "dialled");
    Ok((stream, addr))
}

/// What a target is told of a flow, where it was dialled at `addr`.
fn header<'a>(flow: &Flow<'a>, addr: SocketAddr) -> Header<'a> {
    let (destination, name) = match flow.target {
        Target::Addr(destination) => (*destination, None),
        Target::Name(name, _) => (addr, Some(name.as_str())),
    };
    Header { client: flow.client, destination, name, identity: flow.identity }
}
