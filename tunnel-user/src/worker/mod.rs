//! One core's share of the work: a thread, its runtime, its listeners, its pools.
//!
//! Enters: sockets and what the configuration says. Leaves: flows, carried. Invariant: a flow never
//! changes worker, and nothing on its path takes a lock or crosses a core. It never opens a listener
//! itself: those are bound before any worker starts.

mod setup;

use std::{io, rc::Rc, sync::Arc, time::Duration};

use socket2::Socket;
use tokio::{
    runtime::{self, LocalOptions},
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout, timeout_at},
};

use self::setup::{Sources, Worker};
pub use crate::proxy::Shared;
use crate::{
    model::end::EndReason,
    observe::stats::{Counters, Record},
    process::drain::{self, Phase, Tasks, Watch},
    proxy::{Proxy, Setup},
    relay::give_up_silent_peers,
    sinks::upstream::{self, Upstreams},
    sources::{capture::accept::Origins, listener::accept},
};

/// How long flows that were told to end may take for it.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// How often a worker wakes for nothing. tokio wakes its own thread, by a write to an eventfd and another turn of epoll,
/// for every timer that is due before all others, which those of a new flow often are; not before one that is always
/// due sooner.
const PULSE: Duration = Duration::from_secs(1);

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

async fn work(start: Start) -> io::Result<Report> {
    let Start { shared, upstreams, counters, mut more, captures, listeners, mut watch } = start;
    let upstreams = Upstreams::new(&upstreams, None);
    let (stop, stopped) = drain::channel();
    let worker = Worker {
        proxy: Proxy::new(Setup::new(shared, upstreams, None), counters, stopped),
        retired: Tasks::default(),
    };
    let flows = Rc::new(Tasks::default());
    let mut sources = Sources::default();
    captures.into_iter().for_each(|socket| sources.capture(&worker.proxy, socket, &flows));
    listeners.into_iter().for_each(|socket| sources.listen(&worker.proxy, socket, &flows));
    let mut pulse = interval(PULSE);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = watch.draining() => break,
            _ = pulse.tick() => {
                give_up_silent_peers();
                worker.proxy.log_suppressed();
            }
            Some(news) = more.recv() => match news {
                More::Listen(socket) => sources.capture(&worker.proxy, socket, &flows),
                More::Forget(source, netns) => sources.forget(source, netns),
                More::Change(change) => worker.change(*change, &mut sources, &flows),
            },
        }
    }
    // The kernel programs see at once that a listener is closed.
    sources.end().await;
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
    let (records, dropped) = worker.proxy.take_records();
    let connections_opened = setup.upstreams.connections_opened();
    Ok(Report { records, dropped, connections_opened })
}
