//! A throwaway certificate authority, for trials and tests: `ca.pem`, `ca-key.pem`, `NAME.pem`, `NAME-key.pem`.
//!
//! # Invariants
//! - A private key is in a file that only its owner can read, from the moment that the file exists.
//! - No file is overwritten unless the caller asks for it.

use std::{
    fs,
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

use crate::model::san::SpiffeId;
use crate::process::exit::{Cause, Failure};

/// How long a CA is valid. As long as a trial of this program may last; nobody runs production on it.
pub const CA_DAYS: u32 = 3650;
/// How long a certificate is valid unless told otherwise: long enough for a trial, short enough that
/// nobody forgets it in a fleet.
pub const LEAF_DAYS: u32 = 30;
/// How far `not_before` lies in the past, for peers whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca-key.pem";
const CERT_MODE: u32 = 0o644;
const KEY_MODE: u32 = 0o600;

impl From<PkiError> for Failure {
    fn from(e: PkiError) -> Self {
        let cause = Cause::new(&e, "");
        match e {
            PkiError::BadName(_) | PkiError::BadDns(_) | PkiError::Exists(_) | PkiError::NoCa(_) => {
                Self::Config(cause)
            }
            PkiError::Io { .. } | PkiError::BadCa { .. } | PkiError::Make(_) => Self::Other(cause),
        }
    }
}

/// Why no certificate came out.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file is there already.
    #[error("{} already exists; --force replaces it", .0.display())]
    Exists(PathBuf),
    /// A file or directory could not be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// There is no CA in the directory.
    #[error("{} does not exist: \"tunnel pki init {}\" creates a CA", .0.display(), .0.parent().unwrap_or(Path::new(".")).display())]
    NoCa(PathBuf),
    /// The CA's certificate or key cannot be read.
    #[error("{}: {why}", .path.display())]
    BadCa {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A name for the files that would leave the directory, or collide with the CA.
    #[error(
        "\"{0}\" is not a valid file name: use letters, digits, \".\", \"-\" and \"_\", not \".\" first, and not \"ca\""
    )]
    BadName(String),
    /// A DNS name that no certificate can carry.
    #[error("\"{0}\" is not a DNS name")]
    BadDns(String),
    /// The library that makes certificates refused.
    #[error("cannot create the certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From.
    pub not_before: SystemTime,
    /// Until.
    pub not_after: SystemTime,
}

impl Validity {
    /// From now (less some clock skew) for `days` days.
    pub fn days(days: u32) -> Self {
        let now = SystemTime::now();
        Self { not_before: now - CLOCK_SKEW, not_after: now + DAY * days }
    }

    /// A day that ended yesterday; tests of expiry want it.
    pub fn past() -> Self {
        let now = SystemTime::now();
        Self { not_before: now - DAY * 2, not_after: now - DAY }
    }
}

/// What a certificate is to say. At least one of `id`, `dns`, `ip` should be there: a peer without any
/// name is refused by our verifiers.
#[derive(Clone, Debug)]
pub struct IssueRequest {
    /// The SPIFFE ID, which becomes the URI name.
    pub id: Option<SpiffeId>,
    /// DNS names.
    pub dns: Vec<String>,
    /// Addresses.
    pub ip: Vec<IpAddr>,
    /// When it is valid.
    pub validity: Validity,
}

impl IssueRequest {
    /// A certificate for `id`, valid for [`LEAF_DAYS`].
    pub fn new(id: SpiffeId) -> Self {
        Self { id: Some(id), dns: Vec::new(), ip: Vec::new(), validity: Validity::days(LEAF_DAYS) }
    }
}

/// A certificate and its private key, both PEM.
pub struct Issued {
    /// The leaf. The CA signs it directly, so there is no chain to go with it.
    pub cert_pem: String,
    /// The key, PKCS#8.
    pub key_pem: String,
}

/// A certificate authority that can sign.
pub struct Ca {
    cert_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// A new one, with a P-256 key.
    pub fn generate(validity: Validity) -> Result<Self, PkiError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(validity);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // Two CAs must differ in name, or a chain from the wrong one looks like a bad signature.
        let mark: String = params.key_identifier(&key).iter().take(4).map(|b| format!("{b:02x}")).collect();
        params.distinguished_name.push(DnType::CommonName, format!("tunnel throwaway CA {mark}"));
        let cert_pem = params.self_signed(&key)?.pem();
        Ok(Self { cert_pem, issuer: Issuer::new(params, key) })
    }

    /// The one that [`init`] left in `dir`.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let cert_pem = read_ca(&dir.join(CA_CERT))?;
        let key_path = dir.join(CA_KEY);
        let bad = |path: PathBuf| move |e: rcgen::Error| PkiError::BadCa { path, why: e.to_string() };
        let key = KeyPair::from_pem(&read_ca(&key_path)?).map_err(bad(key_path))?;
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, key).map_err(bad(dir.join(CA_CERT)))?;
        Ok(Self { cert_pem, issuer })
    }

    /// The CA's certificate.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Signs a certificate over a new P-256 key.
    pub fn issue(&self, request: &IssueRequest) -> Result<Issued, PkiError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(request.validity);
        params.distinguished_name.push(DnType::CommonName, "tunnel");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = names(request)?;
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Issued { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
    }
}

fn params(validity: Validity) -> CertificateParams {
    // Times count from the epoch so that no second crate for dates is needed; before 1970 is 1970.
    let at = |t: SystemTime| {
        let secs = t.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        date_time_ymd(1970, 1, 1) + Duration::from_secs(secs)
    };
    let mut params = CertificateParams::default();
    params.not_before = at(validity.not_before);
    params.not_after = at(validity.not_after);
    params.distinguished_name = DistinguishedName::new();
    params.use_authority_key_identifier_extension = true;
    params
}

fn names(request: &IssueRequest) -> Result<Vec<SanType>, PkiError> {
    let mut names = Vec::new();
    if let Some(id) = &request.id {
        names.push(SanType::URI(id.as_str().try_into()?));
    }
    for dns in &request.dns {
        let bare = dns.strip_prefix("*.").unwrap_or(dns);
        if !crate::model::flow::is_host_name(bare) {
            return Err(PkiError::BadDns(dns.clone()));
        }
        names.push(SanType::DnsName(dns.as_str().try_into()?));
    }
    names.extend(request.ip.iter().copied().map(SanType::IpAddress));
    Ok(names)
}

fn read_ca(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PkiError::NoCa(path.to_owned()),
        _ => PkiError::Io { path: path.to_owned(), source },
    })
}

/// A certificate's file and its key's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairFiles {
    /// The certificate.
    pub cert: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// `tunnel pki init`: writes `ca.pem` and `ca-key.pem` into `dir`, which is made when it is missing.
pub fn init(dir: &Path, force: bool) -> Result<PairFiles, PkiError> {
    fs::create_dir_all(dir).map_err(|source| PkiError::Io { path: dir.to_owned(), source })?;
    let files = PairFiles { cert: dir.join(CA_CERT), key: dir.join(CA_KEY) };
    refuse_existing(&files, force)?;
    let ca = Ca::generate(Validity::days(CA_DAYS))?;
    write(&files.key, ca.issuer.key().serialize_pem().as_bytes(), KEY_MODE, force)?;
    write(&files.cert, ca.cert_pem.as_bytes(), CERT_MODE, force)?;
    Ok(files)
}

/// `tunnel pki issue`: has the CA in `dir` sign a certificate; writes `NAME.pem` and `NAME-key.pem`.
pub fn issue(dir: &Path, name: &str, request: &IssueRequest, force: bool) -> Result<PairFiles, PkiError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if name.is_empty() || name == "ca" || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(PkiError::BadName(name.to_owned()));
    }
    let files = PairFiles { cert: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}-key.pem")) };
    refuse_existing(&files, force)?;
    let issued = Ca::load(dir)?.issue(request)?;
    write(&files.key, issued.key_pem.as_bytes(), KEY_MODE, force)?;
    write(&files.cert, issued.cert_pem.as_bytes(), CERT_MODE, force)?;
    Ok(files)
}

/// Both are looked at before either is written, so that a refusal leaves no half of a pair.
fn refuse_existing(files: &PairFiles, force: bool) -> Result<(), PkiError> {
    for path in [&files.cert, &files.key] {
        if !force && path.symlink_metadata().is_ok() {
            return Err(PkiError::Exists(path.clone()));
        }
    }
    Ok(())
}

/// Creates the file with its mode (`O_EXCL`), or replaces it whole: a reader sees the old or the new.
fn write(path: &Path, bytes: &[u8], mode: u32, force: bool) -> Result<(), PkiError> {
    let fresh = if force {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        path.with_file_name(name)
    } else {
        path.to_owned()
    };
    let io_error = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists(path.to_owned()),
        _ => PkiError::Io { path: path.to_owned(), source },
    };
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh).map_err(io_error)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    let done = if force { written.and_then(|()| fs::rename(&fresh, path)) } else { written };
    done.map_err(|e| {
        // Ours alone: it was made with O_EXCL a moment ago. That it cannot be removed adds nothing to `e`.
        let _ = fs::remove_file(&fresh);
        io_error(e)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::{
        identity::peer::{names_of, peer_identity},
        model::{flow::Identity, san::San},
    };

    fn der(pem: &str) -> rustls_pki_types::CertificateDer<'static> {
        use rustls_pki_types::pem::PemObject as _;
        rustls_pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
    }

    #[test]
    fn a_certificate_carries_every_name_it_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), false).unwrap();
        let mut request = IssueRequest::new("spiffe://example.org/web".parse().unwrap());
        request.dns = vec!["web.internal".to_owned(), "*.web.internal".to_owned()];
        request.ip = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let files = issue(dir.path(), "web", &request, false).unwrap();
        let cert = der(&fs::read_to_string(files.cert).unwrap());
        assert_eq!(
            names_of(&cert),
            [
                San::Uri("spiffe://example.org/web".to_owned()),
                San::Dns("web.internal".to_owned()),
                San::Dns("*.web.internal".to_owned()),
                San::Ip("10.0.0.1".parse().unwrap()),
                San::Ip("fd00::1".parse().unwrap()),
            ]
        );
        assert_eq!(peer_identity(&[cert]), Some(Identity("spiffe://example.org/web".into())));
    }

    #[test]
    fn identity_is_spiffe_before_dns_before_ip() {
        let ca = Ca::generate(Validity::days(1)).unwrap();
        let mut request = IssueRequest::new("spiffe://example.org/web".parse().unwrap());
        request.id = None;
        request.ip = vec!["10.0.0.1".parse().unwrap()];
        let id =
            |request: &IssueRequest| peer_identity(&[der(&ca.issue(request).unwrap().cert_pem)]).map(|i| i.0);
        assert_eq!(id(&request).as_deref(), Some("10.0.0.1"));
        request.dns = vec!["web.internal".to_owned()];
        assert_eq!(id(&request).as_deref(), Some("web.internal"));
        request.dns.clear();
        request.ip.clear();
        assert_eq!(id(&request), None);
    }

    #[test]
    fn keys_are_private_and_nothing_is_overwritten_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let ca = init(dir.path(), false).unwrap();
        let request = IssueRequest::new("spiffe://example.org/web".parse().unwrap());
        let web = issue(dir.path(), "web", &request, false).unwrap();
        for key in [&ca.key, &web.key] {
            assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let before = fs::read(&ca.cert).unwrap();
        assert!(matches!(init(dir.path(), false), Err(PkiError::Exists(_))));
        assert!(matches!(issue(dir.path(), "web", &request, false), Err(PkiError::Exists(_))));
        assert_eq!(fs::read(&ca.cert).unwrap(), before);
        init(dir.path(), true).unwrap();
        assert_ne!(fs::read(&ca.cert).unwrap(), before);
        assert_eq!(fs::metadata(&ca.key).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "no file is left over");
    }

    #[test]
    fn what_cannot_be_made_is_said_clearly() {
        let dir = tempfile::tempdir().unwrap();
        let mut request = IssueRequest::new("spiffe://example.org/web".parse().unwrap());
        let said = |name: &str, r: &IssueRequest| issue(dir.path(), name, r, false).unwrap_err().to_string();
        assert!(said("web", &request).contains("tunnel pki init"));
        for name in ["", "ca", "../web", "a/b", ".web"] {
            assert!(said(name, &request).contains("file name"), "{name}");
        }
        init(dir.path(), false).unwrap();
        request.dns = vec!["a b".to_owned()];
        assert_eq!(said("web", &request), "\"a b\" is not a DNS name");
        fs::write(dir.path().join("ca-key.pem"), "nonsense").unwrap();
        request.dns.clear();
        assert!(said("web", &request).contains("ca-key.pem: "));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no half of a pair is left");
    }
}
