//! CONNECT over HTTP/3: the connections of one UDP socket, and each request on them.
//!
//! # Invariants
//! - No request is read before the peer's certificate was verified.
//! - Every handshake, header section, window and number of streams is bounded; a peer that goes beyond ends its own connection.
//! - When many handshakes are under way, a peer first proves that its address is its own (RFC 9000 section 8.1.2).

use std::{
    cell::Cell,
    future::{Future, pending, poll_fn},
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use http::{HeaderMap, StatusCode, Version};
use quinn::{Connection, ConnectionError};
use rustls_pki_types::UnixTime;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout},
};

use super::{
    accept::{LINGER, ServeError, Settings},
    handshakes::{Handshakes, Place},
    request::{self, Malformed, RequestError},
    serve::CONNECTIONS_MAX,
};
use crate::{
    config::Protocol,
    identity::{
        peer::peer_identity, quic::explain, standing::Standing, tls::TlsIdentity, verify::check_expiry,
    },
    model::flow::{ClientAddr, PeerAddr},
    process::{
        drain::{Tasks, Watch},
        memory::Account,
    },
    relay::{EarlySource, H3Leg, HeadFailure, Leg as _, Open, Queue},
    sources::{self, Answer, Event, FlowHandler, Peer, PendingRequest, SourceHandle},
    transport::{
        h1,
        http3::{
            Code,
            message::{self, HeadError, RequestHead},
        },
        quic::{self, Control, Ended, FloodDetector, PlacedSocket, ReceiveWindow, Role, Tuning},
    },
};

/// Handshakes under way on one worker, above which new peers prove their address first: it costs them a round trip, and an
/// attacker who does not have the address everything.
const RETRY_ABOVE: usize = 64;

/// After so many requests a connection is looked at for what else its peer sends, however little time has passed.
const LOOK_AFTER: u32 = 64;
/// How long a listener that drains still takes new connections, from the last one that has come: what came before others were to
/// take its place waits in its socket, and the rest of a ClientHello that has two packets may be on its way.
const LATE: Duration = Duration::from_millis(500);
/// How long it does at most, whatever comes.
pub const LATE_MAX: Duration = Duration::from_secs(5);
/// GOAWAY of a connection that drains, at first: it refuses nothing (RFC 9114 section 5.2), so that a request that the peer sent
/// before it heard is carried. The largest number that a request can have.
const NOTHING_REFUSED: u64 = (1 << 62) - 4;
/// What is waited for such requests beyond two round trips.
const CROSSING: Duration = Duration::from_millis(50);

/// A UDP socket, and how its connections are served.
pub struct Quic {
    /// The socket, which has its place among those of its address until the last connection has ended.
    pub socket: PlacedSocket,
    /// How they are served.
    pub settings: Arc<Settings>,
}

/// One request, on its stream.
type Incoming = sources::Incoming<Pending>;

/// Accepts until the source is told to stop.
pub async fn serve<H: FlowHandler>(
    handler: Rc<H>,
    Quic { socket, settings }: Quic,
    source: Rc<SourceHandle>,
    tasks: Rc<Tasks>,
) {
    let Some(tls) = &settings.tls else { return };
    let config = || {
        let ours = tls.store.current().map_err(|e| e.to_string())?;
        let config = ours.server_config(&tls.check, &[Protocol::H3]);
        Ok::<_, String>((quic::server_config(config, &settings.tuning())?, ours))
    };
    let (mut watch, mut news) = (source.watch(), tls.store.news());
    let first = loop {
        news.borrow_and_update();
        match config() {
            Ok((config, _)) => break config,
            Err(error) => tracing::error!(error, "no connections over QUIC until there is an identity"),
        }
        tokio::select! {
            // The settings hold the store, which has the other end.
            _ = news.changed() => {}
            () = watch.draining() => return,
        }
    };
    let endpoint = match quic::server(socket, first) {
        Ok(endpoint) => endpoint,
        Err(error) => return tracing::error!(%error, "failed to accept from a UDP socket"),
    };
    let (handshakes, under_way) = (Handshakes::default(), Rc::new(()));
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Until when it takes what comes, and at most.
    let mut late: Option<[Instant; 2]> = None;
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            () = watch.draining(), if late.is_none() => {
                let now = Instant::now();
                late = Some([now + LATE, now + LATE_MAX]);
                continue;
            }
            () = sleep_until(late.map_or_else(Instant::now, |[until, _]| until)), if late.is_some() => break,
        };
        let Some(incoming) = incoming else { break };
        if let Some([until, most]) = &mut late {
            *until = (Instant::now() + LATE).min(*most);
        }
        let addr = incoming.remote_address();
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
            handler.record(Event::ConnectionLimit(CONNECTIONS_MAX));
            incoming.refuse();
            continue;
        };
        if Rc::strong_count(&under_way) > RETRY_ABOVE && incoming.may_retry() {
            // Fails only where it was done already.
            let _done = incoming.retry();
            continue;
        }
        let rejected = |error: ServeError| {
            handler.record(Event::PeerRejected { peer: PeerAddr(addr), error: &error });
        };
        // With the certificate of this time.
        let (config, ours) = match config() {
            Ok(made) => made,
            Err(why) => {
                rejected(ServeError::Tls(why));
                continue;
            }
        };
        let connecting = match incoming.accept_with(Arc::new(config)) {
            Ok(connecting) => connecting,
            Err(e) => {
                rejected(ServeError::Tls(explain(&e, ours.hint().as_deref())));
                continue;
            }
        };
        let (handler, source, settings) = (Rc::clone(&handler), Rc::clone(&source), Arc::clone(&settings));
        let (place, counted) = (handshakes.place(addr.ip()), Rc::clone(&under_way));
        let started = std::time::Instant::now();
        tasks.spawn(async move {
            let shaken = handshake(&settings, connecting, place, ours).await;
            drop(counted);
            match shaken {
                Ok((connection, peer)) => {
                    handler.record(Event::PeerAccepted { took: started.elapsed() });
                    serve_connection(handler, &settings, connection, peer, source, permit).await;
                }
                Err(error) => handler.record(Event::PeerRejected { peer: PeerAddr(addr), error: &error }),
            }
        });
        // A ClientHello is answered at once, which takes longer than most turns: every flow has one in between.
        tokio::task::yield_now().await;
    }
    // New connections are refused; those that there are go on, with the endpoint, to their ends.
    endpoint.set_server_config(None);
}

impl Settings {
    fn tuning(&self) -> Tuning {
        Tuning {
            peer_streams: self.max_streams,
            streams: self.max_streams,
            keepalive_interval: self.keepalive_interval,
            keepalive_timeout: self.keepalive_timeout,
            congestion: self.congestion,
        }
    }
}

/// TLS, and who the peer has proved to be.
async fn handshake(
    settings: &Settings,
    connecting: quinn::Connecting,
    mut place: Place,
    ours: Arc<TlsIdentity>,
) -> Result<(Connection, Peer), ServeError> {
    let after = settings.handshake_timeout;
    let connection = tokio::select! {
        shaken = timeout(after, connecting) => shaken.map_err(|_| ServeError::HandshakeTimeout(after))?,
        () = place.needed() => return Err(ServeError::Crowded),
    };
    let connection = connection.map_err(|e| match e {
        ConnectionError::TimedOut => ServeError::HandshakeTimeout(after),
        e => ServeError::Tls(explain(&e, ours.hint().as_deref())),
    })?;
    let quic::Agreed { certificates, server_name } = quic::agreed(&connection);
    // A resumed session brings its certificate along, and nobody has looked at the date since.
    if let Err(why) = check_expiry(&certificates, UnixTime::now()) {
        let why = why.to_string();
        connection.close(quic::wire_code(Code::GENERAL_PROTOCOL_ERROR), why.as_bytes());
        return Err(ServeError::Tls(why));
    }
    let (client, identity) = (ClientAddr(connection.remote_address()), peer_identity(&certificates));
    tracing::debug!(
        peer = %client,
        identity = identity.as_ref().map(tracing::field::display),
        protocol = ?Protocol::H3,
        "tunnel accepted"
    );
    let standing = settings
        .tls
        .as_ref()
        .map(|tls| Rc::new(Standing::of_client(Arc::clone(&tls.store), ours, certificates, &tls.check)));
    Ok((connection, Peer { client, identity, server_name, standing }))
}

/// Serves one connection to its end. `permit` is its place among them.
async fn serve_connection<H: FlowHandler>(
    handler: Rc<H>,
    settings: &Settings,
    connection: Connection,
    peer: Peer,
    source: Rc<SourceHandle>,
    permit: OwnedSemaphorePermit,
) {
    let (addr, standing) = (PeerAddr(peer.client.0), peer.standing.clone());
    // Its place among the peer's connections, as long as it lives.
    let (client, connected) = match handler.peer(&source, peer) {
        Ok(client) => client,
        Err(error) => {
            connection.close(quic::wire_code(Code::EXCESSIVE_LOAD), &[]);
            return handler.record(Event::PeerRejected { peer: addr, error: &error });
        }
    };
    let carrier = Rc::clone(&handler);
    let carry = Rc::new(move |incoming| Rc::clone(&carrier).carry(client.clone(), incoming));
    match requests(settings, &connection, connected.memory(), source.watch(), standing, carry).await {
        Ok(()) => {}
        Err(error @ ServeError::Flood(_)) => handler.record(Event::Flooded { peer: addr, error: &error }),
        Err(e) => tracing::debug!(peer = %addr, error = %e, "connection closed"),
    }
    drop(permit);
}

/// Takes requests until the connection ends, in the memory of its peer. `carry` makes the task of each; they end with the connection.
async fn requests<F: Future<Output = ()> + 'static>(
    settings: &Settings,
    connection: &Connection,
    account: &Rc<Account>,
    mut drain: Watch,
    standing: Option<Rc<Standing>>,
    carry: Rc<impl Fn(Incoming) -> F + 'static>,
) -> Result<(), ServeError> {
    let h3_error = |e: &ConnectionError| ServeError::H3(quic::why_lost(e));
    // The peer has to give room for it (RFC 9114 section 6.2).
    let after = settings.handshake_timeout;
    let Ok(opened) = timeout(after, Control::open(connection)).await else {
        connection.close(quic::wire_code(Code::GENERAL_PROTOCOL_ERROR), b"no room for a control stream");
        return Err(ServeError::HandshakeTimeout(after));
    };
    let mut control = opened.map_err(|e| h3_error(&e))?;
    let mut watching = pin!(quic::watch(connection, Role::Server, Rc::new(|_| {})));
    // Owned here: when the connection goes, so do its streams.
    let (streams, open) = (Rc::new(Tasks::default()), Open::default());
    // The number that the next request has.
    let (mut next, mut draining, mut refuse_at, mut close_at) = (0_u64, false, None, None);
    let crossed = || Instant::now() + connection.rtt() * 2 + CROSSING;
    // The rest is refused from then on.
    let mut is_final = false;
    // When it has been without a stream for too long.
    let mut idle_at = Instant::now() + settings.idle_timeout;
    let mut lapsed = pin!(async {
        match &standing {
            Some(standing) => standing.lapsed().await,
            None => pending().await,
        }
    });
    let mut has_lapsed = false;
    let mut window = ReceiveWindow::new(connection, account);
    let (mut flood, mut since_look) = (FloodDetector::new(&connection.stats()), 0_u32);
    let (mut flooded, wasted) = (None, Rc::new(Cell::new(0)));
    let ended = loop {
        if since_look >= LOOK_AFTER || flood.next() <= Instant::now() {
            since_look = 0;
            window.fit(open.count() + 1);
            flooded = flood.look(&connection.stats(), wasted.get());
            if flooded.is_some() {
                connection.close(quic::wire_code(Code::EXCESSIVE_LOAD), b"");
                break Ended::Lost(ConnectionError::LocallyClosed);
            }
        }
        tokio::select! {
            ended = &mut watching => break ended,
            stream = connection.accept_bi() => match stream {
                Ok(halves) => {
                    since_look += 1;
                    let leg = H3Leg::server(connection, halves, open.clone(), account);
                    window.fit(open.count() + 1);
                    if is_final || standing.as_ref().is_some_and(|s| s.lapse().is_some()) {
                        leg.reject(Code::REQUEST_REJECTED);
                        continue;
                    }
                    next = next.max(leg.id() + 4);
                    idle_at = Instant::now() + settings.idle_timeout;
                    streams.spawn(serve_stream(leg, settings.handshake_timeout, Rc::clone(&carry), Rc::clone(&wasted)));
                }
                Err(why) => break Ended::Lost(why),
            },
            () = drain.draining(), if !draining => {
                draining = true;
                control.goaway(NOTHING_REFUSED).await;
                refuse_at = Some(crossed());
            }
            () = sleep_until(refuse_at.unwrap_or_else(Instant::now)), if refuse_at.is_some() => {
                (is_final, refuse_at) = (true, None);
                control.goaway(next).await;
            }
            lapse = &mut lapsed, if !has_lapsed => {
                has_lapsed = true;
                tracing::info!(reason = %lapse, "draining connection of a peer");
                if !is_final {
                    (draining, is_final, refuse_at) = (true, true, None);
                    control.goaway(next).await;
                }
            }
            // Looked at above.
            () = sleep_until(flood.next()) => {}
            () = sleep_until(idle_at), if !draining => {
                idle_at = Instant::now() + settings.idle_timeout;
                if open.count() == 0 {
                    draining = true;
                    control.goaway(NOTHING_REFUSED).await;
                    refuse_at = Some(crossed());
                }
            }
            // Everything has ended and was acknowledged. What the peer has sent before it heard is refused as such.
            () = open.none(), if is_final && close_at.is_none() => close_at = Some(Instant::now() + LINGER),
            () = sleep_until(close_at.unwrap_or_else(Instant::now)), if close_at.is_some() => {
                quic::close_clean(connection).await;
                break Ended::Lost(ConnectionError::LocallyClosed);
            }
        }
    };
    // Its flows end with it, each by itself: what they had received still goes to their targets, and each is recorded.
    streams.ended().await;
    if let Some(kind) = flooded {
        return Err(ServeError::Flood(format!("{kind} frames")));
    }
    match ended {
        Ended::Wrong(e) => Err(ServeError::H3(e.to_string())),
        Ended::Lost(e) if quic::is_clean(&e) => Ok(()),
        Ended::Lost(e) => Err(h3_error(&e)),
    }
}

/// Reads a request, and has it carried; one that cannot be answered is among the `wasted`, and so is one that is being read.
async fn serve_stream<F: Future<Output = ()>>(
    mut leg: H3Leg,
    patience: Duration,
    carry: Rc<impl Fn(Incoming) -> F>,
    wasted: Rc<Cell<u64>>,
) {
    let id = leg.id();
    wasted.set(wasted.get() + 1);
    let head = match timeout(patience, leg.recv.head()).await {
        Ok(Ok(section)) => message::decode_request(&section),
        Ok(Err(HeadFailure::TooLong)) => Err(HeadError::TooLong),
        Ok(Err(HeadFailure::Incomplete)) => return leg.reject(Code::REQUEST_INCOMPLETE),
        // Nothing has been done for it.
        Err(_) => return leg.reject(Code::REQUEST_REJECTED),
        Ok(Err(HeadFailure::Reset(_) | HeadFailure::Lost(_))) => return,
    };
    let (target, headers) = match head {
        Ok(RequestHead { method, authority, headers }) => {
            (request::target_of(&method, &authority, &headers), headers)
        }
        Err(HeadError::TooLong) => {
            let error = RequestError::Head(h1::HeadError::TooLong);
            (Err(Malformed { authority: Box::default(), error }), HeaderMap::new())
        }
        Err(HeadError::Malformed(why)) => {
            tracing::debug!(stream = id, why, "malformed request");
            return leg.reject(Code::MESSAGE_ERROR);
        }
        Err(HeadError::Connection(e)) => {
            leg.recv.wrong(&e);
            return;
        }
    };
    wasted.set(wasted.get() - 1);
    carry(sources::Incoming { target, head: Some((Version::HTTP_3, headers)), request: Pending(leg) }).await;
}

/// A stream whose request waits for its answer. What its peer sends meanwhile is within the bounds of a leg.
pub struct Pending(H3Leg);

impl PendingRequest for Pending {
    type Leg = H3Leg;

    fn early_data(&mut self) -> Option<&mut dyn EarlySource> {
        Some(&mut self.0)
    }

    async fn accept(mut self) -> Option<(H3Leg, Queue)> {
        self.0.send.put_headers(message::encode_response(StatusCode::OK, &HeaderMap::new()));
        // Ready with an error when the peer has left; what there is no room for goes when there is.
        let left = poll_fn(|cx| {
            self.0.send.poll_flush(cx);
            Poll::Ready(self.0.poll_broken(cx).is_ready())
        });
        (!left.await).then_some((self.0, Queue::default()))
    }

    async fn refuse(mut self, answer: &impl Answer) {
        let response = answer.response();
        self.0.send.put_headers(message::encode_response(response.status(), response.headers()));
        // It ends for the peer too, unless that takes no answer.
        let _gone = timeout(LINGER, poll_fn(|cx| self.0.poll_finish(cx))).await;
        self.0.release();
    }
}
