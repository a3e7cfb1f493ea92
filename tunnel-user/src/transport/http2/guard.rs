//! What stands between an HTTP/2 connection and its byte stream: it bounds what the connection does in one turn, and counts
//! frames.
//!
//! # Invariants
//! - A turn ends after [`TURN_FRAMES`], [`TURN_BYTES`] or [`TURN_TIME`], and the next one begins after the runtime has polled
//!   its driver. What is read at once is adapted to the frames that came before, so that little of a turn is beyond its bounds.
//! - Once a flood was detected nothing more is read.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::frames::{DATA, Frames, HEADERS};
use crate::transport::{turn::AfterDriver, window::Traffic};

/// Frames of one connection before others have a turn. Each may wake a task, which makes a system call.
pub(super) const TURN_FRAMES: usize = 64;
/// What a request counts as among them: a new task, a socket, a line in the log, some 100 µs in all.
const REQUEST_FRAMES: usize = 16;
/// Bytes of one connection before others have a turn: about 50 µs' worth.
pub(super) const TURN_BYTES: usize = 256 * 1024;
/// Time that one connection takes before others have a turn, whatever its frames are. Looked at between two reads.
pub(super) const TURN_TIME: Duration = Duration::from_micros(200);
/// The least that is read at once: 39 of the smallest frames that have something in them.
const READ_MIN: usize = 512;
/// What is read at first.
const READ_START: usize = 4096;
/// How much faster than before it may get, with each read.
const GROWTH: usize = 4;
/// What a client sends before its first frame (RFC 9113 section 3.4).
const PREFACE: usize = 24;

/// Which side of the connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The peer has connected to us.
    Server,
    /// We have connected to the peer.
    Client,
}

/// See the module.
pub struct Guarded<S> {
    inner: S,
    traffic: Rc<Traffic>,
    incoming: Frames,
    outgoing: Frames,
    /// What is read at once.
    allowance: usize,
    frames: usize,
    bytes: usize,
    started: Option<Instant>,
    /// Between two turns.
    waiting: Option<AfterDriver>,
}

impl<S> Guarded<S> {
    /// Of a connection on which nothing was said yet.
    pub fn new(inner: S, role: Role, traffic: Rc<Traffic>) -> Self {
        let preface = |of| Frames::after(if role == of { PREFACE } else { 0 });
        Self {
            inner,
            traffic,
            incoming: preface(Role::Server),
            outgoing: preface(Role::Client),
            allowance: READ_START,
            frames: 0,
            bytes: 0,
            started: None,
            waiting: None,
        }
    }

    /// Whether this turn goes on.
    fn begin(&mut self, cx: &Context<'_>) -> bool {
        if self.traffic.flood().detected().is_some() {
            return false;
        }
        if let Some(waiting) = &self.waiting {
            if !waiting.has_passed() {
                return false;
            }
            self.waiting = None;
        }
        let now = Instant::now();
        let started = *self.started.get_or_insert_with(|| {
            self.traffic.flood().tick(now);
            now
        });
        if self.frames < TURN_FRAMES && self.bytes < TURN_BYTES && now - started < TURN_TIME {
            return true;
        }
        self.end();
        self.waiting = Some(AfterDriver::new(cx));
        false
    }

    fn end(&mut self) {
        (self.frames, self.bytes, self.started) = (0, 0, None);
    }

    /// Whether what has come may go on.
    fn received(&mut self, bytes: &[u8]) -> bool {
        let traffic = &*self.traffic;
        let (flood, streams) = (traffic.flood(), traffic.streams());
        let mut weight = 0;
        self.incoming.pass(bytes, |frame| {
            weight += if frame.kind == HEADERS { REQUEST_FRAMES } else { 1 };
            if frame.kind == DATA {
                traffic.arrived(frame.length);
            }
            flood.received(frame, streams);
        });
        self.frames += weight;
        self.bytes += bytes.len();
        let fits = match weight {
            0 => TURN_BYTES,
            _ => bytes.len() * TURN_FRAMES / weight,
        };
        self.allowance = fits.min(self.allowance * GROWTH).clamp(READ_MIN, TURN_BYTES);
        flood.detected().is_none()
    }

    fn sent(&mut self, mut n: usize, bufs: &[IoSlice<'_>]) {
        let flood = self.traffic.flood();
        for buf in bufs {
            let part = n.min(buf.len());
            self.outgoing.pass(&buf[..part], |frame| flood.sent(frame));
            n -= part;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.begin(cx) {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = if buf.remaining() <= this.allowance {
            Pin::new(&mut this.inner).poll_read(cx, buf)
        } else {
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(this.allowance));
            let read = Pin::new(&mut this.inner).poll_read(cx, &mut part);
            let n = part.filled().len();
            buf.advance(n);
            read
        };
        if read.is_pending() {
            this.end();
            return read;
        }
        if !this.received(&buf.filled()[before..]) {
            // Whoever drives the connection finds out why, and closes it.
            buf.set_filled(before);
            return Poll::Pending;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        if let Poll::Ready(Ok(n)) = written {
            self.sent(n, bufs);
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
