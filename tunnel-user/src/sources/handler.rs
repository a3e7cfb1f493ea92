//! What a source hands over, and to whom: a flow whose request waits for its answer.
//!
//! # Invariants
//! - A request is answered once: [`PendingRequest::accept`] and [`PendingRequest::refuse`] consume it. One that is dropped is
//!   reset.

use std::{
    cell::{Cell, RefCell},
    future::{Future, pending},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, Response, Version};

use super::{
    capture::accept::Stray,
    listener::{accept::ServeError, request::Malformed},
};
use crate::{
    identity::standing::Standing,
    model::{
        flow::{ClientAddr, Identity, PeerAddr, Target},
        names::IdentityName,
    },
    process::{
        books::{Books, Connected},
        drain::Watch,
    },
    relay::{self, Leg, Queue},
};

/// One capture, or one listener, on one worker.
pub struct SourceHandle {
    name: RefCell<Option<Arc<str>>>,
    identity: RefCell<Option<IdentityName>>,
    dial_timeout: Option<Duration>,
    watch: Watch,
    books: Rc<Books>,
}

thread_local! {
    /// Those of a worker, which is a thread.
    static SOURCES: Cell<usize> = const { Cell::new(0) };
}

impl Drop for SourceHandle {
    fn drop(&mut self) {
        SOURCES.set(SOURCES.get() - 1);
    }
}

impl SourceHandle {
    /// `watch`: until when it accepts.
    pub fn new(name: Option<Arc<str>>, dial_timeout: Option<Duration>, watch: Watch) -> Self {
        SOURCES.set(SOURCES.get() + 1);
        let (name, identity) = (RefCell::new(name), RefCell::default());
        Self { name, identity, dial_timeout, watch, books: Rc::default() }
    }

    /// Who we are to upstreams for its flows, where the configuration says so.
    pub fn identity(&self) -> Option<IdentityName> {
        self.identity.borrow().clone()
    }

    /// Changes that.
    pub fn set_identity(&self, identity: Option<IdentityName>) {
        self.identity.replace(identity);
    }

    /// What its own flows use of this worker, where they are of no peer.
    pub fn books(&self) -> &Rc<Books> {
        &self.books
    }

    /// Whether its worker has no other source.
    pub fn is_alone(&self) -> bool {
        SOURCES.get() < 2
    }

    /// The name by which routes match it.
    pub fn name(&self) -> Option<Arc<str>> {
        self.name.borrow().clone()
    }

    /// Changes that name.
    pub fn rename(&self, name: Option<Arc<str>>) {
        self.name.replace(name);
    }

    /// How long a dial for one of its flows may take; `None`: as long as the configuration says for all.
    pub fn dial_timeout(&self) -> Option<Duration> {
        self.dial_timeout
    }

    /// Drains when the source is to stop accepting.
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }
}

/// Carries the flows that sources hand over, and records what else happens there.
pub trait FlowHandler: 'static {
    /// Whose flow it is; for a peer, what is looked up once for all requests on its connection.
    type Client: Clone + 'static;

    /// An application whose connection was captured.
    fn captured(&self, source: &Rc<SourceHandle>, addr: ClientAddr) -> Self::Client;

    /// A peer whose handshake has succeeded, and its connection's place among those of the peer, if there is one.
    fn peer(&self, source: &Rc<SourceHandle>, peer: Peer) -> Result<(Self::Client, Connected), ServeError>;

    /// Carries a flow from its request to its record.
    fn carry<P: PendingRequest>(
        self: Rc<Self>,
        client: Self::Client,
        incoming: Incoming<P>,
    ) -> impl Future<Output = ()> + 'static;

    /// Records something that did not become a flow.
    fn record(&self, event: Event<'_>);
}

/// What happens at a source and is no flow.
pub enum Event<'a> {
    /// A peer has completed its handshake.
    PeerAccepted {
        /// Since its connection was accepted.
        took: Duration,
    },
    /// A peer did not complete its handshake.
    PeerRejected {
        /// Its address.
        peer: PeerAddr,
        /// Why.
        error: &'a ServeError,
    },
    /// A peer's connection was closed because the peer flooded it.
    Flooded {
        /// Its address.
        peer: PeerAddr,
        /// With what.
        error: &'a ServeError,
    },
    /// A connection to a capture listener was reset, because it was not captured.
    Stray(&'a Stray),
    /// A listener has reached its limit of connections: more wait in the backlog.
    ConnectionLimit(usize),
}

/// A peer that has completed its handshake.
#[derive(Debug)]
pub struct Peer {
    /// Its address, or the one in a PROXY header.
    pub client: ClientAddr,
    /// Its verified identity; none without TLS.
    pub identity: Option<Identity>,
    /// The name that it asked for (SNI, RFC 6066 section 3).
    pub server_name: Option<Box<str>>,
    /// What its identity rests on.
    pub standing: Option<Rc<Standing>>,
}

/// A flow, as a source hands it over.
pub struct Incoming<P> {
    /// What it wants to reach.
    pub target: Result<Target, Malformed>,
    /// The CONNECT request that it came with.
    pub head: Option<(Version, HeaderMap)>,
    /// By which it is answered.
    pub request: P,
}

/// Why a request is refused, as HTTP says it.
pub trait Answer {
    /// An answer without a body.
    fn response(&self) -> Response<()>;
}

/// A request that waits for its answer, whatever protocol it came by.
pub trait PendingRequest: 'static {
    /// What the client's bytes go through once it is accepted.
    type Leg: Leg;

    /// What the client sends before the answer, where that may be sent ahead of it.
    fn early_data(&mut self) -> Option<&mut dyn relay::EarlySource> {
        None
    }

    /// Ready when the client has left. Asked only where there is no early data: else that tells.
    fn left(&mut self) -> impl Future<Output = ()> {
        pending()
    }

    /// Answers that the target was reached. What came behind the request is returned too. `None` when the client has left.
    fn accept(self) -> impl Future<Output = Option<(Self::Leg, Queue)>>;

    /// Answers that it is refused.
    fn refuse(self, answer: &impl Answer) -> impl Future<Output = ()>;
}

/// A client that has been told already that it is connected: by the kernel, where its connection was captured, or by an
/// answer that came first because the route depends on what it sends. Refused, it is reset.
pub struct Answered<L>(pub L);

impl<L: Leg + 'static> PendingRequest for Answered<L> {
    type Leg = L;

    fn early_data(&mut self) -> Option<&mut dyn relay::EarlySource> {
        Some(&mut self.0)
    }

    async fn accept(self) -> Option<(L, Queue)> {
        Some((self.0, Queue::default()))
    }

    async fn refuse(mut self, _answer: &impl Answer) {
        self.0.abort();
    }
}
