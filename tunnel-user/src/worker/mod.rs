//! One core's share of the work: a thread, its runtime, its listeners, its pools.
//!
//! Enters: sockets and what the configuration says. Leaves: flows, carried. Invariant: a flow never
//! changes worker, and nothing on its path takes a lock or crosses a core. It never opens a listener
//! itself: those are bound before any worker starts.

mod captured;
mod itself;
mod reach;
mod requests;

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
    net::TcpListener,
    runtime,
    sync::mpsc,
    task::LocalSet,
    time::{sleep, timeout},
};

use self::{
    captured::accept_captured,
    reach::Sink,
    requests::{At, accept_tunnels},
};
use crate::{
    capture::accept::{Accept, Origins},
    config,
    drain::{self, Phase, Tasks, Watch},
    flow::Identity,
    limits,
    listener::{accept, request::Refusal},
    policy::Policies,
    relay::{Early, Leg, Meter, Outcome, Piped, Pipes, Queue, relay},
    route::Router,
    stats::{Counters, Record, Records},
    transport::tcp::Mark,
    tunnel::{self, Upstreams, h1, headers::Trace},
};

/// One peer leaves at least one in this many of a worker's flows to the others.
const PEER_LEAVES: usize = 4;
/// How long accepting waits after an error that is not the connection's: out of descriptors or memory.
const ACCEPT_BACK_OFF: Duration = Duration::from_millis(50);
/// How long flows that were told to end may take for it.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// What all workers share; nothing in it changes.
pub struct Shared {
    /// Where flows go.
    pub router: Router,
    /// Who may reach what through our listeners.
    pub policies: Policies,
    /// The upstreams, in the configuration's order.
    pub upstreams: Vec<tunnel::Next<tunnel::Settings>>,
    /// The mark of our own sockets.
    pub mark: Mark,
    /// What this process calls itself in `via`, as no other does.
    pub pseudonym: String,
    /// How many flows one worker takes at once.
    pub flows_max: usize,
    /// How bytes are moved between two sockets of ours.
    pub relay: config::Relay,
    /// How long a dial for a captured flow may take.
    pub dial_timeout: Duration,
    /// How long flows may go on after the order to stop.
    pub drain_timeout: Duration,
    /// Whether records of flows are kept.
    pub keep_records: bool,
}

/// A redirected connections' listener, for one worker.
pub struct CaptureSocket {
    /// What routes call its capture.
    pub name: Option<Arc<str>>,
    /// The listening socket.
    pub socket: Socket,
    /// Who knows where its connections wanted to go.
    pub origins: Origins,
}

/// News about network namespaces.
pub enum More {
    /// One has appeared.
    Listen(CaptureSocket),
    /// One has gone: its listeners, by its cookie, keep it alive.
    Forget(u64),
}

/// A listener for CONNECT requests, for one worker.
pub struct ConnectSocket {
    /// What routes call it.
    pub name: Option<Arc<str>>,
    /// The listening socket.
    pub socket: Socket,
    /// How it serves.
    pub settings: Arc<accept::Settings>,
    /// How long a dial for one of its streams may take.
    pub dial_timeout: Duration,
}

/// What one worker starts with.
pub struct Start {
    /// What all share.
    pub shared: Arc<Shared>,
    /// Its own counters.
    pub counters: Arc<Counters>,
    /// Namespaces that appear and go later.
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
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, work(start))
}

struct Worker {
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    upstreams: Upstreams,
    records: Records,
    /// What bytes are moved through between two sockets of ours, unless they are copied.
    pipes: Option<Pipes>,
    trace: Trace,
    active: Cell<usize>,
    /// Flows of each peer of our listeners.
    peers: RefCell<HashMap<Account, usize>>,
    watch: Watch,
    /// Told when the flows that are left are to end.
    stop: Watch,
}

async fn work(start: Start) -> io::Result<Report> {
    let Start { shared, counters, mut more, captures, listeners, mut watch } = start;
    let upstreams = Upstreams::new(&shared.upstreams);
    let (stop, stopped) = drain::channel();
    let worker = Rc::new(Worker {
        records: Records::new(shared.keep_records),
        pipes: match shared.relay {
            config::Relay::Copy => None,
            config::Relay::Pipe => Some(Pipes::new(limits::pipes_for(shared.flows_max))),
        },
        shared,
        counters,
        upstreams,
        trace: Trace::default(),
        active: Cell::default(),
        peers: RefCell::default(),
        watch: watch.clone(),
        stop: stopped,
    });
    let flows = Rc::new(Tasks::default());
    let accepting = Tasks::default();
    // By network namespace; those of redirected connections have none that the programs know.
    let mut capturing: HashMap<Option<u64>, Tasks> = HashMap::new();
    for CaptureSocket { name, socket, origins } in captures {
        let netns = origins.netns();
        let accept = Accept::new(socket, origins)?;
        let accept = accept_captured(Rc::clone(&worker), accept, name, Rc::clone(&flows));
        capturing.entry(netns).or_default().spawn(accept);
    }
    for listener in listeners {
        let socket = TcpListener::from_std(listener.socket.into())?;
        let at = Rc::new(At { name: listener.name, dial_timeout: listener.dial_timeout });
        accepting.spawn(accept_tunnels(Rc::clone(&worker), socket, listener.settings, at, Rc::clone(&flows)));
    }
    loop {
        tokio::select! {
            () = watch.draining() => break,
            Some(news) = more.recv() => match news {
                More::Listen(CaptureSocket { name, socket, origins }) => {
                    let netns = origins.netns();
                    match Accept::new(socket, origins) {
                        Ok(accept) => {
                            let accept = accept_captured(Rc::clone(&worker), accept, name, Rc::clone(&flows));
                            capturing.entry(netns).or_default().spawn(accept);
                        }
                        Err(e) => tracing::error!("a capture listener could not be used: {e}"),
                    }
                }
                More::Forget(netns) => drop(capturing.remove(&Some(netns))),
            },
        }
    }
    drop(accepting);
    // These take what is waiting, and end. The kernel programs see at once that a listener is closed.
    for tasks in capturing.values() {
        let _late = timeout(STOP_PATIENCE, tasks.ended()).await;
    }
    drop(capturing);
    let drained = async {
        tokio::select! {
            _ = timeout(worker.shared.drain_timeout, flows.ended()) => {}
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
    tokio::select! {
        _ = timeout(worker.shared.drain_timeout, worker.upstreams.close()) => {}
        () = watch.stopping() => {}
    }
    let (records, dropped) = worker.records.take();
    let connections_opened = worker.upstreams.connections_opened();
    Ok(Report { records, dropped, connections_opened })
}

async fn back_off(e: &io::Error) {
    // The connection was gone before it was accepted: nothing is wrong here.
    if e.kind() != io::ErrorKind::ConnectionAborted {
        tracing::warn!("accepting failed: {e}");
        sleep(ACCEPT_BACK_OFF).await;
    }
}

/// Whose flows are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Account {
    /// Those of an identity.
    Known(Identity),
    /// Those from an address where nobody has proved who he is.
    At(IpAddr),
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
        let most = self.shared.flows_max;
        let share = most - most / PEER_LEAVES;
        let mut peers = self.peers.borrow_mut();
        let active = account.and_then(|a| peers.get(a).copied()).unwrap_or(0);
        if self.active.get() >= most || active >= share {
            return Err(Refusal::Limit(if active >= share { share } else { most }));
        }
        self.active.set(self.active.get() + 1);
        if let Some(account) = account {
            peers.insert(account.clone(), active + 1);
        }
        Ok(Place { worker: Rc::clone(self), account: account.cloned() })
    }

    /// Relays to the end, and books it.
    /// `early`: what the client has sent already.
    async fn relay(
        &self,
        client: &mut impl Leg,
        early: Queue,
        sink: Sink,
        mut record: Record,
        started: Instant,
    ) {
        let mut early = Early { sent: early, received: Queue::default() };
        let meter = Meter::default();
        let pipes = self.pipes.as_ref();
        let relayed = async {
            match sink {
                Sink::Direct(mut leg) => relay(client, &mut leg, early, &meter, pipes).await,
                Sink::Tunnel(mut stream) => {
                    early.received = std::mem::take(&mut stream.early);
                    match &mut stream.leg {
                        tunnel::Leg::H2(leg) => relay(client, leg, early, &meter, pipes).await,
                        tunnel::Leg::H1(h1::Leg::Tcp(leg)) => relay(client, leg, early, &meter, pipes).await,
                        tunnel::Leg::H1(h1::Leg::Tls(leg)) => {
                            relay(client, &mut **leg, early, &meter, pipes).await
                        }
                        tunnel::Leg::H1(h1::Leg::Nested(_) | h1::Leg::NestedTls(_)) => {
                            relay(client, &mut stream, early, &meter, pipes).await
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
        (record.sent, record.received) = (meter.sent.get(), meter.received.get());
        record.outcome = outcome.to_string();
        self.counters.flows.add(1);
        self.counters.bytes_sent.add(record.sent);
        self.counters.bytes_received.add(record.received);
        if let Some(Piped { moved, missed }) = pipes.map(Pipes::report) {
            self.counters.bytes_piped.add(moved);
            self.counters.pipes_missed.add(missed);
        }
        if !matches!(outcome, Outcome::Closed) {
            self.counters.flows_reset.add(1);
        }
        self.book(record, started);
    }

    fn book(&self, mut record: Record, started: Instant) {
        record.lasted(started.elapsed());
        tracing::info!(
            target: "tunnel::flow",
            destination = record.destination,
            client = record.client,
            identity = record.identity,
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
            Refusal::Tunnel(_) => &self.counters.tunnel_failed,
            Refusal::Limit(_) => &self.counters.over_limit,
        };
        counter.add(1);
        record.outcome = format!("refused: {refusal}");
        record.lasted(started.elapsed());
        tracing::warn!(
            target: "tunnel::flow",
            destination = record.destination,
            client = record.client,
            identity = identity.map(tracing::field::display),
            passed = record.passed(),
            ms = record.duration_ms,
            "{}", record.outcome
        );
        self.records.push(record);
    }

    /// Books a flow whose client did not wait for it.
    fn left(&self, mut record: Record, started: Instant) {
        "the client left before the target answered".clone_into(&mut record.outcome);
        self.book(record, started);
    }
}
