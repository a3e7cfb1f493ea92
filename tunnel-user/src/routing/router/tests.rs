//! Which route takes a flow: by example, and for any routes as they stand, one after the other. The linear definition is the
//! specification.

use http::{HeaderMap, HeaderName, HeaderValue, Version};
use proptest::prelude::*;

use super::*;
use crate::{
    config::{Authority, HeaderMatch, Terms, ValueMatch},
    model::{
        flow::{ClientAddr, Direction, Head, Transport},
        san::San,
    },
};

/// A flow, owned.
#[derive(Clone, Debug)]
struct Told {
    source: SourceKind,
    name: Option<&'static str>,
    target: Target,
    who: Option<Identity>,
    server_name: Option<&'static str>,
    headers: Option<HeaderMap>,
    sniffed: Option<Sniffed>,
}

impl Told {
    fn captured(target: &str) -> Self {
        let target = target.parse().unwrap();
        Self {
            source: SourceKind::Capture,
            name: None,
            target,
            who: None,
            server_name: None,
            headers: None,
            sniffed: None,
        }
    }

    fn asked(target: &str) -> Self {
        Self { source: SourceKind::Listener, headers: Some(HeaderMap::new()), ..Self::captured(target) }
    }

    fn by(self, who: &str) -> Self {
        Self { who: Some(Identity(who.into())), ..self }
    }

    fn named(self, name: &'static str) -> Self {
        Self { name: Some(name), ..self }
    }

    fn calling(self, server_name: &'static str) -> Self {
        Self { server_name: Some(server_name), ..self }
    }

    fn saying(mut self, name: &'static str, value: &str) -> Self {
        let headers = self.headers.get_or_insert_default();
        headers.append(HeaderName::from_static(name), HeaderValue::try_from(value).unwrap());
        self
    }

    fn showing(self, inside: Sniffed) -> Self {
        Self { sniffed: Some(inside), ..self }
    }

    fn with<T>(&self, router: &Router, look: impl FnOnce(&Flow<'_>) -> T) -> T {
        let peer = router.peer(self.who.as_ref());
        let client = ClientAddr("192.0.2.1:40000".parse().unwrap());
        let request = self.headers.as_ref().map(|headers| Head { version: Version::HTTP_2, headers });
        look(&Flow {
            transport: Transport::Tcp,
            direction: Direction::Outbound,
            source: self.source,
            name: self.name,
            target: &self.target,
            client,
            identity: self.who.as_ref(),
            peer: &peer,
            server_name: self.server_name,
            request,
            sniffed: self.sniffed.as_ref(),
        })
    }
}

fn all<T: std::str::FromStr<Err: std::fmt::Debug>>(texts: &[&str]) -> Vec<T> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn route(matches: Match, to: Action) -> Route {
    Route::new(matches, to)
}

fn numbered_name(i: usize) -> UpstreamName {
    i.to_string().into()
}

fn number(name: &UpstreamName) -> usize {
    name.parse().unwrap()
}

/// Routes that each go through an upstream of their own.
fn numbered(matches: Vec<Match>) -> Router {
    let own = |(i, matches)| route(matches, Action::Upstreams(vec![(numbered_name(i), 1)]));
    Router::new(matches.into_iter().enumerate().map(own).collect())
}

/// The number of the route that takes it.
fn taken(router: &Router, told: &Told) -> Option<usize> {
    told.with(router, |flow| match router.decide(flow, 0) {
        Decision::Upstream { upstream, .. } => Some(number(upstream)),
        _ => None,
    })
}

/// The same; nothing where the router wants to look first.
fn decided(router: &Router, told: &Told) -> Option<Option<usize>> {
    told.with(router, |flow| match router.decide(flow, 0) {
        Decision::NeedsSniff => None,
        Decision::Upstream { upstream, .. } => Some(Some(number(upstream))),
        _ => Some(None),
    })
}

#[test]
fn the_first_match_wins_and_no_match_is_refused() {
    let to = |destination: &[&str]| Match { destination: all(destination), ..Match::default() };
    let router = Router::new(vec![
        route(to(&["10.1.0.0/16"]), Action::Deny),
        route(
            Match { source: vec![SourceKind::Capture], ..to(&["10.0.0.0/8:80"]) },
            Action::Upstreams(vec![(numbered_name(3), 1)]),
        ),
        route(
            Match { source: vec![SourceKind::Listener], host: all(&["*.internal"]), ..Match::default() },
            Action::Direct,
        ),
        route(
            Match { source: vec![SourceKind::Listener], host: all(&["db.example:5432"]), ..Match::default() },
            Action::Dial("10.3.0.1:5432".parse().unwrap()),
        ),
    ]);
    let decide = |told: Told| {
        told.with(&router, |flow| match router.decide(flow, 0) {
            Decision::Upstream { upstream, .. } => upstream.to_string(),
            Decision::Dial { instead: None, .. } => "direct".to_owned(),
            Decision::Dial { instead: Some(target), .. } => target.to_string(),
            Decision::Deny { .. } => "deny".to_owned(),
            Decision::NoRoute => "none".to_owned(),
            Decision::NeedsSniff => "look".to_owned(),
        })
    };
    assert_eq!(decide(Told::captured("10.1.0.1:80")), "deny");
    assert_eq!(decide(Told::captured("10.2.0.1:80")), "3");
    assert_eq!(decide(Told::captured("[::ffff:10.2.0.1]:80")), "3");
    assert_eq!(decide(Told::captured("10.2.0.1:81")), "none");
    assert_eq!(decide(Told::asked("10.2.0.1:80")), "none");
    assert_eq!(decide(Told::asked("a.internal:80")), "direct");
    assert_eq!(decide(Told::asked("a.example:80")), "none");
    assert_eq!(decide(Told::asked("db.example:5432")), "10.3.0.1:5432");
}

#[test]
fn an_address_and_a_name_may_stand_in_one_route() {
    let either = Match {
        destination: all(&["10.0.0.0/8:80"]),
        host: all(&["*.internal", "web.example:443"]),
        ..Match::default()
    };
    let router = numbered(vec![either]);
    for (target, is) in [
        ("10.0.0.1:80", true),
        ("10.0.0.1:81", false),
        ("a.internal:9", true),
        ("internal:9", false),
        ("web.example:443", true),
        ("web.example:80", false),
    ] {
        assert_eq!(taken(&router, &Told::captured(target)).is_some(), is, "{target}");
    }
}

#[test]
fn listeners_and_captures_are_told_apart_by_their_names() {
    let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let router = numbered(vec![
        Match { listener: names(&["public", "other"]), ..Match::default() },
        Match { capture: names(&["batch"]), ..Match::default() },
        Match { listener: names(&["inner"]), capture: names(&["web.service"]), ..Match::default() },
    ]);
    let target = "10.0.0.1:80";
    for (told, wanted) in [
        (Told::asked(target).named("public"), Some(0)),
        (Told::captured(target).named("public"), None),
        (Told::captured(target).named("batch"), Some(1)),
        (Told::asked(target).named("batch"), None),
        (Told::asked(target).named("inner"), Some(2)),
        (Told::captured(target).named("web.service"), Some(2)),
        (Told::captured(target), None),
    ] {
        assert_eq!(taken(&router, &told), wanted, "{told:?}");
    }
}

#[test]
fn peers_are_told_apart_by_who_they_are_and_what_they_called_us() {
    let router = numbered(vec![
        Match { identity: all(&["spiffe://example.org/ns/*/sa/web", "web.example"]), ..Match::default() },
        Match { server_name: all(&["gw.internal", "*.gw.internal"]), ..Match::default() },
    ]);
    let told = || Told::asked("10.0.0.1:80");
    assert_eq!(taken(&router, &told().by("spiffe://example.org/ns/a/sa/web")), Some(0));
    assert_eq!(taken(&router, &told().by("WEB.example")), Some(0));
    assert_eq!(taken(&router, &told().by("spiffe://example.org/ns/a/sa/db")), None);
    assert_eq!(taken(&router, &told().calling("GW.internal")), Some(1));
    assert_eq!(taken(&router, &told().calling("a.gw.internal")), Some(1));
    assert_eq!(taken(&router, &told().calling("gw.example")), None);
    assert_eq!(taken(&router, &told()), None);
}

#[test]
fn headers_are_matched_line_by_line_and_all_conditions_have_to_hold() {
    let header = |value| HeaderMatch { name: HeaderName::from_static("x-route"), value };
    let regex = |text: &str| ValueMatch::Regex(text.parse().unwrap());
    let one = |value| Match { headers: vec![header(value)], ..Match::default() };
    let told = |lines: &[&str]| lines.iter().fold(Told::asked("10.0.0.1:80"), |t, l| t.saying("x-route", l));
    for (value, lines, is) in [
        (ValueMatch::Exact("canary".into()), &["canary"][..], true),
        (ValueMatch::Exact("canary".into()), &["stable", "canary"], true),
        (ValueMatch::Exact("canary".into()), &["Canary"], false),
        (ValueMatch::Exact("canary".into()), &["canary-2"], false),
        (ValueMatch::Exact("canary".into()), &[], false),
        (ValueMatch::Prefix("canary".into()), &["canary-2"], true),
        (ValueMatch::Prefix("canary".into()), &["a canary"], false),
        (ValueMatch::Present(true), &[""], true),
        (ValueMatch::Present(true), &[], false),
        (ValueMatch::Present(false), &[], true),
        (ValueMatch::Present(false), &["x"], false),
        (regex("v[0-9]+|latest"), &["v12"], true),
        (regex("v[0-9]+|latest"), &["latest"], true),
        (regex("v|v1"), &["v1"], true),
        (regex("v[0-9]+|latest"), &["v12 "], false),
        (regex("v[0-9]+|latest"), &["the latest"], false),
        (regex("(?i)canary"), &["CANARY"], true),
    ] {
        let said = format!("{value:?} {lines:?}");
        assert_eq!(taken(&numbered(vec![one(value)]), &told(lines)).is_some(), is, "{said}");
    }
    let both = Match {
        headers: vec![
            header(ValueMatch::Exact("canary".into())),
            HeaderMatch { name: HeaderName::from_static("x-team"), value: ValueMatch::Present(true) },
        ],
        ..Match::default()
    };
    let router = numbered(vec![both]);
    assert_eq!(taken(&router, &told(&["canary"])), None);
    assert_eq!(taken(&router, &told(&["canary"]).saying("x-team", "a")), Some(0));
    let captured = Told::captured("10.0.0.1:80");
    assert_eq!(taken(&numbered(vec![one(ValueMatch::Present(true))]), &captured), None);
    assert_eq!(taken(&numbered(vec![one(ValueMatch::Present(false))]), &captured), Some(0));
}

#[test]
fn weights_divide_the_flows_exactly() {
    let shares =
        Action::Upstreams(vec![(numbered_name(0), 90), (numbered_name(1), 0), (numbered_name(2), 10)]);
    let router = Router::new(vec![route(Match::default(), shares)]);
    let told = Told::captured("10.0.0.1:80");
    let decide = |random| {
        told.with(&router, |flow| match router.decide(flow, random) {
            Decision::Upstream { upstream, .. } => number(upstream),
            other => panic!("{other:?}"),
        })
    };
    let mut count = [0; 3];
    for i in 0..1000u32 {
        count[decide(i * (u32::MAX / 1000))] += 1;
    }
    assert_eq!(count[1], 0);
    assert!((899..=901).contains(&count[0]), "{count:?}");
    assert_eq!(decide(u32::MAX), 2);
}

/// A flow is sniffed only where a route that could be the first to match depends on it.
#[test]
fn what_a_client_sends_is_looked_at_only_where_it_decides() {
    let sni = |names: &[&str]| Match { sni: all(names), ..Match::default() };
    let web = || Match { destination: all(&["10.0.0.0/8:443"]), ..Match::default() };
    let router = numbered(vec![
        Match { destination: all(&["10.1.0.0/16"]), ..Match::default() },
        Match { sni: all(&["*.internal"]), ..web() },
        Match { sni: all(&["both.example"]), http_host: all(&["both.example"]), ..web() },
        web(),
        sni(&["late.internal"]),
    ]);
    let told = || Told::captured("10.2.0.1:443");
    assert_eq!(decided(&router, &Told::captured("10.1.0.1:443")), Some(Some(0)), "an earlier route takes it");
    assert_eq!(decided(&router, &told()), None);
    assert_eq!(decided(&router, &Told::captured("10.2.0.1:80")), None, "the last route might");
    let name = |name| HostName::new(name).unwrap();
    for (inside, wanted) in [
        (Sniffed::Nothing, 3),
        (Sniffed::Sni(name("A.internal.")), 1),
        (Sniffed::Sni(name("internal")), 3),
        (Sniffed::Host(name("a.internal")), 3),
        (Sniffed::Sni(name("both.example")), 2),
        (Sniffed::Host(name("both.example")), 2),
        (Sniffed::Sni(name("late.internal")), 1),
    ] {
        assert_eq!(decided(&router, &told().showing(inside.clone())), Some(Some(wanted)), "{inside:?}");
    }
    let other = Told::captured("10.2.0.1:80").showing(Sniffed::Nothing);
    assert_eq!(decided(&router, &other), Some(None));
}

/// A route whose `authority` is made of sniffed bytes has them sniffed, and takes flows that have none.
#[test]
fn an_authority_made_of_what_is_inside_is_looked_for_and_keeps_no_flow_out() {
    let terms = Terms { authority: Authority::Sni, ..Terms::default() };
    let to = Action::Upstreams(vec![(numbered_name(0), 1)]);
    let router = Router::new(vec![Route { terms, ..Route::new(Match::default(), to) }]);
    let told = Told::captured("10.2.0.1:443");
    assert_eq!(decided(&router, &told), None);
    assert_eq!(decided(&router, &told.showing(Sniffed::Nothing)), Some(Some(0)));
}

#[test]
fn another_upstream_is_one_that_was_not_tried_and_is_in_use() {
    let [four, five, six] = [4, 5, 6].map(numbered_name);
    let shares = [(four.clone(), 90), (five, 0), (six.clone(), 10)];
    for random in [0, u32::MAX / 2, u32::MAX] {
        assert_eq!(another(&shares, &[&four], random), Some(&six));
        assert_eq!(another(&shares, &[&six], random), Some(&four));
        assert_eq!(another(&shares, &[&six, &four], random), None);
    }
}

/// The definition: every condition of one route after the other. Nothing where one is met that asks what nobody
/// has looked at.
fn linear(routes: &[Match], told: &Told) -> Option<Option<usize>> {
    let takes = |m: &Match| {
        let from = m.source.is_empty() || m.source.contains(&told.source);
        let names = if told.source == SourceKind::Capture { &m.capture } else { &m.listener };
        let named = (m.listener.is_empty() && m.capture.is_empty())
            || told.name.is_some_and(|name| names.iter().any(|n| n == name));
        let to = (m.destination.is_empty() && m.host.is_empty())
            || match &told.target {
                Target::Addr(addr) => m.destination.iter().any(|p| p.contains(*addr)),
                Target::Name(name, port) => m.host.iter().any(|p| p.contains(name, *port)),
            };
        let by = m.identity.is_empty()
            || told.who.as_ref().is_some_and(|who| m.identity.iter().any(|p| p.matches(&San::from(who))));
        let calling = m.server_name.is_empty()
            || told.server_name.is_some_and(|name| m.server_name.iter().any(|p| p.contains(name, 0)));
        let saying = m.headers.iter().all(|h| h.matches(told.headers.as_ref()));
        from && named && to && by && calling && saying
    };
    for (number, m) in routes.iter().enumerate().filter(|(_, m)| takes(m)) {
        let (sni, host) = match &told.sniffed {
            _ if m.sni.is_empty() && m.http_host.is_empty() => return Some(Some(number)),
            None => return None,
            Some(inside) => (inside.sni(), inside.host()),
        };
        let is = |names: &[NamePattern], found: Option<&HostName>| {
            found.is_some_and(|found| names.iter().any(|p| p.contains(found.as_str(), 0)))
        };
        if is(&m.sni, sni) || is(&m.http_host, host) {
            return Some(Some(number));
        }
    }
    Some(None)
}

/// None, or one or two of these.
fn some_of<T: Clone + std::fmt::Debug + 'static>(of: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec(prop::sample::select(of), 1..3)]
}

fn any_match() -> impl Strategy<Value = Match> {
    let header = HeaderMatch {
        name: HeaderName::from_static("x-route"),
        value: ValueMatch::Exact("canary".to_owned()),
    };
    let destination = all(&["0.0.0.0/0", "10.0.0.0/8:80", "10.1.0.0/16", "10.1.0.1:81", "::/0", "fd00::/8"]);
    (
        some_of(vec![SourceKind::Capture, SourceKind::Listener]),
        some_of(vec!["a".to_owned(), "b".to_owned()]),
        some_of(vec!["a".to_owned(), "b".to_owned()]),
        some_of(destination),
        some_of(all(&["*.internal", "*.b.internal:80", "a.b.internal", "web.example:81"])),
        some_of(all(&["s://t/a", "s://t/*", "*.example"])),
        some_of(all(&["gw", "*.gw"])),
        some_of(vec![header]),
        (some_of(all(&["a.inside", "*.b.inside"])), some_of(all(&["*.inside", "c.inside"]))),
    )
        .prop_map(
            |(source, listener, capture, destination, host, identity, server_name, headers, inside)| {
                let (sni, http_host) = inside;
                let to = Match { destination, host, ..Match::default() };
                Match { source, listener, capture, identity, server_name, headers, sni, http_host, ..to }
            },
        )
}

fn any_told() -> impl Strategy<Value = Told> {
    let host = prop::sample::select(vec![
        "10.1.0.1",
        "10.2.0.1",
        "11.0.0.1",
        "[::ffff:10.1.0.1]",
        "[fd00::1]",
        "[2001:db8::1]",
        "a.internal",
        "a.b.internal",
        "x.b.internal",
        "internal",
        "web.example",
    ]);
    (
        prop::bool::ANY,
        prop::option::of(prop::sample::select(vec!["a", "b", "c"])),
        (host, 80u16..83),
        prop::option::of(prop::sample::select(vec!["s://t/a", "s://t/b", "s://u/a", "a.example"])),
        prop::option::of(prop::sample::select(vec!["gw", "a.gw", "no"])),
        prop::option::of(prop::sample::select(vec!["canary", "stable"])),
        prop::option::of(any_inside()),
    )
        .prop_map(|(captured, name, (host, port), who, server_name, header, inside)| {
            let target = format!("{host}:{port}");
            let told = if captured { Told::captured(&target) } else { Told::asked(&target) };
            let told =
                Told { name, who: who.map(|w| Identity(w.into())), server_name, sniffed: inside, ..told };
            header.into_iter().fold(told, |told, value| told.saying("x-route", value))
        })
}

fn any_inside() -> impl Strategy<Value = Sniffed> {
    let name = prop::sample::select(vec!["a.inside", "x.b.inside", "c.inside", "elsewhere"]);
    let name = name.prop_map(|name| HostName::new(name).unwrap());
    prop_oneof![Just(Sniffed::Nothing), name.clone().prop_map(Sniffed::Sni), name.prop_map(Sniffed::Host),]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]
    #[test]
    fn the_index_decides_as_one_route_after_the_other(
        routes in prop::collection::vec(any_match(), 0..8), told in any_told(),
    ) {
        let wanted = linear(&routes, &told);
        let router = numbered(routes);
        prop_assert_eq!(decided(&router, &told), wanted);
        let explained = told.with(&router, |flow| router.explain(flow));
        let first = explained.iter().find(|e| matches!(e.verdict, Verdict::Takes | Verdict::Depends));
        let first = first.map(|e| (e.verdict == Verdict::Takes).then_some(e.route));
        prop_assert_eq!(first.map_or(Some(None), |taken| taken.map(Some)), wanted);
    }
}
