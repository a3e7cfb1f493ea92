//! Starts the two processes of the load generator for benchmarks, and reads their outcomes.
//!
//! # Invariants
//! - A client that failed fails the caller that waits for it, with the client's error message.
//! - A guard that is dropped has ended its process.
//! - While a client measures, nothing here takes processor time: a thread waits for its lines in a blocking read.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{ChildStdout, Command},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Outcome, Workload, client::STALL};
use crate::{cgroup::Cgroup, netns::NetNs, process::Process, programs, wait::PATIENCE};

/// Base port of the servers that are started here.
pub const PORT: u16 = 7000;
/// A line that takes longer has been given up by the client itself: it says why, and has some time to do so.
const LINE: Duration = STALL.saturating_add(Duration::from_secs(15));
/// Lines that may wait to be taken: a client is told to go on only when its last line was.
const LINES: usize = 4;

/// A running `tt-load serve`.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    process: Speaker,
}

impl Server {
    /// Starts one in a control group, with what it logs in `folder`; returns when it listens.
    pub fn start(host: &NetNs, folder: &Path, ip: IpAddr, cgroup: Option<&Cgroup>) -> Result<Self> {
        let mut command = host.command(programs::load()?);
        command.args(["serve", "--listen", &ip.to_string(), "--base-port", &PORT.to_string()]);
        if let Some(cgroup) = cgroup {
            cgroup.adopt(&mut command)?;
        }
        let mut process = Speaker::start("load-server", folder, command)?;
        process.expect_ready(PATIENCE)?;
        Ok(Self { addr: SocketAddr::new(ip, PORT), process })
    }

    /// Its address, and its base port.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process.process
    }
}

/// A running `tt-load run`.
#[derive(Debug)]
pub struct Client {
    process: Speaker,
    length: Duration,
}

impl Client {
    /// Starts one. `command` is [`programs::load`], or something that ends in it, without arguments; `to` is
    /// [`Server::addr`]. It will measure for `length`, after it has done the same for `warm_up`.
    pub fn start(
        mut command: Command,
        folder: &Path,
        to: SocketAddr,
        workload: Workload,
        length: Duration,
        warm_up: Duration,
    ) -> Result<Self> {
        let seconds = |length: Duration| length.as_secs_f64().to_string();
        command.args(["run", "--to", &to.to_string(), "--workload", &workload.to_string()]);
        command.args(["--seconds", &seconds(length), "--warm-up", &seconds(warm_up)]);
        Ok(Self { process: Speaker::start("load-client", folder, command)?, length })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process.process
    }

    /// Waits until it is connected and warm.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.process.expect_ready(LINE)
    }

    /// Has it measure; its connections stay.
    pub fn measure(&mut self) -> Result<Outcome> {
        self.process.process.tell("go")?;
        let line = self.process.line(self.length + LINE)?;
        serde_json::from_str(&line).with_context(|| format!("no outcome: {line}"))
    }

    /// Has it close its connections; fails unless they ended well.
    pub fn end(mut self) -> Result<()> {
        self.process.process.tell("end")?;
        let status = self.process.process.wait(LINE)?;
        ensure!(status.success(), "it failed, {status}\n{}", self.process.process);
        Ok(())
    }
}

/// A process whose lines are waited for.
#[derive(Debug)]
struct Speaker {
    process: Process,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl Speaker {
    fn start(name: &str, folder: &Path, command: Command) -> Result<Self> {
        let (process, out) = Process::spawn_to_talk_to(name, folder, command)?;
        let (sender, lines) = mpsc::sync_channel(LINES);
        let read = move |out: ChildStdout| {
            // Ends with the process, whose end of the pipe goes then, or with who listens.
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        };
        let reader = thread::Builder::new().name(name.to_owned()).spawn(move || read(out))?;
        Ok(Self { process, lines, reader: Some(reader) })
    }

    fn expect_ready(&mut self, limit: Duration) -> Result<()> {
        let line = self.line(limit)?;
        ensure!(line == "ready", "\"{line}\" where \"ready\" should be\n{}", self.process);
        Ok(())
    }

    fn line(&mut self, limit: Duration) -> Result<String> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!("nothing was said for {limit:?}\n{}", self.process),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.process.wait(PATIENCE)?;
                bail!("it ended, {status}\n{}", self.process)
            }
        }
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        if let Err(e) = self.process.stop() {
            eprintln!("{e:#}");
        }
        if let Some(reader) = self.reader.take() {
            let _panicked = reader.join();
        }
    }
}
