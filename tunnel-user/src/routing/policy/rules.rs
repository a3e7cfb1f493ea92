//! The policies of one kind (those that allow, those that deny), looked up by target, peer and client.
//!
//! # Invariants
//! - The answer is the first policy of the kind, in the order of the configuration, of which every condition holds.
//! - The ports of policies for the same targets, peers, clients and values of headers are compared one policy after the other, and
//!   so are conditions on headers that state no whole value.

use std::net::SocketAddr;

use http::HeaderMap;

use crate::{
    config::{HeaderMatch, Peers, Policy, Ports, TargetPattern},
    model::flow::{ClientAddr, Identity},
    routing::index::{Entry, HeaderIndex, HeaderSet, Node, PeerIndex, PeerSet, RuleId, Takers, TargetIndex},
};

/// Who asks, as one kind of policies knows it, and with which headers.
#[derive(Clone, Copy)]
pub(super) struct Asker<'a> {
    pub(super) peer: &'a PeerSet,
    pub(super) client: ClientAddr,
    pub(super) headers: Option<&'a HeaderMap>,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct RuleSet {
    /// Place of each among all policies.
    places: Vec<RuleId>,
    /// What they ask of the headers; none where no policy asks for any.
    headers: Option<Headers>,
    targets: TargetIndex,
    peers: PeerIndex,
    /// By client; none where no policy asks for it.
    clients: Option<TargetIndex>,
    /// The ports of those that have patterns for addresses.
    resolvable: Node,
    /// For each list of rules in `peers`: the same ports together.
    resolvable_by_peer: Vec<Option<Ports>>,
}

/// What policies ask of the headers.
#[derive(Clone, Debug)]
struct Headers {
    conditions: Vec<Vec<HeaderMatch>>,
    index: HeaderIndex,
}

impl Headers {
    /// Of these policies; none where none of them asks for any.
    fn new(rules: &[(RuleId, &Policy)]) -> Option<Self> {
        let conditions: Vec<_> = rules.iter().map(|(_, rule)| rule.headers.clone()).collect();
        let some = conditions.iter().any(|conditions| !conditions.is_empty());
        some.then(|| Self { index: HeaderIndex::new(conditions.iter().map(Vec::as_slice)), conditions })
    }

    fn takes(&self, rule: RuleId, headers: Option<&HeaderMap>) -> bool {
        let conditions = self.conditions.get(rule);
        conditions.is_none_or(|conditions| conditions.iter().all(|wanted| wanted.matches(headers)))
    }
}

impl RuleSet {
    /// Of these policies, each with its place among all.
    pub(super) fn new(rules: &[(RuleId, &Policy)]) -> Self {
        let peers = PeerIndex::new(rules.iter().map(|(_, rule)| match &rule.identity {
            Peers::Any => None,
            Peers::Of(names) => Some(names.as_slice()),
        }));
        let ports_of = |rule: &Policy| {
            Ports::union(rule.targets().iter().filter_map(|p| match p {
                TargetPattern::Addr(a) => Some(a.ports()),
                TargetPattern::Name(_) => None,
            }))
        };
        let ports: Vec<_> = rules.iter().map(|(_, rule)| ports_of(rule)).collect();
        let entry = |(rule, ports): (RuleId, &Option<Ports>)| Some(Entry { rule, ports: ports.clone()? });
        let resolvable = Node::of(ports.iter().enumerate().filter_map(entry).collect());
        let of_list =
            |list: &Vec<RuleId>| Ports::union(list.iter().filter_map(|rule| ports.get(*rule)?.as_ref()));
        let resolvable_by_peer = peers.nodes().iter().map(of_list).collect();
        let by_client = rules.iter().any(|(_, rule)| !rule.client.is_empty());
        let clients = |(_, rule): &(RuleId, &Policy)| {
            rule.client.iter().cloned().map(TargetPattern::Addr).collect::<Vec<_>>()
        };
        Self {
            places: rules.iter().map(|(place, _)| *place).collect(),
            headers: Headers::new(rules),
            targets: TargetIndex::new(rules.iter().map(|(_, rule)| rule.targets().to_vec())),
            peers,
            clients: by_client.then(|| TargetIndex::new(rules.iter().map(clients))),
            resolvable,
            resolvable_by_peer,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether one of them asks for headers.
    pub(super) fn needs_headers(&self) -> bool {
        self.headers.is_some()
    }

    /// Which of them speak of a peer: found out once for a connection.
    pub(super) fn peer(&self, who: Option<&Identity>) -> PeerSet {
        if self.is_empty() { PeerSet::default() } else { self.peers.set(who) }
    }

    pub(super) fn targets(&self) -> &TargetIndex {
        &self.targets
    }

    /// The first that takes the target; its place among all.
    pub(super) fn first(&self, who: Asker<'_>, takers: Takers<'_>) -> Option<RuleId> {
        self.first_where(who, takers, |_| true, |_| true)
    }

    /// The first that takes the target by a pattern of which `of_node` and `of_entry` are true; its place among all.
    pub(super) fn first_where(
        &self,
        who: Asker<'_>,
        takers: Takers<'_>,
        of_node: impl Fn(&Node) -> bool,
        of_entry: impl Fn(&Entry) -> bool,
    ) -> Option<RuleId> {
        if self.is_empty() {
            return None;
        }
        let (mut first, headers) = (None, self.header_set(who));
        for node in takers.nodes().filter(|node| of_node(node)) {
            first = self.earlier(who, &headers, node, takers.port(), first, &of_entry);
        }
        first.and_then(|rule| self.places.get(rule).copied())
    }

    /// Whether one of them could take an address with this port.
    pub(super) fn takes_some_address(&self, who: Asker<'_>, port: u16) -> bool {
        let ports = |list: usize| self.resolvable_by_peer.get(list)?.as_ref();
        let some = who.peer.nodes().filter_map(ports).any(|ports| ports.contains(port));
        let conditional = self.clients.is_some() || self.needs_headers();
        let first = || self.earlier(who, &self.header_set(who), &self.resolvable, port, None, &|_| true);
        some && (!conditional || first().is_some())
    }

    /// The first of the node's rules, if it comes before `first`; else `first`.
    fn earlier(
        &self,
        who: Asker<'_>,
        headers: &HeaderSet<'_>,
        node: &Node,
        port: u16,
        first: Option<RuleId>,
        wanted: &impl Fn(&Entry) -> bool,
    ) -> Option<RuleId> {
        let clients = self.clients.as_ref().map(|index| index.takers_of_addr(who.client.0));
        let mut rest = node.entries_from(0);
        while let Some((entry, behind)) = rest.split_first() {
            if first.is_some_and(|first| first <= entry.rule) {
                break;
            }
            // From what does not hold to the next rule of which it does.
            if !self.peers.admits(who.peer, entry.rule) {
                let Some(next) = self.peers.next(who.peer, entry.rule) else { break };
                rest = node.entries_from(next);
                continue;
            }
            if let Some(clients) = &clients {
                let Some(next) = clients.next(entry.rule) else { break };
                if next != entry.rule {
                    rest = node.entries_from(next);
                    continue;
                }
            }
            if let Some(conditions) = &self.headers {
                let Some(next) = conditions.index.next(headers, entry.rule) else { break };
                if next != entry.rule {
                    rest = node.entries_from(next);
                    continue;
                }
            }
            let takes = || self.headers.as_ref().is_none_or(|h| h.takes(entry.rule, who.headers));
            if entry.ports.contains(port) && wanted(entry) && takes() {
                return Some(entry.rule);
            }
            rest = behind;
        }
        first
    }

    /// What may hold for the headers of who asks.
    fn header_set(&self, who: Asker<'_>) -> HeaderSet<'_> {
        self.headers.as_ref().map_or_else(HeaderSet::default, |headers| headers.index.set(who.headers))
    }
}

/// Whether a pattern is for this address and this port, and for nothing else.
pub(super) fn is_exactly(entry: &Entry, addr: SocketAddr) -> bool {
    entry.ports.ranges() == [(addr.port(), addr.port())]
}
