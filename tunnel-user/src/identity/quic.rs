//! Why a QUIC connection failed, where TLS within it did: QUIC carries alerts as error codes (RFC 9001 section 4.8).

use quinn::ConnectionError;
use rustls::AlertDescription;

use super::verify::explain_alert;
use crate::transport::quic;

/// Error codes of alerts: this, and the alert.
const CRYPTO: u64 = 0x100;

fn alert(code: u64) -> Option<AlertDescription> {
    let alert = code.checked_sub(CRYPTO)?;
    u8::try_from(alert).ok().map(AlertDescription::from)
}

/// One sentence about why a handshake failed, or a connection was lost: which check failed and on which side, where that is
/// known. `hint`: why a peer may refuse our certificate.
pub fn explain(error: &ConnectionError, hint: Option<&str>) -> String {
    match error {
        // Ours, in rustls's words: the check is in them.
        ConnectionError::TransportError(e) if alert(e.code.into()).is_some() => {
            let reason = e.reason.strip_prefix("invalid peer certificate: ").unwrap_or(&e.reason);
            match reason {
                "peer doesn't support any known protocol" => {
                    "the peer offers no HTTP version that is spoken here (ALPN)".to_owned()
                }
                "peer sent no certificates" => "the peer presented no certificate".to_owned(),
                "" => e.to_string(),
                reason => reason.to_owned(),
            }
        }
        ConnectionError::ConnectionClosed(closed) => match alert(closed.error_code.into()) {
            Some(alert) => explain_alert(alert, hint),
            None => error.to_string(),
        },
        other => quic::why_lost(other),
    }
}
