//! `tunnel exec`, running an application on `node`.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    cgroup::Cgroup,
    gateway::Gateway,
    mounts, netns,
    pki::{Credentials, GATEWAY_ID},
    process::{self, Process},
    programs,
    world::World,
};

/// What any application of the tests takes on a loaded two-core machine, several times over.
const LIMIT: Duration = Duration::from_secs(60);

/// How an application will be run.
#[derive(Clone)]
pub struct Exec<'w> {
    world: &'w World,
    how: How,
    flags: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    fresh_sys: bool,
    sees: Vec<(PathBuf, &'static str)>,
    within: Option<&'w Cgroup>,
    limit: Duration,
}

#[derive(Clone)]
enum How {
    Gateway { addr: SocketAddr, credentials: Credentials, verify: Option<String> },
    Config(PathBuf),
}

impl<'w> Exec<'w> {
    pub(crate) fn through(world: &'w World, gateway: &Gateway<'_>) -> Self {
        let credentials = world.pki().named("node");
        let verify = Some(GATEWAY_ID.to_owned());
        Self::new(world, How::Gateway { addr: gateway.addr(), credentials, verify })
    }

    pub(crate) fn with_config(world: &'w World, config: &Path) -> Self {
        Self::new(world, How::Config(config.to_owned()))
    }

    fn new(world: &'w World, how: How) -> Self {
        let (flags, env) = (Vec::new(), Vec::new());
        let sees = Vec::new();
        Self { world, how, flags, env, folder: None, fresh_sys: false, sees, within: None, limit: LIMIT }
    }

    /// Shows another certificate to the gateway.
    #[must_use]
    pub fn credentials(mut self, wanted: Credentials) -> Self {
        if let How::Gateway { credentials, .. } = &mut self.how {
            *credentials = wanted;
        }
        self
    }

    /// Wants another name in the gateway's certificate; `None`: no `--verify`.
    #[must_use]
    pub fn verify(mut self, san: Option<&str>) -> Self {
        if let How::Gateway { verify, .. } = &mut self.how {
            *verify = san.map(str::to_owned);
        }
        self
    }

    /// Gets this flag, with its value.
    #[must_use]
    pub fn flag(mut self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        self.flags.extend([flag.into(), value.as_ref().to_owned()]);
        self
    }

    /// Gets this flag, which has no value.
    #[must_use]
    pub fn switch(mut self, flag: &str) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Has this in its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Runs in this folder.
    #[must_use]
    pub fn folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_owned());
        self
    }

    /// Runs by `ip netns exec`, which gives its command a fresh `/sys`.
    #[must_use]
    pub fn by_ip_netns_exec(mut self) -> Self {
        self.fresh_sys = true;
        self
    }

    /// Sees this file in place of another.
    #[must_use]
    pub fn sees(mut self, file: &Path, in_place_of: &'static str) -> Self {
        self.sees.push((file.to_owned(), in_place_of));
        self
    }

    /// Runs in this group, of another hierarchy than the one that is captured.
    #[must_use]
    pub fn within(mut self, group: &'w Cgroup) -> Self {
        self.within = Some(group);
        self
    }

    /// May take this long.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs a command to its end.
    pub fn run<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Finished> {
        self.spawn(words)?.finish()
    }

    /// Runs the tests' own application (`src/bin/tt-app/`) to its end.
    pub fn run_app(&self, words: &[&str]) -> Result<Finished> {
        self.spawn_app(words)?.finish()
    }

    /// Starts the tests' own application.
    pub fn spawn_app(&self, words: &[&str]) -> Result<Running> {
        let app = programs::app()?;
        let words: Vec<&OsStr> = [app.as_os_str()].into_iter().chain(words.iter().map(OsStr::new)).collect();
        self.spawn(&words)
    }

    /// The command line of `tunnel exec`, for a test that arranges its input and output itself. Its process
    /// is to be told to [`World::note_exec`].
    pub fn command<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Command> {
        self.build(&self.world.folder().join("stats.json"), words)
    }

    /// Starts a command.
    pub fn spawn<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Running> {
        let stats =
            tempfile::Builder::new().prefix("stats-").suffix(".json").tempfile_in(self.world.folder())?;
        let (_, stats) = stats.keep()?;
        let command = self.build(&stats, words)?;
        let process = Process::spawn_with_input("exec", self.world.folder(), command)?;
        self.world.note_exec(process.id());
        Ok(Running { process, stats, started: Instant::now(), limit: self.limit })
    }

    fn build<S: AsRef<OsStr>>(&self, stats: &Path, words: &[S]) -> Result<Command> {
        let tunnel = programs::tunnel()?;
        // SIGTERM when the test dies: it takes its application along and removes its cgroup.
        let host = self.world.node();
        let mut command = if self.fresh_sys {
            let mut ip = netns::plain("ip");
            ip.args(["netns", "exec", host.name()]).arg(&tunnel);
            ip
        } else {
            host.command_ended_by(&tunnel, Signal::SIGTERM)
        };
        command.arg("exec");
        match &self.how {
            How::Gateway { addr, credentials, verify } => {
                command.args(["--gateway", &addr.to_string()]).args(credentials.flags());
                if let Some(san) = verify {
                    command.args(["--verify", san]);
                }
            }
            How::Config(file) => {
                command.arg("--config").arg(file);
            }
        }
        command.args(&self.flags).arg("--stats-json").arg(stats).arg("--").args(words);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        mounts::show(&mut command, &self.sees)?;
        if let Some(group) = self.within {
            group.adopt(&mut command)?;
        }
        Ok(command)
    }
}

/// An application that runs.
#[derive(Debug)]
pub struct Running {
    process: Process,
    stats: PathBuf,
    started: Instant,
    limit: Duration,
}

impl Running {
    /// The process of `tunnel exec`; its output is the application's.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until it prints a line that holds `text`; that line.
    pub fn says(&mut self, text: &str) -> Result<String> {
        self.process.wait_for_line(text)
    }

    /// Waits until it prints a line `KEY=VALUE`; the value.
    pub fn value(&mut self, key: &str) -> Result<String> {
        let line = self.says(&format!("{key}="))?;
        Ok(line.split_once('=').map(|(_, value)| value.to_owned()).unwrap_or_default())
    }

    /// The same, however long it takes, as long as it says something meanwhile.
    pub fn value_in_the_end(&mut self, key: &str) -> Result<String> {
        let line = self.process.wait_for_line_while_it_goes_on(&format!("{key}="))?;
        Ok(line.split_once('=').map(|(_, value)| value.to_owned()).unwrap_or_default())
    }

    /// Writes a line to its standard input.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        self.process.tell(line)
    }

    /// Ends its standard input and waits for its end.
    pub fn finish(mut self) -> Result<Finished> {
        self.process.hang_up();
        self.ended()
    }

    /// Waits for its end, which something else brings about.
    pub fn ended(mut self) -> Result<Finished> {
        let status = self.process.wait(self.limit)?;
        let stats = std::fs::read_to_string(&self.stats).unwrap_or_default();
        Ok(Finished {
            status,
            stdout: self.process.stdout(),
            stderr: self.process.stderr(),
            stats: serde_json::from_str(&stats).unwrap_or(Value::Null),
            took: self.started.elapsed(),
        })
    }
}

/// An application that has ended.
#[derive(Debug)]
pub struct Finished {
    /// The status of `tunnel exec`.
    pub status: ExitStatus,
    /// What the application, and nobody else, has written.
    pub stdout: String,
    /// What the application and `tunnel` have written.
    pub stderr: String,
    /// What `--stats-json` says; null if it says nothing.
    pub stats: Value,
    /// From start to end.
    pub took: Duration,
}

impl Finished {
    /// Whether the status is 0.
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// The status as a shell shows it.
    pub fn code(&self) -> i32 {
        process::code(self.status)
    }

    /// The value of a line `KEY=VALUE` that the application printed.
    pub fn value(&self, key: &str) -> Result<&str> {
        let mut pairs = self.stdout.lines().filter_map(|line| line.split_once('='));
        let found = pairs.find(|(name, _)| *name == key).map(|(_, value)| value);
        found.with_context(|| format!("no line {key}=… in the output of {self}"))
    }

    /// The records of the flows that were carried or refused.
    pub fn flows(&self) -> Result<&Vec<Value>> {
        let flows = self.stats.get("flows").or(Some(&self.stats)).and_then(Value::as_array);
        flows.with_context(|| format!("no list of flows in {:#}\n{self}", self.stats))
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} after {:?}", self.status, self.took)?;
        for (kind, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.is_empty() {
                write!(f, "\n--- {kind}:\n{}", text.trim_end())?;
            }
        }
        Ok(())
    }
}
