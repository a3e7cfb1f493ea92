//! The handshake of a peer's connection: an optional PROXY header, TLS, and the start of HTTP.
//!
//! # Invariants
//! - All of it completes within the handshake timeout.
//! - With TLS no byte of HTTP is read before the peer's certificate was verified.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use http::HeaderValue;
use rustls::AlertDescription;
use rustls_pki_types::UnixTime;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use super::{h1, h2};
use crate::{
    config::{Congestion, Protocol},
    identity::{
        peer::peer_identity,
        standing::Standing,
        store::TlsStore,
        verify::{check_expiry, explain, explain_hinted},
    },
    model::{flow::ClientAddr, trust::ClientCheck},
    observe::stats::Check,
    sources::Peer,
    transport::{
        h1::ReadError,
        io::{Wire, peek_until},
        proxy,
        record::{self, Agreed, Pace, Stage, TlsStream},
    },
};

/// How long a peer that has ended its tunnel, or was refused, may take to close its side, or to take our answer.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// How much a refused peer may still send: the frames that clients open a connection with.
const MAX_DRAIN_BYTES: u64 = 64 * 1024;
/// What an HTTP/2 client sends first (RFC 9113 section 3.4). Nobody else does: the method is reserved for it.
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How one listener serves.
pub struct Settings {
    /// Whether a PROXY header stands in front of every connection, and is believed.
    pub proxy_protocol: bool,
    /// TLS, unless everybody may speak to it in plaintext.
    pub tls: Option<Tls>,
    /// What it speaks over TCP; of what a client offers, the first one of these is taken.
    pub protocols: Vec<Protocol>,
    /// From the accept until the first HTTP/2 frame, or the end of the request's head.
    pub handshake_timeout: Duration,
    /// Streams on one connection of HTTP/2 or HTTP/3.
    pub max_streams: u32,
    /// Between two PINGs on a connection.
    pub keepalive_interval: Duration,
    /// A PING unanswered for this long means that the connection is lost.
    pub keepalive_timeout: Duration,
    /// Who decides how fast is sent over QUIC.
    pub congestion: Congestion,
    /// A connection without a stream for this long is closed.
    pub idle_timeout: Duration,
    /// What answers over HTTP/2 offer beside it (RFC 7838 section 3).
    pub alt_svc: Option<HeaderValue>,
}

/// How a listener speaks TLS.
pub struct Tls {
    /// Our certificate, and whom we trust.
    pub store: Arc<TlsStore>,
    /// What clients' certificates must say.
    pub check: ClientCheck,
}

/// Why a connection was not served, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// What had to stand in front of it was not there.
    #[error("{0}")]
    Proxy(#[from] proxy::ReadError),
    /// TLS failed: which check, on which side.
    #[error("{0}")]
    Tls(String),
    /// HTTP/2 failed.
    #[error("HTTP/2: {0}")]
    H2(String),
    /// HTTP/3 failed, or QUIC.
    #[error("HTTP/3: {0}")]
    H3(String),
    /// There was no HTTP/1 request.
    #[error("HTTP/1: {0}")]
    H1(String),
    /// The peer has gone.
    #[error("{0}")]
    Gone(#[from] io::Error),
    /// The peer took too long.
    #[error("no complete handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// Too many others were in the middle of theirs.
    #[error("its handshake was not done when its place was needed for another")]
    Crowded,
    /// The peer sends more than goes with any work. Its connection was closed with ENHANCE_YOUR_CALM (RFC 9113 section 7).
    #[error("HTTP/2: flooded by the peer: {0}")]
    Flood(String),
    /// It has as many connections as it may.
    #[error("the limit of {0} connections of one peer is reached (daemon.limits.peer_connections)")]
    PeerConnections(usize),
    /// It makes us hold as much as it may, or others do.
    #[error("the memory for peers is in use (daemon.limits)")]
    Memory,
    /// The peer does not answer.
    #[error("no answer to PING within {0:?}")]
    KeepaliveTimeout(Duration),
}

impl ServeError {
    /// The check that the connection failed.
    pub const fn check(&self) -> Check {
        match self {
            Self::Proxy(_) => Check::ProxyProtocol,
            Self::Tls(_) => Check::Tls,
            Self::H2(_) | Self::H1(_) | Self::H3(_) => Check::Http,
            Self::Gone(_) => Check::Gone,
            Self::HandshakeTimeout(_) | Self::KeepaliveTimeout(_) => Check::Timeout,
            Self::Crowded => Check::Crowded,
            Self::Flood(_) => Check::Flood,
            Self::PeerConnections(_) => Check::PeerConnections,
            Self::Memory => Check::Memory,
        }
    }
}

/// A peer that has completed its handshake.
pub struct Accepted {
    /// Who it is.
    pub peer: Peer,
    /// What it speaks.
    pub link: Link,
}

/// What a peer speaks: HTTP/2 or HTTP/1, with TLS or in plaintext.
pub enum Link {
    /// HTTP/2.
    H2(Box<h2::Tunnel<TlsStream<TcpStream>>>),
    /// HTTP/2 in plaintext, with prior knowledge.
    H2Plain(Box<h2::Tunnel<TcpStream>>),
    /// HTTP/1.
    H1(Box<h1::Incoming<TlsStream<TcpStream>>>),
    /// HTTP/1 in plaintext.
    H1Plain(Box<h1::Incoming<TcpStream>>),
}

/// Shakes hands with a peer: TLS, where the listener speaks it, and the start of HTTP.
pub async fn handshake(
    settings: &Settings,
    stream: TcpStream,
    peer: SocketAddr,
    pace: &Pace,
) -> Result<Accepted, ServeError> {
    let deadline = Instant::now() + settings.handshake_timeout;
    let shaken = timeout_at(deadline, async {
        let mut stream = stream;
        let told = match settings.proxy_protocol {
            false => None,
            true => proxy::read(&mut stream).await?,
        };
        let client = told.unwrap_or(ClientAddr(peer));
        match &settings.tls {
            None => plain(settings, stream, client, pace).await,
            Some(tls) => secure(settings, tls, stream, client, pace).await,
        }
    });
    shaken.await.map_err(|_| ServeError::HandshakeTimeout(settings.handshake_timeout))?
}

async fn plain(
    settings: &Settings,
    stream: TcpStream,
    client: ClientAddr,
    pace: &Pace,
) -> Result<Accepted, ServeError> {
    let protocol = match &settings.protocols[..] {
        [only] => *only,
        _ => sniff(&stream).await?,
    };
    pace.reached(Stage::Spoken);
    let link = match protocol {
        Protocol::H2 => Link::H2Plain(Box::new(h2::handshake(settings, stream).await?)),
        // HTTP/3 is not spoken over TCP, and not among these.
        Protocol::H1 | Protocol::H3 => Link::H1Plain(Box::new(request(stream).await?)),
    };
    tracing::debug!(peer = %client, ?protocol, "accepted in plaintext");
    Ok(Accepted { peer: Peer { client, identity: None, server_name: None, standing: None }, link })
}

async fn secure(
    settings: &Settings,
    Tls { store, check }: &Tls,
    stream: TcpStream,
    client: ClientAddr,
    pace: &Pace,
) -> Result<Accepted, ServeError> {
    let ours = match store.current() {
        Ok(ours) => ours,
        Err(e) => return Err(ServeError::Tls(e.to_string())),
    };
    let config = ours.server_config(check, &settings.protocols);
    let (tls, agreed) = match record::accept_at(&config, stream, pace).await {
        Ok(shaken) => shaken,
        Err((e, stream)) => {
            drain_and_close(stream).await;
            return Err(ServeError::Tls(explain_hinted(&e, ours.hint().as_deref())));
        }
    };
    let Agreed { alpn, certificates, suite, server_name } = agreed;
    // A resumed session brings its certificate along, and nobody has looked at the date since.
    if let Err(why) = check_expiry(&certificates, UnixTime::now()) {
        tls.refuse(AlertDescription::CertificateExpired).await;
        return Err(ServeError::Tls(why.to_string()));
    }
    let tls = tls.hinted(ours.hint());
    let identity = peer_identity(&certificates);
    let standing = Standing::of_client(Arc::clone(store), ours, certificates, check);
    let protocol = match &alpn {
        Some(agreed) => settings.protocols.iter().find(|p| p.alpn() == agreed),
        // Clients of proxies are older than ALPN; HTTP/2 over TLS is not (RFC 9113 section 3.2).
        None => settings.protocols.iter().find(|p| **p == Protocol::H1),
    };
    let Some(&protocol) = protocol else {
        return Err(ServeError::Tls("the peer did not offer h2 (ALPN)".to_owned()));
    };
    let link = match protocol {
        Protocol::H2 => Link::H2(Box::new(h2::handshake(settings, tls).await?)),
        Protocol::H1 | Protocol::H3 => Link::H1(Box::new(request(tls).await?)),
    };
    tracing::debug!(
        peer = %client,
        identity = identity.as_ref().map(tracing::field::display),
        ?suite,
        ?protocol,
        "tunnel accepted"
    );
    Ok(Accepted { peer: Peer { client, identity, server_name, standing: Some(Rc::new(standing)) }, link })
}

/// Which protocol a client speaks in plaintext, by its first bytes, which stay where they are.
async fn sniff(stream: &TcpStream) -> io::Result<Protocol> {
    let mut start = [0; PREFACE.len()];
    let judge = |seen: &[u8]| match seen.len() {
        n if seen != &PREFACE[..n] => Some(Protocol::H1),
        n if n == PREFACE.len() => Some(Protocol::H2),
        _ => None,
    };
    peek_until(stream, &mut start, judge).await
}

async fn request<W: Wire>(wire: W) -> Result<h1::Incoming<W>, ServeError> {
    h1::read(wire).await.map_err(|e| match e {
        ReadError::Io(e) => ServeError::H1(explain(&e)),
        other => ServeError::H1(other.to_string()),
    })
}

/// Closes the connection of a peer that was refused so that it hears why. A client of TLS 1.3 may have sent
/// its first request already; bytes that nobody has read turn a close into a reset, which takes the alert, or
/// the answer, out of the peer's hands.
pub(super) async fn drain_and_close(mut wire: impl Wire) {
    let heard = async {
        // Fails only on a socket that is gone.
        let _gone = wire.shutdown().await;
        let mut rest = wire.take(MAX_DRAIN_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    let _late = timeout(LINGER, heard).await;
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt as _, net::TcpListener};

    use super::*;

    async fn sniffed(first: &[u8]) -> io::Result<Protocol> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.set_nodelay(true).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let dripped = async {
            for byte in first {
                client.write_all(&[*byte]).await.unwrap();
                // A segment each: the other side looks in between.
                tokio::task::yield_now().await;
            }
            client.shutdown().await.unwrap();
        };
        let (protocol, ()) = tokio::join!(sniff(&stream), dripped);
        let mut left = vec![0; first.len()];
        let mut stream = stream;
        stream.read_exact(&mut left).await.unwrap();
        assert_eq!(left, first, "it stays where it is");
        protocol
    }

    #[tokio::test]
    async fn the_first_bytes_tell_http_2_however_they_come() {
        assert_eq!(sniffed(&PREFACE).await.unwrap(), Protocol::H2);
        for other in ["CONNECT a:1 HTTP/1.1\r\n\r\n", "PRI * HTTP/1.1\r\n\r\n", "P\r\n", "x"] {
            assert_eq!(sniffed(other.as_bytes()).await.unwrap(), Protocol::H1, "{other:?}");
        }
        // The end comes while more is wanted.
        let cut = timeout(LINGER * 10, sniffed(&PREFACE[..9])).await.unwrap();
        assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(sniffed(b"").await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
