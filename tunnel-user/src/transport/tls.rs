//! TLS as both sides of a tunnel speak it: 1.3 only, both sides with a certificate.
//!
//! Enters: the files of a certificate, its key and the CA. Leaves: rustls configurations, one per set of
//! checks. Invariant: a session is only ever resumed under the checks and the files that it was made
//! under, because each has tickets of its own. It never relies on a process-wide crypto provider.

use std::{
    collections::HashMap,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, cipher_suite},
    },
    server::danger::ClientCertVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem, pem::PemObject as _};

use crate::{
    config::Protocol,
    flow::Identity,
    transport::{
        identity::{SanPattern, peer_identity},
        verify::{
            ClientCheck, ClientVerifier, PeerRejected, ServerCheck, ServerVerifier, check_expiry, names_pass,
        },
    },
};

/// Sessions a client keeps for resumption, per set of checks. An upstream has a handful of endpoints and
/// a pool per worker; beyond that a full handshake is the price.
const CLIENT_SESSIONS: usize = 256;

/// What we offer, in the order of BoringSSL and Go, in which Envoy and the peers of most meshes offer too:
/// 128 bits are enough, and AES-256 takes fourteen rounds for a block where AES-128 takes ten. A listener takes the
/// client's order.
const CIPHER_SUITES: [SupportedCipherSuite; 3] = [
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// The only crypto in use.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider { cipher_suites: CIPHER_SUITES.to_vec(), ..aws_lc_rs::default_provider() })
    });
    Arc::clone(&PROVIDER)
}

/// Where a certificate, its key and the CA stand.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdentityFiles {
    /// The certificate, PEM; the leaf first, intermediates after it.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The CA certificates that peers are verified against, PEM.
    pub ca: PathBuf,
}

/// Why the files do not make an identity. Each names the file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It cannot be read.
    #[error("{}: {source}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not PEM where it should be.
    #[error("{}: not PEM: {source}", .path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// There is no certificate in it.
    #[error("{}: no certificate in it (\"-----BEGIN CERTIFICATE-----\")", .0.display())]
    NoCertificate(PathBuf),
    /// There is no private key in it.
    #[error("{}: no private key in it (\"-----BEGIN PRIVATE KEY-----\")", .0.display())]
    NoKey(PathBuf),
    /// The certificate in it cannot be read.
    #[error("{}: the certificate cannot be read: {why}", .path.display())]
    BadCertificate {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The key in it cannot be used.
    #[error("{}: the key cannot be used: {why}", .path.display())]
    BadKey {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The key is of another certificate.
    #[error("{}: the key is not the one of the certificate in {}", .key.display(), .cert.display())]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's.
        cert: PathBuf,
    },
}

/// Configurations that were made already, by what makes them different.
type Made<K, C> = Mutex<HashMap<K, Arc<C>>>;

/// A loaded certificate, key and CA, and the configurations made from them.
pub struct TlsIdentity {
    key: Arc<CertifiedKey>,
    identity: Option<Identity>,
    fingerprint: u64,
    roots: Arc<RootCertStore>,
    server_verifier: Arc<WebPkiServerVerifier>,
    client_verifier: Arc<dyn ClientCertVerifier>,
    // One entry per upstream's and listener's checks, which the configuration bounds. Locked when a
    // connection is made, never while bytes move.
    clients: Made<(Vec<SanPattern>, Protocol), ClientConfig>,
    servers: Made<(ClientCheck, Vec<Protocol>), ServerConfig>,
}

impl TlsIdentity {
    /// Reads the files. A certificate that is not valid now is loaded all the same, with a warning: the
    /// peers will refuse it, and say so.
    pub fn load(files: &IdentityFiles) -> Result<Self, TlsError> {
        let (cert_pem, key_pem, ca_pem) = (read(&files.cert)?, read(&files.key)?, read(&files.ca)?);
        let chain = certificates(&files.cert, &cert_pem)?;
        let bad_cert = |path: &Path, why: String| TlsError::BadCertificate { path: path.to_owned(), why };

        let key = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|source| match source {
            pem::Error::NoItemsFound => TlsError::NoKey(files.key.clone()),
            source => TlsError::Pem { path: files.key.clone(), source },
        })?;
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|e| match e {
            rustls::Error::InconsistentKeys(_) => {
                TlsError::KeyMismatch { key: files.key.clone(), cert: files.cert.clone() }
            }
            rustls::Error::InvalidCertificate(why) => bad_cert(&files.cert, why.to_string()),
            other => TlsError::BadKey { path: files.key.clone(), why: other.to_string() },
        })?;

        let mut roots = RootCertStore::empty();
        for ca in certificates(&files.ca, &ca_pem)? {
            roots.add(ca).map_err(|e| bad_cert(&files.ca, e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let server_verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(|e| bad_cert(&files.ca, e.to_string()))?;
        let client_verifier = ClientVerifier::webpki(Arc::clone(&roots), provider())
            .map_err(|e| bad_cert(&files.ca, e.to_string()))?;

        if let Err(why) = check_expiry(&key.cert, UnixTime::now()) {
            tracing::warn!(file = %files.cert.display(), "our certificate will be refused: {}", why.detail);
        }
        let identity = peer_identity(&key.cert);
        if identity.is_none() {
            tracing::warn!(file = %files.cert.display(), "our certificate carries no URI, DNS or IP name");
        }
        Ok(Self {
            key: Arc::new(key),
            identity,
            fingerprint: fingerprint([&cert_pem, &key_pem, &ca_pem]),
            roots,
            server_verifier,
            client_verifier,
            clients: Mutex::default(),
            servers: Mutex::default(),
        })
    }

    /// Who we are to our peers. `None` when the certificate carries no name.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Who we would be to a listener of our own, if it let us in. Its chain is not asked for: it is ours.
    pub fn as_client(&self, check: &ClientCheck) -> Result<Option<Identity>, PeerRejected> {
        check_expiry(&self.key.cert, UnixTime::now())?;
        if let Some(leaf) = self.key.cert.first() {
            names_pass(&check.san, leaf)?;
        }
        Ok(self.identity.clone())
    }

    /// Whether the files hold, byte for byte, what this was loaded from.
    pub(crate) fn is_current(&self, files: &IdentityFiles) -> Result<bool, TlsError> {
        let now = fingerprint([&read(&files.cert)?, &read(&files.key)?, &read(&files.ca)?]);
        Ok(now == self.fingerprint)
    }

    /// How to connect to servers that must pass `check`. Connect with [`ServerCheck::server_name`]. The
    /// same check and protocol give the same configuration, so that sessions resume.
    pub fn client_config(&self, check: &ServerCheck, protocol: Protocol) -> Arc<ClientConfig> {
        let mut made = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (check.san.clone(), protocol);
        if let Some(config) = made.get(&key) {
            return Arc::clone(config);
        }
        let verifier: Arc<dyn ServerCertVerifier> = Arc::new(ServerVerifier::new(
            Arc::clone(&self.server_verifier),
            Arc::clone(&self.roots),
            provider(),
            check.san.clone(),
        ));
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("aws-lc-rs has cipher suites and key exchanges for TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))));
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        // For the record layer of this process (`record`); they go nowhere else.
        config.enable_secret_extraction = true;
        // Keyed by server name inside one config: a session never crosses over to other checks.
        config.resumption = Resumption::in_memory_sessions(CLIENT_SESSIONS);
        let config = Arc::new(config);
        made.insert(key, Arc::clone(&config));
        config
    }

    /// How to take connections from clients that must pass `check` and speak one of `protocols`, of which the
    /// first is taken that a client offers.
    pub fn server_config(&self, check: &ClientCheck, protocols: &[Protocol]) -> Arc<ServerConfig> {
        let mut made = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (check.clone(), protocols.to_vec());
        if let Some(config) = made.get(&key) {
            return Arc::clone(config);
        }
        let verifier = Arc::new(ClientVerifier::new(Arc::clone(&self.client_verifier), check.san.clone()));
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("aws-lc-rs has cipher suites and key exchanges for TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))));
        config.alpn_protocols = protocols.iter().map(|p| p.alpn().to_vec()).collect();
        config.enable_secret_extraction = true;
        // Tickets carry the client's chain, so a resumed session still has its identity, on any worker.
        // Without randomness for ticket keys, rustls keeps the sessions itself.
        if let Ok(ticketer) = aws_lc_rs::Ticketer::new() {
            config.ticketer = ticketer;
        }
        let config = Arc::new(config);
        made.insert(key, Arc::clone(&config));
        config
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certs = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::Pem { path: path.to_owned(), source })?;
    if certs.is_empty() { Err(TlsError::NoCertificate(path.to_owned())) } else { Ok(certs) }
}

/// Tells changed files from unchanged ones. Nobody gains by a collision: who can write the files needs
/// none.
fn fingerprint(files: [&[u8]; 3]) -> u64 {
    let mut hasher = DefaultHasher::new();
    files.hash(&mut hasher);
    hasher.finish()
}
