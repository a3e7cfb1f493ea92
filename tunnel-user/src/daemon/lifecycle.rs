//! The daemon as a service: what its manager is told, and the sockets that it keeps for us.
//!
//! # Invariants
//! - The manager hears that the daemon is alive only when the control loop runs and every worker has answered.

use std::{collections::HashSet, net::SocketAddr, os::fd::OwnedFd, time::Duration};

use socket2::{Socket, Type};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::{Running, takeover::Listeners};
use crate::{
    config::Config,
    process::{
        exit::{Cause, Failure},
        service::{Notifier, Service},
    },
};

/// See the module.
pub(super) struct Lifecycle {
    notify: Notifier,
    keeps_sockets: bool,
    watchdog: Option<Interval>,
    /// Workers did not answer the last time.
    silent: bool,
}

impl Lifecycle {
    /// In a runtime. The sockets are what there is to listen on already.
    pub(super) fn new(service: Service, config: &Config) -> Result<(Self, Listeners), Failure> {
        let Service { notify, watchdog, keeps_sockets, sockets } = service;
        // Twice within the time, as sd_watchdog_enabled(3) recommends.
        let watchdog = watchdog.map(|time| {
            let every = (time / 2).max(Duration::from_millis(1));
            let mut interval = interval_at(Instant::now() + every, every);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        let sockets = passed(sockets, config)?;
        Ok((Self { notify, keeps_sockets, watchdog, silent: false }, sockets))
    }

    /// Everything is in force. `took_over`: this process is the service from now on.
    pub(super) fn ready(&self, running: &Running, took_over: bool) {
        self.notify.ready(&running.summary(), took_over.then(std::process::id));
        self.store(running);
    }

    /// The configuration is being read again.
    pub(super) fn reloading(&self) {
        self.notify.reloading();
    }

    /// It was read, and is in force or is not.
    pub(super) fn reloaded(&self, running: &Running, in_force: bool) {
        let summary = running.summary();
        if in_force {
            self.notify.ready(&summary, None);
            self.store(running);
        } else {
            let status = format!("{summary}; the last reload failed, the previous configuration is in force");
            self.notify.ready(&status, None);
        }
    }

    /// Flows may finish, and then it ends.
    pub(super) fn stopping(&self, why: &str, drain: Duration) {
        self.notify.stopping(&format!("{why}: draining"), drain);
    }

    /// Ready when the manager is to be told that the daemon is alive.
    pub(super) async fn watchdog_due(&mut self) {
        match &mut self.watchdog {
            Some(interval) => drop(interval.tick().await),
            None => std::future::pending().await,
        }
    }

    /// Tells it, if all workers have answered what they were asked the last time, and asks them again.
    pub(super) fn feed_watchdog(&mut self, running: &mut Running) {
        let silent = running.workers.ask();
        if silent.is_empty() {
            self.notify.alive();
        } else if !self.silent {
            tracing::error!(workers = ?silent, "workers do not answer: the watchdog is not notified");
        }
        self.silent = !silent.is_empty();
    }

    /// Leaves the listening sockets with the manager: connections wait in them while no daemon runs.
    fn store(&self, running: &Running) {
        if self.keeps_sockets {
            // One whose port the kernel chose is found by nobody.
            let named = running.kept.iter().filter(|(address, _)| address.port() != 0);
            let sockets: Vec<_> = named.flat_map(|(_, sockets)| sockets).collect();
            self.notify.store(&sockets);
        }
    }
}

/// Sockets that the manager has passed, by their addresses. Those that nothing is configured for are closed.
fn passed(sockets: Vec<OwnedFd>, config: &Config) -> Result<Listeners, Failure> {
    let listeners = config.listeners.iter().map(|listener| listener.address);
    let wanted: HashSet<SocketAddr> =
        listeners.chain(config.redirects.iter().flat_map(|r| &r.listen).copied()).collect();
    let mut passed = Listeners::new();
    for (number, socket) in sockets.into_iter().map(Socket::from).enumerate() {
        let wrong = |what: String| {
            let what = format!("socket {number} of the service manager {what}");
            Failure::Config(Cause::new(what, "A .socket unit for it has ListenStream=ADDRESS:PORT."))
        };
        let listens =
            socket.r#type().is_ok_and(|t| t == Type::STREAM) && socket.is_listener().unwrap_or(false);
        let address = socket.local_addr().ok().and_then(|address| address.as_socket()).filter(|_| listens);
        let address = address.ok_or_else(|| wrong("does not listen for TCP connections".to_owned()))?;
        if !wanted.contains(&address) {
            tracing::warn!(%address, "closing a socket of the service manager: nothing is configured to listen there");
            continue;
        }
        // Each worker has one of its own beside it.
        let ready = socket.set_nonblocking(true).and_then(|()| socket.set_reuse_port(true));
        ready.map_err(|e| wrong(format!("({address}) cannot be used: {e}")))?;
        tracing::debug!(%address, "listening on a socket of the service manager");
        passed.entry(address).or_default().push(socket);
    }
    Ok(passed)
}

impl Running {
    /// What is in force, for the status text.
    fn summary(&self) -> String {
        let Config { captures, redirects, listeners, upstreams, .. } = &self.config;
        let of = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        format!(
            "running: {}, {}, {}",
            of(captures.len() + redirects.len(), "capture"),
            of(listeners.len(), "listener"),
            of(upstreams.len(), "upstream"),
        )
    }
}
