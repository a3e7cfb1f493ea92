//! One connection to an endpoint of an upstream: TCP, or a stream through another upstream, TLS with its checks, and what is
//! spoken on that. All of it happens within the connect timeout, which covers every upstream on the way.

use std::{
    cell::Cell,
    fmt,
    future::pending,
    hash::{Hash, Hasher},
    rc::Rc,
    sync::Arc,
};

use rustls::{
    AlertDescription,
    pki_types::{ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout_at},
};

use super::{ConnectError, settings::ConnectSettings, stream::StreamLeg, underlay::Via};
use crate::{
    config::Protocol,
    identity::{
        peer::peer_identity,
        standing::{Lapse, Standing},
        store::TlsStore,
        tls::{ClientSide, TlsIdentity},
        verify::{check_expiry, explain_hinted},
    },
    model::{
        flow::{FarEnd, Identity, PeerAddr, Target},
        trust::ServerCheck,
    },
    relay::{IntoLeg, TlsLeg},
    transport::{
        record::{self, Agreed, TlsStream},
        tcp::FirstSpeaker,
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
#[derive(Clone)]
pub struct TlsKey {
    /// With which identity and which checks. Compared as what it is, an object: after a reload of the
    /// certificates there is a new one, and connections made with the old take no new streams.
    pub side: ClientSide,
    /// What is sent as SNI, and checked.
    pub server_name: ServerName<'static>,
    /// What its certificate must say, as `side` checks it.
    pub check: ServerCheck,
    /// Where the identity is from,
    pub store: Arc<TlsStore>,
    /// and what it was when `side` was made.
    pub ours: Arc<TlsIdentity>,
}

impl fmt::Debug for TlsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsKey").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl PartialEq for TlsKey {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.side.config, &other.side.config) && self.server_name == other.server_name
    }
}

impl Eq for TlsKey {}

impl Hash for TlsKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.side.config).hash(state);
        self.server_name.hash(state);
    }
}

/// The far end of a connection.
#[derive(Clone, Debug)]
pub struct Far {
    /// Where it is.
    pub peer: FarEnd,
    /// Who it has proved to be; nobody without TLS.
    pub identity: Option<Identity>,
    /// What that rests on.
    pub standing: Option<Rc<Standing>>,
    /// When TCP was connected, or the stream that it goes through was open.
    pub connected: std::time::Instant,
}

impl Far {
    /// Ready when no new streams are to be opened, because a certificate of either side is not what new connections are made
    /// with, or is not valid any more.
    pub(super) async fn retired(&self) {
        let Some(standing) = &self.standing else { return pending().await };
        if let Some(lapse) = standing.superseded().await {
            tracing::info!(peer = %self.peer, reason = %lapse, "draining connection to upstream");
        }
    }
}

/// What is spoken on a connection: made of a byte stream, of whatever kind, whose far end has passed the checks.
pub(super) trait Handshake {
    /// What it makes.
    type Connection;

    /// Shakes hands, in the time that is left.
    async fn shake<W: IntoLeg>(self, wire: W, far: Far) -> Result<Self::Connection, ConnectError>
    where
        StreamLeg: From<W::Leg>;
}

/// Connects, shakes hands on TLS where the key says so, and then on what is to be spoken.
pub(super) async fn connect<H: Handshake>(
    key: &Key,
    protocol: Protocol,
    settings: &ConnectSettings,
    handshake: H,
) -> Result<H::Connection, ConnectError> {
    let allowed = settings.timeout;
    let deadline = Instant::now() + allowed;
    // A ClientHello that takes two segments is on its way, and nothing has come back.
    let long_hello = Cell::new(false);
    let connected = timeout_at(deadline, async {
        match &key.via {
            None => {
                let (tcp, peer) = dial(key, settings, deadline).await?;
                over(tcp, FarEnd::Socket(peer), key, protocol, (handshake, &long_hello)).await
            }
            // Boxed by the underlay: it comes here again for its own connection.
            Some(via) => {
                let outer = via.open(&key.endpoint).await.map_err(|e| ConnectError::Outer(Rc::new(e)))?;
                over(outer, FarEnd::Through(key.endpoint.clone()), key, protocol, (handshake, &long_hello))
                    .await
            }
        }
    });
    let connected = connected.await;
    connected.map_err(|_| ConnectError::Timeout {
        endpoint: key.endpoint.clone(),
        after: allowed,
        long_hello: long_hello.get(),
    })?
}

async fn dial(
    key: &Key,
    settings: &ConnectSettings,
    deadline: Instant,
) -> Result<(TcpStream, PeerAddr), ConnectError> {
    let failed = |e| ConnectError::Dial(Rc::new(e));
    let addrs = settings.dialer.resolve(&key.endpoint).await.map_err(failed)?;
    // A ClientHello, a preface, or a request.
    let first = FirstSpeaker::Local;
    let dialled = settings.dialer.connect(&key.endpoint, &addrs, first, deadline, settings.timeout);
    // What has become of it since, the handshake finds out; an alert may be there to be read.
    let (tcp, addr) = dialled.await.map_err(failed)?;
    Ok((tcp.stream, PeerAddr(addr)))
}

async fn over<W: IntoLeg, H: Handshake>(
    wire: W,
    peer: FarEnd,
    key: &Key,
    protocol: Protocol,
    (handshake, long_hello): (H, &Cell<bool>),
) -> Result<H::Connection, ConnectError>
where
    StreamLeg: From<W::Leg> + From<TlsLeg<W::Leg>>,
{
    let connected = std::time::Instant::now();
    let Some(tls) = &key.tls else {
        return handshake.shake(wire, Far { peer, identity: None, standing: None, connected }).await;
    };
    // What the network drops of this hello it would drop of the next, where that resumes a session too.
    let mut forget = ForgetSessions::new(tls);
    long_hello.set(tls.side.has_long_hello());
    let secured = secure(&key.endpoint, tls, protocol, wire).await;
    long_hello.set(false);
    let (stream, identity, standing) = secured?;
    let standing = Some(Rc::new(standing));
    let made = handshake.shake(stream, Far { peer, identity, standing, connected }).await?;
    forget.succeeded();
    Ok(made)
}

/// After a handshake that failed, or was given up, the next one is a full one.
pub(super) struct ForgetSessions<'a>(Option<&'a TlsKey>);

impl<'a> ForgetSessions<'a> {
    pub(super) fn new(tls: &'a TlsKey) -> Self {
        Self(Some(tls))
    }

    /// The handshake was done.
    pub(super) fn succeeded(&mut self) {
        self.0 = None;
    }
}

impl Drop for ForgetSessions<'_> {
    fn drop(&mut self) {
        if let Some(tls) = self.0 {
            tls.side.forget_sessions(&tls.server_name);
        }
    }
}

/// TLS, and who the far end has proved to be.
async fn secure<S: AsyncRead + AsyncWrite + Unpin>(
    endpoint: &Target,
    TlsKey { side, server_name, check, store, ours }: &TlsKey,
    protocol: Protocol,
    below: S,
) -> Result<(TlsStream<S>, Option<Identity>, Standing), ConnectError> {
    let failed = |why| ConnectError::Tls { endpoint: endpoint.clone(), why };
    let hint = ours.hint();
    let connecting = record::connect(Arc::clone(&side.config), server_name.clone(), below);
    let (stream, agreed) = connecting.await.map_err(|e| failed(explain_hinted(&e, hint.as_deref())))?;
    let stream = stream.hinted(hint);
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
    tracing::debug!(%endpoint, ?suite, "TLS handshake completed");
    let identity = peer_identity(&certificates);
    let (store, ours) = (Arc::clone(store), Arc::clone(ours));
    let standing = Standing::of_server(store, ours, certificates, server_name.clone(), check);
    still_stands(&standing, endpoint)?;
    Ok((stream, identity, standing))
}

/// A dial takes time, in which our identity may be withdrawn, or other roots come.
pub(super) fn still_stands(standing: &Standing, endpoint: &Target) -> Result<(), ConnectError> {
    match standing.lapse() {
        Some(lapse @ Lapse::Withdrawn) => Err(ConnectError::Identity(lapse.to_string())),
        Some(Lapse::Untrusted(why)) => Err(ConnectError::Tls { endpoint: endpoint.clone(), why }),
        // An expired one of ours is for its peers to judge.
        Some(Lapse::Expired(_)) | None => Ok(()),
    }
}
