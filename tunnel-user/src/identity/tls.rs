//! TLS as both sides of a tunnel speak it: 1.3 only, both sides with a certificate.
//!
//! # Invariants
//! - A session is only ever resumed under the checks and the material that it was made under, because each has tickets of its
//!   own; and not once our certificate has expired.
//! - No process-wide crypto provider is relied on.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use rustls::{
    ClientConfig, NamedGroup, ServerConfig, SupportedCipherSuite,
    client::{ClientSessionMemoryCache, ClientSessionStore, Resumption, danger::ServerCertVerifier},
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, cipher_suite, kx_group},
    },
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SigningKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{PrivateKeyDer, ServerName, UnixTime};
use zeroize::Zeroize as _;

use crate::{
    config::{KeyExchange, Protocol},
    identity::{
        describe::Certificate,
        peer::peer_identity,
        provider::{IdentityError, IdentityProvider, Material},
        svid,
        trust::Trust,
        verify::{ClientVerifier, PeerRejected, ServerVerifier, check_expiry, names_pass, not_after},
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

/// A key to sign with. What it was read from is overwritten.
pub(super) fn signing_key(mut key: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    let made = aws_lc_rs::sign::any_supported_type(&key);
    key.zeroize();
    made
}

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
type Made<K, C> = Mutex<HashMap<K, C>>;

/// How TLS is spoken as a client, and what is remembered for resumption.
#[derive(Clone, Debug)]
pub struct ClientSide {
    /// The configuration.
    pub config: Arc<ClientConfig>,
    sessions: Arc<dyn ClientSessionStore>,
}

impl ClientSide {
    /// Whether its ClientHello fills a TCP segment, or more.
    pub fn has_long_hello(&self) -> bool {
        // The first one is offered with a key share: 1,216 bytes of this one (RFC 8446 section 4.2.8).
        let first = self.config.crypto_provider().kx_groups.first();
        first.is_some_and(|group| group.name() == NamedGroup::X25519MLKEM768)
    }

    /// Forgets the sessions with a server, so that the next handshake is a full one: a resumed hello is longer, and what
    /// drops that one would drop the next.
    pub fn forget_sessions(&self, server: &ServerName<'static>) {
        while self.sessions.take_tls13_ticket(server).is_some() {}
    }
}

/// A certificate with its key and roots, and the configurations made from them.
pub struct TlsIdentity {
    key: Arc<CertifiedKey>,
    identity: Option<Identity>,
    fingerprint: u64,
    /// When our certificate expires, in seconds since 1970.
    not_after: u64,
    /// Why a peer may refuse our certificate without being able to say so.
    hint: Option<Arc<str>>,
    /// Where it is from, and what its roots say, for operators.
    origin: String,
    trusted: Vec<Certificate>,
    trust: Arc<Trust>,
    provider: Arc<CryptoProvider>,
    // One entry per upstream's and listener's checks, which the configuration in force bounds (`keep`), and whether our
    // certificate is valid: expired, it resumes nothing. Locked when a connection is made, never while bytes move.
    clients: Made<(Vec<SanPattern>, Protocol, bool), ClientSide>,
    servers: Made<(ClientCheck, Vec<Protocol>, bool), Arc<ServerConfig>>,
}

impl TlsIdentity {
    /// From what a provider has now. A certificate that is not valid now is used all the same, with a warning: the peers will
    /// reject it, and say so.
    pub fn load(provider: &dyn IdentityProvider) -> Result<Self, IdentityError> {
        Self::new(provider.fetch()?, &[])
    }

    /// From what a provider has returned. `key_exchange`: what is offered and taken; empty: the default.
    pub(crate) fn new(material: Material, key_exchange: &[KeyExchange]) -> Result<Self, IdentityError> {
        let Material { certificate: key, bundles, origin, fingerprint } = material;
        let bundles_of_all = bundles.general.iter().chain(bundles.domains.values());
        let trusted = bundles_of_all.flat_map(|b| &b.certificates).map(Certificate::read).collect();
        let trust = Arc::new(Trust::new(bundles, &origin)?);
        if let Err(why) = check_expiry(&key.cert, UnixTime::now()) {
            tracing::warn!(certificate = origin, reason = %why.detail, "peers will reject our certificate");
        }
        let no_svid = key.cert.first().and_then(|leaf| svid::trust_domain(leaf).err());
        let hint = no_svid.or_else(|| trust.hint(&key.cert));
        if let Some(reason) = &hint {
            tracing::warn!(certificate = origin, reason, "peers may reject our certificate");
        }
        let identity = peer_identity(&key.cert);
        if identity.is_none() {
            tracing::warn!(certificate = origin, "our certificate has no URI, DNS or IP name");
        }
        let not_after = key.cert.first().and_then(not_after).unwrap_or(0);
        Ok(Self {
            key,
            identity,
            fingerprint,
            not_after,
            hint: hint.map(Into::into),
            origin,
            trusted,
            trust,
            provider: with_key_exchange(key_exchange),
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

    /// When our certificate expires, in seconds since 1970.
    pub(crate) fn not_after(&self) -> u64 {
        self.not_after
    }

    /// Whom we trust with it.
    pub(crate) fn trust(&self) -> &Trust {
        &self.trust
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

    /// Whether our certificate is valid still, which is what sessions may be resumed by.
    fn is_valid(&self) -> bool {
        UnixTime::now().as_secs() <= self.not_after
    }

    /// How to connect to servers that must pass `check`. Connect with [`ServerCheck::server_name`]. The
    /// same check and protocol give the same configuration, so that sessions resume.
    pub fn client_config(&self, check: &ServerCheck, protocol: Protocol) -> Arc<ClientConfig> {
        self.client_side(check, protocol).config
    }

    /// The same, with what it remembers.
    pub(crate) fn client_side(&self, check: &ServerCheck, protocol: Protocol) -> ClientSide {
        let mut made = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let resumes = self.is_valid();
        let key = (check.san.clone(), protocol, resumes);
        if let Some(side) = made.get(&key) {
            return side.clone();
        }
        let verifier: Arc<dyn ServerCertVerifier> =
            Arc::new(ServerVerifier::new(Arc::clone(&self.trust), check.san.clone()));
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])
            .expect("aws-lc-rs has cipher suites and key exchanges for TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))));
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        // For the record layer of this process (`record`); they go nowhere else.
        config.enable_secret_extraction = true;
        // Keyed by server name inside one config: a session never crosses over to other checks.
        let sessions: Arc<dyn ClientSessionStore> =
            Arc::new(ClientSessionMemoryCache::new(if resumes { CLIENT_SESSIONS } else { 0 }));
        config.resumption = match resumes {
            true => Resumption::store(Arc::clone(&sessions)),
            false => Resumption::disabled(),
        };
        let side = ClientSide { config: Arc::new(config), sessions };
        made.insert(key, side.clone());
        side
    }

    /// Forgets the configurations, and with them the sessions, of checks that nothing is configured with any more.
    pub(crate) fn keep(&self, wanted: &Wanted) {
        let lock = PoisonError::into_inner;
        let is_client = |(san, protocol, _): &(Vec<SanPattern>, Protocol, bool)| {
            wanted.clients.contains(&(san.clone(), *protocol))
        };
        self.clients.lock().unwrap_or_else(lock).retain(|key, _| is_client(key));
        let lock = PoisonError::into_inner;
        let is_server = |(check, protocols, _): &(ClientCheck, Vec<Protocol>, bool)| {
            wanted.servers.contains(&(check.clone(), protocols.clone()))
        };
        self.servers.lock().unwrap_or_else(lock).retain(|key, _| is_server(key));
    }

    /// How to take connections from clients that must pass `check` and speak one of `protocols`, of which the
    /// first is taken that a client offers.
    pub fn server_config(&self, check: &ClientCheck, protocols: &[Protocol]) -> Arc<ServerConfig> {
        let mut made = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let resumes = self.is_valid();
        let key = (check.clone(), protocols.to_vec(), resumes);
        if let Some(config) = made.get(&key) {
            return Arc::clone(config);
        }
        let verifier = Arc::new(ClientVerifier::new(Arc::clone(&self.trust), check.san.clone()));
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])
            .expect("aws-lc-rs has cipher suites and key exchanges for TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))));
        config.alpn_protocols = protocols.iter().map(|p| p.alpn().to_vec()).collect();
        config.enable_secret_extraction = true;
        if !resumes {
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        } else if let Ok(ticketer) = aws_lc_rs::Ticketer::new() {
            // Tickets carry the client's chain, so a resumed session still has its identity, on any worker.
            // Without randomness for ticket keys, rustls keeps the sessions itself.
            config.ticketer = ticketer;
        }
        let config = Arc::new(config);
        made.insert(key, Arc::clone(&config));
        config
    }
}

/// [`provider`] with these key exchanges.
fn with_key_exchange(wanted: &[KeyExchange]) -> Arc<CryptoProvider> {
    if wanted.is_empty() {
        return provider();
    }
    let group = |wanted: &KeyExchange| match wanted {
        KeyExchange::X25519MlKem768 => kx_group::X25519MLKEM768,
        KeyExchange::X25519 => kx_group::X25519,
        KeyExchange::Secp256r1 => kx_group::SECP256R1,
        KeyExchange::Secp384r1 => kx_group::SECP384R1,
    };
    Arc::new(CryptoProvider { kx_groups: wanted.iter().map(group).collect(), ..(*provider()).clone() })
}
