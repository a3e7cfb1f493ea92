//! An identity from three PEM files: certificates, private key, roots.
//!
//! # Invariants
//! - Every error names its file, and what to do about it.
//! - What is wrong with the files is found when they are read: material that was returned can be used.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{CertificateError, InconsistentKeys, OtherError, sign::CertifiedKey};
use rustls_pki_types::PrivateKeyDer;
use zeroize::Zeroizing;

use crate::{
    identity::{
        pem,
        provider::{IdentityError, IdentityProvider, Material, Subscription, TrustBundle, fingerprint},
        tls::signing_key,
    },
    model::trust::IdentityFiles,
    process::files,
};

impl IdentityProvider for IdentityFiles {
    fn fetch(&self) -> Result<Material, IdentityError> {
        let (material, exposed) = material(self)?;
        accept(self, exposed)?;
        Ok(material)
    }

    fn subscribe(&self, changed: Box<dyn FnMut() + Send>) -> io::Result<Subscription> {
        files::watch([&*self.cert, &*self.key, &*self.ca], "identity-watch", changed).map(Subscription::new)
    }
}

/// What the files hold, and who else can read the key.
pub(super) fn material(files: &IdentityFiles) -> Result<(Material, Option<Readers>), FilesError> {
    let (cert_pem, ca_pem) = (read(&files.cert)?, read(&files.ca)?);
    let KeyFile { pem: key_pem, exposed } = read_key(&files.key)?;
    let chain = pem::certificates(&cert_pem).map_err(|e| FilesError::content(&files.cert, e))?;
    let key = pem::key(&key_pem).map_err(|e| FilesError::content(&files.key, e))?;
    let certificate = Arc::new(certified(files, &chain, key)?);
    let bundles = bundle_of(&files.ca, &ca_pem)?.into();
    let origin = files.cert.display().to_string();
    let fingerprint = fingerprint([&cert_pem, &*key_pem, &ca_pem]);
    Ok((Material { certificate, bundles, origin, fingerprint }, exposed))
}

/// Whether a key may be used that these can read.
pub(super) fn accept(files: &IdentityFiles, exposed: Option<Readers>) -> Result<(), FilesError> {
    match exposed {
        Some(to) if !files.insecure_key_permissions => {
            Err(FilesError::Exposed { path: files.key.clone(), to })
        }
        Some(to) => {
            tracing::warn!(
                file = %files.key.display(),
                "private key can be read by {to} (insecure_key_permissions)"
            );
            Ok(())
        }
        None => Ok(()),
    }
}

/// How many unusable roots of a file are named.
const SKIPPED_LOGGED: usize = 8;

/// The roots in a file. One of several that cannot be used is left out, which trusts fewer and not more.
pub(super) fn bundle_of(path: &Path, ca_pem: &[u8]) -> Result<TrustBundle, FilesError> {
    let found = pem::each_certificate(ca_pem).map_err(|e| FilesError::content(path, e))?;
    let (mut bundle, mut skipped) = (TrustBundle::default(), Vec::new());
    for ca in found {
        let added = match ca {
            Ok(ca) => bundle.add(ca.der.clone()).map_err(|e| FilesError::certificate(path, &ca, &e)),
            Err(problem) => Err(FilesError::content(path, problem)),
        };
        skipped.extend(added.err());
    }
    if bundle.is_empty() && !skipped.is_empty() {
        return Err(skipped.swap_remove(0));
    }
    for why in skipped.iter().take(SKIPPED_LOGGED) {
        tracing::warn!(%why, "left out a CA certificate: it is not trusted");
    }
    if skipped.len() > SKIPPED_LOGGED {
        tracing::warn!(file = %path.display(), number = skipped.len(), "left out CA certificates");
    }
    Ok(bundle)
}

/// Why the files do not make an identity.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file cannot be read.
    #[error("{}: {source}{}", .path.display(), how_to_read(.source))]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {what}: {}", .path.display(), .remedy.replace("{file}", &.path.display().to_string()))]
    Content {
        /// Which.
        path: PathBuf,
        /// What it holds.
        what: String,
        /// What helps; `{file}` stands for the file.
        remedy: String,
    },
    /// Others can read the key.
    #[error(
        "{0}: the private key can be read by {to}: chmod 600 {0} (a Kubernetes secret: defaultMode: 0400), or set \
         insecure_key_permissions = true", .path.display()
    )]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// Who they are.
        to: Readers,
    },
    /// The key is of another certificate.
    #[error(
        "{}: the key is not the one of the certificate in {}: both have to print the same with \"openssl pkey -in {} \
         -pubout\" and \"openssl x509 -in {} -noout -pubkey\"",
        .key.display(), .cert.display(), .key.display(), .cert.display()
    )]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's.
        cert: PathBuf,
    },
    /// The key is of a certificate that does not stand first.
    #[error(
        "{}: the key in {} is that of {place}: the certificate of the key has to stand first, those of its CAs after it",
        .cert.display(), .key.display()
    )]
    Order {
        /// The key's file.
        key: PathBuf,
        /// The certificates'.
        cert: PathBuf,
        /// Where in it the key's certificate stands.
        place: String,
    },
}

impl FilesError {
    pub(super) fn content(path: &Path, pem::Problem { what, remedy }: pem::Problem) -> Self {
        Self::Content { path: path.to_owned(), what, remedy }
    }

    /// One certificate of a file cannot be used.
    fn certificate(path: &Path, placed: &pem::Placed, why: &rustls::Error) -> Self {
        let why: &dyn fmt::Display = match why {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => inner,
            rustls::Error::InvalidCertificate(inner) => inner,
            other => other,
        };
        let what = format!("{} cannot be used: {why}", placed.describe());
        Self::Content { path: path.to_owned(), what, remedy: "replace or remove it".to_owned() }
    }
}

fn how_to_read(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => ": let the user of this process read it",
        io::ErrorKind::IsADirectory => ": name the file in it",
        _ => "",
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, FilesError> {
    fs::read(path).map_err(|source| FilesError::Read { path: path.to_owned(), source })
}

/// The file of a key.
struct KeyFile {
    pem: Zeroizing<Vec<u8>>,
    /// Who else can read it.
    exposed: Option<Readers>,
}

/// Who can read a file besides its owner and root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Everybody.
    Everyone,
    /// The members of a group that this process is not in.
    Group(u32),
}

impl fmt::Display for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everyone => f.write_str("every user"),
            Self::Group(id) => write!(f, "group {id}, in which the daemon is not"),
        }
    }
}

/// Who can read a file of this mode and group besides its owner and root. Membership of root's group is given by root only,
/// and a daemon's own group may have been made for what it shares (fsGroup of Kubernetes).
fn readers(mode: u32, group: u32, own: &[u32]) -> Option<Readers> {
    match mode {
        _ if mode & 0o007 != 0 => Some(Readers::Everyone),
        _ if mode & 0o070 != 0 && group != 0 && !own.contains(&group) => Some(Readers::Group(group)),
        _ => None,
    }
}

/// Reads the file of a key into memory that is overwritten when it is given back.
fn read_key(path: &Path) -> Result<KeyFile, FilesError> {
    let failed = |source| FilesError::Read { path: path.to_owned(), source };
    let mut file = fs::File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    // Room for all of it, and for finding out that this is all: nothing is left where a smaller one was.
    let size = usize::try_from(meta.len()).unwrap_or_default();
    let mut pem = Zeroizing::new(Vec::with_capacity(size.saturating_add(1)));
    file.read_to_end(&mut pem).map_err(failed)?;
    let mut own: Vec<u32> =
        nix::unistd::getgroups().unwrap_or_default().into_iter().map(nix::unistd::Gid::as_raw).collect();
    own.push(nix::unistd::getegid().as_raw());
    // A pipe (`--key <(..)`) is read by who has it open.
    let exposed = if meta.is_file() { readers(meta.mode(), meta.gid(), &own) } else { None };
    Ok(KeyFile { pem, exposed })
}

/// The key together with its certificates, of which the first is the key's own.
fn certified(
    files: &IdentityFiles,
    chain: &[pem::Placed],
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, FilesError> {
    let problem = pem::unsupported(&key);
    let key = signing_key(key).map_err(|_says_less| FilesError::content(&files.key, problem))?;
    let certs = chain.iter().map(|placed| placed.der.clone()).collect();
    let certified = CertifiedKey::new(certs, Arc::clone(&key));
    match certified.keys_match() {
        // A provider that cannot tell has nothing against it.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(certified),
        Err(rustls::Error::InconsistentKeys(_)) => {
            if let Some(problem) = chain.first().and_then(pem::explicit_curve) {
                return Err(FilesError::content(&files.cert, problem));
            }
            let (cert, key_file) = (files.cert.clone(), files.key.clone());
            let of_key = |placed: &&pem::Placed| {
                CertifiedKey::new(vec![placed.der.clone()], Arc::clone(&key)).keys_match().is_ok()
            };
            Err(match chain.iter().find(of_key) {
                Some(own) => FilesError::Order { key: key_file, cert, place: own.describe() },
                None => FilesError::KeyMismatch { key: key_file, cert },
            })
        }
        Err(e) => Err(match chain.first() {
            Some(leaf) => FilesError::certificate(&files.cert, leaf, &e),
            None => FilesError::KeyMismatch { key: files.key.clone(), cert: files.cert.clone() },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_for_its_owner_root_and_a_group_of_the_daemons() {
        let own = [7, 8];
        assert_eq!(readers(0o100_600, 5, &own), None);
        assert_eq!(readers(0o100_400, 5, &own), None);
        // Of systemd's credentials with an access list, and of files for a group that root has made.
        assert_eq!(readers(0o100_440, 0, &own), None);
        assert_eq!(readers(0o100_640, 8, &own), None);
        assert_eq!(readers(0o100_640, 5, &own), Some(Readers::Group(5)));
        assert_eq!(readers(0o100_644, 8, &own), Some(Readers::Everyone));
        assert_eq!(readers(0o100_602, 0, &own), Some(Readers::Everyone));
    }
}
