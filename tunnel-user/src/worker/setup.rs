//! What a worker does by its configuration, and how another takes its place.
//!
//! Enters: a [`Change`]. Leaves: the setup that new flows are carried by, and listeners that are accepted from.
//! Invariant: a flow keeps the setup that it began with, and what that has connected to; a change is seen whole or
//! not at all. It never reads a configuration.

use std::{collections::HashMap, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{sleep, timeout},
};

use super::{CaptureSocket, Change, ConnectSocket, STOP_PATIENCE, SourceId};
use crate::{
    process::drain::{self, Phase, Tasks, Trigger},
    proxy::{At, Proxy, Setup},
    sinks::upstream::{Upstream, Upstreams},
    sources::capture::accept::Accept,
};

/// How often an upstream that is no longer configured is looked at, once its connections are closed: a flow that
/// began before may still open one.
const RETIRED_LOOK: Duration = Duration::from_secs(1);

/// Everything that is accepted from.
#[derive(Default)]
pub(super) struct Sources {
    /// Those that the kernel programs send connections to have one entry for each network namespace.
    open: HashMap<(SourceId, Option<u64>), Source>,
    /// What was retired, until it has ended.
    retired: Tasks,
}

struct Source {
    /// Dropped, it tells the source that nothing more is taken.
    trigger: Trigger,
    at: Rc<At>,
    accepting: Tasks,
}

impl Source {
    fn new(name: Option<Arc<str>>, dial_timeout: Duration) -> Self {
        let (trigger, watch) = drain::channel();
        let at = Rc::new(At::new(name, dial_timeout, watch));
        Self { trigger, at, accepting: Tasks::default() }
    }

    /// Stops accepting, once what is waiting has been taken.
    async fn end(self) {
        self.trigger.enter(Phase::Drain);
        let _late = timeout(STOP_PATIENCE, self.accepting.ended()).await;
    }
}

impl Sources {
    /// Accepts what was captured.
    pub(super) fn capture(&mut self, proxy: &Rc<Proxy>, socket: CaptureSocket, flows: &Rc<Tasks>) {
        let CaptureSocket { source, name, socket, origins } = socket;
        let dial_timeout = proxy.setup().shared.dial_timeout;
        let entry = self.open.entry((source, origins.netns()));
        let entry = entry.or_insert_with(|| Source::new(name, dial_timeout));
        let at = Rc::clone(&entry.at);
        match Accept::new(socket, origins) {
            Ok(accept) => {
                entry.accepting.spawn(Rc::clone(proxy).accept_captured(accept, at, Rc::clone(flows)));
            }
            Err(e) => tracing::error!("a capture listener could not be used: {e}"),
        }
    }

    /// Accepts peers.
    pub(super) fn listen(&mut self, proxy: &Rc<Proxy>, socket: ConnectSocket, flows: &Rc<Tasks>) {
        let ConnectSocket { source, name, socket, settings, dial_timeout } = socket;
        let entry = self.open.entry((source, None)).or_insert_with(|| Source::new(name, dial_timeout));
        let at = Rc::clone(&entry.at);
        match TcpListener::from_std(socket.into()) {
            Ok(socket) => {
                entry.accepting.spawn(Rc::clone(proxy).accept_tunnels(
                    socket,
                    settings,
                    at,
                    Rc::clone(flows),
                ));
            }
            Err(e) => tracing::error!("a listener could not be used: {e}"),
        }
    }

    /// A network namespace has gone.
    pub(super) fn forget(&mut self, source: SourceId, netns: u64) {
        drop(self.open.remove(&(source, Some(netns))));
    }

    fn rename(&self, source: SourceId, name: &Option<Arc<str>>) {
        for (_, source) in self.open.iter().filter(|((id, _), _)| *id == source) {
            source.at.rename(name.clone());
        }
    }

    fn retire(&mut self, source: SourceId) {
        let gone: Vec<_> = self.open.keys().filter(|(id, _)| *id == source).copied().collect();
        for source in gone.iter().filter_map(|key| self.open.remove(key)) {
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

/// What flows are carried by here, and were.
pub(super) struct Worker {
    pub(super) proxy: Rc<Proxy>,
    /// Upstreams of earlier configurations, until their flows have ended.
    pub(super) retired: Tasks,
}

impl Worker {
    /// Puts a change in force.
    pub(super) fn change(&self, change: Change, sources: &mut Sources, flows: &Rc<Tasks>) {
        let Change { shared, upstreams, renamed, retire, captures, listeners, done } = change;
        let before = self.proxy.setup();
        let upstreams = Upstreams::new(&upstreams, Some(&before.upstreams));
        let next = Rc::new(Setup::new(shared, upstreams, Some(&before)));
        for old in before.upstreams.tunnels() {
            if !next.upstreams.tunnels().any(|kept| Rc::ptr_eq(kept, old)) {
                self.retired.spawn(retired(Rc::clone(old)));
            }
        }
        self.proxy.replace_setup(next);
        renamed.into_iter().for_each(|(source, name)| sources.rename(source, &name));
        // Those that take the place of others have their sockets: these are accepted from all the time.
        captures.into_iter().for_each(|socket| sources.capture(&self.proxy, socket, flows));
        listeners.into_iter().for_each(|socket| sources.listen(&self.proxy, socket, flows));
        retire.into_iter().for_each(|source| sources.retire(source));
        drop::<mpsc::Sender<()>>(done);
    }
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
