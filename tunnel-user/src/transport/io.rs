//! The byte stream under HTTP, over TCP, another tunnel, or TLS, and its orderly close.
//!
//! # Invariants
//! - A peer's alert is not hidden by the broken pipe that comes with it.
//! - A connection that ended cleanly is closed only once the peer has closed it too.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::{SockRef, Socket};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use super::{record::TlsStream, tcp};

/// A connection of ours: a TCP socket, a stream through another connection, or TLS over either.
pub trait Wire: AsyncRead + AsyncWrite + Unpin + 'static {
    /// What is left of it once the connection on it has gone.
    type Last: Linger;

    /// Readies it to be shared by many streams. What this returns waits for the peer's end, after ours.
    fn share(&self) -> io::Result<Self::Last>;

    /// Ready when the peer resets the connection, or it fails; what has been received can still be read.
    fn failed(&self) -> impl Future<Output = io::Error>;
}

impl Wire for TcpStream {
    type Last = LastReader;

    fn share(&self) -> io::Result<LastReader> {
        tcp::share(self);
        LastReader::new(self)
    }

    async fn failed(&self) -> io::Error {
        tcp::error_of(self).await
    }
}

impl<S: Wire> Wire for TlsStream<S> {
    type Last = S::Last;

    fn share(&self) -> io::Result<S::Last> {
        self.below().share()
    }

    fn failed(&self) -> impl Future<Output = io::Error> {
        self.below().failed()
    }
}

/// Holds a byte stream beyond the connection on it.
pub trait Linger: 'static {
    /// After a clean end, both sides' directions having been shut: reads and drops what still comes, until the peer ends,
    /// for `limit` at most.
    fn linger(self, limit: Duration) -> impl Future<Output = ()>;
}

/// Looks at the first bytes of a connection, which stay where they are, until `judge` has seen enough of them. As many
/// as fit into `start` have to be enough.
pub async fn peek_until<T>(
    stream: &TcpStream,
    start: &mut [u8],
    judge: impl Fn(&[u8]) -> Option<T>,
) -> io::Result<T> {
    loop {
        // Asked first: then everything in front of the end is there to be seen.
        let ended = stream.ready(Interest::READABLE).await?.is_read_closed();
        let n = stream.peek(start).await?;
        if let Some(verdict) = judge(&start[..n]).filter(|_| n > 0) {
            return Ok(verdict);
        }
        if n == 0 || ended {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if n == start.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // More raises a new edge; what has been seen would be reported again and again.
        let _seen = stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
}

/// Reads the peer's alert when writing fails: a peer that refuses our certificate says so and closes, and
/// what we write next fails before we have read why.
pub struct AlertFirst<T> {
    inner: T,
    /// Why writing failed, until the peer's word on it has been looked for.
    failed: Option<io::Error>,
}

impl<T> AlertFirst<T> {
    /// Over a TLS stream.
    pub fn new(inner: T) -> Self {
        Self { inner, failed: None }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AlertFirst<T> {
    fn write<R>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut T>, &mut Context<'_>) -> Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        if self.failed.is_none() {
            match write(Pin::new(&mut self.inner), cx) {
                Poll::Ready(Err(e)) => self.failed = Some(e),
                other => return other,
            }
        }
        let mut scratch = [0; 1024];
        loop {
            let mut buf = ReadBuf::new(&mut scratch);
            // A socket that cannot be written to any more is readable, if only for its error: this does not
            // wait for ever.
            match ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buf)) {
                // Nobody will read what came before the alert: the connection has failed.
                Ok(()) if !buf.filled().is_empty() => {}
                Err(alert) if alert.kind() == io::ErrorKind::InvalidData => return Poll::Ready(Err(alert)),
                _ => {
                    let failed = self.failed.take();
                    return Poll::Ready(Err(failed.unwrap_or_else(|| io::ErrorKind::BrokenPipe.into())));
                }
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for AlertFirst<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for AlertFirst<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, |inner, cx| inner.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, |inner, cx| inner.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |inner, cx| inner.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Holds a connection open beyond the HTTP/2 connection on it.
///
/// Closing a socket that has bytes unread sends RST (RFC 9293 section 3.10.4), and RST takes along what the
/// peer has not read yet: our last DATA frames, for a WINDOW_UPDATE that we did not need any more.
pub struct LastReader(Socket);

impl LastReader {
    /// Of a socket, whatever is spoken over it.
    pub fn new(stream: &TcpStream) -> io::Result<Self> {
        SockRef::from(stream).try_clone().map(Self)
    }
}

impl Linger for LastReader {
    async fn linger(self, limit: Duration) {
        // Fails only on a socket that is gone.
        let Ok(mut stream) = TcpStream::from_std(self.0.into()) else { return };
        let mut scratch = [0; 1024];
        let until_closed = async { while stream.read(&mut scratch).await.is_ok_and(|n| n > 0) {} };
        // The peer does not close: neither do we owe it more.
        let _gave_up = timeout(limit, until_closed).await;
    }
}
