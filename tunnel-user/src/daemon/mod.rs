//! The composition root: from a configuration to a running daemon, and back.
//!
//! A daemon is begun, which attaches it, and then committed, which puts it to work; from then on one loop makes it what its
//! sources of desired state want.
//!
//! # Invariants
//! - Everything is bound, loaded and verified before anything is attached to a cgroup; what is begun and not committed leaves
//!   everything as it was.
//! - Only this room wires others together.

mod admin;
mod attach;
mod bootstrap;
mod captures;
mod explain;
mod file;
mod following;
mod identities;
mod layers;
mod leavers;
mod lifecycle;
mod listen;
mod namespaces;
mod observers;
mod pins;
mod reconcile;
mod rules;
mod run;
mod shared;
pub mod takeover;
#[cfg(test)]
mod tests;
mod upstreams;
mod workers;

use std::{
    collections::HashSet, future::poll_fn, io, mem, net::SocketAddr, os::unix::net::UnixStream, sync::Arc,
    task::Poll, thread, time::Duration,
};

use tokio::time::{Interval, MissedTickBehavior};

use self::{
    bootstrap::Process,
    captures::ActiveCapture,
    identities::Identities,
    layers::{Layers, Owner as LayerOwner},
    listen::{ActiveListener, ActiveRedirect, Kept},
    observers::Observers,
    reconcile::{Changed, Gate, Prepared, proceed},
    upstreams::{ActiveUpstream, Discover},
    workers::Workers,
};
pub use self::{bootstrap::require_for_capture, following::nested, pins::detach, run::run};
use crate::{
    config::{Config, OnFailure},
    daemon::takeover::{Groups, Listeners, TakeoverError},
    kernel::cgroup::Fresh,
    observe::totals,
    process::{
        exit::{Cause, Failure},
        panics,
    },
    sources::capture::bpf::{self, Owner},
    worker::{Report, Shared},
};

/// How often captured groups are searched for network namespaces that appeared.
const NAMESPACE_SCAN: Duration = Duration::from_secs(1);
/// How often flows that nobody accepted are looked for.
const SWEEP: Duration = Duration::from_secs(60);

/// A daemon whose workers run.
pub struct Running {
    workers: Workers,
    process: Process,
    layers: Layers,
    /// What is in force: the layers together.
    config: Config,
    identities: Identities,
    captures: Vec<ActiveCapture>,
    redirects: Vec<ActiveRedirect>,
    listeners: Vec<ActiveListener>,
    upstreams: Vec<ActiveUpstream>,
    observers: Observers,
    /// Those that workers may still write to.
    retired: Vec<Observers>,
    /// For a daemon that replaces this one, and for a configuration that says something else about them.
    kept: Kept,
    /// The same of HTTP/3, and what connections of listeners that were removed still use.
    groups: Groups,
    /// What all workers are told; nothing before the first configuration is in force.
    shared: Option<Arc<Shared>>,
    discover: Discover,
    duties: Duties,
    notes: admin::Notes,
    /// Looks at other people's rules, and ends.
    looking: Option<thread::JoinHandle<()>>,
}

/// What is done again and again. It belongs to the daemon and not to the future that waits for it, which every signal and
/// every change of a file cancels.
struct Duties {
    scan: Interval,
    sweep: Interval,
}

impl Duties {
    /// In a runtime.
    fn new() -> Self {
        let every = |length| {
            let mut interval = tokio::time::interval_at(tokio::time::Instant::now() + length, length);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        Self { scan: every(NAMESPACE_SCAN), sweep: every(SWEEP) }
    }
}

/// What a start needs besides the configuration.
#[derive(Default)]
pub struct Options<'a> {
    /// The group that [`crate::config::CgroupRef::Fresh`] means.
    pub group: Option<&'a Fresh>,
    /// Whether records of flows are kept, for [`Running::stop`] to return.
    pub keep_records: bool,
    /// What operators had attached to the daemon that this one replaces.
    pub attached: Option<Config>,
    /// Sockets of a daemon that this one replaces: used where their addresses are configured.
    pub taken: Listeners,
    /// UDP sockets of that.
    pub groups: Groups,
}

/// A daemon that has bound, loaded and attached everything, and accepts nothing yet: connections wait for it. Dropped, it
/// leaves everything as it was.
pub struct Starting {
    // Dropped first: what it has attached is taken back, and then the workers end.
    next: Prepared,
    running: Running,
}

impl Starting {
    /// The addresses of the CONNECT listeners, with the ports that they got.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.next.addresses()
    }

    /// It stays.
    pub fn commit(self) -> Running {
        let Self { next, mut running } = self;
        running.commit(next);
        running.looking = following::warn_of_firewall(&running.config);
        for address in running.config.redirects.iter().flat_map(|r| &r.listen) {
            tracing::info!(%address, "capturing what rules redirect here");
        }
        running
    }
}

/// Binds, loads, verifies, and attaches last. In a runtime.
pub fn begin(config: Config, options: Options<'_>) -> Result<Starting, Failure> {
    begin_by(config, options, &proceed)
}

/// Begins and commits. In a runtime.
pub fn start(config: Config, options: Options<'_>) -> Result<Running, Failure> {
    begin(config, options).map(Starting::commit)
}

fn begin_by(config: Config, options: Options<'_>, gate: Gate<'_>) -> Result<Starting, Failure> {
    let Options { group, keep_records, attached, taken, groups } = options;
    let process = Process::set_up(&config, keep_records)?;
    let mut running = Running {
        workers: Workers::start(
            process.workers,
            config.daemon.bootstrap.sandbox,
            process.own.mark().is_some(),
        )?,
        layers: attached
            .into_iter()
            .fold(Layers::default().with(LayerOwner::FILE, config.clone()), |layers, attached| {
                layers.with(LayerOwner::ADMIN, attached)
            }),
        config: Config::empty(config.daemon),
        identities: Identities::default(),
        captures: Vec::new(),
        redirects: Vec::new(),
        listeners: Vec::new(),
        upstreams: Vec::new(),
        observers: Observers::default(),
        retired: Vec::new(),
        kept: Kept::new(),
        groups: Groups::new(),
        shared: None,
        discover: Discover::new(process.own.clone(), process.workers),
        process,
        duties: Duties::new(),
        notes: admin::Notes::default(),
        looking: None,
    };
    let config = running.layers.merged()?;
    let mut next = running.prepare(config, (taken, groups), group, gate)?;
    running.attach(&mut next, gate)?;
    Ok(Starting { next, running })
}

impl Running {
    /// A source of desired state wants something else. On an error nothing changes.
    async fn set_layer(&mut self, owner: LayerOwner, layer: Config) -> Result<Changed, Failure> {
        let layers = self.layers.with(owner, layer);
        let changed = self.reconcile(layers.merged()?).await?;
        self.layers = layers;
        Ok(changed)
    }

    /// Logs what the kernel programs say, and follows groups and network namespaces that come and go. Never ends.
    pub async fn watch_captures(&mut self) {
        loop {
            let mut sweep = false;
            let written = poll_fn(|cx| {
                let ready = self.captures.iter().filter(|a| a.poll(cx).is_ready()).count();
                if ready > 0 { Poll::Ready(()) } else { Poll::Pending }
            });
            tokio::select! {
                _ = self.duties.scan.tick() => self.forget_unused_groups(),
                _ = self.duties.sweep.tick() => sweep = true,
                () = written => {}
            }
            let mut changed = false;
            for active in &mut self.captures {
                active.programs.rings.read();
                active.follow();
                changed |= active.scan(&self.process);
            }
            if changed {
                self.publish();
            }
            if sweep {
                for active in &mut self.captures {
                    let forgotten = active.programs.capture.sweep();
                    tracing::debug!(cgroup = active.called, forgotten, "swept flows that nobody accepted");
                }
            }
        }
    }

    /// Warns of processes that have left a captured group.
    pub fn look_for_leavers(&mut self) {
        for active in &mut self.captures {
            active.leavers.look_now(&active.group, &active.group.processes());
        }
    }

    /// Opens the files of access logs by their names again.
    pub fn reopen_access_logs(&self) {
        self.observers.reopen();
    }

    /// Gives the listeners to a daemon that replaces this one. Dropped, what comes back is given up, and the listeners stay.
    fn give(
        &self,
        stream: UnixStream,
    ) -> Result<impl Future<Output = Result<(), TakeoverError>> + use<>, TakeoverError> {
        let (kept, groups) = (listen::copies(&self.kept)?, listen::copies_of(&self.groups)?);
        let hang_up = HangUp(stream.try_clone()?);
        // Waits until the other one runs; the workers go on meanwhile, and signals are heard.
        let given = tokio::task::spawn_blocking(move || takeover::give(&stream, &kept, &groups));
        Ok(async move {
            let _hang_up = hang_up;
            given.await.map_err(io::Error::other)?
        })
    }

    /// The captures of these groups end with this daemon, whatever their applications get while no daemon runs.
    fn release(&mut self, groups: &HashSet<String>) {
        for active in &mut self.captures {
            active.released = groups.contains(&active.wanted.cgroup.name().to_string());
        }
    }

    /// Stops taking connections, lets flows finish, and ends. What is pinned stays where the operator wants captured
    /// connections refused rather than let through.
    pub fn stop(mut self) -> Report {
        // A copy would go on listening, with nobody to accept.
        self.kept.clear();
        for active in self.captures.iter().filter(|a| a.released || a.wanted.on_failure == OnFailure::Open) {
            active.tidy(|a| match a.programs.capture.owner() {
                Owner::Us => a.programs.capture.detach_connect(),
                Owner::Another | Owner::Nobody => Ok(()),
            });
        }
        let report = self.workers.drain();
        // Not before the last connection has ended: workers end one after the other, and each would take a socket along.
        self.groups.clear();
        if let Some(looking) = self.looking.take().filter(thread::JoinHandle::is_finished) {
            let _panicked = looking.join();
        }
        for active in &mut self.captures {
            // What was written since the last look.
            active.programs.rings.read();
            let counters = active.counters().into_iter().chain(active.bypassed());
            let counters: Vec<_> = counters.filter(|(_, n)| *n > 0).collect();
            tracing::info!(cgroup = active.called, ?counters, "kernel counters");
            active.tidy(|a| match (a.programs.capture.owner(), a.wanted.on_failure) {
                (Owner::Another, _) => {
                    tracing::info!(cgroup = a.called, "another daemon has taken over");
                    Ok(())
                }
                (_, OnFailure::Closed) if a.released => {
                    tracing::info!(cgroup = a.called, "detached: it was attached to this daemon, which ends");
                    a.pins.as_deref().map_or(Ok(()), bpf::unpin)
                }
                (_, OnFailure::Open) => a.pins.as_deref().map_or(Ok(()), bpf::unpin),
                (_, OnFailure::Closed) => {
                    tracing::warn!(
                        cgroup = a.called,
                        "its captured connections are refused until the daemon is back \
                         (on_failure = \"closed\"); `tunnel detach` ends the capture"
                    );
                    Ok(())
                }
            });
        }
        let mut sums = self.workers.counters();
        // Written out before what of it was lost is told.
        drop((mem::take(&mut self.observers), mem::take(&mut self.retired), self.shared.take()));
        sums.extend(totals::all());
        sums.push(("panics", panics::count()));
        sums.retain(|(_, n)| *n > 0);
        tracing::info!(?sums, "counters");
        let policies = self.workers.policy_counters();
        if !policies.is_empty() {
            tracing::info!(?policies, "counters of policies");
        }
        report
    }
}

/// Ends the conversation with another daemon, whoever waits for its next word.
struct HangUp(UnixStream);

impl Drop for HangUp {
    fn drop(&mut self) {
        // It may have ended already.
        let _gone = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// The runtime of the thread that waits for signals.
fn control_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| other(&format!("the runtime could not start: {e}")))
}

fn other(what: &str) -> Failure {
    Failure::Other(Cause::new(what, ""))
}
