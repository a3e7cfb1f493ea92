//! An upstream's connections, by endpoint: which key each has, and which protocol is spoken there.
//!
//! # Invariants
//! - The key under which a connection is shared holds all that makes it what it is: endpoint, checks, certificate, and what
//!   it goes through.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinSet, time::Instant};

use super::{
    CheckError, ConnectError,
    connect::{Key, TlsKey, connect},
    connection::{Connect, Connection, OpenError, OpenRequest},
    discovery::Site,
    h1::{H1Connection, H1Handshake},
    h2::{Abandoned, H2Connection, H2Handshake, outlive},
    h3::{H3Connection, Quic},
    permit::StreamPermits,
    pool::{self, Pool},
    settings::{PoolSettings, UpstreamSettings, UpstreamTls},
    stream::Stream,
    underlay::Via,
};
use crate::{
    config::Protocol,
    model::{
        flow::{FarEnd, Identity},
        names::IdentityName,
    },
    sinks::dial::DialError,
    transport::tcp::FirstSpeaker,
};

/// The connections that there are.
pub enum HttpConnection {
    /// HTTP/1: one stream each.
    H1(H1Connection),
    /// HTTP/2.
    H2(Box<H2Connection>),
    /// HTTP/3.
    H3(Box<H3Connection>),
}

/// A connection, and a permit for one stream on it.
pub type Checkout = pool::Checkout<HttpConnection>;

/// Calls a method of whatever a connection speaks.
macro_rules! of_kind {
    ($self:expr, $c:ident => $call:expr) => {
        match $self {
            HttpConnection::H1($c) => $call,
            HttpConnection::H2($c) => $call,
            HttpConnection::H3($c) => $call,
        }
    };
}

impl Connection for HttpConnection {
    fn peer(&self) -> &FarEnd {
        of_kind!(self, c => c.peer())
    }

    fn identity(&self) -> Option<&Identity> {
        of_kind!(self, c => c.identity())
    }

    fn connected(&self) -> Option<std::time::Instant> {
        of_kind!(self, c => c.connected())
    }

    fn max_streams(&self) -> usize {
        of_kind!(self, c => c.max_streams())
    }

    fn is_barred(&self) -> bool {
        of_kind!(self, c => c.is_barred())
    }

    fn is_overdue(&self) -> bool {
        of_kind!(self, c => c.is_overdue())
    }

    async fn open(&self, request: OpenRequest<'_, '_>, permits: StreamPermits) -> Result<Stream, OpenError> {
        of_kind!(self, c => c.open(request, permits).await)
    }

    async fn ping(&self) -> Result<(), String> {
        of_kind!(self, c => c.ping().await)
    }

    fn drain(&self) {
        of_kind!(self, c => c.drain());
    }

    fn close(&self) {
        of_kind!(self, c => c.close());
    }

    async fn retired(&self) {
        of_kind!(self, c => c.retired().await);
    }

    async fn run(&self, grew: &dyn Fn()) {
        of_kind!(self, c => c.run(grew).await);
    }

    fn lost(&self) -> Option<String> {
        of_kind!(self, c => c.lost())
    }
}

/// Makes connections of one protocol.
pub struct HttpDialer {
    protocol: Protocol,
    settings: PoolSettings,
    abandoned: mpsc::UnboundedSender<Abandoned>,
    quic: Quic,
}

impl HttpDialer {
    /// Streams whose clients have left go to `abandoned`; see [`outlive`].
    pub(super) fn new(
        protocol: Protocol,
        settings: PoolSettings,
        abandoned: mpsc::UnboundedSender<Abandoned>,
    ) -> Self {
        let quic = Quic::new(settings.congestion);
        Self { protocol, settings, abandoned, quic }
    }
}

impl Connect for HttpDialer {
    type Connection = HttpConnection;

    fn is_shared(&self) -> bool {
        self.protocol != Protocol::H1
    }

    async fn connect(&self, key: &Key) -> Result<HttpConnection, ConnectError> {
        let Self { protocol, settings, abandoned, quic } = self;
        match protocol {
            Protocol::H1 => {
                connect(key, *protocol, &settings.connect, H1Handshake).await.map(HttpConnection::H1)
            }
            Protocol::H2 => {
                let handshake = H2Handshake { endpoint: &key.endpoint, settings, abandoned };
                let connection = connect(key, *protocol, &settings.connect, handshake).await?;
                Ok(HttpConnection::H2(Box::new(connection)))
            }
            Protocol::H3 => Ok(HttpConnection::H3(Box::new(quic.connect(key, settings).await?))),
        }
    }
}

/// See the module.
pub struct Connector {
    protocol: Protocol,
    tls: Option<UpstreamTls>,
    via: Option<Via>,
    settings: PoolSettings,
    pool: Pool<HttpDialer>,
    /// Waits for the answers of streams whose clients have left.
    tasks: RefCell<JoinSet<()>>,
}

impl Connector {
    /// Nothing is connected yet. In a worker's runtime.
    pub fn new(settings: &UpstreamSettings, via: Option<Via>) -> Self {
        let UpstreamSettings { protocol, tls, pool: settings, .. } = settings;
        let (abandoned, left) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn_local(outlive(left));
        let dialer = HttpDialer::new(*protocol, settings.clone(), abandoned);
        Self {
            protocol: *protocol,
            tls: tls.clone(),
            via,
            settings: settings.clone(),
            pool: Pool::new(dialer, settings.clone()),
            tasks: RefCell::new(tasks),
        }
    }

    /// What it goes through.
    pub fn via(&self) -> Option<&Via> {
        self.via.as_ref()
    }

    /// `identity`: the one that a flow's capture names.
    fn key(&self, site: &Site, identity: Option<&IdentityName>) -> Result<Key, ConnectError> {
        let tls = self.tls.as_ref().map(|tls| {
            let (store, check) = (tls.store_for(identity), &tls.check);
            let ours = store.current().map_err(|e| ConnectError::Identity(e.to_string()))?;
            Ok(TlsKey {
                side: ours.client_side(check, self.protocol),
                server_name: check.server_name(&site.named),
                check: check.clone(),
                store: Arc::clone(store),
                ours,
            })
        });
        Ok(Key { endpoint: site.at.clone(), tls: tls.transpose()?, via: self.via.clone() })
    }

    /// Connections opened since the start.
    pub fn opened(&self) -> u64 {
        self.pool.opened()
    }

    /// Its connections.
    pub fn pool(&self) -> &Pool<HttpDialer> {
        &self.pool
    }

    /// Closes those that are shared; see [`Pool::close`]. Streams that nobody waits for are reset.
    pub async fn close(&self) {
        self.tasks.borrow_mut().abort_all();
        self.pool.close().await;
    }

    /// Those to an endpoint that is gone get no new flows.
    pub fn forget(&self, site: &Site) {
        self.pool.forget(&site.at);
    }

    /// Whether a flow would not have to wait.
    pub fn has_room(&self, site: &Site, identity: Option<&IdentityName>) -> bool {
        self.key(site, identity).is_ok_and(|key| self.pool.has_room(&key))
    }

    /// Whether what is up to an endpoint may be lost.
    pub fn is_overdue(&self, site: &Site, identity: Option<&IdentityName>) -> bool {
        self.key(site, identity).is_ok_and(|key| self.pool.is_overdue(&key))
    }

    /// A connection with a permit for one stream.
    pub async fn checkout(
        &self,
        site: &Site,
        identity: Option<&IdentityName>,
    ) -> Result<Checkout, ConnectError> {
        self.pool.checkout(&self.key(site, identity)?).await
    }

    /// Whether a connection can be made there, as for an ejected endpoint; it stays in the pool, if there is one.
    pub async fn probe(&self, site: &Site) -> Result<(), ConnectError> {
        self.pool.probe(&self.key(site, None)?).await
    }

    /// Whether TCP connects there: from here, or from the far end of the upstream that it goes through.
    pub async fn reach(&self, site: &Site, allowed: Duration) -> Result<(), CheckError> {
        if let Some(via) = &self.via {
            let opened = via.open(&site.at).await;
            return Ok(opened.map(drop).map_err(|e| ConnectError::Outer(Rc::new(e)))?);
        }
        let failed = |e: DialError| CheckError::Failed(e.to_string());
        let (dialer, first) = (&self.settings.connect.dialer, FirstSpeaker::Unknown);
        let addrs = dialer.resolve(&site.at).await.map_err(failed)?;
        let deadline = Instant::now() + allowed;
        let connected = dialer.connect(&site.at, &addrs, first, deadline, allowed).await;
        connected.map(drop).map_err(failed)
    }

    /// Whether a peer there answers a PING, on a connection as flows have it.
    pub async fn ping(&self, site: &Site) -> Result<(), CheckError> {
        let checkout = self.checkout(site, None).await?;
        checkout.connection().ping().await.map_err(CheckError::Failed)
    }
}
