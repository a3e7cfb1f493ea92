//! What is known about one flow, and an address type for each meaning.
//!
//! # Invariants
//! - An address is never used for a meaning that it was not given; turning one kind into another is a visible step.

use std::{fmt, net::SocketAddr, str::FromStr};

use http::{HeaderMap, Version};

/// Who handed us a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// eBPF, or a rule, redirected an application's connect() to us.
    Capture,
    /// A peer sent a CONNECT request to one of our listeners.
    Listener,
}

/// What a flow is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// The bytes of a TCP connection.
    Tcp,
}

/// Which way a flow goes, seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// An application on this node opened it.
    Outbound,
    /// It came from the network.
    Inbound,
}

/// What the first bytes of a carried connection say of where it wants to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sniffed {
    /// Nothing that we understand.
    Nothing,
    /// TLS: the name that the client asks for (SNI, RFC 6066 section 3).
    Sni(HostName),
    /// HTTP/1: the host that the first request is for.
    Host(HostName),
}

impl Sniffed {
    /// The name that TLS asks for.
    pub fn sni(&self) -> Option<&HostName> {
        if let Self::Sni(name) = self { Some(name) } else { None }
    }

    /// The host that an HTTP/1 request is for.
    pub fn host(&self) -> Option<&HostName> {
        if let Self::Host(name) = self { Some(name) } else { None }
    }
}

/// A host name as resolvers take it: lower case, no trailing dot, no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName(Box<str>);

impl HostName {
    /// From what a client wrote.
    pub fn new(text: &str) -> Option<Self> {
        let name = text.strip_suffix('.').unwrap_or(text);
        is_host_name(name).then(|| Self(name.to_ascii_lowercase().into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name and a port.
    pub fn with_port(&self, port: u16) -> Target {
        Target::Name(self.0.to_string(), port)
    }
}

/// What a CONNECT request says besides its target.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// The version of HTTP that it came by.
    pub version: Version,
    /// Its headers.
    pub headers: &'a HeaderMap,
}

/// The address of the application (captured) or of the peer behind a CONNECT request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientAddr(pub SocketAddr);

/// Where an application wanted to connect, as the kernel program recorded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OriginalDst(pub SocketAddr);

/// The far address of a socket of ours: an upstream endpoint, or a tunnel peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddr(pub SocketAddr);

/// The far end of a connection to an upstream: where its socket leads, or, of one that goes through another
/// upstream and has no socket, what that upstream was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FarEnd {
    /// The address of a socket of ours.
    Socket(PeerAddr),
    /// An endpoint as it is written: nobody here resolves it.
    Through(Target),
}

/// Who a peer has proved to be: one subject alternative name of its verified certificate
/// (a SPIFFE URI if it has one, else a DNS name, else an IP address).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity(pub std::sync::Arc<str>);

/// Where a flow is to end: what stands in the `:authority` of a CONNECT request (RFC 9110 section 9.3.6).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A literal address.
    Addr(SocketAddr),
    /// A name for the far end to resolve, and a port. Lower case, no trailing dot.
    Name(String, u16),
}

/// Why a text is no CONNECT authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// No `:port`; CONNECT has no default port.
    #[error("authority has no port")]
    NoPort,
    /// The port is not a number from 1 to 65535.
    #[error("port is not a number from 1 to 65535")]
    Port,
    /// `user@` in front of the host.
    #[error("authority carries user information")]
    UserInfo,
    /// Neither an address nor a host name (RFC 1123: letters, digits, `-`, `_`, at most 253 bytes).
    #[error("host is neither an IP address nor a host name")]
    Host,
}

/// The longest host name (RFC 1035 section 2.3.4, without the trailing dot).
const HOST_MAX: usize = 253;
/// The longest label of a host name (RFC 1035 section 2.3.4).
const LABEL_MAX: usize = 63;

impl Target {
    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Addr(a) => a.port(),
            Self::Name(_, port) => *port,
        }
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(s: &str) -> Result<Self, TargetError> {
        if s.contains('@') {
            return Err(TargetError::UserInfo);
        }
        let (host, port) = s.rsplit_once(':').ok_or(TargetError::NoPort)?;
        // "::1" and "[::1]" have colons but no port.
        if host.ends_with(':') || (host.starts_with('[') && !host.ends_with(']')) {
            return Err(TargetError::NoPort);
        }
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(TargetError::Port);
        }
        let port = port.parse::<u16>().ok().filter(|p| *p != 0).ok_or(TargetError::Port)?;
        if let Some(v6) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            let ip = v6.parse::<std::net::Ipv6Addr>().map_err(|_| TargetError::Host)?;
            return Ok(Self::Addr(SocketAddr::from((ip, port))));
        }
        if let Ok(ip) = host.parse::<std::net::Ipv4Addr>() {
            return Ok(Self::Addr(SocketAddr::from((ip, port))));
        }
        let name = host.strip_suffix('.').unwrap_or(host);
        is_host_name(name).then(|| Self::Name(name.to_ascii_lowercase(), port)).ok_or(TargetError::Host)
    }
}

/// A host name as resolvers take it. A name of digits and dots only would be read as an address by
/// some of them (`127.1`), so the last label must not be a number.
pub(crate) fn is_host_name(s: &str) -> bool {
    let label_ok = |l: &str| {
        !l.is_empty()
            && l.len() <= LABEL_MAX
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let last = s.rsplit('.').next().unwrap_or_default();
    s.len() <= HOST_MAX
        && s.split('.').all(label_ok)
        && !last.bytes().all(|b| b.is_ascii_digit())
        && !last.to_ascii_lowercase().starts_with("0x")
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(a) => a.fmt(f),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

impl fmt::Display for FarEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(addr) => addr.fmt(f),
            Self::Through(endpoint) => endpoint.fmt(f),
        }
    }
}

macro_rules! display_inner {
    ($($t:ty),*) => {$(
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display_inner!(ClientAddr, OriginalDst, PeerAddr, Identity, HostName);

impl From<OriginalDst> for Target {
    fn from(o: OriginalDst) -> Self {
        Self::Addr(o.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_takes_what_rfc_9110_allows() {
        for (text, shown) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[2001:db8::1]:443", "[2001:db8::1]:443"),
            ("Web.Internal.:8080", "web.internal:8080"),
            ("a_b.example:1", "a_b.example:1"),
            ("localhost:65535", "localhost:65535"),
        ] {
            assert_eq!(text.parse::<Target>().map(|t| t.to_string()), Ok(shown.to_owned()), "{text}");
        }
    }

    #[test]
    fn target_refuses_the_rest_and_says_why() {
        let long = format!("{}:80", "a".repeat(64));
        let longer = format!("{}:80", "a.".repeat(200));
        for (text, why) in [
            ("10.0.0.1", TargetError::NoPort),
            ("example.org", TargetError::NoPort),
            ("::1", TargetError::NoPort),
            ("[::1]", TargetError::NoPort),
            ("example.org:", TargetError::Port),
            ("example.org:0", TargetError::Port),
            ("example.org:65536", TargetError::Port),
            ("example.org:+80", TargetError::Port),
            ("root@example.org:80", TargetError::UserInfo),
            ("[fe80::1%eth0]:80", TargetError::Host),
            ("127.1:80", TargetError::Host),
            ("0x7f000001:80", TargetError::Host),
            ("1.2.3.4.5:80", TargetError::Host),
            ("-a.example:80", TargetError::Host),
            ("a b:80", TargetError::Host),
            ("a\0b:80", TargetError::Host),
            (":80", TargetError::Host),
            (long.as_str(), TargetError::Host),
            (longer.as_str(), TargetError::Host),
        ] {
            assert_eq!(text.parse::<Target>(), Err(why), "{text}");
        }
    }
}
