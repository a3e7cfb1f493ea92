//! Who may reach what through our listeners.
//!
//! A policy allows or denies; one that denies wins over all that allow, and what no policy allows is denied. A CIDR admits literal
//! addresses and the addresses that names resolve to. A NAME admits that name, whatever it resolves to, unless a policy
//! denies the address. Neither opens a guarded range ([`GUARDED`]): for that a CIDR has to lie inside the range; nor one of our
//! own listeners: for that a policy has to state its address and its port, and nothing else. Policies in report mode are
//! asked apart ([`Policies::would_differ`]), and decide nothing.
//!
//! # Invariants
//! - A target that no policy allows, or one denies, is refused before its name is resolved, and for each address that it
//!   resolves to.
//! - A broad policy never opens link-local addresses, metadata services or our own listeners.
//! - The decision is that of the policies one after the other, as [`explain`] asks them (a test holds it to that).

mod denied;
pub mod explain;
mod rules;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use http::HeaderMap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use self::denied::Denied;
use self::rules::{Asker, RuleSet, is_exactly};
use crate::{
    config::{Policy, PolicyAction, PolicyMode},
    kernel::own::OwnListeners,
    model::flow::{ClientAddr, Identity, Target},
    routing::index::{Node, PeerSet, RuleId, Takers, TargetIndex},
};

/// Ranges that only a rule inside them opens.
pub const GUARDED: [IpNet; 7] = [
    // The gateway's own services, which trust whoever is on the same host.
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
    // Link-local; clouds serve credentials to whoever asks 169.254.169.254.
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10)),
    // The same credentials over IPv6 (AWS).
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128)),
    // "This host" (RFC 1122 section 3.2.1.3): Linux connects it to loopback.
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128)),
];

/// The policies of a configuration, and the listeners that they protect.
#[derive(Clone, Debug)]
pub struct Policies {
    /// All of them, in the order of the configuration.
    all: Vec<Policy>,
    names: Vec<Arc<str>>,
    /// By [`Kind`].
    sets: [RuleSet; Kind::ALL.len()],
    own: OwnListeners,
}

/// What a policy does, and whether it does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Allow,
    Deny,
    ReportAllow,
    ReportDeny,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Allow, Self::Deny, Self::ReportAllow, Self::ReportDeny];

    fn of(policy: &Policy) -> Self {
        match (policy.mode, policy.action) {
            (PolicyMode::Enforce, PolicyAction::Allow) => Self::Allow,
            (PolicyMode::Enforce, PolicyAction::Deny) => Self::Deny,
            (PolicyMode::Report, PolicyAction::Allow) => Self::ReportAllow,
            (PolicyMode::Report, PolicyAction::Deny) => Self::ReportDeny,
        }
    }
}

/// A peer, and which policies speak of it: found out once for a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    identity: Option<Identity>,
    client: ClientAddr,
    /// By [`Kind`].
    sets: [PeerSet; Kind::ALL.len()],
}

impl Peer {
    /// Who it has proved to be.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Its address.
    pub fn client(&self) -> ClientAddr {
        self.client
    }

    fn name(&self) -> String {
        self.identity.as_ref().map_or_else(|| "a peer without identity".to_owned(), ToString::to_string)
    }
}

/// A peer's request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Who asks.
    pub who: &'a Peer,
    /// What for.
    pub target: &'a Target,
    /// With which headers.
    pub headers: Option<&'a HeaderMap>,
}

impl Policies {
    /// The policies of the configuration, and the addresses that our listeners are bound to (with the ports that they got,
    /// where the configuration says 0).
    pub fn new(policies: Vec<Policy>, listeners: &[SocketAddr]) -> Self {
        let sets = Kind::ALL.map(|kind| {
            let of_kind = policies.iter().enumerate().filter(|(_, policy)| Kind::of(policy) == kind);
            RuleSet::new(&of_kind.collect::<Vec<_>>())
        });
        let names = policies.iter().map(|policy| Arc::from(policy.name.as_str())).collect();
        Self { sets, names, all: policies, own: OwnListeners::new(listeners) }
    }

    /// The names of all of them, in the order of the configuration.
    pub fn names(&self) -> &[Arc<str>] {
        &self.names
    }

    /// Whether one of them asks for headers of the request.
    pub fn needs_headers(&self) -> bool {
        self.sets.iter().any(RuleSet::needs_headers)
    }

    /// What the policies know of a peer.
    pub fn peer(&self, identity: Option<Identity>, client: ClientAddr) -> Peer {
        Peer { sets: self.sets.each_ref().map(|set| set.peer(identity.as_ref())), client, identity }
    }

    /// Whether this peer may ask for this target. A yes is a [`Permit`], which every address has to pass
    /// before it is dialled, also the address of a literal target. A name that only its addresses can
    /// admit gets a permit too.
    pub fn check_target<'a>(&'a self, request: Request<'a>) -> Result<Permit<'a>, Denied> {
        let permit = |rule| Permit { policies: self, request, rule };
        let target = request.target;
        let port = match target {
            Target::Addr(addr) => return permit(None).allows_addr(*addr).map(|rule| permit(Some(rule))),
            Target::Name(_, port) => port,
        };
        if let Some(rule) = self.first(Kind::Deny, request, |set| set.takers(target)) {
            return Err(self.denied_by(rule, request, None));
        }
        if let Some(rule) = self.first(Kind::Allow, request, |set| set.takers(target)) {
            return Ok(permit(Some(rule)));
        }
        // Resolving is for those only whom some address could admit.
        let some = self.set(Kind::Allow).takes_some_address(request.asker(Kind::Allow), *port);
        if some { Ok(permit(None)) } else { Err(no_rule(request)) }
    }

    /// Whether an address may be dialled in the place of what a peer asked for, because a route of the
    /// operator's says so. Its word is trusted, but that a name in it leads to a guarded range or back to
    /// ourselves was hardly meant: for that the route has to name the address.
    pub fn allows_rewrite(&self, to: &Target, addr: SocketAddr) -> Result<(), Denied> {
        let addr = SocketAddr::new(reached_by(addr.ip()), addr.port());
        if let Target::Addr(_) = to {
            return Ok(());
        }
        if self.own.contains(addr) {
            return Err(Denied::OwnListener(addr));
        }
        guarding(addr).map_or(Ok(()), |range| Err(Denied::Guarded { addr, range }))
    }

    /// Whether there are policies in report mode.
    pub fn reports(&self) -> bool {
        [Kind::ReportAllow, Kind::ReportDeny].into_iter().any(|kind| !self.set(kind).is_empty())
    }

    /// The first policy in report mode that would have decided otherwise: one that denies what is `allowed`, or allows what is
    /// not. With `addr`: about this address, which the target is or to which it resolved.
    pub fn would_differ(
        &self,
        request: Request<'_>,
        addr: Option<SocketAddr>,
        allowed: bool,
    ) -> Option<RuleId> {
        let kind = if allowed { Kind::ReportDeny } else { Kind::ReportAllow };
        if self.set(kind).is_empty() {
            return None;
        }
        match addr {
            Some(addr) => self.first_for_addr(kind, request, addr),
            None => self.first(kind, request, |set| set.takers(request.target)),
        }
    }

    fn set(&self, kind: Kind) -> &RuleSet {
        &self.sets[kind as usize]
    }

    fn first<'a>(
        &'a self,
        kind: Kind,
        request: Request<'_>,
        takers: impl Fn(&'a TargetIndex) -> Takers<'a>,
    ) -> Option<RuleId> {
        let set = self.set(kind);
        set.first(request.asker(kind), takers(set.targets()))
    }

    /// The first that takes an address as it is reached; one that denies, also as it is written.
    fn first_for_addr(&self, kind: Kind, request: Request<'_>, addr: SocketAddr) -> Option<RuleId> {
        let reached = SocketAddr::new(reached_by(addr.ip()), addr.port());
        let first = self.first(kind, request, |set| set.takers_of_addr(reached));
        let denies = matches!(kind, Kind::Deny | Kind::ReportDeny);
        if !denies || reached.ip() == addr.ip().to_canonical() {
            return first;
        }
        first.into_iter().chain(self.first(kind, request, |set| set.takers_of_addr(addr))).min()
    }

    fn denied_by(&self, rule: RuleId, request: Request<'_>, addr: Option<SocketAddr>) -> Denied {
        let name = self.names.get(rule).cloned().unwrap_or_else(|| Arc::from(""));
        let (who, target) = (request.who.name(), request.target.clone());
        Denied::Rule { rule: name, place: rule, who, target, addr }
    }
}

impl<'a> Request<'a> {
    fn asker(&self, kind: Kind) -> Asker<'a> {
        Asker { peer: &self.who.sets[kind as usize], client: self.who.client, headers: self.headers }
    }
}

/// Leave to dial the addresses of one target.
#[derive(Clone, Copy, Debug)]
pub struct Permit<'a> {
    policies: &'a Policies,
    request: Request<'a>,
    /// The policy that allows the target as it is written: the address, or the name.
    rule: Option<RuleId>,
}

impl<'a> Permit<'a> {
    /// What it is for.
    pub fn request(&self) -> Request<'a> {
        self.request
    }

    /// The policy that allows the target as it is written; none for a name that only its addresses could admit.
    pub fn rule(&self) -> Option<RuleId> {
        self.rule
    }

    /// Whether the target may be passed on to a next hop, which resolves a name itself: a name that only
    /// its addresses could admit may not. The policy that allows it.
    pub fn allows_unresolved(&self) -> Result<RuleId, Denied> {
        self.rule.ok_or_else(|| no_rule(self.request))
    }

    /// Whether another target, which the peer has named since, may be passed on to a next hop too.
    pub fn allows_too(&self, target: &Target) -> Result<RuleId, Denied> {
        self.policies.check_target(Request { target, ..self.request })?.allows_unresolved()
    }

    /// Whether `addr`, to which the target resolved or which it is, may be dialled. The policy that allows it.
    pub fn allows_addr(&self, addr: SocketAddr) -> Result<RuleId, Denied> {
        let Self { policies, request, rule } = *self;
        let name = matches!(request.target, Target::Name(..));
        let by_name = rule.filter(|_| name);
        if let Some(rule) = policies.first_for_addr(Kind::Deny, request, addr) {
            return Err(policies.denied_by(rule, request, name.then_some(addr)));
        }
        let addr = SocketAddr::new(reached_by(addr.ip()), addr.port());
        let (set, asker) = (policies.set(Kind::Allow), request.asker(Kind::Allow));
        let takers = set.targets().takers_of_addr(addr);
        let guarded = || {
            // An exact rule is inside every range that it could concern.
            let inside = |range: &IpNet| {
                let is_inside = |node: &Node| node.net().is_some_and(|net| range.contains(&net));
                set.first_where(asker, takers, is_inside, |_| true).is_some()
            };
            guarding(addr).filter(|range| !inside(range)).map(|range| Denied::Guarded { addr, range })
        };
        let Some(rule) = by_name.or_else(|| set.first(asker, takers)) else {
            return Err(guarded().unwrap_or_else(|| {
                if name {
                    Denied::Resolved { who: request.who.name(), target: request.target.clone(), addr }
                } else {
                    no_rule(request)
                }
            }));
        };
        // Last: this asks the kernel, and who may not come here anyway shall not have it asked.
        let exactly = || {
            let host = |node: &Node| node.net() == Some(IpNet::from(addr.ip()));
            set.first_where(asker, takers, host, |entry| is_exactly(entry, addr)).is_some()
        };
        if !exactly() && policies.own.contains(addr) {
            return Err(Denied::OwnListener(addr));
        }
        guarded().map_or(Ok(rule), Err)
    }
}

fn guarding(addr: SocketAddr) -> Option<IpNet> {
    GUARDED.into_iter().find(|g| g.contains(&addr.ip()))
}

fn no_rule(request: Request<'_>) -> Denied {
    Denied::NoRule { who: request.who.name(), target: request.target.clone() }
}

/// The well-known NAT64 prefix, 64:ff9b::/96 (RFC 6052 section 2.1).
const NAT64: [u16; 6] = [0x64, 0xff9b, 0, 0, 0, 0];

/// The address that a connection to `ip` reaches: the IPv4 address behind a v4-mapped or a NAT64 one.
fn reached_by(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) if v6.segments()[..6] == NAT64 => {
            let [.., a, b, c, d] = v6.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        other => other.to_canonical(),
    }
}

#[cfg(test)]
mod tests;
