//! The configuration: what was typed, as types that are valid because they exist.
//!
//! A TOML file, or flags, become one [`Config`], or every mistake with its line and key. Each section is defined once, by
//! `section!` (`section.rs`).
//!
//! # Invariants
//! - What a `Config` names is there: a route's upstream, a listener's identity.
//! - A key that is not known is a mistake.
//! - Sections refer to each other by name.
//! - Nothing is read again later. Of the environment one variable is read, where the text says so ([`ENDPOINT_VARIABLE`]).

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

mod access_log;
mod admin;
mod capture;
mod daemon;
mod effective;
mod endpoints;
mod flags;
mod identity;
mod limits;
mod listener;
pub mod pattern;
mod policy;
mod reader;
mod root;
mod route;
mod schema;
mod section;
#[cfg(test)]
mod tests;
mod traces;
mod upstream;
mod value;
mod via;

pub use access_log::{AccessLog, JOURNAL, LineFormat, Only, Output};
pub use admin::{Admin, MetricSet};
pub use capture::{Bypass, Capture, CgroupRef, OnFailure, Redirect};
pub use daemon::{
    BPFFS, Bootstrap, DRAIN_EXEC, DRAIN_RUN, Daemon, Keepalive, MARK, MAX_FLOWS, Relay, SNIFF_TIMEOUT,
    TCP_KEEPALIVE_INTERVAL, TCP_KEEPALIVE_MAX, TCP_KEEPALIVE_PROBES, TCP_KEEPALIVE_PROBES_MAX,
    TCP_KEEPALIVE_TIME,
};
pub use endpoints::{CheckKind, Discovery, ENDPOINTS_MAX, HealthCheck, Limits, OutlierDetection, Percent};
pub use flags::{DEFAULT_EXCLUDE, ExecOptions, GatewayOptions, Wanted};
pub use identity::{
    ENDPOINT_VARIABLE, IdentitySettings, IdentitySource, KeyExchange, OnExpiry, ProviderAddr, TrustDomain,
};
pub use limits::{Bytes, Limits as ProcessLimits};
pub use listener::{ClientAuth, DIAL_TIMEOUT, HANDSHAKE_TIMEOUT, LISTENER_STREAMS, Listener};
pub use pattern::{AddrPattern, NamePattern, PatternError, Ports, TargetPattern};
pub use policy::{Peers, Policy, PolicyAction, PolicyMode, Targets};
pub use route::{
    Action, Authority, HeaderChanges, HeaderMatch, Match, ProxyProtocol, Regex, RegexError, Route, Terms,
    ValueMatch,
};
pub use schema::schema;
pub use traces::{Collector, Ratio, Traces};
pub use upstream::{
    Balance, CONNECT_TIMEOUT, IDLE_TIMEOUT, InProcess, RESPONSE_TIMEOUT, UPSTREAM_STREAMS, Upstream,
};
pub use value::{
    FuturePath, HeaderError, parse_duration, parse_header, parse_header_flag, parse_header_name,
    parse_server_name, parse_socket_addr,
};

use self::reader::{Document, Purpose};
use crate::model::names::IdentityName;

/// How often a quiet connection is asked whether it is alive (PING).
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Timeout for the answer to a PING.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything that a process is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The process.
    pub daemon: Daemon,
    /// Where operators and monitoring reach it.
    pub admin: Admin,
    /// Who we are. Those that listeners and upstreams with TLS name are present.
    pub identities: BTreeMap<IdentityName, IdentitySettings>,
    /// Whose connections are captured by eBPF.
    pub captures: Vec<Capture>,
    /// Where rules of the operator's redirect connections to.
    pub redirects: Vec<Redirect>,
    /// Sockets that accept CONNECT requests.
    pub listeners: Vec<Listener>,
    /// Where flows go; the first match wins, no match is refused.
    pub routes: Vec<Route>,
    /// The gateways and proxies that flows are tunnelled through.
    pub upstreams: Vec<Upstream>,
    /// Who may reach what through our listeners; nothing is allowed until a rule says so.
    pub policies: Vec<Policy>,
    /// What the file says, with defaults and without secrets; null where there is no file.
    pub effective: Arc<serde_json::Value>,
    /// Where flows have a line.
    pub access_logs: Vec<AccessLog>,
    /// Where spans of flows are sent.
    pub traces: Option<Traces>,
    /// What still means what it did, and should be written in another way: each with its place.
    pub warnings: Vec<String>,
}

/// An HTTP version that carries CONNECT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/2.
    #[default]
    H2,
    /// HTTP/1.1, and 1.0 from clients that speak that.
    H1,
    /// HTTP/3, over QUIC.
    H3,
}

impl Protocol {
    /// What TLS calls it (RFC 7301 section 6, RFC 9113 section 3.2, RFC 9114 section 3.1).
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Self::H2 => b"h2",
            Self::H1 => b"http/1.1",
            Self::H3 => b"h3",
        }
    }

    /// What people call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::H2 => "HTTP/2",
            Self::H1 => "HTTP/1",
            Self::H3 => "HTTP/3",
        }
    }
}

/// What an upstream is spoken to with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/2.
    #[default]
    H2,
    /// HTTP/1.
    H1,
    /// HTTP/3.
    H3,
    /// HTTP/2, and HTTP/3 where an endpoint offers it and it gets through.
    Auto,
}

impl UpstreamProtocol {
    /// The one that is spoken first, or always.
    pub const fn first(self) -> Protocol {
        match self {
            Self::H2 | Self::Auto => Protocol::H2,
            Self::H1 => Protocol::H1,
            Self::H3 => Protocol::H3,
        }
    }

    /// All that may be spoken.
    pub fn all(self) -> impl Iterator<Item = Protocol> {
        [Some(self.first()), (self == Self::Auto).then_some(Protocol::H3)].into_iter().flatten()
    }

    /// As the configuration has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::H2 => "h2",
            Self::H1 => "h1",
            Self::H3 => "h3",
            Self::Auto => "auto",
        }
    }
}

/// Who decides how fast is sent over QUIC, which the kernel does for TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Congestion {
    /// CUBIC (RFC 9438): takes a lost packet for a full queue.
    #[default]
    Cubic,
    /// BBR: goes by the bandwidth that it measures, and little by loss.
    Bbr,
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
    /// One that wants nothing of the process.
    pub fn empty(daemon: Daemon) -> Self {
        Self {
            daemon,
            admin: Admin::default(),
            identities: BTreeMap::new(),
            captures: Vec::new(),
            redirects: Vec::new(),
            listeners: Vec::new(),
            routes: Vec::new(),
            upstreams: Vec::new(),
            policies: Vec::new(),
            effective: Arc::default(),
            access_logs: Vec::new(),
            traces: None,
            warnings: Vec::new(),
        }
    }

    /// The identities that captures name.
    pub fn identities_of_captures(&self) -> impl Iterator<Item = &IdentityName> {
        let redirects = self.redirects.iter().filter_map(|r| r.identity.as_ref());
        self.captures.iter().filter_map(|c| c.identity.as_ref()).chain(redirects)
    }

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

    /// Reads a text that stands beside what a daemon's file says; `called` is what mistakes in it are said of.
    pub fn parse_layer(text: &str, called: &Path) -> Result<Self, ConfigErrors> {
        Self::read(text, called, CheckFiles::No, Purpose::Layer)
    }

    fn read(text: &str, file: &Path, check: CheckFiles, purpose: Purpose) -> Result<Self, ConfigErrors> {
        let base = file.parent().unwrap_or(Path::new(""));
        let wrong = |mistakes| ConfigErrors { file: file.to_owned(), unreadable: None, mistakes };
        let (read, warnings) =
            Document::read::<Self>(text, base, check == CheckFiles::Yes, purpose).map_err(wrong)?;
        let warnings = warnings.iter().map(|warning| warning.shown(file)).collect();
        Ok(Self { effective: Arc::new(effective::of(text)), warnings, ..read })
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

impl Mistake {
    /// With the file that it is in.
    fn shown(&self, file: &Path) -> String {
        let colon = if self.key.is_empty() { "" } else { ": " };
        format!("{}:{}:{}: {}{colon}{}", file.display(), self.line, self.column, self.key, self.message)
    }
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
        if let Some(e) = &self.unreadable {
            return write!(f, "{}: {e}", self.file.display());
        }
        for (i, mistake) in self.mistakes.iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            write!(f, "{newline}{}", mistake.shown(&self.file))?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
