//! What can stand behind a key: how each kind of value is read, and what the schema says of it.
//!
//! Each reads one TOML value; its mistakes name the text that was wrong.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use http::{HeaderName, HeaderValue};
use rustls_pki_types::ServerName;
use serde_json::{Value as Json, json};

use super::{
    Balance, Bypass, Bytes, CheckKind, ClientAuth, Congestion, KeyExchange, MetricSet, OnExpiry, OnFailure,
    Peers, PolicyAction, PolicyMode, Protocol, ProviderAddr, Relay, UpstreamProtocol,
    access_log::{LineFormat, Only, Output},
    endpoints::Method,
    identity::{ENDPOINT_VARIABLE, WorkloadApiAddr},
    pattern::{AddrPattern, NamePattern, TargetPattern},
    reader::{Cell, Value},
    route::{ProxyProtocol, Regex},
};
use crate::model::{
    flow::{SourceKind, Target},
    mark::Mark,
    names::{IdentityName, UpstreamName},
    san::SanPattern,
};

/// Headers that are ours to set, or that HTTP/2 has no place for (RFC 9113 section 8.2.2), or that would
/// change what the request is.
const RESERVED_HEADERS: [&str; 14] = [
    "connection",
    "content-length",
    "expect",
    "forwarded",
    "host",
    "keep-alive",
    "proxy-connection",
    "proxy-status",
    "te",
    "traceparent",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
];

/// Reads a value out of a string by `FromStr`; its mistakes are the text and what is wrong with it.
fn parsed<T>(cell: &Cell<'_>, wanted: &str) -> Option<T>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    let text = cell.text(wanted)?;
    text.parse().map_or_else(|e| cell.wrong(format!("\"{text}\": {e}")), Some)
}

macro_rules! by_from_str {
    ($($t:ty: $wanted:literal, $example:literal;)*) => {$(
        impl Value for $t {
            fn schema() -> Json {
                json!({ "type": "string", "examples": [$example] })
            }
            fn read(cell: &Cell<'_>) -> Option<Self> {
                parsed(cell, $wanted)
            }
            fn show(&self) -> Json {
                json!(self.to_string())
            }
        }
    )*};
}
by_from_str! {
    AddrPattern: "a string, CIDR[:PORTS]", "10.0.0.0/8:80,8000-8999";
    NamePattern: "a string, NAME[:PORTS]", "*.internal:443";
    TargetPattern: "a string, CIDR[:PORTS] or NAME[:PORTS]", "10.0.0.0/8:80";
    Regex: "a string, a regular expression", "v[0-9]+";
    SanPattern: "a string: a URI, a DNS name or an address", "spiffe://example.org/ns/*/sa/web";
    Target: "a string, HOST:PORT", "10.9.0.1:15008";
    ProviderAddr: "a string: unix:///PATH or tcp://ADDRESS:PORT", "unix:///run/sds.sock";
}

/// A word of a fixed few.
trait Word: Copy + 'static {
    /// What is taken.
    const WORDS: &'static [(&'static str, Self)];
    /// What the design has, and this version does not.
    const LATER: &'static [&'static str] = &[];
}

macro_rules! by_word {
    ($($t:ty),*) => {$(
        impl Value for $t {
            fn schema() -> Json {
                json!({ "enum": <$t>::WORDS.iter().map(|(w, _)| *w).collect::<Vec<_>>() })
            }
            fn read(cell: &Cell<'_>) -> Option<Self> {
                let words = <$t>::WORDS.iter().map(|(w, _)| format!("\"{w}\"")).collect::<Vec<_>>().join(" or ");
                let text = cell.text(&words)?;
                match <$t>::WORDS.iter().find(|(w, _)| *w == text) {
                    Some((_, value)) => Some(*value),
                    None if <$t>::LATER.contains(&text) => cell.wrong(format!("\"{text}\" is not supported yet")),
                    None => cell.wrong(format!("must be {words}, not \"{text}\"")),
                }
            }
            fn show(&self) -> Json {
                json!(<$t>::WORDS.iter().find(|(_, v)| v == self).map(|(w, _)| *w))
            }
        }
    )*};
}
by_word!(
    MetricSet,
    Mode,
    OnFailure,
    Bypass,
    Protocol,
    UpstreamProtocol,
    ClientAuth,
    Congestion,
    Balance,
    Relay,
    ProxyProtocol,
    SourceKind,
    Method,
    CheckKind,
    PolicyAction,
    PolicyMode,
    OnExpiry,
    KeyExchange,
    Output,
    LineFormat,
    Only
);

/// Who captures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Our kernel programs.
    Ebpf,
    /// Rules of the operator's.
    Redirect,
}

impl Word for Mode {
    const WORDS: &'static [(&'static str, Self)] = &[("ebpf", Self::Ebpf), ("redirect", Self::Redirect)];
}
impl Word for OnFailure {
    const WORDS: &'static [(&'static str, Self)] = &[("closed", Self::Closed), ("open", Self::Open)];
}
impl Word for Bypass {
    const WORDS: &'static [(&'static str, Self)] =
        &[("off", Self::Off), ("auto", Self::Auto), ("on", Self::On)];
}
impl Word for Protocol {
    const WORDS: &'static [(&'static str, Self)] = &[("h2", Self::H2), ("h1", Self::H1), ("h3", Self::H3)];
}
impl Word for UpstreamProtocol {
    const WORDS: &'static [(&'static str, Self)] =
        &[("h2", Self::H2), ("h1", Self::H1), ("h3", Self::H3), ("auto", Self::Auto)];
}
impl Word for Congestion {
    const WORDS: &'static [(&'static str, Self)] = &[("cubic", Self::Cubic), ("bbr", Self::Bbr)];
}
impl Word for ClientAuth {
    const WORDS: &'static [(&'static str, Self)] = &[("required", Self::Required)];
    const LATER: &'static [&'static str] = &["optional", "none"];
}
impl Word for Balance {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("least_request", Self::LeastRequest),
        ("round_robin", Self::RoundRobin),
        ("random", Self::Random),
        ("consistent_hash", Self::ConsistentHash),
    ];
}
impl Word for Method {
    const WORDS: &'static [(&'static str, Self)] = &[("static", Self::Static), ("dns", Self::Dns)];
}
impl Word for CheckKind {
    const WORDS: &'static [(&'static str, Self)] = &[("tcp", Self::Tcp), ("ping", Self::Ping)];
}
impl Word for PolicyAction {
    const WORDS: &'static [(&'static str, Self)] = &[("allow", Self::Allow), ("deny", Self::Deny)];
}
impl Word for PolicyMode {
    const WORDS: &'static [(&'static str, Self)] = &[("enforce", Self::Enforce), ("report", Self::Report)];
}
impl Word for OnExpiry {
    const WORDS: &'static [(&'static str, Self)] = &[("drain", Self::Drain), ("end", Self::End)];
}
impl Word for KeyExchange {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("x25519mlkem768", Self::X25519MlKem768),
        ("x25519", Self::X25519),
        ("secp256r1", Self::Secp256r1),
        ("secp384r1", Self::Secp384r1),
    ];
}
impl Word for MetricSet {
    const WORDS: &'static [(&'static str, Self)] = &[("istio", Self::Istio)];
}
impl Word for Relay {
    const WORDS: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("splice", Self::Splice), ("copy", Self::Copy), ("pipe", Self::Pipe)];
}
impl Word for Output {
    const WORDS: &'static [(&'static str, Self)] =
        &[("stdout", Self::Stdout), ("file", Self::File), ("journal", Self::Journal)];
}
impl Word for LineFormat {
    const WORDS: &'static [(&'static str, Self)] = &[("json", Self::Json), ("text", Self::Text)];
}
impl Word for Only {
    const WORDS: &'static [(&'static str, Self)] = &[("all", Self::All), ("failures", Self::Failures)];
}
impl Word for ProxyProtocol {
    const WORDS: &'static [(&'static str, Self)] = &[("v2", Self::V2)];
}
impl Word for SourceKind {
    const WORDS: &'static [(&'static str, Self)] =
        &[("captured", Self::Capture), ("listener", Self::Listener)];
}

impl<T: Value> Value for Vec<T> {
    fn schema() -> Json {
        json!({ "type": "array", "items": T::schema() })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let items = cell.items("a list: [\"..\", \"..\"]")?;
        // Each item reports its own mistake, so all are read before any is missed.
        let read: Vec<_> = items.iter().map(T::read).collect();
        read.into_iter().collect()
    }
    fn show(&self) -> Json {
        self.iter().map(T::show).collect()
    }
}

impl Value for String {
    fn schema() -> Json {
        json!({ "type": "string" })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let text = cell.text("a string")?;
        if text.is_empty() { cell.wrong("is empty") } else { Some(text.to_owned()) }
    }
    fn show(&self) -> Json {
        json!(self)
    }
}

impl Value for UpstreamName {
    fn schema() -> Json {
        String::schema()
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        String::read(cell).map(Self::from)
    }
    fn show(&self) -> Json {
        json!(self.as_str())
    }
}

impl Value for IdentityName {
    fn schema() -> Json {
        String::schema()
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        String::read(cell).map(Self::from)
    }
    fn show(&self) -> Json {
        json!(self.as_str())
    }
}

/// The socket of a Workload API: said here, or by the environment.
impl Value for WorkloadApiAddr {
    fn schema() -> Json {
        json!({ "type": "string", "examples": ["unix:///run/spire/agent.sock"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        const WANTED: &str = "a string: unix:///PATH, tcp://ADDRESS:PORT, or \"env\"";
        if cell.text(WANTED)? != "env" {
            return parsed(cell, WANTED).map(Self);
        }
        #[expect(clippy::disallowed_methods, reason = "the text asks for it, and it is parsed here, once")]
        let found = std::env::var_os(ENDPOINT_VARIABLE);
        let Some(addr) = found else {
            return match cell.doc.check_files {
                true => cell.wrong(format!("is \"env\", and {ENDPOINT_VARIABLE} is not set")),
                // For another machine, whose environment is not known.
                false => Some(Self(ProviderAddr::Unix("/".into()))),
            };
        };
        let addr = addr.to_string_lossy();
        match addr.parse() {
            Ok(addr) => Some(Self(addr)),
            Err(e) => cell.wrong(format!("{ENDPOINT_VARIABLE}=\"{addr}\": {e}")),
        }
    }
    fn show(&self) -> Json {
        json!(self.0.to_string())
    }
}

impl Value for bool {
    fn schema() -> Json {
        json!({ "type": "boolean" })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        cell.boolean()
    }
    fn show(&self) -> Json {
        json!(self)
    }
}

impl Value for Mark {
    fn schema() -> Json {
        json!({ "type": ["string", "integer"], "examples": ["0x1000/0x1000"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        const WANTED: &str = "a string, VALUE[/MASK], or a number that is not 0";
        if cell.is_integer() {
            let n = cell.integer(1, u64::from(u32::MAX))?;
            return u32::try_from(n).ok().and_then(|value| Self::new(value, u32::MAX));
        }
        parsed(cell, WANTED)
    }
    fn show(&self) -> Json {
        json!(self.to_string())
    }
}

impl Value for NonZeroU32 {
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 1, "maximum": u32::MAX })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let n = cell.integer(1, u64::from(u32::MAX))?;
        u32::try_from(n).ok().and_then(Self::new)
    }
    fn show(&self) -> Json {
        json!(self)
    }
}

impl Value for NonZeroUsize {
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 1, "maximum": i32::MAX })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        // Counts of things that each cost memory: no machine has room for more than these.
        let n = cell.integer(1, u64::from(i32::MAX.unsigned_abs()))?;
        usize::try_from(n).ok().and_then(Self::new)
    }
    fn show(&self) -> Json {
        json!(self)
    }
}

impl Value for Bytes {
    fn schema() -> Json {
        json!({ "type": "string", "pattern": "^[0-9]+(KiB|MiB|GiB)$", "examples": ["512MiB", "2GiB"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let text = cell.text("a size in quotes, such as \"512MiB\" or \"2GiB\"")?;
        parse_bytes(text).map_or_else(|e| cell.wrong(format!("\"{text}\": {e}")), Some)
    }
    fn show(&self) -> Json {
        let Self(n) = *self;
        match [(30, "GiB"), (20, "MiB")].into_iter().find(|(shift, _)| n.is_multiple_of(1 << shift)) {
            Some((shift, unit)) => json!(format!("{}{unit}", n >> shift)),
            None => json!(format!("{}KiB", n >> 10)),
        }
    }
}

/// Reads `64KiB`, `512MiB`, `2GiB`. At least 1 MiB: with less nothing moves.
fn parse_bytes(text: &str) -> Result<Bytes, &'static str> {
    const WANTED: &str = "must be a number and a unit: 512KiB, 64MiB, 2GiB";
    const MIN: u64 = 1 << 20;
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().map_err(|_| WANTED)?;
    let unit = match &text[digits..] {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(WANTED),
    };
    match number.checked_mul(unit) {
        Some(n) if n >= MIN => Ok(Bytes(n)),
        Some(_) => Err("must be at least 1MiB"),
        None => Err("is more than there is"),
    }
}

impl Value for Duration {
    fn schema() -> Json {
        json!({ "type": "string", "pattern": "^[0-9]+(ms|s|m|h)$", "examples": ["250ms", "5s"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let text = cell.text("a duration in quotes, such as \"5s\" or \"250ms\"")?;
        parse_duration(text).map_or_else(|e| cell.wrong(format!("\"{text}\": {e}")), Some)
    }
    fn show(&self) -> Json {
        let ms = self.as_millis();
        if ms.is_multiple_of(1000) { json!(format!("{}s", ms / 1000)) } else { json!(format!("{ms}ms")) }
    }
}

/// Reads `250ms`, `5s`, `2m`, `1h`. Longer than nothing, and at most a day.
pub fn parse_duration(text: &str) -> Result<Duration, &'static str> {
    const WANTED: &str = "must be a number and a unit: 250ms, 5s, 2m, 1h";
    // Every duration of ours is a wait of somebody's; a day is more than anyone waits.
    const MAX: Duration = Duration::from_secs(24 * 60 * 60);
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().map_err(|_| WANTED)?;
    let unit = match &text[digits..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(WANTED),
    };
    let duration = Duration::from_millis(number.saturating_mul(unit));
    match duration {
        Duration::ZERO => Err("must be longer than nothing"),
        d if d > MAX => Err("must be at most a day"),
        d => Ok(d),
    }
}

/// A file that exists; relative paths start at the configuration file.
impl Value for PathBuf {
    fn schema() -> Json {
        json!({ "type": "string" })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let text = cell.text("a path in quotes")?;
        if text.is_empty() {
            return cell.wrong("is empty");
        }
        let path = cell.doc.base.join(Path::new(text));
        if cell.doc.check_files
            && let Err(e) = path.metadata()
        {
            return cell.wrong(format!("{}: {e}", path.display()));
        }
        Some(path)
    }
    fn show(&self) -> Json {
        json!(self)
    }
}

/// A path of which nothing need exist yet, relative to the file that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FuturePath(pub PathBuf);

impl Value for FuturePath {
    fn schema() -> Json {
        json!({ "type": "string" })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let text = cell.text("a path in quotes")?;
        if text.is_empty() { cell.wrong("is empty") } else { Some(Self(cell.doc.base.join(Path::new(text)))) }
    }
    fn show(&self) -> Json {
        json!(self.0)
    }
}

impl Value for SocketAddr {
    fn schema() -> Json {
        json!({ "type": "string", "examples": ["0.0.0.0:15008", "[::]:15008"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let text = cell.text("a string, ADDRESS:PORT")?;
        parse_socket_addr(text).map_or_else(|e| cell.wrong(format!("\"{text}\" {e}")), Some)
    }
    fn show(&self) -> Json {
        json!(self)
    }
}

/// Reads `ADDRESS:PORT`, and says what is missing.
pub fn parse_socket_addr(text: &str) -> Result<SocketAddr, &'static str> {
    match text.parse() {
        Ok(addr) => Ok(addr),
        Err(_) if text.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() => Err("has no port"),
        Err(_) => Err("is not an address and port, such as 0.0.0.0:15008 or [::]:15008"),
    }
}

impl Value for ServerName<'static> {
    fn schema() -> Json {
        json!({ "type": "string", "examples": ["gateway.internal"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let text = cell.text("a string: a DNS name or an address")?;
        parse_server_name(text).map_or_else(|e| cell.wrong(format!("\"{text}\" {e}")), Some)
    }
    fn show(&self) -> Json {
        json!(self.to_str())
    }
}

/// Reads the name that a server's certificate is to be valid for.
pub fn parse_server_name(text: &str) -> Result<ServerName<'static>, &'static str> {
    ServerName::try_from(text.to_owned()).map_err(|_| "is neither a DNS name nor an address")
}

/// Why a header cannot be added to CONNECT requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not `NAME=VALUE`.
    #[error("must be NAME=VALUE")]
    NoValue,
    /// Not a name.
    #[error("\"{0}\" is not a header name")]
    Name(String),
    /// `:authority` and the like.
    #[error("\"{0}\" is a pseudo-header, which only the tunnel itself sets")]
    Pseudo(String),
    /// Ours, or connection-specific.
    #[error("\"{0}\" is set by the tunnel itself, or has no place in a CONNECT request")]
    Reserved(String),
    /// Control characters in the value.
    #[error("the value of \"{0}\" has characters that no header can carry")]
    Value(String),
}

/// The name of a header that may be added to CONNECT requests, or copied from one to the next.
pub fn parse_header_name(name: &str) -> Result<HeaderName, HeaderError> {
    if name.starts_with(':') {
        return Err(HeaderError::Pseudo(name.to_owned()));
    }
    let parsed = HeaderName::from_bytes(name.as_bytes()).map_err(|_| HeaderError::Name(name.to_owned()))?;
    if RESERVED_HEADERS.contains(&parsed.as_str()) {
        return Err(HeaderError::Reserved(name.to_owned()));
    }
    Ok(parsed)
}

/// A header that may be added to CONNECT requests.
pub fn parse_header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), HeaderError> {
    let parsed = parse_header_name(name)?;
    let value = HeaderValue::from_str(value).map_err(|_| HeaderError::Value(name.to_owned()))?;
    Ok((parsed, value))
}

/// Reads `NAME=VALUE`.
pub fn parse_header_flag(text: &str) -> Result<(HeaderName, HeaderValue), HeaderError> {
    let (name, value) = text.split_once('=').ok_or(HeaderError::NoValue)?;
    parse_header(name, value)
}

/// Headers to be added to CONNECT requests: a table.
impl Value for Vec<(HeaderName, HeaderValue)> {
    fn schema() -> Json {
        json!({ "type": "object", "additionalProperties": { "type": "string" } })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        let entries = cell.entries("a table of strings: { baggage = \"..\" }")?;
        let header = |(name, cell): &(&str, Cell<'_>)| {
            let value = cell.text("a string")?;
            parse_header(name, value).map_or_else(|e| cell.wrong(e.to_string()), Some)
        };
        let read: Vec<_> = entries.iter().map(header).collect();
        read.into_iter().collect()
    }
    fn show(&self) -> Json {
        json!({})
    }
}

impl Value for Peers {
    fn schema() -> Json {
        json!({ "anyOf": [
            { "const": "any" },
            { "type": "array", "items": SanPattern::schema(), "minItems": 1 },
        ] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        if cell.is_text() {
            return match cell.text("")? {
                "any" => Some(Self::Any),
                other => cell.wrong(format!("must be a list of names, or \"any\", not \"{other}\"")),
            };
        }
        match Vec::read(cell)? {
            none if none.is_empty() => cell.wrong("is empty: nobody would match; \"any\" is every peer"),
            some => Some(Self::Of(some)),
        }
    }
    fn show(&self) -> Json {
        match self {
            Self::Any => json!("any"),
            Self::Of(list) => list.show(),
        }
    }
}
