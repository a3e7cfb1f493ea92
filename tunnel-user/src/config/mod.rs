//! The configuration: what was typed, as types that are valid because they exist.
//!
//! Enters: a TOML file, or flags. Leaves: one [`Config`], or every mistake with its line and key.
//! Invariant: what a `Config` names is there (a route's upstream, a listener's identity), and unknown keys
//! are mistakes. It never reads the environment, and nothing is read again later.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::{Path, PathBuf},
    time::Duration,
};

use http::{HeaderName, HeaderValue};
use rustls_pki_types::ServerName;

mod endpoints;
mod flags;
pub mod pattern;
mod reader;
mod route;
mod schema;
mod section;
#[cfg(test)]
mod tests;
mod value;
mod via;

pub use endpoints::{CheckKind, Discovery, ENDPOINTS_MAX, HealthCheck, Limits, OutlierDetection, Percent};
pub use flags::{DEFAULT_EXCLUDE, ExecOptions, GatewayOptions, Wanted};
pub use pattern::{AddrPattern, NamePattern, PatternError, Ports, TargetPattern};
pub use route::{
    Action, Authority, HeaderChanges, HeaderMatch, Match, ProxyProtocol, Regex, RegexError, Route, Terms,
    ValueMatch,
};
pub use schema::schema;
pub use value::{
    HeaderError, parse_duration, parse_header, parse_header_flag, parse_header_name, parse_server_name,
    parse_socket_addr,
};

use self::reader::{Document, Purpose};
use crate::model::{
    flow::{Identity, Target},
    mark::Mark,
    names::{GroupName, IdentityName, SourceName, UpstreamName},
    san::{San, SanPattern},
    trust::{ClientCheck, IdentityFiles, ServerCheck},
};

/// The mark on our own sockets, for rules of the operator's: one bit, which is none of those that kube-proxy (0x4000, 0x8000),
/// the portmap plugin (0x2000), Cilium (0x0f00 and 16 bits above), Calico (16 bits above), Tailscale (0xff0000) and Istio
/// (0x539) use.
pub const MARK: Mark = Mark::new(0x1000, 0x1000).expect("one bit, inside");
/// Where systemd mounts bpffs.
pub const BPFFS: &str = "/sys/fs/bpf";
/// How long flows may go on after a daemon was told to stop. Twice the time in which interactive
/// programs finish a request; systemd kills after 90 s.
pub const DRAIN_RUN: Duration = Duration::from_secs(30);
/// The same for `exec`, where the command has ended by itself and only left-overs can be in flight.
pub const DRAIN_EXEC: Duration = Duration::from_secs(5);
/// Flows of one process at a time. At two sockets each it asks for 20,000 file descriptors of the
/// 524,288 that systemd's default hard limit gives.
pub const MAX_FLOWS: NonZeroUsize = NonZeroUsize::new(10_000).expect("not 0");
/// How long a dial to a target may take; Linux sends its fourth SYN after 7 s (1 + 2 + 4).
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take for its TLS handshake. As long as a dial, of which it is the second half.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what a client sends first is waited for, where a route asks for it. An application on this node that
/// speaks first has sent it by then, and so has a peer within that round trip; whoever waits for its server to speak
/// loses no more.
pub const INSPECT_TIMEOUT: Duration = Duration::from_millis(50);
/// A TCP peer that is silent this long is asked whether it is there.
pub const TCP_KEEPALIVE_TIME: Duration = Duration::from_secs(75);
/// The most that Linux takes (MAX_TCP_KEEPIDLE, include/net/tcp.h).
pub const TCP_KEEPALIVE_MAX: Duration = Duration::from_secs(32_767);
/// Between two such questions.
pub const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// The most unanswered questions (MAX_TCP_KEEPCNT, include/net/tcp.h).
pub const TCP_KEEPALIVE_PROBES_MAX: u32 = 127;
/// Unanswered questions until it is taken for gone.
pub const TCP_KEEPALIVE_PROBES: NonZeroU32 = NonZeroU32::new(4).expect("not 0");
/// CONNECT streams that a listener takes on one connection: twice what our own client opens.
pub const LISTENER_STREAMS: NonZeroU32 = NonZeroU32::new(200).expect("not 0");
/// CONNECT streams on one connection to an upstream. RFC 9113 section 6.5.2 advises that peers allow no
/// fewer than 100, so nobody should refuse it.
pub const UPSTREAM_STREAMS: NonZeroU32 = NonZeroU32::new(100).expect("not 0");
/// How long a connection to an endpoint may take, TLS included: endpoints are near, and the application
/// waits.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection without streams is kept. Less than the 100 to 350 s after which firewalls and
/// load balancers of the clouds forget connections.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// How often a quiet connection is asked whether it is alive (PING).
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long the answer to that may take.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an upstream may take to answer CONNECT: the gateway's dial timeout, and the way there.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);

/// Everything that a process is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The process itself.
    pub daemon: Daemon,
    /// Who we are. Those that listeners and upstreams with TLS name are present.
    pub identities: BTreeMap<IdentityName, IdentityFiles>,
    /// Whose connections are captured by eBPF.
    pub captures: Vec<Capture>,
    /// Where rules of the operator's redirect connections to.
    pub redirects: Vec<Redirect>,
    /// Where CONNECT requests arrive.
    pub listeners: Vec<Listener>,
    /// Where flows go; the first match wins, no match is refused.
    pub routes: Vec<Route>,
    /// The gateways and proxies that flows are tunnelled through.
    pub upstreams: Vec<Upstream>,
    /// Who may reach what through our listeners; nothing is allowed until a rule says so.
    pub policies: Vec<Policy>,
}

/// `[daemon]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// What a process cannot change while it runs.
    pub bootstrap: Bootstrap,
    /// How long flows may go on after we were told to stop.
    pub drain_timeout: Duration,
    /// Flows at a time, in the whole process.
    pub max_flows: NonZeroUsize,
    /// How bytes are moved between two sockets of ours.
    pub relay: Relay,
    /// How long what a client sends first is waited for, where a route asks for it.
    pub inspect_timeout: Duration,
    /// Whether the configuration file is read again when it changes.
    pub watch: bool,
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            bootstrap: Bootstrap::default(),
            drain_timeout: DRAIN_RUN,
            max_flows: MAX_FLOWS,
            relay: Relay::default(),
            inspect_timeout: INSPECT_TIMEOUT,
            watch: true,
        }
    }
}

/// The keys of `[daemon]` that a process takes at its start, and cannot change while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootstrap {
    /// Worker threads; `None`: one per core that this process may use.
    pub workers: Option<NonZeroUsize>,
    /// The mark on our own sockets.
    pub mark: Mark,
    /// The bpffs mount under which links and maps are pinned.
    pub bpffs: PathBuf,
    /// When a silent TCP peer is taken for gone.
    pub tcp_keepalive: Keepalive,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { workers: None, mark: MARK, bpffs: PathBuf::from(BPFFS), tcp_keepalive: Keepalive::default() }
    }
}

impl Bootstrap {
    /// The first key that another configuration says something else about.
    pub fn differs_in(&self, other: &Self) -> Option<&'static str> {
        let Self { workers, mark, bpffs, tcp_keepalive } = self;
        let keys = [
            ("workers", *workers != other.workers),
            ("mark", *mark != other.mark),
            ("bpffs", *bpffs != other.bpffs),
            ("tcp_keepalive", *tcp_keepalive != other.tcp_keepalive),
        ];
        keys.into_iter().find_map(|(key, differs)| differs.then_some(key))
    }
}

/// `[daemon.tcp_keepalive]`: when a silent peer is taken for gone, whether the connection is idle or bytes are on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence until it is asked whether it is there (TCP_KEEPIDLE).
    pub time: Duration,
    /// Between two questions (TCP_KEEPINTVL).
    pub interval: Duration,
    /// Questions that may stay unanswered (TCP_KEEPCNT).
    pub probes: NonZeroU32,
}

impl Keepalive {
    /// How long a peer may be silent.
    pub fn bound(&self) -> Duration {
        self.time + self.interval * self.probes.get()
    }
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { time: TCP_KEEPALIVE_TIME, interval: TCP_KEEPALIVE_INTERVAL, probes: TCP_KEEPALIVE_PROBES }
    }
}

/// How bytes are moved between two sockets of ours: captured, dialled, or an HTTP/1 tunnel in plaintext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Relay {
    /// As [`Splice`](Self::Splice) where that can be, else as [`Copy`](Self::Copy).
    Auto,
    /// By a kernel program while a flow chats, else as [`Copy`](Self::Copy).
    Splice,
    /// Read and written.
    #[default]
    Copy,
    /// In the kernel, through a pipe (splice(2)).
    Pipe,
}

/// `[[capture]]` with `mode = "ebpf"`, the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// What routes call it: its name, else its cgroup or unit.
    pub name: Option<String>,
    /// Whose connections.
    pub cgroup: CgroupRef,
    /// Which of them. The longest prefix over all lists decides; at the same prefix, exclude over refuse over include,
    /// and all of them over [`DEFAULT_EXCLUDE`].
    pub include: Vec<AddrPattern>,
    /// Which fail in connect().
    pub refuse: Vec<AddrPattern>,
    /// Which are left alone.
    pub exclude: Vec<AddrPattern>,
    /// What captured applications get while no daemon runs.
    pub on_failure: OnFailure,
    /// Hand captured connections to this proxy, which asks SO_ORIGINAL_DST, and not to ourselves.
    pub proxy: Option<SocketAddr>,
    /// Whether busy connections go past TCP on their way to us.
    pub bypass: Bypass,
}

impl Capture {
    /// Its stable name.
    pub fn source(&self) -> SourceName {
        SourceName::Capture(self.cgroup.name())
    }
}

/// Whether busy connections of captured applications go past the loopback's TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bypass {
    /// None does.
    #[default]
    Off,
    /// Those of programs that nothing speaks against, where the kernel can.
    Auto,
    /// The same, and a kernel that cannot is an error.
    On,
}

/// `[[capture]]` with `mode = "redirect"`: iptables or nftables decide what is captured, and conntrack knows
/// where it wanted to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// What routes call it.
    pub name: Option<String>,
    /// Where the rules send connections; at least one.
    pub listen: Vec<SocketAddr>,
}

impl Redirect {
    /// Its stable name.
    pub fn source(&self) -> SourceName {
        SourceName::Redirect(self.listen.as_slice().into())
    }
}

/// Which cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupRef {
    /// The one at this path.
    Path(PathBuf),
    /// The one of this systemd unit.
    Unit(String),
    /// A new one, made for the command that `exec` runs.
    Fresh,
}

impl CgroupRef {
    /// Its stable name.
    pub fn name(&self) -> GroupName {
        match self {
            Self::Path(path) => path.display().to_string().into(),
            Self::Unit(unit) => unit.as_str().into(),
            Self::Fresh => "(command)".into(),
        }
    }
}

/// What captured applications get while no daemon runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// Their connections are refused: nothing leaves in plaintext.
    #[default]
    Closed,
    /// Their connections go where they would without us.
    Open,
}

/// An HTTP version that carries CONNECT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/2.
    #[default]
    H2,
    /// HTTP/1.1, and 1.0 from clients that speak that.
    H1,
}

impl Protocol {
    /// What TLS calls it (RFC 7301 section 6, RFC 9113 section 3.2).
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Self::H2 => b"h2",
            Self::H1 => b"http/1.1",
        }
    }
}

/// Whether clients must present a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientAuth {
    /// They must.
    #[default]
    Required,
}

/// `[[listener]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// What routes call it.
    pub name: Option<String>,
    /// Where it listens.
    pub address: SocketAddr,
    /// What it speaks; at least one. Of what a client offers, the first one of these is taken.
    pub protocols: Vec<Protocol>,
    /// Whether a PROXY header stands in front of every connection, and is believed.
    pub proxy_protocol: bool,
    /// Whether it speaks TLS. Without it nobody proves who he is: `client_auth` and `verify` mean nothing then.
    pub tls: bool,
    /// Whether clients must present a certificate.
    pub client_auth: ClientAuth,
    /// Who we are to clients, where it speaks TLS.
    pub identity: IdentityName,
    /// Which names of clients are let in at all; empty: every name that our CA vouches for.
    pub verify: Vec<SanPattern>,
    /// How long a dial to a target may take.
    pub dial_timeout: Duration,
    /// How long a peer may take for its TLS handshake.
    pub handshake_timeout: Duration,
    /// CONNECT streams at a time on one connection.
    pub max_streams: NonZeroU32,
    /// How often a quiet connection is asked whether its peer is alive.
    pub keepalive_interval: Duration,
    /// How long the answer to that may take.
    pub keepalive_timeout: Duration,
}

impl Listener {
    /// A listener with the defaults.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            name: None,
            address,
            protocols: vec![Protocol::H2],
            proxy_protocol: false,
            tls: true,
            client_auth: ClientAuth::Required,
            identity: IdentityName::default(),
            verify: Vec::new(),
            dial_timeout: DIAL_TIMEOUT,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            max_streams: LISTENER_STREAMS,
            keepalive_interval: KEEPALIVE_INTERVAL,
            keepalive_timeout: KEEPALIVE_TIMEOUT,
        }
    }

    /// Its stable name.
    pub fn source(&self) -> SourceName {
        SourceName::Listener(self.address)
    }

    /// What its clients must prove; without TLS nothing.
    pub fn check(&self) -> Option<ClientCheck> {
        self.tls.then(|| ClientCheck { san: self.verify.clone() })
    }
}

/// How an endpoint is picked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// The one with fewer streams, of two picked at random.
    #[default]
    LeastRequest,
    /// Each in turn.
    RoundRobin,
    /// By chance.
    Random,
    /// The same for the same target, as long as it is well.
    ConsistentHash,
}

/// `[[upstream]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// What routes, and other upstreams, call it.
    pub name: UpstreamName,
    /// What it speaks.
    pub protocol: Protocol,
    /// Where it is; at least one, unless a file says it, or it is this process itself.
    pub endpoints: Vec<Target>,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// Which other upstream its connections go through. That one is another process, and does not come back here.
    pub via: Option<UpstreamName>,
    /// It is this process: nothing else of this is used then.
    pub itself: Option<Itself>,
    /// How an endpoint is picked.
    pub balance: Balance,
    /// Whether it is spoken to over TLS. Without it nothing is proved: `sni` and `verify` mean nothing then.
    pub tls: bool,
    /// Who we are to it, where it is spoken to over TLS.
    pub identity: IdentityName,
    /// The name to ask for (SNI) and, when `verify` is empty, to verify. `None`: the endpoint's.
    pub sni: Option<ServerName<'static>>,
    /// The names of which its certificate must carry one.
    pub verify: Vec<SanPattern>,
    /// Added to every CONNECT request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// CONNECT streams at a time on one connection.
    pub max_streams: NonZeroU32,
    /// How long a connection may take, TLS included.
    pub connect_timeout: Duration,
    /// How long a connection without streams is kept.
    pub idle_timeout: Duration,
    /// How often a quiet connection is asked whether it is alive.
    pub keepalive_interval: Duration,
    /// How long the answer to that may take.
    pub keepalive_timeout: Duration,
    /// How long the answer to CONNECT may take.
    pub response_timeout: Duration,
    /// Whether what a client sends goes with the request, before its answer, where HTTP/2 is spoken.
    pub optimistic_data: bool,
    /// Which endpoints are left out for what flows have met there.
    pub outlier_detection: OutlierDetection,
    /// How endpoints are checked; `None`: they are not.
    pub health_check: Option<HealthCheck>,
    /// How much it gets.
    pub limits: Limits,
}

impl Upstream {
    /// An upstream with the defaults.
    pub fn new(name: UpstreamName, endpoints: Vec<Target>) -> Self {
        Self {
            name,
            protocol: Protocol::H2,
            endpoints,
            discovery: Discovery::Static,
            via: None,
            itself: None,
            balance: Balance::LeastRequest,
            tls: true,
            identity: IdentityName::default(),
            sni: None,
            verify: Vec::new(),
            headers: Vec::new(),
            max_streams: UPSTREAM_STREAMS,
            connect_timeout: CONNECT_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
            keepalive_interval: KEEPALIVE_INTERVAL,
            keepalive_timeout: KEEPALIVE_TIMEOUT,
            response_timeout: RESPONSE_TIMEOUT,
            optimistic_data: true,
            outlier_detection: OutlierDetection::default(),
            health_check: None,
            limits: Limits::default(),
        }
    }

    /// What its endpoints must prove; without TLS nothing.
    pub fn check(&self) -> Option<ServerCheck> {
        self.tls.then(|| ServerCheck { name: self.sni.clone(), san: self.verify.clone() })
    }
}

/// An upstream that is this process: flows go to one of its listeners, as a peer's would.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Itself {
    /// The listener's name.
    pub listener: String,
    /// What its clients must prove; without TLS nothing.
    pub check: Option<ClientCheck>,
    /// How long a dial for it may take.
    pub dial_timeout: Duration,
}

/// `[[policy]]`: these peers may reach these targets.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Who.
    pub identity: Peers,
    /// What.
    pub target: Vec<TargetPattern>,
}

/// Which peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Every one that was let in.
    Any,
    /// Those with one of these names.
    Of(Vec<SanPattern>),
}

impl Peers {
    /// Whether this peer is one of them. A peer without an identity is one of "any" only.
    pub fn contains(&self, peer: Option<&Identity>) -> bool {
        match (self, peer) {
            (Self::Any, _) => true,
            (Self::Of(_), None) => false,
            (Self::Of(patterns), Some(peer)) => {
                let name = San::from(peer);
                patterns.iter().any(|p| p.matches(&name))
            }
        }
    }
}

/// Whether files that a configuration names must exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckFiles {
    /// They must, here and now.
    Yes,
    /// They may be missing: the configuration is for another machine.
    No,
}

impl Config {
    /// Reads a file; paths in it are relative to it.
    pub fn load(file: &Path) -> Result<Self, ConfigErrors> {
        Self::read(&text_of(file)?, file, CheckFiles::Yes, Purpose::Daemon)
    }

    /// Reads a file for `tunnel detach`: nothing that it names has to be there any more, be it a group or a certificate.
    pub fn load_to_detach(file: &Path) -> Result<Self, ConfigErrors> {
        Self::read(&text_of(file)?, file, CheckFiles::No, Purpose::Daemon)
    }

    /// Reads a file for `tunnel exec`: its routes, upstreams and identity hold; it serves no listener, and
    /// the one capture is that of the command. What is captured says `wanted`, or when that says nothing the file's
    /// first `[[capture]]`, if it has one; rules of the operator's know nothing of the command, so that one must not be
    /// left to them.
    pub fn load_for_exec(file: &Path, wanted: Wanted) -> Result<Self, ConfigErrors> {
        let by_file = wanted.is_default();
        let purpose = if by_file { Purpose::Exec } else { Purpose::ExecByFlags };
        let mut config = Self::read(&text_of(file)?, file, CheckFiles::Yes, purpose)?;
        config.listeners.clear();
        config.redirects.clear();
        config.captures.truncate(1);
        match config.captures.first_mut() {
            Some(of_file) if by_file => of_file.cgroup = CgroupRef::Fresh,
            _ => config.captures = vec![Capture::for_exec(wanted)],
        }
        Ok(config)
    }

    /// Reads a text that stands in `file`.
    pub fn parse(text: &str, file: &Path, check: CheckFiles) -> Result<Self, ConfigErrors> {
        Self::read(text, file, check, Purpose::Daemon)
    }

    fn read(text: &str, file: &Path, check: CheckFiles, purpose: Purpose) -> Result<Self, ConfigErrors> {
        let base = file.parent().unwrap_or(Path::new(""));
        Document::read(text, base, check == CheckFiles::Yes, purpose).map_err(|mistakes| ConfigErrors {
            file: file.to_owned(),
            unreadable: None,
            mistakes,
        })
    }
}

fn text_of(file: &Path) -> Result<String, ConfigErrors> {
    std::fs::read_to_string(file).map_err(|source| ConfigErrors {
        file: file.to_owned(),
        unreadable: Some(source),
        mistakes: Vec::new(),
    })
}

/// One mistake in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The key's path, such as `listener.address`; empty when the text is not TOML there.
    pub key: String,
    /// What is wrong.
    pub message: String,
}

/// Everything that is wrong with a configuration file.
#[derive(Debug)]
pub struct ConfigErrors {
    file: PathBuf,
    unreadable: Option<std::io::Error>,
    mistakes: Vec<Mistake>,
}

impl ConfigErrors {
    /// The mistakes, in the order of the text. Empty when the file could not be read at all.
    pub fn mistakes(&self) -> &[Mistake] {
        &self.mistakes
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        if let Some(e) = &self.unreadable {
            return write!(f, "{file}: {e}");
        }
        for (i, m) in self.mistakes.iter().enumerate() {
            let (newline, colon) = (if i == 0 { "" } else { "\n" }, if m.key.is_empty() { "" } else { ": " });
            write!(f, "{newline}{file}:{}:{}: {}{colon}{}", m.line, m.column, m.key, m.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
