//! Who gets where: by example, and for any rules as they stand in the configuration, one after the other. The linear definition
//! is the specification.

use proptest::prelude::*;

use super::*;
use crate::config::AddrPattern;

fn policies(rules: &[(&str, &[&str])], listeners: &[&str]) -> Policies {
    let rule = |(who, what): &(&str, &[&str])| Policy {
        identity: match *who {
            "any" => Peers::Any,
            name => Peers::Of(vec![name.parse().unwrap()]),
        },
        target: what.iter().map(|t| t.parse().unwrap()).collect(),
    };
    let listeners: Vec<_> = listeners.iter().map(|l| l.parse().unwrap()).collect();
    let mut p = Policies::new(rules.iter().map(rule).collect(), &listeners);
    let local = |ip: IpAddr| Some(["10.9.0.1", "fd00::9"].contains(&&*ip.to_string()));
    p.own = OwnListeners::with_local(&listeners, local);
    p
}

/// Whether web may reach `target` at `addr`.
fn reach(p: &Policies, target: &str, addr: &str) -> Result<(), Denied> {
    let web = p.peer(Some(Identity("spiffe://example.org/ns/a/sa/web".into())));
    let target = target.parse().unwrap();
    let permit = p.check_target(&web, &target)?;
    permit.allows_addr(addr.parse().unwrap())
}

fn addr(p: &Policies, addr: &str) -> Result<(), Denied> {
    reach(p, addr, addr)
}

#[test]
fn nothing_is_allowed_until_a_rule_says_so() {
    let none = policies(&[], &[]);
    assert!(matches!(addr(&none, "10.0.0.1:80"), Err(Denied::NoRule { .. })));
    assert!(matches!(reach(&none, "web.internal:80", "10.0.0.1:80"), Err(Denied::NoRule { .. })));

    let web = "spiffe://example.org/ns/*/sa/web";
    let p = policies(&[(web, &["10.0.0.0/8:80"]), ("spiffe://example.org/db", &["10.0.0.0/8:5432"])], &[]);
    assert_eq!(addr(&p, "10.0.0.1:80"), Ok(()));
    assert_eq!(addr(&p, "[::ffff:10.0.0.1]:80"), Ok(()));
    assert_eq!(
        addr(&p, "10.0.0.1:5432").unwrap_err().to_string(),
        "no policy lets spiffe://example.org/ns/a/sa/web reach 10.0.0.1:5432"
    );
    assert!(p.check_target(&p.peer(None), &"10.0.0.1:80".parse().unwrap()).is_err(), "nobody is not web");
}

#[test]
fn a_name_passes_by_its_name_or_by_every_address() {
    let by_name = policies(&[("any", &["*.internal:80"])], &[]);
    assert_eq!(reach(&by_name, "web.internal:80", "203.0.113.1:80"), Ok(()));
    assert!(reach(&by_name, "web.internal:81", "203.0.113.1:81").is_err());
    assert!(addr(&by_name, "203.0.113.1:80").is_err(), "a name rule admits no literal address");

    let by_addr = policies(&[("any", &["10.0.0.0/8:80"])], &[]);
    assert_eq!(reach(&by_addr, "web.internal:80", "10.0.0.1:80"), Ok(()));
    assert!(matches!(reach(&by_addr, "web.internal:80", "203.0.113.1:80"), Err(Denied::Resolved { .. })));
    let web: Target = "web.internal:81".parse().unwrap();
    assert!(by_addr.check_target(&by_addr.peer(None), &web).is_err(), "not even resolved");
}

#[test]
fn link_local_opens_only_to_a_rule_inside_it() {
    let broad = policies(&[("any", &["0.0.0.0/0", "::/0", "169.0.0.0/8", "*.internal"])], &[]);
    for guarded in [
        "169.254.169.254:80",
        "[::ffff:169.254.169.254]:80",
        "[64:ff9b::169.254.169.254]:80",
        "[fe80::1]:80",
        "[fd00:ec2::254]:80",
        "0.0.0.0:80",
        "[::]:80",
        "[::ffff:0.0.0.0]:80",
    ] {
        assert!(matches!(addr(&broad, guarded), Err(Denied::Guarded { .. })), "{guarded}");
        assert!(
            matches!(reach(&broad, "rebound.internal:80", guarded), Err(Denied::Guarded { .. })),
            "a name that resolves to {guarded}"
        );
    }
    let narrow = policies(&[("any", &["169.254.169.254:80", "fe80::/10", "*.internal"])], &[]);
    assert_eq!(addr(&narrow, "169.254.169.254:80"), Ok(()));
    assert_eq!(reach(&narrow, "metadata.internal:80", "169.254.169.254:80"), Ok(()));
    assert_eq!(addr(&narrow, "[fe80::1]:22"), Ok(()));
    assert!(addr(&narrow, "169.254.169.254:81").is_err());
    assert!(addr(&narrow, "169.254.1.1:80").is_err());
}

#[test]
fn our_own_listeners_open_only_to_their_exact_address() {
    let all: &[(&str, &[&str])] = &[("any", &["0.0.0.0/0", "::/0", "*.internal"])];
    let p = policies(all, &["0.0.0.0:15008", "[fd00::1]:15009"]);
    for own in
        ["127.0.0.1:15008", "127.9.9.9:15008", "10.9.0.1:15008", "[::ffff:10.9.0.1]:15008", "[fd00::1]:15009"]
    {
        assert!(matches!(addr(&p, own), Err(Denied::OwnListener(_))), "{own}");
        assert!(matches!(reach(&p, "me.internal:15008", own), Err(Denied::OwnListener(_))), "{own}");
    }
    for other in ["10.9.0.2:15008", "10.9.0.1:15009", "[fd00::9]:15008", "[fd00::2]:15009"] {
        assert_eq!(addr(&p, other), Ok(()), "{other}");
    }
    let dual = policies(all, &["[::]:15008"]);
    for own in ["10.9.0.1:15008", "[fd00::9]:15008", "[::1]:15008", "127.0.0.1:15008"] {
        assert!(matches!(addr(&dual, own), Err(Denied::OwnListener(_))), "{own}");
    }
    let lo =
        policies(&[("any", &["0.0.0.0/8", "10.9.0.1:15008", "127.0.0.0/8:15008"])], &["127.0.0.1:15008"]);
    assert!(matches!(addr(&lo, "0.0.0.0:15008"), Err(Denied::OwnListener(_))));
    assert!(matches!(addr(&lo, "127.0.0.1:15008"), Err(Denied::OwnListener(_))));

    let exact = policies(&[("any", &["10.9.0.1:15008", "127.0.0.1"])], &["0.0.0.0:15008"]);
    assert_eq!(addr(&exact, "10.9.0.1:15008"), Ok(()));
    assert!(addr(&exact, "127.0.0.1:15008").is_err(), "the port has to be stated");
}

#[test]
fn a_name_is_passed_on_unresolved_only_by_a_rule_for_names() {
    let p = policies(&[("any", &["10.0.0.0/8", "*.internal"])], &[]);
    let passed = |text: &str| {
        let target: Target = text.parse().unwrap();
        p.check_target(&p.peer(None), &target).and_then(|permit| permit.allows_unresolved())
    };
    assert_eq!(passed("web.internal:80"), Ok(()));
    assert_eq!(passed("10.1.2.3:80"), Ok(()));
    assert!(matches!(passed("web.example:80"), Err(Denied::NoRule { .. })));
}

#[test]
fn unknown_local_addresses_count_as_ours() {
    let mut p = policies(&[("any", &["0.0.0.0/0"])], &["0.0.0.0:15008"]);
    p.own = OwnListeners::with_local(&["0.0.0.0:15008".parse().unwrap()], |_| None);
    assert!(matches!(addr(&p, "203.0.113.1:15008"), Err(Denied::OwnListener(_))));
    assert_eq!(addr(&p, "203.0.113.1:15009"), Ok(()));
}

#[test]
fn the_kernel_is_asked_for_its_addresses_only_where_a_policy_would_let_a_peer_dial() {
    let mut p = policies(&[("any", &["10.0.0.0/8:15008"])], &["0.0.0.0:15008"]);
    p.own = OwnListeners::with_local(&["0.0.0.0:15008".parse().unwrap()], |ip| panic!("asked for {ip}"));
    assert!(matches!(addr(&p, "203.0.113.1:15008"), Err(Denied::NoRule { .. })));
    assert!(matches!(addr(&p, "169.254.169.254:15008"), Err(Denied::Guarded { .. })));
}

#[test]
fn a_rewrite_is_trusted_but_a_name_in_it_opens_nothing_that_is_guarded() {
    let p = policies(&[], &["0.0.0.0:15008"]);
    let rewritten = |to: &str, addr: &str| p.allows_rewrite(&to.parse().unwrap(), addr.parse().unwrap());
    for addr in ["10.0.0.1:80", "127.0.0.1:80", "169.254.169.254:80", "10.9.0.1:15008"] {
        assert_eq!(rewritten(addr, addr), Ok(()), "{addr} is what the operator wrote");
    }
    assert_eq!(rewritten("db.internal:80", "10.0.0.1:80"), Ok(()));
    for guarded in ["127.0.0.1:80", "[::ffff:169.254.169.254]:80", "[64:ff9b::7f00:1]:80"] {
        assert!(matches!(rewritten("db.internal:80", guarded), Err(Denied::Guarded { .. })), "{guarded}");
    }
    assert!(matches!(rewritten("me.internal:15008", "10.9.0.1:15008"), Err(Denied::OwnListener(_))));
}

/// The definition: one rule after the other.
struct Linear<'a> {
    rules: &'a [Policy],
    own: &'a OwnListeners,
}

impl Linear<'_> {
    fn patterns(&self, who: Option<&Identity>) -> impl Iterator<Item = &TargetPattern> {
        self.rules.iter().filter(move |r| r.identity.contains(who)).flat_map(|r| &r.target)
    }

    fn addr_patterns(&self, who: Option<&Identity>) -> impl Iterator<Item = &AddrPattern> {
        self.patterns(who).filter_map(|p| match p {
            TargetPattern::Addr(a) => Some(a),
            TargetPattern::Name(_) => None,
        })
    }

    fn by_name(&self, who: Option<&Identity>, target: &Target) -> bool {
        matches!(target, Target::Name(..)) && self.patterns(who).any(|p| p.contains(target))
    }

    /// Whether the target may be asked for.
    fn asked(&self, who: Option<&Identity>, target: &Target) -> bool {
        match target {
            Target::Addr(addr) => self.dialled(who, target, *addr),
            Target::Name(_, port) => {
                self.by_name(who, target) || self.addr_patterns(who).any(|p| p.ports().contains(*port))
            }
        }
    }

    /// Whether this address may be dialled for it.
    fn dialled(&self, who: Option<&Identity>, target: &Target, addr: SocketAddr) -> bool {
        let addr = SocketAddr::new(reached_by(addr.ip()), addr.port());
        let rules: Vec<_> = self.addr_patterns(who).filter(|p| p.contains(addr)).collect();
        let exactly = |p: &&AddrPattern| {
            p.net() == IpNet::from(addr.ip()) && p.ports().ranges() == [(addr.port(), addr.port())]
        };
        if self.own.contains(addr) && !rules.iter().any(exactly) {
            return false;
        }
        match GUARDED.into_iter().find(|g| g.contains(&addr.ip())) {
            Some(range) if !rules.iter().any(|p| range.contains(&p.net())) => false,
            _ => self.by_name(who, target) || !rules.is_empty(),
        }
    }
}

fn any_rule() -> impl Strategy<Value = Policy> {
    let names = prop_oneof![Just("s://a/x"), Just("s://a/*"), Just("s://a/y")];
    let peers = prop_oneof![
        1 => Just(Peers::Any),
        3 => prop::collection::vec(names, 1..3)
            .prop_map(|names| Peers::Of(names.into_iter().map(|n| n.parse().unwrap()).collect())),
    ];
    let target = prop_oneof![
        Just("0.0.0.0/0"),
        Just("10.0.0.0/8:80-81"),
        Just("10.1.0.0/16"),
        Just("10.1.0.1:80"),
        Just("169.254.0.0/16"),
        Just("169.254.169.254:80"),
        Just("168.0.0.0/6"),
        Just("::/0:80"),
        Just("[fe80::/10]:80"),
        Just("*.internal"),
        Just("web.internal:80"),
        Just("10.9.0.1:15008"),
        Just("10.9.0.0/16"),
    ];
    (peers, prop::collection::vec(target, 1..4)).prop_map(|(identity, target)| Policy {
        identity,
        target: target.into_iter().map(|t| t.parse().unwrap()).collect(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn the_index_decides_as_one_rule_after_the_other(
        rules in prop::collection::vec(any_rule(), 0..6),
        who in prop::sample::select(vec![None, Some("s://a/x"), Some("s://a/z"), Some("s://b/x")]),
        host in prop::sample::select(vec![
            "10.1.0.1", "10.2.0.1", "11.0.0.1", "169.254.169.254", "[::ffff:10.1.0.1]", "[64:ff9b::a01:1]",
            "[fe80::1]", "[2001:db8::1]", "10.9.0.1", "web.internal", "db.internal", "web.example",
        ]),
        port in prop::sample::select(vec![79_u16, 80, 81, 82, 15008]),
        ip in prop::sample::select(vec!["10.1.0.1", "10.9.0.1", "127.0.0.1", "169.254.169.254", "fe80::1"]),
    ) {
        let listeners = ["0.0.0.0:15008".parse().unwrap()];
        let mut indexed = Policies::new(rules.clone(), &listeners);
        indexed.own = OwnListeners::with_local(&listeners, |ip| Some(ip.to_string() == "10.9.0.1"));
        let own = indexed.own.clone();
        let linear = Linear { rules: &rules, own: &own };
        let who = who.map(|w| Identity(w.into()));
        let peer = indexed.peer(who.clone());
        let target: Target = format!("{host}:{port}").parse().unwrap();
        let permit = indexed.check_target(&peer, &target);
        prop_assert_eq!(permit.is_ok(), linear.asked(who.as_ref(), &target));
        if let Ok(permit) = permit {
            let addr = match target {
                Target::Addr(addr) => addr,
                Target::Name(..) => SocketAddr::new(ip.parse().unwrap(), port),
            };
            let dialled = linear.dialled(who.as_ref(), &target, addr);
            prop_assert_eq!(permit.allows_addr(addr).is_ok(), dialled);
            let unresolved = matches!(target, Target::Addr(_)) || linear.by_name(who.as_ref(), &target);
            prop_assert_eq!(permit.allows_unresolved().is_ok(), unresolved);
        }
    }
}

proptest! {
    /// Any rule whose network is not inside the guarded range leaves it closed.
    #[test]
    fn no_broader_rule_opens_link_local(
        prefix in 0..=16u8, host: u16, port in 1..=u16::MAX, v6 in any::<u128>(), prefix6 in 0..10u8,
    ) {
        let ip = Ipv4Addr::from(0xa9fe_0000 | u32::from(host));
        let rule = IpNet::from(Ipv4Net::new(ip, prefix).unwrap()).trunc();
        let p = policies(&[("any", &[&rule.to_string(), "*.internal"])], &[]);
        let open = rule.prefix_len() == 16;
        for at in [SocketAddr::from((ip, port)), SocketAddr::from((ip.to_ipv6_mapped(), port))] {
            prop_assert_eq!(addr(&p, &at.to_string()).is_ok(), open);
            prop_assert_eq!(reach(&p, &format!("a.internal:{port}"), &at.to_string()).is_ok(), open);
        }

        let ip = Ipv6Addr::from(0xfe80 << 112 | v6 >> 10);
        let rule = IpNet::from(Ipv6Net::new(ip, prefix6).unwrap()).trunc();
        let p = policies(&[("any", &[&rule.to_string()])], &[]);
        prop_assert!(addr(&p, &SocketAddr::from((ip, port)).to_string()).is_err());
    }
}
