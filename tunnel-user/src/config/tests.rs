//! The configuration file as its writer sees it: what is taken, what is said about mistakes.
//!
//! A message is compared whole where a person has to act on it.

use std::collections::BTreeSet;

use super::*;

const FILE: &str = "etc/agent.toml";

pub(super) fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(text, Path::new(FILE), CheckFiles::No)
}

pub(super) fn mistakes(text: &str) -> Vec<String> {
    let Err(e) = parse(text) else { panic!("it was taken") };
    e.to_string().lines().map(|l| l.strip_prefix("etc/agent.toml:").unwrap_or(l).to_owned()).collect()
}

/// A configuration without a mistake, for tests to add one to.
const GOOD: &str = r#"
[identity]
cert = "node.pem"
key = "/abs/node-key.pem"
ca = "ca.pem"

[[capture]]
unit = "legacy.service"

[[route]]
to = [{ upstream = "east", weight = 90 }, { upstream = "west" }]

[[upstream]]
name = "west"
endpoints = ["10.9.0.2:15008"]

[[upstream]]
name = "east"
endpoints = ["gw.east.internal:15008", "[fd00::1]:15008"]
sni = "gw.east"
verify = ["spiffe://example.org/gateway"]
headers = { baggage = "k8s.cluster.name=a" }
keepalive_interval = "250ms"
max_streams = 1_0
"#;

#[test]
fn what_is_written_is_what_is_meant() {
    let c = parse(GOOD).unwrap();
    let IdentitySource::Files(id) = &c.identities[&IdentityName::default()].source else {
        panic!("no files")
    };
    assert_eq!(id.cert, Path::new("etc/node.pem"));
    assert_eq!(id.key, Path::new("/abs/node-key.pem"));
    assert_eq!(c.daemon, Daemon::default());
    assert_eq!(c.captures[0].cgroup, CgroupRef::Unit("legacy.service".to_owned()));
    assert_eq!(c.captures[0].include.len(), 2);
    assert_eq!(c.routes[0].to, Action::Upstreams(vec![("east".into(), 90), ("west".into(), 1)]));
    let east = &c.upstreams[1];
    assert_eq!(east.endpoints[1], "[fd00::1]:15008".parse().unwrap());
    assert_eq!(east.headers[0].0, "baggage");
    assert_eq!(east.keepalive_interval, Duration::from_millis(250));
    assert_eq!(east.max_streams.get(), 10);
    assert_eq!(east.check().unwrap().server_name(&east.endpoints[1]).to_str(), "gw.east");
}

#[test]
fn five_mistakes_of_five_kinds_are_reported_together() {
    let text = r#"[identity]
cert = "node.pem"
key = "node-key.pem"
ca = "ca.pem"

[[listener]]
adress = "0.0.0.0:15008"

[[route]]
match = { destination = ["10.0.0.1/8:80"] }
to = [{ upstream = "est", weight = 90 }]

[[upstream]]
name = "east"
endpoints = ["10.9.0.1:15008"]
max_streams = "many"
"#;
    assert_eq!(
        mistakes(text),
        [
            "6:1: listener.address: is missing",
            "7:1: listener.adress: unknown key `adress`, did you mean `address`?",
            "10:26: route.match.destination[0]: \"10.0.0.1/8:80\": bits are set beyond the prefix; 10.0.0.0/8 \
             was probably meant, or a longer prefix",
            "11:20: route.to[0].upstream: no upstream is named \"est\", did you mean \"east\"?",
            "16:15: upstream.max_streams: must be an integer, not a string",
        ]
    );
}

/// `GOOD` with one more line in front of, or behind, a line of it.
pub(super) fn with(extra: &str, after: &str) -> String {
    let at = GOOD.find(after).unwrap() + after.len();
    format!("{}\n{extra}{}", &GOOD[..at], &GOOD[at..])
}

/// Each mistake is reported with its key and what to write in its place.
#[test]
fn each_mistake_is_named() {
    let upstream = "endpoints = [\"10.9.0.2:15008\"]";
    let capture = "unit = \"legacy.service\"";
    for (text, key, said) in [
        (
            with("bypass = \"yes\"", capture),
            "capture.bypass",
            "must be \"off\" or \"auto\" or \"on\", not \"yes\"",
        ),
        (with("protocol = \"h3\"\ntls = false", upstream), "upstream.protocol", "with TLS only"),
        (with("protocol = \"h3\"\nvia = \"west\"", upstream), "upstream.via", "no other upstream carries"),
        (
            with("protocol = \"h3\"\nhealth_check = { type = \"tcp\" }", upstream),
            "upstream.health_check",
            "tells nothing of HTTP/3",
        ),
        (with("protocol = \"auto\"\ntls = false", upstream), "upstream.protocol", "with TLS only"),
        (with("protocol = \"auto\"\nvia = \"west\"", upstream), "upstream.via", "no other upstream carries"),
        (
            with("protocol = \"h4\"", upstream),
            "upstream.protocol",
            "must be \"h2\" or \"h1\" or \"h3\" or \"auto\"",
        ),
        (with("congestion_control = \"bbr\"", upstream), "upstream.congestion_control", "the kernel's"),
        (
            with("balance = \"best\"", upstream),
            "upstream.balance",
            "must be \"least_request\" or \"round_robin\" or \"random\" or \"consistent_hash\", not \"best\"",
        ),
        (with("cgroup = \"/x\"", capture), "capture.unit", "stands beside cgroup"),
        (with("include = []", capture), "capture.include", "is empty"),
        (with("proxy = \"127.0.0.1\"", capture), "capture.proxy", "\"127.0.0.1\" has no port"),
        (
            with("on_failure = true", capture),
            "capture.on_failure",
            "must be \"closed\" or \"open\", not a boolean",
        ),
        (with("idle_timeout = 5", upstream), "upstream.idle_timeout", "must be a duration in quotes"),
        (with("idle_timeout = \"5\"", upstream), "upstream.idle_timeout", "must be a number and a unit"),
        (with("idle_timeout = \"0s\"", upstream), "upstream.idle_timeout", "longer than nothing"),
        (with("idle_timeout = \"25h\"", upstream), "upstream.idle_timeout", "at most a day"),
        (with("max_streams = 0", upstream), "upstream.max_streams", "must be from 1 to 4294967295, not 0"),
        (with("max_streams = -1", upstream), "upstream.max_streams", "must be from 1 to"),
        (with("verify = [\"spiffe://*/a\"]", upstream), "upstream.verify[0]", "a URI needs a scheme"),
        (with("headers = { \":path\" = \"/\" }", upstream), "upstream.headers.:path", "pseudo-header"),
        (with("headers = { TE = \"x\" }", upstream), "upstream.headers.TE", "set by the tunnel itself"),
        (
            with("headers = { Forwarded = \"x\" }", upstream),
            "upstream.headers.Forwarded",
            "set by the tunnel",
        ),
        (with("headers = { a = \"x\\ny\" }", upstream), "upstream.headers.a", "no header can carry"),
        (
            GOOD.replace("\"10.9.0.2:15008\"", "\"10.9.0.2\""),
            "upstream.endpoints[0]",
            "authority has no port",
        ),
        (GOOD.replace("\"10.9.0.2:15008\"", ""), "upstream.endpoints", "is empty"),
        (GOOD.replace("name = \"west\"", "name = \"east\""), "upstream.name", "another upstream is named"),
        (
            GOOD.replace("weight = 90 }, { upstream = \"west\" }", "weight = 0 }"),
            "route.to",
            "weights are all 0",
        ),
        (GOOD.replace("[[route]]", "[route]"), "route", "write [[route]] in place of [route]"),
        (format!("{GOOD}\n[deamon]\nmark = 1"), "deamon", "did you mean `daemon`?"),
        (format!("{GOOD}\n[daemon]\nrelay = \"fast\""), "daemon.relay", "\"splice\""),
        (
            format!("{GOOD}\n[[policy]]\nidentity = \"any\"\ntarget = \"any\""),
            "policy.target",
            "\"any\" is for action = \"deny\"",
        ),
        (
            format!("{GOOD}\n[[policy]]\nidentity = \"any\"\ntarget = []"),
            "policy.target",
            "it would match nothing",
        ),
        (
            format!("{GOOD}\n[[policy]]\nidentity = \"any\"\naction = \"block\"\ntarget = [\"10.0.0.0/8\"]"),
            "policy.action",
            "must be \"allow\" or \"deny\", not \"block\"",
        ),
        (
            format!(
                "{GOOD}\n[[policy]]\nidentity = \"any\"\nclient = [\"10.0.0.0/8:80\"]\ntarget = [\"10.0.0.0/8\"]"
            ),
            "policy.client[0]",
            "a client's port is not matched",
        ),
        (
            format!("{GOOD}\n[[policy]]\nidentity = []\ntarget = [\"10.0.0.0/8\"]"),
            "policy.identity",
            "nobody",
        ),
    ] {
        let found = mistakes(&text);
        assert!(
            found.iter().any(|m| m.contains(&format!(": {key}: ")) && m.contains(said)),
            "wanted {key}: {said}, found {found:#?}"
        );
    }
}

/// A mistake is reported once, and not again by what depends on it.
#[test]
fn one_slip_gives_one_message() {
    for (from, to) in [
        ("\"west\"\nendpoints", "\"west\"\nendpoint"),
        ("\"10.9.0.2:15008\"", "10"),
        ("unit = \"legacy.service\"", "unit = 3"),
        ("to = [", "to = [{}, "),
        ("key = \"/abs", "kee = \"/abs"),
    ] {
        let found = mistakes(&GOOD.replace(from, to));
        // A misspelt key that was needed is unknown and missing.
        assert!(found.len() <= 2, "{to}: {found:#?}");
    }
}

#[test]
fn what_needs_another_section_says_which() {
    assert_eq!(
        mistakes("[daemon]\nworkers = 2\n"),
        ["1:1: there is nothing to do: neither [[capture]] nor [[listener]] is there"]
    );
    assert_eq!(
        mistakes("[[listener]]\naddress = \"[::]:15008\"\n"),
        [
            "1:1: listener: needs a certificate: [identity] is missing",
            "1:1: listener: has no [[route]]: every request would be refused",
        ]
    );
    assert_eq!(
        mistakes("\n[[capture]]\ncgroup = \"/x\"\n"),
        ["2:1: capture: has no [[route]] and no proxy: every captured connection would be refused"]
    );
    assert!(parse("[[capture]]\ncgroup = \"/x\"\nproxy = \"127.0.0.1:12345\"\n").is_ok());
    assert_eq!(mistakes("[[capture]]\nproxy = \"127.0.0.1:12345\"\n"), ["1:1: capture.cgroup: is missing"]);
}

#[test]
fn without_tls_nothing_is_proved_and_what_would_need_it_is_a_mistake() {
    let open = "[[listener]]\naddress = \"[::]:3128\"\nprotocols = [\"h2\", \"h1\"]\ntls = false\n\
                [[route]]\nto = [{ upstream = \"squid\" }]\n\
                [[upstream]]\nname = \"squid\"\nendpoints = [\"10.9.0.1:3128\"]\nprotocol = \"h1\"\ntls = false\n\
                [[policy]]\nidentity = \"any\"\ntarget = [\"10.0.0.0/8\"]\n";
    let config = parse(open).unwrap();
    assert_eq!(config.listeners[0].protocols, [Protocol::H2, Protocol::H1]);
    assert!(config.listeners[0].check().is_none() && config.upstreams[0].check().is_none());
    assert_eq!(config.upstreams[0].protocol, UpstreamProtocol::H1);
    let no_clients = "has no meaning with tls = false: clients show certificates in TLS only";
    let no_servers = "has no meaning with tls = false: servers show certificates in TLS only";
    let one_each = "has no meaning with protocol = \"h1\": over HTTP/1 each flow has a connection of its own";
    for (from, to, said) in [
        ("[[route]]", "client_auth = \"required\"\n[[route]]", format!("5:15: listener.client_auth: {no_clients}")),
        ("[[route]]", "verify = [\"a.example\"]\n[[route]]", format!("5:10: listener.verify: {no_clients}")),
        ("[[policy]]", "sni = \"a.example\"\n[[policy]]", format!("12:7: upstream.sni: {no_servers}")),
        ("[[policy]]", "verify = [\"a.example\"]\n[[policy]]", format!("12:10: upstream.verify: {no_servers}")),
        ("[[policy]]", "max_streams = 3\n[[policy]]", format!("12:15: upstream.max_streams: {one_each}")),
        ("[[policy]]", "idle_timeout = \"3s\"\n[[policy]]", format!("12:16: upstream.idle_timeout: {one_each}")),
        (
            "[[policy]]",
            "optimistic_data = true\n[[policy]]",
            "12:19: upstream.optimistic_data: has no meaning with protocol = \"h1\": over HTTP/1 nothing is sent before \
             the answer, which a proxy could take for its next request"
                .to_owned(),
        ),
        (
            "\"any\"",
            "[\"spiffe://example.org/web\"]",
            "13:12: policy.identity: names peers, and no listener has TLS, by which a client could prove to be one: \
             only \"any\" would match"
                .to_owned(),
        ),
        (
            "\"h2\", \"h1\"]",
            "\"h1\"]\nmax_streams = 3",
            "4:15: listener.max_streams: has no meaning without \"h2\": over HTTP/1 a connection carries one flow"
                .to_owned(),
        ),
        (
            "\"h2\", \"h1\"]",
            "\"h1\", \"h1\"]",
            "3:13: listener.protocols: says the same twice".to_owned(),
        ),
        (
            "tls = false\n[[route]]",
            "[[route]]",
            "1:1: listener: needs a certificate: [identity] is missing".to_owned(),
        ),
        (
            "tls = false\n[[policy]]",
            "[[policy]]",
            "7:1: upstream: needs a certificate: [identity] is missing".to_owned(),
        ),
    ] {
        assert_eq!(mistakes(&open.replacen(from, to, 1)), [said], "{to}");
    }
}

/// A daemon that captures by rules.
const REDIRECT: &str = "[[capture]]\nmode = \"redirect\"\nlisten = [\"127.0.0.1:15001\", \"[::1]:15001\"]\n\
    [[route]]\nto = \"direct\"\n";

#[test]
fn rules_take_an_address_and_nothing_else() {
    let config = parse(REDIRECT).unwrap();
    assert!(config.captures.is_empty());
    let listen = ["127.0.0.1:15001".parse().unwrap(), "[::1]:15001".parse().unwrap()];
    assert_eq!(config.redirects, [Redirect { name: None, listen: listen.to_vec(), identity: None }]);

    let mode = "mode = \"redirect\"";
    for (key, value, why) in [
        ("cgroup", "\"/x\"", "the rules decide whose connections they redirect"),
        ("unit", "\"a.service\"", "the rules decide whose connections they redirect"),
        ("include", "[\"10.0.0.0/8\"]", "the rules decide what is captured"),
        ("refuse", "[]", "the rules decide what is captured, and a route can deny it"),
        ("exclude", "[]", "the rules decide what is captured"),
        ("on_failure", "\"open\"", "while no daemon runs, what the rules redirect is refused"),
        ("proxy", "\"127.0.0.1:1\"", "the rules can redirect to that proxy by themselves"),
    ] {
        let found = mistakes(&REDIRECT.replace(mode, &format!("{mode}\n{key} = {value}")));
        let at = 4 + key.len();
        let said = format!("3:{at}: capture.{key}: has no meaning in mode = \"redirect\": {why}");
        assert_eq!(found, [said]);
    }
    for (from, to, said) in [
        ("\"redirect\"", "\"tproxy\"", "2:8: capture.mode: must be \"ebpf\" or \"redirect\", not \"tproxy\""),
        ("listen = [\"127.0.0.1:15001\", \"[::1]:15001\"]\n", "", "1:1: capture.listen: is missing"),
        (
            "[\"127.0.0.1:15001\", \"[::1]:15001\"]",
            "[]",
            "3:10: capture.listen: is empty: rules could redirect to nothing",
        ),
        (
            "127.0.0.1:15001",
            "127.0.0.1:0",
            "3:11: capture.listen[0]: has port 0, which is another one each time: rules name one",
        ),
        (
            "127.0.0.1:15001",
            "[::1]:15001",
            "3:26: capture.listen[1]: another listener is at [::1]:15001 already",
        ),
        (
            "[[route]]\nto = \"direct\"\n",
            "",
            "1:1: capture: has no [[route]]: every redirected connection would be refused",
        ),
    ] {
        assert_eq!(mistakes(&REDIRECT.replace(from, to)), [said]);
    }
    assert_eq!(
        mistakes(&with("listen = [\"127.0.0.1:15001\"]", "unit = \"legacy.service\"")),
        ["9:10: capture.listen: is for mode = \"redirect\": what eBPF captures finds its listener by itself"]
    );
    assert!(parse(&with("mode = \"ebpf\"", "unit = \"legacy.service\"")).is_ok(), "the default may be said");
}

/// Two captures of one group would be pinned in one place, and rules of which nobody could say the order.
#[test]
fn a_group_is_captured_once_however_its_path_is_spelled() {
    let twice = |first: &str, second: &str| {
        format!("[[route]]\nto = \"direct\"\n[[capture]]\n{first}\n[[capture]]\nname = \"b\"\n{second}\n")
    };
    assert_eq!(
        mistakes(&twice("unit = \"legacy.service\"", "unit = \"legacy.service\"")),
        ["7:8: capture.unit: another capture is of \"legacy.service\" already"]
    );
    assert_eq!(
        mistakes(&twice("cgroup = \"/sys/fs/cgroup/app\"", "cgroup = \"/sys/fs/cgroup/./app/\"")),
        ["7:10: capture.cgroup: another capture is of \"/sys/fs/cgroup/./app/\" already"]
    );
    assert!(parse(&twice("unit = \"a.service\"", "unit = \"b.service\"")).is_ok());
}

#[test]
fn exec_takes_no_capture_by_rules_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    std::fs::write(&file, REDIRECT).unwrap();
    let said = Config::load_for_exec(&file, Wanted::default()).unwrap_err().to_string();
    assert!(
        said.ends_with(
            ":2:8: capture.mode: is \"redirect\", and rules know nothing of the command: `tunnel exec` captures by \
             eBPF. Put another [[capture]] first, or say --capture"
        ),
        "{said}"
    );
    let by_flags = Config::load_for_exec(&file, only("10.0.0.0/8")).unwrap();
    assert_eq!((by_flags.captures.len(), by_flags.redirects.len()), (1, 0));
    std::fs::write(&file, format!("[[capture]]\ninclude = [\"10.0.0.0/8\"]\n{REDIRECT}")).unwrap();
    let by_file = Config::load_for_exec(&file, Wanted::default()).unwrap();
    assert_eq!((by_file.captures.len(), by_file.redirects.len()), (1, 0));
}

/// What is not TOML is reported with its line and column.
#[test]
fn text_that_is_not_toml_is_placed() {
    let found = mistakes(&format!("{GOOD}balance = \n"));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with(&format!("{}:11: ", GOOD.lines().count() + 1)), "{found:?}");
    let twice = mistakes(&GOOD.replace("sni = \"gw.east\"", "sni = \"gw.east\"\nsni = \"gw.west\""));
    assert!(twice[0].contains("duplicate key"), "{twice:?}");
    assert_eq!(twice.len(), 1, "{twice:?}");
}

/// The column of a mistake counts characters, not bytes.
#[test]
fn columns_count_characters() {
    assert!(mistakes("é = 1 # é\n")[0].starts_with("1:1: "));
    let found = mistakes(&GOOD.replace("{ baggage = \"k8s.cluster.name=a\" }", "{ \"é\" = \"x\", b = 1 }"));
    assert!(found.iter().any(|m| m.contains(":28: upstream.headers.b: ")), "{found:#?}");
}

#[test]
fn files_that_do_not_exist_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    std::fs::write(&file, GOOD).unwrap();
    std::fs::write(dir.path().join("node.pem"), "").unwrap();
    let keys: Vec<_> = Config::load(&file).unwrap_err().mistakes().iter().map(|m| m.key.clone()).collect();
    assert_eq!(keys, ["identity.key", "identity.ca"]);
    let gone = Config::load(&dir.path().join("gone.toml")).unwrap_err().to_string();
    assert!(gone.contains("gone.toml: No such file"), "{gone}");
}

/// Every key path in the schema.
fn keys(schema: &serde_json::Value, path: &str, into: &mut BTreeSet<String>) {
    for (key, inner) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        assert!(inner["description"].as_str().is_some_and(|d| d.ends_with('.')), "{path} is not described");
        keys(inner, &path, into);
        into.insert(path);
    }
    for inner in schema["anyOf"].as_array().into_iter().flatten().chain(schema.get("items")) {
        keys(inner, path, into);
    }
}

/// A key by the name that it had in an earlier version is read, with a warning that has its place and its name now; beside that
/// name it is a mistake.
#[test]
fn an_earlier_name_of_a_key_is_read_with_a_warning() {
    let parse =
        |keys: &str| Config::parse(&format!("[daemon]\n{keys}\n{GOOD}"), Path::new("a.toml"), CheckFiles::No);
    let config = parse("inspect_timeout = \"3s\"").unwrap();
    assert_eq!(config.daemon.sniff_timeout, Duration::from_secs(3));
    assert_eq!(
        config.warnings,
        ["a.toml:2:19: daemon.inspect_timeout: is called sniff_timeout now: rename it"]
    );
    let now = parse("sniff_timeout = \"3s\"").unwrap();
    assert_eq!((now.daemon.sniff_timeout, now.warnings), (Duration::from_secs(3), Vec::new()));
    let both = parse("inspect_timeout = \"3s\"\nsniff_timeout = \"3s\"").unwrap_err().to_string();
    assert_eq!(
        both,
        "a.toml:2:19: daemon.inspect_timeout: is the earlier name of sniff_timeout, which is there too: remove it"
    );
}

#[test]
fn the_schema_lists_every_key_that_the_parser_takes() {
    let mut listed = BTreeSet::new();
    keys(&schema(), "", &mut listed);
    // Nothing else is taken: each of these is, and whatever is not listed is unknown.
    let taken = "admin admin.enabled admin.listen admin.metrics admin.socket admin.write_over_tcp daemon.tcp_keepalive daemon.tcp_keepalive.time daemon.tcp_keepalive.interval daemon.tcp_keepalive.probes daemon.sniff_timeout daemon.limits daemon.limits.flow_idle_timeout daemon.limits.flow_max_duration daemon.limits.memory daemon.limits.peer_connections daemon.limits.peer_flows_per_second daemon.limits.peer_memory daemon.watch listener.idle_timeout listener.proxy_protocol route.match.cgroup route.proxy_protocol route.retries route.match.http_host route.match.sni \
        capture capture.cgroup capture.exclude capture.include capture.listen capture.mode capture.refuse \
        capture.bypass capture.name capture.on_failure capture.proxy capture.unit daemon daemon.bpffs daemon.drain_timeout daemon.mark daemon.max_flows daemon.relay daemon.workers \
        identity identity.ca identity.cert identity.crls identity.key identity.key_exchange identity.name identity.on_expiry identity.sds \
        identity.secret identity.spiffe_id identity.trust_domain identity.trust_domain.ca identity.trust_domain.name \
        identity.trust_domain.verify identity.validation_context identity.workload_api capture.identity listener.identity \
        upstream.identity listener listener.address listener.client_auth \
        listener.dial_timeout listener.handshake_timeout listener.keepalive_interval listener.keepalive_timeout listener.max_streams listener.name listener.protocols \
        listener.tls listener.verify policy policy.action policy.client policy.headers policy.headers.exact policy.headers.name policy.headers.prefix \
        policy.headers.present policy.headers.regex policy.identity policy.mode policy.name policy.target route route.authority route.match route.match.capture \
        access_log access_log.format access_log.interval access_log.only access_log.output access_log.path \
        access_log.routes access_log.share access_log.start \
        traces traces.endpoint traces.headers traces.sample traces.service_name traces.timeout \
        route.match.destination route.match.headers route.match.headers.exact route.match.headers.name \
        route.match.headers.prefix route.match.headers.present route.match.headers.regex route.match.host \
        route.match.identity route.match.listener route.match.server_name route.match.source route.name \
        route.request_headers route.request_headers.add route.request_headers.copy route.request_headers.remove \
        route.timeout route.to route.to.dial route.to.upstream route.to.weight upstream \
        upstream.balance upstream.connect_timeout upstream.discovery upstream.endpoints upstream.endpoints_file \
        upstream.headers upstream.health_check upstream.health_check.healthy_threshold \
        upstream.health_check.interval upstream.health_check.timeout upstream.health_check.type \
        upstream.health_check.unhealthy_threshold \
        upstream.idle_timeout upstream.keepalive_interval upstream.keepalive_timeout \
        upstream.limits upstream.limits.connections upstream.limits.pending upstream.limits.streams \
        upstream.max_streams upstream.name upstream.optimistic_data upstream.outlier_detection \
        upstream.outlier_detection.base_ejection_time upstream.outlier_detection.consecutive_failures \
        upstream.outlier_detection.consecutive_gateway_failures upstream.outlier_detection.max_ejection_percent \
        upstream.outlier_detection.max_ejection_time upstream.protocol upstream.response_timeout upstream.self \
        upstream.sni upstream.tls upstream.verify upstream.via listener.congestion_control upstream.congestion_control \
        daemon.core_dumps daemon.sandbox identity.insecure_key_permissions";
    assert_eq!(listed, taken.split_whitespace().map(str::to_owned).collect());
    let all = schema();
    assert_eq!(all["properties"]["daemon"]["properties"]["drain_timeout"]["default"], "30s");
    assert_eq!(all["properties"]["upstream"]["items"]["required"], serde_json::json!(["name"]));
}

/// What `--capture` says.
fn only(capture: &str) -> Wanted {
    Wanted { capture: vec![capture.parse().unwrap()], ..Wanted::default() }
}

#[test]
fn exec_takes_the_file_of_a_daemon_but_its_own_cgroup() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    for name in ["node.pem", "node-key.pem", "ca.pem"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    let text = GOOD.replace("/abs/", "").replace("unit = \"legacy.service\"", "include = [\"10.0.0.0/8\"]");
    std::fs::write(&file, &text).unwrap();
    let of_file = Config::load_for_exec(&file, Wanted::default()).unwrap();
    assert_eq!(of_file.captures.len(), 1);
    assert_eq!(of_file.captures[0].cgroup, CgroupRef::Fresh);
    assert_eq!(of_file.captures[0].include, ["10.0.0.0/8".parse().unwrap()]);
    let flags = Config::load_for_exec(&file, only("10.1.0.0/16")).unwrap();
    assert_eq!(flags.captures[0].include, ["10.1.0.0/16".parse().unwrap()]);
    let refuse = Wanted { refuse: vec!["::/0".parse().unwrap()], ..Wanted::default() };
    let refusing = &Config::load_for_exec(&file, refuse).unwrap().captures[0];
    assert_eq!((refusing.include.len(), refusing.refuse.len()), (2, 1), "flags are in place of the file's");

    std::fs::write(&file, text.replace("[[capture]]\ninclude = [\"10.0.0.0/8\"]", "")).unwrap();
    assert_eq!(Config::load_for_exec(&file, Wanted::default()).unwrap().captures[0].include.len(), 2);
    assert!(Config::load(&file).is_err(), "a daemon would have nothing to do");
}

/// Every example of the repository. Files that they name are their reader's to provide.
#[test]
fn the_examples_are_configurations() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_some_and(|e| e == "toml") {
            let text = std::fs::read_to_string(&file).unwrap();
            if let Err(e) = Config::parse(&text, &file, CheckFiles::No) {
                panic!("{e}");
            }
            seen += 1;
        }
    }
    assert!(seen >= 7, "{seen} examples");
}

#[test]
fn the_admin_interface_listens_on_loopback_only() {
    let admin = |keys: &str| mistakes(&format!("[admin]\n{keys}\n{GOOD}"));
    let said = admin("listen = \"0.0.0.0:15000\"");
    assert!(
        said.len() == 1 && said[0].starts_with("2:10: admin.listen: is not a loopback address"),
        "{said:?}"
    );
    let said = admin("write_over_tcp = true");
    assert!(said.len() == 1 && said[0].contains("has no effect without listen"), "{said:?}");
    let config = parse(&format!("[admin]\nlisten = \"[::1]:1\"\nsocket = \"a.sock\"\n{GOOD}")).unwrap();
    assert_eq!(config.admin.socket, Some(PathBuf::from("etc/a.sock")));
    assert_eq!(config.admin.listen, Some("[::1]:1".parse().unwrap()));
}
