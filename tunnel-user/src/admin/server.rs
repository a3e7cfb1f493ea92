//! The thread of the admin interface: its runtime, its connections, and their bounds.
//!
//! # Invariants
//! - The Unix socket and TCP have separate places for connections, so that whoever floods one does not close the other.
//! - A connection takes no request after [`CONNECTION_TIMEOUT`], and ends [`CONNECTION_LINGER`] later, whatever its client
//!   does.

use std::{cell::RefCell, convert::Infallible, io, pin::pin, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use super::{
    api,
    bind::Bound,
    guard::{self, Way},
    history::{self, History},
    sight::Sight,
};
use crate::{
    observe::telemetry::LogHandle,
    process::{
        drain::{self, Phase, Tasks, Watch},
        nice,
    },
};

/// Connections of each of the two ways at once. Prometheus needs one, an operator a few.
const CONNECTIONS_MAX: usize = 32;
/// From the first byte of a request's head to its last, and how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// From the accept of a connection to its end: its requests, and the time in which their answers are read.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the answer that it is in then may take.
const CONNECTION_LINGER: Duration = Duration::from_secs(30);
/// A request's head. Ours are a few hundred bytes; a browser sends cookies of whatever else runs on localhost.
const HEAD_MAX: usize = 16 * 1024;
/// Headers of a request.
const HEADERS_MAX: usize = 64;
/// After an error of accept(2) that is not the connection's: out of descriptors.
const BACK_OFF: Duration = Duration::from_millis(200);
/// How long who has connected may take for the rest when the daemon ends.
const STOP_PATIENCE: Duration = Duration::from_secs(1);
/// How much less the kernel favours this thread than the workers (nice(2)).
const NICENESS: i32 = 10;

/// An answer's body.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What every request is answered from.
pub(super) struct Context {
    pub(super) sight: Sight,
    pub(super) log: LogHandle,
    pub(super) writes_over_tcp: bool,
    pub(super) history: RefCell<History>,
    pub(super) requests: RefCell<api::Requests>,
    /// What fills answers while they are read.
    filling: Tasks,
}

impl Context {
    pub(super) fn new(sight: Sight, log: LogHandle, writes_over_tcp: bool) -> Self {
        let (history, requests) = (RefCell::default(), RefCell::default());
        Self { sight, log, writes_over_tcp, history, requests, filling: Tasks::default() }
    }

    /// Starts what fills an answer, in this thread's runtime; it ends when nobody reads that any more.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.filling.spawn(task);
    }
}

/// Serves until it is told to stop, and answers who has connected until then.
pub(super) fn run(
    mut bound: Bound,
    context: Context,
    stopped: oneshot::Receiver<()>,
    tcp_closed: oneshot::Receiver<()>,
) -> io::Result<()> {
    // The workers are worth more; where it cannot be had, it is served all the same.
    let _as_before = nice::lower_this_thread(NICENESS);
    let options = tokio::runtime::LocalOptions::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(options)?;
    runtime.block_on(async {
        let (trigger, stop) = drain::channel();
        let (tcp_trigger, tcp_stop) = drain::channel();
        let context = Rc::new(context);
        let mut serving = JoinSet::new();
        // The socket's file goes when everything has ended.
        let unix = bound.unix.as_ref().map(|socket| socket.listener.try_clone()).transpose()?;
        if let Some(listener) = unix {
            let connections = Connections::new(Rc::clone(&context), Way::Unix, stop.clone());
            serving.spawn_local(connections.accept(UnixListener::from_std(listener)?));
        }
        if let Some(listener) = bound.tcp.take() {
            let connections = Connections::new(Rc::clone(&context), Way::Tcp, tcp_stop);
            serving.spawn_local(connections.accept(TcpListener::from_std(listener)?));
        }
        let mut history = JoinSet::new();
        history.spawn_local(keep_history(context));
        // An error says that whoever could tell it has gone.
        let mut stopped = pin!(stopped);
        tokio::select! {
            _ = stopped.as_mut() => {}
            _ = tcp_closed => {
                tcp_trigger.enter(Phase::Drain);
                let _stopped = stopped.await;
            }
        }
        trigger.enter(Phase::Drain);
        tcp_trigger.enter(Phase::Drain);
        let ended = async { while serving.join_next().await.is_some() {} };
        let _late = timeout(STOP_PATIENCE, ended).await;
        Ok(())
    })
}

/// What connections are accepted from.
trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + 'static;

    async fn next(&self) -> io::Result<Self::Stream>;
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = self.accept().await?;
            // Whatever has become of the file's mode.
            let theirs = stream.peer_cred()?.uid();
            if theirs == 0 || theirs == nix::unistd::geteuid().as_raw() {
                return Ok(stream);
            }
            tracing::warn!(uid = theirs, "rejected an admin connection of another user");
        }
    }
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

async fn back_off(error: &io::Error) {
    tracing::debug!(%error, "accepting an admin connection failed");
    sleep(BACK_OFF).await;
}

/// The connections that came one way.
struct Connections {
    context: Rc<Context>,
    way: Way,
    stop: Watch,
    places: Arc<Semaphore>,
    tasks: JoinSet<()>,
}

impl Connections {
    fn new(context: Rc<Context>, way: Way, stop: Watch) -> Self {
        Self { context, way, stop, places: Arc::new(Semaphore::new(CONNECTIONS_MAX)), tasks: JoinSet::new() }
    }

    /// Accepts until it is told to stop, and waits for the ends of those that it has accepted.
    async fn accept(mut self, listener: impl Accept) {
        let mut stop = self.stop.clone();
        loop {
            while self.tasks.try_join_next().is_some() {}
            let places = Arc::clone(&self.places);
            let accepted = async {
                // While there is no place, more wait in the backlog. It is never closed.
                let place = places.acquire_owned().await;
                (listener.next().await, place)
            };
            tokio::select! {
                // What waits there is answered too.
                biased;
                (accepted, place) = accepted => match accepted {
                    Ok(stream) => self.serve(stream, place.ok()),
                    Err(e) => back_off(&e).await,
                },
                () = stop.draining() => break,
            }
        }
        while self.tasks.join_next().await.is_some() {}
    }

    fn serve<S: AsyncRead + AsyncWrite + Unpin + 'static>(
        &mut self,
        stream: S,
        place: Option<OwnedSemaphorePermit>,
    ) {
        let (context, way, mut stop) = (Rc::clone(&self.context), self.way, self.stop.clone());
        self.tasks.spawn_local(async move {
            let answered = service_fn(move |request| answer(Rc::clone(&context), way, request));
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(HEAD_MAX)
                .max_headers(HEADERS_MAX)
                .serve_connection(TokioIo::new(stream), answered);
            let mut served = pin!(served);
            let ended = tokio::select! {
                ended = served.as_mut() => Some(ended),
                () = sleep(CONNECTION_TIMEOUT) => None,
                () = stop.draining() => None,
            };
            let ended = match ended {
                Some(ended) => Ok(ended),
                // After the answer that it is in, if it is in one.
                None => {
                    served.as_mut().graceful_shutdown();
                    timeout(CONNECTION_LINGER, served).await
                }
            };
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "admin connection failed"),
                Err(_) => tracing::debug!("admin connection closed: its answer was not read"),
            }
            drop(place);
        });
    }
}

async fn answer(
    context: Rc<Context>,
    way: Way,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let answer = match guard::check(&request, way, context.writes_over_tcp) {
        Ok(()) => api::answer(&context, &request).await,
        Err(rejected) => api::rejected(rejected),
    };
    context.requests.borrow_mut().count(answer.status());
    Ok(answer)
}

/// Notes again and again what has happened, for rates and for what happened in the last hour.
async fn keep_history(context: Rc<Context>) {
    let mut ticks = interval(history::EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let totals = context.sight.totals().await;
        context.history.borrow_mut().push(&totals);
    }
}
