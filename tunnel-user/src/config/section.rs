//! The sections of the file: the one definition of each, from which the parser and the schema both come.
//!
//! Enters: tables. Leaves: the types of the configuration. Invariant: every key is asked for before the
//! first `?`. It never has a default of its own: those are constants of the configuration.

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
};

use super::{
    BPFFS, Balance, Bootstrap, Bypass, CONNECT_TIMEOUT, Capture, CgroupRef, ClientAuth, Config, DIAL_TIMEOUT,
    DRAIN_RUN, Daemon, HANDSHAKE_TIMEOUT, IDLE_TIMEOUT, INSPECT_TIMEOUT, KEEPALIVE_INTERVAL,
    KEEPALIVE_TIMEOUT, Keepalive, LISTENER_STREAMS, Listener, MARK, MAX_FLOWS, OnFailure, Peers, Policy,
    Protocol, RESPONSE_TIMEOUT, Redirect, Relay, TCP_KEEPALIVE_INTERVAL, TCP_KEEPALIVE_MAX,
    TCP_KEEPALIVE_PROBES, TCP_KEEPALIVE_PROBES_MAX, TCP_KEEPALIVE_TIME, UPSTREAM_STREAMS, Upstream,
    endpoints,
    pattern::{AddrPattern, TargetPattern},
    reader::{At, Reader, Section},
    route::{RouteByName, resolve},
    value::{FilePath, FuturePath, Headers, Mode},
    via::{self, UpstreamByName},
};
use crate::model::{names::IdentityName, trust::IdentityFiles};

impl Section for Config {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let daemon = r.section("daemon", "The process itself.").unwrap_or_default();
        let identity: Option<IdentityFiles> = r.section(
            "identity",
            "Who we are to our peers, and whom we believe. Read again when the files change.",
        );
        let captures: Vec<At<AnyCapture>> = r.sections(
            "capture",
            "Whose TCP connections are captured: those of a cgroup, or those that rules redirect.",
        );
        let listeners: Vec<At<Listener>> = r.sections("listener", "Where CONNECT requests arrive.");
        let routes: Vec<RouteByName> =
            r.sections("route", "Where flows go. The first match wins; no match is refused.");
        let upstreams: Vec<UpstreamByName> =
            r.sections("upstream", "A gateway or proxy that flows are tunnelled through.");
        let policies: Vec<At<Policy>> = r.sections(
            "policy",
            "Who may reach what through our listeners. Nothing is allowed until a rule says so.",
        );

        check_together(r, &listeners, &captures);
        check_peers(r, &listeners, &policies);
        let (mut ebpf, mut redirects) = (Vec::new(), Vec::new());
        for capture in captures {
            match capture.value {
                AnyCapture::Ebpf(capture) => ebpf.push(capture),
                AnyCapture::Redirect { name, listen } => {
                    let listen = listen.into_iter().map(|at| at.value).collect();
                    redirects.push(Redirect { name, listen });
                }
            }
        }
        let routes = resolve(r, routes);
        let upstreams = via::resolve(r, upstreams, &listeners);
        let listeners = listeners.into_iter().map(|l| l.value).collect();
        let policies = policies.into_iter().map(|p| p.value).collect();
        Some(Self {
            daemon,
            identities: identity.map(|files| (IdentityName::default(), files)).into_iter().collect(),
            captures: ebpf,
            redirects,
            listeners,
            routes: routes?,
            upstreams: upstreams?,
            policies,
        })
    }
}

/// What no section can see by itself.
fn check_together(r: &Reader<'_>, listeners: &[At<Listener>], captures: &[At<AnyCapture>]) {
    if !r.has("capture") && !r.has("listener") && !r.for_exec() {
        r.wrong("", "there is nothing to do: neither [[capture]] nor [[listener]] is there");
    }
    for key in ["listener", "upstream"] {
        if r.has(key) && !r.all_say_or_have(key, "tls", false, "self") && !r.has("identity") {
            r.wrong(key, "needs a certificate: [identity] is missing");
        }
    }
    if r.for_exec() && !r.has("route") {
        r.wrong("", "has no [[route]]: every captured connection would be refused");
    }
    if r.has("listener") && !r.has("route") {
        r.wrong("listener", "has no [[route]]: every request would be refused");
    }
    if r.captures_for_exec()
        && let Some(first) = captures.first()
        && let AnyCapture::Redirect { .. } = first.value
    {
        r.wrong_at(
            first,
            "is \"redirect\", and rules know nothing of the command: `tunnel exec` captures by eBPF. Put another \
             [[capture]] first, or say --capture",
        );
    }
    let mut seen = BTreeMap::<SocketAddr, ()>::new();
    for at in listeners {
        if seen.insert(at.value.address, ()).is_some() {
            r.wrong_at(at, format!("another listener is at {} already", at.value.address));
        }
    }
    for capture in captures {
        let AnyCapture::Redirect { listen, .. } = &capture.value else { continue };
        for at in listen {
            if seen.insert(at.value, ()).is_some() {
                r.wrong_at(at, format!("another listener is at {} already", at.value));
            }
        }
    }
    for kind in ["upstream", "listener", "capture"] {
        let mut seen = BTreeMap::<String, ()>::new();
        for name in r.texts_in(kind, &["name"]) {
            if seen.insert(name.value.clone(), ()).is_some() {
                r.wrong_at(&name, format!("another {kind} is named \"{}\" already", name.value));
            }
        }
    }
}

/// Policies that name peers, where nobody can prove to be one of them.
fn check_peers(r: &Reader<'_>, listeners: &[At<Listener>], policies: &[At<Policy>]) {
    if !r.all_say("listener", "tls", false) || listeners.is_empty() {
        return;
    }
    for at in policies.iter().filter(|at| at.value.identity != Peers::Any) {
        r.wrong_at(
            at,
            "names peers, and no listener has TLS, by which a client could prove to be one: only \"any\" would match",
        );
    }
}

impl Section for Daemon {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let workers = r.optional::<NonZeroUsize>("workers", "Worker threads. Default: one per core.");
        let mark = r.default(
            "mark",
            "The SO_MARK of our own sockets, for rules of yours that are to leave them alone: VALUE or VALUE/MASK. Bits that nothing else on the node uses (`tunnel doctor` names rules that match them). Captures do not go by it: they know the sockets that this daemon made.",
            MARK,
        );
        let bpffs = r.default("bpffs", "The bpffs mount.", FilePath(PathBuf::from(BPFFS))).0;
        let drain_timeout =
            r.default("drain_timeout", "How long flows may go on after we were told to stop.", DRAIN_RUN);
        let max_flows = r.default(
            "max_flows",
            "Flows at a time, shared out to the workers; more are refused. One peer of the listeners gets three quarters of them (7,500 of the default), and the limit of file descriptors may allow fewer, which the log says.",
            MAX_FLOWS,
        );
        let relay = r.default(
            "relay",
            "How bytes are moved between two connections without framing or TLS of our own (captured, dialled by a route to \"direct\", or HTTP/1 without TLS): \"copy\", through this process; \"splice\", by a kernel program while a flow exchanges small messages, else as \"copy\"; \"pipe\", in the kernel (splice(2)), which takes less than half the CPU for bulk and as much for small messages; \"auto\", as \"splice\" where kernel and privileges allow it, else as \"copy\".",
            Relay::Copy,
        );
        let inspect_timeout = r.default(
            "inspect_timeout",
            "How long what a client sends first is waited for, where a route asks for sni or http_host. A client that waits for its server to speak first is held up for as long.",
            INSPECT_TIMEOUT,
        );
        let tcp_keepalive = r.section(
            "tcp_keepalive",
            "When a silent TCP peer is taken for gone: after time + probes * interval (135 s), whether the connection is idle or bytes are on their way to it. A peer that answers, with its window closed for however long, is not silent.",
        );
        let watch = r.default(
            "watch",
            "Whether this file is read again when it changes. SIGHUP has it read again anyway.",
            true,
        );
        Some(Self {
            bootstrap: Bootstrap { workers, mark, bpffs, tcp_keepalive: tcp_keepalive.unwrap_or_default() },
            drain_timeout,
            max_flows,
            relay,
            inspect_timeout,
            watch,
        })
    }
}

impl Section for Keepalive {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let time = r.default(
            "time",
            "Silence until the peer is asked whether it is there, in whole seconds.",
            TCP_KEEPALIVE_TIME,
        );
        let interval =
            r.default("interval", "Between two questions, in whole seconds.", TCP_KEEPALIVE_INTERVAL);
        let probes =
            r.default("probes", "Questions in a row that may stay unanswered.", TCP_KEEPALIVE_PROBES);
        for (key, value) in [("time", time), ("interval", interval)] {
            if value.as_secs() == 0 || value.subsec_nanos() != 0 || value > TCP_KEEPALIVE_MAX {
                r.wrong(
                    key,
                    "is not a whole number of seconds from \"1s\" to \"32767s\" (tcp(7), TCP_KEEPIDLE)",
                );
            }
        }
        if probes.get() > TCP_KEEPALIVE_PROBES_MAX {
            r.wrong("probes", format!("is more than {TCP_KEEPALIVE_PROBES_MAX} (tcp(7), TCP_KEEPCNT)"));
        }
        Some(Self { time, interval, probes })
    }
}

impl Section for IdentityFiles {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let cert =
            r.required::<FilePath>("cert", "Our certificate, PEM; the leaf first, intermediates after it.");
        let key = r.required::<FilePath>("key", "Its private key, PEM.");
        let ca = r.required::<FilePath>("ca", "The CA certificates that peers are verified against, PEM.");
        Some(Self { cert: cert?.0, key: key?.0, ca: ca?.0 })
    }
}

/// `[[capture]]` of either mode.
enum AnyCapture {
    Ebpf(Capture),
    Redirect { name: Option<String>, listen: Vec<At<SocketAddr>> },
}

/// A capture and the place of its mode.
impl Section for At<AnyCapture> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let capture = AnyCapture::read(r)?;
        Some(r.at("mode", capture))
    }
}

/// Keys that say what only eBPF can be told, and who decides it in mode "redirect".
const EBPF_ONLY: [(&str, &str); 8] = [
    ("cgroup", "the rules decide whose connections they redirect"),
    ("unit", "the rules decide whose connections they redirect"),
    ("include", "the rules decide what is captured"),
    ("refuse", "the rules decide what is captured, and a route can deny it"),
    ("exclude", "the rules decide what is captured"),
    ("on_failure", "while no daemon runs, what the rules redirect is refused"),
    ("bypass", "whose connections they are is known only where eBPF captures"),
    ("proxy", "the rules can redirect to that proxy by themselves"),
];

impl Section for AnyCapture {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let name = r.optional::<String>("name", "What routes call it. Default: its cgroup or unit.");
        let mode = r.optional::<Mode>(
            "mode",
            "Who captures: \"ebpf\", this daemon, by kernel programs on a cgroup; \"redirect\", iptables or nftables rules, which the operator writes. Default: \"ebpf\".",
        );
        let listen: Option<Vec<At<SocketAddr>>> = r.optional(
            "listen",
            "Where the rules redirect connections to: ADDRESS:PORT. Needed in mode \"redirect\", and only there.",
        );
        let path = r.optional::<FuturePath>(
            "cgroup",
            "Path of a cgroup (version 2), which need not exist yet and may be removed and created again. This, or unit.",
        );
        let unit =
            r.optional::<String>("unit", "Name of a systemd unit below slices, such as legacy.service, which need not run yet. This, or cgroup.");
        let everything = || super::flags::EVERYTHING.map(AddrPattern::net_only).to_vec();
        let include = r.default("include", "What is captured: CIDR[:PORTS]. Of it, what a \"deny\" route refuses by address and port alone, or no route takes, fails in connect() with ECONNREFUSED.", everything());
        let refuse: Vec<AddrPattern> = r.default(
            "refuse",
            "What fails in connect() with ENETUNREACH, as without a route to such addresses: CIDR[:PORTS]. With \"::/0\" clients fall back to IPv4 at once.",
            Vec::new(),
        );
        let exclude: Vec<AddrPattern> = r.default(
            "exclude",
            "What is left alone. The longest prefix over include, refuse and exclude decides; at the same prefix, exclude over refuse over include. Loopback, link-local, multicast and unspecified addresses are left alone unless include or refuse names the same prefix or a longer one.",
            Vec::new(),
        );
        let on_failure = r.default(
            "on_failure",
            "What captured applications get while no daemon runs: \"closed\", their connections are refused; \"open\", they go out in plaintext.",
            OnFailure::Closed,
        );
        let proxy = r.optional(
            "proxy",
            "Hand captured connections to this proxy, which asks SO_ORIGINAL_DST, and not to this daemon.",
        );
        let bypass = r.default(
            "bypass",
            "Whether busy connections go past the loopback's TCP: \"off\"; \"auto\", those of programs that nothing speaks against, where the kernel can; \"on\", the same, and a kernel that cannot is an error.",
            Bypass::Off,
        );

        match mode {
            // It is a mistake; what else it makes a mistake cannot be said.
            None if r.has("mode") => return None,
            Some(Mode::Redirect) => return redirect(r, name, listen),
            Some(Mode::Ebpf) | None => {}
        }
        if r.has("listen") {
            r.wrong("listen", "is for mode = \"redirect\": what eBPF captures finds its listener by itself");
        }
        if include.is_empty() {
            r.wrong("include", "is empty: nothing would be captured");
        }
        if unit.as_ref().is_some_and(|unit| unit.contains('/')) {
            r.wrong("unit", "is a path: a unit is a name, such as legacy.service; a path is for cgroup");
        }
        let called = path.as_ref().map(|p| p.0.display().to_string()).or_else(|| unit.clone());
        let cgroup = match (r.has("cgroup"), r.has("unit")) {
            (true, true) => {
                r.wrong("unit", "stands beside cgroup: only one of them can be meant");
                None
            }
            (false, false) if r.for_exec() => Some(CgroupRef::Fresh),
            (false, false) => {
                r.demand("cgroup");
                None
            }
            _ => path.map(|p| CgroupRef::Path(p.0)).or(unit.map(CgroupRef::Unit)),
        };
        if !r.for_exec() && !r.has("proxy") && !r.root_has("route") {
            r.wrong("", "has no [[route]] and no proxy: every captured connection would be refused");
        }
        let name = name.or(called);
        let cgroup = cgroup?;
        Some(Self::Ebpf(Capture { name, cgroup, include, refuse, exclude, on_failure, proxy, bypass }))
    }
}

fn redirect(r: &Reader<'_>, name: Option<String>, listen: Option<Vec<At<SocketAddr>>>) -> Option<AnyCapture> {
    for (key, why) in EBPF_ONLY {
        if r.has(key) {
            r.wrong(key, format!("has no meaning in mode = \"redirect\": {why}"));
        }
    }
    r.demand("listen");
    if !r.for_exec() && !r.root_has("route") {
        r.wrong("", "has no [[route]]: every redirected connection would be refused");
    }
    let listen = listen?;
    if listen.is_empty() {
        r.wrong("listen", "is empty: rules could redirect to nothing");
    }
    for at in listen.iter().filter(|at| at.value.port() == 0) {
        r.wrong_at(at, "has port 0, which is another one each time: rules name one");
    }
    Some(AnyCapture::Redirect { name, listen })
}

impl Section for Listener {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let name = r.optional::<String>("name", "What routes call it.");
        let address = r.required("address", "Where to listen: ADDRESS:PORT.");
        let protocols = r.default(
            "protocols",
            "The HTTP versions to take: with TLS the first that the client offers too (ALPN; \"h1\" when it offers none), in plaintext what its first bytes say.",
            vec![Protocol::H2],
        );
        let tls = r.default(
            "tls",
            "Whether it speaks TLS. Without it no client can prove who it is: only policies for \"any\" match.",
            true,
        );
        let proxy_protocol = r.default(
            "proxy_protocol",
            "Whether every connection begins with a PROXY header (version 1 or 2), whose client address is believed: for listeners that a balancer alone can reach. Connections without one are closed.",
            false,
        );
        let client_auth =
            r.default("client_auth", "Whether clients must present a certificate.", ClientAuth::Required);
        let verify = r.default(
            "verify",
            "Names of which a client's certificate must carry one, to be let in at all. Empty: every name that the CA vouches for.",
            Vec::new(),
        );
        let dial_timeout = r.default("dial_timeout", "How long a dial to a target may take.", DIAL_TIMEOUT);
        let handshake_timeout = r.default(
            "handshake_timeout",
            "How long a peer may take for its TLS handshake and the start of HTTP; over HTTP/1 that is the whole head of its request.",
            HANDSHAKE_TIMEOUT,
        );
        let max_streams =
            r.default("max_streams", "CONNECT streams at a time on one connection.", LISTENER_STREAMS);
        let keepalive_interval = r.default(
            "keepalive_interval",
            "How often a quiet HTTP/2 connection is asked whether its peer is alive. With keepalive_timeout it is how long a peer may be suspended before its flows are reset.",
            KEEPALIVE_INTERVAL,
        );
        let keepalive_timeout =
            r.default("keepalive_timeout", "How long the answer to that may take.", KEEPALIVE_TIMEOUT);
        if protocols.is_empty() {
            r.wrong("protocols", "is empty: nobody could speak to it");
        }
        if protocols.len() > protocols.iter().collect::<HashSet<_>>().len() {
            r.wrong("protocols", "says the same twice");
        }
        if !tls {
            for key in ["client_auth", "verify"] {
                if r.has(key) {
                    r.wrong(key, "has no meaning with tls = false: clients show certificates in TLS only");
                }
            }
        }
        if protocols == [Protocol::H1] {
            for key in ["max_streams", "keepalive_interval", "keepalive_timeout"] {
                if r.has(key) {
                    r.wrong(key, "has no meaning without \"h2\": over HTTP/1 a connection carries one flow");
                }
            }
        }
        Some(Self {
            name,
            address: address?,
            protocols,
            proxy_protocol,
            tls,
            client_auth,
            identity: IdentityName::default(),
            verify,
            dial_timeout,
            handshake_timeout,
            max_streams,
            keepalive_interval,
            keepalive_timeout,
        })
    }
}

/// A listener and the place of its address.
impl Section for At<Listener> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let listener = Listener::read(r)?;
        Some(r.at("address", listener))
    }
}

/// Keys of connections that many flows share.
const H2_ONLY: [&str; 4] = ["max_streams", "idle_timeout", "keepalive_interval", "keepalive_timeout"];

impl Section for Upstream {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let name = r.required::<String>("name", "What routes call it.");
        let protocol = r.default(
            "protocol",
            "The HTTP version to speak: \"h2\", many flows on one connection; \"h1\", a connection for each flow.",
            Protocol::H2,
        );
        let tls = r.default("tls", "Whether to speak TLS to it. Without it nobody proves anything.", true);
        let endpoints = endpoints::read(r);
        let balance = r.default(
            "balance",
            "How an endpoint is picked: \"least_request\", the one with fewer flows of two picked by chance; \"round_robin\", each in turn; \"random\", by chance; \"consistent_hash\", the same for the same target.",
            Balance::LeastRequest,
        );
        let sni =
            r.optional("sni", "The name to ask for and, without verify, to verify. Default: the endpoint's.");
        let verify = r.default(
            "verify",
            "Names of which its certificate must carry one. Empty: the certificate must be valid for sni or the endpoint.",
            Vec::new(),
        );
        let headers =
            r.default("headers", "Added to every CONNECT request, such as baggage.", Headers::default()).0;
        let max_streams: NonZeroU32 =
            r.default("max_streams", "CONNECT streams at a time on one connection.", UPSTREAM_STREAMS);
        let connect_timeout =
            r.default("connect_timeout", "How long a connection may take, TLS included.", CONNECT_TIMEOUT);
        let idle_timeout =
            r.default("idle_timeout", "How long a connection without streams is kept.", IDLE_TIMEOUT);
        let keepalive_interval = r.default(
            "keepalive_interval",
            "How often a quiet connection is asked whether it is alive.",
            KEEPALIVE_INTERVAL,
        );
        let keepalive_timeout =
            r.default("keepalive_timeout", "How long the answer to that may take.", KEEPALIVE_TIMEOUT);
        let response_timeout =
            r.default("response_timeout", "How long the answer to CONNECT may take.", RESPONSE_TIMEOUT);
        let optimistic_data = r.default(
            "optimistic_data",
            "Whether what a client sends goes with the CONNECT request, before its answer, which spares a round trip: false for a peer that takes no DATA before its 200, or passes it on over HTTP/1 without waiting for one. Over HTTP/1 nothing is sent before the answer.",
            true,
        );
        let (outlier_detection, health_check) = endpoints::read_health(r, protocol);
        let limits = r.section(
            "limits",
            "How much it gets, in the whole process; each worker has its share, rounded up. Beyond it flows are refused at once. Default: no limit.",
        );

        if !tls {
            for key in ["sni", "verify"] {
                if r.has(key) {
                    r.wrong(key, "has no meaning with tls = false: servers show certificates in TLS only");
                }
            }
        }
        if protocol == Protocol::H1 {
            for key in H2_ONLY {
                if r.has(key) {
                    let why = "over HTTP/1 each flow has a connection of its own";
                    r.wrong(key, format!("has no meaning with protocol = \"h1\": {why}"));
                }
            }
        }
        if protocol == Protocol::H1 && r.has("optimistic_data") {
            let why = "over HTTP/1 nothing is sent before the answer, which a proxy could take for its next request";
            r.wrong("optimistic_data", format!("has no meaning with protocol = \"h1\": {why}"));
        }
        let (endpoints, discovery) = endpoints?;
        Some(Self {
            name: name?.into(),
            protocol,
            endpoints,
            discovery,
            via: None,
            itself: None,
            balance,
            tls,
            identity: IdentityName::default(),
            sni,
            verify,
            headers,
            max_streams,
            connect_timeout,
            idle_timeout,
            keepalive_interval,
            keepalive_timeout,
            response_timeout,
            optimistic_data,
            outlier_detection,
            health_check,
            limits: limits.unwrap_or_default(),
        })
    }
}

/// A policy and the place of its identity.
impl Section for At<Policy> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let policy = Policy::read(r)?;
        Some(r.at("identity", policy))
    }
}

impl Section for Policy {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let identity: Option<Peers> = r.required("identity", "Who: a list of names, or \"any\".");
        let target: Option<Vec<TargetPattern>> =
            r.required("target", "What: CIDR[:PORTS] or NAME[:PORTS], NAME may be *.suffix.");
        if target.as_ref().is_some_and(Vec::is_empty) {
            r.wrong("target", "is empty: it would allow nothing");
        }
        Some(Self { identity: identity?, target: target? })
    }
}
