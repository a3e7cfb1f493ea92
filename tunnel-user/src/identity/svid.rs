//! What the SPIFFE specifications demand of a certificate beside a good chain (X509-SVID), and which keys and signatures nobody
//! here can verify.

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, ParsedExtension, X509Certificate};

use crate::model::san::SpiffeId;

/// The trust domain that a certificate claims; `None`: it is no SVID, and claims none. The error says why it may not claim
/// one.
pub(super) fn trust_domain(leaf: &CertificateDer<'_>) -> Result<Option<Box<str>>, String> {
    // What cannot be read, webpki rejects, with that reason.
    let Ok((_, cert)) = X509Certificate::from_der(leaf) else { return Ok(None) };
    let Ok(Some(names)) = cert.subject_alternative_name() else { return Ok(None) };
    let uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uris: Vec<_> = uris.collect();
    let Some(id) = uris.iter().find(|uri| uri.get(..9).is_some_and(|s| s.eq_ignore_ascii_case("spiffe://")))
    else {
        return Ok(None);
    };
    if uris.len() > 1 {
        return Err(format!(
            "it has {} URI names, and an SVID has exactly one (X509-SVID section 2)",
            uris.len()
        ));
    }
    id.parse::<SpiffeId>().map_err(|e| format!("its URI name \"{id}\" is no SPIFFE ID: {e}"))?;
    let signs = cert.extensions().iter().any(|extension| match extension.parsed_extension() {
        ParsedExtension::KeyUsage(usage) => usage.key_cert_sign() || usage.crl_sign(),
        _ => false,
    });
    if signs {
        return Err(
            "it may sign certificates or revocation lists, and an SVID of a workload may not (X509-SVID \
                    section 4.3)"
                .to_owned(),
        );
    }
    let domain = id["spiffe://".len()..].split('/').next().unwrap_or_default();
    Ok(Some(domain.into()))
}

/// The keys and signatures that rustls does not verify, by their object identifiers.
const UNSUPPORTED: [(&str, &str); 3] =
    [("1.3.101.113", "Ed448"), ("1.2.840.113549.1.1.10", "RSA-PSS"), ("1.2.840.10040.4.1", "DSA")];

/// The first of a chain whose key or signature is of a kind that is not supported, in a sentence.
pub(super) fn unsupported_algorithm(
    leaf: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
) -> Option<String> {
    let named = |oid: &str| UNSUPPORTED.iter().find(|(id, _)| *id == oid).map(|(_, name)| *name);
    std::iter::once(leaf).chain(above).find_map(|der| {
        let (_, cert) = X509Certificate::from_der(der).ok()?;
        let key = named(&cert.public_key().algorithm.algorithm.to_id_string());
        let signature = named(&cert.signature_algorithm.algorithm.to_id_string());
        let subject = cert.subject().to_string();
        let whose = if subject.is_empty() { String::new() } else { format!(" of \"{subject}\"") };
        let what = match (key, signature) {
            (Some(name), _) => format!("the key{whose} is bound to {name}"),
            (None, Some(name)) => format!("the certificate{whose} is signed with {name}"),
            (None, None) => return None,
        };
        Some(format!("{what}, which is not supported: use RSA with PKCS#1, ECDSA or Ed25519"))
    })
}
