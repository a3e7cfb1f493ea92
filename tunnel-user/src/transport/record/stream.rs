//! A byte stream with TLS over it, after the handshake.
//!
//! # Invariants
//! - An end without close_notify is an error (RFC 8446 section 6.1).
//! - What was written is in the stream below once it was flushed.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::AlertDescription;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::timeout,
};

use super::{Next, RecordError, Session};
use crate::transport::{alert::HintedAlert, turn::AfterDriver};

/// What is received before the others on this thread have a turn: about 100 µs' worth. tokio's own measure is the number of
/// reads, whatever their size. A connection of HTTP/2 has a shorter one of its own (`transport::http2`).
const TURN: usize = 512 * 1024;

/// How long a peer that was refused may take to close its side, and how much it may send meanwhile: its tickets, or its
/// first requests. Bytes that nobody has read turn the close into a reset, which takes the alert out of its hands.
const REFUSED_LINGER: Duration = Duration::from_secs(1);
/// See [`REFUSED_LINGER`].
const REFUSED_MAX: u64 = 64 * 1024;

/// See the module.
pub struct TlsStream<S> {
    below: S,
    session: Session,
    /// See [`HintedAlert`].
    hint: Option<Arc<str>>,
    /// Bytes received in this turn.
    turn: usize,
    /// Between two turns.
    waiting: Option<AfterDriver>,
}

impl<S> TlsStream<S> {
    /// Over a stream on which nothing but the session's own records follows.
    pub(super) fn new(below: S, session: Session) -> Self {
        Self { below, session, hint: None, turn: 0, waiting: None }
    }

    /// The same; an alert of the peer's comes with `hint`, which is why it may refuse our certificate.
    #[must_use]
    pub(crate) fn hinted(self, hint: Option<Arc<str>>) -> Self {
        Self { hint, ..self }
    }

    /// The stream below.
    pub fn below(&self) -> &S {
        &self.below
    }

    /// Both parts, what was received and not read among them.
    pub fn into_parts(self) -> (S, Session) {
        (self.below, self.session)
    }
}

/// As whoever expects a socket takes it; what the peer said is inside.
fn to_io(why: RecordError, hint: Option<&Arc<str>>) -> io::Error {
    match (why, hint) {
        (RecordError::Alert(alert), Some(hint)) => {
            io::Error::new(io::ErrorKind::InvalidData, HintedAlert { alert, hint: Arc::clone(hint) })
        }
        (RecordError::Alert(alert), None) => io::Error::new(io::ErrorKind::InvalidData, alert),
        (why, _) => io::Error::new(io::ErrorKind::InvalidData, why),
    }
}

impl<S: AsyncWrite + Unpin> TlsStream<S> {
    /// Puts records into the stream below; ready when none is left.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.session.unsent().is_empty() {
            let n = ready!(Pin::new(&mut self.below).poll_write(cx, self.session.unsent()))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.session.sent(n);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    /// Refuses the peer with an alert, and closes the stream below it so that it hears the alert.
    pub async fn refuse(mut self, alert: AlertDescription) {
        self.session.refuse(alert);
        let heard = async {
            // Fails only on a stream that is gone.
            let _gone = self.flush().await;
            let _gone = self.below.shutdown().await;
            let mut rest = (&mut self.below).take(REFUSED_MAX);
            tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
        };
        let _late = timeout(REFUSED_LINGER, heard).await;
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        loop {
            match this.session.advance() {
                Ok(Next::Data) if buf.remaining() == 0 => return Poll::Ready(Ok(())),
                Ok(Next::Data) => {
                    let data = this.session.data();
                    let n = data.len().min(buf.remaining());
                    buf.put_slice(&data[..n]);
                    this.session.taken(n);
                }
                // What is there is not held up by what is still to come.
                Ok(Next::More | Next::End) | Err(_) if buf.filled().len() > before => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Next::End) => return Poll::Ready(Ok(())),
                Ok(Next::More) if this.turn >= TURN => {
                    this.turn = 0;
                    this.waiting = Some(AfterDriver::new(cx));
                    return Poll::Pending;
                }
                Ok(Next::More) if this.waiting.as_ref().is_some_and(|waiting| !waiting.has_passed()) => {
                    return Poll::Pending;
                }
                Ok(Next::More) => {
                    this.waiting = None;
                    let mut room = ReadBuf::new(this.session.room());
                    let read = Pin::new(&mut this.below).poll_read(cx, &mut room);
                    let n = room.filled().len();
                    this.session.received(n);
                    this.turn = if read.is_pending() { 0 } else { this.turn + n };
                    ready!(read)?;
                    if n == 0 {
                        return Poll::Ready(Err(io::Error::new(
                            io::ErrorKind::UnexpectedEof,
                            "the peer closed the connection without ending it (TLS close_notify)",
                        )));
                    }
                }
                Err(why) => {
                    // The alert says why; nobody waits for it.
                    let _told = this.poll_sent(cx);
                    return Poll::Ready(Err(to_io(why, this.hint.as_ref())));
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        loop {
            let n = self.session.write(bufs);
            let n = n.map_err(|why| to_io(why, self.hint.as_ref()))?;
            if n > 0 {
                return Poll::Ready(Ok(n));
            }
            ready!(self.poll_sent(cx))?;
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_sent(cx))?;
        Pin::new(&mut self.below).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = self.session.end();
        ended.map_err(|why| to_io(why, self.hint.as_ref()))?;
        ready!(self.poll_sent(cx))?;
        Pin::new(&mut self.below).poll_shutdown(cx)
    }
}
