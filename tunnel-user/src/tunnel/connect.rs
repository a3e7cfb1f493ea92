//! One connection to an endpoint of an upstream: TCP, and TLS with its checks.
//!
//! Enters: a key. Leaves: a connection whose far end has proved what the key wants. Invariant: it is tried
//! within the connect timeout, with our mark. It never speaks HTTP, and keeps nothing.

use std::{
    hash::{Hash, Hasher},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use rustls::{
    CipherSuite, ClientConfig,
    pki_types::{ServerName, UnixTime},
};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    config::Protocol,
    dial::{self, DialError},
    flow::{Identity, PeerAddr, Target},
    transport::{
        identity::peer_identity,
        tcp::Mark,
        verify::{check_expiry, explain},
    },
};

/// Everything that makes one connection different from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Where to.
    pub endpoint: Target,
    /// How TLS is spoken there; `None`: in plaintext.
    pub tls: Option<TlsKey>,
}

/// TLS, as far as it makes one connection different from another.
#[derive(Clone, Debug)]
pub struct TlsKey {
    /// With which identity and which checks. Compared as what it is, an object: after a reload of the
    /// certificates there is a new one, and connections made with the old take no new streams.
    pub config: Arc<ClientConfig>,
    /// What is sent as SNI, and checked.
    pub server_name: ServerName<'static>,
}

impl PartialEq for TlsKey {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.config, &other.config) && self.server_name == other.server_name
    }
}

impl Eq for TlsKey {}

impl Hash for TlsKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.config).hash(state);
        self.server_name.hash(state);
    }
}

/// How a connection is made.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// From the first SYN until the peer has answered: to TLS, and where HTTP/2 is spoken, on that.
    pub timeout: Duration,
    /// The mark of our own sockets.
    pub mark: Mark,
}

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// TCP did not connect.
    #[error("{0}")]
    Dial(Rc<DialError>),
    /// TLS failed: what failed, in a sentence.
    #[error("TLS with {endpoint} failed: {why}")]
    Tls {
        /// The peer.
        endpoint: Target,
        /// Which check failed, and on which side.
        why: String,
    },
    /// The peer does not speak HTTP as we do, or not to us.
    #[error("{} with {endpoint} failed: {why}", match protocol { Protocol::H2 => "HTTP/2", Protocol::H1 => "HTTP/1" })]
    Http {
        /// The version that we speak.
        protocol: Protocol,
        /// The peer.
        endpoint: Target,
        /// What it did.
        why: String,
    },
    /// No answer in time.
    #[error("{endpoint} did not complete the handshakes within {after:?}")]
    Timeout {
        /// The peer.
        endpoint: Target,
        /// The time allowed.
        after: Duration,
    },
    /// Too many flows wait for this peer.
    #[error("{most} flows are waiting for a connection to {endpoint} already")]
    Overflow {
        /// The peer.
        endpoint: Target,
        /// How many may.
        most: usize,
    },
    /// The upstream has as many connections as it may.
    #[error("the limit of {most} connections is reached")]
    Limit {
        /// How many.
        most: usize,
    },
    /// The pool is gone.
    #[error("shutting down")]
    Shutdown,
}

impl ConnectError {
    /// Whether nothing is known of the endpoint: the reason is on this side.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Overflow { .. } | Self::Limit { .. } | Self::Shutdown)
    }
}

/// A connection.
pub struct Connected {
    /// What is written to and read from.
    pub link: Link,
    /// The far end.
    pub peer: PeerAddr,
    /// Who it has proved to be; nobody without TLS.
    pub identity: Option<Identity>,
    /// What both sides agreed on, for the log.
    pub suite: Option<CipherSuite>,
}

/// With TLS or without.
pub enum Link {
    /// In plaintext.
    Plain(TcpStream),
    /// With TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Connects, and shakes hands on TLS; `then` is what else has to be done in the same time.
pub async fn connect<T>(
    key: &Key,
    protocol: Protocol,
    settings: &Settings,
    then: impl AsyncFnOnce(Connected) -> Result<T, ConnectError>,
) -> Result<T, ConnectError> {
    let allowed = settings.timeout;
    let deadline = Instant::now() + allowed;
    let connected = timeout_at(deadline, async {
        let dial = |e| ConnectError::Dial(Rc::new(e));
        let addrs = dial::resolve(&key.endpoint).await.map_err(dial)?;
        let (tcp, addr) =
            dial::connect(&key.endpoint, &addrs, settings.mark, deadline, allowed).await.map_err(dial)?;
        let peer = PeerAddr(addr);
        let connected = match &key.tls {
            None => Connected { link: Link::Plain(tcp), peer, identity: None, suite: None },
            Some(tls) => secure(&key.endpoint, tls, protocol, tcp, peer).await?,
        };
        then(connected).await
    });
    let late = |_| ConnectError::Timeout { endpoint: key.endpoint.clone(), after: allowed };
    connected.await.map_err(late)?
}

async fn secure(
    endpoint: &Target,
    TlsKey { config, server_name }: &TlsKey,
    protocol: Protocol,
    tcp: TcpStream,
    peer: PeerAddr,
) -> Result<Connected, ConnectError> {
    let failed = |why| ConnectError::Tls { endpoint: endpoint.clone(), why };
    let connecting = TlsConnector::from(Arc::clone(config)).connect(server_name.clone(), tcp);
    let tls = connecting.await.map_err(|e| failed(explain(&e)))?;
    let session = tls.get_ref().1;
    let agreed = match session.alpn_protocol() {
        Some(agreed) => agreed == protocol.alpn(),
        // Proxies are older than ALPN; HTTP/2 over TLS is not (RFC 9113 section 3.2).
        None => protocol == Protocol::H1,
    };
    if !agreed {
        let why = "the peer did not agree to speak it (ALPN)".to_owned();
        return Err(ConnectError::Http { protocol, endpoint: endpoint.clone(), why });
    }
    let certificates = session.peer_certificates().unwrap_or_default();
    // A resumed session brings its certificate along, and nobody has looked at the date since.
    check_expiry(certificates, UnixTime::now()).map_err(|e| failed(e.to_string()))?;
    let (identity, suite) =
        (peer_identity(certificates), session.negotiated_cipher_suite().map(|s| s.suite()));
    Ok(Connected { link: Link::Tls(Box::new(tls)), peer, identity, suite })
}
