//! The life of a flow, written once for every source: admit, route, reach, relay, record.
//!
//! A [`Proxy`] is what one worker carries flows by: the configuration in force, its upstreams, and its books. A flow keeps
//! the [`Setup`] that it began with, and what that has connected to.

mod carry;
mod client;
mod in_process;
mod log;
mod reach;
mod refusal;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use self::{client::Account, log::LimitedLog, reach::Sink};
pub use self::{client::Client, refusal::Refusal};
use crate::{
    model::{end::EndReason, flow::Identity},
    observe::{
        flows::{Open, Registry},
        stats::{Counters, Record, Records},
    },
    process::{drain::Watch, limits},
    relay::{Early, Leg, Outcome, Path, PathKind, Piped, Spliced, relay},
    routing::{policy::Policies, router::Router},
    sinks::{
        dial::Dialer,
        upstream::{TunnelError, Upstreams},
    },
    sources::{Event, capture::accept::Stray},
    transport::resolver::Lookups,
};

/// One peer leaves at least one in this many of a worker's flows to the others.
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
    pub inspect_timeout: Duration,
    /// How long a dial for a captured flow may take.
    pub dial_timeout: Duration,
    /// How long flows may go on after the order to stop.
    pub drain_timeout: Duration,
    /// Whether records of flows are kept.
    pub keep_records: bool,
}

/// What flows are carried by.
pub struct Setup {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// This worker's upstreams.
    pub upstreams: Upstreams,
    /// How bytes are moved between two sockets of ours.
    path: Path,
}

impl Setup {
    /// `before` is the one that it replaces.
    pub fn new(shared: Arc<Shared>, upstreams: Upstreams, before: Option<&Self>) -> Self {
        let path = Path::new(shared.path, before.map(|b| &b.path), limits::pipes_for(shared.flows_max));
        Self { shared, upstreams, path }
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
    /// Flows of each peer of our listeners.
    peers: RefCell<HashMap<Account, usize>>,
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
    permit: Permit,
}

/// A place among the flows of a worker, and among those of its peer; given back when dropped.
struct Permit {
    proxy: Rc<Proxy>,
    account: Option<Account>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.proxy.active.set(self.proxy.active.get() - 1);
        let Some(account) = &self.account else { return };
        let mut peers = self.proxy.peers.borrow_mut();
        if let Some(active) = peers.get_mut(account) {
            *active -= 1;
            if *active == 0 {
                peers.remove(account);
            }
        }
    }
}

impl Proxy {
    /// `stop` says when the flows that are left are to end.
    pub fn new(setup: Setup, counters: Arc<Counters>, stop: Watch) -> Rc<Self> {
        let shared = &setup.shared;
        Rc::new(Self {
            flows: Rc::default(),
            records: Records::new(shared.keep_records),
            lookups: Lookups::new(shared.flows_max),
            setup: RefCell::new(Rc::new(setup)),
            counters,
            log: LimitedLog::default(),
            active: Cell::default(),
            peers: RefCell::default(),
            stop,
        })
    }

    /// What a flow that begins now is carried by.
    pub fn setup(&self) -> Rc<Setup> {
        Rc::clone(&self.setup.borrow())
    }

    /// From now on new flows are carried by this.
    pub fn replace_setup(&self, setup: Rc<Setup>) {
        self.setup.replace(setup);
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
    fn admit(self: &Rc<Self>, account: Option<Account>) -> Result<Permit, Refusal> {
        let most = self.setup.borrow().shared.flows_max;
        let share = most - most / PEER_LEAVES;
        let mut peers = self.peers.borrow_mut();
        let active = account.as_ref().and_then(|a| peers.get(a).copied()).unwrap_or(0);
        if self.active.get() >= most || active >= share {
            return Err(if active >= share { Refusal::PeerLimit(share) } else { Refusal::Limit(most) });
        }
        self.active.set(self.active.get() + 1);
        if let Some(account) = &account {
            peers.insert(account.clone(), active + 1);
        }
        Ok(Permit { proxy: Rc::clone(self), account })
    }

    /// Relays to the end, and books it.
    async fn relay(&self, client: &mut impl Leg, mut flow: Box<EstablishedFlow>) {
        let path = self.setup.borrow().path.clone();
        let EstablishedFlow { sink, early, live, .. } = &mut *flow;
        let meter = live.meter();
        let relayed = async {
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
        };
        // Their resets, or their ends, go out before anything is written about them.
        let EstablishedFlow { sink, live, permit, .. } = *flow;
        drop(sink);
        let (mut record, started) = live.close();
        record.ended(outcome.reason(), outcome.detail());
        self.counters.flows.add(1);
        self.counters.bytes_sent.add(record.sent);
        self.counters.bytes_received.add(record.received);
        self.count(&path);
        if !matches!(outcome, Outcome::Closed) {
            self.counters.flows_reset.add(1);
        }
        self.book(record, started);
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
                self.counters.splice_accounts.add(accounts);
                self.counters.splice_accounts_wrong.add(accounts_wrong);
                self.counters.splice_no_slot.add(no_slot);
                self.counters.splice_refused.add(refused);
            }
        }
    }

    fn book(&self, mut record: Record, started: Instant) {
        record.lasted(started.elapsed());
        self.counters.ended.of(record.reason).add(1);
        tracing::info!(
            target: "tunnel::flow",
            reason = %record.reason,
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
        self.records.push(record);
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
            Refusal::Denied(_) | Refusal::Route(_) | Refusal::NoRoute(_) | Refusal::Loop => {
                &self.counters.denied
            }
            Refusal::Dial(_) => &self.counters.dial_failed,
            Refusal::Tunnel(TunnelError::Limit { .. }) => &self.counters.over_limit,
            Refusal::Tunnel(_) => &self.counters.tunnel_failed,
            Refusal::Limit(_) | Refusal::PeerLimit(_) => &self.counters.over_limit,
        };
        counter.add(1);
        record.ended(refusal.reason(), Some(refusal.to_string()));
        record.lasted(started.elapsed());
        self.counters.ended.of(record.reason).add(1);
        if self.log.of(refusal).admit() {
            tracing::warn!(
                target: "tunnel::flow",
                reason = %record.reason,
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
            Event::PeerRejected { peer, error } => {
                self.counters.handshakes_failed.add(1);
                if self.log.handshakes.admit() {
                    tracing::warn!(%peer, %error, "rejected peer connection");
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
