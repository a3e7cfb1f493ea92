//! One connection to an endpoint of an upstream: TCP, or a stream through another upstream, and TLS with its
//! checks.
//!
//! Enters: a key. Leaves: a connection whose far end has proved what the key wants. Invariant: it is tried
//! within the connect timeout, which covers every upstream on the way, as sockets of our own. It never speaks HTTP, and
//! keeps nothing.

use std::{
    hash::{Hash, Hasher},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use rustls::{
    AlertDescription, CipherSuite, ClientConfig,
    pki_types::{ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout_at},
};

use super::{
    TunnelError,
    nested::{Outer, Via},
};
use crate::{
    config::Protocol,
    identity::{
        peer::peer_identity,
        verify::{check_expiry, explain_hinted},
    },
    model::flow::{FarEnd, Identity, PeerAddr, Target},
    sinks::dial::{self, DialError},
    transport::{
        record::{self, Agreed, TlsStream},
        tcp::{FirstSpeaker, Own},
    },
};

/// Everything that makes one connection different from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Where to.
    pub endpoint: Target,
    /// How TLS is spoken there; `None`: in plaintext.
    pub tls: Option<TlsKey>,
    /// Through which other upstream; `None`: over a socket of ours.
    pub via: Option<Via>,
}

/// TLS, as far as it makes one connection different from another.
#[derive(Clone, Debug)]
pub struct TlsKey {
    /// With which identity and which checks. Compared as what it is, an object: after a reload of the
    /// certificates there is a new one, and connections made with the old take no new streams.
    pub config: Arc<ClientConfig>,
    /// What is sent as SNI, and checked.
    pub server_name: ServerName<'static>,
    /// Why the peer may refuse our certificate without being able to say so; of the same identity as `config`.
    pub hint: Option<Arc<str>>,
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
#[derive(Clone, Debug)]
pub struct Settings {
    /// From the first SYN until the peer has answered: to TLS, and where HTTP/2 is spoken, on that.
    pub timeout: Duration,
    /// What our own sockets are told by.
    pub own: Own,
}

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// TCP did not connect.
    #[error("{0}")]
    Dial(Rc<DialError>),
    /// The upstream that it goes through has no stream to it: whose fault that was, it says itself.
    #[error("{0}")]
    Outer(Rc<TunnelError>),
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
    /// No place for a stream became free.
    #[error("{}", if *barred { format!("{endpoint} allows no streams (SETTINGS_MAX_CONCURRENT_STREAMS is 0)") } else { format!("no stream to {endpoint} became free within {after:?}") })]
    Waited {
        /// The peer.
        endpoint: Target,
        /// How long that was waited for.
        after: Duration,
        /// The peer allows none on a connection that is up.
        barred: bool,
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
    /// Whether nothing is known of the endpoint: the reason is on this side, or on the way there.
    pub fn is_ours(&self) -> bool {
        match self {
            Self::Overflow { .. } | Self::Limit { .. } | Self::Shutdown => true,
            Self::Waited { barred, .. } => !barred,
            Self::Outer(why) => matches!(
                **why,
                TunnelError::Connect { .. }
                    | TunnelError::NoEndpoint { .. }
                    | TunnelError::Empty { .. }
                    | TunnelError::Limit { .. }
            ),
            Self::Dial(_) | Self::Tls { .. } | Self::Http { .. } | Self::Timeout { .. } => false,
        }
    }
}

/// A connection.
pub struct Connected {
    /// What is written to and read from.
    pub link: Link,
    /// The far end.
    pub peer: FarEnd,
    /// Who it has proved to be; nobody without TLS.
    pub identity: Option<Identity>,
    /// What both sides agreed on, for the log.
    pub suite: Option<CipherSuite>,
}

/// With TLS or without, over a socket or through another upstream.
pub enum Link {
    /// In plaintext.
    Plain(TcpStream),
    /// With TLS.
    Tls(Box<TlsStream<TcpStream>>),
    /// In plaintext, through another upstream.
    Nested(Outer),
    /// With TLS, through another upstream.
    NestedTls(Box<TlsStream<Outer>>),
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
        let connected = match &key.via {
            None => over_socket(key, protocol, settings, deadline).await?,
            // Boxed, because it comes here again for that upstream's own connection.
            Some(via) => Box::pin(through(key, protocol, via)).await?,
        };
        then(connected).await
    });
    let late = |_| ConnectError::Timeout { endpoint: key.endpoint.clone(), after: allowed };
    connected.await.map_err(late)?
}

async fn over_socket(
    key: &Key,
    protocol: Protocol,
    settings: &Settings,
    deadline: Instant,
) -> Result<Connected, ConnectError> {
    let dial = |e| ConnectError::Dial(Rc::new(e));
    let addrs = dial::resolve(&key.endpoint, &settings.own).await.map_err(dial)?;
    // A ClientHello, a preface, or a request.
    let (tcp, addr) =
        dial::connect(&key.endpoint, &addrs, &settings.own, FirstSpeaker::Local, deadline, settings.timeout)
            .await
            .map_err(dial)?;
    // What has become of it since, the handshake finds out; an alert may be there to be read.
    let tcp = tcp.stream;
    let peer = FarEnd::Socket(PeerAddr(addr));
    let Some(tls) = &key.tls else {
        return Ok(Connected { link: Link::Plain(tcp), peer, identity: None, suite: None });
    };
    let Secured { stream, identity, suite } = secure(&key.endpoint, tls, protocol, tcp).await?;
    Ok(Connected { link: Link::Tls(Box::new(stream)), peer, identity, suite })
}

/// The far end of that upstream resolves the endpoint, if it is a name.
async fn through(key: &Key, protocol: Protocol, via: &Via) -> Result<Connected, ConnectError> {
    let outer = via.open(&key.endpoint).await.map_err(|e| ConnectError::Outer(Rc::new(e)))?;
    let peer = FarEnd::Through(key.endpoint.clone());
    let Some(tls) = &key.tls else {
        return Ok(Connected { link: Link::Nested(outer), peer, identity: None, suite: None });
    };
    let Secured { stream, identity, suite } = secure(&key.endpoint, tls, protocol, outer).await?;
    Ok(Connected { link: Link::NestedTls(Box::new(stream)), peer, identity, suite })
}

/// A connection whose far end has passed the checks.
struct Secured<S> {
    stream: TlsStream<S>,
    identity: Option<Identity>,
    suite: Option<CipherSuite>,
}

async fn secure<S: AsyncRead + AsyncWrite + Unpin>(
    endpoint: &Target,
    TlsKey { config, server_name, hint }: &TlsKey,
    protocol: Protocol,
    below: S,
) -> Result<Secured<S>, ConnectError> {
    let failed = |why| ConnectError::Tls { endpoint: endpoint.clone(), why };
    let connecting = record::connect(Arc::clone(config), server_name.clone(), below);
    let (stream, agreed) = connecting.await.map_err(|e| failed(explain_hinted(&e, hint.as_deref())))?;
    let stream = stream.hinted(hint.clone());
    let Agreed { alpn, certificates, suite, .. } = agreed;
    let agreed = match &alpn {
        Some(agreed) => agreed == protocol.alpn(),
        // Proxies are older than ALPN; HTTP/2 over TLS is not (RFC 9113 section 3.2).
        None => protocol == Protocol::H1,
    };
    if !agreed {
        let why = "the peer did not agree to speak it (ALPN)".to_owned();
        return Err(ConnectError::Http { protocol, endpoint: endpoint.clone(), why });
    }
    // A resumed session brings its certificate along, and nobody has looked at the date since.
    if let Err(why) = check_expiry(&certificates, UnixTime::now()) {
        stream.refuse(AlertDescription::CertificateExpired).await;
        return Err(failed(why.to_string()));
    }
    Ok(Secured { stream, identity: peer_identity(&certificates), suite })
}
