//! What a certificate says, for operators: names, validity and issuer, and no key.

use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Certificate {
    /// Whose it is (RFC 4514).
    pub subject: String,
    /// Who has signed it.
    pub issuer: String,
    /// Its serial number, hexadecimal.
    pub serial: String,
    /// Its names: URIs, DNS names and addresses.
    pub names: Vec<String>,
    /// When its validity begins, in seconds since 1970.
    pub not_before: i64,
    /// When it ends.
    pub not_after: i64,
}

impl Certificate {
    /// Reads one. Of what cannot be read nothing is said.
    pub fn read(der: &CertificateDer<'_>) -> Self {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Self::default() };
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.map(|names| names.value.general_names.iter().filter_map(shown).collect());
        Self {
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            serial: certificate.raw_serial_as_string(),
            names: names.unwrap_or_default(),
            not_before: certificate.validity().not_before.timestamp(),
            not_after: certificate.validity().not_after.timestamp(),
        }
    }
}

fn shown(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        GeneralName::DNSName(dns) => Some((*dns).to_owned()),
        GeneralName::IPAddress(bytes) => match **bytes {
            [a, b, c, d] => Some(std::net::Ipv4Addr::new(a, b, c, d).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|v6| std::net::Ipv6Addr::from(v6).to_string()),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_described_by_its_names_and_its_validity() {
        let mut params =
            rcgen::CertificateParams::new(vec!["gw.test".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        let described = Certificate::read(params.self_signed(&key).unwrap().der());
        assert_eq!(described.names, ["gw.test", "10.0.0.1"]);
        assert_eq!(described.not_after, 1_893_456_000);
        assert_eq!(Certificate::read(&CertificateDer::from(vec![0])), Certificate::default());
    }
}
