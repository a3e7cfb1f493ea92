//! The start of an HTTP/2 connection, on whatever byte stream.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use h2::{
    Ping, PingPong,
    client::{Builder, Connection, SendRequest},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, mpsc},
    time::Instant,
};

use super::{Abandoned, H2Connection, drive::Driver};
use crate::{
    config::Protocol,
    identity::verify::explain,
    model::flow::Target,
    relay::{IntoLeg, Payload},
    sinks::upstream::{
        ConnectError,
        alternative::Alternatives,
        connect::{Far, Handshake},
        settings::PoolSettings,
        signal::Signal,
        stream::StreamLeg,
    },
    transport::{
        http2::{FRAME, Guarded, HEADERS, RESET_STREAMS_MAX, Role, SEND_BUFFER, SMALL_FRAMES},
        io::AlertFirst,
        window::{Traffic, WINDOW_START, connection_window},
    },
};

/// Makes a connection of a byte stream.
pub(in crate::sinks::upstream) struct H2Handshake<'a> {
    /// The peer, for errors.
    pub(in crate::sinks::upstream) endpoint: &'a Target,
    pub(in crate::sinks::upstream) settings: &'a PoolSettings,
    /// Takes streams whose clients have left.
    pub(in crate::sinks::upstream) abandoned: &'a mpsc::UnboundedSender<Abandoned>,
    /// Hears what the peer offers beside this.
    pub(in crate::sinks::upstream) alternatives: &'a Option<Rc<Alternatives>>,
}

impl Handshake for H2Handshake<'_> {
    type Connection = H2Connection;

    /// Waits until the peer has answered a PING: in TLS 1.3 a server judges the client's certificate after the client has
    /// finished (RFC 8446 section 4.4.2), so only an answer says that it has accepted us; and its SETTINGS have come by then.
    async fn shake<W: IntoLeg>(self, wire: W, far: Far) -> Result<H2Connection, ConnectError>
    where
        StreamLeg: From<W::Leg>,
    {
        let Self { endpoint, settings, abandoned, alternatives } = self;
        let failed = |why| ConnectError::Http { protocol: Protocol::H2, endpoint: endpoint.clone(), why };
        let last = wire.share().map_err(|e| failed(format!("this node cannot wait for its end: {e}")))?;
        let traffic = Rc::new(Traffic::default());
        let wire = Guarded::new(AlertFirst::new(wire), Role::Client, Rc::clone(&traffic));
        let shaken = start(wire, settings).await.map_err(failed)?;
        let (send, connection, ping) = shaken;
        let driver = Driver {
            connection,
            ping,
            last,
            interval: settings.keepalive_interval,
            timeout: settings.keepalive_timeout,
        };
        Ok(H2Connection {
            send: RefCell::new(Some(send)),
            far,
            max_streams: settings.max_streams,
            draining: Cell::default(),
            askers: RefCell::default(),
            asking: Signal::default(),
            heard: Cell::new((Instant::now(), 0)),
            poked: Cell::default(),
            asked: Cell::default(),
            is_overdue: Cell::default(),
            overdue: Notify::new(),
            lost: RefCell::default(),
            traffic,
            abandoned: abandoned.clone(),
            alternatives: alternatives.clone().map(|all| (endpoint.clone(), all)),
            driver: RefCell::new(Some(Box::new(driver))),
        })
    }
}

type Started<W> = (SendRequest<Payload>, Connection<W, Payload>, PingPong);

/// The error is one sentence: the peer's alert about our certificate comes as the first thing it sends.
async fn start<W: AsyncRead + AsyncWrite + Unpin>(
    wire: W,
    settings: &PoolSettings,
) -> Result<Started<W>, String> {
    let streams = u32::try_from(settings.max_streams).unwrap_or(u32::MAX);
    let (send, mut connection) = Builder::new()
        .initial_window_size(WINDOW_START)
        .initial_connection_window_size(connection_window(streams))
        .max_frame_size(FRAME)
        .max_header_list_size(HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(SMALL_FRAMES)
        .max_concurrent_reset_streams(RESET_STREAMS_MAX)
        .enable_push(false)
        .handshake::<_, Payload>(wire)
        .await
        .map_err(|e| explain(&e))?;
    let Some(mut ping) = connection.ping_pong() else { return Err("no PING handle".to_owned()) };
    tokio::select! {
        biased;
        ended = &mut connection => match ended {
            Err(e) => return Err(explain(&e)),
            Ok(()) => return Err("the peer closed the connection".to_owned()),
        },
        pong = ping.ping(Ping::opaque()) => { pong.map_err(|e| explain(&e))?; }
    }
    Ok((send, connection, ping))
}
