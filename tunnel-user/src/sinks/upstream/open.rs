//! An upstream: how a stream is opened through it.
//!
//! # Invariants
//! - Another endpoint, or another connection, is tried only while the peer cannot have acted on the request; what a peer has
//!   answered is never tried again here.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    mem,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use tokio::{task::JoinSet, time::timeout};

use super::{
    ConnectError, TunnelError,
    connection::{Connection as _, OpenError, OpenRequest},
    connector::{Checkout, Connector},
    discovery::{EndpointSet, EndpointSource, Feed},
    endpoints::{Endpoint, Endpoints, Unavailable},
    headers::{Ask, connect_request},
    health::Health,
    limit::Limited,
    permit::{Count, Permit},
    pick,
    report::{EndpointReport, UpstreamReport, UpstreamTotals},
    settings::UpstreamSettings,
    stream::{Outer, Stream},
    underlay::{Underlay, Via},
};
use crate::{
    config::Terms,
    model::{
        flow::{FarEnd, Target},
        names::IdentityName,
    },
    relay::{Ahead, nested::Nested},
};

/// How often a request that was surely not acted on is sent again on another connection: GOAWAY
/// (RFC 9113 section 6.8) and REFUSED_STREAM (section 8.7) say so.
const RETRIES: u32 = 3;

/// One upstream on one worker.
pub struct Upstream {
    settings: UpstreamSettings,
    /// Its name, as every record of a flow has it.
    name: Arc<str>,
    /// Its name in errors, with those that it goes through.
    path: String,
    connector: Rc<Connector>,
    endpoints: Rc<Endpoints>,
    health: Rc<Health>,
    next: Cell<usize>,
    streams: Count,
    pending: Count,
    opened: Cell<u64>,
    failed: Cell<u64>,
    /// What hears of endpoints that come and go.
    tasks: RefCell<JoinSet<()>>,
}

impl Upstream {
    /// Nothing is connected until a flow needs it, or a check. `via` is the upstream that the settings speak of.
    pub fn new(settings: UpstreamSettings, via: Option<Via>) -> Self {
        let path = match &via {
            None => settings.name.clone(),
            Some(via) => format!("{} via {}", settings.name, via.path()),
        };
        let connector = Rc::new(Connector::new(&settings, via));
        let endpoints = Rc::new(Endpoints::default());
        let UpstreamSettings { name, outlier, check, .. } = &settings;
        let (of_connector, of_endpoints) = (Rc::clone(&connector), Rc::clone(&endpoints));
        let health = Health::new(name, outlier.clone(), check.clone(), of_connector, of_endpoints);
        let health = Rc::new(health);
        let mut tasks = JoinSet::new();
        match settings.endpoints.clone() {
            EndpointSource::Fixed(sites) => {
                let known = EndpointSet::new(sites.iter().cloned(), String::new());
                take(&known, &connector, &endpoints, &health);
            }
            EndpointSource::Fed(mut feed) => {
                if let Some(known) = feed.now() {
                    take(&known, &connector, &endpoints, &health);
                }
                let (connector, endpoints, health) =
                    (Rc::clone(&connector), Rc::clone(&endpoints), Rc::clone(&health));
                tasks.spawn_local(follow(feed, connector, endpoints, health));
            }
        }
        Self {
            name: settings.name.as_str().into(),
            path,
            connector,
            endpoints,
            health,
            settings,
            next: Cell::default(),
            streams: Count::default(),
            pending: Count::default(),
            opened: Cell::default(),
            failed: Cell::default(),
            tasks: RefCell::new(tasks),
        }
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Connections opened since the start.
    pub fn connections_opened(&self) -> u64 {
        self.connector.opened()
    }

    /// What it does at this moment.
    pub fn report(&self) -> UpstreamReport {
        let mut report = UpstreamReport {
            path: self.path.clone(),
            totals: UpstreamTotals {
                streams_opened: self.opened.get(),
                streams_failed: self.failed.get(),
                ejections: self.endpoints.ejections(),
                ..UpstreamTotals::default()
            },
            ..UpstreamReport::default()
        };
        report.endpoints.extend(self.endpoints.all().iter().map(|endpoint| {
            report.totals.streams += endpoint.active();
            EndpointReport {
                address: endpoint.site.at.to_string(),
                name: endpoint.site.named.to_string(),
                streams: endpoint.active(),
                connections: 0,
                available: endpoint.is_available().into(),
                ejected: endpoint.is_ejected().into(),
                unhealthy: endpoint.is_unhealthy().into(),
                last_error: endpoint.last_error(),
            }
        }));
        if let (true, Unavailable::Empty(why)) = (report.endpoints.is_empty(), self.endpoints.unavailable()) {
            report.unavailable = Some(why);
        }
        for pool in self.connector.pools() {
            report.connect.add(&pool.took());
            report.totals.connections_opened += pool.opened();
            report.totals.connect_failures += pool.failed();
            pool.each(|at, connections, dialing, waiting| {
                let totals = &mut report.totals;
                totals.connections += connections;
                totals.dialing += dialing;
                totals.waiting += waiting;
                let at = self.connector.endpoint_of(pool, at).as_ref().unwrap_or(at).to_string();
                if let Some(endpoint) = report.endpoints.iter_mut().find(|e| e.address == at) {
                    endpoint.connections += connections;
                }
            });
        }
        report
    }

    /// Closes its connections once their streams have ended.
    pub async fn close(&self) {
        self.tasks.borrow_mut().abort_all();
        self.health.stop();
        self.connector.close().await;
    }

    /// Opens a stream. What a client sends meanwhile may go `ahead` of the answer; what was refused goes nowhere.
    pub async fn connect(&self, ask: &Ask<'_>, ahead: Option<&Ahead<'_>>) -> Result<Stream, TunnelError> {
        let opened = self.try_connect(ask, ahead).await;
        let counted = if opened.is_ok() { &self.opened } else { &self.failed };
        counted.set(counted.get() + 1);
        opened
    }

    async fn try_connect(&self, ask: &Ask<'_>, ahead: Option<&Ahead<'_>>) -> Result<Stream, TunnelError> {
        let ahead = ahead.filter(|_| self.settings.optimistic_data);
        let permit = self.stream_permit()?;
        let mut tries = 0;
        loop {
            let from = Instant::now();
            let (checkout, endpoint) = self.checkout(ask).await?;
            if let Some(marks) = ask.marks {
                marks.queued.set(Some([from, Instant::now()]));
                // What was there before it came is not its own.
                marks.made.set(Some(checkout.made()).filter(|made| made.ready > from));
            }
            match self.open(checkout, &endpoint, ask, ahead).await {
                Ok(mut stream) => {
                    self.health.answered(&endpoint);
                    stream.permits.upstream = permit;
                    return Ok(stream);
                }
                Err(Attempt::NotProcessed(_)) if tries < RETRIES => tries += 1,
                Err(Attempt::NotProcessed(e)) => return Err(e),
                Err(Attempt::Failed(e)) => {
                    if e.is_the_gateways() {
                        self.health.refused(&endpoint, &e);
                    } else {
                        self.health.answered(&endpoint);
                    }
                    return Err(e);
                }
            }
        }
    }

    async fn open(
        &self,
        checkout: Checkout,
        endpoint: &Rc<Endpoint>,
        ask: &Ask<'_>,
        ahead: Option<&Ahead<'_>>,
    ) -> Result<Stream, Attempt> {
        let permit = endpoint.permit();
        let target = || ask.authority().clone();
        let head = connect_request(ask, &self.settings.headers)
            .map_err(|e| Attempt::Failed(TunnelError::Request { target: target(), why: e.to_string() }))?;
        let after = ask.terms.timeout.unwrap_or(self.settings.response_timeout);
        let request = OpenRequest { head, timeout: after, ahead, may_retry: ask.terms.retries > 0 };
        // Of the error, which is rare; the checkout is gone by then.
        let peer: FarEnd = checkout.connection().peer().clone();
        checkout.open(request, permit).await.map_err(|e| {
            Attempt::Failed(match e {
                OpenError::NotProcessed(why) => {
                    return Attempt::NotProcessed(TunnelError::Dropped { peer, target: target(), why });
                }
                OpenError::Refused { status, detail } => {
                    TunnelError::Refused { peer, target: target(), status, detail }
                }
                OpenError::Timeout => TunnelError::Timeout { peer, target: target(), after },
                OpenError::Dropped(why) => TunnelError::Dropped { peer, target: target(), why },
            })
        })
    }

    /// A permit among the flows, where they are limited.
    fn stream_permit(&self) -> Result<Option<Permit>, TunnelError> {
        let Some(most) = self.settings.limits.streams else { return Ok(None) };
        self.streams.take(most).map(Some).ok_or_else(|| self.limit(Limited::Streams, most))
    }

    fn limit(&self, what: Limited, most: usize) -> TunnelError {
        TunnelError::Limit { upstream: self.path.clone(), what, most }
    }

    /// A connection to the next endpoint that is available, with a permit for one stream.
    async fn checkout(&self, ask: &Ask<'_>) -> Result<(Checkout, Rc<Endpoint>), TunnelError> {
        let upstream = || self.path.clone();
        if !self.endpoints.are_known() {
            let allowed = self.settings.pool.connect.timeout;
            timeout(allowed, self.endpoints.settled()).await.map_err(|_| TunnelError::Empty {
                upstream: upstream(),
                why: format!("nothing was found out about them within {allowed:?}"),
            })?;
        }
        let available = self.endpoints.available();
        let mut failed = None;
        let order = self.order(&available, ask.target);
        let in_order = || pick::in_order(order, &available, |e| e.seed());
        // Once more where a connection was closed before it was ready, as by a gateway that is being
        // replaced: nothing was asked on it yet.
        let closed = |e: &Option<ConnectError>| matches!(e, Some(ConnectError::Http { .. }));
        // Those whose connections may be lost come last, if there are others.
        let overdue = |endpoint: &&Rc<Endpoint>| {
            available.len() > 1 && self.connector.is_overdue(&endpoint.site, ask.identity)
        };
        let once = || in_order().filter(|e| !overdue(e)).chain(in_order().filter(overdue));
        for (i, endpoint) in once().chain(once()).enumerate() {
            if i >= available.len() && !closed(&failed) {
                break;
            }
            // It may have been ejected meanwhile.
            if !endpoint.is_available() {
                continue;
            }
            let permit = self.pending_permit(endpoint, ask.identity)?;
            let checkout = self.connector.checkout(&endpoint.site, ask.identity).await;
            drop(permit);
            match checkout {
                Ok(checkout) => {
                    self.health.connected(endpoint);
                    return Ok((checkout, Rc::clone(endpoint)));
                }
                Err(e) => {
                    if !e.is_ours() {
                        self.health.failed(endpoint, &e);
                    }
                    failed = Some(e);
                }
            }
        }
        Err(match failed {
            Some(ConnectError::Limit { most }) => self.limit(Limited::Connections, most),
            Some(source) => TunnelError::Connect { upstream: upstream(), source },
            None => match self.endpoints.unavailable() {
                Unavailable::Empty(why) => TunnelError::Empty { upstream: upstream(), why },
                Unavailable::Failing(last) => TunnelError::NoEndpoint { upstream: upstream(), last },
            },
        })
    }

    /// The order in which endpoints are tried; streams are counted per worker.
    fn order(&self, endpoints: &[Rc<Endpoint>], target: &Target) -> pick::Order {
        // One has no order, and needs no numbers.
        if endpoints.len() < 2 {
            return pick::Order::Around(0);
        }
        let turn = self.next.get();
        self.next.set(turn.wrapping_add(1));
        let hash = || pick::hash(target);
        pick::order(self.settings.balance, turn, fastrand::u64(..), hash, endpoints, |e| e.active())
    }

    /// A permit among the flows that wait for a connection, where they are limited and this one has to wait.
    fn pending_permit(
        &self,
        endpoint: &Endpoint,
        identity: Option<&IdentityName>,
    ) -> Result<Option<Permit>, TunnelError> {
        let Some(most) = self.settings.limits.pending else { return Ok(None) };
        if self.connector.has_room(&endpoint.site, identity) {
            return Ok(None);
        }
        self.pending.take(most).map(Some).ok_or_else(|| self.limit(Limited::Pending, most))
    }
}

/// Many flows share what is spoken on such a stream, so none of their clients is named.
impl Underlay for Upstream {
    fn path(&self) -> &str {
        &self.path
    }

    fn depth(&self) -> usize {
        self.connector.via().map_or(0, |via| 1 + via.depth())
    }

    fn open<'a>(
        &'a self,
        endpoint: &'a Target,
    ) -> Pin<Box<dyn Future<Output = Result<Outer, TunnelError>> + 'a>> {
        Box::pin(async move {
            // Nothing was received, so there is no `via` to stand in.
            let (terms, pseudonym) = (&Terms::default(), "");
            let (client, identity, received, marks) = (None, None, None, None);
            let ask =
                Ask { target: endpoint, instead: None, client, identity, received, pseudonym, terms, marks };
            let mut stream = self.connect(&ask, None).await?;
            let early = mem::take(&mut stream.early);
            Ok(Nested::new(stream, early))
        })
    }
}

enum Attempt {
    /// The peer has surely not acted on the request: it may be sent again.
    NotProcessed(TunnelError),
    Failed(TunnelError),
}

/// Takes a new set of endpoints.
fn take(known: &EndpointSet, connector: &Connector, endpoints: &Endpoints, health: &Health) {
    let changes = endpoints.replace(known);
    health.watch(&changes.came);
    for gone in changes.left {
        connector.forget(&gone.site);
    }
}

/// Takes every new set.
async fn follow(mut feed: Feed, connector: Rc<Connector>, endpoints: Rc<Endpoints>, health: Rc<Health>) {
    loop {
        take(&feed.next().await, &connector, &endpoints, &health);
    }
}
