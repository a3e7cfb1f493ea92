//! An upstream's connections, by endpoint: which key each has, and which protocol is spoken there.
//!
//! Where both HTTP/2 and HTTP/3 may be spoken there is a pool of each. A flow takes a connection of HTTP/3 where there is one,
//! else one of HTTP/2; where there is neither, HTTP/3 is tried first, if the endpoint has offered it, and then both.
//!
//! # Invariants
//! - The key under which a connection is shared holds all that makes it what it is: endpoint, checks, certificate, and what
//!   it goes through.

use std::{cell::RefCell, pin::pin, ptr, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use super::{
    CheckError, ConnectError,
    alternative::{Alternatives, Chance, HEAD_START, Trial},
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
    config::{Protocol, UpstreamProtocol},
    model::{
        flow::{FarEnd, Identity, Target},
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
    /// Hears what peers offer over HTTP/2, where that is of use.
    alternatives: Option<Rc<Alternatives>>,
    quic: Quic,
}

impl HttpDialer {
    /// Streams whose clients have left go to `abandoned`; see [`outlive`].
    pub(super) fn new(
        protocol: Protocol,
        settings: PoolSettings,
        abandoned: mpsc::UnboundedSender<Abandoned>,
        alternatives: Option<Rc<Alternatives>>,
    ) -> Self {
        let quic = Quic::new(settings.congestion);
        Self { protocol, settings, abandoned, alternatives, quic }
    }
}

impl Connect for HttpDialer {
    type Connection = HttpConnection;

    fn is_shared(&self) -> bool {
        self.protocol != Protocol::H1
    }

    async fn connect(&self, key: &Key) -> Result<HttpConnection, ConnectError> {
        let Self { protocol, settings, abandoned, alternatives, quic } = self;
        match protocol {
            Protocol::H1 => {
                connect(key, *protocol, &settings.connect, H1Handshake).await.map(HttpConnection::H1)
            }
            Protocol::H2 => {
                let handshake = H2Handshake { endpoint: &key.endpoint, settings, abandoned, alternatives };
                let connection = connect(key, *protocol, &settings.connect, handshake).await?;
                Ok(HttpConnection::H2(Box::new(connection)))
            }
            Protocol::H3 => Ok(HttpConnection::H3(Box::new(quic.connect(key, settings).await?))),
        }
    }
}

/// See the module.
pub struct Connector {
    /// The one that the pool speaks.
    protocol: Protocol,
    tls: Option<UpstreamTls>,
    via: Option<Via>,
    settings: PoolSettings,
    pool: Pool<HttpDialer>,
    /// Where HTTP/3 may be spoken instead.
    auto: Option<Auto>,
    /// Waits for the answers of streams whose clients have left, and for connections that no flow waits for.
    tasks: RefCell<JoinSet<()>>,
}

/// The connections of HTTP/3 beside those of HTTP/2.
struct Auto {
    pool: Rc<Pool<HttpDialer>>,
    alternatives: Rc<Alternatives>,
}

impl Auto {
    /// Whether there is a connection that takes one more stream, and that its peer answers on.
    fn has_room(&self, key: &Key) -> bool {
        self.pool.has_room(key) && !self.pool.is_overdue(key)
    }
}

impl Connector {
    /// Nothing is connected yet. In a worker's runtime.
    pub fn new(settings: &UpstreamSettings, via: Option<Via>) -> Self {
        let UpstreamSettings { protocol, tls, pool: settings, .. } = settings;
        let (abandoned, left) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn_local(outlive(left));
        let dialer = |protocol, alternatives: Option<&Rc<Alternatives>>| {
            HttpDialer::new(protocol, settings.clone(), abandoned.clone(), alternatives.cloned())
        };
        let auto = (*protocol == UpstreamProtocol::Auto).then(|| Auto {
            pool: Rc::new(Pool::new(dialer(Protocol::H3, None), settings.clone())),
            alternatives: Rc::default(),
        });
        let first = dialer(protocol.first(), auto.as_ref().map(|auto| &auto.alternatives));
        Self {
            protocol: protocol.first(),
            tls: tls.clone(),
            via,
            settings: settings.clone(),
            pool: Pool::new(first, settings.clone()),
            auto,
            tasks: RefCell::new(tasks),
        }
    }

    /// What it goes through.
    pub fn via(&self) -> Option<&Via> {
        self.via.as_ref()
    }

    /// `identity`: the one that a flow's capture names.
    fn key(&self, site: &Site, identity: Option<&IdentityName>) -> Result<Key, ConnectError> {
        self.key_of(self.protocol, &site.at, &site.named, identity)
    }

    /// The same for HTTP/3, where that may be spoken and the endpoint offers it.
    fn alternative(&self, site: &Site, identity: Option<&IdentityName>) -> Option<(&Auto, Key)> {
        let auto = self.auto.as_ref()?;
        let at = auto.alternatives.at(&site.at)?;
        Some((auto, self.key_of(Protocol::H3, &at, &site.named, identity).ok()?))
    }

    fn key_of(
        &self,
        protocol: Protocol,
        at: &Target,
        named: &Target,
        identity: Option<&IdentityName>,
    ) -> Result<Key, ConnectError> {
        let tls = self.tls.as_ref().map(|tls| {
            let (store, check) = (tls.store_for(identity), &tls.check);
            let ours = store.current().map_err(|e| ConnectError::Identity(e.to_string()))?;
            Ok(TlsKey {
                side: ours.client_side(check, protocol),
                server_name: check.server_name(named),
                check: check.clone(),
                store: Arc::clone(store),
                ours,
            })
        });
        Ok(Key { endpoint: at.clone(), tls: tls.transpose()?, via: self.via.clone() })
    }

    /// Connections opened since the start.
    pub fn opened(&self) -> u64 {
        self.pools().map(Pool::opened).sum()
    }

    /// Its connections, by what they speak.
    pub fn pools(&self) -> impl Iterator<Item = &Pool<HttpDialer>> {
        [Some(&self.pool), self.auto.as_ref().map(|auto| &*auto.pool)].into_iter().flatten()
    }

    /// Of which endpoint one of its pools has connections there: an alternative may be at another port.
    pub fn endpoint_of(&self, pool: &Pool<HttpDialer>, at: &Target) -> Option<Target> {
        let auto = self.auto.as_ref().filter(|auto| ptr::eq(pool, &*auto.pool))?;
        auto.alternatives.endpoint_of(at)
    }

    /// Closes those that are shared; see [`Pool::close`]. Streams that nobody waits for are reset.
    pub async fn close(&self) {
        self.tasks.borrow_mut().abort_all();
        for pool in self.pools() {
            pool.close().await;
        }
    }

    /// Those to an endpoint that is gone get no new flows.
    pub fn forget(&self, site: &Site) {
        self.pool.forget(&site.at);
        if let Some(Auto { pool, alternatives }) = &self.auto
            && let Some(at) = alternatives.forget(&site.at)
        {
            pool.forget(&at);
        }
    }

    /// Whether a flow would not have to wait.
    pub fn has_room(&self, site: &Site, identity: Option<&IdentityName>) -> bool {
        self.alternative(site, identity).is_some_and(|(auto, key)| auto.has_room(&key))
            || self.key(site, identity).is_ok_and(|key| self.pool.has_room(&key))
    }

    /// Whether what is up to an endpoint may be lost.
    pub fn is_overdue(&self, site: &Site, identity: Option<&IdentityName>) -> bool {
        let Ok(key) = self.key(site, identity) else { return false };
        match self.alternative(site, identity) {
            Some((auto, quic)) if auto.has_room(&quic) => false,
            // A flow would have to wait.
            Some((auto, quic)) if auto.pool.is_overdue(&quic) => {
                self.pool.is_overdue(&key) || !self.pool.has_room(&key)
            }
            _ => self.pool.is_overdue(&key),
        }
    }

    /// A connection with a permit for one stream.
    pub async fn checkout(
        &self,
        site: &Site,
        identity: Option<&IdentityName>,
    ) -> Result<Checkout, ConnectError> {
        let key = self.key(site, identity)?;
        let Some((auto, quic)) = self.alternative(site, identity) else {
            return self.pool.checkout(&key).await;
        };
        if auto.has_room(&quic) {
            auto.alternatives.tried(&site.at, true);
            return auto.pool.checkout(&quic).await;
        }
        // One that may be lost makes way when it is.
        let chance = match auto.pool.is_overdue(&quic) {
            true => Chance::None,
            false => auto.alternatives.chance(&site.at, self.pool.has_room(&key)),
        };
        let trial = || Trial::new(&auto.alternatives, &site.at);
        match chance {
            Chance::None => self.pool.checkout(&key).await,
            Chance::Beside => {
                let (pool, trial) = (Rc::clone(&auto.pool), trial());
                {
                    let mut tasks = self.tasks.borrow_mut();
                    while tasks.try_join_next().is_some() {}
                    tasks.spawn_local(async move { trial.ended(&pool.checkout(&quic).await) });
                }
                self.pool.checkout(&key).await
            }
            Chance::First(until) => self.race(auto, trial(), [&quic, &key], until).await,
        }
    }

    /// HTTP/3 first, and from `until` on, or when it fails, HTTP/2 too.
    async fn race(
        &self,
        auto: &Auto,
        trial: Trial,
        [quic, key]: [&Key; 2],
        until: Instant,
    ) -> Result<Checkout, ConnectError> {
        tracing::debug!(endpoint = %key.endpoint, "trying HTTP/3 first");
        let mut over_udp = pin!(auto.pool.checkout(quic));
        let first = timeout_at(until, &mut over_udp).await;
        if let Ok(done) = first {
            trial.ended(&done);
            return match done {
                Ok(checkout) => Ok(checkout),
                Err(_) => self.pool.checkout(key).await,
            };
        }
        let mut over_tcp = pin!(self.pool.checkout(key));
        let why = tokio::select! {
            biased;
            done = &mut over_udp => {
                trial.ended(&done);
                return match done {
                    Ok(checkout) => Ok(checkout),
                    Err(_) => over_tcp.await,
                };
            }
            done = &mut over_tcp => match done {
                Ok(checkout) => {
                    // It is not done yet: what it comes to is used, if it comes to something.
                    trial.failed();
                    return Ok(checkout);
                }
                Err(why) => why,
            },
        };
        // Where UDP is dropped too, it would be waited for as long as a connection may take.
        match timeout(HEAD_START, over_udp).await {
            Ok(done) => {
                trial.ended(&done);
                done.map_err(|_| why)
            }
            Err(_) => {
                trial.failed();
                Err(why)
            }
        }
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
