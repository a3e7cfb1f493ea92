//! TLS over another leg: an HTTP/1 tunnel whose connection is itself a stream of another tunnel.
//!
//! Enters: a leg, and a session whose handshake was done over it. Leaves: records, through that leg. Invariant:
//! ends are those of TLS over a socket (`tls.rs`): close_notify is the end of one direction, and a stream that
//! ends without it was cut off; what breaks the leg below breaks this one in the same way. It holds what one
//! read of the leg below gave it, and what rustls holds; the rest stays in that leg's window. Its tests are those of
//! `tls.rs`.

use std::{
    io::{self, Read as _},
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use rustls::Connection;

use super::{Broken, Cause, Leg, Queue, tcp::reset, tls::decrypted};
use crate::transport::verify::explain;

/// See the module.
pub struct TlsOver<L> {
    below: L,
    session: Connection,
    /// What has come from below and was not given to the session yet: it takes no more than it has room for.
    received: Bytes,
    /// Records on their way down. The session's own limit bounds them: 64 KiB of plaintext
    /// (`Connection::set_buffer_limit`).
    records: Queue,
    /// Bytes at the front of the caller's queue that are among the records.
    sealed: usize,
    /// close_notify is among the records.
    finishing: bool,
}

impl<L: Leg> TlsOver<L> {
    /// Takes over a connection, and what its session has received already.
    pub fn new(below: L, session: impl Into<Connection>) -> Self {
        Self {
            below,
            session: session.into(),
            received: Bytes::new(),
            records: Queue::default(),
            sealed: 0,
            finishing: false,
        }
    }

    /// Hands records down; ready when none is left.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            while self.session.wants_write() {
                let mut record = Vec::new();
                // A Vec takes everything.
                self.session.write_tls(&mut record).map_err(reset)?;
                self.records.push(record.into());
            }
            if self.records.is_empty() {
                return Poll::Ready(Ok(()));
            }
            ready!(self.below.poll_send(cx, &mut self.records))?;
        }
    }

    /// Gives the session what has come, or the end.
    fn feed(&mut self, mut chunk: &[u8]) -> Result<usize, Broken> {
        let taken = self.session.read_tls(&mut chunk.by_ref()).map_err(reset)?;
        let processed = self.session.process_new_packets();
        processed.map_err(|e| Broken::Reset(Cause::Connection(explain(&e))))?;
        Ok(taken)
    }
}

impl<L: Leg> Leg for TlsOver<L> {
    const PREFETCH: bool = false;

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            if let Some(received) = decrypted(&mut self.session) {
                return Poll::Ready(received);
            }
            if self.received.is_empty() {
                match ready!(self.below.poll_recv(cx))? {
                    Some(chunk) => self.received = chunk,
                    // The end is in the records too, or else the session says that it was not.
                    None => {
                        self.feed(&[])?;
                        continue;
                    }
                }
            }
            let chunk = self.received.clone();
            let fed = self.feed(&chunk);
            if self.session.wants_write() {
                // An alert, or the answer to a new key, neither of which anybody waits for.
                let _later = self.poll_flush(cx);
            }
            let taken = fed?;
            self.received.advance(taken);
            self.below.accepted(taken);
        }
    }

    fn accepted(&mut self, _n: usize) {
        // The window below follows what the session has taken, which is no more than it has room for.
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        // They stay in the queue meanwhile: nobody else would ask for the rest of their records.
        while self.sealed == 0 {
            ready!(self.poll_flush(cx))?;
            let sealed =
                queue.with_slices(|slices| io::Write::write_vectored(&mut self.session.writer(), slices));
            self.sealed = sealed.map_err(reset)?;
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
        self.below.poll_finish(cx)
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.below.poll_broken(cx)
    }

    fn close(&mut self) {
        self.below.close();
    }

    fn abort(&mut self) {
        self.below.abort();
    }
}
