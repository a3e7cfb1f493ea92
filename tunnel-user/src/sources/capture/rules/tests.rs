//! The kernel's rules decide as the patterns and the routes do.

use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use tunnel_common::capture::Kind;

use super::*;

fn pattern(net: &str, ports: &[(u16, u16)]) -> Pattern {
    Pattern { net: net.parse().expect("a prefix"), ports: ports.to_vec() }
}

fn include(list: &[Pattern]) -> Patterns {
    Patterns { include: list.to_vec(), ..Patterns::default() }
}

fn step(to: &[Pattern], denies: bool) -> Step {
    Step { to: to.to_vec(), denies }
}

/// What the kernel does: the longest prefix decides.
fn look(rules: &Rules, ip: &str, port: u16) -> Option<Kind> {
    let rule = match ip.parse().expect("an address") {
        IpAddr::V4(ip) => {
            let around = rules.v4.iter().filter(|(n, _)| n.contains(&ip));
            around.max_by_key(|(n, _)| n.prefix_len()).map(|(_, rule)| rule)
        }
        IpAddr::V6(ip) => {
            let around = rules.v6.iter().filter(|(n, _)| n.contains(&ip));
            around.max_by_key(|(n, _)| n.prefix_len()).map(|(_, rule)| rule)
        }
    };
    rule.and_then(|rule| rule.look(port))
}

fn captures(rules: &Rules, ip: &str, port: u16) -> bool {
    look(rules, ip, port) == Some(Kind::Captured)
}

#[test]
fn a_longer_prefix_that_says_nothing_of_the_port_does_not_hide_a_shorter_one() {
    let patterns = Patterns {
        exclude: vec![pattern("10.1.0.0/16", &[(22, 22)])],
        ..include(&[pattern("10.0.0.0/8", &[])])
    };
    let rules = compile(&patterns, None).unwrap();
    assert!(captures(&rules, "10.1.2.3", 80));
    assert!(!captures(&rules, "10.1.2.3", 22));
    assert!(captures(&rules, "10.2.2.3", 22));
    assert!(!captures(&rules, "11.0.0.1", 80));
}

#[test]
fn the_longest_prefix_wins_and_exclude_wins_on_the_same() {
    let patterns = Patterns {
        exclude: vec![
            pattern("127.0.0.0/8", &[]),
            pattern("192.0.2.0/24", &[]),
            pattern("0.0.0.0/0", &[(25, 25)]),
        ],
        ..include(&[pattern("0.0.0.0/0", &[]), pattern("127.0.0.1/32", &[(8080, 8080)])])
    };
    let rules = compile(&patterns, None).unwrap();
    assert!(captures(&rules, "127.0.0.1", 8080));
    assert!(!captures(&rules, "127.0.0.1", 8081));
    assert!(!captures(&rules, "192.0.2.9", 80));
    assert!(!captures(&rules, "198.51.100.1", 25));
    assert!(captures(&rules, "198.51.100.1", 26));
}

#[test]
fn refuse_wins_over_include_on_the_same_prefix_and_exclude_over_both() {
    let patterns = Patterns {
        refuse: vec![pattern("::/0", &[]), pattern("10.0.0.0/8", &[(22, 25)])],
        exclude: vec![pattern("10.0.0.0/8", &[(22, 22)]), pattern("fe80::/10", &[])],
        ..include(&[pattern("0.0.0.0/0", &[]), pattern("::/0", &[]), pattern("fd00::/8", &[(443, 443)])])
    };
    let rules = compile(&patterns, None).unwrap();
    assert_eq!(look(&rules, "2001:db8::1", 443), Some(Kind::Refused));
    assert_eq!(look(&rules, "fd00::1", 443), Some(Kind::Captured), "the longer prefix includes it");
    assert_eq!(look(&rules, "fd00::1", 80), Some(Kind::Refused), "of this port it says nothing");
    assert_eq!(look(&rules, "fe80::1", 80), None);
    assert_eq!(look(&rules, "10.0.0.1", 22), None);
    assert_eq!(look(&rules, "10.0.0.1", 25), Some(Kind::Refused));
    assert_eq!(look(&rules, "10.0.0.1", 26), Some(Kind::Captured));
}

#[test]
fn what_is_excluded_by_default_is_captured_where_the_same_or_a_longer_prefix_says_so() {
    let with = |included: &[Pattern]| {
        let default_exclude = vec![pattern("127.0.0.0/8", &[]), pattern("169.254.0.0/16", &[])];
        compile(&Patterns { default_exclude, ..include(included) }, None).unwrap()
    };
    let everything = || pattern("0.0.0.0/0", &[]);
    assert!(!captures(&with(&[everything()]), "127.0.0.1", 80));
    assert!(!captures(&with(&[pattern("126.0.0.0/7", &[])]), "127.0.0.1", 80), "a shorter prefix does not");
    let same = with(&[everything(), pattern("127.0.0.0/8", &[(80, 80)])]);
    assert!(captures(&same, "127.0.0.1", 80) && !captures(&same, "127.0.0.1", 81));
    assert!(!captures(&same, "169.254.169.254", 80));
    let longer = with(&[everything(), pattern("127.0.0.9/32", &[])]);
    assert!(captures(&longer, "127.0.0.9", 80) && !captures(&longer, "127.0.0.1", 80));
}

#[test]
fn a_v4_mapped_prefix_means_ipv4_and_a_v6_default_does_not() {
    let rules =
        compile(&include(&[pattern("::ffff:10.0.0.0/104", &[]), pattern("::/0", &[])]), None).unwrap();
    assert!(captures(&rules, "10.9.9.9", 1));
    assert!(!captures(&rules, "11.9.9.9", 1));
    assert_eq!(rules.v6.len(), 1);
}

#[test]
fn too_many_ranges_name_the_prefix() {
    let odd: Ports = (0..17).map(|i| (i * 2 + 1, i * 2 + 1)).collect();
    let err = compile(&include(&[pattern("10.0.0.0/8", &odd)]), Some(&[])).unwrap_err();
    assert_eq!(err, RulesError::TooManyRanges("10.0.0.0/8".parse().unwrap(), 17));
}

#[test]
fn what_no_route_takes_is_denied_and_the_first_route_decides() {
    let routes = [
        step(&[pattern("10.1.0.0/16", &[(80, 80)])], false),
        step(&[pattern("10.1.0.0/16", &[]), pattern("10.2.0.0/16", &[])], true),
        step(&[pattern("10.0.0.0/8", &[])], false),
    ];
    let patterns = Patterns {
        exclude: vec![pattern("10.1.9.0/24", &[])],
        ..include(&[pattern("0.0.0.0/0", &[]), pattern("::/0", &[])])
    };
    let rules = compile(&patterns, Some(&routes)).unwrap();
    assert_eq!(look(&rules, "10.1.0.1", 80), Some(Kind::Captured));
    assert_eq!(look(&rules, "10.1.0.1", 81), Some(Kind::Denied));
    assert_eq!(look(&rules, "10.1.9.1", 81), None, "excluded: routes are not asked");
    assert_eq!(look(&rules, "10.2.0.1", 80), Some(Kind::Denied));
    assert_eq!(look(&rules, "10.3.0.1", 80), Some(Kind::Captured));
    assert_eq!(look(&rules, "11.0.0.1", 80), Some(Kind::Denied), "no route takes it");
    assert_eq!(look(&rules, "2001:db8::1", 80), Some(Kind::Denied));
    let without = compile(&patterns, None).unwrap();
    assert_eq!(look(&without, "11.0.0.1", 80), Some(Kind::Captured), "another proxy has no routes");
}

#[test]
fn routes_that_change_nothing_for_the_kernel_make_no_rules() {
    let everything = include(&[pattern("0.0.0.0/0", &[])]);
    let alone = compile(&everything, Some(&[step(&[], false)])).unwrap();
    let routes = [
        step(&[pattern("10.0.0.0/8", &[(80, 80)])], false),
        step(&[pattern("fd00::/8", &[])], true),
        step(&[], false),
        step(&[pattern("11.0.0.0/8", &[])], true),
    ];
    assert_eq!(compile(&everything, Some(&routes)).unwrap(), alone);
}

#[test]
fn where_routes_take_more_ranges_than_there_are_the_daemon_denies() {
    let odd: Ports = (0..17).map(|i| (i * 2 + 1, i * 2 + 1)).collect();
    let routes = [step(&[pattern("10.0.0.0/8", &odd), pattern("11.0.0.0/8", &[])], true), step(&[], false)];
    let rules = compile(&include(&[pattern("0.0.0.0/0", &[])]), Some(&routes)).unwrap();
    assert_eq!(rules.left_to_daemon, 1);
    assert_eq!(look(&rules, "10.0.0.1", 1), Some(Kind::Captured));
    assert_eq!(look(&rules, "11.0.0.1", 1), Some(Kind::Denied), "elsewhere there is room");
}

#[test]
fn where_routes_take_more_prefixes_than_there_are_the_daemon_denies() {
    let one = |i: usize| {
        let ip = Ipv4Addr::from_bits(0x0a00_0000 + u32::try_from(i).expect("few"));
        Pattern { net: IpNet::from(IpAddr::V4(ip)), ports: Ports::new() }
    };
    let many: Vec<_> = (0..=RULES_MAX).map(one).collect();
    let both = include(&[pattern("0.0.0.0/0", &[]), pattern("::/0", &[])]);
    let v6 = pattern("fd00::/8", &[]);
    let routes = [step(&many, true), step(&[v6], true), step(&[], false)];
    let rules = compile(&both, Some(&routes)).unwrap();
    assert!(rules.left_to_daemon > RULES_MAX && rules.v4.len() == 1);
    assert_eq!(look(&rules, "10.0.0.1", 1), Some(Kind::Captured));
    assert_eq!(look(&rules, "fd00::1", 1), Some(Kind::Denied), "the other family has room");
    let err = compile(&include(&many), Some(&routes)).unwrap_err();
    assert_eq!(err, RulesError::TooManyPrefixes(RULES_MAX + 1), "what the capture says has to fit");
}

fn any_pattern() -> impl Strategy<Value = Pattern> {
    // Few bits, so that prefixes nest and ports overlap.
    let ports = proptest::collection::vec((0u16..8, 0u16..8), 0..3);
    (0u8..4, 0u8..=3, ports).prop_map(|(top, len, ports)| Pattern {
        net: IpNet::new(IpAddr::V4(Ipv4Addr::new(top << 6, 0, 0, 0)), len).expect("short").trunc(),
        ports: ports.into_iter().map(|(a, b)| (a.min(b), a.max(b))).collect(),
    })
}

fn any_patterns() -> impl Strategy<Value = Patterns> {
    let some = || proptest::collection::vec(any_pattern(), 0..5);
    (some(), some(), some(), some()).prop_map(|(default_exclude, include, refuse, exclude)| Patterns {
        default_exclude,
        include,
        refuse,
        exclude,
    })
}

fn any_step() -> impl Strategy<Value = Step> {
    (proptest::collection::vec(any_pattern(), 0..3), any::<bool>())
        .prop_map(|(to, denies)| Step { to, denies })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn folded_rules_decide_as_the_patterns_and_the_routes_do(
        patterns in any_patterns(),
        routes in proptest::option::of(proptest::collection::vec(any_step(), 0..6)),
        top: u8, port in 0u16..9,
    ) {
        let ip = IpAddr::V4(Ipv4Addr::new(top, 0, 0, 0));
        let takes = |p: &Pattern| {
            p.net.contains(&ip) && ranges(&p.ports).iter().any(|&(a, b)| (a..=b).contains(&port))
        };
        let says = |list: &[Pattern], len| list.iter().any(|p| p.net.prefix_len() == len && takes(p));
        // The definition: walk from the longest prefix; the first that speaks of the port decides.
        let included = || {
            // The definition of routes: the first that takes it decides, and it is denied where none does.
            let first = |routes: &Vec<Step>| {
                routes.iter().find(|s| s.to.is_empty() || s.to.iter().any(takes)).is_none_or(|s| s.denies)
            };
            if routes.as_ref().is_some_and(first) { Kind::Denied } else { Kind::Captured }
        };
        let wanted = (0..=32u8).rev().find_map(|len| {
            if says(&patterns.exclude, len) {
                Some(None)
            } else if says(&patterns.refuse, len) {
                Some(Some(Kind::Refused))
            } else if says(&patterns.include, len) {
                Some(Some(included()))
            } else if says(&patterns.default_exclude, len) {
                Some(None)
            } else {
                None
            }
        }).flatten();
        let rules = compile(&patterns, routes.as_deref()).unwrap();
        prop_assert_eq!(rules.left_to_daemon, 0);
        prop_assert_eq!(look(&rules, &ip.to_string(), port), wanted);
    }
}
