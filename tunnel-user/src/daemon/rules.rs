//! The kernel's rules of a capture: what a configuration says of addresses and ports alone.
//!
//! # Invariants
//! - What they deny the router denies too, and whatever it denies by address and port alone they deny, as long as there is room.

use crate::{
    config::{self, AddrPattern, Config, DEFAULT_EXCLUDE},
    process::exit::{Cause, Failure},
    routing::router::fixed,
    sources::capture::rules::{self, Pattern, Patterns, Rules, Step},
};

/// What a capture says.
pub(super) fn said(wanted: &config::Capture) -> Patterns {
    Patterns {
        default_exclude: patterns(&DEFAULT_EXCLUDE.map(AddrPattern::net_only)),
        include: patterns(&wanted.include),
        refuse: patterns(&wanted.refuse),
        exclude: patterns(&wanted.exclude),
    }
}

/// The rules of one capture.
pub(super) fn compile(wanted: &config::Capture, config: &Config) -> Result<Rules, Failure> {
    let said = said(wanted);
    // Another proxy knows nothing of our routes.
    let routes = wanted.proxy.is_none().then(|| {
        let routes = fixed(&config.routes, wanted.name.as_deref());
        routes.map(|route| Step { to: patterns(route.to), denies: route.denies }).collect::<Vec<_>>()
    });
    rules::compile(&said, routes.as_deref()).map_err(|e| {
        Failure::Config(Cause::new(e, "Merge neighbouring ports into ranges, or capture fewer prefixes."))
    })
}

fn patterns(list: &[AddrPattern]) -> Vec<Pattern> {
    list.iter().map(|p| Pattern { net: p.net(), ports: p.ports().ranges().to_vec() }).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use http::HeaderName;
    use proptest::prelude::*;
    use tunnel_common::capture::Kind;

    use super::*;
    use crate::{
        config::{Action, Authority, Capture, HeaderMatch, Match, Route, Terms, ValueMatch, Wanted},
        model::flow::{ClientAddr, Direction, SourceKind, Target, Transport},
        routing::{
            flow::Flow,
            index::NOBODY,
            router::{Decision, Router},
        },
    };

    /// What the programs do with a destination.
    fn look(rules: &Rules, to: SocketAddr) -> Option<Kind> {
        let rule = match to.ip().to_canonical() {
            IpAddr::V4(ip) => {
                let around = rules.v4.iter().filter(|(net, _)| net.contains(&ip));
                around.max_by_key(|(net, _)| net.prefix_len()).map(|(_, rule)| rule)
            }
            IpAddr::V6(ip) => {
                let around = rules.v6.iter().filter(|(net, _)| net.contains(&ip));
                around.max_by_key(|(net, _)| net.prefix_len()).map(|(_, rule)| rule)
            }
        };
        rule.and_then(|rule| rule.look(to.port()))
    }

    fn config(captures: Vec<Capture>, routes: Vec<Route>) -> Config {
        Config { captures, routes, ..Config::empty(config::Daemon::default()) }
    }

    fn all<T: std::str::FromStr<Err: std::fmt::Debug>>(texts: &[&str]) -> Vec<T> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn loopback_link_local_and_multicast_are_left_alone_unless_they_are_named() {
        let compiled = |include: &[&str]| {
            let capture = Capture::for_exec(Wanted { capture: all(include), ..Wanted::default() });
            let every = Route::new(Match::default(), Action::Direct);
            let config = config(vec![capture], vec![every]);
            compile(&config.captures[0], &config).unwrap()
        };
        let captured = |rules: &Rules, to: &str| look(rules, to.parse().unwrap()) == Some(Kind::Captured);
        let local =
            ["127.0.0.1:80", "169.254.169.254:80", "[::1]:80", "[fe80::1]:80", "224.0.0.1:1", "0.0.0.0:1"];
        for rules in [compiled(&[]), compiled(&["0.0.0.0/0", "::/0"])] {
            assert!(local.iter().all(|to| !captured(&rules, to)));
            assert!(captured(&rules, "10.0.0.1:80") && captured(&rules, "[2001:db8::1]:80"));
        }
        let named = compiled(&["0.0.0.0/0", "127.0.0.0/8:8080", "169.254.169.254"]);
        assert!(captured(&named, "127.0.0.1:8080") && !captured(&named, "127.0.0.1:80"));
        assert!(captured(&named, "169.254.169.254:80") && !captured(&named, "169.254.0.1:80"));
    }

    #[test]
    fn a_capture_for_another_proxy_goes_by_no_routes() {
        let mut capture = Capture::for_exec(Wanted { refuse: all(&["10.1.0.0/16"]), ..Wanted::default() });
        capture.proxy = Some("127.0.0.1:1".parse().unwrap());
        let config = config(vec![capture], Vec::new());
        let rules = compile(&config.captures[0], &config).unwrap();
        assert_eq!(look(&rules, "10.0.0.1:80".parse().unwrap()), Some(Kind::Captured));
        assert_eq!(look(&rules, "10.1.0.1:80".parse().unwrap()), Some(Kind::Refused));
    }

    /// None, or one or two of these.
    fn some_of<T: Clone + std::fmt::Debug + 'static>(of: Vec<T>) -> impl Strategy<Value = Vec<T>> {
        prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(prop::sample::select(of), 1..3)]
    }

    fn any_match() -> impl Strategy<Value = Match> {
        let header = |value| HeaderMatch { name: HeaderName::from_static("x-route"), value };
        let headers = vec![header(ValueMatch::Present(false)), header(ValueMatch::Present(true))];
        let destinations = all(&[
            "0.0.0.0/0",
            "0.0.0.0/0:79,81",
            "10.0.0.0/8:80",
            "10.1.0.0/16",
            "10.1.0.1:81-82",
            "::/0",
            "fd00::/8",
            "[fd00::1]:1-80",
        ]);
        (
            some_of(vec![SourceKind::Capture, SourceKind::Listener]),
            some_of(vec!["a".to_owned(), "b".to_owned()]),
            some_of(vec!["a".to_owned(), "b".to_owned()]),
            prop_oneof![Just(Vec::new()), prop::collection::vec(prop::sample::select(destinations), 1..4)],
            some_of(all(&["*.internal"])),
            some_of(all(&["s://t/*"])),
            some_of(all(&["gw"])),
            some_of(headers),
            some_of(all(&["a.inside"])),
            some_of(all(&["*.inside"])),
        )
            .prop_map(
                |(
                    source,
                    listener,
                    capture,
                    destination,
                    host,
                    identity,
                    server_name,
                    headers,
                    sni,
                    http,
                )| {
                    let to = Match { destination, host, ..Match::default() };
                    Match {
                        source,
                        listener,
                        capture,
                        identity,
                        server_name,
                        headers,
                        sni,
                        http_host: http,
                        ..to
                    }
                },
            )
    }

    fn any_route() -> impl Strategy<Value = Route> {
        let to = prop::sample::select(vec![
            Action::Deny,
            Action::Deny,
            Action::Direct,
            Action::Dial("10.3.0.1:5432".parse().unwrap()),
            Action::Upstreams(vec![("a".into(), 1)]),
        ]);
        (any_match(), to, any::<bool>()).prop_map(|(matches, to, asks)| {
            let asks = asks && matches!(to, Action::Upstreams(_));
            let authority = if asks { Authority::Sni } else { Authority::Destination };
            Route { terms: Terms { authority, ..Terms::default() }, ..Route::new(matches, to) }
        })
    }

    fn any_destination() -> impl Strategy<Value = SocketAddr> {
        let host = prop::sample::select(vec![
            "10.1.0.1",
            "10.1.0.2",
            "10.2.0.1",
            "11.0.0.1",
            "[::ffff:10.1.0.1]",
            "[::ffff:11.0.0.1]",
            "[fd00::1]",
            "[fd00::2]",
            "[2001:db8::1]",
        ]);
        (host, 78u16..84).prop_map(|(host, port)| format!("{host}:{port}").parse().unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]
        /// Both ways: nothing is denied that the router would carry or look into, and nothing that it denies by address
        /// and port alone gets as far as the router.
        #[test]
        fn the_kernel_denies_what_the_router_denies_without_a_look_and_nothing_else(
            routes in prop::collection::vec(any_route(), 0..8),
            name in prop::option::of(prop::sample::select(vec!["a", "b", "c"])),
            to in any_destination(),
        ) {
            let mut capture = Capture::for_exec(Wanted::default());
            capture.name = name.map(str::to_owned);
            let config = config(vec![capture], routes);
            let rules = compile(&config.captures[0], &config).unwrap();
            let router = Router::new(config.routes);
            let target = Target::Addr(to);
            let flow = Flow {
                transport: Transport::Tcp,
                direction: Direction::Outbound,
                source: SourceKind::Capture,
                name,
                target: &target,
                client: ClientAddr("192.0.2.1:40000".parse().unwrap()),
                identity: None,
                peer: &NOBODY,
                server_name: None,
                request: None,
                sniffed: None,
            };
            let wanted = match router.decide(&flow, 0) {
                Decision::Deny { .. } | Decision::NoRoute => Kind::Denied,
                Decision::Upstream { .. } | Decision::Dial { .. } | Decision::NeedsSniff => Kind::Captured,
            };
            prop_assert_eq!(look(&rules, to), Some(wanted));
        }
    }
}
