//! Targets: from an address or a name to the patterns that contain it, the most specific first.
//!
//! # Invariants
//! - A chain has one node for every prefix, or name, that contains the target and that some rule speaks of. It is as long as
//!   patterns nest (33 for IPv4, 129 for IPv6, the labels of a name), and finding it takes one look-up for each length of
//!   prefix that occurs.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use super::RuleId;
use crate::{
    config::{AddrPattern, NamePattern, Ports, TargetPattern},
    model::flow::Target,
};

/// A node, by its place among the nodes.
type NodeId = usize;
/// The node of the rules that take every target.
const EVERY: NodeId = 0;

/// What one rule says of one prefix or name.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Which rule.
    pub rule: RuleId,
    /// The ports that it takes there.
    pub ports: Ports,
}

/// What all rules say of one prefix or name.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// The prefix; a name has none.
    net: Option<IpNet>,
    /// In the order of the rules; a rule may be there several times.
    entries: Vec<Entry>,
    /// The next prefix or name that contains this one.
    wider: Option<NodeId>,
}

impl Node {
    /// One of no prefix. `entries` are in the order of the rules.
    pub fn of(entries: Vec<Entry>) -> Self {
        Self { entries, ..Self::default() }
    }

    /// The prefix; a name has none.
    pub fn net(&self) -> Option<IpNet> {
        self.net
    }

    /// What the rules from `from` on say, in their order.
    pub fn entries_from(&self, from: RuleId) -> &[Entry] {
        let first = if from == 0 { 0 } else { self.entries.partition_point(|e| e.rule < from) };
        self.entries.get(first..).unwrap_or_default()
    }
}

/// The nodes of one address family by prefix.
#[derive(Clone, Debug, Default)]
struct Prefixes<K> {
    /// By length, the longest first.
    by_length: Vec<(u8, HashMap<K, NodeId>)>,
}

impl<K: Eq + Hash + Copy> Prefixes<K> {
    /// The longest prefix with at most `most` bits; `masked` clears what lies behind so many bits.
    fn longest(&self, most: u8, masked: impl Fn(u8) -> K) -> Option<NodeId> {
        let mut looks = self.by_length.iter().filter(|(length, _)| *length <= most);
        looks.find_map(|(length, nodes)| nodes.get(&masked(*length))).copied()
    }

    fn length(&mut self, length: u8) -> &mut HashMap<K, NodeId> {
        let at = match self.by_length.binary_search_by(|(l, _)| length.cmp(l)) {
            Ok(at) => at,
            Err(at) => {
                self.by_length.insert(at, (length, HashMap::new()));
                at
            }
        };
        &mut self.by_length[at].1
    }
}

/// The patterns of all rules.
#[derive(Clone, Debug)]
pub struct TargetIndex {
    nodes: Vec<Node>,
    v4: Prefixes<u32>,
    v6: Prefixes<u128>,
    /// By name.
    exact: HashMap<String, NodeId>,
    /// By the name below which all names are taken.
    below: HashMap<String, NodeId>,
}

impl TargetIndex {
    /// From the patterns of each rule, in the order of the rules; none: the rule takes every target.
    pub fn new(rules: impl IntoIterator<Item = impl IntoIterator<Item = TargetPattern>>) -> Self {
        let mut index = Self {
            nodes: vec![Node::default()],
            v4: Prefixes::default(),
            v6: Prefixes::default(),
            exact: HashMap::new(),
            below: HashMap::new(),
        };
        for (rule, patterns) in rules.into_iter().enumerate() {
            let mut every = true;
            for pattern in patterns {
                every = false;
                match pattern {
                    TargetPattern::Addr(pattern) => index.add_addr(rule, &pattern),
                    TargetPattern::Name(pattern) => index.add_name(rule, &pattern),
                }
            }
            if every {
                index.nodes[EVERY].entries.push(Entry { rule, ports: Ports::default() });
            }
        }
        index.link();
        index
    }

    fn add_addr(&mut self, rule: RuleId, pattern: &AddrPattern) {
        let (next, net) = (self.nodes.len(), pattern.net());
        let length = net.prefix_len();
        let node = match net {
            IpNet::V4(v4) => *self.v4.length(length).entry(v4.network().to_bits()).or_insert(next),
            IpNet::V6(v6) => *self.v6.length(length).entry(v6.network().to_bits()).or_insert(next),
        };
        self.push(node, Some(net), Entry { rule, ports: pattern.ports().clone() });
    }

    fn add_name(&mut self, rule: RuleId, pattern: &NamePattern) {
        let next = self.nodes.len();
        let names = if pattern.is_below() { &mut self.below } else { &mut self.exact };
        let node = *names.entry(pattern.name().to_owned()).or_insert(next);
        self.push(node, None, Entry { rule, ports: pattern.ports().clone() });
    }

    fn push(&mut self, node: NodeId, net: Option<IpNet>, entry: Entry) {
        if node == self.nodes.len() {
            self.nodes.push(Node { net, ..Node::default() });
        }
        self.nodes[node].entries.push(entry);
    }

    /// Leads from every node to the next that contains it.
    fn link(&mut self) {
        let mut wider: Vec<(NodeId, NodeId)> = Vec::new();
        for (id, node) in self.nodes.iter().enumerate() {
            if let Some(net) = node.net {
                let shorter = net.prefix_len().checked_sub(1);
                wider.push((id, shorter.and_then(|most| self.prefix(net.addr(), most)).unwrap_or(EVERY)));
            }
        }
        for (name, id) in self.exact.iter().chain(&self.below) {
            wider.push((*id, self.above(name).unwrap_or(EVERY)));
        }
        for (id, next) in wider {
            self.nodes[id].wider = Some(next);
        }
    }

    /// The longest prefix of at most `most` bits that contains `ip`.
    fn prefix(&self, ip: IpAddr, most: u8) -> Option<NodeId> {
        match ip {
            IpAddr::V4(ip) => self.v4.longest(most, |length| {
                ip.to_bits() & u32::MAX.checked_shl(u32::BITS - u32::from(length)).unwrap_or(0)
            }),
            IpAddr::V6(ip) => self.v6.longest(most, |length| {
                ip.to_bits() & u128::MAX.checked_shl(u128::BITS - u32::from(length)).unwrap_or(0)
            }),
        }
    }

    /// The longest name that `name` is below of.
    fn above(&self, name: &str) -> Option<NodeId> {
        // As with the patterns themselves, a label that is empty is none.
        let mut parents = name.match_indices('.').filter(|(at, _)| *at > 0).map(|(at, _)| &name[at + 1..]);
        parents.find_map(|parent| self.below.get(parent)).copied()
    }

    /// The rules that take `target`. Its name is lower case and without the trailing dot, as every
    /// [`Target`]'s that was parsed.
    pub fn takers(&self, target: &Target) -> Takers<'_> {
        match target {
            Target::Addr(addr) => self.takers_of_addr(*addr),
            Target::Name(name, port) => {
                let node = self.exact.get(name.as_str()).copied().or_else(|| self.above(name));
                Takers { index: self, first: node.unwrap_or(EVERY), port: *port }
            }
        }
    }

    /// The rules that take `addr`. A v4-mapped address is the IPv4 address it maps.
    pub fn takers_of_addr(&self, addr: SocketAddr) -> Takers<'_> {
        let node = self.prefix(addr.ip().to_canonical(), u8::MAX);
        Takers { index: self, first: node.unwrap_or(EVERY), port: addr.port() }
    }
}

/// The rules that take one target.
#[derive(Clone, Copy, Debug)]
pub struct Takers<'a> {
    index: &'a TargetIndex,
    first: NodeId,
    port: u16,
}

impl<'a> Takers<'a> {
    /// The first of them from `from` on.
    pub fn next(&self, from: RuleId) -> Option<RuleId> {
        let first = |node: &Node| {
            node.entries_from(from).iter().find(|e| e.ports.contains(self.port)).map(|e| e.rule)
        };
        self.nodes().filter_map(first).min()
    }

    /// What contains the target, the most specific first; whether a rule takes its port is not asked.
    pub fn nodes(&self) -> impl Iterator<Item = &'a Node> + use<'a> {
        let nodes = &self.index.nodes;
        let first = nodes.get(self.first);
        std::iter::successors(first, |node| node.wider.and_then(|wider| nodes.get(wider)))
    }

    /// The port of the target.
    pub fn port(&self) -> u16 {
        self.port
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Patterns that nest, and ports that overlap.
    fn pattern() -> impl Strategy<Value = TargetPattern> {
        let ports = prop_oneof![Just(""), Just(":80"), Just(":80-82,90"), Just(":1-79")];
        let net = prop_oneof![
            (0u8..4, 0u8..=3).prop_map(|(top, length)| {
                format!("{}.0.0.0/{length}", u32::from(top) << 6 & (0xff00 >> length) & 0xff)
            }),
            (0u16..4, 0u8..=3)
                .prop_map(|(top, length)| format!("[{:x}::/{length}]", top << 14 & !(0xffff >> length))),
            "(\\*\\.)?([ab]\\.){0,2}[ab]",
        ];
        (net, ports).prop_map(|(net, ports)| format!("{net}{ports}").parse().expect("a pattern"))
    }

    fn target() -> impl Strategy<Value = Target> {
        let host = prop_oneof![
            any::<u8>().prop_map(|top| format!("{top}.0.0.1")),
            any::<u8>().prop_map(|top| format!("[::ffff:{top}.0.0.1]")),
            any::<u16>().prop_map(|top| format!("[{top:x}::1]")),
            "([ab]\\.){0,3}[ab]",
        ];
        (host, 78u16..92).prop_map(|(host, port)| format!("{host}:{port}").parse().expect("a target"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        /// Of any rules the index finds those, and no others, of which a pattern takes the target.
        #[test]
        fn the_index_finds_what_the_patterns_take(
            rules in prop::collection::vec(prop::collection::vec(pattern(), 0..4), 0..6), target in target(),
        ) {
            let index = TargetIndex::new(rules.iter().map(|patterns| patterns.iter().cloned()));
            // The definition.
            let takes = |patterns: &Vec<TargetPattern>| {
                patterns.is_empty() || patterns.iter().any(|p| p.contains(&target))
            };
            let wanted: Vec<_> = (0..rules.len()).filter(|rule| takes(&rules[*rule])).collect();
            let takers = index.takers(&target);
            let found: Vec<_> = std::iter::successors(takers.next(0), |last| takers.next(last + 1)).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
