//! `tunnel run`, on either host.

use std::{fs, net::SocketAddr, path::PathBuf};

use anyhow::Result;

use crate::{gateway::LOG, netns::NetNs, process::Process, programs, world::World};

/// A running daemon.
pub struct Daemon {
    process: Process,
    config: PathBuf,
}

impl Daemon {
    /// Writes `config` to a file and starts a daemon with it on `host`; returns when it has said that it is ready.
    pub fn start(world: &World, host: &NetNs, config: &str) -> Result<Self> {
        let mut daemon = Self::spawn(world, host, config)?;
        // Capture comes last; without one, listeners do.
        daemon.process.wait_for_line(if config.contains("[[capture]]") {
            "capturing"
        } else {
            "listening"
        })?;
        Ok(daemon)
    }

    /// The same, without waiting.
    pub fn spawn(world: &World, host: &NetNs, config: &str) -> Result<Self> {
        let file = tempfile::Builder::new().prefix("daemon-").suffix(".toml").tempfile_in(world.folder())?;
        let (_, path) = file.keep()?;
        fs::write(&path, config)?;
        let mut command = host.command_ended_by(programs::tunnel()?, nix::sys::signal::Signal::SIGTERM);
        command.args(["run", "--log", LOG, "--config"]).arg(&path);
        let process = Process::spawn("daemon", world.folder(), command)?;
        Ok(Self { process, config: path })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its configuration file.
    pub fn config(&self) -> &PathBuf {
        &self.config
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.process.stderr()
    }
}

/// The tables of a configuration that sends everything captured to one gateway.
pub fn through(gateway: SocketAddr, verify: &str) -> String {
    format!(
        "[[route]]\nto = [{{ upstream = \"gateway\" }}]\n\
         [[upstream]]\nname = \"gateway\"\nendpoints = [\"{gateway}\"]\nverify = [\"{verify}\"]\n"
    )
}
