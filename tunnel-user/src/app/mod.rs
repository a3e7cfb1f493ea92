//! The composition root: from a configuration to a running daemon, and back.
//!
//! Enters: a [`Config`]. Leaves: workers that carry flows, until they are told to stop. Invariant: it
//! binds, loads and verifies everything before it attaches to a cgroup, and attaches last. Only this file
//! wires rooms together.

mod captures;
mod listen;

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    task::Poll,
    thread,
    time::{Duration, Instant},
};

use socket2::Socket;
use tokio::{sync::mpsc, time::MissedTickBehavior};

use self::{
    captures::{ActiveCapture, bpf_failure, lock_pins, pin_dir},
    listen::{Opener, may_mark, require_mark},
};
use crate::{
    capture::{
        bpf::{self, Owner},
        cgroup::Fresh,
        ring::Wake,
    },
    config::{self, Config, OnFailure},
    drain::{self, Phase, Trigger},
    exit::{Cause, Failure},
    limits,
    listener::accept,
    policy::Policies,
    privileges,
    route::Router,
    signal::Terminate,
    stats::Counters,
    takeover::{self, Listeners, Offer, TakeoverError},
    transport::{
        store::{self, TlsStore},
        tcp,
    },
    tunnel::{self, connect, headers::Trace, pool},
    worker::{self, CaptureSocket, ConnectSocket, More, Report, Shared, Start},
};

/// New namespaces that a worker has not taken up yet.
const MORE_MAX: usize = 64;
/// How often captured groups are searched for network namespaces that appeared.
const NAMESPACE_SCAN: Duration = Duration::from_secs(1);
/// How often flows that nobody accepted are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// How often the place where the next daemon can take over is tried, while the last one has it.
const OFFER_RETRY: Duration = Duration::from_millis(100);
/// Between two PINGs to a tunnel peer, and how long its answer may take.
const LISTENER_KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// A daemon whose workers run.
pub struct Running {
    trigger: Trigger,
    threads: Vec<thread::JoinHandle<io::Result<Report>>>,
    counters: Vec<Arc<Counters>>,
    captures: Vec<ActiveCapture>,
    more: Vec<mpsc::Sender<More>>,
    mark: u32,
    addresses: Vec<SocketAddr>,
    /// The listeners whose addresses are configured, by them, for a daemon that replaces this one.
    listeners: Vec<(SocketAddr, Vec<Socket>)>,
    _watch: Option<store::Watch>,
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

/// Binds, loads, starts the workers, and attaches.
pub fn start(config: Config, options: Options<'_>) -> Result<Running, Failure> {
    let Options { keep_records, taken, .. } = options;
    if !config.captures.is_empty() {
        privileges::require_for_capture()?;
    }
    let nofile = limits::raise_nofile();
    let workers = config.daemon.workers.map_or_else(cores, Into::into);
    let capturing = !config.captures.is_empty();
    let mark = config.daemon.mark.get();
    if !config.redirects.is_empty() {
        require_mark(mark)?;
    }
    // Unprivileged gateways cannot set it, and have nothing that could capture them.
    let socket_mark = (capturing || may_mark(mark).is_ok()).then_some(mark);
    let tls = config.identity.clone().map(TlsStore::load).transpose()?;
    let watch = tls.as_ref().map(watch_identity).transpose()?;

    let mut opener = Opener { workers, mark: socket_mark, taken, kept: Vec::new() };
    let mut addresses = Vec::new();
    let mut listeners: Vec<Vec<ConnectSocket>> = (0..workers).map(|_| Vec::new()).collect();
    for listener in &config.listeners {
        let sockets = opener.open(listener.address)?;
        let bound = sockets.first().and_then(|s| s.local_addr().ok()?.as_socket());
        addresses.push(bound.unwrap_or(listener.address));
        let proving =
            |check| Ok::<_, Failure>(accept::Tls { store: tls.clone().ok_or_else(no_identity)?, check });
        let settings = Arc::new(accept::Settings {
            tls: listener.check().map(proving).transpose()?,
            protocols: listener.protocols.clone(),
            handshake_timeout: listener.handshake_timeout,
            max_streams: listener.max_streams.get(),
            keepalive_interval: LISTENER_KEEPALIVE.0,
            keepalive_timeout: LISTENER_KEEPALIVE.1,
        });
        let name = listener.name.as_deref().map(Arc::from);
        for (i, socket) in sockets.into_iter().enumerate() {
            let dial_timeout = listener.dial_timeout;
            listeners[i % workers].push(ConnectSocket {
                name: name.clone(),
                socket,
                settings: Arc::clone(&settings),
                dial_timeout,
            });
        }
    }

    let upstreams = config.upstreams.iter().map(|u| upstream(u, tls.as_ref(), socket_mark));
    let upstreams = upstreams.collect::<Result<_, _>>()?;

    // From the first look at what is pinned until the last link: a daemon that ends must not tidy in between.
    let pinning = config.captures.iter().any(|c| pin_dir(&config, c).is_some());
    let _lock = pinning.then(|| lock_pins(&config.daemon.bpffs)).transpose()?;
    let mut captures = Vec::new();
    let mut sockets: Vec<Vec<CaptureSocket>> = (0..workers).map(|_| Vec::new()).collect();
    let redirects = opener.open_redirects(&config.redirects, &mut sockets)?;
    for wanted in &config.captures {
        let mut active = captures::load(wanted, &config, options.group)?;
        for (own, socket) in sockets.iter_mut().zip(active.listen_here(wanted, workers, mark)?) {
            own.extend(socket);
        }
        captures.push(active);
    }

    let shared = Arc::new(Shared {
        router: Router::new(config.routes.clone()),
        policies: Policies::new(config.policies.clone(), &[&addresses[..], &redirects].concat()),
        upstreams,
        mark: socket_mark,
        pseudonym: pseudonym(),
        flows_max: limits::flows_per_worker(
            config.daemon.max_flows.get(),
            nofile,
            workers,
            limits::per_flow(&config),
        ),
        relay: config.daemon.relay,
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
        listeners: opener.kept,
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
        active.attach()?;
        tracing::info!(cgroup = active.name, "capturing");
    }
    for address in redirects {
        tracing::info!(%address, "capturing what rules redirect here");
    }
    Ok(running)
}

/// Rings that the kernel programs of all captures write to.
pub struct Rings {
    logs: Vec<aya_log::EbpfLogger<&'static dyn log::Log>>,
    events: Vec<aya::maps::RingBuf<aya::maps::MapData>>,
    wakes: Vec<Wake>,
}

impl Running {
    /// The addresses of the CONNECT listeners, with the ports that they got.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What the kernel programs write to, once.
    pub fn rings(&mut self) -> Rings {
        let logs: Vec<_> = self.captures.iter_mut().filter_map(|a| a.capture.take_log()).collect();
        let events: Vec<_> = self.captures.iter_mut().filter_map(|a| a.capture.take_events().ok()).collect();
        let wakes = logs.iter().map(Wake::new).chain(events.iter().map(Wake::new)).filter_map(|w| {
            // Without it the ticks of `watch_captures` still look.
            w.map_err(|e| tracing::warn!("a ring of the kernel programs cannot be watched: {e}")).ok()
        });
        Rings { wakes: wakes.collect(), logs, events }
    }

    /// Logs what the kernel programs say, and opens listeners in namespaces that appear. Never ends.
    pub async fn watch_captures(&mut self, rings: &mut Rings) {
        let Rings { logs, events, wakes } = rings;
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
            for log in &mut *logs {
                log.flush();
            }
            for ring in &mut *events {
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

    /// Gives the listeners to a daemon that replaces this one.
    async fn give(&mut self, stream: UnixStream) -> Result<(), TakeoverError> {
        // Blocks until the other one runs; the workers go on meanwhile.
        let listeners = std::mem::take(&mut self.listeners);
        let given = tokio::task::spawn_blocking(move || {
            let given = takeover::give(&stream, &listeners);
            (listeners, given)
        });
        let (listeners, given) = given.await.map_err(io::Error::other)?;
        self.listeners = listeners;
        given
    }

    /// Stops taking connections, lets flows finish, and ends. What is pinned stays where the operator
    /// wants captured connections refused rather than let through.
    pub fn stop(mut self) -> Report {
        // A copy would go on listening, with nobody to accept.
        self.listeners.clear();
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

/// `tunnel run` and `tunnel gateway`: until a signal ends it, or another daemon takes over. A second signal
/// ends the draining. `file` names the daemon: the one that replaces it is started with the same.
pub fn run(config: Config, file: Option<&Path>, take_over: bool) -> Result<(), Failure> {
    let runtime = control_runtime()?;
    runtime.block_on(async {
        let mut signals = Terminate::new().map_err(|e| other(&format!("signals: {e}")))?;
        let old = match file {
            Some(file) if take_over => takeover::take(file).map_err(|e| other(&e.to_string()))?,
            _ => None,
        };
        if take_over && old.is_none() {
            tracing::warn!("no daemon runs with this configuration file: nothing to take over");
        }
        let (taken, old) = old.map(takeover::Taken::split).unzip();
        let options = Options { taken: taken.unwrap_or_default(), ..Options::default() };
        let mut running = start(config, options)?;
        for address in running.addresses() {
            tracing::info!(%address, "listening");
        }
        if let Some(old) = old {
            old.done().map_err(|e| other(&format!("the old daemon went away: {e}")))?;
            tracing::info!("took over from the old daemon");
        }
        let mut offer = None;
        let mut rings = running.rings();
        let why = loop {
            let wanted = tokio::select! {
                why = signals.next() => break why,
                () = running.watch_captures(&mut rings) => return Ok(()),
                wanted = requested(file, &mut offer) => wanted,
            };
            let given = match wanted {
                Ok(stream) => {
                    // The new daemon makes the same offer as soon as it runs.
                    offer = None;
                    running.give(stream).await
                }
                Err(e) => Err(e),
            };
            match given {
                Ok(()) => break "another daemon has taken over",
                Err(e) => tracing::warn!("{e}"),
            }
        };
        drop(offer);
        tracing::info!("{why}: draining");
        let trigger = running.trigger.clone();
        let stopped = tokio::task::spawn_blocking(move || running.stop());
        tokio::pin!(stopped);
        let ended = tokio::select! {
            ended = &mut stopped => ended,
            _ = signals.next() => {
                tracing::info!("a second signal: no longer draining");
                trigger.enter(Phase::Stop);
                stopped.await
            }
        };
        ended.map(drop).map_err(|e| other(&format!("stopping failed: {e}")))
    })
}

/// Waits for a daemon that wants to take over.
async fn requested(file: Option<&Path>, offer: &mut Option<Offer>) -> Result<UnixStream, TakeoverError> {
    let Some(file) = file else { return std::future::pending().await };
    loop {
        if let Some(offer) = offer {
            return offer.requested().await;
        }
        match Offer::open(file) {
            Ok(open) => *offer = Some(open),
            // The daemon that this one has replaced has not let go yet.
            Err(_) => tokio::time::sleep(OFFER_RETRY).await,
        }
    }
}

/// `tunnel detach`: ends the captures of a configuration, whether or not a daemon runs.
pub fn detach(config: &Config) -> Result<(), Failure> {
    for capture in &config.captures {
        if let Some(dir) = pin_dir(config, capture).filter(|dir| dir.exists()) {
            let _lock = bpf::lock(&config.daemon.bpffs).map_err(bpf_failure)?;
            bpf::unpin(&dir).map_err(bpf_failure)?;
        }
    }
    for address in config.redirects.iter().flat_map(|r| &r.listen) {
        tracing::warn!(%address, "nothing is attached that redirects connections there: the rules are yours to remove");
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

fn watch_identity(tls: &Arc<TlsStore>) -> Result<store::Watch, Failure> {
    store::watch(Arc::clone(tls), || tracing::info!("the identity was reloaded"))
        .map_err(|e| other(&format!("the identity's files cannot be watched: {e}")))
}

/// A token (RFC 9110 section 5.6.2) that no other process has.
fn pseudonym() -> String {
    format!("tunnel-{:016x}", Trace::default().random())
}

fn upstream(
    u: &config::Upstream,
    tls: Option<&Arc<TlsStore>>,
    mark: tcp::Mark,
) -> Result<tunnel::Next<tunnel::Settings>, Failure> {
    let store = || tls.cloned().ok_or_else(no_identity);
    if let Some(itself) = &u.itself {
        let proof = itself.check.clone().map(|check| Ok::<_, Failure>((store()?, check))).transpose()?;
        let (listener, dial_timeout) = (itself.listener.clone(), itself.dial_timeout);
        let itself = tunnel::Itself { name: u.name.clone(), listener, proof, dial_timeout };
        return Ok(tunnel::Next::Itself(Arc::new(itself)));
    }
    let proving = |check| Ok::<_, Failure>(tunnel::Tls { store: store()?, check });
    Ok(tunnel::Next::Tunnel(tunnel::Settings {
        name: u.name.clone(),
        endpoints: u.endpoints.clone(),
        via: u.via,
        balance: u.balance,
        protocol: u.protocol,
        tls: u.check().map(proving).transpose()?,
        headers: u.headers.clone(),
        response_timeout: u.response_timeout,
        pool: pool::Settings {
            max_streams: usize::try_from(u.max_streams.get()).unwrap_or(usize::MAX),
            connect: connect::Settings { timeout: u.connect_timeout, mark },
            idle_timeout: u.idle_timeout,
            keepalive_interval: u.keepalive_interval,
            keepalive_timeout: u.keepalive_timeout,
        },
    }))
}

fn other(what: &str) -> Failure {
    Failure::Other(Cause::new(what, ""))
}

fn no_identity() -> Failure {
    Failure::Config(Cause::new("TLS needs an identity", "Add an [identity] section."))
}
