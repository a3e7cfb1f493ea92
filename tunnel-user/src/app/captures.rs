//! The captures of a daemon: which group, which namespaces, which pins.
//!
//! Enters: `[[capture]]` sections. Leaves: loaded programs with listeners to send connections to, and the
//! care for both. Invariant: a network namespace of a captured process has listeners or its connections are
//! refused, and one that no captured process is in is not kept alive; programs are replaced without a moment
//! in which nothing is attached. It never attaches by itself.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{inbox::Inbox, other, pins::pin_dir, rules};
use crate::{
    capture::{
        accept::{self, Origins, Sockets},
        bpf::{self, BpfError, Capture, Lifetime, Spec},
        bypass::{Bypass, BypassError, Promotions},
        cgroup::{self, CgroupError, Fresh, Hierarchy},
        ring::Rings,
        rules::Rules,
        sys,
    },
    config::{self, CgroupRef, Config, OnFailure},
    exit::{Cause, Failure},
    kernels::{Feature, Kernel},
    worker::{CaptureSocket, More, SourceId},
};

/// A namespace in which no listener could be opened is tried again after this.
const RETRY: Duration = Duration::from_secs(5);
/// A namespace that no captured process is in is given up after this: a container that restarts finds its
/// listeners still there.
const LINGER: Duration = Duration::from_secs(30);

/// One capture of a running daemon.
pub(super) struct ActiveCapture {
    /// By which the workers know its listeners.
    pub(super) source: SourceId,
    pub(super) wanted: config::Capture,
    pub(super) programs: Programs,
    /// What earlier programs have counted.
    counted: Vec<(&'static str, u64)>,
    pub(super) group: OwnedFd,
    pub(super) name: String,
    pub(super) pins: Option<PathBuf>,
    /// Takes busy connections past TCP.
    bypass: Option<Promotions>,
    /// By inode number: unique among namespaces that are alive, and ours are, by their listeners.
    namespaces: HashMap<u64, Namespace>,
}

/// The programs of one capture, with their rules.
pub(super) struct Programs {
    pub(super) capture: Capture,
    pub(super) rings: Rings,
    rules: Rules,
}

/// What is known of one network namespace.
enum Namespace {
    /// The daemon's own.
    Own(Place),
    /// It has listeners; a captured process was last seen in it then.
    Captured { place: Place, seen: Instant },
    /// No listener could be opened then.
    Failed { at: Instant },
}

/// A network namespace with listeners.
struct Place {
    cookie: u64,
    listener: tunnel_common::capture::Listener,
    /// When it was last found to be without IPv6.
    without_v6: Instant,
}

impl Place {
    fn of(sockets: &Sockets) -> Self {
        Self { cookie: sockets.netns, listener: sockets.listener, without_v6: Instant::now() }
    }

    /// Whether it is time to look for an IPv6 that came later.
    fn lacks_v6(&self, now: Instant) -> bool {
        self.listener.port(false).is_none() && now.duration_since(self.without_v6) >= RETRY
    }
}

/// Captures that are loaded and not yet sure to stay. Dropped, they leave everything as it was before.
#[derive(Default)]
pub(super) struct Loaded(pub(super) Vec<ActiveCapture>);

impl Loaded {
    pub(super) fn keep(mut self) -> Vec<ActiveCapture> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.0.iter().for_each(ActiveCapture::take_back);
    }
}

/// Loads the programs of one capture, in a runtime.
pub(super) fn load(
    source: SourceId,
    wanted: &config::Capture,
    config: &Config,
    fresh: Option<&Fresh>,
) -> Result<ActiveCapture, Failure> {
    let (group, name) = group(&wanted.cgroup, fresh)?;
    let bypass = bypass(wanted, &group, &name)?;
    Ok(ActiveCapture {
        source,
        wanted: wanted.clone(),
        programs: programs(wanted, config, rules::compile(wanted, config)?)?,
        counted: Vec::new(),
        group,
        name,
        pins: pin_dir(config, wanted),
        bypass,
        namespaces: HashMap::new(),
    })
}

/// What takes busy connections of a capture past TCP, where it is wanted and can be.
fn bypass(wanted: &config::Capture, group: &OwnedFd, name: &str) -> Result<Option<Promotions>, Failure> {
    if wanted.bypass == config::Bypass::Off || wanted.proxy.is_some() {
        return Ok(None);
    }
    let known = Kernel::running().allows(Feature::Bypass).map_err(BypassError::Kernel);
    let started = known.and_then(|()| Bypass::load()).and_then(|bypass| {
        let group = group.try_clone().map_err(BypassError::Start)?;
        Promotions::start(bypass, group).map_err(BypassError::Start)
    });
    match started {
        Ok(promotions) => Ok(Some(promotions)),
        Err(e) if wanted.bypass == config::Bypass::Auto => {
            tracing::warn!(cgroup = name, "busy connections stay with TCP: {e}");
            Ok(None)
        }
        Err(e) if e.is_privilege() => Err(Failure::Privilege(Cause::new(
            e,
            "bypass = \"on\" takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN: run as root, or set it to \"auto\".",
        ))),
        Err(e) => Err(Failure::Kernel(Cause::new(
            e,
            "`tunnel doctor` says what this kernel lacks; with bypass = \"auto\" connections stay with TCP there.",
        ))),
    }
}

/// Loads programs with the rules of a capture; where those of an earlier daemon, or of an earlier configuration, are
/// attached, they find the flows of these.
pub(super) fn programs(wanted: &config::Capture, config: &Config, rules: Rules) -> Result<Programs, Failure> {
    if rules.left_to_daemon > 0 {
        tracing::info!(
            capture = wanted.name,
            prefixes = rules.left_to_daemon,
            "routes deny more ports or prefixes than the kernel's rules have room for: the daemon resets those \
             connections, after connect() has succeeded"
        );
    }
    let spec = Spec {
        mark: config.daemon.mark.get(),
        on_failure: match wanted.on_failure {
            OnFailure::Closed => tunnel_common::capture::ON_FAILURE_CLOSED,
            OnFailure::Open => tunnel_common::capture::ON_FAILURE_OPEN,
        },
        listener_marked: wanted.proxy.is_none(),
        lifetime: pin_dir(config, wanted).map_or(Lifetime::Cgroup, Lifetime::Pinned),
    };
    let mut capture = Capture::load(&spec, &rules).map_err(bpf_failure)?;
    let rings = Rings::new(&mut capture);
    Ok(Programs { capture, rings, rules })
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

impl ActiveCapture {
    /// Does something to what is pinned, if anything is, while no other daemon does.
    pub(super) fn tidy(&self, work: impl FnOnce(&Self) -> Result<(), BpfError>) {
        let Some(bpffs) = self.pins.as_deref().and_then(Path::parent).and_then(Path::parent) else { return };
        if let Err(e) = bpf::lock(bpffs).and_then(|_lock| work(self)) {
            tracing::warn!(cgroup = self.name, "{e}");
        }
    }

    /// Opens listeners in network namespaces of captured processes that have none yet, and gives up those in
    /// namespaces that no captured process is in any more.
    pub(super) fn scan(&mut self, more: &[Inbox], mark: u32) {
        more.iter().for_each(Inbox::flush);
        if self.wanted.proxy.is_some() {
            return;
        }
        let now = Instant::now();
        let own = self.namespaces.values_mut().find_map(|n| match n {
            Namespace::Own(place) => Some(place),
            _ => None,
        });
        if let Some(place) = own.filter(|place| place.lacks_v6(now)) {
            place.without_v6 = now;
            let cookie = place.cookie;
            self.add_v6(std::process::id(), cookie, more, mark);
        }
        for pid in cgroup::processes(self.group.as_fd()) {
            // It may have ended just now.
            let Ok(inode) = accept::netns_inode(pid) else { continue };
            match self.namespaces.get_mut(&inode) {
                Some(Namespace::Own(_)) => continue,
                Some(Namespace::Captured { place, seen }) => {
                    *seen = now;
                    if place.lacks_v6(now) {
                        place.without_v6 = now;
                        let cookie = place.cookie;
                        self.add_v6(pid, cookie, more, mark);
                    }
                    continue;
                }
                Some(Namespace::Failed { at }) if now.duration_since(*at) < RETRY => continue,
                Some(Namespace::Failed { .. }) | None => {}
            }
            let namespace = match self.enter(pid, more, mark) {
                Ok(place) => {
                    tracing::info!(cgroup = self.name, netns = inode, "capturing in a network namespace");
                    Namespace::Captured { place, seen: now }
                }
                Err(e) => {
                    tracing::error!(
                        cgroup = self.name,
                        netns = inode,
                        "no listener can be opened there, its connections are refused: {e}"
                    );
                    Namespace::Failed { at: now }
                }
            };
            self.namespaces.insert(inode, namespace);
        }
        let (capture, source) = (&self.programs.capture, self.source);
        self.namespaces.retain(|inode, namespace| match namespace {
            Namespace::Own(_) => true,
            Namespace::Failed { at } => now.duration_since(*at) < LINGER,
            Namespace::Captured { seen, .. } if now.duration_since(*seen) < LINGER => true,
            Namespace::Captured { place, .. } => {
                let cookie = place.cookie;
                tracing::info!(netns = inode, "no captured process is there any more");
                if let Err(e) = capture.remove_listener(cookie) {
                    tracing::warn!("{e}");
                }
                more.iter().for_each(|worker| worker.tell(More::Forget(source, cookie)));
                false
            }
        });
    }

    /// Attaches the programs, and forgets what an earlier daemon left in their maps.
    pub(super) fn attach(&mut self) -> Result<(), Failure> {
        self.programs.capture.attach(self.group.as_fd()).map_err(bpf_failure)?;
        if self.wanted.proxy.is_some() {
            return Ok(());
        }
        let cookies: Vec<u64> = self.cookies().collect();
        self.programs.capture.keep_listeners(&cookies).map_err(bpf_failure)
    }

    /// Of the namespaces that have listeners.
    fn cookies(&self) -> impl Iterator<Item = u64> {
        self.namespaces.values().filter_map(|n| match n {
            Namespace::Own(place) | Namespace::Captured { place, .. } => Some(place.cookie),
            Namespace::Failed { .. } => None,
        })
    }

    /// Tells the workers that its listeners are not wanted after all.
    pub(super) fn forget(&self, more: &[Inbox]) {
        for cookie in self.cookies() {
            more.iter().for_each(|worker| worker.tell(More::Forget(self.source, cookie)));
        }
    }

    /// Whether the programs are those that a configuration wants, which `rules` were made of.
    pub(super) fn is_attached_as(&self, wanted: &config::Capture, rules: &Rules) -> bool {
        self.programs.rules == *rules && self.wanted.on_failure == wanted.on_failure
    }

    /// Attaches other programs in place of these, and returns these. Where it fails these stay.
    pub(super) fn replace(&mut self, mut next: Programs) -> Result<Programs, Failure> {
        if let Err(e) = next.capture.attach(self.group.as_fd()) {
            // Some may have been replaced already.
            if let Err(e) = self.programs.capture.attach(self.group.as_fd()) {
                tracing::error!(cgroup = self.name, "the programs that were attached are not all back: {e}");
            }
            return Err(bpf_failure(e));
        }
        Ok(std::mem::replace(&mut self.programs, next))
    }

    /// Keeps what programs have counted that were replaced.
    pub(super) fn count(&mut self, old: &Programs) {
        self.counted = self.sums(old);
    }

    /// What all its programs have counted.
    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        self.sums(&self.programs)
    }

    /// What was done to take connections past TCP.
    pub(super) fn bypassed(&self) -> Vec<(&'static str, u64)> {
        self.bypass.as_ref().map(Promotions::counters).unwrap_or_default()
    }

    fn sums(&self, of: &Programs) -> Vec<(&'static str, u64)> {
        let mut all = of.capture.counters();
        for ((_, n), (_, before)) in all.iter_mut().zip(&self.counted) {
            *n += before;
        }
        all
    }

    /// Puts back what was there before it was loaded. The caller keeps other daemons away.
    pub(super) fn take_back(&self) {
        if let Err(e) = self.programs.capture.roll_back() {
            tracing::error!(cgroup = self.name, "not everything is as it was before: {e}");
        }
    }

    /// Ends the capture: nothing is attached or pinned any more. The caller keeps other daemons away.
    pub(super) fn detach(&self) {
        if let Err(e) = self.pins.as_deref().map_or(Ok(()), bpf::unpin) {
            tracing::error!(cgroup = self.name, "still captured, and refused: {e}");
        }
    }

    /// Opens listeners in the network namespace of process `pid`.
    fn enter(&self, pid: u32, more: &[Inbox], mark: u32) -> Result<Place, String> {
        let sockets = accept::open_netns(pid)
            .and_then(|ns| accept::listen_in(ns, more.len(), mark))
            .map_err(|e| e.to_string())?;
        let place = Place::of(&sockets);
        self.send_out(sockets, more)?;
        Ok(place)
    }

    /// Opens listeners for IPv6 where that has come since.
    fn add_v6(&mut self, pid: u32, cookie: u64, more: &[Inbox], mark: u32) {
        if !accept::has_ipv6(pid) {
            return;
        }
        let place = self.namespaces.values_mut().find_map(|n| match n {
            Namespace::Own(place) | Namespace::Captured { place, .. } if place.cookie == cookie => {
                Some(place)
            }
            _ => None,
        });
        let Some(v4) = place.map(|place| place.listener.port(true)) else { return };
        let opened = accept::open_netns(pid)
            .and_then(|ns| accept::listen_v6_in(ns, v4, more.len(), mark))
            .map_err(|e| e.to_string())
            .and_then(|sockets| {
                let listener = sockets.listener;
                self.send_out(sockets, more).map(|()| listener)
            });
        match opened {
            Ok(listener) => {
                tracing::info!(cgroup = self.name, "capturing IPv6 too, which came later");
                for n in self.namespaces.values_mut() {
                    if let Namespace::Own(place) | Namespace::Captured { place, .. } = n
                        && place.cookie == cookie
                    {
                        place.listener = listener;
                    }
                }
            }
            Err(e) => tracing::warn!(cgroup = self.name, "IPv6 came, and no listener can be opened: {e}"),
        }
    }

    fn send_out(&self, sockets: Sockets, more: &[Inbox]) -> Result<(), String> {
        let per_worker = self.hand_out(sockets).map_err(|e| e.to_string())?;
        for (worker, sockets) in more.iter().zip(per_worker) {
            sockets.into_iter().for_each(|socket| worker.tell(More::Listen(socket)));
        }
        Ok(())
    }

    /// Opens listeners in the daemon's own network namespace, or says where the proxy listens that takes
    /// their place; the sockets, for each worker.
    pub(super) fn listen_here(
        &mut self,
        workers: usize,
        mark: u32,
    ) -> Result<Vec<Vec<CaptureSocket>>, Failure> {
        if let Some(proxy) = self.wanted.proxy {
            let listener = proxy_listener(proxy);
            self.programs.capture.set_listener(own_netns_cookie()?, listener).map_err(bpf_failure)?;
            return Ok((0..workers).map(|_| Vec::new()).collect());
        }
        let opened = accept::listen(workers, mark).map_err(|e| capture_listener(&e))?;
        let own = Namespace::Own(Place::of(&opened));
        self.namespaces.insert(accept::netns_inode(std::process::id()).unwrap_or(0), own);
        self.hand_out(opened)
    }

    /// Tells the programs of new listeners; the sockets, for each worker.
    fn hand_out(&self, sockets: Sockets) -> Result<Vec<Vec<CaptureSocket>>, Failure> {
        let Sockets { netns, listener, per_worker } = sockets;
        let capture = &self.programs.capture;
        capture.set_listener(netns, listener).map_err(bpf_failure)?;
        let name: Option<Arc<str>> = self.wanted.name.as_deref().map(Arc::from);
        let wrap = |socket| CaptureSocket {
            source: self.source,
            name: name.clone(),
            socket,
            origins: Origins::Recorded {
                netns,
                flows: capture.flows(),
                bypass: self.bypass.as_ref().map(Promotions::promoter),
            },
        };
        Ok(per_worker.into_iter().map(|own| own.into_iter().map(wrap).collect()).collect())
    }
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
        .and_then(|s| sys::netns_cookie(s.as_fd()))
        .map_err(|e| {
            Failure::Kernel(Cause::new(format!("SO_NETNS_COOKIE: {e}"), "It takes Linux 5.14 or newer."))
        })
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
pub(super) fn bpf_failure(e: BpfError) -> Failure {
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
