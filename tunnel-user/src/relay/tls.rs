//! A TLS connection of its own as a leg: the tunnel is what remains of an HTTP/1 connection after its 200.
//!
//! Enters: a connection whose handshake is done. Leaves: records. Invariant: close_notify is the end of one
//! direction, as FIN is, and a connection that ends without it was cut off: a reset (RFC 8446 section 6.1).
//! Bytes count as sent once their records are in the socket. Closed before both directions ended, it sends
//! RST. An idle leg holds no buffer but rustls's.

use std::{
    io::{self, BufRead as _, IoSlice, Read, Write},
    net::Shutdown,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use rustls::Connection;
use socket2::SockRef;
use tokio::net::TcpStream;

use super::{
    Broken, Cause, Leg, Queue,
    tcp::{ErrorWatch, READ_MAX, abort_on_close, reset},
};
use crate::transport::verify::explain;

/// See the module.
pub struct TlsLeg {
    stream: Rc<TcpStream>,
    session: Connection,
    /// Bytes at the front of the queue whose records are on their way into the socket.
    sealed: usize,
    /// close_notify is among the records.
    finishing: bool,
    error: ErrorWatch,
}

impl TlsLeg {
    /// Takes over a connection, and what its session has received already.
    pub fn new(stream: TcpStream, session: impl Into<Connection>) -> Self {
        abort_on_close(&stream);
        let session = session.into();
        Self { stream: Rc::new(stream), session, sealed: 0, finishing: false, error: ErrorWatch::default() }
    }

    /// What the session has decrypted; `None` when it has nothing yet.
    fn decrypted(&mut self) -> Option<Result<Option<Bytes>, Broken>> {
        let mut out = BytesMut::new();
        while out.len() < READ_MAX {
            let mut reader = self.session.reader();
            let n = match reader.fill_buf() {
                Ok([]) if out.is_empty() => return Some(Ok(None)),
                Ok([]) => break,
                Ok(chunk) => {
                    let n = chunk.len().min(READ_MAX - out.len());
                    out.extend_from_slice(&chunk[..n]);
                    n
                }
                // What is there comes first; this comes again.
                Err(_) if !out.is_empty() => break,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
                Err(e) => return Some(Err(reset(e))),
            };
            reader.consume(n);
        }
        Some(Ok(Some(out.freeze())))
    }

    /// Puts records into the socket; ready when none is left.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while self.session.wants_write() {
            ready!(self.stream.poll_write_ready(cx)).map_err(reset)?;
            match self.session.write_tls(&mut Socket(&self.stream)) {
                Ok(0) => return Poll::Ready(Err(reset(io::ErrorKind::WriteZero.into()))),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Poll::Ready(Err(reset(e))),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The socket as rustls wants it.
struct Socket<'s>(&'s TcpStream);

impl Read for Socket<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buf)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.try_write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Leg for TlsLeg {
    const PREFETCH: bool = false;

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            if let Some(received) = self.decrypted() {
                return Poll::Ready(received);
            }
            ready!(self.stream.poll_read_ready(cx)).map_err(reset)?;
            match self.session.read_tls(&mut Socket(&self.stream)) {
                // The end is in the records too, or else the session says that it was not.
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Poll::Ready(Err(reset(e))),
            }
            let processed = self.session.process_new_packets();
            if self.session.wants_write() {
                // An alert, or the answer to a new key, neither of which anybody waits for.
                let _later = self.session.write_tls(&mut Socket(&self.stream));
            }
            if let Err(e) = processed {
                return Poll::Ready(Err(Broken::Reset(Cause::Connection(explain(&e)))));
            }
        }
    }

    fn accepted(&mut self, _n: usize) {
        // The kernel's window follows what was read, and nothing is read ahead.
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        // They stay in the queue meanwhile: nobody else would ask for the rest of their records.
        while self.sealed == 0 {
            ready!(self.poll_flush(cx))?;
            self.sealed =
                queue.with_slices(|slices| self.session.writer().write_vectored(slices)).map_err(reset)?;
        }
        ready!(self.poll_flush(cx))?;
        let n = std::mem::take(&mut self.sealed);
        queue.advance(n);
        Poll::Ready(Ok(n))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if !self.finishing {
            self.session.send_close_notify();
            self.finishing = true;
        }
        ready!(self.poll_flush(cx))?;
        Poll::Ready(match SockRef::from(&*self.stream).shutdown(Shutdown::Write) {
            // The peer closed both directions, and then the connection went away: nothing is lost.
            Err(e) if e.kind() != io::ErrorKind::NotConnected => Err(reset(e)),
            _ => Ok(()),
        })
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.error.poll(cx, &self.stream)
    }

    fn close(&mut self) {
        // What is queued still has to arrive. Fails only on a socket that is gone already.
        let _gone = SockRef::from(&*self.stream).set_linger(None);
    }

    fn abort(&mut self) {
        // The drop does it.
    }
}
