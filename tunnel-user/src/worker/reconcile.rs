//! From the state that a worker is in to the one that it is to be in.
//!
//! # Invariants
//! - A flow keeps the setup that it began with, and what that has connected to, for as long as the policies and routes of the
//!   one in force allow it.
//! - A source whose sockets are the same goes on without a pause; one that takes the place of another on the same address is
//!   accepted from before that one ends.

use std::{collections::HashMap, mem, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};

use super::{CaptureSocket, ConnectSocket, Listening, QuicSocket, STOP_PATIENCE, Sockets, Source, State};
use crate::{
    model::names::IdentityName,
    process::drain::{self, Phase, Tasks, Trigger},
    proxy::{Proxy, Setup},
    sinks::upstream::{Upstream, Upstreams},
    sources::{
        SourceHandle,
        capture::accept::{self, Accept},
        listener,
    },
};

/// How often an upstream that is no longer configured is looked at, once its connections are closed: a flow that
/// began before may still open one.
const RETIRED_LOOK: Duration = Duration::from_secs(1);

/// What flows are carried by here, and were.
pub(super) struct Worker {
    /// Which worker it is.
    pub(super) index: usize,
    pub(super) proxy: Rc<Proxy>,
    /// Upstreams of earlier configurations, until their flows have ended.
    pub(super) retired: Tasks,
}

impl Worker {
    /// Makes a state the one that it is in.
    pub(super) fn reconcile(&self, state: &State, sources: &mut Sources, flows: &Rc<Tasks>) {
        let before = self.proxy.setup();
        // Otherwise only sources have come or gone.
        if !Arc::ptr_eq(&before.shared, &state.shared) {
            let upstreams = Upstreams::new(&state.upstreams, Some(&before.upstreams));
            let next = Rc::new(Setup::new(
                Arc::clone(&state.shared),
                upstreams,
                Some(&before),
                self.proxy.counters(),
            ));
            for old in before.upstreams.tunnels() {
                if !next.upstreams.tunnels().any(|kept| Rc::ptr_eq(kept, old)) {
                    self.retired.spawn(retired(Rc::clone(old)));
                }
            }
            self.proxy.replace_setup(next);
        }
        sources.reconcile(&state.sources, self, flows);
    }
}

/// Everything that is accepted from.
#[derive(Default)]
pub(super) struct Sources {
    /// By their sockets, which each holds: the same source with other sockets is another one.
    open: HashMap<*const Sockets, Open>,
    /// What was retired, until it has ended.
    retired: Tasks,
}

impl Sources {
    /// Accepts from these and from no others.
    fn reconcile(&mut self, wanted: &[Source], worker: &Worker, flows: &Rc<Tasks>) {
        let mut before = mem::take(&mut self.open);
        for source in wanted {
            let key = Arc::as_ptr(&source.sockets);
            let open = match before.remove(&key) {
                Some(open) => {
                    if open.handle.name() != source.called {
                        open.handle.rename(own_copy(source));
                    }
                    if open.handle.identity() != source.identity {
                        open.handle.set_identity(own_identity(source));
                    }
                    open
                }
                None => Open::new(source, worker, flows),
            };
            self.open.insert(key, open);
        }
        // What takes their place is accepted from already.
        for source in before.into_values() {
            self.retired.spawn(source.end());
        }
    }

    /// Stops accepting everywhere.
    pub(super) async fn end(self) {
        // All at once, so that each has the whole time.
        for source in self.open.into_values() {
            self.retired.spawn(source.end());
        }
        self.retired.ended().await;
    }
}

/// A source that is accepted from.
struct Open {
    /// Held, so that their address is nobody else's.
    _sockets: Arc<Sockets>,
    /// Dropped, it tells the source that nothing more is taken.
    trigger: Trigger,
    handle: Rc<SourceHandle>,
    accepting: Tasks,
    /// The same over UDP.
    quic: Tasks,
}

impl Open {
    fn new(source: &Source, worker: &Worker, flows: &Rc<Tasks>) -> Self {
        let listening = source.sockets.take(worker.index);
        let dial_timeout = listening.iter().find_map(|listening| match listening {
            Listening::Requests(socket) => Some(socket.dial_timeout),
            Listening::Quic(socket) => Some(socket.dial_timeout),
            Listening::Captured(_) => None,
        });
        let (trigger, watch) = drain::channel();
        let handle = Rc::new(SourceHandle::new(own_copy(source), dial_timeout, watch));
        handle.set_identity(own_identity(source));
        let open = Self {
            _sockets: Arc::clone(&source.sockets),
            trigger,
            handle,
            accepting: Tasks::default(),
            quic: Tasks::default(),
        };
        for listening in listening {
            if let Err(error) = open.accept(listening, &worker.proxy, flows) {
                tracing::error!(source = %source.name, %error, "failed to accept from a listener");
            }
        }
        open
    }

    fn accept(&self, listening: Listening, proxy: &Rc<Proxy>, flows: &Rc<Tasks>) -> std::io::Result<()> {
        let (proxy, handle, flows) = (Rc::clone(proxy), Rc::clone(&self.handle), Rc::clone(flows));
        match listening {
            Listening::Captured(CaptureSocket { socket, origins }) => {
                let accept = Accept::new(socket, origins)?;
                self.accepting.spawn(accept::serve(proxy, accept, handle, flows));
            }
            Listening::Requests(ConnectSocket { socket, settings, .. }) => {
                let socket = TcpListener::from_std(socket.into())?;
                self.accepting.spawn(listener::serve(proxy, socket, settings, handle, flows));
            }
            Listening::Quic(QuicSocket { quic, .. }) => {
                self.quic.spawn(listener::h3::serve(proxy, quic, handle, flows));
            }
        }
        Ok(())
    }

    /// Stops accepting, once what is waiting has been taken.
    async fn end(self) {
        self.trigger.enter(Phase::Drain);
        let Self { accepting, quic, .. } = self;
        let over_tcp = async move {
            let _late = timeout(STOP_PATIENCE, accepting.ended()).await;
        };
        let over_udp = async move {
            let _late = timeout(listener::h3::LATE_MAX + STOP_PATIENCE, quic.ended()).await;
        };
        tokio::join!(over_tcp, over_udp);
    }
}

/// What routes call a source, for this worker alone: every flow counts a use of it, and cores share no count.
fn own_copy(source: &Source) -> Option<Arc<str>> {
    source.called.as_deref().map(Arc::from)
}

/// The same for the identity that it names.
fn own_identity(source: &Source) -> Option<IdentityName> {
    source.identity.as_deref().map(IdentityName::from)
}

/// Holds an upstream that is no longer configured until nobody uses it, and closes its connections as their streams
/// end.
async fn retired(upstream: Rc<Upstream>) {
    loop {
        upstream.close().await;
        if Rc::strong_count(&upstream) == 1 {
            return;
        }
        sleep(RETIRED_LOOK).await;
    }
}
