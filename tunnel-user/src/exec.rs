//! `tunnel exec`: one command in a group of its own, captured.
//!
//! Enters: a command and a configuration. Leaves: its exit status. Invariant: the command has the caller's
//! terminal, environment and signals, as if we were not there; it runs only once its connections are
//! captured; when we die, its connections are refused. Nothing of the group is left afterwards.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    path::PathBuf,
    process::{Command, ExitCode, ExitStatus},
};

use nix::{
    sys::{
        resource::{Resource, getrlimit, rlim_t, setrlimit},
        signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask},
        signalfd::{SfdFlags, SignalFd, siginfo},
    },
    unistd::Pid,
};
use tokio::io::unix::AsyncFd;

use crate::{
    app,
    capture::cgroup::{CgroupError, Fresh, Hierarchy},
    config::Config,
    exit::{Cause, Failure},
    privileges,
    stats::{self, Record},
};

/// What a shell returns for a command that is not there, and for one that cannot be run (POSIX, 2.8.2).
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
/// What a shell adds to the number of the signal that killed a command.
const SIGNALLED: i32 = 128;

/// Signals that are for the command.
const FORWARDED: [Signal; 7] = [
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

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

/// Runs the command to its end.
pub fn run(config: Config, options: &Options) -> Result<ExitCode, Failure> {
    privileges::require_for_capture()?;
    // We raise ours; the command gets the one that it would have had (select(2) breaks beyond 1024).
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_err(|e| os("limits", e.into()))?;
    let records = options.stats || options.stats_json.is_some();
    // Before any thread starts: threads inherit the mask, and one descriptor then gets every signal.
    let forwarded: SigSet = FORWARDED.into_iter().collect();
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&forwarded), Some(&mut before))
        .map_err(|e| os("signals", e.into()))?;
    let mut group = Hierarchy::open().and_then(|h| h.create_fresh()).map_err(cgroup_failure)?;
    let runtime = app::control_runtime()?;
    let (status, report) = runtime.block_on(async {
        let signals = SignalFd::with_flags(&forwarded, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(|e| os("signals", e.into()))?;
        // SAFETY: the descriptor is the signalfd's own, and stays open and the same as long as it lives.
        let signals = unsafe { AsyncFd::register(signals) }.map_err(|e| os("signals", e.into()))?;
        let start = app::Options { group: Some(&group), keep_records: records, ..Default::default() };
        let mut running = app::start(config, start)?;
        let status = match spawn(&options.command, &group, before, limit) {
            Ok(mut child) => tokio::select! {
                status = wait(&mut child, &signals) => status.map_err(|e| os("waiting for the command", e))?,
                () = running.watch_captures() => {
                    return Err(Failure::Other(Cause::new("the capture ended", "")));
                }
            },
            Err(failed) => {
                running.stop();
                return failed.map(|code| (Err(code), (Vec::new(), 0)));
            }
        };
        end_leftovers(&mut group, &options.command);
        let report = running.stop();
        Ok((Ok(status), (report.records, report.dropped)))
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
fn spawn(
    command: &[OsString],
    group: &Fresh,
    mask: SigSet,
    (soft, hard): (rlim_t, rlim_t),
) -> Result<tokio::process::Child, Result<u8, Failure>> {
    let Some((program, args)) = command.split_first() else {
        return Err(Err(Failure::Config(Cause::new("no command was given", "tunnel exec ... -- CMD ARGS"))));
    };
    let procs = group.open_procs().map_err(|e| Err(os("the command's cgroup", e)))?;
    let mut child = Command::new(program);
    child.args(args);
    let fd = procs.as_raw_fd();
    // SAFETY: between fork and exec only async-signal-safe calls are made (signal-safety(7)): write(2) to
    // a descriptor that lives until spawn returns, setrlimit(2), and pthread_sigmask(3).
    unsafe {
        child.pre_exec(move || {
            if libc::write(fd, b"0".as_ptr().cast(), 1) != 1 {
                return Err(io::Error::last_os_error());
            }
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
            pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&mask), None).map_err(io::Error::from)
        });
    }
    let spawned = tokio::process::Command::from(child).spawn();
    drop(procs);
    spawned.map_err(|e| {
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
            _ => Err(os(&format!("starting {program}"), e)),
        }
    })
}

/// Waits for the command, and passes on the signals that are meant for it.
async fn wait(child: &mut tokio::process::Child, signals: &AsyncFd<SignalFd>) -> io::Result<ExitStatus> {
    let pid = child.id().map(|id| Pid::from_raw(id.cast_signed()));
    loop {
        tokio::select! {
            status = child.wait() => return status,
            ready = signals.readable() => {
                let mut ready = ready?;
                while let Ok(Some(info)) = ready.get_inner().read_signal() {
                    if let (Some(pid), Some(signal)) = (pid, to_forward(&info)) {
                        // It may have ended just now.
                        let _gone = kill(pid, signal);
                    }
                }
                ready.clear_ready();
            }
        }
    }
}

/// A signal from the terminal has gone to the whole foreground group, the command included.
fn to_forward(info: &siginfo) -> Option<Signal> {
    /// `SI_KERNEL` of `asm-generic/siginfo.h`.
    const SI_KERNEL: i32 = 0x80;
    let signal = Signal::try_from(info.ssi_signo.cast_signed()).ok()?;
    (info.ssi_code != SI_KERNEL).then_some(signal)
}

/// Ends what the command left running: without us its connections could go nowhere.
fn end_leftovers(group: &mut Fresh, command: &[OsString]) {
    let left = group.processes();
    if !left.is_empty() {
        let program = command.first().map(|c| c.to_string_lossy()).unwrap_or_default();
        let pids: Vec<_> = left.iter().map(ToString::to_string).collect();
        eprintln!("tunnel: ended {} that {program} left running: {}", processes(left.len()), pids.join(" "));
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
            "Making a cgroup takes root, and in a container a writable cgroup2 hierarchy.",
        )),
        Some(libc::ENODEV) => Failure::Kernel(Cause::new(e, "This kernel has no cgroup2.")),
        _ => Failure::Other(Cause::new(e, "")),
    }
}
