//! An upstream: its endpoints, which of them are well, and how a stream is opened on one.
//!
//! Enters: a target. Leaves: a stream after its 200, or who failed and why. Invariant: another endpoint,
//! or another connection, is tried only while the request cannot have been acted on. It never retries
//! what a peer has answered.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use http::{HeaderName, HeaderValue, StatusCode};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    headers::{Ask, Trace, connect_request},
    pick,
    pool::{self, ConnectError, Key, Lease, Pool},
};
use crate::{
    config::Balance,
    flow::{Identity, PeerAddr, Target},
    relay::H2Leg,
    transport::{store::TlsStore, verify::ServerCheck},
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
    /// Which endpoint is next.
    pub balance: Balance,
    /// What its certificate must say.
    pub check: ServerCheck,
    /// Headers for every CONNECT request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// From the request to its answer: the far end dials in this time.
    pub response_timeout: Duration,
    /// Its connections.
    pub pool: pool::Settings,
}

/// A stream after its 200.
pub struct Stream {
    /// What the relay moves bytes through.
    pub leg: H2Leg,
    /// The endpoint it goes through.
    pub peer: PeerAddr,
    /// Who the endpoint has proved to be.
    pub identity: Option<Identity>,
    /// Held as long as the stream lives.
    pub place: Place,
}

/// A stream's place on a connection, and among the streams of its endpoint.
pub struct Place {
    lease: Lease,
    endpoint: Rc<Endpoint>,
}

impl Place {
    fn new(lease: Lease, endpoint: &Rc<Endpoint>) -> Self {
        endpoint.active.set(endpoint.active.get() + 1);
        Self { lease, endpoint: Rc::clone(endpoint) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.endpoint.active.set(self.endpoint.active.get() - 1);
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
        peer: PeerAddr,
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
        peer: PeerAddr,
        /// What for.
        target: Target,
        /// The time allowed.
        after: Duration,
    },
    /// The stream or its connection broke before the answer.
    #[error("{peer} dropped CONNECT {target}: {why}")]
    Dropped {
        /// Who was asked.
        peer: PeerAddr,
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
    tls: Arc<TlsStore>,
    pool: Rc<Pool>,
    endpoints: Vec<Rc<Endpoint>>,
    next: Cell<usize>,
    trace: Trace,
    probes: RefCell<JoinSet<()>>,
}

impl Upstream {
    /// Nothing is connected until a flow needs it.
    pub fn new(settings: Settings, tls: Arc<TlsStore>) -> Self {
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
            pool: Rc::new(Pool::new(settings.pool.clone())),
            endpoints: settings.endpoints.iter().map(endpoint).collect(),
            settings,
            tls,
            next: Cell::default(),
            trace: Trace::default(),
            probes: RefCell::default(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// Connections opened since the start.
    pub fn connections_opened(&self) -> u64 {
        self.pool.opened()
    }

    /// Closes its connections; see [`Pool::close`].
    pub async fn close(&self) {
        self.probes.borrow_mut().abort_all();
        self.pool.close().await;
    }

    /// Opens a stream.
    pub async fn connect(&self, ask: &Ask<'_>) -> Result<Stream, TunnelError> {
        let mut tries = 0;
        loop {
            let place = self.place().await?;
            match self.request(place, ask).await {
                Ok(stream) => return Ok(stream),
                Err(Attempt::NotActedOn(_)) if tries < RETRIES => tries += 1,
                Err(Attempt::NotActedOn(e) | Attempt::Failed(e)) => return Err(e),
            }
        }
    }

    /// A place on a connection to the next endpoint that is well.
    async fn place(&self) -> Result<Place, TunnelError> {
        let mut failed = None;
        let order = self.in_order();
        let again = order.clone();
        // Once more where a connection was closed before it was ready, as by a gateway that is being
        // replaced: nothing was asked on it yet.
        let closed = |e: &Option<ConnectError>| matches!(e, Some(ConnectError::H2 { .. }));
        let rest = order.into_iter().chain(again).enumerate();
        for (i, endpoint) in rest {
            if i >= self.endpoints.len() && !closed(&failed) {
                break;
            }
            if endpoint.ejected.get() {
                continue;
            }
            match self.pool.lease(&self.key(&endpoint.target)).await {
                Ok(lease) => {
                    endpoint.failures.set(0);
                    return Ok(Place::new(lease, endpoint));
                }
                Err(e) => {
                    self.note_failure(endpoint, &e);
                    failed = Some(e);
                }
            }
        }
        let upstream = self.settings.name.clone();
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

    fn key(&self, endpoint: &Target) -> Key {
        key(&self.tls, &self.settings.check, endpoint)
    }

    fn note_failure(&self, endpoint: &Rc<Endpoint>, why: &ConnectError) {
        endpoint.failures.set(endpoint.failures.get() + 1);
        *endpoint.last.borrow_mut() = why.to_string();
        if endpoint.failures.get() < EJECT_AFTER || endpoint.ejected.get() {
            return;
        }
        endpoint.ejected.set(true);
        tracing::warn!(upstream = self.settings.name, endpoint = %endpoint.target, "ejected: {why}");
        let mut probes = self.probes.borrow_mut();
        while probes.try_join_next().is_some() {}
        probes.spawn_local(probe(
            Rc::clone(&self.pool),
            Arc::clone(&self.tls),
            self.settings.check.clone(),
            Rc::clone(endpoint),
        ));
    }

    async fn request(&self, place: Place, ask: &Ask<'_>) -> Result<Stream, Attempt> {
        let target = ask.authority();
        let lease = &place.lease;
        let peer = lease.peer();
        let dropped = |why: String| TunnelError::Dropped { peer, target: target.clone(), why };
        let request = connect_request(ask, &self.trace, &self.settings.headers).map_err(|e| {
            Attempt::Failed(TunnelError::Request { target: target.clone(), why: e.to_string() })
        })?;
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
                return Err(Attempt::Failed(TunnelError::Timeout { peer, target, after }));
            }
        };
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
        let identity = lease.identity();
        Ok(Stream { leg: H2Leg::client(send, response.into_body()), peer, identity, place })
    }
}

enum Attempt {
    /// The peer has surely not acted on the request: it may be sent again.
    NotActedOn(TunnelError),
    Failed(TunnelError),
}

fn key(tls: &TlsStore, check: &ServerCheck, endpoint: &Target) -> Key {
    Key {
        endpoint: endpoint.clone(),
        tls: tls.client_config(check),
        server_name: check.server_name(endpoint),
    }
}

/// Connects to an ejected endpoint until it succeeds; the connection stays in the pool.
async fn probe(pool: Rc<Pool>, tls: Arc<TlsStore>, check: ServerCheck, endpoint: Rc<Endpoint>) {
    let mut wait = PROBE_MIN;
    loop {
        sleep(wait).await;
        match pool.lease(&key(&tls, &check, &endpoint.target)).await {
            Ok(_lease) => break,
            Err(e) => *endpoint.last.borrow_mut() = e.to_string(),
        }
        wait = (wait * 2).min(PROBE_MAX);
    }
    endpoint.failures.set(0);
    endpoint.ejected.set(false);
    tracing::info!(endpoint = %endpoint.target, "well again");
}
