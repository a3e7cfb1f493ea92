//! Subject alternative names of certificates, SPIFFE IDs, and the patterns by which a configuration matches them.
//!
//! No signature is checked here: the caller has verified the chain, or is about to.
//!
//! # Invariants
//! - A pattern matches only names of its own kind.

use std::{fmt, net::IpAddr, str::FromStr};

use super::flow::Identity;

/// The longest SPIFFE ID that everyone must take (SPIFFE-ID section 2.3).
const SPIFFE_MAX: usize = 2048;
/// The longest trust domain name (SPIFFE-ID section 2.1).
const TRUST_DOMAIN_MAX: usize = 255;

/// One workload's name, `spiffe://trust-domain/path`, as the SPIFFE-ID specification spells it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SpiffeId(String);

/// Why a text is no SPIFFE ID of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// Not `spiffe://` in front.
    #[error("a SPIFFE ID starts with \"spiffe://\"")]
    Scheme,
    /// Longer than 2048 bytes.
    #[error("a SPIFFE ID has at most {SPIFFE_MAX} bytes")]
    TooLong,
    /// The trust domain is empty, too long, or holds a character outside `a-z 0-9 . - _`.
    #[error("the trust domain (after \"spiffe://\") must be 1 to 255 of a-z 0-9 . - _, without port or user")]
    TrustDomain,
    /// No path: the bare trust domain names no workload (X509-SVID section 2).
    #[error("the id names a trust domain but no workload: a path such as \"/web\" is missing")]
    NoPath,
    /// An empty segment, `.` or `..`, a trailing slash, or a character outside `A-Z a-z 0-9 . - _`.
    #[error(
        "each path segment must be one or more of A-Z a-z 0-9 . - _, not \".\" or \"..\", and no \"/\" at the end"
    )]
    Path,
}

impl SpiffeId {
    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(s: &str) -> Result<Self, SpiffeIdError> {
        let rest = s.strip_prefix("spiffe://").ok_or(SpiffeIdError::Scheme)?;
        if s.len() > SPIFFE_MAX {
            return Err(SpiffeIdError::TooLong);
        }
        let (domain, path) = rest.split_once('/').map_or((rest, None), |(d, p)| (d, Some(p)));
        let domain_ok =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if domain.is_empty() || domain.len() > TRUST_DOMAIN_MAX || !domain.bytes().all(domain_ok) {
            return Err(SpiffeIdError::TrustDomain);
        }
        let path = path.ok_or(SpiffeIdError::NoPath)?;
        if path.is_empty() {
            return Err(SpiffeIdError::NoPath);
        }
        if path.split('/').all(is_spiffe_segment) { Ok(Self(s.to_owned())) } else { Err(SpiffeIdError::Path) }
    }
}

/// A segment of a SPIFFE ID's path (SPIFFE-ID section 2.2).
fn is_spiffe_segment(s: &str) -> bool {
    !s.is_empty()
        && s != "."
        && s != ".."
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One subject alternative name of a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum San {
    /// A URI, as a SPIFFE ID is one.
    Uri(String),
    /// A DNS name, lower case.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

impl fmt::Display for San {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uri(s) | Self::Dns(s) => s.fmt(f),
            Self::Ip(ip) => ip.fmt(f),
        }
    }
}

impl From<&Identity> for San {
    /// The kinds cannot be confused: a URI has `://`, and what reads as an address is one.
    fn from(id: &Identity) -> Self {
        if id.0.contains("://") {
            Self::Uri(id.0.to_string())
        } else {
            id.0.parse().map_or_else(|_| Self::Dns(id.0.to_ascii_lowercase()), Self::Ip)
        }
    }
}

/// Which names of a certificate are taken.
///
/// - `spiffe://example.org/ns/*/sa/web`: a URI. `*` stands for exactly one whole path segment, wherever
///   it is (so a final `/*` takes one segment, not a tree), and a final `**` for all segments that follow, at least one:
///   `spiffe://example.org/**` is every workload of a trust domain. Scheme and authority compare without regard
///   to case and take no `*`; the path compares byte for byte.
/// - `web.internal`, `*.internal`: a DNS name, exact, or with exactly one label in the place of `*`.
/// - `10.0.0.1`, `fd00::1`: an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SanPattern {
    /// A URI whose path segments may be `*`.
    Uri(String),
    /// A DNS name, lower case, whose first label may be `*`.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

/// Why a text is no [`SanPattern`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SanPatternError {
    /// Nothing there.
    #[error("the name is empty")]
    Empty,
    /// No scheme, no authority, or a `*` in one of them.
    #[error("a URI needs a scheme and an authority, neither with \"*\": spiffe://trust-domain/path")]
    Authority,
    /// `*` beside other characters.
    #[error("\"*\" stands for one whole path segment, and \"**\" at the end of the path for all that follow")]
    PartialWildcard,
    /// Two slashes on end, or one at the end.
    #[error("the path has an empty segment")]
    EmptySegment,
    /// Not a DNS name: `*` elsewhere than in the first label, or a character that no name has.
    #[error("neither a URI, nor an address, nor a DNS name (exact, or \"*.\" and a name)")]
    Dns,
}

impl SanPattern {
    /// Whether this pattern takes `name`.
    pub fn matches(&self, name: &San) -> bool {
        match (self, name) {
            (Self::Uri(pattern), San::Uri(uri)) => uri_matches(pattern, uri),
            (Self::Dns(pattern), San::Dns(dns)) => match pattern.strip_prefix("*.") {
                None => pattern == dns,
                // A wildcard in the certificate is a name of that one spelling: it never widens what the
                // pattern says.
                Some(suffix) => {
                    dns.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == suffix)
                }
            },
            (Self::Ip(wanted), San::Ip(ip)) => wanted == ip,
            _ => false,
        }
    }
}

fn uri_matches(pattern: &str, uri: &str) -> bool {
    // Query and fragment are no part of an identity, and a pattern cannot state them.
    if uri.contains(['?', '#']) {
        return false;
    }
    let (Some((p_scheme, p_rest)), Some((u_scheme, u_rest))) =
        (pattern.split_once("://"), uri.split_once("://"))
    else {
        return false;
    };
    let (mut p, mut u) = (p_rest.split('/'), u_rest.split('/'));
    let same_authority =
        p.next().zip(u.next()).is_some_and(|(p_host, u_host)| p_host.eq_ignore_ascii_case(u_host));
    if !same_authority || !p_scheme.eq_ignore_ascii_case(u_scheme) {
        return false;
    }
    loop {
        match (p.next(), u.next()) {
            (None, None) => return true,
            // The last one, by construction.
            (Some("**"), Some(segment)) => return !segment.is_empty(),
            (Some("*"), Some(segment)) if !segment.is_empty() => {}
            (Some(wanted), Some(segment)) if wanted == segment => {}
            _ => return false,
        }
    }
}

impl FromStr for SanPattern {
    type Err = SanPatternError;

    fn from_str(s: &str) -> Result<Self, SanPatternError> {
        if s.is_empty() {
            return Err(SanPatternError::Empty);
        }
        if let Some((scheme, rest)) = s.split_once("://") {
            return uri_pattern(scheme, rest).map(|()| Self::Uri(s.to_owned()));
        }
        if let Ok(ip) = s.parse() {
            return Ok(Self::Ip(ip));
        }
        let lower = s.to_ascii_lowercase();
        let name = lower.strip_prefix("*.").unwrap_or(&lower);
        if crate::model::flow::is_host_name(name) { Ok(Self::Dns(lower)) } else { Err(SanPatternError::Dns) }
    }
}

fn uri_pattern(scheme: &str, rest: &str) -> Result<(), SanPatternError> {
    let (authority, path) = rest.split_once('/').map_or((rest, None), |(a, p)| (a, Some(p)));
    let scheme_ok = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'));
    if !scheme_ok || authority.is_empty() || authority.contains('*') {
        return Err(SanPatternError::Authority);
    }
    let mut segments = path.into_iter().flat_map(|p| p.split('/')).peekable();
    while let Some(segment) = segments.next() {
        if segment.is_empty() {
            return Err(SanPatternError::EmptySegment);
        }
        let whole = segment == "*" || (segment == "**" && segments.peek().is_none());
        if segment.contains('*') && !whole {
            return Err(SanPatternError::PartialWildcard);
        }
    }
    Ok(())
}

impl fmt::Display for SanPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uri(s) | Self::Dns(s) => s.fmt(f),
            Self::Ip(ip) => ip.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spiffe_ids_are_those_of_the_specification() {
        for ok in ["spiffe://example.org/web", "spiffe://a_b-c.1/ns/default/sa/Web_1.x"] {
            assert_eq!(ok.parse::<SpiffeId>().map(|id| id.to_string()), Ok(ok.to_owned()));
        }
        let long = format!("spiffe://example.org/{}", "a".repeat(SPIFFE_MAX));
        let domain = format!("spiffe://{}/a", "a".repeat(TRUST_DOMAIN_MAX + 1));
        for (text, why) in [
            ("http://example.org/web", SpiffeIdError::Scheme),
            ("", SpiffeIdError::Scheme),
            ("spiffe:///web", SpiffeIdError::TrustDomain),
            ("spiffe://Example.org/web", SpiffeIdError::TrustDomain),
            ("spiffe://example.org:80/web", SpiffeIdError::TrustDomain),
            ("spiffe://u@example.org/web", SpiffeIdError::TrustDomain),
            (domain.as_str(), SpiffeIdError::TrustDomain),
            ("spiffe://example.org", SpiffeIdError::NoPath),
            ("spiffe://example.org/", SpiffeIdError::NoPath),
            ("spiffe://example.org/a/", SpiffeIdError::Path),
            ("spiffe://example.org/a//b", SpiffeIdError::Path),
            ("spiffe://example.org/a/../b", SpiffeIdError::Path),
            ("spiffe://example.org/a?b", SpiffeIdError::Path),
            ("spiffe://example.org/a%20b", SpiffeIdError::Path),
            (long.as_str(), SpiffeIdError::TooLong),
        ] {
            assert_eq!(text.parse::<SpiffeId>(), Err(why), "{text}");
        }
    }

    #[test]
    fn a_pattern_takes_its_own_kind_and_no_more() {
        let uri = |s: &str| San::Uri(s.to_owned());
        let dns = |s: &str| San::Dns(s.to_owned());
        for (pattern, name, takes) in [
            ("spiffe://example.org/ns/*/sa/web", uri("spiffe://example.org/ns/a/sa/web"), true),
            ("spiffe://example.org/ns/*/sa/web", uri("spiffe://EXAMPLE.org/ns/a/sa/web"), true),
            ("spiffe://example.org/ns/*/sa/web", uri("spiffe://example.org/ns/a/sa/Web"), false),
            ("spiffe://example.org/ns/*/sa/web", uri("spiffe://example.org/ns/a/b/sa/web"), false),
            ("spiffe://example.org/ns/*/sa/web", uri("spiffe://example.org/ns//sa/web"), false),
            ("spiffe://example.org/ns/*/sa/web", uri("spiffe://example.org/ns/a/sa/web/x"), false),
            ("spiffe://example.org/ns/*/sa/web", uri("spiffe://example.net/ns/a/sa/web"), false),
            ("spiffe://example.org/*", uri("spiffe://example.org/a"), true),
            ("spiffe://example.org/*", uri("spiffe://example.org/a/b"), false),
            ("spiffe://example.org/*", uri("spiffe://example.org/"), false),
            ("spiffe://example.org/*", uri("spiffe://example.org"), false),
            ("spiffe://example.org/*", uri("https://example.org/a"), false),
            ("spiffe://example.org/**", uri("spiffe://example.org/a"), true),
            ("spiffe://example.org/**", uri("spiffe://example.org/a/b/c"), true),
            ("spiffe://example.org/**", uri("spiffe://example.org/"), false),
            ("spiffe://example.org/**", uri("spiffe://example.org"), false),
            ("spiffe://example.org/**", uri("spiffe://example.org.evil/a"), false),
            ("spiffe://example.org/**", uri("spiffe://example.org/a?x"), false),
            ("spiffe://example.org/ns/*/**", uri("spiffe://example.org/ns/a/sa/web"), true),
            ("spiffe://example.org/ns/*/**", uri("spiffe://example.org/ns/a"), false),
            ("spiffe://example.org/ns/**", uri("spiffe://example.org/nsx/a"), false),
            ("spiffe://example.org/*", uri("spiffe://example.org/a?x"), false),
            ("example.org", dns("example.org"), true),
            ("Example.org", dns("example.org"), true),
            ("*.example.org", dns("a.example.org"), true),
            ("*.example.org", dns("example.org"), false),
            ("*.example.org", dns("a.b.example.org"), false),
            ("example.org", uri("example.org"), false),
            ("10.0.0.1", San::Ip("10.0.0.1".parse().unwrap()), true),
            ("10.0.0.1", dns("10.0.0.1"), false),
            ("fd00:0::1", San::Ip("fd00::1".parse().unwrap()), true),
        ] {
            assert_eq!(pattern.parse::<SanPattern>().unwrap().matches(&name), takes, "{pattern} {name}");
        }
    }

    #[test]
    fn a_pattern_that_says_less_than_it_seems_is_refused() {
        for (text, why) in [
            ("", SanPatternError::Empty),
            ("spiffe://*/web", SanPatternError::Authority),
            ("spiffe:///web", SanPatternError::Authority),
            ("://example.org/web", SanPatternError::Authority),
            ("spiffe://example.org/web-*", SanPatternError::PartialWildcard),
            ("spiffe://example.org/**/web", SanPatternError::PartialWildcard),
            ("spiffe://example.org/***", SanPatternError::PartialWildcard),
            ("spiffe://**", SanPatternError::Authority),
            ("spiffe://example.org/a//b", SanPatternError::EmptySegment),
            ("spiffe://example.org/", SanPatternError::EmptySegment),
            ("*", SanPatternError::Dns),
            ("a.*.example.org", SanPatternError::Dns),
            ("10.0.0.0/8", SanPatternError::Dns),
        ] {
            assert_eq!(text.parse::<SanPattern>(), Err(why), "{text}");
        }
    }
}
