//! One core's share of the work: a thread, its runtime, its listeners, its connections.
//!
//! # Invariants
//! - A flow never changes worker, and nothing on its path takes a lock or crosses a core.
//! - A worker is given *state* and never events: it compares what it is to do with what it does.
//! - It opens no listener itself: those are bound before it hears of them.

mod reconcile;

use std::{
    fmt,
    future::pending,
    io,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use socket2::Socket;
use tokio::{
    runtime::{self, LocalOptions},
    sync::watch,
    time::{MissedTickBehavior, interval, timeout, timeout_at},
};

use self::reconcile::{Sources, Worker};
#[cfg(debug_assertions)]
use crate::kernel::confine::hostile;
pub use crate::proxy::{Limits, Shared, Timeouts};
use crate::{
    kernel::{
        confine::{self, ConfineError, Confined},
        helper::Asking,
    },
    model::{
        end::EndReason,
        names::{IdentityName, SourceName},
    },
    observe::stats::{Counters, Record},
    process::{
        drain::{self, Phase, Tasks, Watch},
        random,
    },
    proxy::{Proxy, Setup, questions::Questions},
    relay::give_up_silent_peers,
    sinks::upstream::{self, Upstreams},
    sources::{
        capture::accept::Origins,
        listener::{accept, h3::Quic},
    },
};

/// How long flows that were told to end may take for it.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// How often a worker wakes for nothing. tokio wakes its own thread, by a write to an eventfd and another turn of epoll,
/// for every timer that is due before all others, which those of a new flow often are; not before one that is always
/// due sooner.
const PULSE: Duration = Duration::from_secs(1);

/// Tasks that run before a worker looks at epoll again; tokio's own measure is 61. A task takes 200 µs at most
/// (`transport::http2`), most of them a twentieth of that, so what has just come is seen within a millisecond.
const TASKS_PER_POLL: u32 = 16;

/// Everything that a worker is to do.
pub struct State {
    /// Later ones have higher numbers.
    pub version: u64,
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// The upstreams. One that is there already by the same `Arc` is kept, with its connections.
    pub upstreams: Vec<Arc<upstream::Next<upstream::UpstreamSettings>>>,
    /// What is accepted from.
    pub sources: Vec<Source>,
}

/// Something that connections are accepted from: a listener, or a capture in one network namespace.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its stable name.
    pub name: SourceName,
    /// The cookie of the network namespace, of a capture.
    pub netns: Option<u64>,
    /// What routes call it.
    pub called: Option<Arc<str>>,
    /// Who we are to upstreams for its flows, where it is a capture that says so.
    pub identity: Option<IdentityName>,
    /// Its sockets. One that is accepted from already by the same `Arc` goes on.
    pub sockets: Arc<Sockets>,
}

/// Listening sockets on their way to the workers. Each worker takes its own, once; dropped, the others are closed.
#[derive(Default)]
pub struct Sockets(Vec<Mutex<Vec<Listening>>>);

/// A listening socket, and how its connections are served.
pub enum Listening {
    /// Connections that were captured.
    Captured(CaptureSocket),
    /// CONNECT requests, over TCP.
    Requests(ConnectSocket),
    /// CONNECT requests, over QUIC.
    Quic(QuicSocket),
}

/// A redirected connections' listener.
pub struct CaptureSocket {
    /// The listening socket.
    pub socket: Socket,
    /// Who knows where its connections wanted to go.
    pub origins: Origins,
}

/// A listener for CONNECT requests.
pub struct ConnectSocket {
    /// The listening socket.
    pub socket: Socket,
    /// How it serves.
    pub settings: Arc<accept::Settings>,
    /// How long a dial for one of its streams may take.
    pub dial_timeout: Duration,
}

/// A UDP socket for CONNECT requests over HTTP/3.
pub struct QuicSocket {
    /// The socket, and how it serves.
    pub quic: Quic,
    /// How long a dial for one of its streams may take.
    pub dial_timeout: Duration,
}

impl Sockets {
    /// The sockets of each worker.
    pub fn new(per_worker: impl IntoIterator<Item = Vec<Listening>>) -> Arc<Self> {
        Arc::new(Self(per_worker.into_iter().map(Mutex::new).collect()))
    }

    /// Closes those of a worker that has not taken them and will not.
    pub fn close(&self, worker: usize) {
        drop(self.take(worker));
    }

    /// Those of one worker, for the first who asks.
    fn take(&self, worker: usize) -> Vec<Listening> {
        let own = self.0.get(worker).map(|own| own.lock().unwrap_or_else(PoisonError::into_inner));
        own.map(|mut own| std::mem::take(&mut *own)).unwrap_or_default()
    }
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets").field("workers", &self.0.len()).finish_non_exhaustive()
    }
}

/// How the thread of a worker is confined.
pub struct Confinement {
    /// What does for it what takes privileges; `None`: the thread keeps them.
    pub helper: Option<Asking>,
    /// Whether it marks its sockets.
    pub marking: bool,
    /// Told how it went, before the worker does anything else.
    pub confined: mpsc::SyncSender<Result<Option<Confined>, ConfineError>>,
}

impl Confinement {
    /// Confines the calling thread; whether it may go on.
    fn enter(self) -> bool {
        let Self { helper, marking, confined } = self;
        // Its source of random numbers looks into files once, and cannot later. Without numbers TLS fails, and says so.
        let _primed = aws_lc_rs::rand::fill(&mut [0]);
        let entered = helper.map(|helper| {
            helper.adopt();
            confine::worker_thread(marking)
        });
        let entered = entered.transpose();
        #[cfg(debug_assertions)]
        if let Ok(done) = &entered
            && hostile::is_wanted()
        {
            for (attempt, error) in hostile::outcomes(done.is_some()) {
                tracing::info!(attempt, error, "tried what a hostile worker would");
            }
        }
        let may_go_on = entered.is_ok();
        // Whoever has started it waits.
        let _gone = confined.send(entered);
        may_go_on
    }
}

/// What one worker starts with.
pub struct Start {
    /// Which worker it is, from 0.
    pub index: usize,
    /// Its own counters.
    pub counters: Arc<Counters>,
    /// What it is to do, from the first state on; nothing before.
    pub states: watch::Receiver<Option<Arc<State>>>,
    /// Told the version of the state that is in force.
    pub in_force: watch::Sender<u64>,
    /// A number,
    pub question: watch::Receiver<u64>,
    /// which it says again as soon as it runs.
    pub answer: watch::Sender<u64>,
    /// The order to stop.
    pub watch: Watch,
    /// What it is asked.
    pub questions: Questions,
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
pub fn run(start: Start, confinement: Confinement) -> io::Result<Report> {
    random::seed();
    // Not a LocalSet in a runtime: that has a queue of its own, and wakes its runtime for every task that it wakes.
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(TASKS_PER_POLL)
        .build_local(LocalOptions::default())?;
    if !confinement.enter() {
        return Ok(Report::default());
    }
    runtime.block_on(work(start))
}

async fn work(start: Start) -> io::Result<Report> {
    let Start { index, counters, mut states, in_force, mut question, answer, mut watch, questions } = start;
    let first = tokio::select! {
        // What was published is accepted from, if only to the end of what waits there.
        biased;
        first = next(&mut states) => first,
        () = watch.draining() => return Ok(Report::default()),
    };
    let (stop, stopped) = drain::channel();
    let upstreams = Upstreams::new(&first.upstreams, None);
    let setup = Setup::new(Arc::clone(&first.shared), upstreams, None, &counters);
    let worker = Worker { index, proxy: Proxy::new(setup, counters, stopped), retired: Tasks::default() };
    let flows = Rc::new(Tasks::default());
    // Also while it drains.
    let answering = Tasks::default();
    answering.spawn(questions.answer(Rc::clone(&worker.proxy)));
    let mut sources = Sources::default();
    worker.reconcile(&first, &mut sources, &flows);
    in_force.send_replace(first.version);
    drop(first);
    let mut looked = tokio::time::Instant::now();
    let mut pulse = interval(PULSE);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = watch.draining() => break,
            _ = pulse.tick() => {
                give_up_silent_peers();
                worker.proxy.tick();
                worker.proxy.log_live_flows(looked.elapsed());
                looked = tokio::time::Instant::now();
            }
            Ok(()) = question.changed() => {
                let asked = *question.borrow_and_update();
                answer.send_replace(asked);
            }
            state = next(&mut states) => {
                worker.reconcile(&state, &mut sources, &flows);
                in_force.send_replace(state.version);
            }
        }
    }
    // The kernel programs see at once that a listener is closed.
    tokio::select! {
        () = sources.end() => {}
        () = watch.stopping() => {}
    }
    let setup = worker.proxy.setup();
    // For the flows, and for the connections that they were on.
    let deadline = tokio::time::Instant::now() + setup.shared.drain_timeout;
    let drained = async {
        tokio::select! {
            _ = timeout_at(deadline, flows.ended()) => {}
            () = watch.stopping() => {}
        }
    };
    drained.await;
    if worker.proxy.active() > 0 {
        tracing::warn!("{} flows were reset at the drain deadline", worker.proxy.active());
    }
    stop.enter(Phase::Stop);
    worker.proxy.flows().end_all(EndReason::DrainTimeout);
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
    worker.proxy.log_suppressed();
    drop(answering);
    let (records, dropped) = worker.proxy.take_records();
    let connections_opened = setup.upstreams.connections_opened();
    Ok(Report { records, dropped, connections_opened })
}

/// The next state that is published. Never ready once nobody publishes any more.
async fn next(states: &mut watch::Receiver<Option<Arc<State>>>) -> Arc<State> {
    loop {
        if states.changed().await.is_err() {
            return pending().await;
        }
        if let Some(state) = &*states.borrow_and_update() {
            return Arc::clone(state);
        }
    }
}
