//! `[identity]`, or several `[[identity]]`: who we are, where that comes from, and whom we trust.
//!
//! Listeners, upstreams and captures refer to an identity by its name.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, str::FromStr};

use super::{
    reader::{At, Reader, Section, nearest},
    section::section,
};
use crate::model::{names::IdentityName, san::SanPattern, trust::IdentityFiles};

/// The variable that names the Workload API's socket where the configuration leaves that to the environment (SPIFFE Workload
/// Endpoint, section 4).
pub const ENDPOINT_VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";

/// An identity as it is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentitySettings {
    /// Where it comes from.
    pub source: IdentitySource,
    /// Trust domains with a bundle of their own.
    pub trust_domains: Vec<TrustDomain>,
    /// Files with certificate revocation lists.
    pub crls: Vec<PathBuf>,
    /// What becomes of flows whose connection has lost its standing.
    pub on_expiry: OnExpiry,
    /// The key exchanges that are offered and taken, in this order; empty: the default ones.
    pub key_exchange: Vec<KeyExchange>,
}

impl From<IdentityFiles> for IdentitySettings {
    /// One of files, and nothing else said.
    fn from(files: IdentityFiles) -> Self {
        Self {
            source: IdentitySource::Files(files),
            trust_domains: Vec::new(),
            crls: Vec::new(),
            on_expiry: OnExpiry::Drain,
            key_exchange: Vec::new(),
        }
    }
}

/// Where an identity comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentitySource {
    /// PEM files.
    Files(IdentityFiles),
    /// The SPIFFE Workload API.
    WorkloadApi {
        /// Its socket.
        endpoint: ProviderAddr,
        /// Which of several identities; `None`: the first, which is the default one (SPIFFE Workload API, section 5.2.1).
        spiffe_id: Option<String>,
    },
    /// Envoy's secret discovery service.
    Sds {
        /// The server.
        endpoint: ProviderAddr,
        /// The secret with the certificate and its key.
        secret: String,
        /// The secret with the validation context.
        validation_context: String,
    },
}

/// Where a provider of identities listens, in plaintext.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ProviderAddr {
    /// A socket of this node.
    Unix(PathBuf),
    /// An address, which should be one of this node.
    Tcp(SocketAddr),
}

impl fmt::Display for ProviderAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(addr) => write!(f, "tcp://{addr}"),
        }
    }
}

/// Not the address of a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be unix:///ABSOLUTE/PATH or tcp://ADDRESS:PORT")]
pub struct ProviderAddrError;

impl FromStr for ProviderAddr {
    type Err = ProviderAddrError;

    /// As the SPIFFE Workload Endpoint specification writes it (section 4), and gRPC's `unix:/path`.
    fn from_str(s: &str) -> Result<Self, ProviderAddrError> {
        if let Some(path) = s.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            let is_path = path.starts_with('/') && path.len() > 1;
            return is_path.then(|| Self::Unix(path.into())).ok_or(ProviderAddrError);
        }
        let addr = s.strip_prefix("tcp://").and_then(|addr| addr.parse().ok());
        addr.map(Self::Tcp).ok_or(ProviderAddrError)
    }
}

/// What becomes of flows when the connection that they are on may carry no new ones, because a certificate has expired, its
/// root is gone, or the identity was withdrawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExpiry {
    /// They go on to their ends.
    #[default]
    Drain,
    /// They are reset.
    End,
}

/// A key exchange of TLS 1.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyExchange {
    /// X25519 with ML-KEM-768 (post-quantum). Its `ClientHello` takes two segments.
    X25519MlKem768,
    /// X25519.
    X25519,
    /// P-256.
    Secp256r1,
    /// P-384.
    Secp384r1,
}

section! {
    /// `[[identity.trust_domain]]`
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct TrustDomain {
        /// The trust domain. Its members are those whose SPIFFE IDs begin with spiffe://NAME/.
        name: required String,
        /// CA certificates of this trust domain, PEM. They vouch for its members only, and no others do.
        ca: required PathBuf,
        /// Names (SAN); a member must have one of them, besides what its listener or upstream verifies. Empty: any.
        verify: default Vec<SanPattern> = Vec::new(),
    }
    check |r| {
        if let Some(name) = &name && format!("spiffe://{name}/x").parse::<crate::model::san::SpiffeId>().is_err() {
            r.wrong("name", format!("\"{name}\" is no trust domain: 1 to 255 of a-z 0-9 . - _"));
        }
    }
}

/// An identity with its name, which only one of several needs.
pub(super) struct Named {
    name: Option<String>,
    settings: IdentitySettings,
}

/// Keys of each source.
const FILES: [&str; 4] = ["cert", "key", "ca", "insecure_key_permissions"];

impl Section for At<Named> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let name: Option<String> = r.optional(
            "name",
            "Name, for listeners, upstreams and captures; and of the secret, where it comes by SDS. Required where there are several.",
        );
        let cert: Option<PathBuf> = r.optional(
            "cert",
            "Certificate, PEM; the leaf first, intermediates after it. The files are read again when they change.",
        );
        let key: Option<PathBuf> = r.optional("key", "Private key of the certificate, PEM.");
        let ca: Option<PathBuf> = r.optional("ca", "CA certificates that peers are verified with, PEM.");
        let insecure_key_permissions = r.default(
            "insecure_key_permissions",
            "Whether the file of the private key may be readable by others: by every user, or by a group that is neither root's nor one of the daemon's. Without it such a key is refused.",
            false,
        );
        let workload_api: Option<WorkloadApiAddr> = r.optional(
            "workload_api",
            "Instead of files: the socket of the SPIFFE Workload API, such as \"unix:///run/spire/agent.sock\"; \"env\": the one that SPIFFE_ENDPOINT_SOCKET names.",
        );
        let spiffe_id: Option<String> = r.optional(
            "spiffe_id",
            "Which identity, where the Workload API has several for this process. Default: its first.",
        );
        let sds: Option<ProviderAddr> = r.optional(
            "sds",
            "Instead of files: a server of Envoy's secret discovery service (SDS), unix:///PATH or tcp://ADDRESS:PORT, in plaintext.",
        );
        let secret: Option<String> =
            r.optional("secret", "The secret with certificate and key, at the SDS server. Default: name.");
        let validation_context: Option<String> = r.optional(
            "validation_context",
            "The secret with the CA certificates, at the SDS server. Default: \"ROOTCA\", as SPIRE and Istio call it.",
        );
        let trust_domains: Vec<TrustDomain> = r.sections(
            "trust_domain",
            "Trust domains that have CA certificates of their own, beside those of ca or of the provider.",
        );
        let crls = r.default(
            "crls",
            "Files with certificate revocation lists, PEM or DER. A peer whose certificate is in one is rejected. Read again when they change.",
            Vec::<PathBuf>::new(),
        );
        let on_expiry = r.default(
            "on_expiry",
            "What happens to flows on a connection that takes no new ones, because a certificate has expired, its root was removed, or the identity was withdrawn: \"drain\", they finish; \"end\", they are reset.",
            OnExpiry::Drain,
        );
        let key_exchange = r.default(
            "key_exchange",
            "Key exchanges, in the order of preference. Default: [\"x25519mlkem768\", \"x25519\", \"secp256r1\", \"secp384r1\"]. [\"x25519\"] keeps the ClientHello within one segment, for networks that drop one of two.",
            Vec::<KeyExchange>::new(),
        );

        let sources: Vec<_> = ["cert", "workload_api", "sds"].into_iter().filter(|key| r.has(key)).collect();
        if let [one, other, ..] = sources[..] {
            r.wrong(other, format!("stands beside {one}: an identity comes from one of them"));
            return None;
        }
        let only = |keys: &[&str], owner: &str| {
            for key in keys.iter().filter(|key| r.has(key)) {
                r.wrong(key, format!("is for an identity with {owner}"));
            }
        };
        let source = match sources.first() {
            Some(&"workload_api") => {
                only(&FILES[1..], "cert");
                only(&["secret", "validation_context"], "sds");
                IdentitySource::WorkloadApi { endpoint: workload_api?.0, spiffe_id }
            }
            Some(&"sds") => {
                only(&FILES[1..], "cert");
                only(&["spiffe_id"], "workload_api");
                let secret = secret.or_else(|| name.clone());
                if secret.is_none() {
                    r.wrong("sds", "needs the name of the secret: secret, or name");
                }
                let validation_context = validation_context.unwrap_or_else(|| "ROOTCA".to_owned());
                IdentitySource::Sds { endpoint: sds?, secret: secret?, validation_context }
            }
            _ => {
                only(&["spiffe_id"], "workload_api");
                only(&["secret", "validation_context"], "sds");
                FILES[..3].iter().for_each(|key| r.demand(key));
                IdentitySource::Files(IdentityFiles {
                    cert: cert?,
                    key: key?,
                    ca: ca?,
                    insecure_key_permissions,
                })
            }
        };
        for (i, domain) in trust_domains.iter().enumerate() {
            if trust_domains.iter().take(i).any(|other| other.name == domain.name) {
                r.wrong("trust_domain", format!("\"{}\" is there twice", domain.name));
            }
        }
        let settings = IdentitySettings { source, trust_domains, crls, on_expiry, key_exchange };
        Some(r.at("name", Named { name, settings }))
    }
}

/// The address of a Workload API, which the environment may name.
pub(super) struct WorkloadApiAddr(pub(super) ProviderAddr);

/// Who names an identity, and by which tables.
const USERS: [&str; 3] = ["listener", "upstream", "capture"];

/// The identities of a file, by name.
pub(super) struct Identities(pub(super) BTreeMap<IdentityName, IdentitySettings>);

impl Identities {
    /// Checks their names, and those by which others name them.
    pub(super) fn new(r: &Reader<'_>, read: Vec<At<Named>>) -> Self {
        let (mut by_name, alone) = (BTreeMap::new(), read.len() == 1);
        for at in read {
            let name = match &at.value.name {
                Some(name) => IdentityName::from(name.as_str()),
                None if alone => IdentityName::default(),
                None => {
                    r.wrong_at(&at, "needs a name: there are several");
                    continue;
                }
            };
            if by_name.contains_key(&name) {
                r.wrong_at(&at, format!("another identity is named \"{name}\" already"));
                continue;
            }
            by_name.insert(name, at.value.settings);
        }
        let all = Self(by_name);
        let named = USERS.into_iter().flat_map(|user| r.texts_in(user, &["identity"]));
        for at in named.filter(|at| !r.has("identity") || !all.0.contains_key(at.value.as_str())) {
            let near = nearest(&at.value, all.0.keys().map(IdentityName::as_str));
            let hint = near.map(|n| format!(", did you mean \"{n}\"?")).unwrap_or_default();
            r.wrong_at(&at, format!("no identity is named \"{}\"{hint}", at.value));
        }
        all
    }

    /// What a name means: the one that is used where none is named is the only one, if there is no other.
    pub(super) fn resolve(&self, name: &IdentityName) -> IdentityName {
        match self.0.keys().next() {
            Some(only) if self.0.len() == 1 && *name == IdentityName::default() => only.clone(),
            _ => name.clone(),
        }
    }

    /// Whether somebody with TLS names none, where several are there and none is called so.
    pub(super) fn lacks(&self, name: &IdentityName) -> bool {
        !self.0.is_empty() && *name == IdentityName::default() && !self.0.contains_key(name)
    }
}
