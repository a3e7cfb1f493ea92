//! The PING of an HTTP/2 connection, of which one is outstanding at a time: liveness of the peer, and round-trip time.
//!
//! # Invariants
//! - Liveness is checked at least once per interval. A PING that measures replaces one of those checks, and counts as unanswered no
//!   earlier than they do.
//! - It never ends a connection.

use std::{
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Buf;
use h2::{Ping, PingPong};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::window::{ConnectionWindow, Traffic, Windows};

/// A connection whose streams can be given other windows.
pub trait Resize {
    /// Tells the peer; whether that could be done now: the last change may not have been acknowledged.
    fn resize(&mut self, window: u32) -> bool;

    /// Gives the connection itself another one.
    fn resize_whole(&mut self, window: u32);
}

impl<T: AsyncRead + AsyncWrite + Unpin, B: Buf> Resize for h2::client::Connection<T, B> {
    fn resize(&mut self, window: u32) -> bool {
        self.set_initial_window_size(window).is_ok()
    }

    fn resize_whole(&mut self, window: u32) {
        self.set_target_window_size(window);
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin, B: Buf> Resize for h2::server::Connection<T, B> {
    fn resize(&mut self, window: u32) -> bool {
        self.set_initial_window_size(window).is_ok()
    }

    fn resize_whole(&mut self, window: u32) {
        self.set_target_window_size(window);
    }
}

/// See the module.
pub struct Pulse {
    ping: PingPong,
    /// A PING is under way.
    asked: bool,
    /// When it is asked whether the peer is alive.
    due: Instant,
    /// It was, and has this long to answer.
    silent_at: Option<Instant>,
    interval: Duration,
    timeout: Duration,
    traffic: Rc<Traffic>,
    windows: Windows,
    /// Where the connection's own is sized too.
    whole: Option<ConnectionWindow>,
}

/// What comes of polling.
pub enum Event<T> {
    /// Of the connection.
    Of(T),
    /// A PING was answered.
    Answered,
    /// The peer floods the connection, with frames of this type.
    Flood(&'static str),
    /// The connection has gone, and its PINGs with it.
    Gone(h2::Error),
}

impl Pulse {
    /// Of a connection whose streams have the first window, and report to `traffic`.
    pub fn new(ping: PingPong, interval: Duration, timeout: Duration, traffic: &Rc<Traffic>) -> Self {
        Self {
            ping,
            asked: false,
            due: Instant::now() + interval,
            silent_at: None,
            interval,
            timeout,
            traffic: Rc::clone(traffic),
            windows: Windows::default(),
            whole: None,
        }
    }

    /// The same; the connection's own window, of which the peer was told nothing yet, is sized too.
    #[must_use]
    pub fn sizing(self, whole: ConnectionWindow) -> Self {
        Self { whole: Some(whole), ..self }
    }

    /// Polls the connection, and sees to its windows.
    pub fn poll<C: Resize, T>(
        &mut self,
        cx: &mut Context<'_>,
        connection: &mut C,
        mut poll: impl FnMut(&mut C, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<Event<T>> {
        loop {
            let polled = poll(connection, cx);
            if let Some(frames) = self.traffic.flood().detected() {
                return Poll::Ready(Event::Flood(frames));
            }
            if let Poll::Ready(done) = polled {
                return Poll::Ready(Event::Of(done));
            }
            if self.asked
                && let Poll::Ready(pong) = self.ping.poll_pong(cx)
            {
                return Poll::Ready(match pong {
                    Ok(_) => {
                        self.answered(Instant::now());
                        Event::Answered
                    }
                    Err(e) => Event::Gone(e),
                });
            }
            match self.adjust(connection) {
                // What it has to send now, it sends when it is polled.
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(e) => return Poll::Ready(Event::Gone(e)),
            }
        }
    }

    /// Whether the connection has something new to send.
    fn adjust(&mut self, connection: &mut impl Resize) -> Result<bool, h2::Error> {
        let received = self.traffic.received();
        let mut new = false;
        if let Some(whole) = &mut self.whole
            && let Some(window) = whole.change(received, self.traffic.unreturned())
        {
            connection.resize_whole(window);
            new = true;
        }
        let short = self.traffic.account().is_short();
        if let Some(window) = self.windows.change(self.traffic.held(), short)
            && connection.resize(window)
        {
            if short {
                self.traffic.account().memory().shrank();
            }
            tracing::debug!(window, received, held = self.traffic.held(), "stream window changed");
            self.windows.told(window);
            new = true;
        }
        if !self.asked && self.windows.is_worth_a_ping(received) {
            let now = Instant::now();
            if self.windows.wants_ping(received, now) {
                self.ask(now)?;
                new = true;
            }
        }
        Ok(new)
    }

    fn ask(&mut self, now: Instant) -> Result<(), h2::Error> {
        self.ping.send_ping(Ping::opaque())?;
        self.asked = true;
        self.windows.asked(self.traffic.received(), now);
        Ok(())
    }

    fn answered(&mut self, now: Instant) {
        self.asked = false;
        self.silent_at = None;
        self.due = now + self.interval;
        self.windows.answered(self.traffic.received(), now);
    }

    /// When there is something to do, if nothing happens before.
    pub fn wake_at(&self) -> Instant {
        self.silent_at.unwrap_or(self.due)
    }

    /// Whether the peer was asked whether it is alive, and has not answered yet.
    pub fn is_waiting(&self) -> bool {
        self.silent_at.is_some()
    }

    /// It is to be asked now whether the peer is alive.
    pub fn make_due(&mut self) {
        self.due = Instant::now();
    }

    /// Asks whether the peer is alive, when that is due; false when it has been silent for too long.
    pub fn beat(&mut self) -> Result<bool, h2::Error> {
        let now = Instant::now();
        if let Some(silent_at) = self.silent_at {
            return Ok(now < silent_at);
        }
        if now >= self.due {
            if !self.asked {
                self.ask(now)?;
            }
            self.silent_at = Some(now + self.timeout);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
