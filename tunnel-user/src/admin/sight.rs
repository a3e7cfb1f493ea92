//! What the admin interface sees: counters that it reads, and answers of the workers and of the control loop.
//!
//! # Invariants
//! - Whoever does not answer within [`PATIENCE`] is left out, or, of the control loop, shown as it was: an answer to an operator
//!   does not wait for a daemon that is busy.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};

use super::view::{Command, Overview};
use crate::{
    model::end::EndReason,
    observe::{
        flows::{CurrentPath, Totals},
        histogram::Buckets,
        istio::Istio,
        stats::{Check, Counters},
    },
    process::drain::Watch,
    proxy::{Proxy, questions::Asked},
    sinks::upstream::report::UpstreamReport,
};

/// How long a worker, or the control loop, may take for an answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the control loop may take for a change, which loads programs: less than `tunnel` waits for an answer (30 s).
const CHANGE_PATIENCE: Duration = Duration::from_secs(25);

/// See the module.
pub(super) struct Sight {
    workers: Vec<Asked>,
    commands: mpsc::Sender<Command>,
    /// The latest overview, and when it was made.
    latest: RefCell<(Arc<Overview>, Instant)>,
    drain: Watch,
}

/// Counters of all workers together.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums {
    pub(super) counters: BTreeMap<&'static str, u64>,
    pub(super) ended: Vec<(EndReason, u64)>,
    pub(super) rejected: Vec<(Check, u64)>,
    /// What policies have done, by their name and what it is.
    pub(super) policies: BTreeMap<(Arc<str>, &'static str), u64>,
    pub(super) connect: Buckets,
    pub(super) first_byte: Buckets,
    pub(super) flow: Buckets,
    pub(super) handshake: Buckets,
}

/// What all workers say of their flows together.
#[derive(Clone, Debug, Default)]
pub(super) struct LiveTotals {
    pub(super) totals: Totals,
    /// Flows, those whose target is being reached included.
    pub(super) active: usize,
    /// Flows that they take.
    pub(super) flows_max: usize,
    /// Whether every worker has answered. Sums of fewer are less than before, which a counter never is.
    pub(super) is_complete: bool,
    /// The memory that peers and their flows have.
    pub(super) memory: Memory,
}

/// What peers and their flows have of memory, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Memory {
    pub(super) held: u64,
    pub(super) budget: u64,
    /// How often a peer was given a smaller window.
    pub(super) shrunk: u64,
}

/// Everything that is counted, for the history.
#[derive(Clone, Debug, Default)]
pub(super) struct AllTotals {
    pub(super) sums: Sums,
    pub(super) live: LiveTotals,
}

impl Sight {
    pub(super) fn new(
        workers: Vec<Asked>,
        commands: mpsc::Sender<Command>,
        first: Overview,
        drain: Watch,
    ) -> Self {
        let latest = RefCell::new((Arc::new(first), Instant::now()));
        Self { workers, commands, latest, drain }
    }

    /// How many workers there are.
    pub(super) fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Whether the daemon drains, or has been told to stop.
    pub(super) fn is_draining(&self) -> bool {
        self.drain.is_draining()
    }

    /// What each worker answers; nothing of one that does not in time.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        question: impl Fn(&Rc<Proxy>) -> T + Clone + Send + 'static,
    ) -> Vec<Option<T>> {
        let deadline = Instant::now() + PATIENCE;
        // All are asked before one is waited for: the slowest decides.
        let asked: Vec<_> = self.workers.iter().map(|worker| worker.ask(question.clone())).collect();
        let mut answers = Vec::with_capacity(asked.len());
        for told in asked {
            answers.push(match told {
                Some(told) => timeout_at(deadline, told).await.ok().and_then(Result::ok),
                None => None,
            });
        }
        answers
    }

    /// What one worker answers.
    pub(super) async fn ask_one<T: Send + 'static>(
        &self,
        worker: usize,
        question: impl FnOnce(&Rc<Proxy>) -> T + Send + 'static,
    ) -> Option<T> {
        let told = self.workers.get(worker)?.ask(question)?;
        timeout_at(Instant::now() + PATIENCE, told).await.ok()?.ok()
    }

    /// What the control loop says, and how old that is.
    pub(super) async fn overview(&self) -> (Arc<Overview>, Duration) {
        let (tell, told) = oneshot::channel();
        if self.commands.try_send(Command::Overview(tell)).is_ok()
            && let Ok(Ok(overview)) = timeout(PATIENCE, told).await
        {
            let overview = Arc::new(overview);
            self.latest.replace((Arc::clone(&overview), Instant::now()));
            return (overview, Duration::ZERO);
        }
        let (overview, at) = &*self.latest.borrow();
        (Arc::clone(overview), at.elapsed())
    }

    /// Asks the control loop for something; none where it does not answer.
    pub(super) async fn command<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        self.within(PATIENCE, command).await
    }

    /// Has it change something. What it has not begun when this gives up is not done.
    pub(super) async fn change<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        self.within(CHANGE_PATIENCE, command).await
    }

    async fn within<T>(
        &self,
        patience: Duration,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Option<T> {
        let (tell, told) = oneshot::channel();
        self.commands.try_send(command(tell)).ok()?;
        timeout(patience, told).await.ok()?.ok()
    }

    /// What the workers have counted.
    pub(super) fn sums(&self) -> Sums {
        let mut sums = Sums {
            ended: EndReason::ALL.map(|reason| (reason, 0)).into(),
            rejected: Check::ALL.map(|check| (check, 0)).into(),
            ..Sums::default()
        };
        for Asked { counters, .. } in &self.workers {
            sums.add(counters);
        }
        sums
    }

    /// What the workers say of their flows.
    pub(super) async fn live(&self) -> LiveTotals {
        let asked = self.ask(|proxy| {
            let memory = proxy.memory();
            let memory = Memory { held: memory.held(), budget: memory.most(), shrunk: memory.shrunk() };
            (proxy.flows().totals(), proxy.active(), proxy.setup().shared.flows_max, memory)
        });
        let answers = asked.await;
        let mut all =
            LiveTotals { is_complete: answers.iter().all(Option::is_some), ..LiveTotals::default() };
        for (totals, active, flows_max, memory) in answers.into_iter().flatten() {
            all.memory.held += memory.held;
            all.memory.budget += memory.budget;
            all.memory.shrunk += memory.shrunk;
            all.totals.sent += totals.sent;
            all.totals.received += totals.received;
            for (sum, n) in all.totals.live.iter_mut().zip(totals.live) {
                *sum += n;
            }
            all.active += active;
            all.flows_max += flows_max;
        }
        all
    }

    /// What is counted as Istio counts it; none where not every worker answers. Each looks at all its flows for it.
    pub(super) async fn istio(&self) -> Option<Istio> {
        let mut all = Istio::default();
        for istio in self.ask(|proxy| proxy.istio()).await {
            all.add(istio?);
        }
        Some(all)
    }

    /// Both.
    pub(super) async fn totals(&self) -> AllTotals {
        AllTotals { live: self.live().await, sums: self.sums() }
    }

    /// What the upstreams of all workers are doing together, by name.
    pub(super) async fn upstreams(&self) -> BTreeMap<String, UpstreamReport> {
        self.complete_upstreams().await.0
    }

    /// The same, and whether every worker has answered.
    pub(super) async fn complete_upstreams(&self) -> (BTreeMap<String, UpstreamReport>, bool) {
        let answers = self.ask(|proxy| {
            let setup = proxy.setup();
            let all = setup.upstreams.tunnels();
            all.map(|upstream| (upstream.name().to_string(), upstream.report())).collect::<Vec<_>>()
        });
        let answers = answers.await;
        let is_complete = answers.iter().all(Option::is_some);
        let mut all = BTreeMap::<String, UpstreamReport>::new();
        for (name, report) in answers.into_iter().flatten().flatten() {
            all.entry(name).or_default().add(report);
        }
        (all, is_complete)
    }
}

impl LiveTotals {
    /// Flows that are carried.
    pub(super) fn flows(&self) -> usize {
        self.totals.live.iter().sum()
    }

    /// Flows by the path that their bytes take.
    pub(super) fn by_path(&self) -> impl Iterator<Item = (CurrentPath, usize)> {
        CurrentPath::ALL.into_iter().zip(self.totals.live)
    }
}

impl Sums {
    fn add(&mut self, counters: &Counters) {
        for (name, n) in counters.named() {
            *self.counters.entry(name).or_default() += n;
        }
        for (reason, n) in &mut self.ended {
            *n += counters.ended.of(*reason).get();
        }
        for (check, n) in &mut self.rejected {
            *n += counters.rejected.by(*check).get();
        }
        for (policy, decisions) in counters.policies.all() {
            for (decision, n) in decisions {
                *self.policies.entry((Arc::clone(&policy), decision)).or_default() += n;
            }
        }
        let durations = &counters.durations;
        self.connect.add(&durations.connect.read());
        self.first_byte.add(&durations.first_byte.read());
        self.flow.add(&durations.flow.read());
        self.handshake.add(&durations.handshake.read());
    }

    /// A counter by its name.
    pub(super) fn of(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or_default()
    }
}
