//! An upstream: how a stream is opened through it.
//!
//! Enters: a target. Leaves: a stream after its 200, or who failed and why. Invariant: another endpoint,
//! or another connection, is tried only while the request cannot have been acted on. It never retries
//! what a peer has answered.

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::pending,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use h2::client::ResponseFuture;
use http::{HeaderName, HeaderValue, Request};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use super::{
    TunnelError,
    connect::{ConnectError, Connected},
    discovery::{Feed, Known, Source},
    endpoints::{Endpoint, Endpoints, Lack, Turn},
    h1,
    headers::{Ask, connect_request},
    health::Health,
    limit::{Count, Limited, Limits, Taken},
    lines::{Line, Lines},
    nested::Via,
    pick,
    pool::{self, Lease},
};
use crate::{
    config::{Balance, HealthCheck, OutlierDetection, Protocol},
    identity::{store::TlsStore, verify::explain},
    model::{
        flow::{FarEnd, Identity, Target},
        names::UpstreamName,
        trust::ServerCheck,
    },
    relay::{Ahead, H2Leg, Queue, Sender},
    transport::h1::ReadError,
};

/// How often a request that was surely not acted on is sent again on another connection: GOAWAY
/// (RFC 9113 section 6.8) and REFUSED_STREAM (section 8.7) say so.
const RETRIES: u32 = 3;

/// One upstream, as configured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name, for logs and statistics.
    pub name: String,
    /// Where it is.
    pub endpoints: Source,
    /// Through which other upstream it is reached.
    pub via: Option<UpstreamName>,
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
    /// Whether what a client sends goes ahead of the answer, where HTTP/2 is spoken.
    pub optimistic_data: bool,
    /// Its connections; those of HTTP/1 are made in the same way, and not kept.
    pub pool: pool::Settings,
    /// Which endpoints are left out for what flows have met there.
    pub outlier: OutlierDetection,
    /// How endpoints are checked; `None`: they are not.
    pub check: Option<HealthCheck>,
    /// How much it gets from this worker.
    pub limits: Limits,
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

/// A stream's place among the streams of its endpoint and of its upstream, and on its connection.
pub struct Place {
    /// Given back when dropped.
    _lease: Option<Lease>,
    _turn: Turn,
    _taken: Option<Taken>,
}

/// One upstream on one worker.
pub struct Upstream {
    settings: Settings,
    /// Its name, as every record of a flow has it.
    name: Arc<str>,
    /// Its name in what is said of it, with those that it goes through.
    way: String,
    lines: Rc<Lines>,
    endpoints: Rc<Endpoints>,
    health: Rc<Health>,
    next: Cell<usize>,
    streams: Count,
    pending: Count,
    /// Streams whose clients have left before they were answered.
    abandoned: mpsc::UnboundedSender<(Asked, Duration)>,
    /// What hears of endpoints that come and go, and waits for the answers of those streams.
    tasks: RefCell<JoinSet<()>>,
}

impl Upstream {
    /// Nothing is connected until a flow needs it, or a check. `via` is the upstream that the settings speak of.
    pub fn new(settings: Settings, via: Option<Via>) -> Self {
        let way = match &via {
            None => settings.name.clone(),
            Some(via) => format!("{} via {}", settings.name, via.0.way),
        };
        let (lines, endpoints) = (Rc::new(Lines::new(&settings, via)), Rc::new(Endpoints::default()));
        let Settings { name, outlier, check, .. } = &settings;
        let (of_lines, of_endpoints) = (Rc::clone(&lines), Rc::clone(&endpoints));
        let health = Rc::new(Health::new(name, outlier.clone(), check.clone(), of_lines, of_endpoints));
        let mut tasks = JoinSet::new();
        let (abandoned, left) = mpsc::unbounded_channel();
        tasks.spawn_local(outlive(left));
        match settings.endpoints.clone() {
            Source::Fixed(sites) => {
                take(&Known::new(sites.iter().cloned(), String::new()), &lines, &endpoints, &health);
            }
            Source::Fed(mut feed) => {
                if let Some(known) = feed.now() {
                    take(&known, &lines, &endpoints, &health);
                }
                let (lines, endpoints, health) =
                    (Rc::clone(&lines), Rc::clone(&endpoints), Rc::clone(&health));
                tasks.spawn_local(follow(feed, lines, endpoints, health));
            }
        }
        Self {
            name: settings.name.as_str().into(),
            way,
            lines,
            endpoints,
            health,
            settings,
            next: Cell::default(),
            streams: Count::default(),
            pending: Count::default(),
            abandoned,
            tasks: RefCell::new(tasks),
        }
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// How many others it goes through.
    pub fn depth(&self) -> usize {
        self.lines.via.as_ref().map_or(0, |via| 1 + via.0.depth())
    }

    /// Connections opened since the start.
    pub fn connections_opened(&self) -> u64 {
        self.lines.opened()
    }

    /// Closes its connections once their streams have ended.
    pub async fn close(&self) {
        self.tasks.borrow_mut().abort_all();
        self.health.stop();
        self.lines.close().await;
    }

    /// Opens a stream. What a client sends meanwhile may go `ahead` of the answer; what was refused goes nowhere.
    pub async fn connect(&self, ask: &Ask<'_>, ahead: Option<&Ahead<'_>>) -> Result<Stream, TunnelError> {
        let ahead = ahead.filter(|_| self.settings.optimistic_data);
        let taken = self.take_stream()?;
        let mut tries = 0;
        let stream = loop {
            let (line, turn) = self.line(ask).await?;
            let endpoint = Rc::clone(turn.endpoint());
            let asked = match line {
                Line::Shared(lease) => self.request(lease, turn, ask, ahead).await,
                Line::Own(connected) => self.ask(*connected, turn, ask).await,
            };
            match asked {
                Ok(stream) => {
                    self.health.answered(&endpoint);
                    break stream;
                }
                Err(Attempt::NotActedOn(_)) if tries < RETRIES => tries += 1,
                Err(Attempt::NotActedOn(e)) => return Err(e),
                Err(Attempt::Failed(e)) => {
                    if e.is_the_gateways() {
                        self.health.refused(&endpoint, &e);
                    } else {
                        self.health.answered(&endpoint);
                    }
                    return Err(e);
                }
            }
        };
        Ok(Stream { place: Place { _taken: taken, ..stream.place }, ..stream })
    }

    /// A place among the flows, where they are limited. Over HTTP/1 each has a connection of its own.
    fn take_stream(&self) -> Result<Option<Taken>, TunnelError> {
        let Limits { streams, connections, .. } = self.settings.limits;
        let (what, most) = match (streams, connections, self.settings.protocol) {
            (Some(streams), Some(connections), Protocol::H1) if connections < streams => {
                (Limited::Connections, connections)
            }
            (None, Some(connections), Protocol::H1) => (Limited::Connections, connections),
            (Some(streams), _, _) => (Limited::Streams, streams),
            (None, _, _) => return Ok(None),
        };
        self.streams.take(most).map(Some).ok_or_else(|| self.limit(what, most))
    }

    fn limit(&self, what: Limited, most: usize) -> TunnelError {
        TunnelError::Limit { upstream: self.way.clone(), what, most }
    }

    /// A connection to the next endpoint that is well, or a place on one.
    async fn line(&self, ask: &Ask<'_>) -> Result<(Line, Turn), TunnelError> {
        let upstream = || self.way.clone();
        if !self.endpoints.are_known() {
            let allowed = self.settings.pool.connect.timeout;
            timeout(allowed, self.endpoints.settled()).await.map_err(|_| TunnelError::Empty {
                upstream: upstream(),
                why: format!("nothing was found out about them within {allowed:?}"),
            })?;
        }
        let well = self.endpoints.well();
        let mut failed = None;
        let order = self.order(&well, ask.target);
        let in_order = || pick::in_order(order, &well, |e| e.seed());
        // Once more where a connection was closed before it was ready, as by a gateway that is being
        // replaced: nothing was asked on it yet.
        let closed = |e: &Option<ConnectError>| matches!(e, Some(ConnectError::Http { .. }));
        // Those whose connections may be lost come last, if there are others.
        let overdue = |endpoint: &&Rc<Endpoint>| well.len() > 1 && self.lines.is_overdue(&endpoint.site);
        let once = || in_order().filter(|e| !overdue(e)).chain(in_order().filter(overdue));
        for (i, endpoint) in once().chain(once()).enumerate() {
            if i >= well.len() && !closed(&failed) {
                break;
            }
            // It may have been ejected meanwhile.
            if !endpoint.is_well() {
                continue;
            }
            let waits = self.take_pending(endpoint)?;
            let got = self.lines.get(&endpoint.site).await;
            drop(waits);
            match got {
                Ok(line) => {
                    self.health.connected(endpoint);
                    return Ok((line, Turn::new(endpoint)));
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
            None => match self.endpoints.lack() {
                Lack::Empty(why) => TunnelError::Empty { upstream: upstream(), why },
                Lack::Unwell(last) => TunnelError::NoEndpoint { upstream: upstream(), last },
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

    /// A place among the flows that wait for a connection, where they are limited and this one has to wait.
    fn take_pending(&self, endpoint: &Endpoint) -> Result<Option<Taken>, TunnelError> {
        let Some(most) = self.settings.limits.pending else { return Ok(None) };
        if self.lines.have_room(&endpoint.site) {
            return Ok(None);
        }
        self.pending.take(most).map(Some).ok_or_else(|| self.limit(Limited::Pending, most))
    }

    async fn request(
        &self,
        lease: Lease,
        turn: Turn,
        ask: &Ask<'_>,
        ahead: Option<&Ahead<'_>>,
    ) -> Result<Stream, Attempt> {
        let target = ask.authority();
        let peer = lease.peer().clone();
        let dropped = |why: String| TunnelError::Dropped { peer: peer.clone(), target: target.clone(), why };
        let request = self.connect_request(ask)?;
        let not_sent = |lease: &Lease, why: String| {
            lease.retire();
            Attempt::NotActedOn(dropped(why))
        };
        let sender = lease.sender().ok_or_else(|| not_sent(&lease, "the connection was idle".to_owned()))?;
        let mut sender = sender.ready().await.map_err(|e| not_sent(&lease, e.to_string()))?;
        lease.expect_answer();
        let (response, send) =
            sender.send_request(request, false).map_err(|e| not_sent(&lease, e.to_string()))?;
        drop(sender);
        let after = ask.terms.timeout.unwrap_or(self.settings.response_timeout);
        let asked = Asked { response, send: Sender::new(send), lease, turn };
        let mut unanswered = Unanswered { asked: Some((asked, after)), to: &self.abandoned };
        let answer = match &mut unanswered.asked {
            Some((Asked { response, send, lease, .. }, _)) => {
                let answer = async {
                    match ahead {
                        Some(ahead) => ahead.until(send, response).await,
                        None => response.await,
                    }
                };
                // Where the request may be made again elsewhere, and nothing was carried.
                let given_up = async {
                    lease.overdue().await;
                    let may_retry = ask.terms.retries > 0 && ahead.is_none_or(|ahead| !ahead.has_carried());
                    if !may_retry {
                        pending::<()>().await;
                    }
                };
                tokio::select! {
                    biased;
                    answer = timeout(after, answer) => Some(answer),
                    () = given_up => None,
                }
            }
            None => None,
        };
        let Some((Asked { send, lease, turn, .. }, _)) = unanswered.asked.take() else {
            return Err(Attempt::Failed(dropped("the stream is gone".to_owned())));
        };
        let response = match answer {
            Some(Ok(Ok(response))) => response,
            Some(Ok(Err(e))) => {
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
            Some(Err(_)) => {
                let target = target.clone();
                return Err(Attempt::Failed(TunnelError::Timeout { peer, target, after }));
            }
            None => return Err(Attempt::Failed(dropped("its answer to PING is overdue".to_owned()))),
        };
        lease.heard();
        // Any 2xx (RFC 9110 section 9.3.6).
        if !response.status().is_success() {
            let detail = response.headers().get("proxy-status").and_then(|v| v.to_str().ok());
            return Err(Attempt::Failed(TunnelError::Refused {
                peer,
                target: target.clone(),
                status: response.status(),
                detail: detail.map(str::to_owned),
            }));
        }
        if let Some(ahead) = ahead {
            ahead.answered();
        }
        let identity = lease.identity();
        let leg = Leg::H2(H2Leg::client(send, response.into_body(), lease.share()));
        let place = Place { _lease: Some(lease), _turn: turn, _taken: None };
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
                let place = Place { _lease: None, _turn: turn, _taken: None };
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
        connect_request(ask, &self.settings.headers).map_err(|e| {
            Attempt::Failed(TunnelError::Request { target: ask.authority().clone(), why: e.to_string() })
        })
    }
}

/// A request that was sent, on its stream.
struct Asked {
    response: ResponseFuture,
    send: Sender,
    lease: Lease,
    turn: Turn,
}

/// A request that waits for its answer. Where its client leaves meanwhile, the stream is reset only once the peer has
/// answered: servers count streams that are reset before they have looked at them, and end the connection, and so every
/// other flow on it, once there are too many (CVE-2023-44487).
struct Unanswered<'u> {
    /// And how long the answer may take.
    asked: Option<(Asked, Duration)>,
    to: &'u mpsc::UnboundedSender<(Asked, Duration)>,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if let Some(asked) = self.asked.take() {
            // Where nobody takes it any more, the stream is reset at once.
            let _gone = self.to.send(asked);
        }
    }
}

/// Holds streams whose clients have left until they are answered; no more than there are places on connections.
async fn outlive(mut left: mpsc::UnboundedReceiver<(Asked, Duration)>) {
    let mut waiting = JoinSet::new();
    loop {
        tokio::select! {
            next = left.recv() => match next {
                Some((mut asked, after)) => {
                    waiting.spawn_local(async move {
                        let _reset_now = timeout(after, &mut asked.response).await;
                    });
                }
                None => return,
            },
            Some(_) = waiting.join_next() => {}
        }
    }
}

enum Attempt {
    /// The peer has surely not acted on the request: it may be sent again.
    NotActedOn(TunnelError),
    Failed(TunnelError),
}

/// Takes a new set of endpoints.
fn take(known: &Known, lines: &Lines, endpoints: &Endpoints, health: &Health) {
    let changes = endpoints.replace(known);
    health.watch(&changes.came);
    for gone in changes.left {
        lines.forget(&gone.site);
    }
}

/// Takes every new set.
async fn follow(mut feed: Feed, lines: Rc<Lines>, endpoints: Rc<Endpoints>, health: Rc<Health>) {
    loop {
        take(&feed.next().await, &lines, &endpoints, &health);
    }
}
