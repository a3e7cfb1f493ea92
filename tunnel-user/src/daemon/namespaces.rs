//! The network namespaces of a capture.
//!
//! # Invariants
//! - A namespace of a captured process has listeners, or its connections wait or are refused; one that no captured process is
//!   in is given up.
//! - None is kept alive for its listeners: it ends with its last process, and they with it.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tunnel_common::capture::Missing;

use crate::{
    kernel::netns,
    sources::capture::{accept::Sockets, bpf::Capture, routes::Routes, steer::Steering},
    worker,
};

/// A namespace in which no listener could be opened is tried again after this.
const RETRY: Duration = Duration::from_secs(5);
/// A namespace that no captured process is in is given up after this: a container that restarts finds its
/// listeners still there.
const LINGER: Duration = Duration::from_secs(30);

/// By inode number: unique among namespaces that are alive, and ours are, by their listeners.
#[derive(Default)]
pub(super) struct Namespaces(HashMap<u64, Namespace>);

/// What is known of one network namespace.
enum Namespace {
    /// The daemon's own.
    Own(Entered),
    /// It has listeners; a captured process was last seen in it then.
    Captured { entered: Entered, seen: Instant },
    /// No listener could be opened then.
    Failed { at: Instant },
}

/// A network namespace with listeners.
pub(super) struct Entered {
    cookie: u64,
    sockets: Arc<worker::Sockets>,
    routes: Routes,
    _steering: Option<Steering>,
}

impl Entered {
    /// In a runtime.
    pub(super) fn new(
        cookie: u64,
        sockets: Arc<worker::Sockets>,
        routes: Routes,
        steering: Option<Steering>,
    ) -> Self {
        Self { cookie, sockets, routes, _steering: steering }
    }

    /// By which the kernel knows the namespace.
    pub(super) fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The listeners there.
    pub(super) fn sockets(&self) -> Arc<worker::Sockets> {
        Arc::clone(&self.sockets)
    }

    /// Tells the programs of its routes, where these have changed.
    pub(super) fn follow_routes(&mut self, capture: &Capture) {
        let told = match self.routes.changed() {
            None => return,
            Some(Ok(sources)) => capture.set_sources(self.cookie, &sources).map_err(|e| e.summary()),
            Some(Err(e)) => Err(e.to_string()),
        };
        if let Err(e) = told {
            tracing::warn!(netns = self.cookie, "getsockname does not follow the routes there: {e}");
        }
    }
}

/// One that has no listeners yet.
pub(super) struct Found {
    inode: u64,
    netns: OwnedFd,
}

impl Namespaces {
    /// The daemon's own.
    pub(super) fn add_own(&mut self, entered: Entered) {
        self.0.insert(netns::inode_of_process(std::process::id()).unwrap_or(0), Namespace::Own(entered));
    }

    /// Those without listeners from which these connections came, and in which these processes are.
    pub(super) fn look(&mut self, missing: &[Missing], processes: &[u32]) -> Vec<Found> {
        let now = Instant::now();
        let mut found = Vec::new();
        let mut known: Vec<u64> = self.cookies().collect();
        for missing in missing {
            if known.contains(&missing.netns) {
                continue;
            }
            match netns::of_connection(missing) {
                Ok(netns) => {
                    known.push(missing.netns);
                    found.extend(self.take(netns, now));
                }
                // It may have ended just now, or is not visible from here.
                Err(e) => tracing::debug!(
                    netns = missing.netns,
                    process = missing.process,
                    "failed to find the network namespace of a connection: {e}"
                ),
            }
        }
        for pid in processes {
            // It may have ended just now.
            let Ok(inode) = netns::inode_of_process(*pid) else { continue };
            if let Some(Namespace::Own(_)) = self.0.get(&inode) {
                continue;
            }
            if let Some(Namespace::Captured { seen, .. }) = self.0.get_mut(&inode) {
                *seen = now;
                continue;
            }
            if let Ok(netns) = netns::of_process(*pid) {
                found.extend(self.take(netns, now));
            }
        }
        found
    }

    /// The namespace, if it has no listeners and it is time to try.
    fn take(&mut self, netns: OwnedFd, now: Instant) -> Option<Found> {
        let inode = netns::inode(&netns).ok()?;
        match self.0.get(&inode) {
            Some(Namespace::Own(_) | Namespace::Captured { .. }) => return None,
            Some(Namespace::Failed { at }) if now.duration_since(*at) < RETRY => return None,
            Some(Namespace::Failed { .. }) | None => {}
        }
        // Found twice in one look, it is opened once.
        self.0.insert(inode, Namespace::Failed { at: now });
        Some(Found { inode, netns })
    }

    /// Opens listeners in one, and has `hand_out` tell the programs of them.
    pub(super) fn enter(
        &mut self,
        found: Found,
        listen: impl FnOnce(OwnedFd) -> io::Result<Sockets>,
        hand_out: impl FnOnce(Sockets) -> Result<Entered, String>,
    ) -> Result<u64, (u64, String)> {
        let Found { inode, netns } = found;
        let entered = listen(netns).map_err(|e| e.to_string()).and_then(hand_out);
        match entered {
            Ok(entered) => {
                self.0.insert(inode, Namespace::Captured { entered, seen: Instant::now() });
                Ok(inode)
            }
            Err(e) => Err((inode, e)),
        }
    }

    /// Tells the programs what has changed in each.
    pub(super) fn follow_routes(&mut self, capture: &Capture) {
        for namespace in self.0.values_mut() {
            if let Namespace::Own(entered) | Namespace::Captured { entered, .. } = namespace {
                entered.follow_routes(capture);
            }
        }
    }

    /// Gives up those that no captured process has been in for a while; their inodes and cookies.
    pub(super) fn give_up(&mut self) -> Vec<(u64, u64)> {
        let now = Instant::now();
        let mut gone = Vec::new();
        self.0.retain(|inode, namespace| match namespace {
            Namespace::Own(_) => true,
            Namespace::Failed { at } => now.duration_since(*at) < LINGER,
            Namespace::Captured { seen, .. } if now.duration_since(*seen) < LINGER => true,
            Namespace::Captured { entered, .. } => {
                gone.push((*inode, entered.cookie));
                false
            }
        });
        gone
    }

    /// Those that have listeners.
    pub(super) fn entered(&self) -> impl Iterator<Item = &Entered> {
        self.0.values().filter_map(|n| match n {
            Namespace::Own(entered) | Namespace::Captured { entered, .. } => Some(entered),
            Namespace::Failed { .. } => None,
        })
    }

    /// Their cookies.
    pub(super) fn cookies(&self) -> impl Iterator<Item = u64> {
        self.entered().map(Entered::cookie)
    }

    /// Ready when the routes of one have changed.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        let routes = self.0.values().filter_map(|namespace| match namespace {
            Namespace::Own(entered) | Namespace::Captured { entered, .. } => Some(&entered.routes),
            Namespace::Failed { .. } => None,
        });
        // All of them, so that each wakes up whoever polls.
        let ready = routes.filter(|routes| routes.poll(cx).is_ready()).count();
        if ready > 0 { Poll::Ready(()) } else { Poll::Pending }
    }
}
