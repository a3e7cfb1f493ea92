//! Whose flow it is, and what the configuration in force says of them.
//!
//! # Invariants
//! - A captured application is the operator's own: no policy is asked. A peer of a listener reaches what its permit allows.

use std::{cell::RefCell, net::IpAddr, rc::Rc};

use super::{Proxy, Setup, reach::FlowRequest, refusal::Refusal};
use crate::{
    identity::standing::{EndOfStanding, Standing},
    model::{
        flow::{ClientAddr, Direction, Head, Identity, SourceKind, Target, Transport},
        names::IdentityName,
    },
    observe::{marks::Marks, stats::Record},
    process::books::Books,
    routing::{
        flow::Flow,
        index::{NOBODY, PeerSet},
        policy,
    },
    sources::{Peer, SourceHandle},
};

/// Whose flow it is.
#[derive(Clone)]
pub enum Client {
    /// An application on this node.
    Application {
        /// The capture.
        source: Rc<SourceHandle>,
        /// Its address.
        addr: ClientAddr,
    },
    /// The peer of a connection to a listener.
    Peer(Rc<KnownPeer>),
}

/// A peer, for all requests on its connection.
pub struct KnownPeer {
    source: Rc<SourceHandle>,
    peer: Peer,
    context: RefCell<Rc<PeerContext>>,
    books: Rc<Books>,
}

/// What one configuration says of a peer: looked up once for all its requests.
pub(super) struct PeerContext {
    setup: Rc<Setup>,
    routes: PeerSet,
    policies: policy::Peer,
}

/// What the configuration in force says of a client.
pub(super) enum Context {
    Application(Rc<Setup>),
    Peer(Rc<PeerContext>),
}

/// Whose flows are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Account {
    /// Those of an identity.
    Identity(Identity),
    /// Those from an address, without an identity.
    Address(IpAddr),
}

impl Account {
    /// An identity's, or where there is none, an address's.
    pub(super) fn of(identity: Option<&Identity>, client: ClientAddr) -> Self {
        identity.cloned().map_or(Self::Address(client.0.ip().to_canonical()), Self::Identity)
    }
}

impl PeerContext {
    fn new(setup: Rc<Setup>, identity: Option<&Identity>) -> Rc<Self> {
        let routes = setup.shared.router.peer(identity);
        let policies = setup.shared.policies.peer(identity.cloned());
        Rc::new(Self { setup, routes, policies })
    }
}

impl Context {
    pub(super) fn setup(&self) -> &Setup {
        match self {
            Self::Application(setup) => setup,
            Self::Peer(context) => &context.setup,
        }
    }
}

impl Client {
    /// A peer that has completed its handshake.
    pub(super) fn new_peer(source: Rc<SourceHandle>, peer: Peer, setup: Rc<Setup>, books: Rc<Books>) -> Self {
        let context = RefCell::new(PeerContext::new(setup, peer.identity.as_ref()));
        Self::Peer(Rc::new(KnownPeer { source, peer, context, books }))
    }

    pub(super) fn source(&self) -> &SourceHandle {
        match self {
            Self::Application { source, .. } => source,
            Self::Peer(known) => &known.source,
        }
    }

    pub(super) fn addr(&self) -> ClientAddr {
        match self {
            Self::Application { addr, .. } => *addr,
            Self::Peer(known) => known.peer.client,
        }
    }

    pub(super) fn identity(&self) -> Option<&Identity> {
        match self {
            Self::Application { .. } => None,
            Self::Peer(known) => known.peer.identity.as_ref(),
        }
    }

    /// What its peer uses of this worker, or its capture: an application is the operator's own.
    pub(super) fn books(&self) -> &Rc<Books> {
        match self {
            Self::Application { source, .. } => source.books(),
            Self::Peer(known) => &known.books,
        }
    }

    /// Whether it is an application on this node.
    pub(super) const fn is_application(&self) -> bool {
        matches!(self, Self::Application { .. })
    }

    /// A record of a flow that got nowhere, to be filled in.
    pub(super) fn record(&self, target: &Target) -> Record {
        let mut record = Record::new(target, self.addr());
        record.source = self.source().name();
        record.identity = self.identity().cloned();
        record.client_identity.clone_from(&record.identity);
        if !self.is_application() {
            record.kind = SourceKind::Listener;
        }
        record
    }

    /// What the configuration in force says of it.
    pub(super) fn context(&self, proxy: &Proxy) -> Context {
        match self {
            Self::Application { .. } => Context::Application(proxy.setup()),
            Self::Peer(known) => {
                if !Rc::ptr_eq(&known.context.borrow().setup, &proxy.setup()) {
                    known.context.replace(PeerContext::new(proxy.setup(), self.identity()));
                }
                Context::Peer(Rc::clone(&known.context.borrow()))
            }
        }
    }

    /// When its flows are to end because its connection has lost its standing, where they are not to outlast that.
    pub(super) fn end_of_flows(&self) -> Option<EndOfStanding> {
        match self {
            Self::Application { .. } => None,
            Self::Peer(known) => known.peer.standing.as_ref().and_then(Standing::end_of_flows),
        }
    }

    /// Policy's word on what it asks for. `name` and `identity`: those of its source.
    pub(super) fn request<'a>(
        &'a self,
        context: &'a Context,
        name: Option<&'a str>,
        identity: Option<&'a IdentityName>,
        target: &'a Target,
        head: Option<Head<'a>>,
        marks: &'a Marks,
    ) -> Result<FlowRequest<'a>, Refusal> {
        let setup = context.setup();
        let (source, direction, peer, permit) = match context {
            Context::Application(_) => (SourceKind::Capture, Direction::Outbound, &NOBODY, None),
            Context::Peer(context) => {
                let permit = setup.shared.policies.check_target(&context.policies, target);
                let permit = permit.map_err(|denied| Refusal::Denied(denied.to_string()))?;
                (SourceKind::Listener, Direction::Inbound, &context.routes, Some(permit))
            }
        };
        let server_name = match self {
            Self::Application { .. } => None,
            Self::Peer(known) => known.peer.server_name.as_deref(),
        };
        let flow = Flow {
            transport: Transport::Tcp,
            direction,
            source,
            name,
            target,
            client: self.addr(),
            identity: self.identity(),
            peer,
            server_name,
            request: head,
            sniffed: None,
        };
        let dial_timeout = self.source().dial_timeout().unwrap_or(setup.shared.dial_timeout);
        Ok(FlowRequest { setup, flow, permit, dial_timeout, identity, marks })
    }
}
