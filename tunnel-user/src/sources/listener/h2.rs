//! CONNECT over HTTP/2: the connection, and each request on it.
//!
//! # Invariants
//! - Every handshake, header list, window and number of streams is bounded (the constants say by what); a peer that goes
//!   beyond ends its own connection.

use std::{
    future::{Future, pending, poll_fn},
    pin::pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream,
    server::{Connection, SendResponse},
};
use http::{HeaderValue, Request, Response, header::ALT_SVC};
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    accept::{LINGER, ServeError, Settings},
    request,
};
use crate::{
    identity::{standing::Standing, verify::explain},
    process::{
        drain::{Tasks, Watch},
        memory::Account,
    },
    relay::{Body, Broken, Cause, EarlySource, H2Leg, Payload, Queue, Sender, stream_broken},
    sources::{self, Answer, PendingRequest},
    transport::{
        http2::{FRAME, Guarded, HEADERS, RESET_STREAMS_MAX, Role, SEND_BUFFER, SMALL_FRAMES},
        io::{Linger as _, Wire},
        pulse::{Event, Pulse},
        window::{ConnectionWindow, Share, Traffic, WINDOW_START},
    },
};

/// Streams that the peer reset before we looked at them; more end the connection (CVE-2023-44487). As many as a peer may
/// have open, so that one whose clients all leave at once keeps its other flows.
fn pending_resets_max(streams: u32) -> usize {
    usize::try_from(streams).unwrap_or(usize::MAX)
}
/// Errors that the peer may make us answer with a reset.
const LOCAL_ERRORS_MAX: usize = 256;
/// How long a peer may take to notice that it was refused: longer than any round trip, and as long as h2 remembers
/// streams that were reset.
const REFUSED_LINGER: Duration = Duration::from_secs(1);

/// One request, on its stream.
pub type Incoming = sources::Incoming<Pending>;

fn incoming(
    request: Request<RecvStream>,
    respond: SendResponse<Payload>,
    share: Share,
    alt_svc: Option<HeaderValue>,
) -> Incoming {
    let target = request::target(&request);
    let (parts, body) = request.into_parts();
    let head = Some((parts.version, parts.headers));
    Incoming { target, head, request: Pending { body: Body { recv: body, share }, respond, alt_svc } }
}

/// A stream whose request waits for its answer.
///
/// What its peer sends meanwhile is kept within the stream's window, of which nothing is given back until somebody has
/// taken the bytes.
pub struct Pending {
    body: Body,
    respond: SendResponse<Payload>,
    alt_svc: Option<HeaderValue>,
}

impl PendingRequest for Pending {
    type Leg = H2Leg;

    fn early_data(&mut self) -> Option<&mut dyn EarlySource> {
        Some(self)
    }

    async fn accept(mut self) -> Option<(H2Leg, Queue)> {
        let mut answer = Response::new(());
        if let Some(offered) = self.alt_svc {
            answer.headers_mut().insert(ALT_SVC, offered);
        }
        // Fails only when the peer has reset the stream.
        let send = self.respond.send_response(answer, false).ok()?;
        Some((H2Leg::server(Sender::new(send, self.body.share.account()), self.body), Queue::default()))
    }

    /// Hears out what the peer sends before it knows, within the stream's window. Reset instead, the stream would be
    /// forgotten while its bytes still come, which h2 takes for an attack on the connection.
    async fn refuse(mut self, answer: &impl Answer) {
        // Fails only when the peer has reset the stream, and then nobody waits for the answer.
        let _gone = self.respond.send_response(answer.response(), true);
        let until_ended = async {
            while let Some(Ok(chunk)) = self.body.recv.data().await {
                self.body.share.received(chunk.len());
            }
        };
        // It goes on: now it is reset.
        let _gave_up = timeout(REFUSED_LINGER, until_ended).await;
    }
}

impl EarlySource for Pending {
    fn prefetches(&self) -> bool {
        true
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        let next = ready!(self.body.recv.poll_data(cx));
        if let Some(Ok(chunk)) = &next {
            self.body.share.received(chunk.len());
        }
        Poll::Ready(next.transpose().map_err(|e| stream_broken(&e, &self.body.share)))
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.respond.poll_reset(cx).map(|reset| match reset {
            Ok(reason) => Broken::Reset(Cause::Stream(reason)),
            Err(e) => stream_broken(&e, &self.body.share),
        })
    }
}

/// A connection on which the peer has begun to speak HTTP/2.
pub struct Tunnel<W: Wire> {
    connection: Connection<Guarded<W>, Payload>,
    last: W::Last,
    traffic: Rc<Traffic>,
}

/// Shakes hands on HTTP/2. The caller bounds the time.
pub(super) async fn handshake<W: Wire>(settings: &Settings, wire: W) -> Result<Tunnel<W>, ServeError> {
    let last = wire.share()?;
    let traffic = Rc::new(Traffic::default());
    let wire = Guarded::new(wire, Role::Server, Rc::clone(&traffic));
    let connection = h2::server::Builder::new()
        .initial_window_size(WINDOW_START)
        .max_frame_size(FRAME)
        .max_header_list_size(HEADERS)
        .max_concurrent_streams(settings.max_streams)
        .max_concurrent_reset_streams(RESET_STREAMS_MAX)
        .max_pending_accept_reset_streams(pending_resets_max(settings.max_streams))
        .max_local_error_reset_streams(Some(LOCAL_ERRORS_MAX))
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(SMALL_FRAMES)
        .handshake::<_, Payload>(wire)
        .await
        .map_err(|e| ServeError::H2(explain(&e)))?;
    Ok(Tunnel { connection, last, traffic })
}

/// What ended a connection. The library finds floods too, of what it keeps itself.
fn h2_error(e: h2::Error) -> ServeError {
    let flood = e.is_go_away() && e.is_library() && e.reason() == Some(Reason::ENHANCE_YOUR_CALM);
    if flood { ServeError::Flood(explain(&e)) } else { ServeError::H2(explain(&e)) }
}

/// Serves a connection to its end, in the memory of its peer. `carry` makes the task of each request; they end with the connection.
pub async fn serve<W: Wire, F: Future<Output = ()> + 'static>(
    settings: &Settings,
    tunnel: Tunnel<W>,
    account: &Rc<Account>,
    mut drain: Watch,
    standing: Option<Rc<Standing>>,
    carry: impl Fn(Incoming) -> F,
) -> Result<(), ServeError> {
    let Tunnel { mut connection, last, traffic } = tunnel;
    let stuck = ServeError::KeepaliveTimeout(settings.keepalive_timeout);
    let Some(ping) = connection.ping_pong() else {
        return Err(ServeError::H2("no PING handle".to_owned()));
    };
    traffic.charge(account);
    let whole = ConnectionWindow::new(account, settings.max_streams);
    let mut pulse =
        Pulse::new(ping, settings.keepalive_interval, settings.keepalive_timeout, &traffic).sizing(whole);
    // Owned here: when the connection goes, so do its streams.
    let streams = Rc::new(Tasks::default());
    let mut draining = false;
    let mut lapsed = pin!(async {
        match &standing {
            Some(standing) => standing.lapsed().await,
            None => pending().await,
        }
    });
    let mut has_lapsed = false;
    // Since when there is no stream, as far as was noticed.
    let mut idle = Some(Instant::now());
    let ended = loop {
        let idle_at = idle.filter(|_| !draining).map(|since| since + settings.idle_timeout);
        let wake_at = idle_at.map_or(pulse.wake_at(), |at| at.min(pulse.wake_at()));
        tokio::select! {
            biased;
            event = poll_fn(|cx| pulse.poll(cx, &mut connection, Connection::poll_accept)) => match event {
                // It is not acted on: its client may send it on another connection (RFC 9113 section 8.7).
                Event::Of(Some(Ok((_, mut respond)))) if standing.as_ref().is_some_and(|s| s.lapse().is_some()) => {
                    traffic.flood().took_request();
                    respond.send_reset(Reason::REFUSED_STREAM);
                }
                Event::Of(Some(Ok((request, respond)))) => {
                    traffic.flood().took_request();
                    streams.spawn(carry(incoming(request, respond, traffic.share(), settings.alt_svc.clone())));
                    idle = None;
                }
                Event::Of(Some(Err(e))) => break Err(h2_error(e)),
                Event::Of(None) => break Ok(()),
                Event::Answered => {}
                Event::Flood(frames) => {
                    connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    // Ready once GOAWAY is on the wire; a peer that does not read is not waited for.
                    let _told = timeout(LINGER, poll_fn(|cx| connection.poll_closed(cx))).await;
                    break Err(ServeError::Flood(format!("{frames} frames")));
                }
                Event::Gone(e) => break Err(h2_error(e)),
            },
            () = sleep_until(wake_at) => {
                if traffic.streams() > 0 {
                    idle = None;
                } else if idle_at.is_some_and(|at| at <= Instant::now()) {
                    draining = true;
                    connection.graceful_shutdown();
                } else {
                    idle.get_or_insert_with(Instant::now);
                }
                match pulse.beat() {
                    Ok(true) => {}
                    Ok(false) => break Err(stuck),
                    Err(e) => break Err(h2_error(e)),
                }
            }
            () = drain.draining(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            lapse = &mut lapsed, if !has_lapsed => {
                has_lapsed = true;
                tracing::info!(reason = %lapse, "draining connection of a peer");
                if !draining {
                    draining = true;
                    connection.graceful_shutdown();
                }
            }
        }
    };
    if let Err(why) = ended {
        // Its flows end with it, each by itself: what they had received still goes to their targets, and each is recorded.
        traffic.lost(&why.to_string());
        drop(connection);
        streams.ended().await;
        return Err(why);
    }
    // Streams that are finishing have their last frames on the wire already; what they still do is
    // write to their targets.
    let _rest = timeout(settings.keepalive_timeout, streams.ended()).await;
    drop(connection);
    last.linger(LINGER).await;
    Ok(())
}
