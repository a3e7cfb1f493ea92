//! CONNECT over HTTP/2.
//!
//! Enters: a connection whose peer has been let in. Leaves: one call of `handle` per stream. Invariant: every
//! handshake, header list, window and number of streams is bounded (the constants say by what); a peer
//! that goes beyond ends its own connection. It never answers a request itself.

use std::{
    future::{Future, poll_fn},
    rc::Rc,
};

use h2::{
    RecvStream,
    server::{Connection, SendResponse},
};
use http::Request;
use tokio::time::{sleep_until, timeout};

use super::accept::{LINGER, ServeError, Settings};
use crate::{
    identity::verify::explain,
    process::drain::{Tasks, Watch},
    relay::Payload,
    transport::{
        http2::{FRAME, HEADERS, RESET_STREAMS_MAX, SEND_BUFFER, SMALL_FRAMES},
        io::{Linger as _, Wire},
        pulse::{Event, Pulse},
        window::{Share, Traffic, WINDOW_START, connection_window},
    },
};

/// Streams that the peer reset before we looked at them; more end the connection (CVE-2023-44487). As many as a peer may
/// have open, so that one whose clients all leave at once keeps its other flows.
fn pending_resets_max(streams: u32) -> usize {
    usize::try_from(streams).unwrap_or(usize::MAX)
}
/// Errors that the peer may make us answer with a reset.
const LOCAL_ERRORS_MAX: usize = 256;

/// One request.
pub struct Incoming {
    /// Its head, and the bytes that follow.
    pub request: Request<RecvStream>,
    /// Where the answer goes.
    pub respond: SendResponse<Payload>,
    /// What the stream reports to.
    pub share: Share,
}

/// A connection on which the peer has begun to speak HTTP/2.
pub struct Tunnel<W: Wire> {
    connection: Connection<W, Payload>,
    last: W::Last,
}

/// Shakes hands on HTTP/2. The caller bounds the time.
pub(super) async fn handshake<W: Wire>(settings: &Settings, wire: W) -> Result<Tunnel<W>, ServeError> {
    let last = wire.share()?;
    let connection = h2::server::Builder::new()
        .initial_window_size(WINDOW_START)
        .initial_connection_window_size(connection_window(settings.max_streams))
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
    Ok(Tunnel { connection, last })
}

/// Serves a connection to its end. `handle` makes the task of each stream; they end with the connection.
pub async fn serve<W: Wire, F: Future<Output = ()> + 'static>(
    settings: &Settings,
    tunnel: Tunnel<W>,
    mut drain: Watch,
    handle: impl Fn(Incoming) -> F,
) -> Result<(), ServeError> {
    let Tunnel { mut connection, last } = tunnel;
    let h2_error = |e: h2::Error| ServeError::H2(explain(&e));
    let stuck = ServeError::KeepaliveTimeout(settings.keepalive_timeout);
    let Some(ping) = connection.ping_pong() else {
        return Err(ServeError::H2("no PING handle".to_owned()));
    };
    let traffic = Rc::new(Traffic::default());
    let mut pulse = Pulse::new(ping, settings.keepalive_interval, settings.keepalive_timeout, &traffic);
    // Owned here: when the connection goes, so do its streams.
    let streams = Rc::new(Tasks::default());
    let mut draining = false;
    let ended = loop {
        let wake_at = pulse.wake_at();
        tokio::select! {
            biased;
            event = poll_fn(|cx| pulse.poll(cx, &mut connection, Connection::poll_accept)) => match event {
                Event::Of(Some(Ok((request, respond)))) => {
                    streams.spawn(handle(Incoming { request, respond, share: traffic.share() }));
                }
                Event::Of(Some(Err(e))) => break Err(h2_error(e)),
                Event::Of(None) => break Ok(()),
                Event::Answered => {}
                Event::Gone(e) => break Err(h2_error(e)),
            },
            () = sleep_until(wake_at) => {
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
