//! The seam between an upstream and the protocol that it speaks: a connection, as the pool and the upstream see it.
//!
//! HTTP/1 ([`h1`](super::h1)) and HTTP/2 ([`h2`](super::h2)) implement it over whatever byte stream they are given: a
//! socket, or a stream of another upstream, with TLS or without. The pool knows no more of a connection than this, so that
//! another protocol is added without a change to it.

use std::time::{Duration, Instant};

use http::{Request, StatusCode};

use super::{ConnectError, connect::Key, permit::StreamPermits, stream::Stream};
use crate::{
    model::flow::{FarEnd, Identity},
    relay::Ahead,
};

/// A connection to an endpoint, on which the endpoint has proved who it is.
pub trait Connection: 'static {
    /// The far end.
    fn peer(&self) -> &FarEnd;

    /// Who it has proved to be; nobody without TLS.
    fn identity(&self) -> Option<&Identity>;

    /// When what it is spoken on was connected, before any handshake, where that is known.
    fn connected(&self) -> Option<Instant> {
        None
    }

    /// Streams that it may carry at once, by our limit and the peer's, those that are open included. None once it drains,
    /// or has ended.
    fn max_streams(&self) -> usize;

    /// Whether it is up and its peer allows no streams, which it may do later.
    fn is_barred(&self) -> bool;

    /// Whether its peer has not answered for a while, and may be gone: other connections are to be preferred.
    fn is_overdue(&self) -> bool;

    /// Opens a stream. Dropped before the answer, it may leave the request to the connection, which then holds the
    /// permits until the stream has ended for the peer too.
    fn open(
        &self,
        request: OpenRequest<'_, '_>,
        permits: StreamPermits,
    ) -> impl Future<Output = Result<Stream, OpenError>>;

    /// Ready when the peer has answered, asked now. The caller bounds the time.
    fn ping(&self) -> impl Future<Output = Result<(), String>>;

    /// Takes no new streams. Those whose permits are out may still be opened, and all go on to their ends.
    fn drain(&self);

    /// Ends once what its streams have handed over is on the wire. No stream is opened any more.
    fn close(&self);

    /// Ready when it is to take no new streams, because a certificate of either side is not what new connections are made with
    /// or is not valid any more. Never without TLS.
    fn retired(&self) -> impl Future<Output = ()>;

    /// Runs a shared connection to its end, which includes waiting for the peer's. `grew` is called when it takes more
    /// streams than before. It is called once; dropped, it ends the connection at once.
    fn run(&self, grew: &dyn Fn()) -> impl Future<Output = ()>;

    /// Why it was lost, if it was.
    fn lost(&self) -> Option<String>;
}

/// What makes connections for a pool.
pub trait Connect: 'static {
    /// What it makes.
    type Connection: Connection;

    /// Whether a connection carries many streams, and stays in the pool; otherwise each stream has one of its own.
    fn is_shared(&self) -> bool;

    /// Makes a connection, on which the peer has answered. It bounds the time by itself.
    fn connect(&self, key: &Key) -> impl Future<Output = Result<Self::Connection, ConnectError>>;
}

/// A CONNECT request, and how it is to be made.
pub struct OpenRequest<'a, 'c> {
    /// The request.
    pub head: Request<()>,
    /// How long the answer may take: the far end dials in this time.
    pub timeout: Duration,
    /// What the client sends meanwhile, where it may go ahead of the answer.
    pub ahead: Option<&'a Ahead<'c>>,
    /// Whether the request is made again elsewhere if this connection seems to be lost, and nothing was carried on it.
    pub may_retry: bool,
}

/// Why a stream was not opened.
#[derive(Debug)]
pub enum OpenError {
    /// The peer has surely not acted on the request: it may be made again.
    NotProcessed(String),
    /// The peer has answered with something else than 2xx.
    Refused {
        /// The status.
        status: StatusCode,
        /// Its `proxy-status` (RFC 9209).
        detail: Option<String>,
    },
    /// There was no answer in time.
    Timeout,
    /// The stream or its connection broke before the answer: the peer may have acted on the request.
    Dropped(String),
}
