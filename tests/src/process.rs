//! A child process that ends with its guard, its output and its status.
//!
//! # Invariants
//! - Output goes to files, so that no process waits for a test to read, unless the caller reads standard output itself.
//! - A guard that is dropped has ended and reaped its process. When the test fails, the process's output is shown.

use std::{
    ffi::OsStr,
    fmt,
    fs::{self, File},
    io::Write as _,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait::{self, PATIENCE, wait_for};

/// How long a process may take to go by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// How much of a log a failing test shows.
const SHOWN: usize = 16 * 1024;

/// A running, or ended, process.
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    out: PathBuf,
    err: PathBuf,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; `name` and the files of its output, in `folder`, are for people.
    pub fn spawn(name: &str, folder: &Path, mut command: Command) -> Result<Self> {
        Self::start(name, folder, &mut command)
    }

    /// Starts `command` with a standard input to write to.
    pub fn spawn_with_input(name: &str, folder: &Path, mut command: Command) -> Result<Self> {
        Self::start(name, folder, command.stdin(Stdio::piped()))
    }

    /// Starts `command` with a standard input to write to, and a standard output that the caller has to read.
    pub fn spawn_to_talk_to(name: &str, folder: &Path, mut command: Command) -> Result<(Self, ChildStdout)> {
        let mut process = Self::start_to(name, folder, command.stdin(Stdio::piped()), Some(Stdio::piped()))?;
        let out = process.child.stdout.take().context("standard output is a pipe")?;
        Ok((process, out))
    }

    fn start(name: &str, folder: &Path, command: &mut Command) -> Result<Self> {
        Self::start_to(name, folder, command, None)
    }

    fn start_to(name: &str, folder: &Path, command: &mut Command, to: Option<Stdio>) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = |kind: &str| folder.join(format!("{number}-{name}.{kind}"));
        let (out, err) = (file("out"), file("err"));
        let to = to.map_or_else(|| File::create(&out).map(Stdio::from), Ok)?;
        command.stdout(to).stderr(File::create(&err)?);
        let mut child = command.spawn().with_context(|| format!("{name} does not start: {command:?}"))?;
        let stdin = child.stdin.take();
        Ok(Self { name: name.to_owned(), child, stdin, out, err, status: None })
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        read(&self.out)
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        read(&self.err)
    }

    /// Writes a line to its standard input.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().with_context(|| format!("{} has no input", self.name))?;
        writeln!(stdin, "{line}").with_context(|| format!("{} does not listen", self.name))
    }

    /// Ends its standard input.
    pub fn hang_up(&mut self) {
        self.stdin = None;
    }

    /// Its status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, limit, || self.ended().transpose())
            .and_then(|status| status)
            .with_context(|| format!("{self}"))
    }

    /// Waits until what it wrote to either output has a line in it that holds `text`; that line.
    /// Fails at once when the process ends without.
    pub fn wait_for_line(&mut self, text: &str) -> Result<String> {
        self.wait_for_line_in(text, PATIENCE, PATIENCE)
    }

    /// The same of a process that has a lot to do before, and says so: while it says anything, it may go on.
    pub fn wait_for_line_while_it_goes_on(&mut self, text: &str) -> Result<String> {
        self.wait_for_line_in(text, 10 * PATIENCE, PATIENCE)
    }

    /// For so long, and for so long in silence.
    fn wait_for_line_in(&mut self, text: &str, limit: Duration, silence: Duration) -> Result<String> {
        let what = format!("\"{text}\" from {}", self.name);
        let (mut said, mut since) = (0, Instant::now());
        let found = wait_for(&what, limit, || {
            let ended = self.ended().ok().flatten();
            let all = [self.stdout(), self.stderr()].concat();
            // The last line may not be whole yet.
            let mut whole = all.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(str::trim_end);
            if let Some(line) = whole.find(|line| line.contains(text)) {
                return Some(Ok(line.to_owned()));
            }
            if all.len() != said {
                (said, since) = (all.len(), Instant::now());
            }
            let silent = limit != silence && since.elapsed() > silence;
            let why = ended.map(|status| format!("it ended, {status}"));
            why.or_else(|| silent.then(|| format!("nothing was said for {silence:?}"))).map(Err)
        });
        match found.with_context(|| format!("{self}"))? {
            Ok(line) => Ok(line),
            Err(why) => bail!("no {what}: {why}\n{self}"),
        }
    }

    /// Sends it a signal; it may have ended already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.status.is_some() {
            return Ok(());
        }
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Ends it with SIGKILL and reaps it.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        self.signal(Signal::SIGKILL)?;
        self.wait(PATIENCE)
    }

    /// Ends it with SIGTERM, or with SIGKILL when it does not heed that, and reaps it.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        match self.wait(GRACE) {
            Ok(status) => Ok(status),
            Err(_) => self.kill(),
        }
    }

    /// How much memory of its own it holds, shared pages left out, in bytes.
    pub fn memory(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.id()))?;
        let kib = |key: &str| -> Option<u64> {
            let line = text.lines().find(|line| line.starts_with(key))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        let kib = kib("Private_Dirty:").zip(kib("Private_Clean:"));
        let (dirty, clean) = kib.context("smaps_rollup has no line Private_Dirty")?;
        Ok((dirty + clean) * 1024)
    }

    /// The most memory that it has held so far, in bytes.
    pub fn memory_peak(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = text.lines().find(|line| line.starts_with("VmHWM:")).context("no line VmHWM")?;
        let kib: u64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
        Ok(kib * 1024)
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.id())?;
        for (kind, text) in [("stdout", self.stdout()), ("stderr", self.stderr())] {
            if !text.is_empty() {
                write!(f, "\n--- {kind} of {}:\n{}", self.name, tail(text.trim_end()))?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("name", &self.name).field("id", &self.id()).finish_non_exhaustive()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if wait::failing() {
            eprintln!("{self}");
        }
        if let Err(e) = self.stop() {
            eprintln!("{e:#}");
        }
    }
}

/// A status as a shell shows it: 128 + the signal when one ended the process.
pub fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

/// Runs a command to its end and returns its standard output; fails when it fails.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?} does not start"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() {
        let program = Path::new(command.get_program()).file_name().unwrap_or(OsStr::new("?"));
        bail!("{}: {}\n{}{}", program.display(), output.status, text(&output.stdout), text(&output.stderr));
    }
    Ok(text(&output.stdout))
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn tail(text: &str) -> &str {
    let mut from = text.len().saturating_sub(SHOWN);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}
