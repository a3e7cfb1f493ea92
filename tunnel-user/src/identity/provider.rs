//! Where the certificate and the key of a workload come from, and the roots of its trust domain.
//!
//! # Invariants
//! - Certificate, key and roots are fetched together: nothing is ever made of one version's certificate and another's roots.

use std::{
    io,
    sync::{Arc, Mutex},
};

use rustls::{RootCertStore, sign::CertifiedKey};
use rustls_pki_types::CertificateDer;

pub use super::files::FilesError;
use crate::process::exit::{Cause, Failure};

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
    pub bundle: TrustBundle,
    /// Where it is from, for the log.
    pub origin: String,
    /// The same for the same certificate, key and roots.
    pub fingerprint: u64,
}

/// The roots of a trust domain.
#[derive(Clone, Debug)]
pub struct TrustBundle {
    pub(super) store: RootCertStore,
    pub(super) certificates: Vec<CertificateDer<'static>>,
}

impl Default for TrustBundle {
    fn default() -> Self {
        Self { store: RootCertStore::empty(), certificates: Vec::new() }
    }
}

impl TrustBundle {
    /// Adds a root. Fails where it is no certificate that can vouch for others.
    pub fn add(&mut self, root: CertificateDer<'static>) -> Result<(), rustls::Error> {
        self.store.add(root.clone())?;
        self.certificates.push(root);
        Ok(())
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
}

impl From<IdentityError> for Failure {
    fn from(e: IdentityError) -> Self {
        Self::Config(Cause::new(e, "For trying, \"tunnel pki issue\" makes a certificate and its key."))
    }
}
