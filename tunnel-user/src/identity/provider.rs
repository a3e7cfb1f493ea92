//! Where the certificate and the key of a workload come from, and the roots of its trust domain.
//!
//! # Invariants
//! - Certificate, key and roots are fetched together: nothing is ever made of one version's certificate and another's roots.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher as _},
    io,
    sync::{Arc, Mutex},
};

use rustls::{RootCertStore, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};

pub use super::files::FilesError;
use crate::{
    model::san::SanPattern,
    process::exit::{Cause, Failure},
};

/// A source of one workload's identity, such as files, or a server that pushes new certificates.
pub trait IdentityProvider: Send + Sync {
    /// What the workload has now. May block: it is called at a start, for a reload, and after a notice.
    fn fetch(&self) -> Result<Material, IdentityError>;

    /// Calls `changed`, on a thread of the provider's, whenever [`fetch`](Self::fetch) may return something else than it did
    /// before; a call too many does no harm. It ends when what is returned is dropped.
    fn subscribe(&self, changed: Box<dyn FnMut() + Send>) -> io::Result<Subscription>;
}

/// A certificate with its key, and whom its owner trusts.
#[derive(Clone)]
pub struct Material {
    /// The certificates, of which the first is the key's own, and the key.
    pub certificate: Arc<CertifiedKey>,
    /// The roots that peers are verified against.
    pub bundles: TrustBundles,
    /// Where it is from, for the log.
    pub origin: String,
    /// The same for the same certificate, key and roots.
    pub fingerprint: u64,
}

/// Whom somebody trusts.
#[derive(Clone, Debug, Default)]
pub struct TrustBundles {
    /// For everybody who is of none of the trust domains below. `None`: nobody else is trusted.
    pub general: Option<TrustBundle>,
    /// For the members of a trust domain (SPIFFE Trust Domain and Bundle, section 4), by its name.
    pub domains: BTreeMap<String, TrustBundle>,
    /// Which certificates are revoked.
    pub crls: Vec<CertificateRevocationListDer<'static>>,
}

impl From<TrustBundle> for TrustBundles {
    fn from(general: TrustBundle) -> Self {
        Self { general: Some(general), ..Self::default() }
    }
}

/// The roots of a trust domain.
#[derive(Clone, Debug)]
pub struct TrustBundle {
    pub(super) store: RootCertStore,
    pub(super) certificates: Vec<CertificateDer<'static>>,
    /// Names that a member must have one of; empty: any.
    pub(super) verify: Vec<SanPattern>,
}

impl Default for TrustBundle {
    fn default() -> Self {
        Self { store: RootCertStore::empty(), certificates: Vec::new(), verify: Vec::new() }
    }
}

impl TrustBundle {
    /// Adds a root. Fails where it is no certificate that can vouch for others.
    pub fn add(&mut self, root: CertificateDer<'static>) -> Result<(), rustls::Error> {
        self.store.add(root.clone())?;
        self.certificates.push(root);
        Ok(())
    }

    /// Whether nobody can be verified with it.
    pub fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }
}

/// Notices of an [`IdentityProvider`], until it is dropped.
pub struct Subscription {
    // Never locked: it lets several owners share what only one thread may touch at a time.
    _held: Mutex<Box<dyn Send>>,
}

impl Subscription {
    /// `held` ends the notices when it is dropped.
    pub fn new(held: impl Send + 'static) -> Self {
        Self { _held: Mutex::new(Box::new(held)) }
    }
}

/// Tells changed material from unchanged. Nobody gains by a collision: who can change the material needs none.
pub(super) fn fingerprint(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The files are at fault.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Nobody can be verified against these roots.
    #[error("{origin}: the roots cannot be used: {why}: name the CA's certificates")]
    Roots {
        /// Where they are from.
        origin: String,
        /// What rustls says.
        why: String,
    },
    /// What a provider has sent makes no identity.
    #[error("{origin}: {why}")]
    Content {
        /// The provider.
        origin: String,
        /// What is wrong with it.
        why: String,
    },
    /// A provider has not sent anything.
    #[error("{origin}: no identity was received: {why}")]
    Unavailable {
        /// The provider.
        origin: String,
        /// Why not, as far as is known.
        why: String,
    },
    /// The provider has taken the identity back: it may not be used any more.
    #[error("{origin}: the identity was withdrawn: {why}")]
    Withdrawn {
        /// The provider.
        origin: String,
        /// What it says.
        why: String,
    },
}

impl From<IdentityError> for Failure {
    fn from(e: IdentityError) -> Self {
        let remedy = match &e {
            IdentityError::Files(_) | IdentityError::Roots { .. } => {
                "For trying, \"tunnel pki issue\" makes a certificate and its key."
            }
            IdentityError::Content { .. } => "",
            IdentityError::Unavailable { .. } => {
                return Self::Other(Cause::new(
                    e,
                    "Check that the provider runs, that its socket is where the configuration says, and that this process is \
                     registered with it.",
                ));
            }
            IdentityError::Withdrawn { .. } => "Register this process with the provider of its identity.",
        };
        Self::Config(Cause::new(e, remedy))
    }
}
