//! `tunnel gateway`, running in `net`.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Command, ExitStatus},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    mounts,
    pki::Credentials,
    process::Process,
    programs,
    wait::{PATIENCE, wait_for},
    world::{NET4, World},
};

/// HBONE's port.
pub const PORT: u16 = 15008;
/// What daemons log: everything of theirs, little of the libraries'.
pub const LOG: &str = "info,tunnel=debug";
/// Every address that a test has a target at, and the two at which none answers.
const ALLOW: [&str; 4] = ["10.200.0.0/24", "fd00:200::/64", "10.201.0.0/24", "10.202.0.0/24"];

/// How a gateway will run.
#[derive(Clone)]
pub struct Builder<'w> {
    world: &'w World,
    listen: SocketAddr,
    credentials: Credentials,
    allow: Vec<String>,
    flags: Vec<String>,
    hosts: Option<PathBuf>,
}

impl<'w> Builder<'w> {
    pub(crate) fn new(world: &'w World) -> Self {
        Self {
            world,
            listen: SocketAddr::new(NET4, PORT),
            credentials: world.pki().named("gateway"),
            allow: ALLOW.map(str::to_owned).to_vec(),
            flags: Vec::new(),
            hosts: None,
        }
    }

    /// Lets through these and nothing else, in the words of `--allow`.
    #[must_use]
    pub fn allow_only(mut self, targets: &[&str]) -> Self {
        self.allow = targets.iter().map(|&target| target.to_owned()).collect();
        self
    }

    /// Lets through this too, in the words of `--allow`.
    #[must_use]
    pub fn allow(mut self, target: &str) -> Self {
        self.allow.push(target.to_owned());
        self
    }

    /// Shows another certificate.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = credentials;
        self
    }

    /// Listens elsewhere.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// Gets this flag, with its value.
    #[must_use]
    pub fn flag(mut self, flag: &str, value: &str) -> Self {
        self.flags.extend([flag.to_owned(), value.to_owned()]);
        self
    }

    /// Resolves names by these lines of `/etc/hosts`, and by no name server.
    pub fn hosts(mut self, lines: &str) -> Result<Self> {
        let file = self.world.folder().join("hosts");
        std::fs::write(&file, lines)?;
        self.hosts = Some(file);
        Ok(self)
    }

    /// Starts it, and returns when it listens.
    pub fn start(self) -> Result<Gateway<'w>> {
        let mut process = Process::spawn("gateway", self.world.folder(), self.command()?)?;
        listening(&mut process, self.world, self.listen.port())?;
        Ok(Gateway { process, builder: self })
    }

    fn command(&self) -> Result<Command> {
        let mut command = self.world.net().command(programs::tunnel()?);
        command.args(["gateway", "--log", LOG, "--listen", &self.listen.to_string()]);
        command.args(self.credentials.flags()).args(&self.flags);
        for target in &self.allow {
            command.args(["--allow", target]);
        }
        let hosts: Vec<_> = self.hosts.iter().map(|file| (file.clone(), "/etc/hosts")).collect();
        mounts::show(&mut command, &hosts)?;
        Ok(command)
    }
}

/// A running gateway.
pub struct Gateway<'w> {
    builder: Builder<'w>,
    process: Process,
}

impl Gateway<'_> {
    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.builder.listen
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.process.stderr()
    }

    /// Waits until it logs a line that holds `text`; that line.
    pub fn logs(&mut self, text: &str) -> Result<String> {
        self.process.wait_for_line(text)
    }

    /// Kills it: no notice, no drain.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.process.kill()
    }

    /// Asks it to end, and waits.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.process.stop()
    }

    /// Starts it again as it was, after [`kill`](Self::kill) or [`stop`](Self::stop).
    pub fn start_again(&mut self) -> Result<()> {
        let (world, port) = (self.builder.world, self.builder.listen.port());
        self.process = Process::spawn("gateway", world.folder(), self.builder.command()?)?;
        listening(&mut self.process, world, port)
    }
}

/// Waits until something in `net` listens on `port`; fails at once when `process` ends.
fn listening(process: &mut Process, world: &World, port: u16) -> Result<()> {
    let what = format!("a listener on port {port}");
    let state = wait_for(&what, PATIENCE, || {
        let listens = world.net().listens(port);
        match (listens, process.ended()) {
            (Err(e), _) | (_, Err(e)) => Some(Err(e)),
            (Ok(true), _) => Some(Ok(None)),
            (Ok(false), Ok(Some(status))) => Some(Ok(Some(status))),
            (Ok(false), Ok(None)) => None,
        }
    });
    match state.with_context(|| format!("{process}"))?? {
        None => Ok(()),
        Some(status) => bail!("no listener on port {port}: {status}\n{process}"),
    }
}
