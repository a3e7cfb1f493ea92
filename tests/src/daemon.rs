//! `tunnel run`, on either host.

use std::{fs, net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use crate::{
    gateway::LOG,
    mounts,
    netns::NetNs,
    process::Process,
    programs,
    wait::{PATIENCE, wait_for},
    world::World,
};

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

    /// The same; it sees each file in place of another, as [`mounts::show`] has them.
    pub fn start_seeing(
        world: &World,
        host: &NetNs,
        config: &str,
        files: &[(PathBuf, &str)],
    ) -> Result<Self> {
        let mut daemon = Self::spawn_seeing(world, host, config, files)?;
        daemon.process.wait_for_line("listening")?;
        Ok(daemon)
    }

    /// The same, without waiting.
    pub fn spawn(world: &World, host: &NetNs, config: &str) -> Result<Self> {
        Self::spawn_seeing(world, host, config, &[])
    }

    fn spawn_seeing(world: &World, host: &NetNs, config: &str, files: &[(PathBuf, &str)]) -> Result<Self> {
        let file = tempfile::Builder::new().prefix("daemon-").suffix(".toml").tempfile_in(world.folder())?;
        let (_, path) = file.keep()?;
        fs::write(&path, config)?;
        let mut command = host.command_ended_by(programs::tunnel()?, Signal::SIGTERM);
        command.args(["run", "--log", LOG, "--config"]).arg(&path);
        mounts::show(&mut command, files)?;
        let process = Process::spawn("daemon", world.folder(), command)?;
        Ok(Self { process, config: path })
    }

    /// Writes another configuration to its file; returns when that is in force, or was found wrong.
    pub fn tell(&mut self, config: &str) -> Result<()> {
        let before = self.answers().len();
        // As editors and deployments do.
        let next = self.config.with_extension("next");
        fs::write(&next, config)?;
        fs::rename(&next, &self.config)?;
        self.answers_beyond(before)
    }

    /// Sends it SIGHUP; returns when it has read its file again.
    pub fn hang_up(&mut self) -> Result<()> {
        let before = self.answers().len();
        self.process.signal(Signal::SIGHUP)?;
        self.answers_beyond(before)
    }

    /// What it has said so far to other configurations: in force, or not.
    pub fn answers(&self) -> Vec<String> {
        let log = self.log();
        let failed = |l: &str| l.contains("failed to reload") && !l.contains("failed to reload identity");
        let answers = log.lines().filter(|l| l.contains("reloaded configuration") || failed(l));
        answers.map(str::to_owned).collect()
    }

    fn answers_beyond(&self, before: usize) -> Result<()> {
        wait_for("an answer to another configuration", PATIENCE, || {
            (self.answers().len() > before).then_some(())
        })
        .with_context(|| self.log())
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

    /// Stops it; what its counter of this name says, 0 if it counted nothing.
    pub fn stop_and_count(&mut self, counter: &str) -> Result<u64> {
        self.process.stop()?;
        let log = self.log();
        let count = log.split_once(&format!("(\"{counter}\", ")).and_then(|(_, rest)| rest.split_once(')'));
        count.map_or(Ok(0), |(count, _)| count.parse().with_context(|| log.clone()))
    }
}

/// The tables of a configuration that sends everything captured to one gateway.
pub fn through(gateway: SocketAddr, verify: &str) -> String {
    format!(
        "[[route]]\nto = [{{ upstream = \"gateway\" }}]\n\
         [[upstream]]\nname = \"gateway\"\nendpoints = [\"{gateway}\"]\nverify = [\"{verify}\"]\n"
    )
}
