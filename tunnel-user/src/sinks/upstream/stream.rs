//! A stream through an upstream, whatever it is made of: a leg for the relay, and a byte stream for a connection that goes
//! through it.

use std::{
    mem,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;

use super::permit::StreamPermits;
use crate::{
    identity::standing::EndOfStanding,
    model::flow::{FarEnd, Identity},
    relay::{
        self, Broken, Early, H2Leg, H3Leg, Leg, Meter, Outcome, Path, Queue, TcpLeg, TlsLeg, nested::Nested,
    },
    transport::io::Linger as _,
};

/// How long a peer that we have closed our side to may take to close its own.
pub(super) const LINGER: Duration = Duration::from_secs(1);

/// A stream after its 2xx; over HTTP/1 that is a whole connection.
pub struct Stream {
    /// What the relay moves bytes through.
    pub(super) leg: StreamLeg,
    /// What the target has sent already.
    pub early: Queue,
    /// The endpoint it goes through.
    pub peer: FarEnd,
    /// Who the endpoint has proved to be.
    pub identity: Option<Identity>,
    /// When it is to end because its connection has lost its standing, where flows are not to outlast that.
    pub end: Option<EndOfStanding>,
    /// Held as long as the stream lives.
    pub(super) permits: StreamPermits,
}

/// What a stream is made of. Each kind that carries much has a relay of its own, without a branch in it.
pub(super) enum StreamLeg {
    /// A stream of an HTTP/2 connection.
    H2(H2Leg),
    /// A stream of an HTTP/3 connection.
    H3(Box<H3Leg>),
    /// A socket of ours, in plaintext.
    Tcp(TcpLeg),
    /// A socket of ours, with TLS.
    Tls(Box<TlsLeg<TcpLeg>>),
    /// A whole connection through another upstream, with TLS or without: its bytes have been through HTTP and perhaps TLS
    /// once already. And the stream below it.
    Nested(Box<dyn Leg>, Outer),
}

/// A stream of another upstream, as the byte stream under a connection.
pub type Outer = Nested<Stream>;

impl From<H2Leg> for StreamLeg {
    fn from(leg: H2Leg) -> Self {
        Self::H2(leg)
    }
}

impl From<TcpLeg> for StreamLeg {
    fn from(leg: TcpLeg) -> Self {
        Self::Tcp(leg)
    }
}

impl From<TlsLeg<TcpLeg>> for StreamLeg {
    fn from(leg: TlsLeg<TcpLeg>) -> Self {
        Self::Tls(Box::new(leg))
    }
}

impl From<Outer> for StreamLeg {
    fn from(outer: Outer) -> Self {
        let below = outer.held();
        Self::Nested(Box::new(outer), below)
    }
}

impl From<TlsLeg<Outer>> for StreamLeg {
    fn from(leg: TlsLeg<Outer>) -> Self {
        let below = leg.below().held();
        Self::Nested(Box::new(leg), below)
    }
}

impl Stream {
    /// Its number on its connection, where many share one.
    pub fn number(&self) -> Option<u64> {
        match &self.leg {
            StreamLeg::H2(leg) => Some(leg.id().into()),
            StreamLeg::H3(leg) => Some(leg.id()),
            StreamLeg::Tcp(_) | StreamLeg::Tls(_) | StreamLeg::Nested(..) => None,
        }
    }

    /// Relays between it and a client to the end.
    pub fn relay<'a>(
        &'a mut self,
        client: &'a mut impl Leg,
        early: &'a mut Early,
        meter: &'a Meter,
        path: &'a Path,
    ) -> impl Future<Output = Outcome> + 'a {
        early.received = mem::take(&mut self.early);
        async move {
            match &mut self.leg {
                StreamLeg::H2(leg) => relay::relay(client, leg, early, meter, path).await,
                StreamLeg::H3(leg) => relay::relay(client, &mut **leg, early, meter, path).await,
                StreamLeg::Tcp(leg) => relay::relay(client, leg, early, meter, path).await,
                StreamLeg::Tls(leg) => relay::relay(client, &mut **leg, early, meter, path).await,
                StreamLeg::Nested(leg, below) => {
                    let outcome = relay::relay(client, leg, early, meter, path).await;
                    if let Outcome::Closed = outcome {
                        // TLS inside has said its end before the stream below does, which would be reset if it were dropped
                        // in between. Apart: no other kind of stream waits for that.
                        Box::pin(below.held().linger(LINGER)).await;
                    }
                    outcome
                }
            }
        }
    }

    /// As one leg of any kind.
    fn leg(&mut self) -> &mut dyn Leg {
        match &mut self.leg {
            StreamLeg::H2(leg) => leg,
            StreamLeg::H3(leg) => &mut **leg,
            StreamLeg::Tcp(leg) => leg,
            StreamLeg::Tls(leg) => &mut **leg,
            StreamLeg::Nested(leg, _) => &mut **leg,
        }
    }
}

/// Under another connection, whose bytes are not worth a relay for each kind.
impl Leg for Stream {
    fn prefetches(&self) -> bool {
        matches!(self.leg, StreamLeg::H2(_) | StreamLeg::H3(_))
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        self.leg().poll_recv(cx)
    }

    fn accepted(&mut self, n: usize) {
        self.leg().accepted(n);
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        self.leg().poll_send(cx, queue)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.leg().poll_finish(cx)
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.leg().poll_broken(cx)
    }

    fn unacknowledged(&self) -> u64 {
        match &self.leg {
            StreamLeg::H2(leg) => leg.unacknowledged(),
            StreamLeg::H3(leg) => leg.unacknowledged(),
            StreamLeg::Tcp(leg) => leg.unacknowledged(),
            StreamLeg::Tls(leg) => leg.unacknowledged(),
            StreamLeg::Nested(leg, _) => leg.unacknowledged(),
        }
    }

    fn close(&mut self) {
        self.leg().close();
    }

    fn release(&mut self) {
        self.leg().release();
    }

    fn abort(&mut self) {
        self.leg().abort();
    }
}
