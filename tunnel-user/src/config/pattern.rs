//! Patterns for addresses, names and targets, as configuration and flags state them.
//!
//! Texts such as `10.0.0.0/8:80,8000-8999` and `*.internal:443`. Names are not resolved.
//!
//! # Invariants
//! - What is printed parses to the same value, and a pattern has one spelling.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::model::flow::{Target, is_host_name};

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// Not an address or a network.
    #[error("not an address or network, such as 10.0.0.0/8, 10.1.2.3:22 or [fd00::/8]:80")]
    Addr,
    /// The prefix length is not one.
    #[error("the prefix length must be a number from 0 to {0}")]
    Prefix(u8),
    /// Bits set behind the prefix: the network or the length is a slip.
    #[error("bits are set beyond the prefix; {0} was probably meant, or a longer prefix")]
    HostBits(IpNet),
    /// IPv4 dressed as IPv6: connections to it are treated as IPv4.
    #[error("v4-mapped addresses are treated as IPv4; write {0}")]
    Mapped(IpNet),
    /// Not ports.
    #[error("the ports must be numbers from 1 to 65535, or ranges of them, such as 80,8000-8999")]
    Ports,
    /// A range that ends before it starts.
    #[error("the port range {0}-{1} ends before it starts")]
    PortOrder(u16, u16),
    /// Not a host name, or a `*` that does not stand alone in front.
    #[error("not a host name (exact, or \"*.\" and a name)")]
    Name,
}

/// A set of ports; the empty text is all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ports(Vec<(u16, u16)>);

impl Ports {
    /// Whether `port` is one of them.
    pub fn contains(&self, port: u16) -> bool {
        let next = self.0.partition_point(|(_, to)| *to < port);
        self.is_all() || self.0.get(next).is_some_and(|(from, _)| *from <= port)
    }

    /// Whether every port is one of them.
    pub fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges, both ends included, in order, disjoint, not adjacent. Empty: all ports.
    pub fn ranges(&self) -> &[(u16, u16)] {
        &self.0
    }

    /// The ports that at least one of `sets` has; `None` for no sets.
    pub fn union<'a>(sets: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let mut ranges = Vec::new();
        let mut some = false;
        for set in sets {
            if set.is_all() {
                return Some(Self::default());
            }
            some = true;
            ranges.extend_from_slice(&set.0);
        }
        some.then(|| Self::merged(ranges))
    }

    fn merged(mut ranges: Vec<(u16, u16)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
        for (from, to) in ranges {
            match merged.last_mut() {
                Some(last) if from <= last.1.saturating_add(1) => last.1 = last.1.max(to),
                _ => merged.push((from, to)),
            }
        }
        Self(merged)
    }
}

impl FromStr for Ports {
    type Err = PatternError;

    fn from_str(s: &str) -> Result<Self, PatternError> {
        let port = |s: &str| {
            let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
            s.parse().ok().filter(|p| digits && *p != 0u16).ok_or(PatternError::Ports)
        };
        let range = |s: &str| {
            let (from, to) = s.split_once('-').unwrap_or((s, s));
            let (from, to) = (port(from)?, port(to)?);
            if from <= to { Ok((from, to)) } else { Err(PatternError::PortOrder(from, to)) }
        };
        s.split(',').map(range).collect::<Result<_, _>>().map(Self::merged)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (from, to)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            if from == to {
                write!(f, "{comma}{from}")?;
            } else {
                write!(f, "{comma}{from}-{to}")?;
            }
        }
        Ok(())
    }
}

/// A network and the ports in it: `CIDR[:PORTS]`.
///
/// `10.0.0.0/8`, `10.0.0.0/8:80,8000-8999`, `10.1.2.3`, `10.1.2.3:22`, `fd00::/8`, `fd00::/8:80`,
/// `[fd00::/8]:80`, `[fd00::1]:80`. A lone address is its own network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AddrPattern {
    net: IpNet,
    ports: Ports,
}

impl AddrPattern {
    /// Every port of `net`, whose bits beyond the prefix are cleared.
    pub fn net_only(net: IpNet) -> Self {
        Self { net: net.trunc(), ports: Ports::default() }
    }

    /// The network.
    pub fn net(&self) -> IpNet {
        self.net
    }

    /// The ports.
    pub fn ports(&self) -> &Ports {
        &self.ports
    }

    /// Whether `addr` is in it. A v4-mapped address is the IPv4 address it maps.
    pub fn contains(&self, addr: SocketAddr) -> bool {
        self.net.contains(&addr.ip().to_canonical()) && self.ports.contains(addr.port())
    }
}

impl FromStr for AddrPattern {
    type Err = PatternError;

    fn from_str(s: &str) -> Result<Self, PatternError> {
        if s.is_empty() {
            return Err(PatternError::Empty);
        }
        let (net, ports) = split_addr(s)?;
        Ok(Self { net: net_from(net)?, ports: ports.map(str::parse).transpose()?.unwrap_or_default() })
    }
}

/// The network's text, and the ports'.
fn split_addr(s: &str) -> Result<(&str, Option<&str>), PatternError> {
    if let Some(rest) = s.strip_prefix('[') {
        let (net, rest) = rest.split_once(']').ok_or(PatternError::Addr)?;
        return match rest.strip_prefix(':') {
            // Brackets are for IPv6, as in a URL.
            _ if !net.contains(':') => Err(PatternError::Addr),
            Some(ports) => Ok((net, Some(ports))),
            None if rest.is_empty() => Ok((net, None)),
            None => Err(PatternError::Addr),
        };
    }
    // Behind a slash there is no colon but the one in front of the ports.
    let colon = match s.find('/') {
        Some(slash) => s[slash..].find(':').map(|i| slash + i),
        None if s.parse::<IpAddr>().is_ok() => None,
        None => s.find(':'),
    };
    Ok(colon.map_or((s, None), |i| (&s[..i], Some(&s[i + 1..]))))
}

fn net_from(s: &str) -> Result<IpNet, PatternError> {
    let (addr, prefix) = s.split_once('/').map_or((s, None), |(a, p)| (a, Some(p)));
    let addr: IpAddr = addr.parse().map_err(|_| PatternError::Addr)?;
    let max = if addr.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => max,
        Some(p) => p
            .parse::<u8>()
            .ok()
            .filter(|n| *n <= max && p.bytes().all(|b| b.is_ascii_digit()))
            .ok_or(PatternError::Prefix(max))?,
    };
    let net = IpNet::new(addr, prefix).map_err(|_| PatternError::Prefix(max))?;
    if let IpNet::V6(v6) = net
        && let Some(v4) = mapped(v6)
    {
        return Err(PatternError::Mapped(v4));
    }
    if net.trunc() == net { Ok(net) } else { Err(PatternError::HostBits(net.trunc())) }
}

/// The IPv4 network that a network inside `::ffff:0:0/96` maps.
fn mapped(net: Ipv6Net) -> Option<IpNet> {
    let prefix = net.prefix_len().checked_sub(96)?;
    let v4 = net.addr().to_ipv4_mapped()?;
    Ipv4Net::new(v4, prefix).ok().map(|n| IpNet::V4(n.trunc()))
}

impl fmt::Display for AddrPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.net.prefix_len() == self.net.max_prefix_len();
        let net = if host { self.net.addr().to_string() } else { self.net.to_string() };
        match (self.ports.is_all(), self.net) {
            (true, _) => f.write_str(&net),
            (false, IpNet::V4(_)) => write!(f, "{net}:{}", self.ports),
            (false, IpNet::V6(_)) => write!(f, "[{net}]:{}", self.ports),
        }
    }
}

/// A host name and the ports on it: `NAME[:PORTS]`, where `NAME` is exact, or `*.suffix` for every name
/// below `suffix`, however deep, and not `suffix` itself (as Envoy's virtual hosts have it).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamePattern {
    /// Lower case, without the `*.`.
    name: String,
    below: bool,
    ports: Ports,
}

impl NamePattern {
    /// Whether it takes this name (any case, with or without the trailing dot) and port.
    pub fn contains(&self, name: &str, port: u16) -> bool {
        self.takes_name(name) && self.ports.contains(port)
    }

    /// Whether it takes this name (any case, with or without the trailing dot) at some port.
    pub fn takes_name(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name).as_bytes();
        let (front, same) = match name.len().checked_sub(self.name.len()) {
            Some(at) => name.split_at(at),
            None => return false,
        };
        // More than the dot has to be left.
        let placed = if self.below { front.len() > 1 && front.ends_with(b".") } else { front.is_empty() };
        placed && same.eq_ignore_ascii_case(self.name.as_bytes())
    }

    /// The name, lower case: the one that it takes, or the one below which it takes all.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it takes the names below its own, and not that one.
    pub fn is_below(&self) -> bool {
        self.below
    }

    /// The ports.
    pub fn ports(&self) -> &Ports {
        &self.ports
    }
}

impl FromStr for NamePattern {
    type Err = PatternError;

    fn from_str(s: &str) -> Result<Self, PatternError> {
        if s.is_empty() {
            return Err(PatternError::Empty);
        }
        let (name, ports) = s.split_once(':').map_or((s, None), |(n, p)| (n, Some(p)));
        let (below, name) = name.strip_prefix("*.").map_or((false, name), |n| (true, n));
        let name = name.strip_suffix('.').unwrap_or(name);
        if !is_host_name(name) {
            return Err(PatternError::Name);
        }
        let ports = ports.map(str::parse).transpose()?.unwrap_or_default();
        Ok(Self { name: name.to_ascii_lowercase(), below, ports })
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let star = if self.below { "*." } else { "" };
        write!(f, "{star}{}", self.name)?;
        if self.ports.is_all() { Ok(()) } else { write!(f, ":{}", self.ports) }
    }
}

/// What a CONNECT request may ask for: an [`AddrPattern`] or a [`NamePattern`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetPattern {
    /// By address.
    Addr(AddrPattern),
    /// By name.
    Name(NamePattern),
}

impl TargetPattern {
    /// Whether it takes the target as asked for. A name is not resolved.
    pub fn contains(&self, target: &Target) -> bool {
        match (self, target) {
            (Self::Addr(pattern), Target::Addr(addr)) => pattern.contains(*addr),
            (Self::Name(pattern), Target::Name(name, port)) => pattern.contains(name, *port),
            _ => false,
        }
    }
}

impl FromStr for TargetPattern {
    type Err = PatternError;

    fn from_str(s: &str) -> Result<Self, PatternError> {
        let host = s.split_once(':').map_or(s, |(host, _)| host);
        // What looks like an address is judged as one, so that the error is the right one.
        let numeric = !host.is_empty() && host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        if numeric || s.starts_with('[') || s.contains('/') || s.matches(':').count() > 1 {
            s.parse().map(Self::Addr)
        } else {
            s.parse().map(Self::Name)
        }
    }
}

impl fmt::Display for TargetPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(p) => p.fmt(f),
            Self::Name(p) => p.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_documented_form_parses() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.0/8:80", "10.0.0.0/8:80"),
            ("10.0.0.0/8:8000-8999,80", "10.0.0.0/8:80,8000-8999"),
            ("10.0.0.0/8:80,81,82-90", "10.0.0.0/8:80-90"),
            ("10.1.2.3", "10.1.2.3"),
            ("10.1.2.3/32", "10.1.2.3"),
            ("10.1.2.3:22", "10.1.2.3:22"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::/0", "::/0"),
            ("fd00::/8", "fd00::/8"),
            ("fd00::/8:80", "[fd00::/8]:80"),
            ("[fd00::/8]:80", "[fd00::/8]:80"),
            ("[fd00::1]:80", "[fd00::1]:80"),
            ("[fd00::1]", "fd00::1"),
            ("fd00::1:80", "fd00::1:80"),
        ] {
            assert_eq!(text.parse::<AddrPattern>().map(|p| p.to_string()), Ok(shown.to_owned()), "{text}");
            assert!(matches!(text.parse(), Ok(TargetPattern::Addr(_))), "{text}");
        }
        for text in ["web.internal", "web.internal:80", "*.internal:1-9", "localhost"] {
            assert_eq!(text.parse::<TargetPattern>().unwrap().to_string(), text);
        }
    }

    /// A text that is nearly a pattern is refused with the reason, and where it can be told with what was meant.
    #[test]
    fn a_slip_is_named() {
        let v4 = |s: &str| s.parse::<IpNet>().unwrap();
        for (text, why) in [
            ("", PatternError::Empty),
            ("10.0.0.1/8", PatternError::HostBits(v4("10.0.0.0/8"))),
            ("10.0.0.0/33", PatternError::Prefix(32)),
            ("10.0.0.0/+8", PatternError::Prefix(32)),
            ("10.0.0.0/", PatternError::Prefix(32)),
            ("fd00::/129", PatternError::Prefix(128)),
            ("10.0.0/8", PatternError::Addr),
            ("10.0.0.0/8:", PatternError::Ports),
            ("10.0.0.0/8:0", PatternError::Ports),
            ("10.0.0.0/8:80,", PatternError::Ports),
            ("10.0.0.0/8:65536", PatternError::Ports),
            ("10.0.0.0/8:90-80", PatternError::PortOrder(90, 80)),
            ("[10.0.0.0/8]:80", PatternError::Addr),
            ("[fd00::1]80", PatternError::Addr),
            ("[fd00::1", PatternError::Addr),
            ("::ffff:10.0.0.0/104", PatternError::Mapped(v4("10.0.0.0/8"))),
        ] {
            assert_eq!(text.parse::<AddrPattern>(), Err(why), "{text}");
        }
        for text in ["*", "*.", "a.*.b", "-a", "a b", "web..internal"] {
            assert_eq!(text.parse::<TargetPattern>(), Err(PatternError::Name), "{text}");
        }
        assert_eq!("10.0.0.1/8:80".parse::<TargetPattern>().unwrap_err().to_string().split(';').count(), 2);
    }

    /// `*.suffix` takes names below the suffix and no name that merely ends like it.
    #[test]
    fn names_match_whole_labels() {
        let takes = |pattern: &str, name: &str| pattern.parse::<NamePattern>().unwrap().contains(name, 80);
        assert!(takes("web.internal", "WEB.internal."));
        assert!(!takes("web.internal", "a.web.internal"));
        assert!(takes("*.internal", "a.b.internal"));
        assert!(!takes("*.internal", "internal"));
        assert!(!takes("*.internal", "eviinternal"));
        assert!(!takes("*.internal", ".internal"));
        assert!(!takes("web.internal:81", "web.internal"));
    }

    prop_compose! {
        fn ports()(ranges in prop::collection::vec((1..=u16::MAX, 1..=u16::MAX), 0..4)) -> Ports {
            Ports::merged(ranges.into_iter().map(|(a, b)| (a.min(b), a.max(b))).collect())
        }
    }

    fn net() -> impl Strategy<Value = IpNet> {
        let v4 = (any::<std::net::Ipv4Addr>(), 0..=32u8)
            .prop_map(|(a, p)| IpNet::from(Ipv4Net::new(a, p).unwrap()).trunc());
        let v6 = (any::<std::net::Ipv6Addr>(), 0..=128u8)
            .prop_map(|(a, p)| Ipv6Net::new(a, p).unwrap().trunc())
            .prop_filter("mapped", |n| mapped(*n).is_none())
            .prop_map(IpNet::from);
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_to_the_same(net in net(), ports in ports()) {
            let pattern = AddrPattern { net, ports };
            prop_assert_eq!(pattern.to_string().parse(), Ok(pattern.clone()));
            prop_assert_eq!(pattern.to_string().parse(), Ok(TargetPattern::Addr(pattern)));
        }

        #[test]
        fn printed_names_parse_to_the_same(
            name in "[a-z]([a-z0-9-]{0,8}[a-z0-9])?(\\.[a-z]{1,8}){0,3}", below: bool, ports in ports(),
        ) {
            let pattern = NamePattern { name, below, ports };
            prop_assert_eq!(pattern.to_string().parse(), Ok(TargetPattern::Name(pattern)));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = text.parse::<TargetPattern>();
            let _ = text.parse::<AddrPattern>();
        }

        #[test]
        fn merging_changes_no_port(ranges in prop::collection::vec((1..=99u16, 1..=99u16), 1..5), port in 1..=100u16) {
            let ranges: Vec<_> = ranges.into_iter().map(|(a, b)| (a.min(b), a.max(b))).collect();
            let before = ranges.iter().any(|(a, b)| (*a..=*b).contains(&port));
            prop_assert_eq!(Ports::merged(ranges.clone()).contains(port), before);
            let apart: Vec<_> = ranges.into_iter().map(|r| Ports(vec![r])).collect();
            prop_assert_eq!(Ports::union(&apart).is_some_and(|all| all.contains(port)), before);
        }
    }
}
