//! Why a connection of a captured application is captured, refused or left alone: which pattern says so.
//!
//! # Invariants
//! - What is found here is what the kernel's rules do (a test holds it to that).

use std::net::SocketAddr;

use ipnet::IpNet;
use tunnel_common::capture::Kind;

use super::rules::{Pattern, Patterns, Rules};

/// Which list of a capture decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// `include`
    Include,
    /// `refuse`
    Refuse,
    /// `exclude`
    Exclude,
    /// What is left alone by default.
    DefaultExclude,
}

impl Rules {
    /// What the programs do with a destination; nothing: it is left alone.
    pub fn look(&self, to: SocketAddr) -> Option<Kind> {
        let rule = match IpNet::from(to.ip().to_canonical()) {
            IpNet::V4(ip) => {
                let around = self.v4.iter().filter(|(net, _)| net.contains(&ip.addr()));
                around.max_by_key(|(net, _)| net.prefix_len()).map(|(_, rule)| rule)
            }
            IpNet::V6(ip) => {
                let around = self.v6.iter().filter(|(net, _)| net.contains(&ip.addr()));
                around.max_by_key(|(net, _)| net.prefix_len()).map(|(_, rule)| rule)
            }
        };
        rule.and_then(|rule| rule.look(to.port()))
    }
}

impl Patterns {
    /// The pattern that decides on a destination: the longest prefix that speaks of its port, and on the same prefix exclude
    /// over refuse over include over what is excluded by default.
    pub fn decides(&self, to: SocketAddr) -> Option<(List, &Pattern)> {
        let lists = [
            (List::DefaultExclude, &self.default_exclude),
            (List::Include, &self.include),
            (List::Refuse, &self.refuse),
            (List::Exclude, &self.exclude),
        ];
        let all = lists.into_iter().flat_map(|(list, patterns)| patterns.iter().map(move |p| (list, p)));
        let speaking = all.filter_map(|(list, p)| contains(p, to).map(|length| (length, list, p)));
        // Of equal ones the last: lists stand in the order of their precedence.
        speaking.max_by_key(|(length, ..)| *length).map(|(_, list, p)| (list, p))
    }
}

/// The length of its prefix, if it contains the destination.
fn contains(pattern: &Pattern, to: SocketAddr) -> Option<u8> {
    let ports = pattern.ports.is_empty() || pattern.ports.iter().any(|(a, b)| (*a..=*b).contains(&to.port()));
    let ip = to.ip().to_canonical();
    let net = match pattern.net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => v6
            .addr()
            .to_ipv4_mapped()
            .and_then(|v4| ipnet::Ipv4Net::new(v4, v6.prefix_len() - 96).ok())
            .map_or(pattern.net, IpNet::V4),
        net => net,
    };
    (ports && net.contains(&ip)).then(|| net.prefix_len())
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;

    use super::{super::rules::compile, *};

    fn pattern() -> impl Strategy<Value = Pattern> {
        (0_u8..4, 28_u8..=32, prop_oneof![Just(vec![]), Just(vec![(80, 90)]), Just(vec![(85, 85)])]).prop_map(
            |(last, length, ports)| {
                let net = IpNet::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)), length)
                    .expect("at most 32")
                    .trunc();
                Pattern { net, ports }
            },
        )
    }

    fn patterns() -> impl Strategy<Value = Patterns> {
        let list = || prop::collection::vec(pattern(), 0..3);
        (list(), list(), list(), list()).prop_map(|(default_exclude, include, refuse, exclude)| Patterns {
            default_exclude,
            include,
            refuse,
            exclude,
        })
    }

    proptest! {
        #[test]
        fn the_pattern_that_decides_says_what_the_rules_do(patterns in patterns(), last in 0_u8..20, port in 79_u16..92) {
            let to = SocketAddr::from((Ipv4Addr::new(10, 0, 0, last), port));
            let rules = compile(&patterns, None).unwrap();
            let said = match patterns.decides(to).map(|(list, _)| list) {
                Some(List::Include) => Some(Kind::Captured),
                Some(List::Refuse) => Some(Kind::Refused),
                Some(List::Exclude | List::DefaultExclude) | None => None,
            };
            prop_assert_eq!(rules.look(to), said);
        }
    }
}
