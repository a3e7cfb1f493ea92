//! Who may reach what through our listeners.
//!
//! A CIDR rule admits literal addresses and the addresses that names resolve to. A NAME rule admits that
//! name, whatever it resolves to. Neither opens a guarded range ([`GUARDED`]): for that a CIDR rule has to
//! lie inside the range; nor one of our own listeners: for that a rule has to state its address and its
//! port, and nothing else.
//!
//! # Invariants
//! - A target that no rule allows is refused, before its name is resolved and for each address that it resolves to.
//! - A broad rule never opens link-local addresses, metadata services or our own listeners.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    config::{Peers, Policy, Ports, TargetPattern},
    kernel::own::OwnListeners,
    model::flow::{Identity, Target},
    routing::index::{Entry, Node, PeerIndex, PeerSet, Takers, TargetIndex},
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

/// Why a peer may not reach a target. Each says what a peer and an operator may know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No rule speaks of this peer and target.
    #[error("no policy lets {who} reach {target}")]
    NoRule {
        /// The peer.
        who: String,
        /// What it asked for.
        target: Target,
    },
    /// The name is allowed only by the addresses it resolves to, and this is none of them.
    #[error("no policy lets {who} reach {addr}, to which {target} resolves")]
    Resolved {
        /// The peer.
        who: String,
        /// What it asked for.
        target: Target,
        /// What that resolved to.
        addr: SocketAddr,
    },
    /// Link-local, metadata, or unspecified.
    #[error("{addr} is in {range}, which only a policy for addresses inside that range opens")]
    Guarded {
        /// The address.
        addr: SocketAddr,
        /// The range.
        range: IpNet,
    },
    /// One of our own listeners.
    #[error("{0} is a listener of this gateway, which only a policy for exactly that address and port opens")]
    OwnListener(SocketAddr),
}

/// The rules of a configuration, and the listeners that they protect.
#[derive(Clone, Debug)]
pub struct Policies {
    targets: TargetIndex,
    peers: PeerIndex,
    /// For each list of rules in `peers`: the ports of their patterns for addresses.
    resolvable: Vec<Option<Ports>>,
    own: OwnListeners,
}

/// A peer, and which rules speak of it: found out once for a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    identity: Option<Identity>,
    rules: PeerSet,
}

impl Peer {
    fn name(&self) -> String {
        self.identity.as_ref().map_or_else(|| "a peer without identity".to_owned(), ToString::to_string)
    }
}

impl Policies {
    /// The rules of the configuration, and the addresses that our listeners are bound to (with the ports
    /// that they got, where the configuration says 0).
    pub fn new(rules: Vec<Policy>, listeners: &[SocketAddr]) -> Self {
        let peers = PeerIndex::new(rules.iter().map(|r| match &r.identity {
            Peers::Any => None,
            Peers::Of(names) => Some(names.as_slice()),
        }));
        let ports_of = |rule: &usize| {
            rules[*rule].target.iter().filter_map(|p| match p {
                TargetPattern::Addr(a) => Some(a.ports()),
                TargetPattern::Name(_) => None,
            })
        };
        let resolvable =
            peers.nodes().iter().map(|list| Ports::union(list.iter().flat_map(ports_of))).collect();
        let targets = TargetIndex::new(rules.iter().map(|r| r.target.iter().cloned()));
        Self { targets, peers, resolvable, own: OwnListeners::new(listeners) }
    }

    /// What the rules know of a peer.
    pub fn peer(&self, identity: Option<Identity>) -> Peer {
        Peer { rules: self.peers.set(identity.as_ref()), identity }
    }

    /// Whether this peer may ask for this target. A yes is a [`Permit`], which every address has to pass
    /// before it is dialled, also the address of a literal target. A name that only its addresses can
    /// admit gets a permit too.
    pub fn check_target<'a>(&'a self, who: &'a Peer, target: &'a Target) -> Result<Permit<'a>, Denied> {
        let permit = |by_name| Permit { policies: self, who, target, by_name };
        match target {
            Target::Addr(addr) => {
                let permit = permit(false);
                permit.allows_addr(*addr)?;
                Ok(permit)
            }
            Target::Name(..) if self.some_rule(who, self.targets.takers(target), |_, _| true) => {
                Ok(permit(true))
            }
            Target::Name(_, port) => {
                // Resolving is for those only whom some address could admit.
                let ports = |list: usize| self.resolvable.get(list)?.as_ref();
                let some = who.rules.nodes().filter_map(ports).any(|ports| ports.contains(*port));
                if some { Ok(permit(false)) } else { Err(no_rule(who, target)) }
            }
        }
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

    /// Whether some rule that speaks of the peer takes the target, by a pattern of which `wanted` is true.
    fn some_rule(&self, who: &Peer, takers: Takers<'_>, wanted: impl Fn(&Node, &Entry) -> bool) -> bool {
        takers.nodes().any(|node| {
            let mut rest = node.entries_from(0);
            while let Some((entry, behind)) = rest.split_first() {
                if !self.peers.admits(&who.rules, entry.rule) {
                    let Some(next) = self.peers.next(&who.rules, entry.rule) else { return false };
                    rest = node.entries_from(next);
                    continue;
                }
                if entry.ports.contains(takers.port()) && wanted(node, entry) {
                    return true;
                }
                rest = behind;
            }
            false
        })
    }
}

/// Leave to dial the addresses of one target.
#[derive(Clone, Copy, Debug)]
pub struct Permit<'a> {
    policies: &'a Policies,
    who: &'a Peer,
    target: &'a Target,
    by_name: bool,
}

impl Permit<'_> {
    /// Whether the target may be passed on to a next hop, which resolves a name itself: a name that only
    /// its addresses could admit may not.
    pub fn allows_unresolved(&self) -> Result<(), Denied> {
        match self.target {
            Target::Name(..) if !self.by_name => Err(no_rule(self.who, self.target)),
            _ => Ok(()),
        }
    }

    /// Whether another target, which the peer has named since, may be passed on to a next hop too.
    pub fn allows_too(&self, target: &Target) -> Result<(), Denied> {
        self.policies.check_target(self.who, target)?.allows_unresolved()
    }

    /// Whether `addr`, to which the target resolved or which it is, may be dialled.
    pub fn allows_addr(&self, addr: SocketAddr) -> Result<(), Denied> {
        let addr = SocketAddr::new(reached_by(addr.ip()), addr.port());
        let takers = self.policies.targets.takers_of_addr(addr);
        let some = |wanted: &dyn Fn(&Node, &Entry) -> bool| self.policies.some_rule(self.who, takers, wanted);
        let guarded = || {
            // An exact rule is inside every range that it could concern.
            let inside = |range: &IpNet| some(&|node, _| node.net().is_some_and(|net| range.contains(&net)));
            guarding(addr).filter(|range| !inside(range)).map(|range| Denied::Guarded { addr, range })
        };
        if !self.by_name && !some(&|_, _| true) {
            return Err(guarded().unwrap_or_else(|| match self.target {
                Target::Addr(_) => no_rule(self.who, self.target),
                Target::Name(..) => {
                    Denied::Resolved { who: self.who.name(), target: self.target.clone(), addr }
                }
            }));
        }
        // Last: this asks the kernel, and who may not come here anyway shall not have it asked.
        if !some(&|node, entry| is_exactly(node, entry, addr)) && self.policies.own.contains(addr) {
            return Err(Denied::OwnListener(addr));
        }
        guarded().map_or(Ok(()), Err)
    }
}

fn guarding(addr: SocketAddr) -> Option<IpNet> {
    GUARDED.into_iter().find(|g| g.contains(&addr.ip()))
}

fn no_rule(who: &Peer, target: &Target) -> Denied {
    Denied::NoRule { who: who.name(), target: target.clone() }
}

fn is_exactly(node: &Node, entry: &Entry, addr: SocketAddr) -> bool {
    node.net() == Some(IpNet::from(addr.ip())) && entry.ports.ranges() == [(addr.port(), addr.port())]
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
