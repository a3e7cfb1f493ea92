//! The ways to carry a flow, and a stage on which each is tried.
//!
//! Enters: a mode. Leaves: two hosts, a group of the first that a daemon captures in this mode, programs in it, and the
//! daemon's own word that it was this way. Invariant: what is asked of one mode is asked of all:
//! [`each_mode`](crate::each_mode) makes the tests.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    Gateway, Process, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    pki::GATEWAY_ID,
    world::NET4,
};

/// A way to carry flows.
#[derive(Debug)]
pub struct Mode {
    /// Keys of `[daemon]`.
    pub daemon: &'static str,
    /// Keys of `[[capture]]`.
    pub capture: &'static str,
    /// Where flows go.
    pub sink: Sink,
    /// A counter of the daemon's that tells that it was this way.
    pub proof: Option<&'static str>,
    /// Exchanges before anything is looked at, twice: what treats flows by what they have done so far has to have seen
    /// enough of them.
    pub chat: u32,
    /// Milliseconds in between, in which nothing is on its way.
    pub rest: u32,
}

/// Where flows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Dialled by the daemon: two sockets of ours.
    Direct,
    /// HTTP/2 over mutual TLS, and dialled by the gateway.
    Gateway,
}

/// What a mode is, but for what it says itself.
pub const COPY: Mode =
    Mode { daemon: "relay = \"copy\"", capture: "", sink: Sink::Direct, proof: None, chat: 25, rest: 10 };

/// Makes a test of each function for each mode: `each_mode! { NAME = FUNCTION; … }`, where a function takes a [`Mode`]. A
/// mode is a line here, and nowhere else.
#[macro_export]
macro_rules! each_mode {
    ($($tests:tt)*) => {
        $crate::mode!(copied, $crate::modes::COPY, $($tests)*);
        $crate::mode!(
            piped,
            $crate::modes::Mode { daemon: "relay = \"pipe\"", proof: Some("bytes_piped"), ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            spliced,
            $crate::modes::Mode { daemon: "relay = \"splice\"", proof: Some("flows_spliced"), ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            past_tcp,
            $crate::modes::Mode { capture: "bypass = \"auto\"", ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            through_a_gateway,
            $crate::modes::Mode { daemon: "", sink: $crate::modes::Sink::Gateway, ..$crate::modes::COPY },
            $($tests)*
        );
    };
}

/// The tests of one mode.
#[macro_export]
macro_rules! mode {
    ($mode:ident, $is:expr, $($name:ident = $test:expr;)*) => {
        mod $mode {
            use super::*;

            $(#[test]
            fn $name() -> anyhow::Result<()> {
                ($test)(&$is)
            })*
        }
    };
}

/// A node that has a route to the targets, and a group on it that a daemon may capture.
#[derive(Debug)]
pub struct Stage {
    /// Where the daemon pins.
    pub bpffs: BpfFs,
    /// The group.
    pub cgroup: Cgroup,
    /// Both hosts.
    pub world: World,
}

impl Stage {
    /// Makes them.
    pub fn new() -> Result<Self> {
        let world = World::new()?;
        world.node().ip(&format!("route add default via {NET4}"))?;
        let (bpffs, cgroup) = (BpfFs::new(&world)?, Cgroup::new()?);
        Ok(Self { bpffs, cgroup, world })
    }

    /// A gateway, if the mode takes one.
    pub fn gateway(&self, mode: &Mode) -> Result<Option<Gateway<'_>>> {
        match mode.sink {
            Sink::Direct => Ok(None),
            Sink::Gateway => self.world.gateway().start().map(Some),
        }
    }

    /// Carries what the group connects to, in this mode.
    pub fn daemon(&self, mode: &Mode, gateway: Option<&Gateway<'_>>) -> Result<Daemon> {
        let sink = gateway.map_or_else(
            || "[[route]]\nto = \"direct\"\n".to_owned(),
            |g| self.world.pki().named("node").toml() + &through(g.addr(), GATEWAY_ID),
        );
        let (bpffs, group) = (self.bpffs.toml(), self.cgroup.path().display());
        let Mode { daemon, capture, .. } = mode;
        let config =
            format!("[daemon]\n{bpffs}{daemon}\n[[capture]]\ncgroup = \"{group}\"\n{capture}\n{sink}");
        Daemon::start(&self.world, self.world.node(), &config)
    }

    /// A program on the node, in the group if it is to be captured.
    pub fn program(&self, program: PathBuf, captured: bool) -> Result<Command> {
        let mut command = self.world.node().command(program);
        if captured {
            self.cgroup.adopt(&mut command)?;
        }
        Ok(command)
    }

    /// Ends a daemon, and has it prove that it was in this mode.
    pub fn end(&self, daemon: &mut Daemon, mode: &Mode) -> Result<()> {
        daemon.process().stop()?;
        let Some(counter) = mode.proof else { return Ok(()) };
        let log = daemon.log();
        let count = log.split_once(&format!("(\"{counter}\", ")).and_then(|(_, rest)| rest.split_once(')'));
        let count: u64 = count.and_then(|(count, _)| count.parse().ok()).unwrap_or(0);
        ensure!(count > 0, "it says that it was another way: {counter} is 0\n{log}");
        Ok(())
    }

    /// Waits for a process that is to have ended, and fails with what it is doing when it cannot even be killed.
    pub fn gone(&self, process: &mut Process) -> Result<i32> {
        let status = process.wait(crate::PATIENCE).with_context(|| {
            let stack = std::fs::read_to_string(format!("/proc/{}/stack", process.id())).unwrap_or_default();
            format!("it does not go: {stack}")
        })?;
        Ok(crate::process::code(status))
    }
}
