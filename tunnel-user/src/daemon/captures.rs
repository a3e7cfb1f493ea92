//! The captures of a daemon: which group, which namespaces, which pins.
//!
//! Enters: `[[capture]]` sections. Leaves: loaded programs with listeners to send connections to, and the
//! care for both. Invariant: a network namespace of a captured process has listeners or its connections are
//! refused, and one that no captured process is in is not kept alive; programs are replaced without a moment
//! in which nothing is attached. It never attaches by itself.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    task::{Context, Poll},
};

use super::{
    inbox::Inbox,
    leavers::Leavers,
    namespaces::{Namespaces, Place},
    other,
    pins::pin_dir,
    rules,
};
use crate::{
    config::{self, CgroupRef, Config, OnFailure},
    kernel::{
        bpf::BpfError,
        bypass::{Bypass, BypassError, Promotions},
        cgroup::{CgroupError, Fresh},
        group::Group,
        netns, sys,
        version::{Feature, Kernel},
    },
    model::mark::Mark,
    process::exit::{Cause, Failure},
    sources::capture::{
        accept::{self, Origins, Sockets},
        bpf::{self, Capture, Lifetime, Spec},
        ring::Rings,
        routes::Routes,
        rules::Rules,
    },
    worker::{CaptureSocket, More, SourceId},
};

/// One capture of a running daemon.
pub(super) struct ActiveCapture {
    /// By which the workers know its listeners.
    pub(super) source: SourceId,
    pub(super) wanted: config::Capture,
    pub(super) programs: Programs,
    /// Under which the programs find the listeners of this daemon.
    pub(super) generation: u32,
    /// What earlier programs have counted.
    counted: Vec<(&'static str, u64)>,
    pub(super) group: Arc<Group>,
    pub(super) name: String,
    pub(super) leavers: Leavers,
    pub(super) pins: Option<PathBuf>,
    /// Takes busy connections past TCP.
    bypass: Option<Promotions>,
    namespaces: Namespaces,
}

/// The programs of one capture, with their rules.
pub(super) struct Programs {
    pub(super) capture: Capture,
    pub(super) rings: Rings,
    rules: Rules,
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
    let generation = fastrand::u32(1..);
    Ok(ActiveCapture {
        source,
        wanted: wanted.clone(),
        programs: programs(wanted, config, rules::compile(wanted, config)?, &group, generation)?,
        generation,
        counted: Vec::new(),
        group,
        name,
        leavers: Leavers::default(),
        pins: pin_dir(config, wanted),
        bypass,
        namespaces: Namespaces::default(),
    })
}

/// What takes busy connections of a capture past TCP, where it is wanted and can be.
fn bypass(wanted: &config::Capture, group: &Arc<Group>, name: &str) -> Result<Option<Promotions>, Failure> {
    if wanted.bypass == config::Bypass::Off || wanted.proxy.is_some() {
        return Ok(None);
    }
    let known = Kernel::running().allows(Feature::Bypass).map_err(BypassError::Kernel);
    let started = known
        .and_then(|()| Bypass::load())
        .and_then(|bypass| Promotions::start(bypass, Arc::clone(group)).map_err(BypassError::Start));
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
pub(super) fn programs(
    wanted: &config::Capture,
    config: &Config,
    rules: Rules,
    group: &Group,
    generation: u32,
) -> Result<Programs, Failure> {
    if rules.left_to_daemon > 0 {
        tracing::info!(
            capture = wanted.name,
            prefixes = rules.left_to_daemon,
            "routes deny more ports or prefixes than the kernel's rules have room for: the daemon resets those \
             connections, after connect() has succeeded"
        );
    }
    let mut spec = Spec {
        on_failure: match wanted.on_failure {
            OnFailure::Closed => tunnel_common::capture::ON_FAILURE_CLOSED,
            OnFailure::Open => tunnel_common::capture::ON_FAILURE_OPEN,
        },
        generation,
        for_proxy: wanted.proxy.is_some(),
        group: group.by_name(),
        lifetime: pin_dir(config, wanted).map_or(Lifetime::Cgroup, Lifetime::Pinned),
    };
    let mut loaded = Capture::load(&spec, &rules);
    if let Err(e @ (BpfError::Program { .. } | BpfError::Offsets(_))) = &loaded
        && spec.group.take().is_some()
    {
        tracing::warn!(
            group = group.called(),
            error = e.summary(),
            "the group cannot be followed by its name: when it is removed and created again, its connections are in \
             plaintext for up to a second (`tunnel doctor` names what is missing)"
        );
        loaded = Capture::load(&spec, &rules);
    }
    let mut capture = loaded.map_err(bpf_failure)?;
    let rings = Rings::new(&mut capture);
    Ok(Programs { capture, rings, rules })
}

fn group(wanted: &CgroupRef, fresh: Option<&Fresh>) -> Result<(Arc<Group>, String), Failure> {
    let group = match wanted {
        CgroupRef::Path(path) => Group::at(path),
        CgroupRef::Unit(unit) => Group::of_unit(unit),
        CgroupRef::Fresh => {
            let fresh = fresh.ok_or_else(|| other("this capture needs a command: use `tunnel exec`"))?;
            let fd = fresh.fd().try_clone_to_owned().map_err(|e| other(&e.to_string()))?;
            Group::fixed(fd, "of the command")
        }
    };
    let group = group.map_err(|e| {
        let cause = Cause::new(&e, "`tunnel doctor` shows where cgroup2 is mounted on this system.");
        match e {
            CgroupError::NoHierarchy(_) | CgroupError::TooDeep(_) => Failure::Config(cause),
            CgroupError::Mount(_) | CgroupError::Io { .. } => Failure::Other(cause),
        }
    })?;
    let name = group.called().to_owned();
    Ok((Arc::new(group), name))
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
    pub(super) fn scan(&mut self, more: &[Inbox], mark: Option<Mark>) {
        more.iter().for_each(Inbox::flush);
        let processes = self.group.processes();
        self.leavers.look(&self.group, &processes);
        if self.wanted.proxy.is_some() {
            return;
        }
        let missing = self.programs.rings.take_missing();
        for found in self.namespaces.look(&missing, &processes) {
            let workers = more.len();
            let capture =
                (&self.programs.capture, self.source, self.wanted.name.as_deref(), self.bypass.as_ref());
            let entered = self.namespaces.enter(
                found,
                |netns| netns::within(netns, move || accept::listen(workers, mark)),
                |sockets| {
                    let (place, per_worker) = hand_out(capture, sockets).map_err(|e| e.to_string())?;
                    for (worker, sockets) in more.iter().zip(per_worker) {
                        sockets.into_iter().for_each(|socket| worker.tell(More::Listen(socket)));
                    }
                    Ok(place)
                },
            );
            match entered {
                Ok(netns) => tracing::info!(cgroup = self.name, netns, "capturing in a network namespace"),
                Err((netns, error)) => tracing::error!(
                    cgroup = self.name,
                    netns,
                    error,
                    "failed to open listeners in a network namespace; its connections are refused"
                ),
            }
        }
        let capture = &self.programs.capture;
        self.namespaces.follow_routes(capture);
        for (netns, cookie) in self.namespaces.give_up() {
            tracing::info!(netns, "no captured process is there any more");
            if let Err(e) = capture.remove_listener(cookie).and_then(|()| capture.set_sources(cookie, &[])) {
                tracing::warn!("{e}");
            }
            more.iter().for_each(|worker| worker.tell(More::Forget(self.source, cookie)));
        }
    }

    /// Ready when the programs have written something, or the routes of a namespace have changed.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        // Both, so that each wakes up whoever polls.
        let (routes, rings) = (self.namespaces.poll(cx), self.programs.rings.poll(cx));
        if routes.is_ready() || rings.is_ready() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Attaches the programs, and forgets what an earlier daemon left in their maps.
    pub(super) fn attach(&mut self) -> Result<(), Failure> {
        self.put_in_place().map_err(bpf_failure)?;
        if self.wanted.proxy.is_some() {
            return Ok(());
        }
        let cookies: Vec<u64> = self.namespaces.cookies().collect();
        self.programs.capture.keep_listeners(&cookies).map_err(bpf_failure)
    }

    /// Attaches the programs where they decide on the group's connections.
    pub(super) fn put_in_place(&mut self) -> Result<(), BpfError> {
        put_in_place(&mut self.programs.capture, &self.group)
    }

    /// Tells the workers that its listeners are not wanted after all.
    pub(super) fn forget(&self, more: &[Inbox]) {
        for cookie in self.namespaces.cookies() {
            more.iter().for_each(|worker| worker.tell(More::Forget(self.source, cookie)));
        }
    }

    /// Whether the programs are those that a configuration wants, which `rules` were made of.
    pub(super) fn is_attached_as(&self, wanted: &config::Capture, rules: &Rules) -> bool {
        self.programs.rules == *rules && self.wanted.on_failure == wanted.on_failure
    }

    /// Attaches other programs in place of these, and returns these. Where it fails these stay.
    pub(super) fn replace(&mut self, mut next: Programs) -> Result<Programs, Failure> {
        if let Err(e) = put_in_place(&mut next.capture, &self.group) {
            // Some may have been replaced already.
            if let Err(e) = self.put_in_place() {
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

    /// Opens listeners in the daemon's own network namespace, or says where the proxy listens that takes
    /// their place; the sockets, for each worker.
    pub(super) fn listen_here(
        &mut self,
        workers: usize,
        mark: Option<Mark>,
    ) -> Result<Vec<Vec<CaptureSocket>>, Failure> {
        if let Some(proxy) = self.wanted.proxy {
            let listener = proxy_listener(proxy);
            self.programs.capture.set_listener(own_netns_cookie()?, listener).map_err(bpf_failure)?;
            return Ok((0..workers).map(|_| Vec::new()).collect());
        }
        let opened = accept::listen(workers, mark).map_err(|e| capture_listener(&e))?;
        self.programs.capture.add_daemon(&opened).map_err(bpf_failure)?;
        let capture =
            (&self.programs.capture, self.source, self.wanted.name.as_deref(), self.bypass.as_ref());
        let (place, per_worker) = hand_out(capture, opened)?;
        self.namespaces.add_own(place);
        Ok(per_worker)
    }
}

/// What listeners are given to: the programs, by the capture's number and name, with its bypass.
type Receiver<'a> = (&'a Capture, SourceId, Option<&'a str>, Option<&'a Promotions>);

/// Tells the programs of new listeners; the sockets, for each worker.
fn hand_out(
    (capture, source, name, bypass): Receiver<'_>,
    sockets: Sockets,
) -> Result<(Place, Vec<Vec<CaptureSocket>>), Failure> {
    let steering = capture.add_listeners(&sockets).map_err(bpf_failure)?;
    let Sockets { netns, per_worker, routes, .. } = sockets;
    let mut place = Place::new(netns, Routes::new(routes), steering);
    place.follow_routes(capture);
    let name: Option<Arc<str>> = name.map(Arc::from);
    let wrap = |socket| CaptureSocket {
        source,
        name: name.clone(),
        socket,
        origins: Origins::Recorded {
            netns,
            flows: capture.flows(),
            bypass: bypass.map(Promotions::promoter),
        },
    };
    Ok((place, per_worker.into_iter().map(|own| own.into_iter().map(wrap).collect()).collect()))
}

/// Attaches programs to the group, or above it where they know it by name. A group that does not exist has no connections.
fn put_in_place(capture: &mut Capture, group: &Group) -> Result<(), BpfError> {
    let now = group.now();
    let now = now.as_deref();
    match (group.root().filter(|_| capture.is_by_name()), now) {
        (Some(root), now) => capture.attach(root, now),
        (None, Some(dir)) => capture.attach(dir.as_fd(), None),
        (None, None) => Ok(()),
    }
}

fn proxy_listener(proxy: SocketAddr) -> tunnel_common::capture::Listener {
    let port = Some(proxy.port());
    // A proxy on `[::1]` takes IPv6 only; one on `[::]` takes both.
    match proxy {
        SocketAddr::V4(_) => tunnel_common::capture::Listener::proxy(port, None),
        SocketAddr::V6(a) if a.ip().is_unspecified() => tunnel_common::capture::Listener::proxy(port, port),
        SocketAddr::V6(_) => tunnel_common::capture::Listener::proxy(None, port),
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
        BpfError::Blocked { ref by, .. } => {
            let remedy = format!(
                "Have its owner attach it with BPF_F_ALLOW_MULTI, or detach it: `bpftool prog show id {}` names it, `bpftool \
                 cgroup detach` ends it.",
                by.id
            );
            Failure::Kernel(Cause::new(e.summary(), remedy))
        }
        BpfError::Full { .. } => Failure::Kernel(Cause::new(
            e.summary(),
            "Capture a group that holds several of them: each [[capture]] takes one of these places.",
        )),
        BpfError::PinnedMap { .. } => Failure::Other(Cause::new(
            e.summary(),
            "Another version has pinned it. `tunnel detach --config F` with that version removes it, once its daemon has stopped.",
        )),
        BpfError::Program { .. } | BpfError::Load(_) => Failure::Kernel(Cause::new(
            e.summary(),
            "`tunnel doctor` says what this kernel lacks; capture takes Linux 6.1 or newer.",
        )),
        _ => Failure::Other(Cause::new(e.summary(), "")),
    }
}
