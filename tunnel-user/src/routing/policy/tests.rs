//! Who gets where: by example, and for any policies as [`explain`] asks them, one after the other. That is the specification.

use http::{HeaderName, HeaderValue};
use proptest::prelude::*;

use super::{
    explain::{Mismatch, Question, Verdict},
    *,
};
use crate::config::{Config, HeaderMatch, Peers, Targets, ValueMatch};

const WEB: &str = "spiffe://example.org/ns/a/sa/web";

fn client() -> ClientAddr {
    ClientAddr("10.77.0.1:40000".parse().unwrap())
}

fn who(name: &str) -> Option<Identity> {
    Some(Identity(name.into()))
}

fn with_listeners(rules: Vec<Policy>, listeners: &[&str]) -> Policies {
    let listeners: Vec<_> = listeners.iter().map(|l| l.parse().unwrap()).collect();
    let mut p = Policies::new(rules, &listeners);
    let local = |ip: IpAddr| Some(["10.9.0.1", "fd00::9"].contains(&&*ip.to_string()));
    p.own = OwnListeners::with_local(&listeners, local);
    p
}

fn policies(rules: &[(&str, &[&str])], listeners: &[&str]) -> Policies {
    let rule = |(who, what): &(&str, &[&str])| {
        let identity = match *who {
            "any" => Peers::Any,
            name => Peers::Of(vec![name.parse().unwrap()]),
        };
        Policy::allow("", identity, what.iter().map(|t| t.parse().unwrap()).collect())
    };
    with_listeners(rules.iter().map(rule).collect(), listeners)
}

/// Of `[[policy]]` tables.
fn of(text: &str) -> Policies {
    let around = "[[listener]]\naddress = \"127.0.0.1:1\"\n[[route]]\nto = \"direct\"\n\
        [identity]\ncert = \"a\"\nkey = \"b\"\nca = \"c\"\n";
    let file = std::path::Path::new("policies.toml");
    let config = Config::parse(&format!("{around}{text}"), file, crate::config::CheckFiles::No);
    with_listeners(config.unwrap_or_else(|e| panic!("{e}")).policies, &[])
}

/// Whether web may reach `target` at `addr`.
fn reach(p: &Policies, target: &str, addr: &str) -> Result<(), Denied> {
    decide(p, WEB, target, addr, &HeaderMap::new()).map(drop)
}

fn decide(p: &Policies, name: &str, target: &str, addr: &str, headers: &HeaderMap) -> Result<RuleId, Denied> {
    let (peer, target) = (p.peer(who(name), client()), target.parse().unwrap());
    let request = Request { who: &peer, target: &target, headers: Some(headers) };
    p.check_target(request)?.allows_addr(addr.parse().unwrap())
}

/// Whether anybody may ask for it.
fn asked(p: &Policies, target: &str) -> Result<(), Denied> {
    let target = target.parse().unwrap();
    let peer = p.peer(None, client());
    p.check_target(Request { who: &peer, target: &target, headers: None }).map(drop)
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
    assert!(asked(&p, "10.0.0.1:80").is_err(), "nobody is not web");
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
    assert!(asked(&by_addr, "web.internal:81").is_err(), "not even resolved");
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
        let peer = p.peer(None, client());
        let request = Request { who: &peer, target: &target, headers: None };
        p.check_target(request).and_then(|permit| permit.allows_unresolved())
    };
    assert_eq!(passed("web.internal:80"), Ok(0));
    assert_eq!(passed("10.1.2.3:80"), Ok(0));
    assert!(matches!(passed("web.example:80"), Err(Denied::NoRule { .. })));
}

/// Where the kernel does not say which addresses are local, every address with a listener's port counts as the listener.
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

/// What a policy denies is denied whatever others allow, in whatever order; by name before it is resolved, by address
/// also where the name is allowed.
#[test]
fn a_policy_that_denies_wins() {
    let p = of(r#"
        [[policy]]
        name = "no-db"
        action = "deny"
        identity = "any"
        target = ["10.0.5.0/24", "*.db.internal", "0.0.0.0/0:25"]
        [[policy]]
        name = "all"
        identity = "any"
        target = ["0.0.0.0/0", "*.internal"]
        [[policy]]
        name = "nothing-for-c"
        action = "deny"
        identity = ["spiffe://example.org/ns/c/**"]
        target = "any"
    "#);
    let rule = |denied: Result<(), Denied>| denied.unwrap_err().rule().map(|rule| rule.to_string());
    assert_eq!(addr(&p, "10.0.4.1:80"), Ok(()));
    for denied in ["10.0.5.1:80", "[::ffff:10.0.5.1]:80", "[64:ff9b::10.0.5.1]:80", "10.0.4.1:25"] {
        assert_eq!(rule(addr(&p, denied)).as_deref(), Some("no-db"), "{denied}");
    }
    assert_eq!(rule(asked(&p, "a.db.internal:80")).as_deref(), Some("no-db"), "before it is resolved");
    assert_eq!(reach(&p, "web.internal:80", "10.0.4.1:80"), Ok(()));
    let denied = reach(&p, "web.internal:80", "10.0.5.1:80").unwrap_err();
    assert_eq!(denied.rule().map(|rule| &**rule), Some("no-db"));
    assert!(denied.to_string().contains("which resolves to 10.0.5.1:80"), "{denied}");
    let none = HeaderMap::new();
    for of_c in ["web.internal:80", "10.0.4.1:80"] {
        let denied = decide(&p, "spiffe://example.org/ns/c/sa/web", of_c, "10.0.4.1:80", &none).unwrap_err();
        assert_eq!(denied.rule().map(|rule| &**rule), Some("nothing-for-c"), "{of_c}");
    }
    // As it is written, too.
    let mapped = of("[[policy]]\naction = \"deny\"\nidentity = \"any\"\ntarget = [\"64:ff9b::/96\"]\n\
        [[policy]]\nidentity = \"any\"\ntarget = [\"0.0.0.0/0\"]\n");
    assert_eq!(addr(&mapped, "10.0.4.1:80"), Ok(()));
    assert_eq!(rule(addr(&mapped, "[64:ff9b::10.0.4.1]:80")).as_deref(), Some("policy-1"));
}

/// A peer that is refused learns neither the policy nor the address that its name resolved to.
#[test]
fn what_a_peer_is_told_holds_no_address_that_it_did_not_write() {
    let p = of(r#"
        [[policy]]
        name = "secret-rule"
        action = "deny"
        identity = "any"
        target = ["10.0.5.0/24"]
        [[policy]]
        identity = "any"
        target = ["10.0.0.0/8", "named.internal"]
    "#);
    for at in ["10.0.5.1:80", "203.0.113.1:80", "169.254.169.254:80", "127.0.0.1:80"] {
        for name in ["named.internal:80", "other.internal:80"] {
            let Err(denied) = reach(&p, name, at) else { continue };
            let told = denied.public(&name.parse().unwrap());
            let ip = at.split(':').next().unwrap();
            assert!(!told.contains(ip) && !told.contains("secret") && told.contains(name), "{told}");
            assert!(denied.to_string().contains(ip), "{denied}");
        }
    }
    let literal: Target = "169.254.169.254:80".parse().unwrap();
    let denied = addr(&p, "169.254.169.254:80").unwrap_err();
    assert!(denied.public(&literal).contains("169.254.169.254"), "it wrote that itself");
}

/// A client's network and headers of its request are conditions like its identity.
#[test]
fn clients_and_headers_are_conditions() {
    let p = of(r#"
        [[policy]]
        identity = "any"
        client = ["10.77.0.0/24"]
        target = ["10.0.0.0/24", "10.0.3.0/24:80"]
        [[policy]]
        identity = "any"
        client = ["10.78.0.0/24"]
        target = ["10.0.1.0/24"]
        [[policy]]
        identity = "any"
        target = ["10.0.2.0/24", "team.internal"]
        headers = [{ name = "x-team", exact = "red" }]
        [[policy]]
        action = "deny"
        identity = "any"
        target = "any"
        headers = [{ name = "x-blocked", present = true }]
    "#);
    let headers = |name: &'static str, value: &'static str| {
        HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
    };
    let of = |target: &str, headers: &HeaderMap| decide(&p, WEB, target, target, headers);
    let none = HeaderMap::new();
    assert_eq!(of("10.0.0.1:80", &none), Ok(0));
    assert!(of("10.0.1.1:80", &none).is_err(), "another client's");
    assert!(of("10.0.2.1:80", &none).is_err() && of("10.0.2.1:80", &headers("x-team", "blue")).is_err());
    assert_eq!(of("10.0.2.1:80", &headers("x-team", "red")), Ok(2));
    let denied = of("10.0.0.1:80", &headers("x-blocked", "")).unwrap_err();
    assert_eq!(denied.rule().map(|rule| &**rule), Some("policy-4"));
    // A name is not resolved for whom no address could be allowed.
    let peer = p.peer(who(WEB), ClientAddr("10.79.0.1:1".parse().unwrap()));
    let target = "web.example:443".parse().unwrap();
    assert!(p.check_target(Request { who: &peer, target: &target, headers: Some(&none) }).is_err());
}

/// A policy in report mode decides nothing, and is named where it would have decided otherwise.
#[test]
fn a_policy_in_report_mode_only_reports() {
    let p = of(r#"
        [[policy]]
        identity = "any"
        target = ["10.0.0.0/24"]
        [[policy]]
        name = "strict"
        mode = "report"
        action = "deny"
        identity = "any"
        target = ["10.0.0.128/25"]
        [[policy]]
        name = "wider"
        mode = "report"
        identity = "any"
        target = ["10.0.1.0/24"]
    "#);
    assert!(p.reports());
    let peer = p.peer(None, client());
    for (text, allowed, differs) in [
        ("10.0.0.1:80", true, None),
        ("10.0.0.200:80", true, Some(1)),
        ("10.0.1.1:80", false, Some(2)),
        ("10.0.2.1:80", false, None),
    ] {
        let target: Target = text.parse().unwrap();
        let request = Request { who: &peer, target: &target, headers: None };
        let Target::Addr(at) = target else { unreachable!() };
        assert_eq!(p.check_target(request).is_ok(), allowed, "{text}");
        assert_eq!(p.would_differ(request, Some(at), allowed), differs, "{text}");
    }
}

/// An explanation names the policy that decides, and for each other one the first condition that does not hold.
#[test]
fn an_explanation_says_why_each_policy_does_not_match() {
    let p = of(r#"
        [[policy]]
        name = "db"
        identity = ["spiffe://example.org/ns/*/sa/db"]
        target = ["10.0.0.0/24"]
        [[policy]]
        name = "office"
        identity = "any"
        client = ["192.0.2.0/24"]
        target = ["10.0.0.0/24"]
        [[policy]]
        name = "red"
        identity = "any"
        target = ["10.0.0.0/24"]
        headers = [{ name = "x-team", exact = "red" }]
        [[policy]]
        name = "tls"
        identity = "any"
        target = ["10.0.0.0/24:443"]
        [[policy]]
        name = "elsewhere"
        identity = "any"
        target = ["10.1.0.0/24", "*.internal"]
        [[policy]]
        name = "web"
        identity = "any"
        target = ["10.0.0.0/24:80"]
    "#);
    let (identity, headers) = (who(WEB), HeaderMap::new());
    let question = |target, addr: Option<SocketAddr>| {
        let question =
            Question { identity: identity.as_ref(), client: client(), target, addr, headers: Some(&headers) };
        p.explain(&question)
    };
    let literal = "10.0.0.1:80".parse().unwrap();
    let said = question(&literal, None);
    assert_eq!(said.verdict, Verdict::Allowed(5));
    let why: Vec<_> = said.policies.into_iter().map(|policy| policy.mismatch).collect();
    let wanted = [
        Some(Mismatch::Identity),
        Some(Mismatch::Client),
        Some(Mismatch::Header("x-team".into())),
        Some(Mismatch::Port),
        Some(Mismatch::Target),
        None,
    ];
    assert_eq!(why, wanted);
    let name = "web.example:80".parse().unwrap();
    let said = question(&name, None);
    assert_eq!(
        (said.verdict, said.policies[5].mismatch.clone()),
        (Verdict::Unresolved, Some(Mismatch::Unresolved))
    );
    assert_eq!(question(&name, Some("10.0.0.1:80".parse().unwrap())).verdict, Verdict::Allowed(5));
    let denied = question(&name, Some("10.9.0.1:80".parse().unwrap())).verdict;
    assert!(matches!(denied, Verdict::Denied(Denied::Resolved { .. })), "{denied:?}");
}

fn any_rule() -> impl Strategy<Value = Policy> {
    let names =
        prop_oneof![Just("s://a/x"), Just("s://a/*"), Just("s://a/y"), Just("s://a/**"), Just("s://b/x/**")];
    let peers = prop_oneof![
        2 => Just(Peers::Any),
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
        Just("64:ff9b::/96"),
        Just("[fe80::/10]:80"),
        Just("*.internal"),
        Just("web.internal:80"),
        Just("10.9.0.1:15008"),
        Just("10.9.0.0/16"),
    ];
    let targets = prop::collection::vec(target, 1..4)
        .prop_map(|target| Targets::Of(target.into_iter().map(|t| t.parse().unwrap()).collect()));
    let clients = prop_oneof![
        3 => Just(vec![]),
        1 => prop::collection::vec(prop_oneof![Just("10.77.0.0/24"), Just("10.77.0.1"), Just("10.0.0.0/8"), Just("::/0")], 1..3),
    ];
    let value = prop::sample::select(vec![
        ValueMatch::Present(true),
        ValueMatch::Present(false),
        ValueMatch::Exact("1".to_owned()),
        ValueMatch::Exact("2".to_owned()),
        ValueMatch::Prefix("1".to_owned()),
    ]);
    let headers = prop_oneof![3 => Just(Vec::new()), 2 => prop::collection::vec(value, 1..3)];
    let kind = prop::sample::select(vec![
        (PolicyAction::Allow, PolicyMode::Enforce),
        (PolicyAction::Allow, PolicyMode::Enforce),
        (PolicyAction::Allow, PolicyMode::Enforce),
        (PolicyAction::Deny, PolicyMode::Enforce),
        (PolicyAction::Allow, PolicyMode::Report),
        (PolicyAction::Deny, PolicyMode::Report),
    ]);
    (kind, peers, targets, any::<prop::sample::Index>(), clients, headers).prop_map(
        |((action, mode), identity, target, any, client, values)| Policy {
            name: String::new(),
            action,
            mode,
            identity,
            client: client.into_iter().map(|net| net.parse().unwrap()).collect(),
            target: if action == PolicyAction::Deny && any.index(4) == 0 { Targets::Any } else { target },
            headers: values
                .into_iter()
                .map(|value| HeaderMatch { name: HeaderName::from_static("x-a"), value })
                .collect(),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]
    /// By look-up every request gets the decision, the policy and the words that it gets from the policies one after the other.
    #[test]
    fn the_index_decides_as_one_rule_after_the_other(
        rules in prop::collection::vec(any_rule(), 0..8),
        name in prop::sample::select(vec![None, Some("s://a/x"), Some("s://a/z/y"), Some("s://b/x"), Some("s://b/x/y")]),
        from in prop::sample::select(vec!["10.77.0.1:1", "10.77.1.1:1", "[::ffff:10.77.0.1]:1", "[fd00::1]:1"]),
        header in prop::sample::select(vec![None, Some("1"), Some("2"), Some("3")]),
        host in prop::sample::select(vec![
            "10.1.0.1", "10.2.0.1", "11.0.0.1", "169.254.169.254", "[::ffff:10.1.0.1]", "[64:ff9b::a01:1]",
            "[fe80::1]", "[2001:db8::1]", "10.9.0.1", "web.internal", "db.internal", "web.example",
        ]),
        port in prop::sample::select(vec![79_u16, 80, 81, 82, 15008]),
        ip in prop::sample::select(vec![
            "10.1.0.1", "10.9.0.1", "127.0.0.1", "169.254.169.254", "fe80::1", "64:ff9b::a01:1",
        ]),
    ) {
        let listeners = ["0.0.0.0:15008".parse().unwrap()];
        let mut p = Policies::new(rules, &listeners);
        p.own = OwnListeners::with_local(&listeners, |ip| Some(ip.to_string() == "10.9.0.1"));
        let (identity, client) = (name.and_then(who), ClientAddr(from.parse().unwrap()));
        let mut headers = HeaderMap::new();
        if let Some(value) = header {
            headers.insert("x-a", HeaderValue::from_static(value));
        }
        let peer = p.peer(identity.clone(), client);
        let target: Target = format!("{host}:{port}").parse().unwrap();
        let request = Request { who: &peer, target: &target, headers: Some(&headers) };
        let explain = |addr| {
            let identity = identity.as_ref();
            p.explain(&Question { identity, client, target: &target, addr, headers: Some(&headers) }).verdict
        };
        let addr = match target {
            Target::Addr(addr) => addr,
            Target::Name(..) => SocketAddr::new(ip.parse().unwrap(), port),
        };
        let permit = p.check_target(request);
        let asked = match &permit {
            Ok(permit) => permit.rule().map_or(Verdict::Unresolved, Verdict::Allowed),
            Err(denied) => Verdict::Denied(denied.clone()),
        };
        prop_assert_eq!(asked, explain(None));
        let dialled = permit.and_then(|permit| permit.allows_addr(addr));
        prop_assert_eq!(dialled.map_or_else(Verdict::Denied, Verdict::Allowed), explain(Some(addr)));
        // Those in report mode.
        for allowed in [true, false] {
            let wanted = if allowed { PolicyAction::Deny } else { PolicyAction::Allow };
            let naive = |addr: Option<SocketAddr>| {
                let identity = identity.as_ref();
                let asked = Question { identity, client, target: &target, addr, headers: Some(&headers) };
                let said = p.explain(&asked).policies;
                said.iter().position(|a| a.report && a.action == wanted && a.mismatch.is_none())
            };
            if let Target::Addr(at) = target {
                prop_assert_eq!(p.would_differ(request, Some(at), allowed), naive(None));
            } else {
                prop_assert_eq!(p.would_differ(request, None, allowed), naive(None));
            }
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
