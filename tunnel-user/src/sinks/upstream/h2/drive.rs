//! The task of an HTTP/2 connection: PINGs, windows, and its end.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use h2::{PingPong, client::Connection};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep_until},
};

use super::{H2Connection, OVERDUE};
use crate::{
    identity::verify::explain,
    relay::Payload,
    sinks::upstream::{connection::Connection as _, stream::LINGER},
    transport::{
        io::Linger,
        pulse::{Event, Pulse},
    },
};

/// What runs a connection, whatever byte stream it is on.
pub(super) trait Drive {
    /// To its end; `grew` is called when the peer allows more streams than before.
    fn drive<'c>(
        self: Box<Self>,
        conn: &'c H2Connection,
        grew: &'c dyn Fn(),
    ) -> Pin<Box<dyn Future<Output = ()> + 'c>>;
}

/// A connection, and what is left of its byte stream once it has gone.
pub(super) struct Driver<W, L> {
    pub(super) connection: Connection<W, Payload>,
    pub(super) ping: PingPong,
    pub(super) last: L,
    /// Between two PINGs.
    pub(super) interval: Duration,
    /// How long an answer may take.
    pub(super) timeout: Duration,
}

impl<W: AsyncRead + AsyncWrite + Unpin + 'static, L: Linger> Drive for Driver<W, L> {
    fn drive<'c>(
        self: Box<Self>,
        conn: &'c H2Connection,
        grew: &'c dyn Fn(),
    ) -> Pin<Box<dyn Future<Output = ()> + 'c>> {
        Box::pin(async move {
            let Self { mut connection, ping, last, interval, timeout } = *self;
            let pulse = Pulse::new(ping, interval, timeout, &conn.traffic);
            let lost = run(&mut connection, pulse, timeout, conn, grew).await;
            conn.draining.set(true);
            if let Some(why) = &lost {
                conn.traffic.lost(why);
            }
            conn.overdue.notify_waiters();
            let clean = lost.is_none();
            conn.lost.replace(lost);
            conn.askers.borrow_mut().clear();
            drop(connection);
            if clean {
                // GOAWAY and close_notify are on their way.
                last.linger(LINGER).await;
            }
        })
    }
}

fn go_on<W: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut Connection<W, Payload>,
    cx: &mut Context<'_>,
) -> Poll<Result<(), h2::Error>> {
    Pin::new(connection).poll(cx)
}

/// PINGs a connection and sizes its windows until it ends; why, unless that end was clean.
async fn run<W: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut Connection<W, Payload>,
    mut pulse: Pulse,
    timeout: Duration,
    conn: &H2Connection,
    grew: &dyn Fn(),
) -> Option<String> {
    let limit = Cell::new(conn.max_streams());
    loop {
        if !conn.askers.borrow().is_empty() | conn.poked.take() {
            pulse.make_due();
        }
        let overdue_at = conn.asked.get().filter(|_| !conn.is_overdue()).map(|asked| asked + OVERDUE);
        let wake_at = overdue_at.map_or(pulse.wake_at(), |at| at.min(pulse.wake_at()));
        tokio::select! {
            biased;
            event = poll_fn(|cx| {
                let event = pulse.poll(cx, connection, go_on);
                let now = conn.max_streams();
                if limit.replace(now) < now {
                    grew();
                }
                event
            }) => match event {
                Event::Of(ended) => return ended.err().map(|e| explain(&e)),
                Event::Answered => {
                    conn.answered();
                    for asker in conn.askers.take() {
                        // It may have given up.
                        let _gone = asker.send(());
                    }
                    continue;
                }
                Event::Flood(frames) => return Some(format!("flooded by the peer: {frames} frames")),
                Event::Gone(e) => return Some(explain(&e)),
            },
            () = sleep_until(wake_at) => {}
            () = conn.asking.taken() => continue,
        }
        if overdue_at.is_some_and(|at| at <= Instant::now()) {
            tracing::debug!(peer = %conn.peer(), "PING overdue");
            conn.is_overdue.set(true);
            conn.overdue.notify_waiters();
        }
        match pulse.beat() {
            Ok(true) => {
                if pulse.is_waiting() && conn.asked.get().is_none() {
                    conn.asked.set(Some(Instant::now()));
                }
            }
            Ok(false) => return Some(format!("no answer to PING within {timeout:?}")),
            Err(e) => return Some(explain(&e)),
        }
    }
}
