//! The composition root: from a configuration to a running daemon, and back.
//!
//! Enters: a [`Config`]. Leaves: workers that carry flows, until they are told to stop. Invariant: it
//! binds, loads and verifies everything before it attaches to a cgroup, and attaches last. Only this file
//! wires rooms together.

mod captures;
mod following;
mod inbox;
mod leavers;
mod listen;
mod namespaces;
mod pins;
mod reload;
mod rules;
mod run;
pub mod takeover;
mod upstreams;

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
    task::Poll,
    thread,
    time::Duration,
};

use socket2::Socket;
use tokio::{
    sync::mpsc,
    time::{Interval, MissedTickBehavior},
};

use self::{
    captures::{ActiveCapture, Loaded, bpf_failure},
    inbox::Inbox,
    listen::{ActiveListener, Opener, Sockets, SourceIds, may_mark, require_mark},
    pins::{lock_pins, pin_dir},
    upstreams::Discover,
};
pub use self::{following::nested, run::run};
use crate::{
    config::{self, Config, OnFailure, Relay},
    daemon::takeover::{Listeners, TakeoverError},
    identity::{
        provider::Subscription,
        store::{self, TlsStore},
    },
    kernel::{
        cgroup::Fresh,
        memory, privileges,
        version::{Feature, Kernel},
    },
    model::{names::IdentityName, trust::IdentityFiles},
    observe::stats::Counters,
    process::{
        drain::{self, Phase, Trigger},
        exit::{Cause, Failure},
        limits, panics, random,
    },
    relay::{self, PathKind},
    routing::{policy::Policies, router::Router},
    sinks::upstream,
    sources::capture::bpf::{self, Owner},
    transport::tcp,
    worker::{self, Report, Shared, SourceId, Start},
};

/// New namespaces that a worker has not taken up yet.
const MORE_MAX: usize = 64;
/// How often captured groups are searched for network namespaces that appeared.
const NAMESPACE_SCAN: Duration = Duration::from_secs(1);
/// How often flows that nobody accepted are looked for.
const SWEEP: Duration = Duration::from_secs(60);

/// A daemon whose workers run.
pub struct Running {
    trigger: Trigger,
    threads: Vec<thread::JoinHandle<io::Result<Report>>>,
    counters: Vec<Arc<Counters>>,
    more: Vec<Inbox>,
    fixed: Fixed,
    /// What it was told last.
    config: Config,
    identity: Option<Identity>,
    captures: Vec<ActiveCapture>,
    redirects: Vec<SourceId>,
    listeners: Vec<ActiveListener>,
    /// The listening sockets whose addresses are configured, by them: for a daemon that replaces this one, and for a
    /// configuration that says something else about them.
    kept: Vec<(SocketAddr, Vec<Socket>)>,
    /// Those of them that get other options once it is sure that this daemon stays.
    retuned: Vec<(SocketAddr, tcp::OnClose)>,
    sources: SourceIds,
    upstreams: Vec<Arc<upstream::Next<upstream::Settings>>>,
    discover: Discover,
    duties: Duties,
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

/// What no configuration changes while a daemon runs.
struct Fixed {
    workers: usize,
    /// The limit of descriptors.
    nofile: u64,
    /// What our own sockets are told by.
    own: tcp::Own,
    /// What this process calls itself in `via`.
    pseudonym: String,
    keep_records: bool,
}

/// Our certificate, and the notices of its provider.
struct Identity {
    store: Arc<TlsStore>,
    _notices: Subscription,
}

/// What a start needs besides the configuration.
#[derive(Default)]
pub struct Options<'a> {
    /// The group that [`config::CgroupRef::Fresh`] means.
    pub group: Option<&'a Fresh>,
    /// Whether records of flows are kept, for [`Running::stop`] to return.
    pub keep_records: bool,
    /// Sockets of a daemon that this one replaces: used where their addresses are configured.
    pub taken: Listeners,
}

/// Binds, loads, starts the workers, and attaches. In a runtime.
pub fn start(config: Config, options: Options<'_>) -> Result<Running, Failure> {
    let Options { keep_records, taken, group } = options;
    require_privileges(&config)?;
    memory::keep_freed();
    tcp::set_keepalive(config.daemon.bootstrap.tcp_keepalive);
    let mark = config.daemon.bootstrap.mark;
    // Unprivileged gateways cannot set it, and have nothing that could capture them.
    let marking = !config.captures.is_empty() || may_mark(mark).is_ok();
    let fixed = Fixed {
        workers: config.daemon.bootstrap.workers.map_or_else(cores, Into::into),
        nofile: limits::raise_nofile(),
        own: tcp::Own::new(marking.then_some(mark)),
        pseudonym: pseudonym(),
        keep_records,
    };
    let identity = config.identities.get(&IdentityName::default()).cloned().map(load_identity).transpose()?;
    let tls = identity.as_ref().map(|i| &i.store);
    let mut sources = SourceIds::default();
    let mut sockets: Vec<Sockets> = (0..fixed.workers).map(|_| Sockets::default()).collect();
    let mut opener = Opener {
        workers: fixed.workers,
        mark: fixed.own.mark(),
        taken,
        kept: Vec::new(),
        retuned: Vec::new(),
    };
    let mut listeners = Vec::new();
    for wanted in &config.listeners {
        listeners.push(opener.open_listener(sources.next(), wanted, tls, &mut sockets)?);
    }

    // From the first look at what is pinned until the last link: a daemon that ends must not tidy in between.
    let _lock = lock_if_pinned(&config, &config.captures)?;
    let redirects = opener.open_redirects(&config.redirects, &mut sources, &mut sockets)?;
    let mut captures = Loaded::default();
    for wanted in &config.captures {
        captures.0.push(captures::load(sources.next(), wanted, &config, group)?);
        let Some(active) = captures.0.last_mut() else { continue };
        for (own, opened) in sockets.iter_mut().zip(active.listen_here(fixed.workers, fixed.own.mark())?) {
            own.captures.extend(opened);
        }
    }

    let path = path(&config)?;
    let shared = shared(&config, &fixed, &listeners, path);
    let mut discover = Discover::new(fixed.own.clone(), fixed.workers);
    let upstreams = config.upstreams.iter().map(|u| discover.upstream(u, tls).map(Arc::new));
    let upstreams = upstreams.collect::<Result<Vec<_>, _>>()?;
    let (trigger, phase) = drain::channel();
    let mut running = Running {
        trigger,
        threads: Vec::new(),
        counters: Vec::new(),
        more: Vec::new(),
        fixed,
        config,
        identity,
        captures: captures.keep(),
        redirects,
        listeners,
        kept: opener.kept,
        retuned: opener.retuned,
        sources,
        upstreams,
        discover,
        duties: Duties::new(),
        looking: None,
    };
    if let Err(e) = running.begin(sockets, &shared, &phase) {
        running.captures.iter().for_each(ActiveCapture::take_back);
        return Err(e);
    }
    for address in running.config.redirects.iter().flat_map(|r| &r.listen) {
        tracing::info!(%address, "capturing what rules redirect here");
    }
    Ok(running)
}

/// Fails with the names of what is missing.
pub fn require_for_capture() -> Result<(), Failure> {
    let missing = privileges::missing_for_capture();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(name, what)| format!("{name} ({what})")).collect();
    Err(Failure::Privilege(Cause::new(
        format!("capturing takes privileges that this process lacks: {}", names.join(", ")),
        "Run it as root: sudo tunnel ...",
    )))
}

/// Fails where this process may not do what a configuration asks for.
fn require_privileges(config: &Config) -> Result<(), Failure> {
    if !config.captures.is_empty() {
        require_for_capture()?;
    }
    if !config.redirects.is_empty() {
        require_mark(config.daemon.bootstrap.mark)?;
    }
    Ok(())
}

/// What all workers are told of a configuration.
fn shared(config: &Config, fixed: &Fixed, listeners: &[ActiveListener], path: PathKind) -> Arc<Shared> {
    let own = listeners.iter().map(|l| l.bound);
    let own: Vec<_> = own.chain(config.redirects.iter().flat_map(|r| &r.listen).copied()).collect();
    let per_flow = limits::per_flow(config);
    let max_flows = config.daemon.max_flows.get();
    if let Some(flows) = limits::cut_to(max_flows, fixed.nofile, fixed.workers, per_flow) {
        tell_cut(config, flows, fixed.nofile, per_flow);
    }
    Arc::new(Shared {
        router: Router::new(config.routes.clone()),
        policies: Policies::new(config.policies.clone(), &own),
        own: fixed.own.clone(),
        pseudonym: fixed.pseudonym.clone(),
        flows_max: limits::flows_per_worker(max_flows, fixed.nofile, fixed.workers, per_flow),
        path,
        inspect_timeout: config.daemon.inspect_timeout,
        dial_timeout: config::DIAL_TIMEOUT,
        drain_timeout: config.daemon.drain_timeout,
        keep_records: fixed.keep_records,
    })
}

/// Says that descriptors allow fewer flows than the configuration.
fn tell_cut(config: &Config, flows: usize, nofile: u64, per_flow: u64) {
    let what = "fewer flows are taken than max_flows, for want of file descriptors: raise their limit (LimitNOFILE= in a \
                systemd unit, ulimit -Hn in a shell), or lower max_flows";
    let max_flows = config.daemon.max_flows;
    // Beside a command that has its terminal, only who wants to know more is told.
    if config.captures.iter().any(|c| c.cgroup == config::CgroupRef::Fresh) {
        tracing::info!(max_flows, flows, nofile, per_flow, "{what}");
    } else {
        tracing::warn!(max_flows, flows, nofile, per_flow, "{what}");
    }
}

/// How bytes are moved between two sockets of ours. Fails where it was asked for and cannot be.
fn path(config: &Config) -> Result<PathKind, Failure> {
    let asked = match config.daemon.relay {
        Relay::Copy => return Ok(PathKind::Copy),
        Relay::Pipe => return Ok(PathKind::Pipe),
        // No flow would have two sockets.
        Relay::Auto if !limits::has_two_sockets(config) => return Ok(PathKind::Copy),
        Relay::Auto => false,
        Relay::Splice => true,
    };
    let (why, privilege) = match Kernel::running().allows(Feature::Splice) {
        Err(why) => (why, false),
        Ok(()) => match relay::probe() {
            Ok(()) => return Ok(PathKind::Splice),
            Err(e) => (e.summary(), e.is_privilege()),
        },
    };
    if !asked {
        tracing::info!("bytes between two connections are copied: {why}");
        return Ok(PathKind::Copy);
    }
    let what = format!("relay = \"splice\": {why}");
    Err(if privilege {
        let remedy = "The program takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN: run it as root. With relay = \"auto\" bytes are \
                      copied without.";
        Failure::Privilege(Cause::new(what, remedy))
    } else {
        let remedy = "With relay = \"auto\" bytes are copied on such a kernel; `tunnel doctor` says which have what it takes.";
        Failure::Kernel(Cause::new(what, remedy))
    })
}

/// Keeps other daemons from what is pinned, where anything of these captures is.
fn lock_if_pinned<'a>(
    config: &Config,
    captures: impl IntoIterator<Item = &'a config::Capture>,
) -> Result<Option<OwnedFd>, Failure> {
    let pinning = captures.into_iter().any(|c| pin_dir(config, c).is_some());
    pinning.then(|| lock_pins(&config.daemon.bootstrap.bpffs)).transpose()
}

impl Running {
    /// Starts the workers, and attaches.
    fn begin(
        &mut self,
        sockets: Vec<Sockets>,
        shared: &Arc<Shared>,
        phase: &drain::Watch,
    ) -> Result<(), Failure> {
        for (i, Sockets { captures, listeners }) in sockets.into_iter().enumerate() {
            let counters = Arc::new(Counters::default());
            let (tell, more) = mpsc::channel(MORE_MAX);
            let start = Start {
                shared: Arc::clone(shared),
                upstreams: self.upstreams.clone(),
                counters: Arc::clone(&counters),
                more,
                captures,
                listeners,
                watch: phase.clone(),
            };
            let thread = thread::Builder::new().name(format!("worker-{i}")).spawn(move || worker::run(start));
            self.threads.push(thread.map_err(|e| other(&format!("a worker thread could not start: {e}")))?);
            self.counters.push(counters);
            self.more.push(Inbox::new(tell));
        }
        self.register(&[]);
        // Last: from here on connections are captured.
        for active in &mut self.captures {
            active.scan(&self.more, self.fixed.own.mark());
            active.attach()?;
        }
        following::order(&self.captures);
        self.captures.iter().for_each(ActiveCapture::announce);
        self.looking = following::warn_of_others(&self.config);
        Ok(())
    }

    /// Has the sockets that we connect registered with every capture, those to come included.
    fn register(&self, more: &[ActiveCapture]) {
        let all = self.captures.iter().chain(more).map(|active| active.programs.capture.register());
        self.fixed.own.set_captures(all.collect());
    }

    /// It is sure that this daemon stays: nothing of an earlier one is put back any more.
    fn settle(&mut self) {
        for active in &self.captures {
            active.programs.capture.settle();
            active.tidy(|active| active.programs.capture.forget_other_versions());
        }
        listen::retune(&self.kept, &std::mem::take(&mut self.retuned));
    }

    /// It does not stay: what an earlier daemon had attached is put back.
    fn take_back(&self) {
        match lock_if_pinned(&self.config, &self.config.captures) {
            Ok(_lock) => self.captures.iter().for_each(ActiveCapture::take_back),
            Err(e) => tracing::error!("not everything is as it was before: {e}"),
        }
    }

    /// Warns of processes that have left a captured group.
    pub fn look_for_leavers(&mut self) {
        for active in &mut self.captures {
            active.leavers.look_now(&active.group, &active.group.processes());
        }
    }

    /// The addresses of the CONNECT listeners, with the ports that they got.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().map(|l| l.bound)
    }

    /// Logs what the kernel programs say, and opens listeners in namespaces that appear. Never ends.
    pub async fn watch_captures(&mut self) {
        loop {
            let mut sweep = false;
            let written = poll_fn(|cx| {
                let ready = self.captures.iter().filter(|a| a.poll(cx).is_ready()).count();
                if ready > 0 { Poll::Ready(()) } else { Poll::Pending }
            });
            tokio::select! {
                _ = self.duties.scan.tick() => {}
                _ = self.duties.sweep.tick() => sweep = true,
                () = written => {}
            }
            for active in &mut self.captures {
                active.programs.rings.read();
                active.follow();
                active.scan(&self.more, self.fixed.own.mark());
            }
            if sweep {
                for active in &mut self.captures {
                    let forgotten = active.programs.capture.sweep();
                    tracing::debug!(cgroup = active.name, forgotten, "swept flows that nobody accepted");
                }
            }
        }
    }

    /// Gives the listeners to a daemon that replaces this one. Dropped, it is given up, and the listeners stay.
    async fn give(&mut self, stream: UnixStream) -> Result<(), TakeoverError> {
        let kept: io::Result<Vec<(SocketAddr, Vec<Socket>)>> = self
            .kept
            .iter()
            .map(|(address, sockets)| {
                let copies: io::Result<Vec<_>> = sockets.iter().map(Socket::try_clone).collect();
                copies.map(|copies| (*address, copies))
            })
            .collect();
        let kept = kept?;
        let _hang_up = HangUp(stream.try_clone()?);
        // Waits until the other one runs; the workers go on meanwhile, and signals are heard.
        let given = tokio::task::spawn_blocking(move || takeover::give(&stream, &kept));
        given.await.map_err(io::Error::other)?
    }

    /// Stops taking connections, lets flows finish, and ends. What is pinned stays where the operator
    /// wants captured connections refused rather than let through.
    pub fn stop(mut self) -> Report {
        // A copy would go on listening, with nobody to accept.
        self.kept.clear();
        for active in self.captures.iter().filter(|a| a.wanted.on_failure == OnFailure::Open) {
            active.tidy(|a| match a.programs.capture.owner() {
                Owner::Us => a.programs.capture.detach_connect(),
                Owner::Another | Owner::Nobody => Ok(()),
            });
        }
        self.trigger.enter(Phase::Drain);
        let mut report = Report::default();
        for thread in self.threads {
            match thread.join() {
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
        if let Some(looking) = self.looking.take().filter(thread::JoinHandle::is_finished) {
            let _panicked = looking.join();
        }
        for active in &mut self.captures {
            // What was written since the last look.
            active.programs.rings.read();
            let counters = active.counters().into_iter().chain(active.bypassed());
            let counters: Vec<_> = counters.filter(|(_, n)| *n > 0).collect();
            tracing::info!(cgroup = active.name, ?counters, "kernel counters");
            active.tidy(|a| match (a.programs.capture.owner(), a.wanted.on_failure) {
                (Owner::Another, _) => {
                    tracing::info!(cgroup = a.name, "another daemon has taken over");
                    Ok(())
                }
                (_, OnFailure::Open) => a.pins.as_deref().map_or(Ok(()), bpf::unpin),
                (_, OnFailure::Closed) => {
                    tracing::warn!(
                        cgroup = a.name,
                        "its captured connections are refused until the daemon is back \
                         (on_failure = \"closed\"); `tunnel detach` ends the capture"
                    );
                    Ok(())
                }
            });
        }
        let mut sums: Vec<(&'static str, u64)> = Vec::new();
        for counters in &self.counters {
            for (i, (name, n)) in counters.all().into_iter().enumerate() {
                match sums.get_mut(i) {
                    Some((_, sum)) => *sum += n,
                    None => sums.push((name, n)),
                }
            }
        }
        sums.push(("panics", panics::count()));
        sums.retain(|(_, n)| *n > 0);
        tracing::info!(?sums, "counters");
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

/// `tunnel detach`: ends the captures of a configuration, whether or not a daemon runs.
pub fn detach(config: &Config) -> Result<(), Failure> {
    for capture in &config.captures {
        if let Some(dir) = pin_dir(config, capture).filter(|dir| dir.exists()) {
            let _lock = bpf::lock(&config.daemon.bootstrap.bpffs).map_err(bpf_failure)?;
            bpf::unpin(&dir).map_err(bpf_failure)?;
        }
    }
    for address in config.redirects.iter().flat_map(|r| &r.listen) {
        tracing::warn!(%address, "nothing is attached that redirects connections there: the rules are yours to remove");
    }
    Ok(())
}

/// The runtime of the thread that waits for signals.
fn control_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| other(&format!("the runtime could not start: {e}")))
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

fn load_identity(files: IdentityFiles) -> Result<Identity, Failure> {
    let store = TlsStore::load(files)?;
    let notices = store::watch(&store, || {})
        .map_err(|e| other(&format!("the identity's files cannot be watched: {e}")))?;
    Ok(Identity { store, _notices: notices })
}

/// A token (RFC 9110 section 5.6.2) that no other process has.
fn pseudonym() -> String {
    random::seed();
    format!("tunnel-{:016x}", fastrand::u64(..))
}

fn other(what: &str) -> Failure {
    Failure::Other(Cause::new(what, ""))
}

fn no_identity() -> Failure {
    Failure::Config(Cause::new("TLS needs an identity", "Add an [identity] section."))
}
