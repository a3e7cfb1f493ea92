//! One HTTP/2 connection to an upstream, from its handshake to its end.
//!
//! Enters: a key. Leaves: a connection on which the peer has answered, and why it was lost, once it was.
//! Invariant: it is asked whether it is alive, and one that ended cleanly is given up only once the peer has ended
//! it too. It never opens a stream.

use std::{
    cell::{Cell, RefCell},
    future::{Future as _, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use h2::{
    PingPong,
    client::{Connection, SendRequest},
};
use rustls::CipherSuite;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Notify, oneshot},
    time::{Instant, sleep_until, timeout},
};

use super::{
    connect::{ConnectError, Connected, Key, Link, connect},
    nested::Outer,
    pool::Settings,
};
use crate::transport::http2::{FRAME, HEADERS, RESET_STREAMS_MAX, SEND_BUFFER, SMALL_FRAMES};
use crate::{
    config::Protocol,
    identity::verify::explain,
    model::flow::{FarEnd, Identity},
    relay::Payload,
    transport::{
        io::{AlertFirst, LastReader},
        pulse::{Event, Pulse},
        record::TlsStream,
        tcp,
        window::{Traffic, WINDOW_START, connection_window},
    },
};

/// How long a peer that we have said goodbye to may take to close its side.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// A peer that was heard of within this time is not asked whether it is there when a stream is opened.
const HEARD: Duration = Duration::from_secs(1);
/// A PING that is not answered within this time is overdue: new streams go to another endpoint, if one is available. A
/// second is more than any round trip, and less than whoever connects takes for a failure.
const OVERDUE: Duration = Duration::from_secs(1);

/// What is known of one connection.
pub(super) struct Conn {
    /// `None` once retired for idleness.
    pub(super) send: RefCell<Option<SendRequest<Payload>>>,
    pub(super) peer: FarEnd,
    pub(super) identity: Option<Identity>,
    max_streams: usize,
    pub(super) active: Cell<usize>,
    pub(super) idle_since: Cell<Instant>,
    /// The last stream has ended, or it is to be looked whether the peer is alive, or it is no longer wanted.
    pub(super) idle: Notify,
    /// Got GOAWAY, failed, or is being closed for idleness.
    pub(super) retired: Cell<bool>,
    /// Its endpoint is gone: it is closed as soon as it is idle.
    pub(super) unwanted: Cell<bool>,
    /// Those who want to know whether the peer is alive.
    pub(super) askers: RefCell<Vec<oneshot::Sender<()>>>,
    /// When the peer was last heard of, and how much it had sent by then.
    heard: Cell<(Instant, u64)>,
    /// It is to be asked whether it is there.
    poked: Cell<bool>,
    /// When it was asked that, if it has not answered yet.
    asked: Cell<Option<Instant>>,
    is_overdue: Cell<bool>,
    /// It has become overdue, or the connection has ended.
    overdue: Notify,
    /// Why the connection was lost, once it was.
    pub(super) lost: RefCell<Option<String>>,
    /// What its streams report to, and what sizes their windows.
    pub(super) traffic: Rc<Traffic>,
}

impl Conn {
    /// Streams that it may carry: our limit and the peer's. None once it is retired.
    pub(super) fn limit(&self) -> usize {
        let send = self.send.borrow();
        let Some(send) = send.as_ref().filter(|_| !self.retired.get()) else { return 0 };
        self.max_streams.min(send.current_max_send_streams())
    }

    pub(super) fn free(&self) -> usize {
        self.limit().saturating_sub(self.active.get())
    }

    /// Whether the peer allows no streams.
    pub(super) fn is_barred(&self) -> bool {
        !self.retired.get() && self.limit() == 0
    }

    /// Whether a PING has not been answered for a while.
    pub(super) fn is_overdue(&self) -> bool {
        self.is_overdue.get()
    }

    pub(super) fn heard(&self) {
        self.heard.set((Instant::now(), self.traffic.received()));
    }

    pub(super) fn expect_answer(&self) {
        if self.heard.get().1 != self.traffic.received() {
            return self.heard();
        }
        if self.asked.get().is_none() && self.heard.get().0.elapsed() >= HEARD {
            self.poked.set(true);
            self.idle.notify_one();
        }
    }

    pub(super) async fn overdue(&self) {
        while !self.is_overdue.get() && !self.retired.get() {
            self.overdue.notified().await;
        }
    }

    /// The peer has answered a PING.
    fn answered(&self) {
        self.asked.set(None);
        self.is_overdue.set(false);
        self.heard();
    }
}

/// A connection that a peer has let us in on.
pub(super) struct Opened {
    conn: Rc<Conn>,
    suite: Option<CipherSuite>,
    wire: Opening,
}

/// With TLS or without, and what is left of the byte stream once the connection on it has gone. Through another
/// upstream it is one kind, whatever lies below: the bytes have been through TLS and HTTP/2 once already.
enum Opening {
    Tls(Driven<AlertFirst<TlsStream<TcpStream>>, LastReader>),
    Plain(Driven<TcpStream, LastReader>),
    Nested(Driven<Box<dyn Wire>, Outer>),
}

trait Wire: AsyncRead + AsyncWrite + Unpin {}

impl<W: AsyncRead + AsyncWrite + Unpin> Wire for W {}

struct Driven<W, L> {
    connection: Box<Connection<W, Payload>>,
    ping: PingPong,
    last: L,
}

impl Opened {
    /// What is known of it.
    pub(super) fn conn(&self) -> &Rc<Conn> {
        &self.conn
    }

    /// What both sides agreed on, for the log.
    pub(super) fn suite(&self) -> Option<CipherSuite> {
        self.suite
    }

    /// Runs it to its end; `grew` is called when the peer allows more streams than before.
    pub(super) async fn drive(self, settings: &Settings, grew: &dyn Fn()) {
        let Self { conn, wire, .. } = self;
        match wire {
            Opening::Tls(Driven { connection, ping, last }) => {
                if drive(*connection, ping, &conn, settings, grew).await {
                    last.linger(LINGER).await;
                }
            }
            Opening::Plain(Driven { connection, ping, last }) => {
                if drive(*connection, ping, &conn, settings, grew).await {
                    last.linger(LINGER).await;
                }
            }
            Opening::Nested(Driven { connection, ping, last }) => {
                if drive(*connection, ping, &conn, settings, grew).await {
                    last.linger(LINGER).await;
                }
            }
        }
    }
}

/// Connects, and waits until the peer has answered a PING: in TLS 1.3 a server judges the client's certificate
/// after the client has finished (RFC 8446 section 4.4.2), so only an answer says that we were let in; and its
/// SETTINGS have come by then.
pub(super) async fn open(key: &Key, settings: &Settings) -> Result<Opened, ConnectError> {
    connect(key, Protocol::H2, &settings.connect, async |connected| {
        let Connected { link, peer, identity, suite } = connected;
        let failed = |why| ConnectError::Http { protocol: Protocol::H2, endpoint: key.endpoint.clone(), why };
        let last_of = |tcp: &TcpStream| {
            tcp::share(tcp);
            LastReader::new(tcp).map_err(|e| failed(format!("this node cannot wait for its end: {e}")))
        };
        let (send, wire) = match link {
            Link::Plain(tcp) => {
                let last = last_of(&tcp)?;
                let (send, driven) = handshake(tcp, last, settings).await.map_err(failed)?;
                (send, Opening::Plain(driven))
            }
            Link::Tls(tls) => {
                let last = last_of(tls.below())?;
                let shaken = handshake(AlertFirst::new(*tls), last, settings).await;
                let (send, driven) = shaken.map_err(failed)?;
                (send, Opening::Tls(driven))
            }
            Link::Nested(outer) => {
                let last = outer.held();
                let shaken = handshake(Box::new(outer) as Box<dyn Wire>, last, settings).await;
                let (send, driven) = shaken.map_err(failed)?;
                (send, Opening::Nested(driven))
            }
            Link::NestedTls(tls) => {
                let last = tls.below().held();
                let wire: Box<dyn Wire> = Box::new(AlertFirst::new(*tls));
                let (send, driven) = handshake(wire, last, settings).await.map_err(failed)?;
                (send, Opening::Nested(driven))
            }
        };
        let conn = Rc::new(Conn {
            send: RefCell::new(Some(send)),
            peer,
            identity,
            max_streams: settings.max_streams,
            active: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            idle: Notify::new(),
            retired: Cell::new(false),
            unwanted: Cell::new(false),
            askers: RefCell::default(),
            heard: Cell::new((Instant::now(), 0)),
            poked: Cell::default(),
            asked: Cell::default(),
            is_overdue: Cell::default(),
            overdue: Notify::new(),
            lost: RefCell::default(),
            traffic: Rc::default(),
        });
        Ok(Opened { conn, suite, wire })
    })
    .await
}

/// The error is one sentence: the peer's alert about our certificate comes as the first thing it sends.
async fn handshake<W: Wire, L>(
    wire: W,
    last: L,
    settings: &Settings,
) -> Result<(SendRequest<Payload>, Driven<W, L>), String> {
    let streams = u32::try_from(settings.max_streams).unwrap_or(u32::MAX);
    let (send, mut connection) = h2::client::Builder::new()
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
        pong = ping.ping(h2::Ping::opaque()) => { pong.map_err(|e| explain(&e))?; }
    }
    Ok((send, Driven { connection: Box::new(connection), ping, last }))
}

fn go_on<W: Wire>(
    connection: &mut Connection<W, Payload>,
    cx: &mut Context<'_>,
) -> Poll<Result<(), h2::Error>> {
    Pin::new(connection).poll(cx)
}

/// Runs a connection to its end: PINGs it, sizes its windows, and closes it when it is idle. Whether that end was
/// clean: then GOAWAY and close_notify are on their way.
async fn drive<W: Wire>(
    mut connection: Connection<W, Payload>,
    ping: PingPong,
    conn: &Conn,
    settings: &Settings,
    grew: &dyn Fn(),
) -> bool {
    let mut pulse = Pulse::new(ping, settings.keepalive_interval, settings.keepalive_timeout, &conn.traffic);
    let limit = Cell::new(conn.limit());
    let lost = loop {
        if !conn.askers.borrow().is_empty() | conn.poked.take() {
            pulse.make_due();
        }
        let keep_for = if conn.unwanted.get() { Duration::ZERO } else { settings.idle_timeout };
        let idle_at = conn.idle_since.get() + keep_for;
        let overdue_at = conn.asked.get().filter(|_| !conn.is_overdue()).map(|asked| asked + OVERDUE);
        let beat_at = overdue_at.map_or(pulse.wake_at(), |at| at.min(pulse.wake_at()));
        let wake_at = if conn.active.get() == 0 { beat_at.min(idle_at) } else { beat_at };
        tokio::select! {
            biased;
            event = poll_fn(|cx| {
                let event = pulse.poll(cx, &mut connection, go_on);
                if limit.replace(conn.limit()) < conn.limit() {
                    grew();
                }
                event
            }) => match event {
                Event::Of(ended) => break ended.err().map(|e| explain(&e)),
                Event::Answered => {
                    conn.answered();
                    for asker in conn.askers.take() {
                        // It may have given up.
                        let _gone = asker.send(());
                    }
                    continue;
                }
                Event::Gone(e) => break Some(explain(&e)),
            },
            () = sleep_until(wake_at) => {}
            () = conn.idle.notified() => continue,
        }
        if conn.active.get() == 0 && conn.idle_since.get().elapsed() >= keep_for {
            conn.retired.set(true);
            // Without a handle that could open a stream, the connection says GOAWAY and ends.
            conn.send.borrow_mut().take();
            let _ended = timeout(settings.keepalive_timeout, &mut connection).await;
            break None;
        }
        if overdue_at.is_some_and(|at| at <= Instant::now()) {
            tracing::debug!(peer = %conn.peer, "PING overdue");
            conn.is_overdue.set(true);
            conn.overdue.notify_waiters();
        }
        match pulse.beat() {
            Ok(true) => {
                if pulse.is_waiting() && conn.asked.get().is_none() {
                    conn.asked.set(Some(Instant::now()));
                }
            }
            Ok(false) => break Some(format!("no answer to PING within {:?}", settings.keepalive_timeout)),
            Err(e) => break Some(explain(&e)),
        }
    };
    conn.retired.set(true);
    if let Some(why) = &lost {
        conn.traffic.lost(why);
    }
    conn.overdue.notify_waiters();
    let clean = lost.is_none();
    *conn.lost.borrow_mut() = lost;
    conn.askers.borrow_mut().clear();
    clean
}
