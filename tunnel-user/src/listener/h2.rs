//! CONNECT over HTTP/2 over mutual TLS.
//!
//! Enters: an accepted TCP connection. Leaves: one call of `handle` per stream. Invariant: every
//! handshake, header list, window and number of streams is bounded (the constants say by what); a peer
//! that goes beyond ends its own connection. It never answers a request itself.

use std::{future::Future, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::Request;
use rustls_pki_types::UnixTime;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    drain::{Tasks, Watch},
    flow::{ClientAddr, Identity, PeerAddr},
    transport::{
        identity::peer_identity,
        io::LastReader,
        store::TlsStore,
        tcp,
        verify::{ClientCheck, check_expiry, explain},
    },
    tunnel::pool::{FRAME, HEADERS, SEND_BUFFER, STREAM_WINDOW, connection_window},
};

/// Streams that the peer reset before we looked at them; more end the connection (CVE-2023-44487).
const PENDING_RESETS_MAX: usize = 20;
/// Streams of our own whose reset the peer may not have seen yet.
const RESET_STREAMS_MAX: usize = 50;
/// Errors that the peer may make us answer with a reset.
const LOCAL_ERRORS_MAX: usize = 256;

/// How long a peer that has ended its tunnel, or was refused, may take to close its side.
const LINGER: Duration = Duration::from_secs(1);
/// How much a refused peer may still send: the frames that clients open a connection with.
const LAST_WORDS: u64 = 64 * 1024;

/// How one listener serves.
pub struct Settings {
    /// Our certificate, and whom we trust.
    pub tls: Arc<TlsStore>,
    /// What clients' certificates must say.
    pub check: ClientCheck,
    /// From the accept until the first HTTP/2 frame.
    pub handshake_timeout: Duration,
    /// Streams on one connection.
    pub max_streams: u32,
    /// Between two PINGs on a connection.
    pub keepalive_interval: Duration,
    /// A PING unanswered for this long means that the connection is lost.
    pub keepalive_timeout: Duration,
}

/// Why a connection was not served, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// TLS failed: which check, on which side.
    #[error("{0}")]
    Tls(String),
    /// HTTP/2 failed.
    #[error("HTTP/2: {0}")]
    H2(String),
    /// The peer took too long.
    #[error("no complete handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// Too many others were in the middle of theirs.
    #[error("its handshake was not done when its place was needed for another")]
    Crowded,
    /// The peer does not answer.
    #[error("no answer to PING within {0:?}")]
    KeepaliveTimeout(Duration),
}

/// One request.
pub struct Incoming {
    /// Its head, and the bytes that follow.
    pub request: Request<RecvStream>,
    /// Where the answer goes.
    pub respond: SendResponse<Bytes>,
    /// The peer's address.
    pub client: ClientAddr,
    /// Who the peer has proved to be.
    pub identity: Option<Identity>,
}

/// A connection whose peer has been let in.
pub struct Tunnel {
    connection: h2::server::Connection<TlsStream<TcpStream>, Bytes>,
    last: LastReader,
    client: ClientAddr,
    identity: Option<Identity>,
    server_name: Option<Box<str>>,
}

impl Tunnel {
    /// Who the peer has proved to be.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// The name by which the peer asked for us (SNI, RFC 6066 section 3).
    pub fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }
}

/// Shakes hands with a peer, on TLS and HTTP/2.
pub async fn handshake(
    settings: &Settings,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<Tunnel, ServeError> {
    let deadline = Instant::now() + settings.handshake_timeout;
    let slow = |_| ServeError::HandshakeTimeout(settings.handshake_timeout);
    // Fails only on a socket that is gone, which the handshake will find.
    let _gone = tcp::tune(&stream);
    let last = LastReader::new(&stream).map_err(|e| ServeError::Tls(e.to_string()))?;
    let acceptor = TlsAcceptor::from(settings.tls.server_config(&settings.check));
    let accepted = timeout_at(deadline, acceptor.accept(stream).into_fallible()).await.map_err(slow)?;
    let tls = match accepted {
        Ok(tls) => tls,
        Err((e, stream)) => {
            hear_out(stream).await;
            return Err(ServeError::Tls(explain(&e)));
        }
    };
    let session = tls.get_ref().1;
    let certificates = session.peer_certificates().unwrap_or_default();
    // A resumed session brings its certificate along, and nobody has looked at the date since.
    check_expiry(certificates, UnixTime::now()).map_err(|e| ServeError::Tls(e.to_string()))?;
    let identity = peer_identity(certificates);
    let server_name = session.server_name().map(Box::from);
    let suite = session.negotiated_cipher_suite().map(|s| s.suite());
    if session.alpn_protocol() != Some(b"h2") {
        return Err(ServeError::Tls("the peer did not offer h2 (ALPN)".to_owned()));
    }
    let connection = timeout_at(
        deadline,
        h2::server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(connection_window(settings.max_streams))
            .max_frame_size(FRAME)
            .max_header_list_size(HEADERS)
            .max_concurrent_streams(settings.max_streams)
            .max_concurrent_reset_streams(RESET_STREAMS_MAX)
            .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
            .max_local_error_reset_streams(Some(LOCAL_ERRORS_MAX))
            .max_send_buffer_size(SEND_BUFFER)
            .handshake::<_, Bytes>(tls),
    )
    .await
    .map_err(slow)?
    .map_err(|e| ServeError::H2(explain(&e)))?;
    tracing::debug!(
        peer = %PeerAddr(peer),
        identity = identity.as_ref().map(tracing::field::display),
        ?suite,
        "tunnel accepted"
    );
    Ok(Tunnel { connection, last, client: ClientAddr(peer), identity, server_name })
}

/// Closes the connection of a peer that was refused so that it hears why. A client of TLS 1.3 may have sent
/// its first request already; bytes that nobody has read turn a close into a reset, which takes the alert out
/// of the peer's hands.
async fn hear_out(mut stream: TcpStream) {
    // Fails only on a socket that is gone.
    let _gone = stream.shutdown().await;
    let mut rest = stream.take(LAST_WORDS);
    let _late = timeout(LINGER, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

/// Serves a connection to its end. `handle` makes the task of each stream; they end with the connection.
pub async fn serve<F: Future<Output = ()> + 'static>(
    settings: &Settings,
    tunnel: Tunnel,
    mut drain: Watch,
    handle: impl Fn(Incoming) -> F,
) -> Result<(), ServeError> {
    let Tunnel { mut connection, last, client, identity, server_name: _ } = tunnel;
    let h2_error = |e: h2::Error| ServeError::H2(explain(&e));
    let mut ping = connection.ping_pong();
    let mut ping_at = Instant::now() + settings.keepalive_interval;
    let mut awaiting_pong = false;
    // Owned here: when the connection goes, so do its streams.
    let streams = Rc::new(Tasks::default());
    let mut draining = false;
    loop {
        tokio::select! {
            biased;
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    streams.spawn(handle(Incoming {
                        request,
                        respond,
                        client,
                        identity: identity.clone(),
                    }));
                }
                Some(Err(e)) => return Err(h2_error(e)),
                None => break,
            },
            pong = pong(ping.as_mut()), if awaiting_pong => {
                pong.map_err(h2_error)?;
                awaiting_pong = false;
                ping_at = Instant::now() + settings.keepalive_interval;
            }
            () = sleep_until(ping_at) => {
                if awaiting_pong {
                    return Err(ServeError::KeepaliveTimeout(settings.keepalive_timeout));
                }
                if let Some(ping) = &mut ping {
                    ping.send_ping(h2::Ping::opaque()).map_err(h2_error)?;
                    awaiting_pong = true;
                    ping_at = Instant::now() + settings.keepalive_timeout;
                }
            }
            () = drain.draining(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
        }
    }
    // Streams that are finishing have their last frames on the wire already; what they still do is
    // write to their targets.
    let _rest = timeout(settings.keepalive_timeout, streams.ended()).await;
    drop(connection);
    last.linger(LINGER).await;
    Ok(())
}

async fn pong(ping: Option<&mut h2::PingPong>) -> Result<(), h2::Error> {
    match ping {
        Some(ping) => std::future::poll_fn(|cx| ping.poll_pong(cx)).await.map(drop),
        None => std::future::pending().await,
    }
}
