//! Why a QUIC connection failed, where TLS within it did: QUIC carries alerts as error codes (RFC 9001 section 4.8).

use quinn::ConnectionError;
use rustls::AlertDescription;

use super::verify::{Check, PeerRejected, explain_alert};
use crate::transport::quic;

/// Error codes of alerts: this, and the alert.
const CRYPTO: u64 = 0x100;

/// All checks that there are.
const CHECKS: [Check; 5] = [Check::Chain, Check::Expiry, Check::San, Check::Missing, Check::KeyUsage];

fn alert(code: u64) -> Option<AlertDescription> {
    let alert = code.checked_sub(CRYPTO)?;
    u8::try_from(alert).ok().map(AlertDescription::from)
}

/// One sentence about why a handshake failed, or a connection was lost: which check failed and on which side, where that is
/// known. `hint`: why a peer may refuse our certificate.
pub fn explain(error: &ConnectionError, hint: Option<&str>) -> String {
    match error {
        ConnectionError::TransportError(e) if alert(e.code.into()).is_some() => {
            rejected(&e.reason).map_or_else(|| ours(&e.reason), |rejected| rejected.to_string())
        }
        ConnectionError::ConnectionClosed(closed) => match alert(closed.error_code.into()) {
            Some(alert) => explain_alert(alert, hint),
            None => error.to_string(),
        },
        other => quic::why_lost(other),
    }
}

/// A failure of ours, in rustls's words, where it is not about a certificate.
fn ours(reason: &str) -> String {
    match reason {
        "peer doesn't support any known protocol" => {
            "the peer offers no HTTP version that is spoken here (ALPN)".to_owned()
        }
        reason => format!("the TLS handshake failed: {reason}"),
    }
}

/// The check that a peer's certificate has failed. quinn keeps only the text of rustls's error.
fn rejected(reason: &str) -> Option<PeerRejected> {
    let reject = |check, detail: &str| Some(PeerRejected { check, detail: detail.to_owned() });
    if reason == "peer sent no certificates" {
        return reject(Check::Missing, "it presented none");
    }
    let error = reason.strip_prefix("invalid peer certificate: ")?;
    // One of our own checks, as it is written for debugging.
    if let Some((_, rejected)) = error.split_once("PeerRejected { check: ")
        && let Some((check, detail)) = rejected.split_once(", detail: \"")
        && let Some(check) = CHECKS.into_iter().find(|known| format!("{known:?}") == check)
    {
        let detail = detail.rsplit_once('"').map_or(detail, |(detail, _)| detail);
        return reject(check, &detail.replace("\\\"", "\""));
    }
    match error {
        "UnknownIssuer" => reject(Check::Chain, "it is not from our CA"),
        "BadSignature" => {
            let why =
                "a signature is wrong (another CA of the same name, or another key than the certificate's)";
            reject(Check::Chain, why)
        }
        _ if error.starts_with("certificate expired") || error == "Expired" => {
            reject(Check::Expiry, "it has expired")
        }
        _ if error.starts_with("certificate not valid yet") || error == "NotValidYet" => {
            reject(Check::Expiry, "it is not valid yet")
        }
        _ if error.starts_with("certificate not valid for name") || error.starts_with("NotValidForName") => {
            reject(Check::San, error)
        }
        _ if error.starts_with("InvalidPurpose") => reject(Check::KeyUsage, error),
        other => reject(Check::Chain, other),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{CertificateError, Error, OtherError};

    use super::*;

    #[test]
    fn a_check_that_failed_is_read_from_what_quic_keeps_of_it() {
        for check in CHECKS {
            let own = PeerRejected { check, detail: "it is \"x\", not y".to_owned() };
            let error: Error = CertificateError::Other(OtherError(Arc::new(own.clone()))).into();
            assert_eq!(rejected(&error.to_string()), Some(own));
        }
        let of = |error: Error| rejected(&error.to_string()).map(|rejected| rejected.check);
        assert_eq!(of(CertificateError::UnknownIssuer.into()), Some(Check::Chain));
        assert_eq!(of(CertificateError::Expired.into()), Some(Check::Expiry));
        assert_eq!(of(CertificateError::NotValidForName.into()), Some(Check::San));
        assert_eq!(of(CertificateError::InvalidPurpose.into()), Some(Check::KeyUsage));
        assert_eq!(of(Error::NoCertificatesPresented), Some(Check::Missing));
        assert_eq!(of(Error::NoApplicationProtocol), None);
        assert!(ours(&Error::NoApplicationProtocol.to_string()).contains("ALPN"));
    }
}
