//! TLS as both sides of a tunnel speak it: 1.3 only, both sides with a certificate.
//!
//! # Invariants
//! - A session is only ever resumed under the checks and the material that it was made under, because each has tickets of its
//!   own.
//! - No process-wide crypto provider is relied on.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    client::{Resumption, VerifierBuilderError, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, cipher_suite},
    },
    server::danger::ClientCertVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::UnixTime;

use crate::{
    config::Protocol,
    identity::{
        constraints::{Constrained, constrained, unsupported},
        describe::Certificate,
        peer::peer_identity,
        provider::{IdentityError, IdentityProvider, Material},
        verify::{ClientVerifier, PeerRejected, ServerVerifier, check_expiry, names_pass},
    },
    model::{
        flow::Identity,
        san::SanPattern,
        trust::{ClientCheck, ServerCheck},
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

/// A certificate with its key and roots, and the configurations made from them.
pub struct TlsIdentity {
    key: Arc<CertifiedKey>,
    identity: Option<Identity>,
    fingerprint: u64,
    /// Why a peer may refuse our certificate without being able to say so.
    hint: Option<Arc<str>>,
    roots: Arc<RootCertStore>,
    /// Where it is from, and what its roots say, for operators.
    origin: String,
    trusted: Vec<Certificate>,
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
    /// From what a provider has now. A certificate that is not valid now is used all the same, with a warning: the peers will
    /// reject it, and say so.
    pub fn load(provider: &dyn IdentityProvider) -> Result<Self, IdentityError> {
        Self::new(provider.fetch()?)
    }

    /// From what a provider has returned.
    pub(crate) fn new(material: Material) -> Result<Self, IdentityError> {
        let Material { certificate: key, bundle, origin, fingerprint } = material;
        let constrained: Arc<[Constrained]> = constrained(&bundle.certificates).into();
        let trusted = bundle.certificates.iter().map(Certificate::read).collect();
        let roots = Arc::new(bundle.store);
        let unusable =
            |e: VerifierBuilderError| IdentityError::Roots { origin: origin.clone(), why: e.to_string() };
        let server_verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(unusable)?;
        let client_verifier = ClientVerifier::webpki(Arc::clone(&roots), provider()).map_err(unusable)?;

        if let Err(why) = check_expiry(&key.cert, UnixTime::now()) {
            tracing::warn!(certificate = origin, reason = %why.detail, "peers will reject our certificate");
        }
        let hint = key.cert.split_first().and_then(|(leaf, above)| unsupported(leaf, above, &constrained));
        if let Some(reason) = &hint {
            tracing::warn!(certificate = origin, reason, "peers may reject our certificate");
        }
        let identity = peer_identity(&key.cert);
        if identity.is_none() {
            tracing::warn!(certificate = origin, "our certificate has no URI, DNS or IP name");
        }
        Ok(Self {
            key,
            identity,
            fingerprint,
            hint: hint.map(Into::into),
            roots,
            origin,
            trusted,
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

    /// Where it is from, what its certificates say, and what its roots say.
    pub fn describe(&self) -> (String, Vec<Certificate>, Vec<Certificate>) {
        (self.origin.clone(), self.key.cert.iter().map(Certificate::read).collect(), self.trusted.clone())
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

    /// Whether this was made of the same material.
    pub(crate) fn is_of(&self, material: &Material) -> bool {
        self.fingerprint == material.fingerprint
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
