//! An upstream that is reached through another one (`via`).
//!
//! Enters: an endpoint, and the upstream that leads there. Leaves: a byte stream for a connection to sit on,
//! which is a stream of the other upstream. Invariant: it holds the place that it takes there as long as it
//! lives; who goes through whom has no end in itself, which the configuration has made sure of. It never
//! resolves a name: the far end of the other upstream does.

use std::{
    fmt,
    hash::{Hash, Hasher},
    mem,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{
    TunnelError, h1,
    h2::LINGER,
    headers::Ask,
    open::{Leg, Stream, Upstream},
};
use crate::{
    config::Terms,
    model::flow::Target,
    relay::{self, Broken, Queue, nested::Nested},
};

/// A stream of another upstream, as a byte stream.
pub type Outer = Nested<Stream>;

/// The way through another upstream.
#[derive(Clone)]
pub struct Via(pub Rc<Upstream>);

impl Via {
    /// Opens a stream to an endpoint of another upstream. Many flows will share what is spoken on it, so none of
    /// their clients is named.
    pub async fn open(&self, endpoint: &Target) -> Result<Outer, TunnelError> {
        // Nothing was received, so there is no `via` to stand in.
        let (terms, pseudonym) = (&Terms::default(), "");
        let ask = Ask { target: endpoint, instead: None, client: None, received: None, pseudonym, terms };
        let mut stream = self.0.connect(&ask, None).await?;
        let early = mem::take(&mut stream.early);
        Ok(Nested::new(stream, early))
    }
}

impl PartialEq for Via {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Via {}

impl Hash for Via {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Rc::as_ptr(&self.0).hash(state);
    }
}

impl fmt::Debug for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Via").field(&self.0.name()).finish()
    }
}

impl Stream {
    /// After a relay that closed cleanly: waits for a second at most until the stream of the other upstream has ended too.
    /// TLS inside has said its end before that stream does, which would be reset if it were dropped in between.
    pub async fn linger(&self) {
        let outer = match &self.leg {
            Leg::H1(h1::Leg::Nested(outer)) => outer.held(),
            Leg::H1(h1::Leg::NestedTls(tls)) => tls.below().held(),
            Leg::H2(_) | Leg::H1(h1::Leg::Tcp(_) | h1::Leg::Tls(_)) => return,
        };
        outer.linger(LINGER).await;
    }
}

/// Calls a method of whatever kind of leg a stream has.
macro_rules! of_leg {
    ($stream:expr, $leg:ident => $call:expr) => {
        match $stream {
            Leg::H2($leg) => $call,
            Leg::H1(h1::Leg::Tcp($leg)) => $call,
            Leg::H1(h1::Leg::Tls($leg)) => $call,
            Leg::H1(h1::Leg::Nested($leg)) => $call,
            Leg::H1(h1::Leg::NestedTls($leg)) => $call,
        }
    };
}

/// Of any kind, where the kind is not worth a relay of its own.
impl relay::Leg for Stream {
    const PREFETCH: bool = false;

    fn may_prefetch(&self) -> bool {
        matches!(self.leg, Leg::H2(_))
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        of_leg!(&mut self.leg, leg => leg.poll_recv(cx))
    }

    fn accepted(&mut self, n: usize) {
        of_leg!(&mut self.leg, leg => leg.accepted(n));
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        of_leg!(&mut self.leg, leg => leg.poll_send(cx, queue))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        of_leg!(&mut self.leg, leg => leg.poll_finish(cx))
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        of_leg!(&mut self.leg, leg => leg.poll_broken(cx))
    }

    fn unacknowledged(&self) -> u64 {
        of_leg!(&self.leg, leg => leg.unacknowledged())
    }

    fn close(&mut self) {
        of_leg!(&mut self.leg, leg => leg.close());
    }

    fn release(&mut self) {
        of_leg!(&mut self.leg, leg => leg.release());
    }

    fn abort(&mut self) {
        of_leg!(&mut self.leg, leg => leg.abort());
    }
}
