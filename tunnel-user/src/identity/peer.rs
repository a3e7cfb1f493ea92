//! Who a peer is, by its certificate.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::model::{flow::Identity, san::San};

/// Every URI, DNS and IP name of the certificate, in its order. Empty when it has none, or cannot be
/// read.
pub fn names_of(cert: &CertificateDer<'_>) -> Vec<San> {
    let Ok((_, cert)) = X509Certificate::from_der(cert) else {
        return Vec::new();
    };
    let Ok(Some(sans)) = cert.subject_alternative_name() else {
        return Vec::new();
    };
    sans.value.general_names.iter().filter_map(san_of).collect()
}

fn san_of(name: &GeneralName<'_>) -> Option<San> {
    match name {
        GeneralName::URI(uri) => Some(San::Uri((*uri).to_owned())),
        GeneralName::DNSName(dns) => Some(San::Dns(dns.to_ascii_lowercase())),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(|b| IpAddr::V4(Ipv4Addr::from(b)));
            let v6 = <[u8; 16]>::try_from(*bytes).map(|b| IpAddr::V6(Ipv6Addr::from(b)));
            v4.or(v6).ok().map(San::Ip)
        }
        _ => None,
    }
}

/// Who a verified peer is: its SPIFFE URI if its certificate has one, else its first DNS name, else its
/// first address. `certs` is what `peer_certificates()` returns, the leaf first; on a resumed session it
/// is the chain of the session that was resumed.
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Option<Identity> {
    let names = names_of(certs.first()?);
    let first = |wanted: fn(&San) -> bool| names.iter().find(|n| wanted(n));
    first(|n| matches!(n, San::Uri(u) if u.starts_with("spiffe://")))
        .or_else(|| first(|n| matches!(n, San::Dns(_))))
        .or_else(|| first(|n| matches!(n, San::Ip(_))))
        .map(|n| Identity(n.to_string().into()))
}
