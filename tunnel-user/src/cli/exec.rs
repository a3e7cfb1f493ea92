//! `tunnel exec`: runs one command in a cgroup of its own, captured by a daemon in this process.
//!
//! # Invariants
//! - The command has the caller's terminal, environment and signals; while it is stopped, so are we, for job control.
//! - It runs only once its connections are captured. When we die, its connections are refused.
//! - Nothing of the cgroup is left afterwards.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::ExitStatusExt as _,
    },
    path::PathBuf,
    process::{Command, ExitCode, ExitStatus},
};

use nix::sys::{
    signal::{SigSet, Signal, raise},
    signalfd::{SfdFlags, SignalFd, siginfo},
};
use rustix::process::{Pid, WaitOptions, waitpid};
use tokio::io::unix::AsyncFd;

use crate::{
    config::Config,
    kernel::{
        cgroup::{CgroupError, Fresh, Hierarchy},
        inherited::{self, Inherited},
        ready, sys,
    },
    observe::stats::{self, Record},
    process::exit::{Cause, Failure},
};

/// What a shell returns for a command that is not there, and for one that cannot be run (POSIX, 2.8.2).
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
/// What a shell adds to the number of the signal that killed a command.
const SIGNALLED: i32 = 128;

/// What `exec` was told besides the configuration.
#[derive(Debug, Default)]
pub struct Options {
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// Print a table of what was carried.
    pub stats: bool,
    /// Write it as JSON.
    pub stats_json: Option<PathBuf>,
}

/// The daemon that carries the command's connections, in this process.
pub trait Carrier: Sized {
    /// Fails where this process may not capture, before anything is created.
    fn require_privileges() -> Result<(), Failure>;

    /// Captures `group`, in a runtime. With `keep_records`, [`stop`](Self::stop) returns a record of each flow.
    fn start(config: Config, group: &Fresh, keep_records: bool) -> Result<Self, Failure>;

    /// Does what a capture needs while the command runs. Never ends.
    fn run(&mut self) -> impl Future<Output = ()>;

    /// Warns of processes that have left the group.
    fn look_for_leavers(&mut self);

    /// Ends the flows; their records, and how many flows there was no record for.
    fn stop(self) -> (Vec<Record>, u64);
}

/// Runs the command to its end, its connections carried by `C`.
pub fn run<C: Carrier>(config: Config, options: &Options) -> Result<ExitCode, Failure> {
    C::require_privileges()?;
    let records = options.stats || options.stats_json.is_some();
    // Before any thread starts, and before the limit of descriptors is raised (select(2) breaks beyond 1024).
    let (inherited, blocked) =
        Inherited::take().map_err(|e| os("cannot read signal dispositions and limits", e))?;
    let mut group = Hierarchy::open().and_then(|h| h.create_fresh()).map_err(cgroup_failure)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| os("the runtime", e))?;
    let (status, report) = runtime.block_on(async {
        let signals = SignalFd::with_flags(&blocked, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(|e| os("signals", e.into()))?;
        let pending = signals.as_fd().try_clone_to_owned().and_then(ready::readable);
        let signals = Signals { signals, pending: pending.map_err(|e| os("signals", e))? };
        let mut running = C::start(config, &group, records)?;
        let status = match spawn(&options.command, &group, inherited) {
            Ok(mut child) => tokio::select! {
                status = child.ended(&signals) => status.map_err(|e| os("cannot wait for the command", e))?,
                () = running.run() => {
                    return Err(Failure::Other(Cause::new("the capture ended", "")));
                }
            },
            Err(failed) => {
                running.stop();
                return failed.map(|code| (Err(code), (Vec::new(), 0)));
            }
        };
        running.look_for_leavers();
        end_leftovers(&mut group, &options.command);
        Ok((Ok(status), running.stop()))
    })?;
    let (records, dropped) = report;
    if options.stats {
        eprint!("{}", stats::table(&records, dropped));
    }
    if let Some(path) = &options.stats_json {
        write_json(path, &records)?;
    }
    Ok(match status {
        Ok(status) => ExitCode::from(exit_byte(status)),
        Err(code) => ExitCode::from(code),
    })
}

/// Starts the command in the group. The error is an exit code when the command is at fault.
fn spawn(command: &[OsString], group: &Fresh, inherited: Inherited) -> Result<Child, Result<u8, Failure>> {
    let Some((program, args)) = command.split_first() else {
        return Err(Err(Failure::Config(Cause::new("no command was given", "tunnel exec ... -- CMD ARGS"))));
    };
    let procs = group.open_procs().map_err(|e| Err(os("cannot open the cgroup of the command", e)))?;
    let mut child = Command::new(program);
    child.args(args);
    let spawned = inherited.spawn(child, &procs);
    spawned.map(|child| Child { pid: child.id().cast_signed(), stopped: false }).map_err(|e| {
        let program = program.to_string_lossy();
        match e.kind() {
            io::ErrorKind::NotFound => {
                eprintln!("tunnel: {program}: command not found");
                Ok(NOT_FOUND)
            }
            io::ErrorKind::PermissionDenied => {
                eprintln!("tunnel: {program}: cannot be executed: {e}");
                Ok(NOT_EXECUTABLE)
            }
            _ => Err(os(&format!("cannot start {program}"), e)),
        }
    })
}

/// Signals that came for this process.
struct Signals {
    signals: SignalFd,
    /// The same descriptor once more, for the runtime.
    pending: AsyncFd<OwnedFd>,
}

/// The command, as it runs.
struct Child {
    pid: libc::pid_t,
    /// Whether it is stopped (SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU).
    stopped: bool,
}

impl Child {
    /// Waits for its end; passes on the signals that are meant for it, and stops when it does.
    async fn ended(&mut self, signals: &Signals) -> io::Result<ExitStatus> {
        loop {
            let mut ready = signals.pending.readable().await?;
            let mut resumed = false;
            while let Ok(Some(info)) = signals.signals.read_signal() {
                match info.ssi_signo.cast_signed() {
                    // Looked after below.
                    libc::SIGCHLD => {}
                    libc::SIGCONT => resumed = true,
                    _ if is_the_terminals(&info) => {}
                    signal => self.send(signal),
                }
            }
            ready.clear_ready();
            if let Some(status) = self.follow(resumed)? {
                return Ok(status);
            }
        }
    }

    fn send(&self, signal: libc::c_int) {
        // The command may have ended just now; its id is its own until it is waited for.
        sys::kill(self.pid, signal);
    }

    /// Takes note of what has become of it: its status when it has ended. Where it has stopped, so do we, because whoever
    /// started us waits for us to; `resumed`, somebody has us continue, and means it.
    fn follow(&mut self, resumed: bool) -> io::Result<Option<ExitStatus>> {
        let mut stopped_by = None;
        while let Some(status) = self.news()? {
            if status.continued() {
                (self.stopped, stopped_by) = (false, None);
            } else if let Some(signal) = status.stopped_signal() {
                (self.stopped, stopped_by) = (true, Some(signal));
            } else {
                return Ok(Some(status));
            }
        }
        match stopped_by {
            // Of a whole group it would have heard it itself.
            _ if resumed && self.stopped => self.send(libc::SIGCONT),
            Some(signal) => stop(signal)?,
            None => {}
        }
        Ok(None)
    }

    /// The next change of its state, if there was one.
    fn news(&self) -> io::Result<Option<ExitStatus>> {
        let changes = WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED;
        let news = waitpid(Pid::from_raw(self.pid), changes)?;
        Ok(news.map(|(_, status)| ExitStatus::from_raw(status.as_raw())))
    }
}

/// Stops this process by the signal that has stopped the command, until it is continued. In a process group that nobody
/// controls (POSIX calls it orphaned) the kernel does so by SIGSTOP only, as it does with the command.
fn stop(signal: libc::c_int) -> io::Result<()> {
    let signal = Signal::try_from(signal).unwrap_or(Signal::SIGSTOP);
    let signal = if inherited::is_ignored(signal as libc::c_int) { Signal::SIGSTOP } else { signal };
    // It is blocked, and waits beside the one that the terminal may have sent to us; both are gone when we are continued.
    raise(signal)?;
    let only = SigSet::from(signal);
    only.thread_unblock()?;
    Ok(only.thread_block()?)
}

/// A signal from the terminal has gone to the whole foreground group, the command included.
fn is_the_terminals(info: &siginfo) -> bool {
    /// `SI_KERNEL` of `asm-generic/siginfo.h`.
    const SI_KERNEL: i32 = 0x80;
    info.ssi_code == SI_KERNEL
}

/// Ends what the command left running: without us its connections could go nowhere.
fn end_leftovers(group: &mut Fresh, command: &[OsString]) {
    let left = group.processes();
    if !left.is_empty() {
        let program = command.first().map(|c| c.to_string_lossy()).unwrap_or_default();
        let pids: Vec<_> = left.iter().map(ToString::to_string).collect();
        eprintln!(
            "tunnel: terminated {} that {program} left running: {}",
            processes(left.len()),
            pids.join(" ")
        );
    }
    if let Err(e) = group.remove() {
        tracing::warn!("{e}");
    }
}

fn processes(n: usize) -> String {
    if n == 1 { "1 process".to_owned() } else { format!("{n} processes") }
}

fn exit_byte(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|s| SIGNALLED + s)).unwrap_or(1);
    u8::try_from(code & 0xff).unwrap_or(1)
}

fn write_json(path: &PathBuf, records: &[Record]) -> Result<(), Failure> {
    let written =
        File::create(path).and_then(|f| serde_json::to_writer_pretty(f, records).map_err(io::Error::from));
    written.map_err(|e| os(&path.display().to_string(), e))
}

fn os(what: &str, e: io::Error) -> Failure {
    Failure::Other(Cause::new(format!("{what}: {e}"), ""))
}

fn cgroup_failure(e: CgroupError) -> Failure {
    let (CgroupError::Mount(source) | CgroupError::Io { source, .. }) = &e else {
        return Failure::Other(Cause::new(e, ""));
    };
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::EROFS) => Failure::Privilege(Cause::new(
            e,
            "Creating a cgroup requires root, and in a container a writable cgroup2 hierarchy.",
        )),
        Some(libc::ENODEV) => Failure::Kernel(Cause::new(e, "This kernel does not support cgroup2.")),
        _ => Failure::Other(Cause::new(e, "")),
    }
}
