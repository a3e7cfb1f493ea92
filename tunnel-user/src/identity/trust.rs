//! Whom we trust: the roots of each trust domain, and the verification of a chain against those of the domain that its leaf
//! claims to be of.
//!
//! # Invariants
//! - The roots of one trust domain never vouch for a member of another.
//! - webpki verifies every chain; what is checked here comes after it.

use std::{collections::BTreeMap, sync::Arc};

use rustls::{
    CertificateError, DistinguishedName, OtherError,
    client::{
        VerifierBuilderError, WebPkiServerVerifier, danger::ServerCertVerifier as _, verify_server_name,
    },
    server::{ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};

use super::{
    constraints::{self, Constrained, constrained},
    provider::{IdentityError, TrustBundle, TrustBundles, fingerprint},
    svid,
    tls::provider,
    verify::{PeerRejected, names_pass},
};
use crate::model::san::SanPattern;

/// How webpki calls it, which is no dependency of ours by itself.
const VIOLATION: &str = "NameConstraintViolation";

/// See the module.
#[derive(Debug)]
pub(crate) struct Trust {
    general: Option<Anchors>,
    domains: BTreeMap<String, Anchors>,
    hints: Vec<DistinguishedName>,
    /// The same for the same roots and revocations.
    pub(crate) fingerprint: u64,
}

/// The roots of one trust domain, or those for everybody else.
#[derive(Debug)]
struct Anchors {
    server: Arc<WebPkiServerVerifier>,
    client: Arc<dyn ClientCertVerifier>,
    /// Those of the roots that constrain names.
    constrained: Vec<Constrained>,
    /// Names that a member must have one of; empty: any.
    verify: Vec<SanPattern>,
}

impl Anchors {
    fn new(
        bundle: TrustBundle,
        crls: &[CertificateRevocationListDer<'static>],
    ) -> Result<Self, VerifierBuilderError> {
        let constrained = constrained(&bundle.certificates);
        let roots = Arc::new(bundle.store);
        let mut server = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider());
        let mut client = WebPkiClientVerifier::builder_with_provider(roots, provider());
        if !crls.is_empty() {
            // A list says something of the certificates of its issuer only.
            server = server.with_crls(crls.iter().cloned()).allow_unknown_revocation_status();
            client = client.with_crls(crls.iter().cloned()).allow_unknown_revocation_status();
        }
        Ok(Self { server: server.build()?, client: client.build()?, constrained, verify: bundle.verify })
    }
}

impl Trust {
    /// `origin` is where they are from, for errors.
    pub(crate) fn new(bundles: TrustBundles, origin: &str) -> Result<Self, IdentityError> {
        let unusable =
            |e: VerifierBuilderError| IdentityError::Roots { origin: origin.to_owned(), why: e.to_string() };
        let TrustBundles { general, domains, crls } = bundles;
        let all = general.iter().chain(domains.values());
        let fingerprint = fingerprint((
            general.as_ref().map(|b| &b.certificates),
            domains.iter().map(|(name, b)| (name, &b.certificates)).collect::<Vec<_>>(),
            crls.iter().map(|crl| crl.as_ref()).collect::<Vec<&[u8]>>(),
        ));
        let hints = all.flat_map(|b| b.store.subjects()).collect();
        let general = general.map(|b| Anchors::new(b, &crls)).transpose().map_err(unusable)?;
        let domains = domains
            .into_iter()
            .map(|(name, b)| Ok((name, Anchors::new(b, &crls).map_err(unusable)?)))
            .collect::<Result<_, IdentityError>>()?;
        Ok(Self { general, domains, hints, fingerprint })
    }

    /// The subjects of all roots, which clients are told.
    pub(crate) fn hints(&self) -> &[DistinguishedName] {
        &self.hints
    }

    /// Why peers may reject our own certificate without being able to say so, if they trust what we trust.
    pub(crate) fn hint(&self, chain: &[CertificateDer<'_>]) -> Option<String> {
        let (leaf, above) = chain.split_first()?;
        let anchors = self.anchors(leaf).ok()?;
        constraints::unsupported(leaf, above, &anchors.constrained)
    }

    /// The roots for whoever `leaf` claims to be. What is no proper SVID and claims to be one is rejected here.
    fn anchors(&self, leaf: &CertificateDer<'_>) -> Result<&Anchors, PeerRejected> {
        let domain = svid::trust_domain(leaf).map_err(PeerRejected::no_svid)?;
        let own = domain.as_ref().and_then(|name| self.domains.get(&**name));
        own.or(self.general.as_ref()).ok_or_else(|| PeerRejected::no_bundle(domain.as_deref()))
    }

    /// Verifies the chain of a client: its certificates, the leaf first.
    pub(crate) fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        san: &[SanPattern],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let anchors = self.anchors(leaf).map_err(PeerRejected::into_rustls)?;
        match anchors.client.verify_client_cert(leaf, above, now) {
            Ok(_) => {}
            Err(e) => anchors.judge(e, leaf, above)?,
        }
        anchors.names_pass(san, leaf)
    }

    /// Verifies the chain of a server. Without `san` it must be valid for `name`.
    pub(crate) fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        san: &[SanPattern],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let anchors = self.anchors(leaf).map_err(PeerRejected::into_rustls)?;
        let is_of_name = match anchors.server.verify_server_cert(leaf, above, name, &[], now) {
            Ok(_) => true,
            // The name is the last thing that is checked: the chain is good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => false,
            Err(e) => {
                anchors.judge(e, leaf, above)?;
                verify_server_name(&ParsedCertificate::try_from(leaf)?, name).is_ok()
            }
        };
        if san.is_empty() && !is_of_name {
            return Err(PeerRejected::name(name, leaf).into_rustls());
        }
        // Of what a trust domain verifies, too.
        if san.is_empty() { anchors.names_pass_domain(leaf) } else { anchors.names_pass(san, leaf) }
    }
}

impl Anchors {
    /// What webpki has against a chain, but for what it cannot check.
    ///
    /// Sound for name constraints, because webpki (0.103, `verify_cert.rs`) compares names only on a path all of whose
    /// signatures, dates, usages and revocations it has verified; and because here those of every CA that may be on a path
    /// hold, whichever path that was.
    fn judge(
        &self,
        error: rustls::Error,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        match &error {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner)))
                if inner.to_string() == VIOLATION =>
            {
                constraints::check(leaf, above, &self.constrained)
                    .map_err(|why| PeerRejected::constraints(why).into_rustls())
            }
            rustls::Error::InvalidCertificate(_) => match svid::unsupported_algorithm(leaf, above) {
                Some(why) if is_about_algorithms(&error) => Err(PeerRejected::algorithm(why).into_rustls()),
                _ => Err(error),
            },
            _ => Err(error),
        }
    }

    fn names_pass(&self, san: &[SanPattern], leaf: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        names_pass(san, leaf).map_err(PeerRejected::into_rustls)?;
        self.names_pass_domain(leaf)
    }

    /// Whether it has one of the names that its trust domain's members have here.
    fn names_pass_domain(&self, leaf: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        if self.verify.is_empty() {
            return Ok(());
        }
        names_pass(&self.verify, leaf).map_err(PeerRejected::into_rustls)
    }
}

/// What rustls says where a chain has an algorithm that it does not know.
fn is_about_algorithms(error: &rustls::Error) -> bool {
    matches!(
        error,
        rustls::Error::InvalidCertificate(
            CertificateError::UnsupportedSignatureAlgorithmContext { .. }
                | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
                | CertificateError::BadEncoding
                | CertificateError::Other(_)
        )
    )
}
