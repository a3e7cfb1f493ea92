//! The worker threads of a daemon, from outside.
//!
//! # Invariants
//! - Workers are given whole states, of which only the latest waits: nothing is lost because a worker is behind, and nothing
//!   piles up.
//! - No thread outlives this.

use std::{
    collections::BTreeMap,
    io, mem,
    sync::{Arc, mpsc},
    thread,
};

use tokio::sync::watch;

use super::other;
use crate::{
    kernel::{
        confine::{ConfineError, Confined},
        helper::Helper,
    },
    observe::stats::Counters,
    process::{
        drain::{self, Phase, Trigger},
        exit::{Cause, Failure},
    },
    proxy::questions::{self, Asked},
    worker::{self, Confinement, Report, Start, State},
};

/// See the module.
pub(super) struct Workers {
    trigger: Trigger,
    states: watch::Sender<Option<Arc<State>>>,
    /// A number for all of them to say again.
    question: watch::Sender<u64>,
    threads: Vec<Thread>,
    asked: Vec<Asked>,
    /// What the first one to say so was left with, where they are confined.
    confined: Option<Confined>,
    /// Ends after them.
    helper: Option<Helper>,
}

struct Thread {
    handle: thread::JoinHandle<io::Result<Report>>,
    in_force: watch::Receiver<u64>,
    answer: watch::Receiver<u64>,
}

impl Workers {
    /// Starts so many, which do nothing yet, and have no privileges where `confine` is so; `marking`: but for marking their
    /// sockets.
    pub(super) fn start(number: usize, confine: bool, marking: bool) -> Result<Self, Failure> {
        let helper = confine.then(Helper::start).transpose();
        let helper = helper.map_err(|e| other(&format!("a thread could not start: {e}")))?;
        let (tell_confined, confined) = mpsc::sync_channel(number);
        let (trigger, phase) = drain::channel();
        let mut workers = Self {
            trigger,
            states: watch::Sender::new(None),
            question: watch::Sender::new(0),
            threads: Vec::new(),
            asked: Vec::new(),
            confined: None,
            helper,
        };
        for index in 0..number {
            let counters = Arc::new(Counters::default());
            let (asked, questions) = questions::questions(Arc::clone(&counters));
            let (tell, in_force) = watch::channel(0);
            let (say, answer) = watch::channel(0);
            let start = Start {
                index,
                counters,
                states: workers.states.subscribe(),
                in_force: tell,
                question: workers.question.subscribe(),
                answer: say,
                watch: phase.clone(),
                questions,
            };
            let confinement = Confinement {
                helper: workers.helper.as_ref().and_then(Helper::asking),
                marking,
                confined: tell_confined.clone(),
            };
            let thread = thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(|| worker::run(start, confinement));
            let handle = thread.map_err(|e| other(&format!("a worker thread could not start: {e}")))?;
            workers.threads.push(Thread { handle, in_force, answer });
            workers.asked.push(asked);
        }
        drop(tell_confined);
        for one in confined {
            let one = one.map_err(|e| not_confined("a worker thread", &e))?;
            workers.confined = workers.confined.or(one);
        }
        Ok(workers)
    }

    /// What one of them was left with; `None` where they are not confined.
    pub(super) fn confined(&self) -> Option<Confined> {
        self.confined
    }

    /// The version of the latest state.
    pub(super) fn version(&self) -> u64 {
        self.states.borrow().as_ref().map_or(0, |state| state.version)
    }

    /// Has all workers do what a state says.
    pub(super) fn publish(&self, state: State) {
        self.states.send_replace(Some(Arc::new(state)));
    }

    /// Waits until the latest state is in force at every worker.
    pub(super) async fn in_force(&mut self) {
        let latest = self.version();
        for (index, thread) in self.threads.iter_mut().enumerate() {
            if thread.in_force.wait_for(|version| *version >= latest).await.is_ok() {
                continue;
            }
            // The reason is logged when it is joined. Nobody accepts from its sockets: clients are refused, and do not wait.
            tracing::error!(worker = index, "a worker has ended: its listening sockets are closed");
            for source in self.states.borrow().iter().flat_map(|state| &state.sources) {
                source.sockets.close(index);
            }
        }
    }

    /// Asks whether they are there; those that have not answered what was asked before.
    pub(super) fn ask(&self) -> Vec<usize> {
        let asked = *self.question.borrow();
        let silent = |(_, thread): &(usize, &Thread)| *thread.answer.borrow() != asked;
        let silent = self.threads.iter().enumerate().filter(silent).map(|(index, _)| index).collect();
        self.question.send_modify(|question| *question += 1);
        silent
    }

    /// By which they are told to stop.
    pub(super) fn trigger(&self) -> &Trigger {
        &self.trigger
    }

    /// Lets them drain, and waits for their ends.
    pub(super) fn drain(&mut self) -> Report {
        self.trigger.enter(Phase::Drain);
        let mut report = Report::default();
        for Thread { handle, .. } in mem::take(&mut self.threads) {
            match handle.join() {
                Ok(Ok(one)) => {
                    report.records.extend(one.records);
                    report.dropped += one.dropped;
                    report.connections_opened += one.connections_opened;
                }
                Ok(Err(e)) => tracing::error!("a worker failed: {e}"),
                Err(_) => tracing::error!("a worker panicked"),
            }
        }
        self.trigger.enter(Phase::Stop);
        report
    }

    /// By which they are asked.
    pub(super) fn asked(&self) -> &[Asked] {
        &self.asked
    }

    /// Their counters, summed.
    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut sums: Vec<(&'static str, u64)> = Vec::new();
        for worker in &self.asked {
            for (i, (name, n)) in worker.counters.all().into_iter().enumerate() {
                match sums.get_mut(i) {
                    Some((_, sum)) => *sum += n,
                    None => sums.push((name, n)),
                }
            }
        }
        sums
    }

    /// Their counters of each policy, summed.
    pub(super) fn policy_counters(&self) -> Vec<(String, u64)> {
        let mut sums = BTreeMap::<String, u64>::new();
        for (policy, counters) in self.asked.iter().flat_map(|worker| worker.counters.policies.all()) {
            for (name, n) in counters {
                *sums.entry(format!("policy_{name}{{{policy}}}")).or_default() += n;
            }
        }
        sums.into_iter().filter(|(_, n)| *n > 0).collect()
    }
}

/// `whose`: of which thread.
pub(super) fn not_confined(whose: &str, e: &ConfineError) -> Failure {
    Failure::Kernel(Cause::new(
        format!("the privileges of {whose} could not be dropped: {e}"),
        "The kernel requires CONFIG_SECCOMP_FILTER, and a container's runtime has to permit seccomp(2), prctl(2) and capset(2). \
         With daemon.sandbox = false in a configuration file (tunnel run --config, tunnel exec --config) no thread drops any.",
    ))
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.trigger.enter(Phase::Stop);
        for Thread { handle, .. } in mem::take(&mut self.threads) {
            if !matches!(handle.join(), Ok(Ok(_))) {
                tracing::error!("a worker failed or panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{SocketAddr, TcpStream},
        time::Duration,
    };

    use super::*;
    use crate::{
        config,
        kernel::own::OwnListeners,
        model::names::SourceName,
        process::books::PeerLimits,
        relay::PathKind,
        routing::{policy::Policies, router::Router},
        sinks::dial::Dialer,
        sources::capture::accept::Origins,
        transport::tcp::{self, OnClose},
        worker::{CaptureSocket, Limits, Listening, Shared, Sockets, Source, Timeouts},
    };

    fn shared() -> Arc<Shared> {
        Arc::new(Shared {
            router: Router::new(Vec::new()),
            policies: Policies::new(Vec::new(), &[]),
            dialer: Dialer::default(),
            pseudonym: "tunnel-test".to_owned(),
            flows_max: 10,
            path: PathKind::Copy,
            sniff_timeout: config::SNIFF_TIMEOUT,
            dial_timeout: config::DIAL_TIMEOUT,
            drain_timeout: Duration::from_secs(1),
            keep_records: false,
            limits: Limits {
                memory: 1 << 30,
                peer_memory: 1 << 28,
                peer: PeerLimits { connections: 10, flows_per_second: 1000 },
                flows: Timeouts::default(),
            },
            access_logs: Default::default(),
            tracer: None,
            istio: None,
        })
    }

    /// A source with one socket, at the last of so many workers. What it brings came by no rule, and is reset.
    fn source(workers: usize) -> (SocketAddr, Source) {
        let any = "127.0.0.1:0".parse().unwrap();
        let socket = tcp::listen(any, 1, None, OnClose::Abort).unwrap().remove(0);
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let origins = Origins::Redirected(Arc::new(OwnListeners::new(&[address])));
        let mut shares: Vec<_> = (0..workers).map(|_| Vec::new()).collect();
        shares[workers - 1].push(Listening::Captured(CaptureSocket { socket, origins }));
        let name = SourceName::Redirect([address].into());
        (address, Source { name, netns: None, called: None, identity: None, sockets: Sockets::new(shares) })
    }

    fn is_accepted_from(address: &SocketAddr) -> bool {
        let Ok(mut stream) = TcpStream::connect(address) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Nobody sends anything there: it ends because somebody has accepted it.
        match stream.read(&mut [0]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// However many states are published while workers are behind, the last one is in force: no source is forgotten that was
    /// new in one that they have not seen, and none goes on that is not in the last.
    #[tokio::test]
    async fn workers_that_are_behind_end_up_in_the_latest_state() {
        const SOURCES: usize = 100;
        let mut workers = Workers::start(2, false, false).unwrap();
        let shared = shared();
        let (addresses, sources): (Vec<_>, Vec<_>) = (0..SOURCES).map(|_| source(2)).unzip();
        let state = |version, sources: &[Source]| State {
            version,
            shared: Arc::clone(&shared),
            upstreams: Vec::new(),
            sources: sources.to_vec(),
        };
        for n in 1..=SOURCES {
            workers.publish(state(n as u64, &sources[..n]));
        }
        workers.in_force().await;
        assert!(addresses.iter().all(is_accepted_from));

        workers.publish(state(workers.version() + 1, &sources[..1]));
        workers.in_force().await;
        let open = || addresses.iter().filter(|address| TcpStream::connect(address).is_ok()).count();
        while open() > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(is_accepted_from(&addresses[0]));
        workers.drain();
        assert_eq!(open(), 0);
    }

    /// The listening sockets of a worker that has ended are closed, so that clients are refused and do not wait; the others' go
    /// on.
    #[tokio::test]
    async fn sockets_of_a_worker_that_has_ended_are_closed() {
        let mut workers = Workers::start(1, false, false).unwrap();
        let ((_, in_force), (_, answer)) = (watch::channel(0), watch::channel(0));
        let handle = thread::spawn(|| Ok(Report::default()));
        workers.threads.push(Thread { handle, in_force, answer });
        let ((own, first), (ended, second)) = (source(1), source(2));
        let sources = vec![first, second];
        workers.publish(State { version: 1, shared: shared(), upstreams: Vec::new(), sources });
        workers.in_force().await;
        let refused = TcpStream::connect(ended).expect_err("nobody accepts there");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(is_accepted_from(&own));
        workers.drain();
    }
}
