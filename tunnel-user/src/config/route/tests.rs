//! Routes as their writer sees them: what is taken, what is said about mistakes.
//!
//! Every message is compared whole.

use std::time::Duration;

use super::*;
use crate::config::tests::{mistakes, parse};

/// A gateway whose second route says everything that a route can.
const ROUTES: &str = r#"
[identity]
cert = "a.pem"
key = "a-key.pem"
ca = "ca.pem"

[[listener]]
name = "public"
address = "0.0.0.0:15008"

[[capture]]
cgroup = "/sys/fs/cgroup/app.slice"

[[capture]]
name = "batch"
unit = "batch.service"

[[upstream]]
name = "next"
endpoints = ["10.9.0.2:15008"]

[[route]]
match = { capture = ["batch", "/sys/fs/cgroup/app.slice"] }
to = { dial = "db.internal:5432" }
timeout = "3s"

[[route]]
authority = "web.internal:443"
timeout = "250ms"
to = [{ upstream = "next" }]

[route.match]
source = ["listener"]
listener = ["public"]
destination = ["10.0.0.0/8:80"]
host = ["*.internal"]
identity = ["spiffe://example.org/ns/*/sa/web"]
server_name = ["gw.internal"]
headers = [{ name = "x-route", exact = "canary" }, { name = "X-Version", regex = "v[0-9]+" }]

[route.request_headers]
copy = ["x-route"]
remove = ["forwarded"]
add = { x-hop = "1" }
"#;

#[test]
fn a_route_says_which_flows_where_to_and_on_which_terms() {
    let c = parse(ROUTES).unwrap();
    assert_eq!(c.listeners[0].name.as_deref(), Some("public"));
    let called: Vec<_> = c.captures.iter().map(|c| c.name.as_deref()).collect();
    assert_eq!(called, [Some("/sys/fs/cgroup/app.slice"), Some("batch")]);
    let [rewrite, chain] = &c.routes[..] else { panic!("two routes") };
    assert_eq!(rewrite.to, Action::Dial("db.internal:5432".parse().unwrap()));
    assert_eq!(rewrite.terms.timeout, Some(Duration::from_secs(3)));
    let Match { source, listener, destination, host, identity, server_name, headers, .. } = &chain.matches;
    assert_eq!((source.len(), listener.len(), destination.len(), host.len()), (1, 1, 1, 1));
    assert_eq!((identity.len(), server_name.len(), headers.len()), (1, 1, 2));
    assert_eq!(headers[1].name, "x-version");
    let Terms { timeout, authority, headers, .. } = &chain.terms;
    assert_eq!(*timeout, Some(Duration::from_millis(250)));
    assert_eq!(*authority, Authority::Is("web.internal:443".parse().unwrap()));
    let HeaderChanges { copy, remove, add } = headers;
    assert_eq!((copy.len(), remove.len(), add.len()), (1, 1, 1));
    for (text, wanted) in
        [("{destination}", Authority::Destination), ("{sni}", Authority::Sni), ("{host}", Authority::Host)]
    {
        let said = parse(&ROUTES.replace("web.internal:443", text)).unwrap();
        assert_eq!(said.routes[1].terms.authority, wanted);
        assert_eq!(said.routes[1].needs_sniff(), wanted != Authority::Destination);
    }
    let inside = "sni = [\"*.internal\"]\nhttp_host = [\"web.internal\"]\nsource = [\"listener\"]";
    let inside = parse(&ROUTES.replace("source = [\"listener\"]", inside)).unwrap();
    assert!(inside.routes[1].needs_sniff() && !inside.routes[0].needs_sniff());
}

#[test]
fn captures_are_named_by_their_cgroups_too() {
    for (cgroup, wanted) in [
        ("/sys/fs/cgroup/app.slice", &["/sys/fs/cgroup/app.slice"][..]),
        ("/sys/fs/cgroup/*", &["/sys/fs/cgroup/app.slice"]),
        ("batch.service", &["batch"]),
    ] {
        let said = format!("cgroup = [\"{cgroup}\"]");
        let routes =
            parse(&ROUTES.replace("capture = [\"batch\", \"/sys/fs/cgroup/app.slice\"]", &said)).unwrap();
        assert_eq!(routes.routes[0].matches.capture, wanted);
    }
    for (wanted, group, is) in
        [("/a/*", "/a/b", true), ("/a/*", "/a", false), ("/a/*", "/ab", false), ("/a/*", "/a/", false)]
    {
        assert_eq!(is_group(wanted, group), is, "{wanted} {group}");
    }
}

#[test]
fn an_authority_that_no_connection_of_the_route_has_is_a_mistake() {
    for (asked, authority) in [("sni", "{host}"), ("http_host", "{sni}")] {
        let text = ROUTES.replace("web.internal:443", authority);
        let said = mistakes(&text.replace("source = [\"listener\"]", &format!("{asked} = [\"a.b\"]")));
        let why = "is what no connection has that match takes: it is TLS, or HTTP, and not both";
        assert_eq!(said, [format!("28:13: route.authority: {why}")]);
    }
}

/// Each mistake in a route is reported with its key and the reason.
#[test]
fn each_mistake_in_a_route_is_named() {
    for (from, to, said) in [
        (
            "listener = [\"public\"]",
            "listener = [\"pubic\"]",
            "34:13: route.match.listener[0]: no listener is named \"pubic\", did you mean \"public\"?",
        ),
        (
            "[\"batch\", ",
            "[\"batch.service\", ",
            "23:22: route.match.capture[0]: no capture is named \"batch.service\"",
        ),
        (
            "source = [\"listener\"]",
            "source = [\"captured\"]",
            "34:12: route.match.listener: names flows that source leaves out: nothing would match",
        ),
        (
            "[\"gw.internal\"]",
            "[\"gw.internal:443\"]",
            "38:16: route.match.server_name[0]: has ports: it is what a peer called us, and not a target",
        ),
        (
            "regex = \"v[0-9]+\"",
            "regex = \"v[0-9+\"",
            "39:82: route.match.headers[1].regex: \"v[0-9+\": not a regular expression: unclosed character class",
        ),
        (
            "regex = \"v[0-9]+\"",
            "regex = \"(a{1000}){1000}\"",
            "39:82: route.match.headers[1].regex: \"(a{1000}){1000}\": the regular expression is too large once it is compiled",
        ),
        (
            ", exact = \"canary\"",
            "",
            "39:12: route.match.headers[0]: says nothing of the value: exact, prefix, present or regex is missing",
        ),
        (
            "exact = \"canary\"",
            "exact = \"canary\", prefix = \"c\"",
            "39:59: route.match.headers[0].prefix: stands beside exact: only one of them can be meant",
        ),
        (
            "name = \"x-route\"",
            "name = \":path\"",
            "39:21: route.match.headers[0].name: \":path\" is not a header name",
        ),
        (
            "source = [\"listener\"]",
            "path = \"/\"",
            "33:8: route.match.path: can never match: a CONNECT request has no :path (RFC 9113 section 8.5), and one that has is refused before it is routed",
        ),
        (
            "source = [\"listener\"]",
            "cgroup = [\"/sys/fs/cgroup/other.slice\"]",
            "33:11: route.match.cgroup[0]: no capture is of \"/sys/fs/cgroup/other.slice\"",
        ),
        (
            "capture = [\"batch\", ",
            "cgroup = [\"batch.service\"], capture = [\"batch\", ",
            "23:20: route.match.cgroup: stands beside capture: only one of them can be meant",
        ),
        (
            "copy = [\"x-route\"]",
            "copy = [\":path\"]",
            "42:9: route.request_headers.copy[0]: \":path\" is a pseudo-header, which only the tunnel itself sets",
        ),
        (
            "copy = [\"x-route\"]",
            "copy = [\"TE\"]",
            "42:9: route.request_headers.copy[0]: \"TE\" is set by the tunnel itself, or has no place in a CONNECT request",
        ),
        (
            "add = { x-hop",
            "add = { Via",
            "44:15: route.request_headers.add.Via: \"Via\" is set by the tunnel itself, or has no place in a CONNECT request",
        ),
        (
            "remove = [\"forwarded\"]",
            "remove = [\"Via\"]",
            "43:11: route.request_headers.remove[0]: \"via\" has to stay: it is what loops are found by",
        ),
        (
            "source = [\"listener\"]",
            "sni = [\"a:443\"]",
            "33:8: route.match.sni[0]: has ports: it is what a client asks for, and destination says at which port",
        ),
        (
            "\"web.internal:443\"",
            "\"{sni}:443\"",
            "28:13: route.authority: must be \"{destination}\", \"{sni}\", \"{host}\" or HOST:PORT, not \"{sni}:443\"",
        ),
        (
            "\"web.internal:443\"",
            "\"web.internal\"",
            "28:13: route.authority: \"web.internal\": authority has no port",
        ),
        (
            "to = { dial = \"db.internal:5432\" }",
            "to = { dial = \"db.internal\" }",
            "24:15: route.to.dial: \"db.internal\": authority has no port",
        ),
        (
            "to = { dial = \"db.internal:5432\" }",
            "to = \"deny\"",
            "25:11: route.timeout: has no meaning where \"to\" refuses",
        ),
        ("timeout = \"250ms\"", "retries = 11", "29:11: route.retries: must be from 0 to 10, not 11"),
        (
            "timeout = \"3s\"",
            "retries = 1",
            "25:11: route.retries: is for the CONNECT request to an upstream, and \"to\" names none",
        ),
        (
            "timeout = \"250ms\"",
            "proxy_protocol = \"v2\"",
            "29:18: route.proxy_protocol: is for what is dialled from here, and \"to\" names upstreams",
        ),
        (
            "timeout = \"3s\"",
            "proxy_protocol = \"v1\"",
            "25:18: route.proxy_protocol: must be \"v2\", not \"v1\"",
        ),
        (
            "timeout = \"3s\"",
            "authority = \"a:1\"",
            "25:13: route.authority: is for the CONNECT request to an upstream, and \"to\" names none",
        ),
        (
            "name = \"batch\"",
            "name = \"batch\"\nunit = \"a.service\"\n[[capture]]\nname = \"batch\"",
            "18:8: capture.name: another capture is named \"batch\" already",
        ),
    ] {
        assert!(ROUTES.contains(from), "{from}");
        assert_eq!(mistakes(&ROUTES.replacen(from, to, 1)), [said]);
    }
}
