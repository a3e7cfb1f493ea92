//! Peers: from a name that a peer has proved to the rules that speak of it.
//!
//! # Invariants
//! - A name is taken apart once, for a whole connection, and looked up once for every shape of pattern that occurs (where its
//!   `*` stand), however many patterns there are.

use std::{collections::HashMap, net::IpAddr};

use super::RuleId;
use crate::model::{
    flow::Identity,
    san::{San, SanPattern},
};

/// The rules that one pattern, or the absence of any, stands in.
type NodeId = usize;
/// The node of the rules for every peer.
const EVERYBODY: NodeId = 0;

/// The lists of rules that speak of one peer, besides those for everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerSet(Vec<NodeId>);

/// Whoever has proved nothing.
pub static NOBODY: PeerSet = PeerSet(Vec::new());

impl PeerSet {
    /// The lists, those for everybody included.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        std::iter::once(EVERYBODY).chain(self.0.iter().copied())
    }
}

/// URIs whose `*` stand for the same segments, by their text.
#[derive(Clone, Debug)]
struct Shape {
    wildcards: Wildcards,
    by_text: HashMap<String, NodeId>,
}

/// Where the wildcards of a pattern stand among the segments behind the authority.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wildcards {
    /// Places of `*`.
    stars: Vec<usize>,
    /// How many segments stand in front of a final `**`.
    tree: Option<usize>,
}

/// The names of all rules.
#[derive(Clone, Debug)]
pub struct PeerIndex {
    /// The rules of each, in their order.
    nodes: Vec<Vec<RuleId>>,
    /// Whether a rule is for everybody.
    open: Vec<bool>,
    uris: Vec<Shape>,
    /// By pattern: a name, or `*.` and a name.
    dns: HashMap<String, NodeId>,
    ips: HashMap<IpAddr, NodeId>,
}

impl PeerIndex {
    /// From the patterns of each rule, in the order of the rules; `None`: the rule is for everybody.
    pub fn new<'a>(rules: impl IntoIterator<Item = Option<&'a [SanPattern]>>) -> Self {
        let mut index = Self {
            nodes: vec![Vec::new()],
            open: Vec::new(),
            uris: Vec::new(),
            dns: HashMap::new(),
            ips: HashMap::new(),
        };
        for (rule, patterns) in rules.into_iter().enumerate() {
            index.open.push(patterns.is_none());
            if patterns.is_none() {
                index.nodes[EVERYBODY].push(rule);
            }
            for pattern in patterns.into_iter().flatten() {
                let Some(node) = index.node(pattern) else { continue };
                if node == index.nodes.len() {
                    index.nodes.push(Vec::new());
                }
                if index.nodes[node].last() != Some(&rule) {
                    index.nodes[node].push(rule);
                }
            }
        }
        index
    }

    /// The node of a pattern, which may be the next new one. A URI that is none has no node: it takes nobody.
    fn node(&mut self, pattern: &SanPattern) -> Option<NodeId> {
        let next = self.nodes.len();
        Some(match pattern {
            SanPattern::Dns(name) => *self.dns.entry(name.clone()).or_insert(next),
            SanPattern::Ip(ip) => *self.ips.entry(*ip).or_insert(next),
            SanPattern::Uri(uri) => {
                let (_, rest) = uri.split_once("://")?;
                let segments = || rest.split('/').skip(1).enumerate();
                let stars: Vec<_> = segments().filter(|(_, s)| *s == "*").map(|(i, _)| i).collect();
                let tree = segments().last().filter(|(_, s)| *s == "**").map(|(i, _)| i);
                let wildcards = Wildcards { stars, tree };
                let text = masked(uri, &wildcards)?;
                let at = self.uris.iter().position(|s| s.wildcards == wildcards).unwrap_or_else(|| {
                    self.uris.push(Shape { wildcards, by_text: HashMap::new() });
                    self.uris.len() - 1
                });
                *self.uris[at].by_text.entry(text).or_insert(next)
            }
        })
    }

    /// The rules that speak of this peer. A peer without an identity is one of "everybody" only.
    pub fn set(&self, who: Option<&Identity>) -> PeerSet {
        let Some(who) = who else { return PeerSet::default() };
        let mut found: Vec<NodeId> = match San::from(who) {
            // Query and fragment are no part of an identity.
            San::Uri(uri) if uri.contains(['?', '#']) => Vec::new(),
            San::Uri(uri) => {
                let look = |s: &Shape| s.by_text.get(&masked(&uri, &s.wildcards)?).copied();
                self.uris.iter().filter_map(look).collect()
            }
            San::Dns(name) => {
                let rest = name.split_once('.').filter(|(label, _)| !label.is_empty());
                let below = rest.and_then(|(_, rest)| self.dns.get(&format!("*.{rest}")));
                self.dns.get(&name).into_iter().chain(below).copied().collect()
            }
            San::Ip(ip) => self.ips.get(&ip).into_iter().copied().collect(),
        };
        found.sort_unstable();
        found.dedup();
        PeerSet(found)
    }

    /// Whether `rule` speaks of the peer.
    pub fn admits(&self, set: &PeerSet, rule: RuleId) -> bool {
        self.open.get(rule).is_some_and(|open| *open)
            || set.0.iter().any(|node| self.nodes[*node].binary_search(&rule).is_ok())
    }

    /// The first rule from `from` on that speaks of the peer.
    pub fn next(&self, set: &PeerSet, from: RuleId) -> Option<RuleId> {
        let first = |node: NodeId| {
            let rules = self.nodes.get(node)?;
            rules.get(rules.partition_point(|rule| *rule < from)).copied()
        };
        set.nodes().filter_map(first).min()
    }

    /// The rules of every node.
    pub(crate) fn nodes(&self) -> &[Vec<RuleId>] {
        &self.nodes
    }
}

/// The URI with wildcards in these places, and what compares without regard to case in lower case. None for what no pattern
/// with these wildcards takes.
fn masked(uri: &str, Wildcards { stars, tree }: &Wildcards) -> Option<String> {
    let (scheme, rest) = uri.split_once("://")?;
    let mut parts = rest.split('/');
    let mut text = scheme.to_ascii_lowercase();
    text.push_str("://");
    text.push_str(&parts.next()?.to_ascii_lowercase());
    let mut stars = stars.iter().copied().peekable();
    for (depth, segment) in parts.enumerate() {
        if *tree == Some(depth) {
            text.push_str("/**");
            return (!segment.is_empty()).then_some(text);
        }
        text.push('/');
        if stars.next_if_eq(&depth).is_none() {
            text.push_str(segment);
        } else if segment.is_empty() {
            return None;
        } else {
            text.push('*');
        }
    }
    (stars.peek().is_none() && tree.is_none()).then_some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern() -> impl Strategy<Value = SanPattern> {
        let text = prop_oneof![
            "(s|S|t)://(a|A|b)(/(x|X|y|\\*)){0,3}(/\\*\\*)?",
            "(\\*\\.)?([abA]\\.){0,2}[ab]",
            "10\\.0\\.0\\.[1-3]",
        ];
        text.prop_map(|text| text.parse().expect("a pattern"))
    }

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![
            "(s|S|t)://(a|A|b)(/(x|X|y|\\*)?){0,3}(\\?z)?",
            "(\\*\\.|\\.)?([abA]\\.){0,3}[abB]",
            "10\\.0\\.0\\.[1-3]",
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        /// Of any rules the index finds those, and no others, of which a pattern takes the peer.
        #[test]
        fn the_index_finds_what_the_patterns_take(
            rules in prop::collection::vec(
                prop::option::of(prop::collection::vec(pattern(), 0..4)), 0..6,
            ),
            name in prop::option::of(name()),
        ) {
            let index = PeerIndex::new(rules.iter().map(Option::as_deref));
            let who = name.map(|n| Identity(n.into()));
            let set = index.set(who.as_ref());
            // The definition.
            let takes = |patterns: &[SanPattern]| {
                who.as_ref().is_some_and(|who| patterns.iter().any(|p| p.matches(&San::from(who))))
            };
            let wanted: Vec<_> =
                (0..rules.len()).filter(|rule| rules[*rule].as_deref().is_none_or(takes)).collect();
            let next = |from| index.next(&set, from);
            let found: Vec<_> = std::iter::successors(next(0), |last| next(last + 1)).collect();
            prop_assert_eq!(&found, &wanted);
            let admitted: Vec<_> = (0..rules.len()).filter(|rule| index.admits(&set, *rule)).collect();
            prop_assert_eq!(&admitted, &wanted);
        }
    }
}
