//! From include and exclude patterns to what the kernel looks up.
//!
//! Enters: prefixes with port ranges. Leaves: one [`Rule`] per distinct prefix, with everything that its
//! less specific prefixes say folded in. Invariant: the longest prefix that matches an address decides by
//! itself, so the kernel does one lookup however many rules there are. It never talks to the kernel.
//!
//! Which pattern wins: the longest prefix that speaks about the port; on the same prefix, exclude.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tunnel_common::{
    capture::{PORT_RANGES, PortRange, Rule},
    names::RULES_MAX,
};

/// Ports as inclusive ranges; empty means all.
pub type Ports = Vec<(u16, u16)>;

/// One include or exclude pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// The prefix. A v4-mapped one means IPv4.
    pub net: IpNet,
    /// The ports.
    pub ports: Ports,
}

/// Rules for both tries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// IPv4, v4-mapped destinations included.
    pub v4: Vec<(Ipv4Net, Rule)>,
    /// IPv6.
    pub v6: Vec<(Ipv6Net, Rule)>,
}

/// Why patterns do not fit the kernel's tables.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RulesError {
    /// More ranges than a rule holds.
    #[error(
        "{0} would need {1} port ranges once the patterns that contain it are counted in; the limit is {PORT_RANGES}"
    )]
    TooManyRanges(IpNet, usize),
    /// More prefixes than a trie holds.
    #[error("{0} prefixes of one address family; the limit is {RULES_MAX}")]
    TooManyPrefixes(usize),
}

/// What all patterns on one prefix say.
#[derive(Default)]
struct Entry {
    include: Ports,
    exclude: Ports,
}

/// Folds the patterns.
pub fn compile(include: &[Pattern], exclude: &[Pattern]) -> Result<Rules, RulesError> {
    let mut entries: BTreeMap<IpNet, Entry> = BTreeMap::new();
    for p in include {
        entries.entry(canonical(p.net)).or_default().include.extend(ranges(&p.ports));
    }
    for p in exclude {
        entries.entry(canonical(p.net)).or_default().exclude.extend(ranges(&p.ports));
    }
    let mut rules = Rules::default();
    for net in entries.keys() {
        let mut captured = Ports::new();
        for ancestor in containing(*net) {
            if let Some(entry) = entries.get(&ancestor) {
                captured = subtract(union(captured, &entry.include), &entry.exclude);
            }
        }
        let ranges: Vec<_> = captured.iter().map(|&(a, b)| PortRange::new(a, b)).collect();
        let rule = Rule::new(&ranges).ok_or(RulesError::TooManyRanges(*net, ranges.len()))?;
        match net {
            IpNet::V4(net) => rules.v4.push((*net, rule)),
            IpNet::V6(net) => rules.v6.push((*net, rule)),
        }
    }
    match rules.v4.len().max(rules.v6.len()) {
        n if n > RULES_MAX => Err(RulesError::TooManyPrefixes(n)),
        _ => Ok(rules),
    }
}

/// A v4-mapped prefix as the IPv4 prefix that it is, host bits cleared.
fn canonical(net: IpNet) -> IpNet {
    const MAPPED_LEN: u8 = 96;
    match net {
        IpNet::V6(v6) if v6.prefix_len() >= MAPPED_LEN => match v6.addr().to_ipv4_mapped() {
            Some(v4) => Ipv4Net::new(v4, v6.prefix_len() - MAPPED_LEN).map_or(net, IpNet::V4),
            None => net,
        },
        _ => net,
    }
    .trunc()
}

/// The prefixes that contain `net`, from the least specific to itself.
fn containing(net: IpNet) -> impl Iterator<Item = IpNet> {
    (0..=net.prefix_len()).filter_map(move |len| IpNet::new(net.addr(), len).ok()).map(|n| n.trunc())
}

fn ranges(ports: &Ports) -> Ports {
    if ports.is_empty() { vec![(0, u16::MAX)] } else { ports.clone() }
}

/// Sorted, disjoint, not even touching.
fn union(a: Ports, b: &Ports) -> Ports {
    let mut all = a;
    all.extend(b);
    all.sort_unstable();
    let mut out = Ports::new();
    for (first, last) in all {
        match out.last_mut() {
            Some((_, end)) if u32::from(first) <= u32::from(*end) + 1 => *end = last.max(*end),
            _ => out.push((first, last)),
        }
    }
    out
}

fn subtract(a: Ports, b: &Ports) -> Ports {
    let mut left = a;
    for &(first, last) in b {
        left = left
            .into_iter()
            .flat_map(|(s, e)| {
                let before = (s < first).then(|| (s, e.min(first.saturating_sub(1))));
                let after = (e > last).then(|| (s.max(last.saturating_add(1)), e));
                [before, after].into_iter().flatten().filter(|(s, e)| s <= e)
            })
            .collect();
    }
    left
}

/// What is left alone unless a pattern names it: loopback, link-local (which is where metadata services
/// are), multicast and the unspecified addresses.
pub fn default_exclude() -> Vec<Pattern> {
    let v4 = |a, b, len| (IpAddr::V4(Ipv4Addr::new(a, b, 0, 0)), len);
    let v6 = |first, last, len| (IpAddr::from([first, 0, 0, 0, 0, 0, 0, last]), len);
    [
        v4(0, 0, 8),
        v4(127, 0, 8),
        v4(169, 254, 16),
        v4(224, 0, 4),
        v6(0, 0, 128),
        v6(0, 1, 128),
        v6(0xfe80, 0, 10),
        v6(0xff00, 0, 8),
    ]
    .into_iter()
    .filter_map(|(addr, len)| IpNet::new(addr, len).ok())
    .map(|net| Pattern { net, ports: Ports::new() })
    .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(net: &str, ports: &[(u16, u16)]) -> Pattern {
        Pattern { net: net.parse().expect("a prefix"), ports: ports.to_vec() }
    }

    /// What the kernel does: the longest prefix decides.
    fn captures(rules: &Rules, ip: &str, port: u16) -> bool {
        let ip: Ipv4Addr = ip.parse().expect("an address");
        let longest = rules.v4.iter().filter(|(n, _)| n.contains(&ip)).max_by_key(|(n, _)| n.prefix_len());
        longest.is_some_and(|(_, rule)| rule.captures(port))
    }

    #[test]
    fn a_longer_prefix_that_says_nothing_of_the_port_does_not_hide_a_shorter_one() {
        let rules = compile(&[pattern("10.0.0.0/8", &[])], &[pattern("10.1.0.0/16", &[(22, 22)])]).unwrap();
        assert!(captures(&rules, "10.1.2.3", 80));
        assert!(!captures(&rules, "10.1.2.3", 22));
        assert!(captures(&rules, "10.2.2.3", 22));
        assert!(!captures(&rules, "11.0.0.1", 80));
    }

    #[test]
    fn the_longest_prefix_wins_and_exclude_wins_on_the_same() {
        let rules = compile(
            &[pattern("0.0.0.0/0", &[]), pattern("127.0.0.1/32", &[(8080, 8080)])],
            &[pattern("127.0.0.0/8", &[]), pattern("192.0.2.0/24", &[]), pattern("0.0.0.0/0", &[(25, 25)])],
        )
        .unwrap();
        assert!(captures(&rules, "127.0.0.1", 8080));
        assert!(!captures(&rules, "127.0.0.1", 8081));
        assert!(!captures(&rules, "192.0.2.9", 80));
        assert!(!captures(&rules, "198.51.100.1", 25));
        assert!(captures(&rules, "198.51.100.1", 26));
    }

    #[test]
    fn a_v4_mapped_prefix_means_ipv4_and_a_v6_default_does_not() {
        let rules = compile(&[pattern("::ffff:10.0.0.0/104", &[]), pattern("::/0", &[])], &[]).unwrap();
        assert!(captures(&rules, "10.9.9.9", 1));
        assert!(!captures(&rules, "11.9.9.9", 1));
        assert_eq!(rules.v6.len(), 1);
    }

    #[test]
    fn too_many_ranges_name_the_prefix() {
        let odd: Ports = (0..17).map(|i| (i * 2 + 1, i * 2 + 1)).collect();
        let err = compile(&[pattern("10.0.0.0/8", &odd)], &[]).unwrap_err();
        assert_eq!(err, RulesError::TooManyRanges("10.0.0.0/8".parse().unwrap(), 17));
    }

    fn any_pattern() -> impl Strategy<Value = Pattern> {
        // Few bits, so that prefixes nest and ports overlap.
        let ports = proptest::collection::vec((0u16..8, 0u16..8), 0..3);
        (0u8..4, 0u8..=3, ports).prop_map(|(top, len, ports)| Pattern {
            net: IpNet::new(IpAddr::V4(Ipv4Addr::new(top << 6, 0, 0, 0)), len).expect("short").trunc(),
            ports: ports.into_iter().map(|(a, b)| (a.min(b), a.max(b))).collect(),
        })
    }

    proptest! {
        #[test]
        fn folded_rules_decide_as_the_patterns_do(
            include in proptest::collection::vec(any_pattern(), 0..6),
            exclude in proptest::collection::vec(any_pattern(), 0..6),
            top: u8, port in 0u16..9,
        ) {
            let ip = Ipv4Addr::new(top, 0, 0, 0);
            // The definition: walk from the longest prefix; the first that speaks of the port decides.
            let says = |list: &[Pattern], len| list.iter().any(|p| {
                p.net.prefix_len() == len && p.net.contains(&IpAddr::V4(ip))
                    && ranges(&p.ports).iter().any(|&(a, b)| (a..=b).contains(&port))
            });
            let wanted = (0..=32u8).rev().find_map(|len| {
                if says(&exclude, len) { Some(false) } else if says(&include, len) { Some(true) } else { None }
            }).unwrap_or(false);
            let rules = compile(&include, &exclude).unwrap();
            prop_assert_eq!(captures(&rules, &ip.to_string(), port), wanted);
        }
    }
}
