//! The configurations that need no file: `tunnel exec --gateway` and `tunnel gateway`.
//!
//! What flags build, a file could have said.

use std::{net::SocketAddr, num::NonZeroUsize, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustls_pki_types::ServerName;

use super::{
    Action, AddrPattern, Admin, Bootstrap, Bypass, Capture, CgroupRef, Config, DRAIN_EXEC, Daemon, Listener,
    MARK, Match, OnFailure, Peers, Policy, Route, TargetPattern, Terms, Upstream,
};
use crate::model::{
    flow::{SourceKind, Target},
    mark::Mark,
    names::IdentityName,
    san::SanPattern,
    trust::IdentityFiles,
};

/// Every address of both families.
pub(super) const EVERYTHING: [IpNet; 2] = [v4([0, 0, 0, 0], 0), v6([0; 8], 0)];

/// What captures leave alone unless told otherwise: addresses that mean this host, this link, or no single
/// host. A gateway could not reach the same thing by the same address.
pub const DEFAULT_EXCLUDE: [IpNet; 9] = [
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([224, 0, 0, 0], 4),
    v4([255, 255, 255, 255], 32),
    v6([0; 8], 128),
    v6([0, 0, 0, 0, 0, 0, 0, 1], 128),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

const fn v4(a: [u8; 4], prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::new(a[0], a[1], a[2], a[3]), prefix))
}

const fn v6(a: [u16; 8], prefix: u8) -> IpNet {
    let addr = std::net::Ipv6Addr::new(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
    IpNet::V6(Ipv6Net::new_assert(addr, prefix))
}

/// `tunnel exec` without a file.
#[derive(Clone, Debug)]
pub struct ExecOptions {
    /// The gateway.
    pub gateway: Target,
    /// Who we are.
    pub identity: IdentityFiles,
    /// Names of which the gateway's certificate must carry one; empty: it must be valid for `sni` or the
    /// dialled name or address.
    pub verify: Vec<SanPattern>,
    /// The name to ask for.
    pub sni: Option<ServerName<'static>>,
    /// What is captured, and what is not.
    pub wanted: Wanted,
    /// Added to every CONNECT request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The mark of our own sockets; `None` is the default one.
    pub mark: Option<Mark>,
    /// Worker threads.
    pub workers: Option<NonZeroUsize>,
}

/// What `tunnel exec` captures.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// What is captured. Empty: everything but [`DEFAULT_EXCLUDE`].
    pub capture: Vec<AddrPattern>,
    /// What fails.
    pub refuse: Vec<AddrPattern>,
    /// What is left alone.
    pub exclude: Vec<AddrPattern>,
}

impl Wanted {
    /// Whether nothing was said.
    pub fn is_default(&self) -> bool {
        self.capture.is_empty() && self.refuse.is_empty() && self.exclude.is_empty()
    }
}

/// `tunnel gateway`.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Where to listen.
    pub listen: Vec<SocketAddr>,
    /// Who we are.
    pub identity: IdentityFiles,
    /// Names of which a client's certificate must carry one; empty: any.
    pub verify: Vec<SanPattern>,
    /// What every client may reach.
    pub allow: Vec<TargetPattern>,
    /// Timeout for dialling a target.
    pub dial_timeout: Duration,
    /// Worker threads.
    pub workers: Option<NonZeroUsize>,
}

impl Capture {
    /// What `exec` captures.
    pub fn for_exec(wanted: Wanted) -> Self {
        let Wanted { capture, refuse, exclude } = wanted;
        let include =
            if capture.is_empty() { EVERYTHING.map(AddrPattern::net_only).to_vec() } else { capture };
        Self {
            name: None,
            cgroup: CgroupRef::Fresh,
            include,
            refuse,
            exclude,
            on_failure: OnFailure::Closed,
            proxy: None,
            bypass: Bypass::Off,
            identity: None,
        }
    }
}

impl Config {
    /// What `tunnel exec --gateway ..` means.
    pub fn for_exec(o: ExecOptions) -> Self {
        let mut upstream = Upstream::new("gateway".into(), vec![o.gateway]);
        upstream.sni = o.sni;
        upstream.verify = o.verify;
        upstream.headers = o.headers;
        Self {
            daemon: Daemon {
                bootstrap: Bootstrap {
                    workers: o.workers,
                    mark: o.mark.unwrap_or(MARK),
                    ..Bootstrap::default()
                },
                drain_timeout: DRAIN_EXEC,
                ..Daemon::default()
            },
            admin: Admin::default(),
            identities: [(IdentityName::default(), o.identity.into())].into(),
            captures: vec![Capture::for_exec(o.wanted)],
            redirects: Vec::new(),
            listeners: Vec::new(),
            routes: vec![every(SourceKind::Capture, Action::Upstreams(vec![("gateway".into(), 1)]))],
            upstreams: vec![upstream],
            policies: Vec::new(),
            effective: Arc::default(),
            access_logs: Vec::new(),
            traces: None,
        }
    }

    /// What `tunnel gateway` means.
    pub fn for_gateway(o: GatewayOptions) -> Self {
        let listener = |address| Listener {
            verify: o.verify.clone(),
            dial_timeout: o.dial_timeout,
            ..Listener::new(address)
        };
        Self {
            daemon: Daemon {
                bootstrap: Bootstrap { workers: o.workers, ..Bootstrap::default() },
                ..Daemon::default()
            },
            admin: Admin::default(),
            identities: [(IdentityName::default(), o.identity.into())].into(),
            captures: Vec::new(),
            redirects: Vec::new(),
            listeners: o.listen.iter().copied().map(listener).collect(),
            routes: vec![every(SourceKind::Listener, Action::Direct)],
            upstreams: Vec::new(),
            policies: vec![Policy { identity: Peers::Any, target: o.allow }],
            effective: Arc::default(),
            access_logs: Vec::new(),
            traces: None,
        }
    }
}

fn every(source: SourceKind, to: Action) -> Route {
    let matches = Match { source: vec![source], ..Match::default() };
    Route { name: None, matches, to, terms: Terms::default() }
}
