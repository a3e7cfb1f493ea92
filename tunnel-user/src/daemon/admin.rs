//! The admin interface's view of the control loop, and what it has that do.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::json;

use super::{Running, captures::ActiveCapture, other};
use crate::{
    admin::{self, Admin, AdminError, Bound, Command, Overview, view},
    config::{Config, OnFailure},
    kernel::{
        confine::{self, Seen},
        version::Kernel,
    },
    observe::telemetry::LogHandle,
    process::exit::{Cause, Failure},
    relay::PathKind,
    sources::capture::bpf::Owner,
};

/// What the control loop notes for the admin interface.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes {
    pub(super) file: Option<PathBuf>,
    pub(super) started_at: u64,
    pub(super) reloads: view::Reloads,
}

impl Notes {
    /// The configuration was changed, or could not be.
    pub(super) fn reloaded<E: std::fmt::Display>(&mut self, result: Result<(), E>) {
        match result {
            Ok(()) => {
                self.reloads.succeeded += 1;
                self.reloads.last_error = None;
                self.reloads.last_success_at = now();
            }
            Err(e) => {
                self.reloads.failed += 1;
                self.reloads.last_error = Some(e.to_string());
            }
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

/// Binds the admin interface of a daemon with a configuration file; one without has none.
pub(super) fn bind(config: &Config, file: Option<&Path>, replacing: bool) -> Result<Option<Bound>, Failure> {
    let Some(file) = file else { return Ok(None) };
    admin::bind(&config.admin, file, replacing).map_err(|e| {
        let remedy = match &e {
            AdminError::Taken(_) => {
                "Each daemon has a socket of its own: set admin.socket. One that is to be replaced is with --takeover."
            }
            AdminError::Socket { .. } => "Set admin.socket to a path that this user may create, or admin.enabled = false.",
            AdminError::Listen { .. } => "Set admin.listen to another port, or leave it out.",
            AdminError::Thread(_) => "",
        };
        Failure::Other(Cause::new(e.to_string(), remedy))
    })
}

impl Running {
    /// Serves what was bound.
    pub(super) fn serve_admin(&mut self, bound: Bound, file: Option<&Path>) -> Result<Admin, Failure> {
        self.notes.file = file.map(Path::to_owned);
        self.notes.started_at = now();
        self.notes.reloads.last_success_at = now();
        let addresses = bound.addresses();
        let sources = admin::Sources {
            workers: self.workers.asked().to_vec(),
            overview: self.overview(),
            drain: self.workers.trigger().watch(),
            log: LogHandle::of_process(),
        };
        let admin = Admin::start(bound, sources).map_err(|e| other(&e.to_string()))?;
        tracing::info!(?addresses, "admin interface");
        Ok(admin)
    }

    /// Answers what needs no change; what asks for the end comes back.
    pub(super) fn answer(&self, command: Command) -> Option<&'static str> {
        // Whoever has asked may have left.
        let _gone = match command {
            Command::Overview(tell) => tell.send(self.overview()).is_err(),
            Command::ConfigDump(tell) => {
                let file = self.notes.file.as_deref();
                tell.send(json!({ "file": file, "layers": self.layers.describe() })).is_err()
            }
            Command::Explain(question, tell) => tell.send(self.explain(&question)).is_err(),
            // The loop does these itself: they take time.
            Command::Attach(..) | Command::Detach(..) => false,
            Command::Drain(tell) => {
                // Who was told that nobody answers must not find it done later.
                return tell.send(()).is_ok().then_some("an operator asked for it");
            }
        };
        None
    }

    /// What the control loop knows.
    pub(super) fn overview(&self) -> Overview {
        let Self { config, process, notes, .. } = self;
        let listeners = self.listeners.iter().map(|l| view::Listener {
            name: l.wanted.name.clone(),
            address: l.bound.to_string(),
            kind: "connect".to_owned(),
            tls: l.wanted.tls,
        });
        let redirects = config.redirects.iter().flat_map(|r| {
            r.listen.iter().map(|address| view::Listener {
                name: r.name.clone(),
                address: address.to_string(),
                kind: "redirect".to_owned(),
                tls: false,
            })
        });
        let upstreams = config.upstreams.iter().map(|u| view::UpstreamOverview {
            name: u.name.to_string(),
            protocol: if u.in_process.is_some() { "in-process" } else { u.protocol.name() }.to_owned(),
            tls: u.tls,
        });
        let path = self.shared.as_ref().map(|shared| match shared.path {
            PathKind::Copy => "copy",
            PathKind::Pipe => "pipe",
            PathKind::Splice => "splice",
        });
        Overview {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: Kernel::running().to_string(),
            pid: process::id(),
            config_file: notes.file.clone(),
            started_at: notes.started_at,
            workers: process.workers,
            flows_max: self.shared.as_ref().map_or(0, |shared| shared.flows_max) * process.workers,
            relay: path.unwrap_or_default().to_owned(),
            captures: self.captures.iter().map(ActiveCapture::view).collect(),
            listeners: listeners.chain(redirects).collect(),
            identities: self.identities.describe(),
            upstreams: upstreams.collect(),
            reloads: notes.reloads.clone(),
            privileges: self.privileges(),
        }
    }

    fn privileges(&self) -> view::Privileges {
        let thread = |seen: &Seen, landlock| view::ThreadPrivileges {
            capabilities: seen.capabilities.clone(),
            no_new_privs: seen.no_new_privs,
            seccomp: match seen.seccomp {
                0 => "none",
                1 => "strict",
                _ => "filter",
            }
            .to_owned(),
            landlock,
        };
        let process = Seen::of_process().unwrap_or_default();
        let workers = match self.workers.confined() {
            // Nothing is known of one that has ended.
            Some(one) => Seen::of_thread(one.thread).ok().map(|seen| thread(&seen, one.landlock)),
            // One that is not confined is as the process.
            None => Some(thread(&process, None)),
        };
        view::Privileges {
            user: process.user,
            core_dumps: confine::is_dumpable(),
            control: thread(&process, None),
            workers,
        }
    }
}

impl ActiveCapture {
    fn view(&self) -> view::Capture {
        let counters = self.counters().into_iter().chain(self.bypassed());
        view::Capture {
            name: self.wanted.name.clone(),
            group: self.wanted.cgroup.name().to_string(),
            attached: self.pins.is_none() || self.programs.capture.owner() == Owner::Us,
            present: self.group.now().is_some(),
            on_failure: match self.wanted.on_failure {
                OnFailure::Closed => "closed",
                OnFailure::Open => "open",
            }
            .to_owned(),
            namespaces: self.sources().count(),
            processes: self.group.processes().len(),
            left: self.leavers.warnings(),
            counters: counters.map(|(name, n)| (name.to_owned(), n)).collect::<BTreeMap<_, _>>(),
        }
    }
}
