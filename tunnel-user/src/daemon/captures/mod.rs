//! The captures of a daemon: which group, which namespaces, which pins.
//!
//! # Invariants
//! - A network namespace of a captured process has listeners or its connections are refused, and one that no captured process
//!   is in is not kept alive.
//! - Programs are replaced without a moment in which nothing is attached.

mod load;

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Arc,
    task::{Context, Poll},
};

pub(super) use self::load::{load, programs};
use super::{
    bootstrap::Process,
    leavers::Leavers,
    namespaces::{Entered, Namespaces},
};
use crate::{
    config,
    kernel::{bpf::BpfError, bypass::Promotions, group::Group, netns},
    model::names::SourceName,
    process::exit::{Cause, Failure},
    sources::capture::{
        accept::{self, Origins, Sockets},
        bpf::{self, Capture},
        ring::Rings,
        routes::Routes,
        rules::Rules,
    },
    worker::{self, CaptureSocket, Listening, Source},
};

/// One capture of a running daemon.
pub(in crate::daemon) struct ActiveCapture {
    pub(in crate::daemon) wanted: config::Capture,
    pub(in crate::daemon) programs: Programs,
    /// Under which the programs find the listeners of this daemon.
    pub(in crate::daemon) generation: u32,
    /// What earlier programs have counted.
    counted: Vec<(&'static str, u64)>,
    pub(in crate::daemon) group: Arc<Group>,
    /// What the log calls the group.
    pub(in crate::daemon) called: String,
    pub(in crate::daemon) leavers: Leavers,
    pub(in crate::daemon) pins: Option<PathBuf>,
    /// Whether it ends with this daemon, although it is closed on failure.
    pub(in crate::daemon) released: bool,
    /// Takes busy connections past TCP.
    bypass: Option<Promotions>,
    namespaces: Namespaces,
}

/// The programs of one capture, with their rules.
pub(in crate::daemon) struct Programs {
    pub(in crate::daemon) capture: Capture,
    pub(in crate::daemon) rings: Rings,
    rules: Rules,
}

impl Programs {
    /// Their rules.
    pub(in crate::daemon) fn rules(&self) -> &Rules {
        &self.rules
    }
}

/// Captures that are loaded and not yet sure to stay. Dropped, they leave everything as it was before; the caller keeps other
/// daemons away.
#[derive(Default)]
pub(in crate::daemon) struct Loaded(pub(in crate::daemon) Vec<ActiveCapture>);

impl From<ActiveCapture> for Loaded {
    fn from(capture: ActiveCapture) -> Self {
        Self(vec![capture])
    }
}

impl Loaded {
    /// They stay.
    pub(in crate::daemon) fn keep(mut self) -> Vec<ActiveCapture> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.0.iter().for_each(ActiveCapture::take_back);
    }
}

impl ActiveCapture {
    /// Does something to what is pinned, if anything is, while no other daemon does.
    pub(in crate::daemon) fn tidy(&self, work: impl FnOnce(&Self) -> Result<(), BpfError>) {
        let Some(bpffs) = self.pins.as_deref().and_then(Path::parent).and_then(Path::parent) else { return };
        if let Err(e) = bpf::lock(bpffs).and_then(|_lock| work(self)) {
            tracing::warn!(cgroup = self.called, "{e}");
        }
    }

    /// Its stable name.
    pub(in crate::daemon) fn name(&self) -> SourceName {
        self.wanted.source()
    }

    /// What workers accept from: its listeners in each network namespace.
    pub(in crate::daemon) fn sources(&self) -> impl Iterator<Item = Source> {
        let called: Option<Arc<str>> = self.wanted.name.as_deref().map(Arc::from);
        let (name, identity) = (self.name(), self.wanted.identity.clone());
        self.namespaces.entered().map(move |entered| Source {
            name: name.clone(),
            netns: Some(entered.cookie()),
            called: called.clone(),
            identity: identity.clone(),
            sockets: entered.sockets(),
        })
    }

    /// Opens listeners in network namespaces of captured processes that have none yet, and gives up those in namespaces that
    /// no captured process is in any more. `true`: [`sources`](Self::sources) are others than before.
    pub(in crate::daemon) fn scan(&mut self, process: &Process) -> bool {
        let processes = self.group.processes();
        self.leavers.look(&self.group, &processes);
        if self.wanted.proxy.is_some() {
            return false;
        }
        let mut changed = false;
        let missing = self.programs.rings.take_missing();
        let capture = &self.programs.capture;
        for found in self.namespaces.look(&missing, &processes) {
            let (workers, mark) = (process.workers, process.own.mark());
            let entered = self.namespaces.enter(
                found,
                |netns| netns::within(netns, move || accept::listen(workers, mark)),
                |sockets| hand_out(capture, self.bypass.as_ref(), sockets).map_err(|e| e.to_string()),
            );
            match entered {
                Ok(netns) => {
                    changed = true;
                    tracing::info!(cgroup = self.called, netns, "capturing in a network namespace");
                }
                Err((netns, error)) => tracing::error!(
                    cgroup = self.called,
                    netns,
                    error,
                    "failed to open listeners in a network namespace; its connections are refused"
                ),
            }
        }
        self.namespaces.follow_routes(capture);
        for (netns, cookie) in self.namespaces.give_up() {
            changed = true;
            tracing::info!(netns, "no captured process is there any more");
            if let Err(e) = capture.remove_listener(cookie).and_then(|()| capture.set_sources(cookie, &[])) {
                tracing::warn!("{e}");
            }
        }
        changed
    }

    /// Ready when the programs have written something, or the routes of a namespace have changed.
    pub(in crate::daemon) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        // Both, so that each wakes up whoever polls.
        let (routes, rings) = (self.namespaces.poll(cx), self.programs.rings.poll(cx));
        if routes.is_ready() || rings.is_ready() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Attaches the programs, and forgets what an earlier daemon left in their maps.
    pub(in crate::daemon) fn attach(&mut self) -> Result<(), Failure> {
        self.put_in_place().map_err(bpf_failure)?;
        if self.wanted.proxy.is_some() {
            return Ok(());
        }
        let cookies: Vec<u64> = self.namespaces.cookies().collect();
        self.programs.capture.keep_listeners(&cookies).map_err(bpf_failure)
    }

    /// Attaches the programs where they decide on the group's connections.
    pub(in crate::daemon) fn put_in_place(&mut self) -> Result<(), BpfError> {
        put_in_place(&mut self.programs.capture, &self.group)
    }

    /// Whether the programs are those that a configuration wants, which `rules` were made of.
    pub(in crate::daemon) fn is_attached_as(&self, wanted: &config::Capture, rules: &Rules) -> bool {
        self.programs.rules == *rules && self.wanted.on_failure == wanted.on_failure
    }

    /// Attaches other programs in place of these, and returns these. Where it fails these stay.
    pub(in crate::daemon) fn replace(&mut self, mut next: Programs) -> Result<Programs, Failure> {
        if let Err(e) = put_in_place(&mut next.capture, &self.group) {
            // Some may have been replaced already.
            if let Err(e) = self.put_in_place() {
                tracing::error!(
                    cgroup = self.called,
                    "the programs that were attached are not all back: {e}"
                );
            }
            return Err(bpf_failure(e));
        }
        Ok(std::mem::replace(&mut self.programs, next))
    }

    /// Keeps what programs have counted that were replaced.
    pub(in crate::daemon) fn count(&mut self, old: &Programs) {
        self.counted = self.sums(old);
    }

    /// What all its programs have counted.
    pub(in crate::daemon) fn counters(&self) -> Vec<(&'static str, u64)> {
        self.sums(&self.programs)
    }

    /// What was done to take connections past TCP.
    pub(in crate::daemon) fn bypassed(&self) -> Vec<(&'static str, u64)> {
        self.bypass.as_ref().map(Promotions::counters).unwrap_or_default()
    }

    fn sums(&self, of: &Programs) -> Vec<(&'static str, u64)> {
        let mut all = of.capture.counters();
        for ((_, n), (_, before)) in all.iter_mut().zip(&self.counted) {
            *n += before;
        }
        all
    }

    /// Removes what another version of this program has pinned and this one does not use. The caller keeps other daemons away.
    pub(in crate::daemon) fn forget_other_versions(&self) {
        if let Err(e) = self.programs.capture.forget_other_versions() {
            tracing::warn!(cgroup = self.called, "{e}");
        }
    }

    /// Puts back what was there before it was loaded. The caller keeps other daemons away.
    pub(in crate::daemon) fn take_back(&self) {
        if let Err(e) = self.programs.capture.roll_back() {
            tracing::error!(cgroup = self.called, "not everything is as it was before: {e}");
        }
    }

    /// Ends the capture: nothing is attached or pinned any more. The caller keeps other daemons away.
    pub(in crate::daemon) fn detach(&self) {
        if let Err(e) = self.pins.as_deref().map_or(Ok(()), bpf::unpin) {
            tracing::error!(cgroup = self.called, "still captured, and refused: {e}");
        }
    }
}

/// Tells the programs of new listeners.
fn hand_out(capture: &Capture, bypass: Option<&Promotions>, sockets: Sockets) -> Result<Entered, Failure> {
    let steering = capture.add_listeners(&sockets).map_err(bpf_failure)?;
    let Sockets { netns, per_worker, routes, .. } = sockets;
    let wrap = |socket| {
        let (flows, bypass) = (capture.flows(), bypass.map(Promotions::promoter));
        Listening::Captured(CaptureSocket { socket, origins: Origins::Recorded { netns, flows, bypass } })
    };
    let sockets = worker::Sockets::new(per_worker.into_iter().map(|own| own.into_iter().map(wrap).collect()));
    let mut entered = Entered::new(netns, sockets, Routes::new(routes), steering);
    entered.follow_routes(capture);
    Ok(entered)
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

/// What the kernel refused is a privilege of ours or a feature of its own.
pub(in crate::daemon) fn bpf_failure(e: BpfError) -> Failure {
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
