//! What every new flow costs before its first byte moves: benchmarks of the pure functions on its way, with tables of
//! 10 to 10,000 entries (`cargo bench -p tunnel-user -- --quick`). No socket is opened.
//!
//! # Invariants
//! - The entry that is looked up is the last of its table, or missing: the most expensive case.

use std::{
    hint::black_box,
    net::{Ipv4Addr, SocketAddr},
};

use criterion::{BenchmarkId, Criterion};
use http::{HeaderMap, HeaderName, HeaderValue};
use ipnet::{IpNet, Ipv4Net};
use tunnel::{
    config::{
        Action, AddrPattern, Balance, HeaderMatch, Match, Peers, Policy, PolicyAction, Route, TargetPattern,
        Terms, ValueMatch,
    },
    model::flow::{ClientAddr, Direction, Identity, SourceKind, Target, Transport},
    routing::{
        flow::Flow,
        index::NOBODY,
        policy::{self, Policies},
        router::Router,
    },
    sinks::upstream::{
        headers::{Ask, connect_request},
        pick,
    },
    sources::capture::rules::{self, Pattern, Patterns, Step},
};
use tunnel_common::{
    addr::Endpoint,
    capture::{Listener, ON_FAILURE_CLOSED, PORT_RANGES, PortRange, Rule, decide},
};

/// Prefixes in a table.
const SIZES: [u32; 3] = [10, 1_000, 10_000];

fn main() {
    let mut c = Criterion::default().configure_from_args();
    routes(&mut c);
    policies(&mut c);
    captures(&mut c);
    headers(&mut c);
    picks(&mut c);
    c.final_summary();
}

/// The `i`th /24 of 10.0.0.0/8.
fn net(i: u32) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::from(0x0a00_0000 | i << 8), 24)
}

fn prefix(i: u32) -> AddrPattern {
    AddrPattern::net_only(IpNet::V4(net(i)))
}

/// An address in the last of `size` prefixes.
fn last_of(size: u32) -> Target {
    Target::Addr(SocketAddr::from((Ipv4Addr::from(u32::from(net(size - 1).network()) | 9), 443)))
}

fn client() -> ClientAddr {
    ClientAddr(SocketAddr::from(([10, 77, 0, 1], 40000)))
}

fn spiffe(i: u32) -> String {
    format!("spiffe://example.org/ns/{i}/sa/web")
}

fn route(matches: Match) -> Route {
    Route::new(matches, Action::Direct)
}

fn to(destination: Vec<AddrPattern>) -> Route {
    route(Match { source: vec![SourceKind::Capture], destination, ..Match::default() })
}

/// What an application that wants to go to `target` is to the router.
fn captured(target: &Target) -> Flow<'_> {
    Flow {
        transport: Transport::Tcp,
        direction: Direction::Outbound,
        source: SourceKind::Capture,
        name: None,
        target,
        client: client(),
        identity: None,
        peer: &NOBODY,
        server_name: None,
        request: None,
        sniffed: None,
    }
}

fn routes(c: &mut Criterion) {
    let mut group = c.benchmark_group("route");
    for size in SIZES {
        let target = last_of(size);
        let flow = captured(&target);
        let one = Router::new(vec![to((0..size).map(prefix).collect())]);
        group.bench_with_input(BenchmarkId::new("prefixes of one route", size), &flow, |b, flow| {
            b.iter(|| black_box(one.decide(black_box(flow), 7)));
        });
        let each = Router::new((0..size).map(|i| to(vec![prefix(i)])).collect());
        group.bench_with_input(BenchmarkId::new("routes of one prefix", size), &flow, |b, flow| {
            b.iter(|| black_box(each.decide(black_box(flow), 7)));
        });
        let name = |i: u32| format!("*.a{i}.internal").parse().expect("a name");
        let names = Router::new(
            (0..size).map(|i| route(Match { host: vec![name(i)], ..Match::default() })).collect(),
        );
        let target = Target::Name(format!("web.a{}.internal", size - 1), 443);
        group.bench_with_input(
            BenchmarkId::new("routes of one name", size),
            &captured(&target),
            |b, flow| {
                b.iter(|| black_box(names.decide(black_box(flow), 7)));
            },
        );
        let of =
            |i| route(Match { identity: vec![spiffe(i).parse().expect("a SPIFFE ID")], ..Match::default() });
        let peers = Router::new((0..size).map(of).collect());
        let peer = peers.peer(Some(&Identity(spiffe(size - 1).into())));
        let flow = Flow { peer: &peer, source: SourceKind::Listener, ..captured(&target) };
        group.bench_with_input(BenchmarkId::new("routes of one identity", size), &flow, |b, flow| {
            b.iter(|| black_box(peers.decide(black_box(flow), 7)));
        });
    }
    group.finish();
}

fn policies(c: &mut Criterion) {
    let mut group = c.benchmark_group("policy");
    let who = Identity("spiffe://example.org/ns/a/sa/web".into());
    let listeners = [SocketAddr::from((Ipv4Addr::UNSPECIFIED, 15008))];
    let every = || {
        TargetPattern::Addr(AddrPattern::net_only(IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0))))
    };
    let of = |i| Peers::Of(vec![spiffe(i).parse().expect("a SPIFFE ID")]);
    let allow = |who, targets| Policy::allow("", who, targets);
    let deny = |policy| Policy { action: PolicyAction::Deny, ..policy };
    for size in SIZES {
        let last = TargetPattern::Addr(prefix(size - 1));
        let all = |policies: Vec<Policy>| Policies::new(policies, &listeners);
        // Each with the peer that asks and the last target of all.
        let sets = [
            (
                "prefixes",
                all(vec![allow(Peers::Any, (0..size).map(|i| TargetPattern::Addr(prefix(i))).collect())]),
            ),
            (
                "identities",
                all((0..size)
                    .map(|i| allow(of(i), vec![TargetPattern::Addr(prefix(i))]))
                    .chain([allow(Peers::Any, vec![last.clone()])])
                    .collect()),
            ),
            (
                "identities of the same target",
                all((0..size)
                    .map(|i| allow(of(i), vec![every()]))
                    .chain([allow(Peers::Any, vec![every()])])
                    .collect()),
            ),
            (
                "clients of the same target",
                all((0..size)
                    .map(|i| Policy { client: vec![prefix(i)], ..allow(Peers::Any, vec![every()]) })
                    .chain([allow(Peers::Any, vec![last.clone()])])
                    .collect()),
            ),
            (
                "denied prefixes",
                all((0..size - 1)
                    .map(|i| deny(allow(Peers::Any, vec![TargetPattern::Addr(prefix(i))])))
                    .chain([allow(Peers::Any, vec![every()])])
                    .collect()),
            ),
            (
                "denied identities of the same target",
                all((0..size)
                    .map(|i| deny(allow(of(i), vec![every()])))
                    .chain([allow(Peers::Any, vec![every()])])
                    .collect()),
            ),
            (
                "headers of the same target",
                all((0..size)
                    .map(|i| {
                        let value = ValueMatch::Exact(format!("team-{i}"));
                        let header = HeaderMatch { name: HeaderName::from_static("x-team"), value };
                        Policy { headers: vec![header], ..allow(Peers::Any, vec![every()]) }
                    })
                    .chain([allow(Peers::Any, vec![every()])])
                    .collect()),
            ),
        ];
        let headers =
            HeaderMap::from_iter([(HeaderName::from_static("x-team"), HeaderValue::from_static("red"))]);
        let target = last_of(size);
        for (name, policies) in &sets {
            let peer = policies.peer(Some(who.clone()), client());
            let request = policy::Request { who: &peer, target: &target, headers: Some(&headers) };
            assert!(policies.check_target(request).is_ok(), "{name}");
            group.bench_with_input(BenchmarkId::new(*name, size), &request, |b, request| {
                b.iter(|| policies.check_target(black_box(*request)).is_ok());
            });
        }
        // Once for a connection.
        let named = &sets[1].1;
        group.bench_with_input(BenchmarkId::new("a peer among identities", size), &who, |b, who| {
            b.iter(|| black_box(named.peer(Some(black_box(who).clone()), client())));
        });
    }
    group.finish();
}

fn captures(c: &mut Criterion) {
    let mut group = c.benchmark_group("capture");
    let listener = Listener::own(61001, 2, 7, true);
    for ranges in [1, PORT_RANGES] {
        let ports: Vec<_> = (1..).take(ranges).map(|i| PortRange::new(i * 100, i * 100 + 9)).collect();
        let rule = Rule::new(&ports, &[], &[]).expect("as many as fit");
        group.bench_with_input(BenchmarkId::new("decide, port ranges", ranges), &rule, |b, rule| {
            let port = u16::try_from(ranges).expect("few") * 100 + 9;
            let dst = Endpoint::from(SocketAddr::from(([10, 0, 0, 1], port)));
            b.iter(|| {
                let (rule, dst) = (black_box(Some(rule)), black_box(&dst));
                decide(rule, Some(&listener), dst, true, ON_FAILURE_CLOSED, |_, _| true, || true)
            });
        });
    }
    for size in SIZES {
        let pattern = |i| Pattern { net: IpNet::V4(net(i)), ports: vec![(80, 80), (443, 443)] };
        let mut patterns = Patterns { include: (0..size).map(pattern).collect(), ..Patterns::default() };
        let everything =
            Pattern { net: IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)), ports: vec![] };
        patterns.exclude = vec![everything.clone()];
        group.bench_with_input(BenchmarkId::new("compile prefixes", size), &patterns, |b, patterns| {
            b.iter(|| rules::compile(black_box(patterns), None).map(|r| r.v4.len()));
        });
        let captured = Patterns { include: vec![everything], ..Patterns::default() };
        let denying = |to| Step { to: vec![to], denies: true };
        let mut routes: Vec<_> = patterns.include.iter().cloned().map(denying).collect();
        routes.push(Step { to: vec![], denies: false });
        group.bench_with_input(BenchmarkId::new("compile routes that deny", size), &routes, |b, routes| {
            b.iter(|| rules::compile(&captured, Some(black_box(routes))).map(|r| r.v4.len()));
        });
    }
    group.finish();
}

fn headers(c: &mut Criterion) {
    let mut group = c.benchmark_group("CONNECT request");
    let (target, terms) = (last_of(1), Terms::default());
    let ask = Ask {
        identity: None,
        target: &target,
        instead: None,
        client: Some(client()),
        received: None,
        pseudonym: "tunnel-0",
        terms: &terms,
        marks: None,
    };
    for extra in [0, 1, 8] {
        let configured: Vec<_> = (0..extra)
            .map(|i| {
                let name = HeaderName::try_from(format!("x-mesh-{i}")).expect("a name");
                (name, HeaderValue::from_static("k8s.cluster.name=a,service.name=web"))
            })
            .collect();
        group.bench_with_input(
            BenchmarkId::new("configured headers", extra),
            &configured,
            |b, configured| {
                b.iter(|| connect_request(black_box(&ask), configured).map(|r| r.headers().len()));
            },
        );
    }
    group.finish();
}

fn picks(c: &mut Criterion) {
    let mut group = c.benchmark_group("pool");
    for endpoints in [2_usize, 16, 128] {
        let busy: Vec<usize> = (0..endpoints).map(|i| i * 37 % 11).collect();
        for balance in [Balance::LeastRequest, Balance::RoundRobin, Balance::ConsistentHash] {
            let id = BenchmarkId::new(format!("endpoints, {balance:?}"), endpoints);
            group.bench_with_input(id, &busy, |b, busy| {
                let mut turn = 0;
                b.iter(|| {
                    turn += 1;
                    let busy = black_box(busy);
                    let random = pick::mix(turn as u64);
                    let order = pick::order(balance, turn, random, || random, busy, |n| *n);
                    pick::in_order(order, busy, |n| *n as u64).next().copied()
                });
            });
        }
    }
    for connections in [1_usize, 16, 128] {
        // All full but the last.
        let free: Vec<usize> = (1..=connections).map(|i| usize::from(i == connections)).collect();
        group.bench_with_input(BenchmarkId::new("connections", connections), &free, |b, free| {
            b.iter(|| {
                let free = black_box(free);
                (pick::with_room(free, |n| *n), pick::is_nearly_full(free, |n| *n, |_| 100))
            });
        });
    }
    group.finish();
}
