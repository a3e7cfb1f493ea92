//! Name constraints of CAs (RFC 5280 section 4.2.1.10): which of them cannot be checked here, said in words.
//!
//! webpki judges: it rejects a certificate that has a name of a kind which is constrained and which it cannot compare (its
//! `subject_name` module, release 0.103). Here that gets its reason.

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, ParsedExtension, X509Certificate};

/// A CA that constrains names.
#[derive(Clone, Debug)]
pub(crate) struct Constrained {
    /// Its name as its certificates have it for their issuer.
    subject: Vec<u8>,
    /// The same to read.
    name: String,
    kinds: Vec<Kind>,
}

/// What kinds of names there are, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// DNS names and addresses: webpki compares them.
    Compared,
    Uri,
    Directory,
    Email,
    Other,
}

impl Kind {
    fn of(name: &GeneralName<'_>) -> Self {
        match name {
            GeneralName::DNSName(_) | GeneralName::IPAddress(_) => Self::Compared,
            GeneralName::URI(_) => Self::Uri,
            GeneralName::DirectoryName(_) => Self::Directory,
            GeneralName::RFC822Name(_) => Self::Email,
            _ => Self::Other,
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Compared => "DNS",
            Self::Uri => "URI",
            Self::Directory => "directory",
            Self::Email => "email",
            Self::Other => "other",
        }
    }
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
    let subtrees = constraints.permitted_subtrees.iter().chain(&constraints.excluded_subtrees).flatten();
    Some(Constrained {
        subject: cert.subject().as_raw().to_vec(),
        name: cert.subject().to_string(),
        kinds: subtrees.map(|subtree| Kind::of(&subtree.base)).collect(),
    })
}

/// The CA above `leaf` whose constraints cannot be checked for one of its names, in a sentence. `above` are the
/// certificates that were presented with it, `roots` what constrains names among those that are trusted.
pub(crate) fn unsupported(
    leaf: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
    roots: &[Constrained],
) -> Option<String> {
    let names = kinds_of(leaf);
    let blamed = involved(leaf, above, roots).into_iter().find_map(|ca| {
        let kind = ca.kinds.iter().find(|kind| **kind != Kind::Compared && names.contains(kind))?;
        Some((ca.name, kind.noun()))
    });
    let (ca, kind) = blamed?;
    Some(format!(
        "the CA \"{ca}\" has name constraints for {kind} names, and {kind} name constraints are not supported \
         (webpki does not support them): use a certificate of a CA without them"
    ))
}

/// Why webpki found a violation.
pub(crate) fn violated(
    leaf: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
    roots: &[Constrained],
) -> String {
    unsupported(leaf, above, roots).unwrap_or_else(|| {
        let cas: Vec<_> =
            involved(leaf, above, roots).into_iter().map(|ca| format!("\"{}\"", ca.name)).collect();
        format!("it has a name that the name constraints of its CA do not permit ({})", cas.join(", "))
    })
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

fn kinds_of(leaf: &CertificateDer<'_>) -> Vec<Kind> {
    let Ok((_, cert)) = X509Certificate::from_der(leaf) else { return Vec::new() };
    let mut kinds: Vec<_> = match cert.subject_alternative_name() {
        Ok(Some(names)) => names.value.general_names.iter().map(Kind::of).collect(),
        _ => Vec::new(),
    };
    if cert.subject().iter().next().is_some() {
        kinds.push(Kind::Directory);
    }
    kinds
}
