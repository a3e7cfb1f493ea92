//! TLS as both sides of a tunnel speak it: 1.3 only, both sides with a certificate.
//!
//! Enters: the files of a certificate, its key and the CA. Leaves: rustls configurations, one per set of
//! checks. Invariant: a session is only ever resumed under the checks and the files that it was made
//! under, because each has tickets of its own. It never relies on a process-wide crypto provider.

use std::{
    collections::{HashMap, HashSet},
    fmt, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use rustls::{
    CertificateError, ClientConfig, InconsistentKeys, OtherError, RootCertStore, ServerConfig,
    SupportedCipherSuite,
    client::{Resumption, VerifierBuilderError, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, cipher_suite},
    },
    server::danger::ClientCertVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{PrivateKeyDer, UnixTime};

use crate::{
    config::Protocol,
    identity::{
        constraints::{Constrained, constrained, unsupported},
        peer::peer_identity,
        pem,
        verify::{ClientVerifier, PeerRejected, ServerVerifier, check_expiry, names_pass},
    },
    model::{
        flow::Identity,
        san::SanPattern,
        trust::{ClientCheck, ServerCheck},
    },
};
use crate::{
    model::trust::IdentityFiles,
    process::exit::{Cause, Failure},
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

impl From<TlsError> for Failure {
    fn from(e: TlsError) -> Self {
        Self::Config(Cause::new(e, "For trying, \"tunnel pki issue\" makes a certificate and its key."))
    }
}

/// Why the files do not make an identity. Each names the file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It cannot be read.
    #[error("{}: {source}{}", .path.display(), how_to_read(.source))]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not hold what it should.
    #[error("{}: {what}: {}", .path.display(), .remedy.replace("{file}", &.path.display().to_string()))]
    Content {
        /// Which.
        path: PathBuf,
        /// What it holds.
        what: String,
        /// What helps; `{file}` stands for the file.
        remedy: String,
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

impl TlsError {
    fn content(path: &Path, pem::Problem { what, remedy }: pem::Problem) -> Self {
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

/// Everything that connections are made and taken with, by a configuration.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Of upstreams.
    pub clients: HashSet<(Vec<SanPattern>, Protocol)>,
    /// Of listeners.
    pub servers: HashSet<(ClientCheck, Vec<Protocol>)>,
}

/// Configurations that were made already, by what makes them different.
type Made<K, C> = Mutex<HashMap<K, Arc<C>>>;

/// A loaded certificate, key and CA, and the configurations made from them.
pub struct TlsIdentity {
    key: Arc<CertifiedKey>,
    identity: Option<Identity>,
    fingerprint: u64,
    /// Why a peer may refuse our certificate without being able to say so.
    hint: Option<Arc<str>>,
    roots: Arc<RootCertStore>,
    /// Those of the roots that constrain names.
    constrained: Arc<[Constrained]>,
    server_verifier: Arc<WebPkiServerVerifier>,
    client_verifier: Arc<dyn ClientCertVerifier>,
    // One entry per upstream's and listener's checks, which the configuration in force bounds (`keep`). Locked when a
    // connection is made, never while bytes move.
    clients: Made<(Vec<SanPattern>, Protocol), ClientConfig>,
    servers: Made<(ClientCheck, Vec<Protocol>), ServerConfig>,
}

impl TlsIdentity {
    /// Reads the files. A certificate that is not valid now is loaded all the same, with a warning: the
    /// peers will refuse it, and say so.
    pub fn load(files: &IdentityFiles) -> Result<Self, TlsError> {
        let (cert_pem, key_pem, ca_pem) = (read(&files.cert)?, read(&files.key)?, read(&files.ca)?);
        let chain = pem::certificates(&cert_pem).map_err(|e| TlsError::content(&files.cert, e))?;
        let key = pem::key(&key_pem).map_err(|e| TlsError::content(&files.key, e))?;
        let key = certified(files, &chain, key)?;

        let mut roots = RootCertStore::empty();
        let cas = pem::certificates(&ca_pem).map_err(|e| TlsError::content(&files.ca, e))?;
        for ca in &cas {
            roots.add(ca.der.clone()).map_err(|e| TlsError::certificate(&files.ca, ca, &e))?;
        }
        let cas: Vec<_> = cas.into_iter().map(|ca| ca.der).collect();
        let constrained: Arc<[Constrained]> = constrained(&cas).into();
        let roots = Arc::new(roots);
        let bad_roots = |e: VerifierBuilderError| TlsError::Content {
            path: files.ca.clone(),
            what: format!("its certificates cannot be used: {e}"),
            remedy: "name the CA's certificates".to_owned(),
        };
        let server_verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(&bad_roots)?;
        let client_verifier = ClientVerifier::webpki(Arc::clone(&roots), provider()).map_err(bad_roots)?;

        if let Err(why) = check_expiry(&key.cert, UnixTime::now()) {
            tracing::warn!(file = %files.cert.display(), "our certificate will be refused: {}", why.detail);
        }
        let hint = key.cert.split_first().and_then(|(leaf, above)| unsupported(leaf, above, &constrained));
        if let Some(hint) = &hint {
            tracing::warn!(file = %files.cert.display(), "peers may reject our certificate: {hint}");
        }
        let identity = peer_identity(&key.cert);
        if identity.is_none() {
            tracing::warn!(file = %files.cert.display(), "our certificate carries no URI, DNS or IP name");
        }
        Ok(Self {
            key: Arc::new(key),
            identity,
            fingerprint: fingerprint([&cert_pem, &key_pem, &ca_pem]),
            hint: hint.map(Into::into),
            roots,
            constrained,
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

    /// Why a peer may refuse our certificate without being able to say so.
    pub(crate) fn hint(&self) -> Option<Arc<str>> {
        self.hint.clone()
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
            Arc::clone(&self.constrained),
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

    /// Forgets the configurations, and with them the sessions, of checks that nothing is configured with any more.
    pub(crate) fn keep(&self, wanted: &Wanted) {
        let lock = PoisonError::into_inner;
        self.clients.lock().unwrap_or_else(lock).retain(|key, _| wanted.clients.contains(key));
        let lock = PoisonError::into_inner;
        self.servers.lock().unwrap_or_else(lock).retain(|key, _| wanted.servers.contains(key));
    }

    /// How to take connections from clients that must pass `check` and speak one of `protocols`, of which the
    /// first is taken that a client offers.
    pub fn server_config(&self, check: &ClientCheck, protocols: &[Protocol]) -> Arc<ServerConfig> {
        let mut made = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (check.clone(), protocols.to_vec());
        if let Some(config) = made.get(&key) {
            return Arc::clone(config);
        }
        let verifier = Arc::new(ClientVerifier::new(
            Arc::clone(&self.client_verifier),
            Arc::clone(&self.constrained),
            check.san.clone(),
        ));
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

/// The key together with its certificates, of which the first is the key's own.
fn certified(
    files: &IdentityFiles,
    chain: &[pem::Placed],
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, TlsError> {
    let problem = pem::unsupported(&key);
    let key = provider()
        .key_provider
        .load_private_key(key)
        .map_err(|_says_less| TlsError::content(&files.key, problem))?;
    let certs = chain.iter().map(|placed| placed.der.clone()).collect();
    let certified = CertifiedKey::new(certs, Arc::clone(&key));
    match certified.keys_match() {
        // A provider that cannot tell has nothing against it.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(certified),
        Err(rustls::Error::InconsistentKeys(_)) => {
            if let Some(problem) = chain.first().and_then(pem::explicit_curve) {
                return Err(TlsError::content(&files.cert, problem));
            }
            let (cert, key_file) = (files.cert.clone(), files.key.clone());
            let of_key = |placed: &&pem::Placed| {
                CertifiedKey::new(vec![placed.der.clone()], Arc::clone(&key)).keys_match().is_ok()
            };
            Err(match chain.iter().find(of_key) {
                Some(own) => TlsError::Order { key: key_file, cert, place: own.describe() },
                None => TlsError::KeyMismatch { key: key_file, cert },
            })
        }
        Err(e) => Err(match chain.first() {
            Some(leaf) => TlsError::certificate(&files.cert, leaf, &e),
            None => TlsError::KeyMismatch { key: files.key.clone(), cert: files.cert.clone() },
        }),
    }
}

/// Tells changed files from unchanged ones. Nobody gains by a collision: who can write the files needs
/// none.
fn fingerprint(files: [&[u8]; 3]) -> u64 {
    let mut hasher = DefaultHasher::new();
    files.hash(&mut hasher);
    hasher.finish()
}
