//! QUIC (RFC 9000) under HTTP/3: endpoints with our sockets, windows and timers, and what every connection on them says first.
//!
//! # Invariants
//! - No request is sent or read in 0-RTT: it could be somebody else's, sent again.
//! - What a peer may send that nobody has taken is bounded: [`WINDOW`] on each stream, and on all together what its account
//!   has for it.

mod control;
mod flood;
mod group;
mod socket;
mod window;

use std::{sync::Arc, time::Duration};

use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, ServerConfig,
    TokioRuntime, TransportConfig, VarInt,
    congestion::{BbrConfig, CubicConfig},
    crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
};
use rustls_pki_types::CertificateDer;
use socket2::Socket;

use self::socket::PlaceIds;
pub use self::{
    control::{Control, Ended, Heard, Role, close, watch},
    flood::FloodDetector,
    group::{Group, Parts, PlacedSocket, Places},
    socket::{BUFFER, ID_LEN, ID_TAG, client_socket},
    window::ReceiveWindow,
};
use super::http3::Code;
use crate::config::Congestion;

/// What a peer may send on one stream before it is read, as over HTTP/2 at first: quinn has the same for all streams, and does
/// not change it.
pub const WINDOW: u32 = super::window::WINDOW_START;
/// What one stream may have sent that its peer has not acknowledged, or waits to be sent.
pub const SEND_MAX: usize = 1 << 20;
/// Streams of one direction that a peer may have open at once: HTTP/3 has three (RFC 9114 section 6.2), and kinds that are
/// there to be ignored.
pub const ONE_WAY_STREAMS: u32 = 8;

/// New connections that wait to be looked at, which takes a turn each; beyond that they are refused.
const INCOMING_MAX: usize = 256;
/// What each may have sent by then: a ClientHello of several packets.
const INCOMING_BYTES: u64 = 16 * 1024;

/// How connections are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Requests that the peer may have open at once; a server opens none.
    pub peer_streams: u32,
    /// Streams that there may be at once, whoever opens them.
    pub streams: u32,
    /// With the next one, how long a peer may be silent before the connection is lost.
    pub keepalive_interval: Duration,
    /// See above.
    pub keepalive_timeout: Duration,
    /// Who decides how fast is sent.
    pub congestion: Congestion,
}

fn transport(tuning: &Tuning) -> Arc<TransportConfig> {
    let Tuning { peer_streams, streams, keepalive_interval, keepalive_timeout, congestion } = *tuning;
    let mut config = TransportConfig::default();
    // A server gives more as streams come: [`ReceiveWindow`].
    let all = u64::from(WINDOW) * if peer_streams == 0 { u64::from(streams) } else { 1 };
    // As over HTTP/2 a peer is lost when it has been silent for both. The idle timer starts anew with the first packet that asks
    // it whether it is there (RFC 9000 section 10.1), and has to be longer than what that packet waits.
    let silent = keepalive_interval + keepalive_timeout;
    let (ask, idle) = (silent * 9 / 20, silent * 11 / 20);
    config
        .max_concurrent_bidi_streams(peer_streams.into())
        .max_concurrent_uni_streams(ONE_WAY_STREAMS.into())
        .stream_receive_window(WINDOW.into())
        .receive_window(VarInt::from_u64(all).unwrap_or(VarInt::MAX))
        .send_window(SEND_MAX as u64 * u64::from(streams))
        .keep_alive_interval(Some(ask))
        // Longer than a QUIC integer has milliseconds: never.
        .max_idle_timeout(IdleTimeout::try_from(idle).ok())
        .datagram_receive_buffer_size(None);
    match congestion {
        Congestion::Cubic => config.congestion_controller_factory(Arc::new(CubicConfig::default())),
        Congestion::Bbr => config.congestion_controller_factory(Arc::new(BbrConfig::default())),
    };
    Arc::new(config)
}

/// An endpoint that takes connections on a socket of a [`Group`], in the runtime of the worker that it is for.
pub fn server(socket: PlacedSocket, config: ServerConfig) -> std::io::Result<Endpoint> {
    let (mut endpoint, place) = (EndpointConfig::default(), socket.place());
    PlaceIds::new(place)?;
    endpoint.cid_generator(move || Box::new(PlaceIds::new(place).expect("it was one")));
    Endpoint::new_with_abstract_socket(endpoint, Some(config), socket.placed()?, Arc::new(TokioRuntime))
}

/// An endpoint that makes connections, in the runtime of a worker.
pub fn client(socket: Socket) -> std::io::Result<Endpoint> {
    Endpoint::new(EndpointConfig::default(), None, socket.into(), Arc::new(TokioRuntime))
}

/// How connections are accepted. The error is a sentence.
pub fn server_config(tls: Arc<rustls::ServerConfig>, tuning: &Tuning) -> Result<ServerConfig, String> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|e| e.to_string())?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(transport(tuning))
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES * INCOMING_MAX as u64);
    Ok(config)
}

/// How connections are made. The error is a sentence.
pub fn client_config(tls: Arc<rustls::ClientConfig>, tuning: &Tuning) -> Result<ClientConfig, String> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|e| e.to_string())?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(tuning));
    Ok(config)
}

/// What a handshake has agreed on.
#[derive(Debug, Default)]
pub struct Agreed {
    /// The peer's chain, the leaf first.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The name that a client asked for (SNI).
    pub server_name: Option<Box<str>>,
}

/// Of a connection whose handshake is complete.
pub fn agreed(connection: &Connection) -> Agreed {
    let certificates = connection.peer_identity().and_then(|any| any.downcast().ok());
    let data = connection.handshake_data().and_then(|any| any.downcast::<HandshakeData>().ok());
    Agreed {
        certificates: certificates.map(|chain| *chain).unwrap_or_default(),
        server_name: data.and_then(|data| data.server_name).map(String::into_boxed_str),
    }
}

/// Closes a connection on which everything has ended, and has that on the wire.
pub async fn close_clean(connection: &Connection) {
    connection.close(wire_code(Code::NO_ERROR), &[]);
    // The connection's own task sends it, which has its turn before this one has another.
    tokio::task::yield_now().await;
}

/// Why a connection was lost, in words; of TLS only what QUIC says.
pub fn why_lost(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(closed) => {
            let code = Code(closed.error_code.into_inner());
            let reason = String::from_utf8_lossy(&closed.reason);
            if reason.is_empty() {
                format!("the peer closed it: {code}")
            } else {
                format!("the peer closed it: {code} ({reason})")
            }
        }
        ConnectionError::TimedOut => "the peer does not answer".to_owned(),
        ConnectionError::Reset => "the peer knows the connection no more".to_owned(),
        other => other.to_string(),
    }
}

/// Whether a connection has ended as it should: nobody has anything against it.
pub fn is_clean(error: &ConnectionError) -> bool {
    match error {
        ConnectionError::LocallyClosed => true,
        ConnectionError::ApplicationClosed(closed) => closed.error_code.into_inner() == Code::NO_ERROR.0,
        _ => false,
    }
}

/// As quinn takes it. All codes of HTTP/3 fit.
pub fn wire_code(code: Code) -> VarInt {
    VarInt::from_u64(code.0).unwrap_or(VarInt::MAX)
}
