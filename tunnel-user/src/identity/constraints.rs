//! Name constraints of CAs (RFC 5280 section 4.2.1.10), where webpki leaves them to us.
//!
//! webpki compares DNS names and addresses, and rejects a certificate that has a name of any other kind which is constrained
//! (its `subject_name` module, release 0.103). Here URIs are compared as well; of the kinds that are left it is said which one
//! cannot be.
//!
//! # Invariants
//! - The constraints of every CA that may be on the path hold, of those that were presented and of the roots, for the leaf and
//!   for the CAs below: whichever path webpki has verified, its own are among them.

use std::net::IpAddr;

use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, ParsedExtension, X509Certificate};

/// A CA that constrains names.
#[derive(Clone, Debug)]
pub(crate) struct Constrained {
    /// Its name as its certificates have it for their issuer.
    subject: Vec<u8>,
    /// The same to read.
    name: String,
    permitted: Vec<Constraint>,
    excluded: Vec<Constraint>,
}

/// A constraint on names of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Constraint {
    /// The host of a URI, or with a dot in front, what is below it.
    Uri(String),
    /// A DNS name and what is below it.
    Dns(String),
    /// Addresses.
    Ip(IpNet),
    /// Of a kind that is not compared, or not readable.
    Unsupported(Kind),
}

/// What kinds of names there are, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Uri,
    Dns,
    Ip,
    Directory,
    Email,
    Other,
}

/// A name of a certificate.
#[derive(Clone, Debug)]
enum Name {
    Uri(String),
    Dns(String),
    Ip(IpAddr),
    Unsupported(Kind),
}

impl Kind {
    fn of(name: &GeneralName<'_>) -> Self {
        match name {
            GeneralName::DNSName(_) => Self::Dns,
            GeneralName::IPAddress(_) => Self::Ip,
            GeneralName::URI(_) => Self::Uri,
            GeneralName::DirectoryName(_) => Self::Directory,
            GeneralName::RFC822Name(_) => Self::Email,
            _ => Self::Other,
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Uri => "URI",
            Self::Dns => "DNS",
            Self::Ip => "address",
            Self::Directory => "directory",
            Self::Email => "email",
            Self::Other => "other",
        }
    }
}

impl Name {
    fn of(name: &GeneralName<'_>) -> Self {
        match name {
            GeneralName::URI(uri) => Self::Uri((*uri).to_owned()),
            GeneralName::DNSName(dns) => Self::Dns(dns.to_ascii_lowercase()),
            GeneralName::IPAddress(bytes) => address(bytes).map_or(Self::Unsupported(Kind::Ip), Self::Ip),
            other => Self::Unsupported(Kind::of(other)),
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Uri(_) => Kind::Uri,
            Self::Dns(_) => Kind::Dns,
            Self::Ip(_) => Kind::Ip,
            Self::Unsupported(kind) => *kind,
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uri(name) | Self::Dns(name) => name.fmt(f),
            Self::Ip(ip) => ip.fmt(f),
            Self::Unsupported(kind) => write!(f, "its {} name", kind.noun()),
        }
    }
}

impl Constraint {
    fn of(base: &GeneralName<'_>) -> Self {
        match base {
            GeneralName::URI(host) => Self::Uri(host.to_ascii_lowercase()),
            GeneralName::DNSName(name) => Self::Dns(name.to_ascii_lowercase()),
            GeneralName::IPAddress(bytes) => net(bytes).map_or(Self::Unsupported(Kind::Ip), Self::Ip),
            other => Self::Unsupported(Kind::of(other)),
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Uri(_) => Kind::Uri,
            Self::Dns(_) => Kind::Dns,
            Self::Ip(_) => Kind::Ip,
            Self::Unsupported(kind) => *kind,
        }
    }

    /// Whether a name is within it; `None`: that cannot be said, of a name of the same kind.
    fn contains(&self, name: &Name) -> Option<bool> {
        match (self, name) {
            (Self::Uri(wanted), Name::Uri(uri)) => host_of(uri).map(|host| match wanted.strip_prefix('.') {
                Some(domain) => {
                    host.strip_suffix(domain).is_some_and(|below| below.len() > 1 && below.ends_with('.'))
                }
                None => host == *wanted,
            }),
            (Self::Dns(wanted), Name::Dns(dns)) => {
                let wanted = wanted.strip_prefix('.').unwrap_or(wanted);
                let is_below = |rest: &str| rest.is_empty() || wanted.is_empty() || rest.ends_with('.');
                Some(dns.strip_suffix(wanted).is_some_and(is_below))
            }
            (Self::Ip(net), Name::Ip(ip)) => Some(net.contains(ip)),
            _ => None,
        }
    }
}

/// The host of a URI, lower case. One without, or with an address, cannot be compared (RFC 5280 section 4.2.1.10).
fn host_of(uri: &str) -> Option<String> {
    let rest = uri.split_once("://")?.1;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit('@').next()?;
    let host = host.split_once(':').map_or(host, |(host, _port)| host);
    let is_name = !host.is_empty() && !host.starts_with('[') && host.parse::<IpAddr>().is_err();
    is_name.then(|| host.to_ascii_lowercase())
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

/// An address and its mask (RFC 5280 section 4.2.1.10).
fn net(bytes: &[u8]) -> Option<IpNet> {
    let (ip, mask) = bytes.split_at_checked(bytes.len() / 2)?;
    IpNet::with_netmask(address(ip)?, address(mask)?).ok()
}

/// Those of `certs` that constrain names.
pub(crate) fn constrained(certs: &[CertificateDer<'_>]) -> Vec<Constrained> {
    certs.iter().filter_map(|cert| of_ca(cert)).collect()
}

fn of_ca(cert: &[u8]) -> Option<Constrained> {
    let (_, cert) = X509Certificate::from_der(cert).ok()?;
    let constraints = cert.extensions().iter().find_map(|e| match e.parsed_extension() {
        ParsedExtension::NameConstraints(constraints) => Some(constraints),
        _ => None,
    })?;
    let read = |subtrees: &Option<Vec<x509_parser::extensions::GeneralSubtree<'_>>>| {
        subtrees.iter().flatten().map(|subtree| Constraint::of(&subtree.base)).collect()
    };
    Some(Constrained {
        subject: cert.subject().as_raw().to_vec(),
        name: cert.subject().to_string(),
        permitted: read(&constraints.permitted_subtrees),
        excluded: read(&constraints.excluded_subtrees),
    })
}

impl Constrained {
    /// Why it does not permit a name.
    fn check(&self, name: &Name) -> Result<(), String> {
        let of_kind = |all: &'_ [Constraint]| {
            all.iter().filter(|c| c.kind() == name.kind()).cloned().collect::<Vec<_>>()
        };
        let (permitted, excluded) = (of_kind(&self.permitted), of_kind(&self.excluded));
        let answers = |all: &[Constraint]| all.iter().map(|c| c.contains(name)).collect::<Option<Vec<_>>>();
        let (Some(within), Some(without)) = (answers(&permitted), answers(&excluded)) else {
            return Err(self.cannot_check(name));
        };
        if (within.is_empty() || within.contains(&true)) && !without.contains(&true) {
            return Ok(());
        }
        Err(format!("the name constraints of its CA do not permit {name} (\"{}\")", self.name))
    }

    fn cannot_check(&self, name: &Name) -> String {
        let (ca, kind) = (&self.name, name.kind().noun());
        match name {
            Name::Uri(uri) => format!(
                "the CA \"{ca}\" has name constraints for URI names, and \"{uri}\" has no host to compare: use a \
                 certificate whose URI names have one"
            ),
            _ => format!(
                "the CA \"{ca}\" has name constraints for {kind} names, and {kind} name constraints are not supported: \
                 use a certificate of a CA without them, or one without a {kind} name"
            ),
        }
    }
}

/// Checks the names of a leaf, and those of the CAs above it, against the constraints of whoever may have signed them.
/// `above` are the certificates that were presented with it, `roots` what constrains names among those that are trusted.
pub(crate) fn check(
    leaf: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
    roots: &[Constrained],
) -> Result<(), String> {
    let involved = involved(leaf, above, roots);
    // A CA that has issued itself is not constrained by itself, nor are names of CAs compared by webpki; of a chain that is
    // sent to us they are all the same.
    let certificates = std::iter::once(leaf).chain(above.iter().filter(|cert| !is_self_issued(cert)));
    for name in certificates.flat_map(names_of) {
        for ca in &involved {
            ca.check(&name)?;
        }
    }
    Ok(())
}

fn is_self_issued(cert: &[u8]) -> bool {
    X509Certificate::from_der(cert).is_ok_and(|(_, cert)| cert.subject().as_raw() == cert.issuer().as_raw())
}

/// Why peers that cannot check it would reject a chain of ours, in a sentence.
pub(crate) fn unsupported(
    leaf: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
    roots: &[Constrained],
) -> Option<String> {
    check(leaf, above, roots).err()
}

/// What constrains names on a way from `leaf` to a root.
fn involved(
    leaf: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
    roots: &[Constrained],
) -> Vec<Constrained> {
    let issuers: Vec<Vec<u8>> = std::iter::once(leaf)
        .chain(above)
        .filter_map(|cert| Some(X509Certificate::from_der(cert).ok()?.1.issuer().as_raw().to_vec()))
        .collect();
    let mut found = constrained(above);
    found.extend(roots.iter().cloned());
    found.retain(|ca| issuers.contains(&ca.subject));
    found
}

/// The names of a certificate that constraints may speak of.
fn names_of(cert: &CertificateDer<'_>) -> Vec<Name> {
    let Ok((_, cert)) = X509Certificate::from_der(cert) else { return Vec::new() };
    let mut names: Vec<_> = match cert.subject_alternative_name() {
        Ok(Some(names)) => names.value.general_names.iter().map(Name::of).collect(),
        _ => Vec::new(),
    };
    if cert.subject().iter().next().is_some() {
        names.push(Name::Unsupported(Kind::Directory));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_within(uri: &str, constraint: &str) -> Option<bool> {
        Constraint::Uri(constraint.to_owned()).contains(&Name::Uri(uri.to_owned()))
    }

    #[test]
    fn a_uri_is_compared_by_its_host_and_a_dot_in_front_means_what_is_below() {
        assert_eq!(is_within("spiffe://example.org/a", "example.org"), Some(true));
        assert_eq!(is_within("spiffe://EXAMPLE.org:1/a", "example.org"), Some(true));
        assert_eq!(is_within("spiffe://a.example.org/a", "example.org"), Some(false));
        assert_eq!(is_within("spiffe://a.example.org/a", ".example.org"), Some(true));
        assert_eq!(is_within("spiffe://example.org/a", ".example.org"), Some(false));
        assert_eq!(is_within("spiffe://evilexample.org/a", ".example.org"), Some(false));
        assert_eq!(is_within("https://example.org@evil.test/", "example.org"), Some(false));
        for incomparable in ["urn:a:b", "https://10.0.0.1/", "https://[::1]/", "spiffe:///a"] {
            assert_eq!(is_within(incomparable, "example.org"), None, "{incomparable}");
        }
    }

    #[test]
    fn what_one_list_excludes_no_list_permits_and_kinds_do_not_mix() {
        let ca = Constrained {
            subject: Vec::new(),
            name: "CN=a".to_owned(),
            permitted: vec![Constraint::Uri("a.test".to_owned()), Constraint::Dns("a.test".to_owned())],
            excluded: vec![
                Constraint::Dns("no.a.test".to_owned()),
                Constraint::Ip("10.0.0.0/8".parse().unwrap()),
                Constraint::Unsupported(Kind::Email),
            ],
        };
        let uri = |name: &str| ca.check(&Name::Uri(name.to_owned())).is_ok();
        let dns = |name: &str| ca.check(&Name::Dns(name.to_owned())).is_ok();
        assert!(uri("spiffe://a.test/x") && !uri("spiffe://b.test/x") && !uri("urn:x"));
        assert!(
            dns("a.test") && dns("x.a.test") && !dns("no.a.test") && !dns("x.no.a.test") && !dns("xa.test")
        );
        assert!(ca.check(&Name::Ip("11.0.0.1".parse().unwrap())).is_ok());
        assert!(ca.check(&Name::Ip("10.0.0.1".parse().unwrap())).is_err());
        assert!(ca.check(&Name::Unsupported(Kind::Email)).unwrap_err().contains("not supported"));
        assert!(ca.check(&Name::Unsupported(Kind::Directory)).is_ok());
    }
}
