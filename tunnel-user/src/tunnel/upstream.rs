//! An upstream: its endpoints, which of them are well, and how a stream is opened on one.
//!
//! Enters: a target. Leaves: a stream after its 200, or who failed and why. Invariant: another endpoint,
//! or another connection, is tried only while the request cannot have been acted on. It never retries
//! what a peer has answered.

use std::{
    cell::{Cell, RefCell},
    fmt,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use http::{HeaderName, HeaderValue, Request, StatusCode};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    connect::{self, ConnectError, Connected, Key, TlsKey, connect},
    h1,
    headers::{Ask, Trace, connect_request},
    nested::Via,
    pick,
    pool::{self, Lease, Pool},
};
use crate::{
    config::{Balance, Protocol},
    flow::{FarEnd, Identity, Target},
    relay::{H2Leg, Queue},
    transport::{
        h1::ReadError,
        store::TlsStore,
        verify::{ServerCheck, explain},
    },
};

/// Failures in a row after which an endpoint is ejected.
const EJECT_AFTER: u32 = 3;
/// The first wait before an ejected endpoint is probed; it doubles up to [`PROBE_MAX`].
const PROBE_MIN: Duration = Duration::from_millis(100);
/// A restarted endpoint is found within this.
const PROBE_MAX: Duration = Duration::from_secs(1);
/// How often a request that was surely not acted on is sent again on another connection: GOAWAY
/// (RFC 9113 section 6.8) and REFUSED_STREAM (section 8.7) say so.
const RETRIES: u32 = 3;

/// One upstream, as configured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name, for logs and statistics.
    pub name: String,
    /// Where it is.
    pub endpoints: Vec<Target>,
    /// Through which other upstream it is reached: its place among the configuration's.
    pub via: Option<usize>,
    /// Which endpoint is next.
    pub balance: Balance,
    /// What it speaks.
    pub protocol: Protocol,
    /// TLS; `None`: plaintext.
    pub tls: Option<Tls>,
    /// Headers for every CONNECT request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// From the request to its answer: the far end dials in this time.
    pub response_timeout: Duration,
    /// Its connections; those of HTTP/1 are made in the same way, and not kept.
    pub pool: pool::Settings,
}

/// How an upstream is spoken to over TLS.
#[derive(Clone)]
pub struct Tls {
    /// Our certificate, and whom we trust.
    pub store: Arc<TlsStore>,
    /// What its certificate must say.
    pub check: ServerCheck,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("check", &self.check).finish_non_exhaustive()
    }
}

/// What the relay moves bytes through.
pub enum Leg {
    /// A stream of an HTTP/2 connection.
    H2(H2Leg),
    /// An HTTP/1 connection.
    H1(h1::Leg),
}

/// A stream after its 2xx; over HTTP/1 that is a whole connection.
pub struct Stream {
    /// What the relay moves bytes through.
    pub leg: Leg,
    /// What the target has sent already.
    pub early: Queue,
    /// The endpoint it goes through.
    pub peer: FarEnd,
    /// Who the endpoint has proved to be.
    pub identity: Option<Identity>,
    /// Held as long as the stream lives.
    pub place: Place,
}

impl Stream {
    /// Its number on its connection, where many share one.
    pub fn number(&self) -> Option<u32> {
        match &self.leg {
            Leg::H2(leg) => Some(leg.id()),
            Leg::H1(_) => None,
        }
    }
}

/// A stream's place among the streams of its endpoint, and on its connection.
pub struct Place {
    /// Given back when dropped.
    _lease: Option<Lease>,
    _turn: Turn,
}

/// A place among the streams of an endpoint.
struct Turn(Rc<Endpoint>);

impl Turn {
    fn new(endpoint: &Rc<Endpoint>) -> Self {
        endpoint.active.set(endpoint.active.get() + 1);
        Self(Rc::clone(endpoint))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
    }
}

/// Why there is no stream.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TunnelError {
    /// No endpoint could be connected to: the upstream's fault, or the network's.
    #[error("upstream {upstream}: {source}")]
    Connect {
        /// Which.
        upstream: String,
        /// The last endpoint's failure.
        #[source]
        source: ConnectError,
    },
    /// Every endpoint has failed repeatedly and is being probed.
    #[error("upstream {upstream}: no endpoint is left, all have failed repeatedly (last: {last})")]
    NoEndpoint {
        /// Which.
        upstream: String,
        /// The last failure.
        last: String,
    },
    /// The far end said no.
    #[error("{peer} refused {target}: {status}{}", detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused {
        /// Who refused.
        peer: FarEnd,
        /// What was asked for.
        target: Target,
        /// The status.
        status: StatusCode,
        /// Its `proxy-status` (RFC 9209).
        detail: Option<String>,
    },
    /// The far end did not answer the CONNECT in time.
    #[error("{peer} did not answer CONNECT {target} within {after:?}")]
    Timeout {
        /// Who was asked.
        peer: FarEnd,
        /// What for.
        target: Target,
        /// The time allowed.
        after: Duration,
    },
    /// The stream or its connection broke before the answer.
    #[error("{peer} dropped CONNECT {target}: {why}")]
    Dropped {
        /// Who was asked.
        peer: FarEnd,
        /// What for.
        target: Target,
        /// How.
        why: String,
    },
    /// The target cannot be written as an `:authority`.
    #[error("{target} cannot be asked for: {why}")]
    Request {
        /// The target.
        target: Target,
        /// Why.
        why: String,
    },
}

/// One endpoint, and how it fares.
struct Endpoint {
    target: Target,
    active: Cell<usize>,
    failures: Cell<u32>,
    ejected: Cell<bool>,
    last: RefCell<String>,
}

/// One upstream on one worker.
pub struct Upstream {
    settings: Settings,
    /// Its name in what is said of it, with those that it goes through.
    way: String,
    lines: Rc<Lines>,
    endpoints: Vec<Rc<Endpoint>>,
    next: Cell<usize>,
    trace: Trace,
    probes: RefCell<JoinSet<()>>,
}

impl Upstream {
    /// Nothing is connected until a flow needs it. `via` is the upstream that the settings speak of.
    pub fn new(settings: Settings, via: Option<Via>) -> Self {
        let endpoint = |target: &Target| {
            Rc::new(Endpoint {
                target: target.clone(),
                active: Cell::default(),
                failures: Cell::default(),
                ejected: Cell::default(),
                last: RefCell::default(),
            })
        };
        Self {
            way: match &via {
                None => settings.name.clone(),
                Some(via) => format!("{} via {}", settings.name, via.0.way),
            },
            lines: Rc::new(Lines::new(&settings, via)),
            endpoints: settings.endpoints.iter().map(endpoint).collect(),
            settings,
            next: Cell::default(),
            trace: Trace::default(),
            probes: RefCell::default(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// How many others it goes through.
    pub fn depth(&self) -> usize {
        self.lines.via.as_ref().map_or(0, |via| 1 + via.0.depth())
    }

    /// Connections opened since the start.
    pub fn connections_opened(&self) -> u64 {
        match &self.lines.kind {
            Kind::Pool(pool) => pool.opened(),
            Kind::Each(opened) => opened.get(),
        }
    }

    /// Closes its connections; see [`Pool::close`].
    pub async fn close(&self) {
        self.probes.borrow_mut().abort_all();
        if let Kind::Pool(pool) = &self.lines.kind {
            pool.close().await;
        }
    }

    /// Opens a stream.
    pub async fn connect(&self, ask: &Ask<'_>) -> Result<Stream, TunnelError> {
        let mut tries = 0;
        loop {
            let asked = match self.line().await? {
                (Line::Shared(lease), turn) => self.request(lease, turn, ask).await,
                (Line::Own(connected), turn) => self.ask(*connected, turn, ask).await,
            };
            match asked {
                Ok(stream) => return Ok(stream),
                Err(Attempt::NotActedOn(_)) if tries < RETRIES => tries += 1,
                Err(Attempt::NotActedOn(e) | Attempt::Failed(e)) => return Err(e),
            }
        }
    }

    /// A connection to the next endpoint that is well, or a place on one.
    async fn line(&self) -> Result<(Line, Turn), TunnelError> {
        let mut failed = None;
        let order = self.in_order();
        let again = order.clone();
        // Once more where a connection was closed before it was ready, as by a gateway that is being
        // replaced: nothing was asked on it yet.
        let closed = |e: &Option<ConnectError>| matches!(e, Some(ConnectError::Http { .. }));
        let rest = order.into_iter().chain(again).enumerate();
        for (i, endpoint) in rest {
            if i >= self.endpoints.len() && !closed(&failed) {
                break;
            }
            if endpoint.ejected.get() {
                continue;
            }
            match self.lines.get(&endpoint.target).await {
                Ok(line) => {
                    endpoint.failures.set(0);
                    return Ok((line, Turn::new(endpoint)));
                }
                Err(e) => {
                    self.note_failure(endpoint, &e);
                    failed = Some(e);
                }
            }
        }
        let upstream = self.way.clone();
        Err(match failed {
            Some(source) => TunnelError::Connect { upstream, source },
            None => {
                let last = self.endpoints.iter().map(|e| e.last.borrow().clone()).next_back();
                TunnelError::NoEndpoint { upstream, last: last.unwrap_or_default() }
            }
        })
    }

    /// The endpoints in the order in which they are tried; streams are counted per worker.
    fn in_order(&self) -> Vec<&Rc<Endpoint>> {
        let turn = self.next.get();
        self.next.set(turn.wrapping_add(1));
        pick::in_order(self.settings.balance, turn, &self.endpoints, |e| e.active.get())
    }

    fn note_failure(&self, endpoint: &Rc<Endpoint>, why: &ConnectError) {
        if !why.is_of_endpoint() {
            return;
        }
        endpoint.failures.set(endpoint.failures.get() + 1);
        *endpoint.last.borrow_mut() = why.to_string();
        if endpoint.failures.get() < EJECT_AFTER || endpoint.ejected.get() {
            return;
        }
        endpoint.ejected.set(true);
        tracing::warn!(upstream = self.settings.name, endpoint = %endpoint.target, "ejected: {why}");
        let mut probes = self.probes.borrow_mut();
        while probes.try_join_next().is_some() {}
        probes.spawn_local(probe(Rc::clone(&self.lines), Rc::clone(endpoint)));
    }

    async fn request(&self, lease: Lease, turn: Turn, ask: &Ask<'_>) -> Result<Stream, Attempt> {
        let target = ask.authority();
        let peer = || lease.peer().clone();
        let dropped = |why: String| TunnelError::Dropped { peer: peer(), target: target.clone(), why };
        let request = self.connect_request(ask)?;
        let not_sent = |why: String| {
            lease.retire();
            Attempt::NotActedOn(dropped(why))
        };
        let sender = lease.sender().ok_or_else(|| not_sent("the connection was idle".to_owned()))?;
        let mut sender = sender.ready().await.map_err(|e| not_sent(e.to_string()))?;
        let (response, send) = sender.send_request(request, false).map_err(|e| not_sent(e.to_string()))?;
        drop(sender);
        let after = ask.terms.timeout.unwrap_or(self.settings.response_timeout);
        let response = match timeout(after, response).await {
            Ok(Ok(response)) => response,
            Ok(Err(e)) => {
                let refused = e.reason() == Some(h2::Reason::REFUSED_STREAM);
                if e.is_go_away() && e.is_remote() || refused {
                    if !refused {
                        lease.retire();
                    }
                    return Err(Attempt::NotActedOn(dropped(e.to_string())));
                }
                // The connection knows better why it was lost than one of its streams.
                return Err(Attempt::Failed(dropped(lease.lost().unwrap_or_else(|| e.to_string()))));
            }
            Err(_) => {
                let target = target.clone();
                return Err(Attempt::Failed(TunnelError::Timeout { peer: peer(), target, after }));
            }
        };
        // Any 2xx (RFC 9110 section 9.3.6).
        if !response.status().is_success() {
            let detail = response.headers().get("proxy-status").and_then(|v| v.to_str().ok());
            return Err(Attempt::Failed(TunnelError::Refused {
                peer: peer(),
                target: target.clone(),
                status: response.status(),
                detail: detail.map(str::to_owned),
            }));
        }
        let (peer, identity) = (peer(), lease.identity());
        let leg = Leg::H2(H2Leg::client(send, response.into_body()));
        let place = Place { _lease: Some(lease), _turn: turn };
        Ok(Stream { leg, early: Queue::default(), peer, identity, place })
    }

    /// The same over HTTP/1. What was sent may have been acted on: nothing is sent again.
    async fn ask(&self, connected: Connected, turn: Turn, ask: &Ask<'_>) -> Result<Stream, Attempt> {
        let Connected { link, peer, identity, .. } = connected;
        let request = self.connect_request(ask)?;
        let after = ask.terms.timeout.unwrap_or(self.settings.response_timeout);
        let asked = timeout(after, h1::ask(link, &request)).await;
        let target = || ask.authority().clone();
        let Ok(asked) = asked else {
            return Err(Attempt::Failed(TunnelError::Timeout { peer, target: target(), after }));
        };
        match asked {
            Ok(h1::Asked::Open(leg, early)) => {
                let place = Place { _lease: None, _turn: turn };
                Ok(Stream { leg: Leg::H1(leg), early, peer, identity, place })
            }
            Ok(h1::Asked::Refused(h1::Answer { status, detail })) => {
                Err(Attempt::Failed(TunnelError::Refused { peer, target: target(), status, detail }))
            }
            Err(e) => {
                let why = if let ReadError::Io(e) = &e { explain(e) } else { e.to_string() };
                Err(Attempt::Failed(TunnelError::Dropped { peer, target: target(), why }))
            }
        }
    }

    fn connect_request(&self, ask: &Ask<'_>) -> Result<Request<()>, Attempt> {
        connect_request(ask, &self.trace, &self.settings.headers).map_err(|e| {
            Attempt::Failed(TunnelError::Request { target: ask.authority().clone(), why: e.to_string() })
        })
    }
}

enum Attempt {
    /// The peer has surely not acted on the request: it may be sent again.
    NotActedOn(TunnelError),
    Failed(TunnelError),
}

/// How an upstream's connections are had.
struct Lines {
    protocol: Protocol,
    tls: Option<Tls>,
    via: Option<Via>,
    connect: connect::Settings,
    kind: Kind,
}

enum Kind {
    /// Shared by many flows.
    Pool(Pool),
    /// One for each flow; how many there were.
    Each(Cell<u64>),
}

/// A connection for one flow.
enum Line {
    /// A place on one.
    Shared(Lease),
    /// All of it.
    Own(Box<Connected>),
}

impl Lines {
    fn new(settings: &Settings, via: Option<Via>) -> Self {
        let kind = match settings.protocol {
            Protocol::H2 => Kind::Pool(Pool::new(settings.pool.clone())),
            Protocol::H1 => Kind::Each(Cell::default()),
        };
        let Settings { protocol, tls, pool, .. } = settings;
        Self { protocol: *protocol, tls: tls.clone(), via, connect: pool.connect, kind }
    }

    async fn get(&self, endpoint: &Target) -> Result<Line, ConnectError> {
        let tls = self.tls.as_ref().map(|Tls { store, check }| TlsKey {
            config: store.client_config(check, self.protocol),
            server_name: check.server_name(endpoint),
        });
        let key = Key { endpoint: endpoint.clone(), tls, via: self.via.clone() };
        match &self.kind {
            Kind::Pool(pool) => pool.lease(&key).await.map(Line::Shared),
            Kind::Each(opened) => {
                let connected = connect(&key, self.protocol, &self.connect, async |c| Ok(c)).await?;
                opened.set(opened.get() + 1);
                Ok(Line::Own(Box::new(connected)))
            }
        }
    }
}

/// Connects to an ejected endpoint until it succeeds; the connection stays in the pool, if there is one.
async fn probe(lines: Rc<Lines>, endpoint: Rc<Endpoint>) {
    let mut wait = PROBE_MIN;
    loop {
        sleep(wait).await;
        match lines.get(&endpoint.target).await {
            Ok(_line) => break,
            Err(e) => *endpoint.last.borrow_mut() = e.to_string(),
        }
        wait = (wait * 2).min(PROBE_MAX);
    }
    endpoint.failures.set(0);
    endpoint.ejected.set(false);
    tracing::info!(endpoint = %endpoint.target, "well again");
}
