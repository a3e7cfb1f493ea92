//! The checks a peer's certificate has to pass, and what is said when one fails.
//!
//! # Invariants
//! - The chain and its expiry are verified by webpki before a name is compared, and no configuration turns that off.

use std::{error::Error, fmt, io, sync::Arc, time::Duration};

use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, OtherError,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::{
    identity::{constraints, peer::names_of, svid, tls::provider, trust::Trust},
    model::san::{San, SanPattern},
};

/// One check on a peer's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Check {
    /// It must lead to our CA, and its signatures must be good.
    Chain,
    /// It must be valid now.
    Expiry,
    /// One of its names must be one that is taken.
    San,
    /// There must be one.
    Missing,
    /// It must be meant for this side of TLS (extended key usage).
    KeyUsage,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chain => "chain",
            Self::Expiry => "expiry",
            Self::San => "SAN",
            Self::Missing => "presence",
            Self::KeyUsage => "key usage",
        })
    }
}

/// A peer's certificate failed a check of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer's certificate failed the {check} check: {detail}")]
pub struct PeerRejected {
    /// Which check.
    pub check: Check,
    /// What was wanted, and what was presented.
    pub detail: String,
}

impl PeerRejected {
    fn san(wanted: &str, presented: &[San]) -> Self {
        let presented = if presented.is_empty() { "no name at all".to_owned() } else { list(presented) };
        Self { check: Check::San, detail: format!("wanted {wanted}, presented {presented}") }
    }

    /// A server's certificate is not valid for the name that it was connected to by.
    pub(super) fn name(name: &ServerName<'_>, leaf: &CertificateDer<'_>) -> Self {
        Self::san(&name.to_str(), &names_of(leaf))
    }

    /// It claims to be an SVID, and is none.
    pub(super) fn no_svid(why: String) -> Self {
        Self { check: Check::San, detail: why }
    }

    /// Nobody here vouches for its trust domain.
    pub(super) fn no_bundle(domain: Option<&str>) -> Self {
        let detail = match domain {
            Some(domain) => {
                format!("it is of the trust domain \"{domain}\", for which there are no CA certificates here")
            }
            None => "it is of no trust domain, and only members of trust domains are trusted here".to_owned(),
        };
        Self { check: Check::Chain, detail }
    }

    /// Our own is gone.
    pub(super) fn withdrawn(why: &impl fmt::Display) -> Self {
        Self { check: Check::Missing, detail: why.to_string() }
    }

    pub(super) fn constraints(detail: String) -> Self {
        Self { check: Check::Chain, detail }
    }

    pub(super) fn algorithm(detail: String) -> Self {
        Self { check: Check::Chain, detail }
    }

    pub(super) fn into_rustls(self) -> rustls::Error {
        CertificateError::Other(OtherError(Arc::new(self))).into()
    }
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(" or ")
}

/// Whether one of a certificate's names is among those that are taken.
pub(crate) fn names_pass(san: &[SanPattern], leaf: &CertificateDer<'_>) -> Result<(), PeerRejected> {
    let names = names_of(leaf);
    let taken = if san.is_empty() {
        !names.is_empty()
    } else {
        names.iter().any(|name| san.iter().any(|pattern| pattern.matches(name)))
    };
    if taken {
        return Ok(());
    }
    let wanted = if san.is_empty() { "a URI, DNS or IP name".to_owned() } else { list(san) };
    Err(PeerRejected::san(&wanted, &names))
}

/// Verifies servers: chain and expiry always, then [`ServerCheck`](crate::model::trust::ServerCheck).
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    trust: Arc<Trust>,
    san: Vec<SanPattern>,
}

impl ServerVerifier {
    pub(crate) fn new(trust: Arc<Trust>, san: Vec<SanPattern>) -> Self {
        Self { trust, san }
    }
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    provider().signature_verification_algorithms
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.trust.verify_server(leaf, intermediates, name, &self.san, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// Verifies clients: a certificate, its chain and expiry always, then [`ClientCheck`](crate::model::trust::ClientCheck).
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    trust: Arc<Trust>,
    san: Vec<SanPattern>,
}

impl ClientVerifier {
    pub(crate) fn new(trust: Arc<Trust>, san: Vec<SanPattern>) -> Self {
        Self { trust, san }
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.trust.hints()
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.trust.verify_client(leaf, intermediates, &self.san, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// Checks what a chain claims beside what webpki verifies: its trust domain, and the names that its CAs permit.
///
/// # Errors
/// What is wrong with it, in a sentence.
pub fn claims(chain: &[CertificateDer<'_>]) -> Result<Option<Box<str>>, String> {
    let Some((leaf, above)) = chain.split_first() else { return Ok(None) };
    let domain = svid::trust_domain(leaf)?;
    constraints::check(leaf, above, &[])?;
    match svid::unsupported_algorithm(leaf, above) {
        Some(why) => Err(why),
        None => Ok(domain),
    }
}

/// When a certificate expires, in seconds since 1970; `None`: it cannot be read.
pub(super) fn not_after(leaf: &CertificateDer<'_>) -> Option<u64> {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    let (_, cert) = X509Certificate::from_der(leaf).ok()?;
    Some(u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0))
}

/// Whether the leaf is still valid. A resumed session verifies nothing again, so whoever accepts or
/// makes connections asks this once per connection; a full handshake has asked it already.
pub fn check_expiry(certs: &[CertificateDer<'_>], now: UnixTime) -> Result<(), PeerRejected> {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    let Some(leaf) = certs.first() else {
        return Err(PeerRejected { check: Check::Missing, detail: "it presented none".to_owned() });
    };
    let Ok((_, cert)) = X509Certificate::from_der(leaf) else {
        return Err(PeerRejected { check: Check::Chain, detail: "it cannot be read".to_owned() });
    };
    let after = cert.validity().not_after.timestamp();
    let age = i64::try_from(now.as_secs()).unwrap_or(i64::MAX).saturating_sub(after);
    match u64::try_from(age) {
        Ok(age) if age > 0 => Err(PeerRejected { check: Check::Expiry, detail: expired(age) }),
        _ => Ok(()),
    }
}

/// One sentence that says why a handshake failed, naming the check: whether our check on the peer, or
/// the peer's on us, as far as its alert tells. `error` may be a [`rustls::Error`], an [`io::Error`] or
/// [`h2::Error`] around one, or anything that has one of them among its sources. Errors that are not of
/// TLS come back as their own text.
pub fn explain(error: &(dyn Error + 'static)) -> String {
    explain_hinted(error, None)
}

/// The same, where it is known why a peer may refuse our certificate.
pub(crate) fn explain_hinted(error: &(dyn Error + 'static), hint: Option<&str>) -> String {
    match find(error) {
        Some(Found::Tls(rustls::Error::AlertReceived(alert))) => explain_alert(*alert, hint),
        Some(Found::Tls(e)) => explain_tls(e),
        Some(Found::Alert(alert, told)) => explain_alert(alert, hint.or(told.as_deref())),
        None => chain_text(error),
    }
}

/// The check of ours that the peer failed, if that is why the handshake failed.
pub fn failed_check(error: &(dyn Error + 'static)) -> Option<Check> {
    match find(error)? {
        Found::Tls(e) => rejected(e).map(|r| r.check),
        Found::Alert(..) => None,
    }
}

enum Found<'a> {
    Tls(&'a rustls::Error),
    Alert(AlertDescription, Option<String>),
}

fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<Found<'a>> {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(tls) = e.downcast_ref::<rustls::Error>() {
            return Some(Found::Tls(tls));
        }
        // h2 keeps only the text of an error of its transport.
        let text = e.to_string();
        if let Some(alert) = alert_in(&text) {
            return Some(Found::Alert(
                alert,
                text.split_once(crate::transport::alert::HINT).map(|(_, hint)| hint.to_owned()),
            ));
        }
        next = if let Some(io) = e.downcast_ref::<io::Error>() {
            // `source()` would skip the error inside.
            io.get_ref().map(|inner| inner as &(dyn Error + 'static))
        } else if let Some(io) = e.downcast_ref::<h2::Error>().and_then(h2::Error::get_io) {
            Some(io)
        } else {
            e.source()
        };
    }
    None
}

fn chain_text(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = e.source();
    }
    text
}

/// The alerts that a peer sends about certificates (RFC 8446 section 6.2).
const ALERTS: [AlertDescription; 13] = [
    AlertDescription::CertificateRequired,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateRevoked,
    AlertDescription::CertificateUnknown,
    AlertDescription::BadCertificate,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::UnknownCA,
    AlertDescription::AccessDenied,
    AlertDescription::DecryptError,
    AlertDescription::NoApplicationProtocol,
    AlertDescription::ProtocolVersion,
    AlertDescription::UnrecognisedName,
    AlertDescription::HandshakeFailure,
];

fn alert_in(text: &str) -> Option<AlertDescription> {
    let name = text.split_once("received fatal alert: ")?.1;
    ALERTS.into_iter().find(|alert| name.starts_with(&format!("{alert:?}")))
}

fn explain_tls(e: &rustls::Error) -> String {
    if let Some(rejected) = rejected(e) {
        return rejected.to_string();
    }
    match e {
        rustls::Error::AlertReceived(alert) => explain_alert(*alert, None),
        rustls::Error::NoApplicationProtocol => {
            "the peer offers no HTTP version that is spoken here (ALPN)".to_owned()
        }
        rustls::Error::PeerIncompatible(why) => {
            format!("the peer cannot speak TLS 1.3 as we do: {why:?}")
        }
        rustls::Error::InvalidMessage(_) => format!("the peer does not speak TLS on this port ({e})"),
        other => format!("the TLS handshake failed: {other}"),
    }
}

/// The check of ours that `e` says failed.
fn rejected(e: &rustls::Error) -> Option<PeerRejected> {
    let reject = |check, detail: String| Some(PeerRejected { check, detail });
    let error = match e {
        rustls::Error::NoCertificatesPresented => {
            return reject(Check::Missing, "it presented none".to_owned());
        }
        rustls::Error::InvalidCertificate(error) => error,
        _ => return None,
    };
    match error {
        CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<PeerRejected>() {
            Some(rejected) => Some(rejected.clone()),
            None => reject(Check::Chain, inner.to_string()),
        },
        CertificateError::ExpiredContext { time, not_after } => {
            reject(Check::Expiry, expired(time.as_secs().saturating_sub(not_after.as_secs())))
        }
        CertificateError::Expired => reject(Check::Expiry, "it has expired".to_owned()),
        CertificateError::NotValidYetContext { time, not_before } => {
            let wait = Duration::from_secs(not_before.as_secs().saturating_sub(time.as_secs()));
            reject(Check::Expiry, format!("it is valid only in {}; is a clock wrong?", rough(wait)))
        }
        CertificateError::NotValidYet => reject(Check::Expiry, "it is not valid yet".to_owned()),
        CertificateError::UnknownIssuer => reject(Check::Chain, "it is not from our CA".to_owned()),
        CertificateError::BadSignature => reject(
            Check::Chain,
            "a signature is wrong (another CA of the same name, or another key than the certificate's)"
                .to_owned(),
        ),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            reject(Check::KeyUsage, format!("{error}"))
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            reject(Check::San, error.to_string())
        }
        other => reject(Check::Chain, other.to_string()),
    }
}

fn expired(secs: u64) -> String {
    format!("it expired {} ago", rough(Duration::from_secs(secs)))
}

fn rough(d: Duration) -> String {
    let secs = d.as_secs();
    match secs {
        0..120 => format!("{secs} s"),
        120..7200 => format!("{} min", secs / 60),
        7200..172_800 => format!("{} h", secs / 3600),
        _ => format!("{} days", secs / 86_400),
    }
}

/// What an alert means; `hint` where it does not tell one reason from another.
pub(super) fn explain_alert(alert: AlertDescription, hint: Option<&str>) -> String {
    let unclear = matches!(
        alert,
        AlertDescription::CertificateUnknown
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
    );
    if let Some(hint) = hint.filter(|_| unclear) {
        return format!("the peer refused our certificate: {hint}");
    }
    let why = match alert {
        AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
            return "the peer wants a certificate, and we presented none".to_owned();
        }
        AlertDescription::NoApplicationProtocol => {
            return "the peer does not take the HTTP version that we speak (ALPN)".to_owned();
        }
        AlertDescription::ProtocolVersion => return "the peer does not speak TLS 1.3".to_owned(),
        AlertDescription::UnrecognisedName => {
            return "the peer does not know the name that we asked for (SNI)".to_owned();
        }
        AlertDescription::CertificateExpired => "expired, or not valid yet (expiry check)",
        AlertDescription::CertificateRevoked => "revoked",
        AlertDescription::UnknownCA => "it is not from the peer's CA (chain check)",
        AlertDescription::DecryptError => {
            "a signature is wrong, as with another CA of the same name (chain check)"
        }
        AlertDescription::UnsupportedCertificate => "it is not meant for this use (key usage check)",
        AlertDescription::AccessDenied => "its names are not admitted there (SAN check)",
        // What rustls sends for a name check, ours included; others send it for reasons of their own.
        AlertDescription::CertificateUnknown => {
            "its names are not admitted there (SAN check), or another check that the peer does not tell"
        }
        AlertDescription::BadCertificate => "it cannot be read, or its names are not admitted there",
        other => return format!("the peer ended the TLS handshake with the alert {other:?}"),
    };
    format!("the peer refused our certificate: {why}")
}
