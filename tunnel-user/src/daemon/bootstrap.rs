//! What a process takes at its start, and cannot change while it runs.

use std::{num::NonZeroUsize, thread};

use super::listen::{may_mark, require_mark};
use crate::{
    config::Config,
    kernel::{memory, privileges},
    process::{
        exit::{Cause, Failure},
        limits, random,
    },
    transport::tcp,
};

/// See the module.
pub(super) struct Process {
    /// How many workers.
    pub(super) workers: usize,
    /// The limit of descriptors.
    pub(super) nofile: u64,
    /// By what our own sockets are known.
    pub(super) own: tcp::Own,
    /// What this process calls itself in `via`.
    pub(super) pseudonym: String,
    /// Whether records of flows are kept.
    pub(super) keep_records: bool,
}

impl Process {
    /// Sets up this process as a configuration says. Fails where it may not do what that asks for.
    pub(super) fn set_up(config: &Config, keep_records: bool) -> Result<Self, Failure> {
        require_privileges(config)?;
        let bootstrap = &config.daemon.bootstrap;
        // Before a key is read.
        if !bootstrap.core_dumps {
            privileges::forbid_core_dumps()
                .map_err(|e| super::other(&format!("core dumps cannot be prevented: {e}")))?;
        }
        memory::keep_freed();
        tcp::set_keepalive(bootstrap.tcp_keepalive);
        // Unprivileged gateways cannot set it, and have nothing that could capture them.
        let marking = !config.captures.is_empty() || may_mark(bootstrap.mark).is_ok();
        Ok(Self {
            workers: bootstrap.workers.map_or_else(cores, NonZeroUsize::get),
            nofile: limits::raise_nofile(),
            own: tcp::Own::new(marking.then_some(bootstrap.mark)),
            pseudonym: pseudonym(),
            keep_records,
        })
    }
}

/// Fails where a daemon that runs `now` cannot become `next`.
pub(super) fn require_same(now: &Config, next: &Config) -> Result<(), Failure> {
    let fixed = |what: &str| {
        let what = format!("{what} cannot change while the daemon runs");
        let remedy = "`tunnel run --takeover` with the same file starts another daemon in its place, and no connection \
                      is refused.";
        Err(Failure::Config(Cause::new(what, remedy)))
    };
    if let Some(key) = now.daemon.bootstrap.differs_in(&next.daemon.bootstrap) {
        return fixed(&format!("daemon.{key}"));
    }
    if now.admin != next.admin {
        return fixed("[admin]");
    }
    for capture in &next.captures {
        let Some(before) = now.captures.iter().find(|c| c.cgroup.name() == capture.cgroup.name()) else {
            continue;
        };
        if before.proxy != capture.proxy {
            return fixed("the proxy of a capture");
        }
        if before.bypass != capture.bypass {
            return fixed("bypass of a capture");
        }
    }
    require_privileges(next)
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

fn cores() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

/// A token (RFC 9110 section 5.6.2) that no other process has.
fn pseudonym() -> String {
    random::seed();
    format!("tunnel-{:016x}", fastrand::u64(..))
}
