//! The life of a flow, written once for every source: admit, route, reach, relay, record.
//!
//! A [`Proxy`] is what one worker carries flows by: the configuration in force, its upstreams, and its books. A flow keeps
//! the [`Setup`] that it began with, and what that has connected to.

mod carry;
mod client;
mod in_process;
mod log;
mod policy;
pub mod questions;
mod reach;
mod refusal;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::poll_fn,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use self::{client::Account, log::LimitedLog, reach::Sink};
pub use self::{client::Client, refusal::Refusal};
use crate::{
    identity::standing::EndOfStanding,
    model::{end::EndReason, flow::Identity},
    observe::{
        access_log::Logs,
        flows::{FlowId, Open, Registry},
        istio::Istio,
        marks::Marks,
        policies::PolicyHits,
        stats::{Counters, Record, Records},
        traces::Tracer,
    },
    process::{
        books::{Books, Connected, Flowing, PeerLimits},
        drain::Watch,
        limits,
        memory::Memory,
    },
    relay::{Early, Leg, Outcome, Path, PathKind, Piped, Spliced, relay},
    routing::{policy::Policies, router::Router},
    sinks::{
        dial::Dialer,
        upstream::{TunnelError, Upstreams},
    },
    sources::{Event, Peer, capture::accept::Stray, listener::accept::ServeError},
    transport::resolver::Lookups,
};

/// One peer, or one capture beside other sources, leaves at least one in this many of a worker's flows to the others.
const PEER_LEAVES: usize = 4;

/// What all workers share of one configuration.
pub struct Shared {
    /// Where flows go.
    pub router: Router,
    /// Who may reach what through our listeners.
    pub policies: Policies,
    /// By which targets are dialled.
    pub dialer: Dialer,
    /// What this process calls itself in `via`, as no other does.
    pub pseudonym: String,
    /// How many flows one worker takes at once.
    pub flows_max: usize,
    /// How bytes are moved between two sockets of ours.
    pub path: PathKind,
    /// How long what a client sends first is waited for, where its route depends on it.
    pub sniff_timeout: Duration,
    /// How long a dial for a captured flow may take.
    pub dial_timeout: Duration,
    /// How long flows may go on after the order to stop.
    pub drain_timeout: Duration,
    /// Whether records of flows are kept.
    pub keep_records: bool,
    /// What one worker gives peers and flows.
    pub limits: Limits,
    /// Where flows have lines.
    pub access_logs: Logs,
    /// What makes spans of flows.
    pub tracer: Option<Arc<Tracer>>,
    /// For how many keys one worker counts flows as Istio counts them, too; none where nobody wants it.
    pub istio: Option<usize>,
}

/// What one worker gives peers and flows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes for all peers.
    pub memory: u64,
    /// Bytes for one peer.
    pub peer_memory: u64,
    /// What else there is for one peer.
    pub peer: PeerLimits,
    /// How long flows may last.
    pub flows: Timeouts,
}

/// How long a flow may last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timeouts {
    /// Without a byte.
    pub idle: Option<Duration>,
    /// In all.
    pub most: Option<Duration>,
}

/// What flows are carried by.
pub struct Setup {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// This worker's upstreams.
    pub upstreams: Upstreams,
    /// This worker's counters of each policy, by its place.
    policies: Vec<Arc<PolicyHits>>,
    /// How bytes are moved between two sockets of ours.
    path: Path,
    /// The names of the routes, for this worker alone: every flow counts a use of one, and cores share no count.
    route_names: Vec<Option<Arc<str>>>,
}

impl Setup {
    /// `before` is the one that it replaces.
    pub fn new(
        shared: Arc<Shared>,
        upstreams: Upstreams,
        before: Option<&Self>,
        counters: &Counters,
    ) -> Self {
        Memory::of_this_worker().give(shared.limits.memory, shared.limits.peer_memory);
        let policies = shared.policies.names().iter().map(|name| counters.policies.of(name)).collect();
        let path = Path::new(shared.path, before.map(|b| &b.path), limits::pipes_for(shared.flows_max));
        let route_names = shared.router.names().map(|name| name.map(Arc::from)).collect();
        Self { shared, upstreams, policies, path, route_names }
    }

    /// A flow goes by this route, unless it has gone by another one before.
    fn note_route(&self, record: &mut Record, route: usize) {
        if record.route.is_none() {
            record.route = Some(route);
            record.route_name = self.route_names.get(route).cloned().flatten();
        }
    }
}

/// See the module.
pub struct Proxy {
    /// What new flows are carried by.
    setup: RefCell<Rc<Setup>>,
    counters: Arc<Counters>,
    /// Those that are carried now.
    flows: Rc<Registry>,
    records: Records,
    log: LimitedLog,
    active: Cell<usize>,
    /// Whose turn it is to look a name up.
    lookups: Lookups<Account>,
    /// What each peer of our listeners uses.
    peers: RefCell<HashMap<Account, Rc<Books>>>,
    /// What peers and their flows make this worker hold.
    memory: Rc<Memory>,
    /// What is counted as Istio counts it, while that is wanted.
    istio: RefCell<Option<Istio>>,
    /// Told when the flows that are left are to end.
    stop: Watch,
}

/// What a flow goes on with once its target is reached. A task holds no more of it than a pointer, and nothing of what
/// it took to come so far.
struct EstablishedFlow {
    sink: Sink,
    /// What has moved already.
    early: Early,
    /// Its place among the live ones, with what is known of it.
    live: Open,
    /// When it is to end because a connection that it is on has lost its standing.
    ends: Vec<EndOfStanding>,
    permit: Permit,
}

/// A place among the flows of a worker, and among those of its peer; given back when dropped.
struct Permit {
    proxy: Rc<Proxy>,
    flowing: Flowing,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.proxy.active.set(self.proxy.active.get() - 1);
    }
}

/// Ready when one of them is; never where there is none.
fn first_of(ends: &mut [EndOfStanding]) -> impl Future<Output = ()> {
    poll_fn(|cx| match ends.iter_mut().any(|end| end.as_mut().poll(cx).is_ready()) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
}

impl Proxy {
    /// `stop` says when the flows that are left are to end.
    pub fn new(setup: Setup, counters: Arc<Counters>, stop: Watch) -> Rc<Self> {
        let shared = &setup.shared;
        Rc::new(Self {
            flows: Rc::default(),
            records: Records::new(shared.keep_records),
            lookups: Lookups::new(shared.flows_max),
            istio: RefCell::new(shared.istio.map(Istio::new)),
            setup: RefCell::new(Rc::new(setup)),
            counters,
            log: LimitedLog::default(),
            active: Cell::default(),
            peers: RefCell::default(),
            memory: Memory::of_this_worker(),
            stop,
        })
    }

    /// What a flow that begins now is carried by.
    pub fn setup(&self) -> Rc<Setup> {
        Rc::clone(&self.setup.borrow())
    }

    /// From now on new flows are carried by this, and those end that its policies and routes no longer allow.
    pub fn replace_setup(&self, setup: Rc<Setup>) {
        self.switch_istio(setup.shared.istio);
        self.setup.replace(setup);
        self.review();
    }

    /// Begins to count as Istio counts, or forgets what it has counted so.
    fn switch_istio(&self, most: Option<usize>) {
        let mut istio = self.istio.borrow_mut();
        match most {
            None => *istio = None,
            Some(most) if istio.is_none() => {
                let istio = istio.insert(Istio::new(most));
                // What is closed was opened.
                self.flows.for_each(|flow| istio.opened(flow.record()));
            }
            Some(_) => {}
        }
    }

    /// Its counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How many flows there are.
    pub fn active(&self) -> usize {
        self.active.get()
    }

    /// Writes what was left out of the log since the last time.
    pub fn log_suppressed(&self) {
        self.log.tell();
    }

    /// The flows that are carried now.
    pub fn flows(&self) -> &Registry {
        &self.flows
    }

    /// Takes the records, and how many there was no room for.
    pub fn take_records(&self) -> (Vec<Record>, u64) {
        self.records.take()
    }

    /// A place for a flow of the operator's own applications, or of a peer. At the limit there is none.
    fn admit(self: &Rc<Self>, client: &Client) -> Result<Permit, Refusal> {
        let (most, peer) = {
            let setup = self.setup.borrow();
            (setup.shared.flows_max, setup.shared.limits.peer)
        };
        let (books, share) = (client.books(), most - most / PEER_LEAVES);
        match client {
            Client::Application { source, .. } => {
                if books.flows() >= share && !source.is_alone() {
                    return Err(Refusal::SourceLimit(share));
                }
            }
            Client::Peer(_) => {
                if books.flows() >= share {
                    return Err(Refusal::PeerLimit(share));
                }
                if !books.may_begin(peer.flows_per_second) {
                    return Err(Refusal::PeerRate(peer.flows_per_second));
                }
                if books.memory().is_full() {
                    return Err(Refusal::PeerMemory);
                }
            }
        }
        if self.active.get() >= most {
            return Err(Refusal::Limit(most));
        }
        if self.memory.is_full() {
            return Err(Refusal::Memory);
        }
        self.active.set(self.active.get() + 1);
        Ok(Permit { proxy: Rc::clone(self), flowing: books.flow() })
    }

    /// The memory that peers and their flows have.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What flows count as Istio counts them, those that go on included. Empty where nobody wants it.
    pub fn istio(&self) -> Istio {
        let Some(mut all) = self.istio.borrow().clone() else { return Istio::default() };
        self.flows.for_each(|flow| {
            all.live(flow.record(), flow.meter().sent.get(), flow.meter().received.get());
        });
        all
    }

    /// Counts as Istio does, where that is wanted.
    fn count_for_istio(&self, count: impl FnOnce(&mut Istio)) {
        if let Some(istio) = &mut *self.istio.borrow_mut() {
            count(istio);
        }
    }

    /// What a peer uses of this worker.
    fn books(&self, account: &Account) -> Rc<Books> {
        let mut peers = self.peers.borrow_mut();
        if let Some(books) = peers.get(account) {
            return Rc::clone(books);
        }
        Rc::clone(peers.entry(account.clone()).or_default())
    }

    /// A connection of a peer that has completed its handshake.
    fn connect(&self, peer: &Peer) -> Result<(Rc<Books>, Connected), ServeError> {
        let books = self.books(&Account::of(peer.identity.as_ref(), peer.client));
        let most = self.setup.borrow().shared.limits.peer.connections;
        if books.memory().is_full() || self.memory.is_full() {
            return Err(ServeError::Memory);
        }
        let connected = books.connect(most).ok_or(ServeError::PeerConnections(most))?;
        Ok((books, connected))
    }

    /// What is done once in a while: forgets peers that are gone, and ends flows whose time is over.
    pub fn tick(&self) {
        self.peers.borrow_mut().retain(|_, books| !books.is_unused());
        let Timeouts { idle, most } = self.setup.borrow().shared.limits.flows;
        if let Some(most) = most {
            self.flows.end_where(EndReason::MaxDuration, |flow| flow.started().elapsed() >= most);
        }
        if let Some(idle) = idle {
            self.flows.end_where(EndReason::IdleTimeout, |flow| {
                flow.meter().is_idle(flow.started().elapsed(), idle)
            });
        }
        self.log.tell();
    }

    /// Relays to the end, and books it.
    async fn relay(&self, client: &mut impl Leg, mut flow: Box<EstablishedFlow>) {
        let path = self.setup.borrow().path.clone();
        let EstablishedFlow { sink, early, live, ends, .. } = &mut *flow;
        let meter = live.meter();
        let relayed = async {
            // Not a byte of one that was to end before it began.
            if let Some(reason) = live.ending() {
                return Outcome::Ended(reason);
            }
            match sink {
                Sink::Direct(leg, first) => {
                    early.ours = first.len();
                    early.sent.put_first(std::mem::take(first));
                    relay(client, leg, early, meter, &path).await
                }
                Sink::Tunnel(stream) => stream.relay(client, early, meter, &path).await,
            }
        };
        let outcome = tokio::select! {
            biased;
            outcome = relayed => outcome,
            // Both legs are dropped before their ends: both are reset.
            reason = live.ended() => Outcome::Ended(reason),
            () = first_of(ends) => Outcome::Ended(EndReason::IdentityExpired),
        };
        // Their resets, or their ends, go out before anything is written about them.
        let EstablishedFlow { sink, live, permit, .. } = *flow;
        drop(sink);
        let cause = live.take_cause().filter(|_| matches!(outcome, Outcome::Ended(_))).unwrap_or_default();
        let id = live.id();
        let (mut record, started) = live.close();
        let durations = &self.counters.durations;
        if let Some(length) = record.phases.first_byte {
            durations.first_byte.observe(length.length());
        }
        durations.flow.observe(started.elapsed());
        record.ended(outcome.reason(), cause.detail.or_else(|| outcome.detail()));
        record.rule = cause.rule;
        self.counters.flows.add(1);
        self.counters.bytes_sent.add(record.sent);
        self.counters.bytes_received.add(record.received);
        self.count(&path);
        if !matches!(outcome, Outcome::Closed) {
            self.counters.flows_reset.add(1);
        }
        self.book(Some(id), record, started);
        drop(permit);
    }

    /// Books what was done in the kernel since it was last asked.
    fn count(&self, path: &Path) {
        match path {
            Path::Copy => {}
            Path::Pipe(pipes) => {
                let Piped { moved, missed } = pipes.report();
                self.counters.bytes_piped.add(moved);
                self.counters.pipes_missed.add(missed);
            }
            Path::Splice(splices) => {
                let Spliced {
                    flows,
                    bytes,
                    promotions,
                    credit,
                    demotions,
                    mailed,
                    forced,
                    no_slot,
                    refused,
                    accounts,
                    accounts_wrong,
                } = splices.report();
                self.counters.flows_spliced.add(flows);
                self.counters.bytes_spliced.add(bytes);
                self.counters.splice_promotions.add(promotions);
                self.counters.splice_credit_renewed.add(credit);
                self.counters.splice_demotions.add(demotions);
                self.counters.splice_mailed.add(mailed);
                self.counters.splice_forced.add(forced);
                self.counters.splice_accounts.add(accounts);
                self.counters.splice_accounts_wrong.add(accounts_wrong);
                self.counters.splice_no_slot.add(no_slot);
                self.counters.splice_refused.add(refused);
            }
        }
    }

    /// Flows that go on have lines in access logs, where one is due since they were looked at `ago`.
    pub fn log_live_flows(&self, ago: Duration) {
        let setup = self.setup.borrow();
        let logs = &setup.shared.access_logs;
        if !logs.have_interval() {
            return;
        }
        self.flows.for_each(|flow| {
            let age = flow.started().elapsed();
            logs.live(flow, age.saturating_sub(ago), age);
        });
    }

    fn book(&self, flow: Option<FlowId>, mut record: Record, started: Instant) {
        record.lasted(started.elapsed());
        self.counters.ended.of(record.reason).add(1);
        tracing::info!(
            target: "tunnel::flow",
            reason = %record.reason,
            rule = record.rule.as_deref(),
            detail = record.detail.as_deref(),
            destination = %record.destination,
            client = %record.client,
            identity = record.identity.as_ref().map(tracing::field::display),
            via = ?record.via,
            passed = record.passed(),
            sent = record.sent,
            received = record.received,
            ms = record.duration_ms,
            "flow ended"
        );
        match flow {
            Some(_) => self.count_for_istio(|istio| istio.closed(&record)),
            None => self.count_for_istio(|istio| istio.failed(&record)),
        }
        self.tell_of_end(flow, &record, started);
        self.records.push(record);
    }

    /// Its last line in access logs, and its span.
    fn tell_of_end(&self, flow: Option<FlowId>, record: &Record, started: Instant) {
        let setup = self.setup.borrow();
        setup.shared.access_logs.ended(flow, record);
        if let Some(tracer) = &setup.shared.tracer {
            tracer.ended(record, started);
        }
    }

    /// A flow has got as far as it gets: the durations, and the spans, of the way there.
    fn trace(&self, record: &mut Record, started: Instant, marks: &Marks, failed: Option<EndReason>) {
        record.phases = marks.phases();
        if let Some(tracer) = &self.setup.borrow().shared.tracer {
            tracer.reached(record, started, marks, failed);
        }
    }

    /// Counts and logs a flow that is refused; its record, to be kept or not.
    fn refused(
        &self,
        refusal: &Refusal,
        mut record: Record,
        identity: Option<&Identity>,
        started: Instant,
    ) -> Record {
        let counter = match refusal {
            Refusal::Request(_) => &self.counters.bad_requests,
            Refusal::Denied { .. } | Refusal::Route { .. } | Refusal::NoRoute(_) | Refusal::Loop => {
                &self.counters.denied
            }
            Refusal::Dial(_) => &self.counters.dial_failed,
            Refusal::Tunnel(TunnelError::Limit { .. }) => &self.counters.over_limit,
            Refusal::Tunnel(_) => &self.counters.tunnel_failed,
            Refusal::Limit(_)
            | Refusal::SourceLimit(_)
            | Refusal::PeerLimit(_)
            | Refusal::PeerRate(_)
            | Refusal::PeerMemory
            | Refusal::Memory => &self.counters.over_limit,
        };
        counter.add(1);
        record.ended(refusal.reason(), Some(refusal.to_string()));
        record.rule = refusal.rule().cloned();
        record.lasted(started.elapsed());
        self.counters.ended.of(record.reason).add(1);
        self.count_for_istio(|istio| istio.failed(&record));
        self.tell_of_end(None, &record, started);
        if self.log.of(refusal).admit() {
            tracing::warn!(
                target: "tunnel::flow",
                reason = %record.reason,
                rule = record.rule.as_deref(),
                detail = record.detail.as_deref(),
                destination = %record.destination,
                client = %record.client,
                identity = identity.map(tracing::field::display),
                passed = record.passed(),
                ms = record.duration_ms,
                "flow refused"
            );
        }
        record
    }

    /// Books what happened at a source and is no flow.
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::PeerAccepted { took } => self.counters.durations.handshake.observe(*took),
            Event::PeerRejected { peer, error } => {
                match error {
                    ServeError::PeerConnections(_) => self.counters.connections_over_limit.add(1),
                    ServeError::Memory => self.counters.connections_without_memory.add(1),
                    ServeError::Crowded => self.counters.handshakes_evicted.add(1),
                    _ => {}
                }
                self.counters.handshakes_failed.add(1);
                self.counters.rejected.by(error.check()).add(1);
                if self.log.handshakes.admit() {
                    tracing::warn!(%peer, %error, "rejected peer connection");
                }
            }
            Event::Flooded { peer, error } => {
                self.counters.tunnels_flooded.add(1);
                if self.log.floods.admit() {
                    tracing::warn!(%peer, %error, "closed peer connection");
                }
            }
            Event::Stray(stray) => {
                let (reason, counter) = match stray {
                    Stray::ToUs(_) => (EndReason::ToOurselves, &self.counters.to_ourselves),
                    Stray::NotCaptured | Stray::Unreadable(_) | Stray::NotRedirected(_) => {
                        (EndReason::NoOriginalDst, &self.counters.no_origin)
                    }
                };
                counter.add(1);
                self.counters.ended.of(reason).add(1);
                if self.log.strays.admit() {
                    tracing::warn!(%reason, "reset a connection to the capture listener that {stray}");
                }
            }
            Event::ConnectionLimit(limit) => {
                if self.log.full.admit() {
                    tracing::warn!(limit, "connection limit of a listener reached: more wait in the backlog");
                }
            }
        }
    }
}
