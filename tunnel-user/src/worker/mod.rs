//! One core's share of the work: a thread, its runtime, its listeners, its pools.
//!
//! Enters: sockets and what the configuration says. Leaves: flows, carried. Invariant: a flow never
//! changes worker, and nothing on its path takes a lock or crosses a core. It never opens a listener
//! itself: those are bound before any worker starts.

mod captured;
mod itself;
mod lines;
mod look;
mod reach;
mod requests;
mod setup;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::IpAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::Socket;
use tokio::{
    runtime::{self, LocalOptions},
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, timeout, timeout_at},
};

use self::{
    lines::Lines,
    reach::Sink,
    setup::{Setup, Sources},
};
use crate::{
    model::flow::{ClientAddr, Identity},
    observe::stats::{Counters, Record, Records},
    process::drain::{self, Phase, Tasks, Watch},
    relay::{Early, Leg, Meter, Outcome, Path, PathKind, Piped, Spliced, give_up_silent_peers, relay},
    routing::{policy::Policies, router::Router},
    sinks::upstream::{self, TunnelError, Upstreams, h1, headers::Trace},
    sources::{
        capture::accept::Origins,
        listener::{accept, request::Refusal},
    },
    transport::{resolver::Lookups, tcp::Own},
};

/// One peer leaves at least one in this many of a worker's flows to the others.
const PEER_LEAVES: usize = 4;
/// How long accepting waits after an error that is not the connection's: out of descriptors or memory.
const ACCEPT_BACK_OFF: Duration = Duration::from_millis(50);
/// How long flows that were told to end may take for it.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// How often a worker wakes for nothing. tokio wakes its own thread, by a write to an eventfd and another turn of epoll,
/// for every timer that is due before all others, which those of a new flow often are; not before one that is always
/// due sooner.
const PULSE: Duration = Duration::from_secs(1);

/// What all workers share of one configuration.
pub struct Shared {
    /// Where flows go.
    pub router: Router,
    /// Who may reach what through our listeners.
    pub policies: Policies,
    /// What our own sockets are told by.
    pub own: Own,
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

/// A capture, or a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(pub u64);

/// A redirected connections' listener, for one worker.
pub struct CaptureSocket {
    /// Its capture.
    pub source: SourceId,
    /// What routes call that.
    pub name: Option<Arc<str>>,
    /// The listening socket.
    pub socket: Socket,
    /// Who knows where its connections wanted to go.
    pub origins: Origins,
}

/// A listener for CONNECT requests, for one worker.
pub struct ConnectSocket {
    /// Which listener.
    pub source: SourceId,
    /// What routes call it.
    pub name: Option<Arc<str>>,
    /// The listening socket.
    pub socket: Socket,
    /// How it serves.
    pub settings: Arc<accept::Settings>,
    /// How long a dial for one of its streams may take.
    pub dial_timeout: Duration,
}

/// News for a running worker.
pub enum More {
    /// A network namespace has appeared.
    Listen(CaptureSocket),
    /// One has gone: a capture's listeners there, by its cookie, keep it alive.
    Forget(SourceId, u64),
    /// Another configuration is in force.
    Change(Box<Change>),
}

/// What is different in another configuration.
pub struct Change {
    /// What all share.
    pub shared: Arc<Shared>,
    /// The upstreams. One that is there already by the same `Arc` is kept, with its connections.
    pub upstreams: Vec<Arc<upstream::Next<upstream::Settings>>>,
    /// What routes call these now.
    pub renamed: Vec<(SourceId, Option<Arc<str>>)>,
    /// Nothing more is taken from these. What they have brought goes on.
    pub retire: Vec<SourceId>,
    /// Capture listeners that are new.
    pub captures: Vec<CaptureSocket>,
    /// CONNECT listeners that are new, or serve in another way.
    pub listeners: Vec<ConnectSocket>,
    /// Dropped once all of it is in force.
    pub done: mpsc::Sender<()>,
}

/// What one worker starts with.
pub struct Start {
    /// What all share.
    pub shared: Arc<Shared>,
    /// The upstreams.
    pub upstreams: Vec<Arc<upstream::Next<upstream::Settings>>>,
    /// Its own counters.
    pub counters: Arc<Counters>,
    /// What changes later.
    pub more: mpsc::Receiver<More>,
    /// Capture listeners.
    pub captures: Vec<CaptureSocket>,
    /// CONNECT listeners.
    pub listeners: Vec<ConnectSocket>,
    /// The order to stop.
    pub watch: Watch,
}

/// What one worker leaves.
#[derive(Debug, Default)]
pub struct Report {
    /// Its flows, if they were kept.
    pub records: Vec<Record>,
    /// Flows whose records there was no room for.
    pub dropped: u64,
    /// Tunnel connections that it opened.
    pub connections_opened: u64,
}

/// Runs a worker on this thread until it is told to stop and its flows have ended.
pub fn run(start: Start) -> io::Result<Report> {
    // Not a LocalSet in a runtime: that has a queue of its own, and wakes its runtime for every task that it wakes.
    let runtime = runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(work(start))
}

struct Worker {
    /// What new flows are carried by.
    setup: RefCell<Rc<Setup>>,
    /// Upstreams of earlier configurations, until their flows have ended.
    retired: Tasks,
    counters: Arc<Counters>,
    records: Records,
    lines: Lines,
    trace: Trace,
    active: Cell<usize>,
    /// Whose turn it is to look a name up.
    lookups: Lookups<Account>,
    /// Flows of each peer of our listeners.
    peers: RefCell<HashMap<Account, usize>>,
    /// Told when the flows that are left are to end.
    stop: Watch,
}

async fn work(start: Start) -> io::Result<Report> {
    let Start { shared, upstreams, counters, mut more, captures, listeners, mut watch } = start;
    let upstreams = Upstreams::new(&upstreams, None);
    let (stop, stopped) = drain::channel();
    let flows_max = shared.flows_max;
    let worker = Rc::new(Worker {
        records: Records::new(shared.keep_records),
        setup: RefCell::new(Rc::new(Setup::new(shared, upstreams, None))),
        retired: Tasks::default(),
        counters,
        lines: Lines::default(),
        trace: Trace::default(),
        lookups: Lookups::new(flows_max),
        active: Cell::default(),
        peers: RefCell::default(),
        stop: stopped,
    });
    let flows = Rc::new(Tasks::default());
    let mut sources = Sources::default();
    captures.into_iter().for_each(|socket| sources.capture(&worker, socket, &flows));
    listeners.into_iter().for_each(|socket| sources.listen(&worker, socket, &flows));
    let mut pulse = interval(PULSE);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = watch.draining() => break,
            _ = pulse.tick() => {
                give_up_silent_peers();
                worker.lines.tell();
            }
            Some(news) = more.recv() => match news {
                More::Listen(socket) => sources.capture(&worker, socket, &flows),
                More::Forget(source, netns) => sources.forget(source, netns),
                More::Change(change) => worker.change(*change, &mut sources, &flows),
            },
        }
    }
    // The kernel programs see at once that a listener is closed.
    sources.end().await;
    let setup = worker.setup();
    // For the flows, and for the connections that they were on.
    let deadline = tokio::time::Instant::now() + setup.shared.drain_timeout;
    let drained = async {
        tokio::select! {
            _ = timeout_at(deadline, flows.ended()) => {}
            () = watch.stopping() => {}
        }
    };
    drained.await;
    if worker.active.get() > 0 {
        tracing::warn!("{} flows were reset at the drain deadline", worker.active.get());
    }
    stop.enter(Phase::Stop);
    let _ended = timeout(STOP_PATIENCE, flows.ended()).await;
    // What the flows have handed over is not on the wire yet.
    let closed = async {
        setup.upstreams.close().await;
        worker.retired.ended().await;
    };
    // What was reset has to go out too, at the deadline.
    let deadline = deadline.max(tokio::time::Instant::now() + STOP_PATIENCE);
    tokio::select! {
        _ = timeout_at(deadline, closed) => {}
        () = watch.stopping() => {}
    }
    worker.lines.tell();
    let (records, dropped) = worker.records.take();
    let connections_opened = setup.upstreams.connections_opened();
    Ok(Report { records, dropped, connections_opened })
}

async fn back_off(e: &io::Error) {
    // The connection was gone before it was accepted: nothing is wrong here.
    if e.kind() != io::ErrorKind::ConnectionAborted {
        tracing::warn!("accepting failed: {e}");
        sleep(ACCEPT_BACK_OFF).await;
    }
}

/// What a flow goes on with once its target is reached. A task holds no more of it than a pointer, and nothing of what
/// it took to come so far.
struct Going {
    sink: Sink,
    /// What has moved already.
    early: Early,
    record: Record,
    started: Instant,
}

/// Whose flows are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Account {
    /// Those of an identity.
    Known(Identity),
    /// Those from an address where nobody has proved who he is.
    At(IpAddr),
}

impl Account {
    /// An identity's, or where there is none, an address's.
    fn of(identity: Option<&Identity>, client: ClientAddr) -> Self {
        identity.cloned().map_or(Self::At(client.0.ip().to_canonical()), Self::Known)
    }
}

/// A place among the flows of a worker, and among those of its peer; given back when dropped.
struct Place {
    worker: Rc<Worker>,
    account: Option<Account>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.worker.active.set(self.worker.active.get() - 1);
        let Some(account) = &self.account else { return };
        let mut peers = self.worker.peers.borrow_mut();
        if let Some(active) = peers.get_mut(account) {
            *active -= 1;
            if *active == 0 {
                peers.remove(account);
            }
        }
    }
}

impl Worker {
    /// A place for a flow of the operator's own applications, or of a peer. At the limit none.
    fn admit(self: &Rc<Self>, account: Option<&Account>) -> Result<Place, Refusal> {
        let most = self.setup.borrow().shared.flows_max;
        let share = most - most / PEER_LEAVES;
        let mut peers = self.peers.borrow_mut();
        let active = account.and_then(|a| peers.get(a).copied()).unwrap_or(0);
        if self.active.get() >= most || active >= share {
            return Err(if active >= share { Refusal::PeerLimit(share) } else { Refusal::Limit(most) });
        }
        self.active.set(self.active.get() + 1);
        if let Some(account) = account {
            peers.insert(account.clone(), active + 1);
        }
        Ok(Place { worker: Rc::clone(self), account: account.cloned() })
    }

    /// Relays to the end, and books it.
    async fn relay(&self, client: &mut impl Leg, mut going: Box<Going>) {
        let meter = Meter::default();
        let path = self.setup.borrow().path.clone();
        let Going { sink, early, .. } = &mut *going;
        let relayed = async {
            match sink {
                Sink::Direct(leg, first) => {
                    early.ours = first.len();
                    early.sent.put_first(std::mem::take(first));
                    relay(client, leg, early, &meter, &path).await
                }
                Sink::Tunnel(stream) => {
                    early.received = std::mem::take(&mut stream.early);
                    match &mut stream.leg {
                        upstream::Leg::H2(leg) => relay(client, leg, early, &meter, &path).await,
                        upstream::Leg::H1(h1::Leg::Tcp(leg)) => {
                            relay(client, leg, early, &meter, &path).await
                        }
                        upstream::Leg::H1(h1::Leg::Tls(leg)) => {
                            relay(client, &mut **leg, early, &meter, &path).await
                        }
                        upstream::Leg::H1(h1::Leg::Nested(_) | h1::Leg::NestedTls(_)) => {
                            let outcome = relay(client, stream, early, &meter, &path).await;
                            if let Outcome::Closed = outcome {
                                // Apart: it is of no other kind of flow.
                                Box::pin(stream.linger()).await;
                            }
                            outcome
                        }
                    }
                }
            }
        };
        let mut stop = self.stop.clone();
        let outcome = tokio::select! {
            biased;
            outcome = relayed => outcome,
            // Both legs are dropped before their ends: both are reset.
            () = stop.stopping() => Outcome::Stopped,
        };
        // Their resets, or their ends, go out before anything is written about them.
        let Going { sink, mut record, started, .. } = *going;
        drop(sink);
        (record.sent, record.received) = (meter.sent.get(), meter.received.get());
        record.outcome = match &outcome {
            Outcome::Closed => "closed".into(),
            other => other.to_string().into(),
        };
        self.counters.flows.add(1);
        self.counters.bytes_sent.add(record.sent);
        self.counters.bytes_received.add(record.received);
        self.count(&path);
        if !matches!(outcome, Outcome::Closed) {
            self.counters.flows_reset.add(1);
        }
        self.book(record, started);
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
                let Spliced { flows, bytes, promotions, credit, demotions, no_slot, refused } =
                    splices.report();
                self.counters.flows_spliced.add(flows);
                self.counters.bytes_spliced.add(bytes);
                self.counters.splice_promotions.add(promotions);
                self.counters.splice_credit_renewed.add(credit);
                self.counters.splice_demotions.add(demotions);
                self.counters.splice_no_slot.add(no_slot);
                self.counters.splice_refused.add(refused);
            }
        }
    }

    fn book(&self, mut record: Record, started: Instant) {
        record.lasted(started.elapsed());
        tracing::info!(
            target: "tunnel::flow",
            destination = %record.destination,
            client = %record.client,
            identity = record.identity.as_ref().map(tracing::field::display),
            via = ?record.via,
            passed = record.passed(),
            sent = record.sent,
            received = record.received,
            ms = record.duration_ms,
            "{}", record.outcome
        );
        self.records.push(record);
    }

    fn refused(&self, refusal: &Refusal, mut record: Record, identity: Option<&Identity>, started: Instant) {
        let counter = match refusal {
            Refusal::Method(_)
            | Refusal::Authority(_)
            | Refusal::Head(_)
            | Refusal::Content(_)
            | Refusal::Host(_) => &self.counters.bad_requests,
            Refusal::Denied(_) | Refusal::Loop => &self.counters.denied,
            Refusal::Dial(_) => &self.counters.dial_failed,
            Refusal::Tunnel(TunnelError::Limit { .. }) => &self.counters.over_limit,
            Refusal::Tunnel(_) => &self.counters.tunnel_failed,
            Refusal::Limit(_) | Refusal::PeerLimit(_) => &self.counters.over_limit,
        };
        counter.add(1);
        record.outcome = format!("refused: {refusal}").into();
        record.lasted(started.elapsed());
        if self.lines.of(refusal).admit() {
            tracing::warn!(
                target: "tunnel::flow",
                destination = %record.destination,
                client = %record.client,
                identity = identity.map(tracing::field::display),
                passed = record.passed(),
                ms = record.duration_ms,
                "{}", record.outcome
            );
        }
        self.records.push(record);
    }

    /// Books a flow whose client did not wait for it.
    fn left(&self, mut record: Record, started: Instant) {
        record.outcome = "the client left before the target answered".into();
        self.book(record, started);
    }
}
