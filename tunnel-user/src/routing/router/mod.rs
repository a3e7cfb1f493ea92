//! The router: from what is known about a flow to where it goes, and on which terms.
//!
//! What a route asks of the carried connection itself (`sni`, `http_host`, and an authority made of them) is not
//! known before its first bytes. If the first route that matches depends on them, the decision is
//! [`Decision::NeedsSniff`], and the router is asked again with [`Flow::sniffed`]. A flow that an earlier route matches is not
//! sniffed.
//!
//! # Invariants
//! - The first route that matches decides; a flow that matches no route is rejected.
//! - There is no state, and no name is resolved: chance is an argument.

use std::sync::Arc;

use crate::model::flow::SourceKind;
use crate::{
    config::{Action, Match, NamePattern, Route, TargetPattern, Terms},
    model::{
        flow::{HostName, Identity, Sniffed, Target},
        names::UpstreamName,
        san::SanPattern,
    },
    routing::{
        flow::Flow,
        index::{PeerIndex, PeerSet, TargetIndex},
    },
};

mod explain;
pub mod fixed;
#[cfg(test)]
mod tests;

pub use self::{
    explain::{Explained, Verdict},
    fixed::{Fixed, fixed},
};

/// Where a flow goes.
#[derive(Clone, Copy, Debug)]
pub enum Decision<'a> {
    /// Through an upstream.
    Upstream {
        /// By which route: the place of it in the configuration, from 0.
        route: usize,
        /// Which.
        upstream: &'a UpstreamName,
        /// All that the route names, and their weights; see [`another`].
        shares: &'a [(UpstreamName, u32)],
        /// On which terms.
        terms: &'a Terms,
    },
    /// We dial.
    Dial {
        /// By which route: the place of it in the configuration, from 0.
        route: usize,
        /// What, in place of the target.
        instead: Option<&'a Target>,
        /// On which terms.
        terms: &'a Terms,
    },
    /// It depends on what the client sends first; the router decides again with [`Flow::sniffed`].
    NeedsSniff,
    /// A route refuses it.
    Deny {
        /// Which: the place of it in the configuration, from 0.
        route: usize,
    },
    /// No route takes it; it is refused.
    NoRoute,
}

/// The routes of a configuration.
#[derive(Clone, Debug)]
pub struct Router {
    routes: Vec<Route>,
    /// Whether one of them depends on sniffed bytes: no flow is delayed otherwise.
    needs_sniff: bool,
    targets: TargetIndex,
    peers: PeerIndex,
}

impl Router {
    /// From the configuration's routes, in their order.
    pub fn new(routes: Vec<Route>) -> Self {
        let targets = TargetIndex::new(routes.iter().map(|r| {
            let addresses = r.matches.destination.iter().cloned().map(TargetPattern::Addr);
            addresses.chain(r.matches.host.iter().cloned().map(TargetPattern::Name))
        }));
        let peers = PeerIndex::new(routes.iter().map(peers_of));
        let needs_sniff = routes.iter().any(Route::needs_sniff);
        Self { routes, needs_sniff, targets, peers }
    }

    /// What the configuration calls its routes, in their order.
    pub fn names(&self) -> impl Iterator<Item = Option<&str>> {
        self.routes.iter().map(|route| route.name.as_deref())
    }

    /// Which routes speak of a peer, for [`Flow::peer`]: found out once for a connection.
    pub fn peer(&self, who: Option<&Identity>) -> PeerSet {
        self.peers.set(who)
    }

    /// What refusals call a route, by its place in the configuration: its name, or "route-N".
    pub fn name(&self, route: usize) -> Arc<str> {
        let name = self.routes.get(route).and_then(|route| route.name.as_deref());
        name.map_or_else(|| format!("route-{}", route + 1).into(), Arc::from)
    }

    /// Whether a route asks for headers of the request.
    pub fn needs_headers(&self) -> bool {
        self.routes.iter().any(|route| !route.matches.headers.is_empty())
    }

    /// Where a flow goes. `random` picks among weighted upstreams; each value of a u32 should be as likely.
    pub fn decide(&self, flow: &Flow<'_>, random: u32) -> Decision<'_> {
        let (number, route) = match self.first(flow) {
            Some(Taken::By(number, route)) => (number, route),
            Some(Taken::Undetermined) => return Decision::NeedsSniff,
            None => return Decision::NoRoute,
        };
        let terms = &route.terms;
        match &route.to {
            Action::Deny => Decision::Deny { route: number },
            Action::Direct => Decision::Dial { route: number, instead: None, terms },
            Action::Dial(target) => Decision::Dial { route: number, instead: Some(target), terms },
            Action::Upstreams(shares) => pick(shares, random, &[]).map_or(Decision::NoRoute, |upstream| {
                Decision::Upstream { route: number, upstream, shares, terms }
            }),
        }
    }

    fn first(&self, flow: &Flow<'_>) -> Option<Taken<'_>> {
        let takers = self.targets.takers(flow.target);
        let mut from = 0;
        loop {
            let rule = takers.next(from)?;
            if !self.peers.admits(flow.peer, rule) {
                from = self.peers.next(flow.peer, rule)?;
                continue;
            }
            let route = self.routes.get(rule)?;
            if takes(&route.matches, flow) {
                if !self.needs_sniff || !route.needs_sniff() {
                    return Some(Taken::By(rule, route));
                }
                match flow.sniffed {
                    None => return Some(Taken::Undetermined),
                    Some(sniffed) if matches_sniffed(&route.matches, sniffed) => {
                        return Some(Taken::By(rule, route));
                    }
                    Some(_) => {}
                }
            }
            from = rule + 1;
        }
    }
}

/// The first route that takes a flow, as far as is known.
enum Taken<'a> {
    /// With its place in the configuration.
    By(usize, &'a Route),
    /// Nobody has looked at what it asks for.
    Undetermined,
}

fn peers_of(route: &Route) -> Option<&[SanPattern]> {
    Some(route.matches.identity.as_slice()).filter(|names| !names.is_empty())
}

/// Whether the conditions hold that no index answers.
fn takes(wanted: &Match, flow: &Flow<'_>) -> bool {
    let named = || {
        let names = match flow.source {
            SourceKind::Capture => &wanted.capture,
            SourceKind::Listener => &wanted.listener,
        };
        flow.name.is_some_and(|name| names.iter().any(|n| n == name))
    };
    let asked_for = |name: &str| wanted.server_name.iter().any(|p| p.contains(name, 0));
    let headers = flow.request.map(|r| r.headers);
    (wanted.source.is_empty() || wanted.source.contains(&flow.source))
        && ((wanted.listener.is_empty() && wanted.capture.is_empty()) || named())
        && (wanted.server_name.is_empty() || flow.server_name.is_some_and(asked_for))
        && wanted.headers.iter().all(|h| h.matches(headers))
}

/// Whether the conditions hold that are about the carried connection.
fn matches_sniffed(wanted: &Match, sniffed: &Sniffed) -> bool {
    let is = |names: &[NamePattern], found: Option<&HostName>| {
        found.is_some_and(|found| names.iter().any(|name| name.contains(found.as_str(), 0)))
    };
    !wanted.needs_sniff() || is(&wanted.sni, sniffed.sni()) || is(&wanted.http_host, sniffed.host())
}

/// One more upstream of a route, in the place of those that were tried; none when all were.
pub fn another<'a>(
    shares: &'a [(UpstreamName, u32)],
    tried: &[&UpstreamName],
    random: u32,
) -> Option<&'a UpstreamName> {
    pick(shares, random, tried)
}

/// The upstream into whose share `random` falls, without those that were tried. `None` only when all were, or all
/// weights are 0, which the configuration does not admit.
fn pick<'a>(
    shares: &'a [(UpstreamName, u32)],
    random: u32,
    tried: &[&UpstreamName],
) -> Option<&'a UpstreamName> {
    let left = || shares.iter().filter(|(upstream, _)| !tried.contains(&upstream));
    let sum: u64 = left().map(|(_, weight)| u64::from(*weight)).sum();
    // Scaled rather than reduced modulo the sum: no share gains by the remainder.
    let mut point = (u64::from(random) * sum) >> u32::BITS;
    for (upstream, weight) in left() {
        match point.checked_sub(u64::from(*weight)) {
            None => return Some(upstream),
            Some(left) => point = left,
        }
    }
    None
}
