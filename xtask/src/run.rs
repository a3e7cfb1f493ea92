//! Steps, commands, colours, Ctrl-C: what every task uses.
//!
//! # Invariants
//! - The output of a command that failed is always shown whole.

use std::{
    env, fmt,
    fs::{self, File},
    io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction},
    unistd::Pid,
};

/// How often a running child and the Ctrl-C flag are looked at.
const POLL: Duration = Duration::from_millis(50);

/// How often a quiet step says that it is alive where there is no terminal to redraw.
const HEARTBEAT: Duration = Duration::from_secs(20);

/// How long a child has to go by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// The checkout that this xtask was built from.
pub(crate) struct Checkout {
    /// Its root.
    pub(crate) root: PathBuf,
    /// Cargo's target folder.
    pub(crate) target: PathBuf,
}

impl Checkout {
    pub(crate) fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask lies inside the checkout")?
            .to_owned();
        let target =
            env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder));
        Ok(Self { root, target })
    }

    /// `cargo ARGS...` in the checkout, with the toolchain that runs this xtask.
    pub(crate) fn cargo<const N: usize>(&self, args: [&str; N]) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // Cargo describes the xtask package to this process; that is nobody else's business.
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                command.env_remove(name);
            }
        }
        command.current_dir(&self.root).args(args);
        command
    }

    /// Builds the `tunnel` program (in the `dev` profile unless `release`), and says where it is.
    pub(crate) fn build_tunnel(&self, release: bool) -> Result<PathBuf> {
        let mut command = self.cargo(["build", "--locked", "--package", "tunnel-user", "--bin", "tunnel"]);
        if release {
            command.arg("--release");
        }
        foreground("building the tunnel program", &mut command)?;
        Ok(self.target.join(if release { "release" } else { "debug" }).join("tunnel"))
    }
}

/// The user pressed Ctrl-C, or the process was asked to end.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP make the running step return [`Interrupted`], so that guards drop.
pub(crate) fn catch_interrupts() -> Result<()> {
    extern "C" fn note(_: i32) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic and does nothing else, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("catching {signal}"))?;
    }
    Ok(())
}

/// Returns [`Interrupted`] when the user has asked to stop.
pub(crate) fn check_interrupted() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!(Interrupted);
    }
    Ok(())
}

/// Sleeps, but not through Ctrl-C.
pub(crate) fn pause(length: Duration) -> Result<()> {
    let end = Instant::now() + length;
    while Instant::now() < end {
        check_interrupted()?;
        thread::sleep(POLL.min(end.saturating_duration_since(Instant::now())));
    }
    check_interrupted()
}

/// Waits for a child; ends it and returns [`Interrupted`] on Ctrl-C.
pub(crate) fn wait(child: &mut Child, mut idle: impl FnMut()) -> Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if INTERRUPTED.load(Ordering::Relaxed) {
            stop(child)?;
            bail!(Interrupted);
        }
        idle();
        thread::sleep(POLL);
    }
}

/// Ends a child: SIGTERM, then, when that is not heeded, SIGKILL.
pub(crate) fn stop(child: &mut Child) -> Result<ExitStatus> {
    if let Some(status) = child.try_wait()? {
        return Ok(status);
    }
    kill(Pid::from_raw(child.id().try_into()?), Signal::SIGTERM)?;
    let end = Instant::now() + GRACE;
    while Instant::now() < end {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        thread::sleep(POLL);
    }
    child.kill()?;
    Ok(child.wait()?)
}

/// Runs a step whose output is its point: shown as it comes.
pub(crate) fn foreground(what: &str, command: &mut Command) -> Result<()> {
    let started = Instant::now();
    eprintln!("{} {what}", blue("==>"));
    let mut child = command.spawn().with_context(|| format!("{} does not start", name_of(command)))?;
    let status = wait(&mut child, || ())?;
    ensure!(status.success(), "{what}: {} failed ({status})", name_of(command));
    eprintln!("{} {what} {}", green("ok "), dim(&took(started)));
    Ok(())
}

/// Runs a step whose output is of interest only when it fails: one line that tells the time, and all of the
/// output after a failure.
pub(crate) fn quiet(what: &str, log: &Path, command: &mut Command) -> Result<()> {
    let started = Instant::now();
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let mut child = command.spawn().with_context(|| format!("{} does not start", name_of(command)))?;

    let terminal = std::io::stderr().is_terminal();
    if !terminal {
        eprintln!("{} {what}", blue("==>"));
    }
    let mut said = Instant::now();
    let status = wait(&mut child, || {
        let every = if terminal { Duration::from_millis(200) } else { HEARTBEAT };
        if said.elapsed() < every {
            return;
        }
        said = Instant::now();
        let last = last_line(log);
        if terminal {
            eprint!("\r\x1b[K{} {what} {}", blue("==>"), dim(&format!("{} {last:.60}", took(started))));
            // A progress line that cannot be written is no reason to stop.
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("    {} {last:.100}", took(started));
        }
    });
    if terminal {
        eprint!("\r\x1b[K");
    }
    match status? {
        status if status.success() => {
            eprintln!("{} {what} {}", green("ok "), dim(&took(started)));
            Ok(())
        }
        status => {
            eprintln!("{}", String::from_utf8_lossy(&fs::read(log)?));
            bail!(
                "{what}: {} failed ({status}); its output is above and in {}",
                name_of(command),
                log.display()
            )
        }
    }
}

/// Runs a command for its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let answer = command.stdin(Stdio::null()).output();
    let answer = answer.with_context(|| format!("{} does not start", name_of(command)))?;
    ensure!(
        answer.status.success(),
        "{} failed ({}): {}",
        name_of(command),
        answer.status,
        String::from_utf8_lossy(&answer.stderr).trim_end()
    );
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

/// Runs a short command, for its effect.
pub(crate) fn sh(line: &str) -> Result<()> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().context("an empty command")?);
    output(command.args(words)).map(drop)
}

/// An error and its causes, without the backtrace that `{:?}` would add.
pub(crate) fn show_error(error: &anyhow::Error) {
    eprintln!("{} {error}", red("error:"));
    for cause in error.chain().skip(1) {
        eprintln!("  because: {cause}");
    }
}

/// Demands root, and says what for.
pub(crate) fn require_root(what_for: &str) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "{what_for} needs root. Run it as root, with your Rust: sudo -E env \"PATH=$PATH\" cargo xtask .."
    );
    Ok(())
}

/// The time since `started`, for people.
pub(crate) fn took(started: Instant) -> String {
    let elapsed = started.elapsed();
    if elapsed.as_secs() < 60 {
        format!("{:.1} s", elapsed.as_secs_f32())
    } else {
        format!("{} min {:02} s", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
    }
}

pub(crate) fn bold(text: &str) -> String {
    paint("1", text)
}

pub(crate) fn dim(text: &str) -> String {
    paint("2", text)
}

pub(crate) fn red(text: &str) -> String {
    paint("1;31", text)
}

pub(crate) fn green(text: &str) -> String {
    paint("1;32", text)
}

pub(crate) fn blue(text: &str) -> String {
    paint("1;34", text)
}

fn paint(code: &str, text: &str) -> String {
    static COLOUR: OnceLock<bool> = OnceLock::new();
    let colour = COLOUR.get_or_init(|| {
        env::var_os("NO_COLOR").is_none()
            && std::io::stderr().is_terminal()
            && std::io::stdout().is_terminal()
    });
    if *colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

fn name_of(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy();
    match command.get_args().next() {
        Some(first) => format!("`{name} {} ..`", first.to_string_lossy()),
        None => format!("`{name}`"),
    }
}

/// The last line of a growing file, without control characters.
fn last_line(log: &Path) -> String {
    let tail = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(512)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let tail = tail().unwrap_or_default();
    let line = tail.split(['\n', '\r']).rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim().chars().filter(|c| !c.is_control()).collect()
}

/// The executable called `name` on `PATH` or where an administrator's programs are, which not every `PATH` names.
pub(crate) fn in_path_or_sbin(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(sbin).map(|folder| folder.join(name)).find(|file| file.is_file())
}
