//! A node with a cgroup of its own for applications, and a daemon that captures it.
//!
//! # Invariants
//! - The cgroup and the pins belong to the test, and are removed with it.

use std::net::SocketAddr;

use anyhow::Result;

use crate::{
    Gateway, PATIENCE, Process, Target, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    dialogue::ask,
    netns::NetNs,
    pki::GATEWAY_ID,
    programs,
};

/// A node whose group is captured by a daemon.
pub struct Node<'w> {
    world: &'w World,
    /// The group.
    pub cgroup: Cgroup,
    /// Where the daemon pins.
    pub bpffs: BpfFs,
}

impl<'w> Node<'w> {
    /// Makes the group.
    pub fn new(world: &'w World) -> Result<Self> {
        Ok(Self { world, cgroup: Cgroup::new()?, bpffs: BpfFs::new(world)? })
    }

    /// A configuration that sends everything through a gateway; `daemon` and `capture` are more keys of those sections.
    pub fn config(&self, gateway: &Gateway<'_>, daemon: &str, capture: &str) -> String {
        format!(
            "[daemon]\n{}{daemon}\n{}[[capture]]\ncgroup = \"{}\"\n{capture}\n{}",
            self.bpffs.toml(),
            self.world.pki().named("node").toml(),
            self.cgroup.path().display(),
            through(gateway.addr(), GATEWAY_ID),
        )
    }

    /// Starts a daemon with this configuration.
    pub fn daemon(&self, config: &str) -> Result<Daemon> {
        Daemon::start(self.world, self.world.node(), config)
    }

    /// An application in the group.
    pub fn app(&self, words: &[&str]) -> Result<Process> {
        self.app_on(self.world.node(), words)
    }

    /// An application in the group, on another host.
    pub fn app_on(&self, host: &NetNs, words: &[&str]) -> Result<Process> {
        let mut command = host.command(programs::app()?);
        command.args(words);
        self.cgroup.adopt(&mut command)?;
        Process::spawn_with_input("app", self.world.folder(), command)
    }

    /// An application in the group that has connected to `target` and exchanged a byte with it.
    pub fn hold(&self, target: &Target) -> Result<Process> {
        let mut app = self.app(&["hold", &target.addr().to_string()])?;
        app.wait_for_line("held=1")?;
        assert_eq!(ask(&mut app, "ping")?, "ok");
        Ok(app)
    }

    /// What connect(2) says to an application in the group.
    pub fn connect_error(&self, target: &Target) -> Result<String> {
        self.connect_error_of(target.addr())
    }

    /// The same of any address; "ok" where it connects.
    pub fn connect_error_of(&self, addr: SocketAddr) -> Result<String> {
        let mut app = self.app(&["connect-error", &addr.to_string()])?;
        let line = app.wait_for_line("connect=")?;
        app.wait(PATIENCE)?;
        Ok(line.trim_start_matches("connect=").to_owned())
    }
}
