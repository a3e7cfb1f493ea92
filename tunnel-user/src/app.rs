//! The composition root: from a configuration to a running daemon, and back.
//!
//! Enters: a [`Config`]. Leaves: workers that carry flows, until they are told to stop. Invariant: it
//! binds, loads and verifies everything before it attaches to a cgroup, and attaches last. Only this file
//! wires rooms together.

use std::{
    collections::HashMap,
    fs,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    task::Poll,
    thread,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, time::MissedTickBehavior};

use crate::{
    capture::{
        accept::{self, Sockets},
        bpf::{self, BpfError, Capture, Lifetime, Owner, Spec},
        cgroup::{self, CgroupError, Fresh, Hierarchy},
        ring::Wake,
        rules::{self, Pattern},
    },
    config::{self, AddrPattern, CgroupRef, Config, OnFailure},
    drain::{self, Phase, Trigger},
    exit::{Cause, Failure},
    limits,
    listener::h2 as h2_listener,
    policy::Policies,
    privileges,
    route::Router,
    signal,
    stats::Counters,
    transport::{
        store::{self, TlsStore},
        tcp,
    },
    tunnel::{self, pool},
    worker::{self, CaptureSocket, ConnectSocket, Report, Shared, Start},
};

/// New namespaces that a worker has not taken up yet.
const MORE_MAX: usize = 64;
/// How often captured groups are searched for network namespaces that appeared.
const NAMESPACE_SCAN: Duration = Duration::from_secs(1);
/// How often flows that nobody accepted are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// Between two PINGs to a tunnel peer, and how long its answer may take.
const LISTENER_KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// A daemon whose workers run.
pub struct Running {
    trigger: Trigger,
    threads: Vec<thread::JoinHandle<io::Result<Report>>>,
    counters: Vec<Arc<Counters>>,
    captures: Vec<ActiveCapture>,
    more: Vec<mpsc::Sender<CaptureSocket>>,
    mark: u32,
    addresses: Vec<SocketAddr>,
    _watch: Option<store::Watch>,
}

struct ActiveCapture {
    capture: Capture,
    group: OwnedFd,
    name: String,
    on_failure: OnFailure,
    pins: Option<PathBuf>,
    /// Network namespaces (by inode) that have listeners, and those that could not have any.
    namespaces: HashMap<u64, bool>,
    third_party: bool,
}

/// Binds, loads, starts the workers, and attaches. `fresh` is the group that [`CgroupRef::Fresh`] means.
pub fn start(config: Config, fresh: Option<&Fresh>, keep_records: bool) -> Result<Running, Failure> {
    if !config.captures.is_empty() {
        privileges::require_for_capture()?;
    }
    let nofile = limits::raise_nofile();
    let workers = config.daemon.workers.map_or_else(cores, Into::into);
    let capturing = !config.captures.is_empty();
    let mark = config.daemon.mark.get();
    // Unprivileged gateways cannot set it, and have nothing that could capture them.
    let socket_mark = (capturing || may_mark(mark)).then_some(mark);
    let tls = config.identity.clone().map(TlsStore::load).transpose()?;
    let watch = tls.as_ref().map(watch_identity).transpose()?;

    let mut addresses = Vec::new();
    let mut listeners: Vec<Vec<ConnectSocket>> = (0..workers).map(|_| Vec::new()).collect();
    for listener in &config.listeners {
        let Some(tls) = &tls else { return Err(no_identity()) };
        let sockets = tcp::listen(listener.address, workers, socket_mark)
            .map_err(|e| cannot_listen(listener.address, &e))?;
        let bound = sockets.first().and_then(|s| s.local_addr().ok()?.as_socket());
        addresses.push(bound.unwrap_or(listener.address));
        let settings = Arc::new(h2_listener::Settings {
            tls: Arc::clone(tls),
            check: listener.check(),
            handshake_timeout: listener.handshake_timeout,
            max_streams: listener.max_streams.get(),
            keepalive_interval: LISTENER_KEEPALIVE.0,
            keepalive_timeout: LISTENER_KEEPALIVE.1,
        });
        for (own, socket) in listeners.iter_mut().zip(sockets) {
            let dial_timeout = listener.dial_timeout;
            own.push(ConnectSocket { socket, settings: Arc::clone(&settings), dial_timeout });
        }
    }

    // From the first look at what is pinned until the last link: a daemon that ends must not tidy in between.
    let pinning = config.captures.iter().any(|c| pin_dir(&config, c).is_some());
    let _lock = pinning.then(|| lock_pins(&config.daemon.bpffs)).transpose()?;
    let mut captures = Vec::new();
    let mut sockets: Vec<Vec<CaptureSocket>> = (0..workers).map(|_| Vec::new()).collect();
    for wanted in &config.captures {
        let mut active = load(wanted, &config, fresh)?;
        if let Some(proxy) = wanted.proxy {
            active.capture.set_listener(own_netns_cookie()?, proxy_listener(proxy)).map_err(bpf_failure)?;
        } else {
            let opened = accept::listen(workers, mark).map_err(|e| capture_listener(&e))?;
            active.namespaces.insert(accept::netns_inode(std::process::id()).unwrap_or(0), true);
            for (own, socket) in sockets.iter_mut().zip(hand_out(&active.capture, opened)?) {
                own.extend(socket);
            }
        }
        captures.push(active);
    }

    let shared = Arc::new(Shared {
        router: Router::new(config.routes.clone()),
        policies: Policies::new(config.policies.clone(), &addresses),
        upstreams: config.upstreams.iter().map(|u| upstream(u, socket_mark)).collect(),
        tls,
        mark: socket_mark,
        flows_max: limits::flows_per_worker(config.daemon.max_flows.get(), nofile, workers),
        dial_timeout: config::DIAL_TIMEOUT,
        drain_timeout: config.daemon.drain_timeout,
        keep_records,
    });
    let (trigger, phase) = drain::channel();
    let mut running = Running {
        trigger,
        threads: Vec::new(),
        counters: Vec::new(),
        captures,
        more: Vec::new(),
        mark,
        addresses,
        _watch: watch,
    };
    for (i, (captures, listeners)) in sockets.into_iter().zip(listeners).enumerate() {
        let counters = Arc::new(Counters::default());
        let (tell, more) = mpsc::channel(MORE_MAX);
        let start = Start {
            shared: Arc::clone(&shared),
            counters: Arc::clone(&counters),
            more,
            captures,
            listeners,
            watch: phase.clone(),
        };
        let thread = thread::Builder::new().name(format!("worker-{i}")).spawn(move || worker::run(start));
        running.threads.push(thread.map_err(|e| other(&format!("a worker thread could not start: {e}")))?);
        running.counters.push(counters);
        running.more.push(tell);
    }
    // Last: from here on connections are captured.
    for active in &mut running.captures {
        active.scan(&running.more, running.mark);
        active.capture.attach(active.group.as_fd()).map_err(bpf_failure)?;
        tracing::info!(cgroup = active.name, "capturing");
    }
    Ok(running)
}

impl Running {
    /// The addresses of the CONNECT listeners, with the ports that they got.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Logs what the kernel programs say, and opens listeners in namespaces that appear. Never ends.
    pub async fn watch_captures(&mut self) {
        let mut logs: Vec<_> = self.captures.iter_mut().filter_map(|a| a.capture.take_log()).collect();
        let mut events: Vec<_> =
            self.captures.iter_mut().filter_map(|a| a.capture.take_events().ok()).collect();
        let wakes = logs.iter().map(Wake::new).chain(events.iter().map(Wake::new)).filter_map(|w| {
            // Without it the ticks below still look.
            w.map_err(|e| tracing::warn!("a ring of the kernel programs cannot be watched: {e}")).ok()
        });
        let wakes: Vec<_> = wakes.collect();
        let mut swept = Instant::now();
        let mut tick = tokio::time::interval(NAMESPACE_SCAN);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let written = poll_fn(|cx| {
                let ready = wakes.iter().filter(|w| w.poll(cx).is_ready()).count();
                if ready > 0 { Poll::Ready(()) } else { Poll::Pending }
            });
            tokio::select! {
                _ = tick.tick() => {}
                () = written => {}
            }
            for log in &mut logs {
                log.flush();
            }
            for ring in &mut events {
                // It has no more to say than that it is time to look.
                while ring.next().is_some() {}
            }
            for active in &mut self.captures {
                active.scan(&self.more, self.mark);
            }
            if swept.elapsed() >= SWEEP {
                swept = Instant::now();
                for active in &mut self.captures {
                    let forgotten = active.capture.sweep();
                    tracing::debug!(cgroup = active.name, forgotten, "swept flows that nobody accepted");
                }
            }
        }
    }

    /// Stops taking connections, lets flows finish, and ends. What is pinned stays where the operator
    /// wants captured connections refused rather than let through.
    pub fn stop(self) -> Report {
        for active in self.captures.iter().filter(|a| a.on_failure == OnFailure::Open) {
            active.tidy(|a| match a.capture.owner() {
                Owner::Us => a.capture.detach_connect(),
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
        for active in &self.captures {
            let counters: Vec<_> = active.capture.counters().into_iter().filter(|(_, n)| *n > 0).collect();
            tracing::info!(cgroup = active.name, ?counters, "kernel counters");
            active.tidy(|a| match (a.capture.owner(), a.on_failure) {
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
        sums.retain(|(_, n)| *n > 0);
        tracing::info!(?sums, "counters");
        report
    }
}

/// `tunnel run` and `tunnel gateway`: until a signal ends it. A second signal ends the draining.
pub fn run(config: Config) -> Result<(), Failure> {
    let runtime = control_runtime()?;
    runtime.block_on(async {
        // Before anything is bound, so that no signal is lost.
        let stop = signal::terminate();
        tokio::pin!(stop);
        let mut running = start(config, None, false)?;
        for address in running.addresses() {
            tracing::info!(%address, "listening");
        }
        let why = tokio::select! {
            why = &mut stop => why.map_err(|e| other(&format!("signals: {e}")))?,
            () = running.watch_captures() => return Ok(()),
        };
        tracing::info!("{why}: draining");
        let trigger = running.trigger.clone();
        let again = signal::terminate();
        let stopped = tokio::task::spawn_blocking(move || running.stop());
        tokio::pin!(again, stopped);
        let ended = tokio::select! {
            ended = &mut stopped => ended,
            _ = &mut again => {
                tracing::info!("a second signal: no longer draining");
                trigger.enter(Phase::Stop);
                stopped.await
            }
        };
        ended.map(drop).map_err(|e| other(&format!("stopping failed: {e}")))
    })
}

/// `tunnel detach`: ends the captures of a configuration, whether or not a daemon runs.
pub fn detach(config: &Config) -> Result<(), Failure> {
    for capture in &config.captures {
        if let Some(dir) = pin_dir(config, capture).filter(|dir| dir.exists()) {
            let _lock = bpf::lock(&config.daemon.bpffs).map_err(bpf_failure)?;
            bpf::unpin(&dir).map_err(bpf_failure)?;
        }
    }
    Ok(())
}

/// The runtime of the thread that waits for signals.
pub fn control_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| other(&format!("the runtime could not start: {e}")))
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

/// Whether this process may set the mark (CAP_NET_ADMIN in the namespace of the socket).
fn may_mark(mark: u32) -> bool {
    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .is_ok_and(|s| s.set_mark(mark).is_ok())
}

fn watch_identity(tls: &Arc<TlsStore>) -> Result<store::Watch, Failure> {
    store::watch(Arc::clone(tls), || tracing::info!("the identity was reloaded"))
        .map_err(|e| other(&format!("the identity's files cannot be watched: {e}")))
}

fn upstream(u: &config::Upstream, mark: tcp::Mark) -> tunnel::Settings {
    tunnel::Settings {
        name: u.name.clone(),
        endpoints: u.endpoints.clone(),
        balance: u.balance,
        check: u.check(),
        headers: u.headers.clone(),
        response_timeout: u.response_timeout,
        pool: pool::Settings {
            max_streams: usize::try_from(u.max_streams.get()).unwrap_or(usize::MAX),
            connect_timeout: u.connect_timeout,
            idle_timeout: u.idle_timeout,
            keepalive_interval: u.keepalive_interval,
            keepalive_timeout: u.keepalive_timeout,
            mark,
        },
    }
}

/// Loads the programs of one capture, with their rules.
fn load(wanted: &config::Capture, config: &Config, fresh: Option<&Fresh>) -> Result<ActiveCapture, Failure> {
    let patterns = |list: &[AddrPattern]| -> Vec<Pattern> {
        list.iter().map(|p| Pattern { net: p.net(), ports: p.ports().ranges().to_vec() }).collect()
    };
    let rules = rules::compile(&patterns(&wanted.include), &patterns(&wanted.exclude)).map_err(|e| {
        Failure::Config(Cause::new(e, "Merge neighbouring ports into ranges, or capture fewer prefixes."))
    })?;
    let (group, name) = group(&wanted.cgroup, fresh)?;
    let pins = pin_dir(config, wanted);
    let spec = Spec {
        mark: config.daemon.mark.get(),
        on_failure: match wanted.on_failure {
            OnFailure::Closed => tunnel_common::capture::ON_FAILURE_CLOSED,
            OnFailure::Open => tunnel_common::capture::ON_FAILURE_OPEN,
        },
        listener_marked: wanted.proxy.is_none(),
        lifetime: pins.clone().map_or(Lifetime::Cgroup, Lifetime::Pinned),
    };
    Ok(ActiveCapture {
        capture: Capture::load(&spec, &rules).map_err(bpf_failure)?,
        group,
        name,
        on_failure: wanted.on_failure,
        pins,
        namespaces: HashMap::new(),
        third_party: wanted.proxy.is_some(),
    })
}

fn group(wanted: &CgroupRef, fresh: Option<&Fresh>) -> Result<(OwnedFd, String), Failure> {
    let missing = |e: &CgroupError| {
        Failure::Other(Cause::new(e, "`tunnel doctor` shows where cgroup2 is mounted on this system."))
    };
    match wanted {
        CgroupRef::Path(path) => {
            cgroup::open_path(path).map(|fd| (fd, path.display().to_string())).map_err(|e| missing(&e))
        }
        CgroupRef::Unit(unit) => Hierarchy::open()
            .and_then(|h| h.of_unit(unit))
            .map(|fd| (fd, unit.clone()))
            .map_err(|e| missing(&e)),
        CgroupRef::Fresh => {
            let fresh = fresh.ok_or_else(|| other("this capture needs a command: use `tunnel exec`"))?;
            let fd = fresh.fd().try_clone_to_owned().map_err(|e| other(&e.to_string()))?;
            Ok((fd, "of the command".to_owned()))
        }
    }
}

/// Where a capture is pinned: a folder named after the group, so that the next daemon finds it.
fn pin_dir(config: &Config, capture: &config::Capture) -> Option<PathBuf> {
    let name = match &capture.cgroup {
        CgroupRef::Path(path) => path.display().to_string(),
        CgroupRef::Unit(unit) => unit.clone(),
        CgroupRef::Fresh => return None,
    };
    // bpffs allows no dots in names; every other byte that is not a letter or digit goes the same way,
    // and the hash keeps names apart that would become one.
    let plain: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let plain = plain.trim_matches('_');
    let tail = &plain[plain.len().saturating_sub(PIN_NAME_MAX)..];
    Some(config.daemon.bpffs.join("tunnel").join(format!("{tail}_{:016x}", fnv1a(name.as_bytes()))))
}

/// The most of a group's name that its folder shows.
const PIN_NAME_MAX: usize = 64;

/// FNV-1a: stable between versions of this program, which the standard library's hashes are not.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

fn lock_pins(bpffs: &Path) -> Result<OwnedFd, Failure> {
    ensure_bpffs(bpffs)?;
    bpf::lock(bpffs).map_err(bpf_failure)
}

/// Mounts a bpffs where the configuration says there is one and there is none.
fn ensure_bpffs(path: &Path) -> Result<(), Failure> {
    /// `BPF_FS_MAGIC` of `linux/magic.h`.
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let is_bpffs = || {
        rustix::fs::statfs(path).is_ok_and(|s| {
            #[expect(clippy::unnecessary_cast, reason = "its width depends on the architecture")]
            let kind = s.f_type as i64;
            kind == BPF_FS_MAGIC
        })
    };
    if is_bpffs() {
        return Ok(());
    }
    let mounted = fs::create_dir_all(path).and_then(|()| {
        rustix::mount::mount("bpf", path, "bpf", rustix::mount::MountFlags::empty(), None)
            .map_err(io::Error::from)
    });
    mounted.map_err(|e| {
        let remedy = format!(
            "Mount it as root, `mount -t bpf bpf {}`, or set daemon.bpffs to where it is.",
            path.display()
        );
        let what = format!("{} is no bpffs, and mounting one failed: {e}", path.display());
        if e.kind() == io::ErrorKind::PermissionDenied {
            Failure::Privilege(Cause::new(what, remedy))
        } else {
            Failure::Other(Cause::new(what, remedy))
        }
    })
}

impl ActiveCapture {
    /// Does something to what is pinned, if anything is, while no other daemon does.
    fn tidy(&self, work: impl FnOnce(&Self) -> Result<(), BpfError>) {
        let Some(bpffs) = self.pins.as_deref().and_then(Path::parent).and_then(Path::parent) else { return };
        if let Err(e) = bpf::lock(bpffs).and_then(|_lock| work(self)) {
            tracing::warn!(cgroup = self.name, "{e}");
        }
    }

    /// Opens listeners in network namespaces of captured processes that have none yet.
    fn scan(&mut self, more: &[mpsc::Sender<CaptureSocket>], mark: u32) {
        if self.third_party {
            return;
        }
        for pid in cgroup::processes(self.group.as_fd()) {
            let Ok(inode) = accept::netns_inode(pid) else { continue };
            if self.namespaces.contains_key(&inode) {
                continue;
            }
            let opened = accept::open_netns(pid)
                .and_then(|ns| accept::listen_in(ns, more.len(), mark))
                .map_err(|e| e.to_string())
                .and_then(|sockets| hand_out(&self.capture, sockets).map_err(|e| e.to_string()));
            self.namespaces.insert(inode, opened.is_ok());
            match opened {
                Ok(per_worker) => {
                    tracing::info!(cgroup = self.name, netns = inode, "capturing in a network namespace");
                    for (tell, socket) in more.iter().zip(per_worker) {
                        for socket in socket {
                            if tell.try_send(socket).is_err() {
                                tracing::error!("a worker takes up no more namespaces");
                            }
                        }
                    }
                }
                Err(e) => tracing::error!(
                    cgroup = self.name,
                    netns = inode,
                    "no listener can be opened there, its connections are refused: {e}"
                ),
            }
        }
    }
}

/// Tells the programs of new listeners; the sockets, for each worker.
fn hand_out(capture: &Capture, sockets: Sockets) -> Result<Vec<Vec<CaptureSocket>>, Failure> {
    let Sockets { netns, listener, per_worker } = sockets;
    capture.set_listener(netns, listener).map_err(bpf_failure)?;
    let wrap = |socket| CaptureSocket { socket, netns, flows: capture.flows() };
    Ok(per_worker.into_iter().map(|own| own.into_iter().map(wrap).collect()).collect())
}

fn proxy_listener(proxy: SocketAddr) -> tunnel_common::capture::Listener {
    let port = Some(proxy.port());
    // A proxy on `[::1]` takes IPv6 only; one on `[::]` takes both.
    match proxy {
        SocketAddr::V4(_) => tunnel_common::capture::Listener::new(port, None),
        SocketAddr::V6(a) if a.ip().is_unspecified() => tunnel_common::capture::Listener::new(port, port),
        SocketAddr::V6(_) => tunnel_common::capture::Listener::new(None, port),
    }
}

fn own_netns_cookie() -> Result<u64, Failure> {
    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .and_then(|s| crate::capture::sys::netns_cookie(s.as_fd()))
        .map_err(|e| {
            Failure::Kernel(Cause::new(format!("SO_NETNS_COOKIE: {e}"), "It takes Linux 5.14 or newer."))
        })
}

fn other(what: &str) -> Failure {
    Failure::Other(Cause::new(what, ""))
}

fn no_identity() -> Failure {
    Failure::Config(Cause::new("a listener needs an identity", "Add an [identity] section."))
}

fn cannot_listen(address: SocketAddr, e: &io::Error) -> Failure {
    let what = format!("cannot listen on {address}: {e}");
    match e.kind() {
        io::ErrorKind::PermissionDenied => Failure::Privilege(Cause::new(
            what,
            "Ports below 1024 take CAP_NET_BIND_SERVICE: run as root, or choose a higher port.",
        )),
        io::ErrorKind::AddrInUse => Failure::Other(Cause::new(
            what,
            format!("Another process listens there: `ss -tlnp sport = :{}` names it.", address.port()),
        )),
        _ => Failure::Other(Cause::new(what, "")),
    }
}

fn capture_listener(e: &io::Error) -> Failure {
    let what = format!("the capture listener could not be opened: {e}");
    match e.kind() {
        io::ErrorKind::PermissionDenied => Failure::Privilege(Cause::new(
            what,
            "Marking sockets (SO_MARK) takes CAP_NET_ADMIN: run as root.",
        )),
        io::ErrorKind::AddrNotAvailable => Failure::Other(Cause::new(
            what,
            "The loopback interface of this network namespace is down: `ip link set lo up`.",
        )),
        _ => Failure::Other(Cause::new(what, "")),
    }
}

/// What the kernel refused is a privilege of ours or a feature of its own.
pub fn bpf_failure(e: BpfError) -> Failure {
    // With what the verifier said.
    tracing::debug!("{e}");
    if e.is_privilege() {
        return Failure::Privilege(Cause::new(
            e.summary(),
            "Loading and attaching BPF programs takes CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN: run as root.",
        ));
    }
    match e {
        BpfError::Program { .. } | BpfError::Load(_) => Failure::Kernel(Cause::new(
            e.summary(),
            "`tunnel doctor` says what this kernel lacks; capture takes Linux 6.1 or newer.",
        )),
        _ => Failure::Other(Cause::new(e.summary(), "")),
    }
}
