//! A kernel that runs beside this one, for as long as its guard is there, and reports events as they happen.
//!
//! # Invariants
//! - Whatever ends this process, SIGKILL included, ends the machine.
//! - It sees this machine's files, and can change none but those of its folder.

use std::{
    env,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::{
    events::{Event, Shared},
    kernels::Kernel,
};
use crate::{
    leftovers::MARK,
    run::{self, Checkout},
    setup,
};

/// What the tests with the most connections need, twice.
const MEMORY: &str = "2G";
/// This program's name among those that are brought along.
pub(super) const INSIDE: &str = "xtask";
/// How long QEMU has to go by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// How often it is looked what happened.
const LOOK: Duration = Duration::from_millis(200);
/// Ends a process group, and removes a folder, when its standard input ends, which the kernel brings about when whoever
/// started it is gone.
const JANITOR: &str = r#"cat >/dev/null; kill -TERM -- "-$1" && sleep 2 && kill -KILL -- "-$1"; rm -rf "$2""#;

/// A booted kernel.
pub(super) struct Machine {
    vng: Child,
    folder: PathBuf,
    janitor: Child,
    /// Its end is the signal to start.
    alive: Option<ChildStdin>,
    known: usize,
}

impl Machine {
    /// Boots a kernel, and has `xtask matrix-guest` run in it; `folder` is what both sides see.
    pub(super) fn boot(checkout: &Checkout, kernel: &Kernel, cpus: u8, folder: &Path) -> Result<Self> {
        let virtme = setup::virtme_bin(checkout);
        let program = Shared(folder).programs().join(INSIDE);
        let inside = [program.as_path(), Path::new("matrix-guest"), folder].map(quoted).join(" ");
        let mut vng = Command::new(virtme.join("vng"));
        vng.arg("--run").arg(&kernel.image);
        // 9p, because virtio-fs wants a daemon; the console, because Debian's kernels have virtio-serial as a module, which
        // nobody loads that early.
        vng.args([
            "--disable-kvm",
            "--force-9p",
            "--verbose",
            "--cpus",
            &cpus.to_string(),
            "--memory",
            MEMORY,
            "--user",
            "root",
        ]);
        vng.arg(format!("--rwdir={}", folder.display())).args(["--", &inside]);
        // It starts its other half by its name.
        let path = env::var_os("PATH").context("PATH is not set")?;
        let path = env::join_paths(
            [virtme, "/usr/sbin".into(), "/sbin".into()].into_iter().chain(env::split_paths(&path)),
        )?;
        vng.env("PATH", path).env("TMPDIR", folder).env(MARK, std::process::id().to_string());
        // A group of its own: vng starts shells that start QEMU.
        vng.current_dir(&checkout.root).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        vng.stderr(File::create(console(folder))?);
        let vng = vng.spawn().context("vng (virtme-ng) does not start")?;
        let mut janitor = Command::new("/bin/sh");
        janitor.args(["-c", JANITOR, "janitor", &vng.id().to_string()]).arg(folder);
        janitor
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .current_dir("/");
        let mut janitor = janitor.spawn().context("starting a shell for the clean-up")?;
        let alive = janitor.stdin.take();
        Ok(Self { vng, folder: folder.to_owned(), janitor, alive, known: 0 })
    }

    /// What happens next: nothing when it is over. `idle` is called meanwhile; its error ends the wait.
    pub(super) fn next(&mut self, mut idle: impl FnMut() -> Result<()>) -> Result<Option<Event>> {
        let mut over = false;
        loop {
            if let Some(event) = Shared(&self.folder).heard(self.known)?.into_iter().next() {
                self.known += 1;
                return Ok(Some(event));
            }
            if over {
                return Ok(None);
            }
            run::check_interrupted()?;
            idle()?;
            // Looked at once more then, because the last event is written before the end.
            over = self.vng.try_wait()?.is_some();
            if !over {
                run::pause(LOOK)?;
            }
        }
    }

    /// What its console has shown so far.
    pub(super) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(console(&self.folder)).unwrap_or_default()).into_owned()
    }

    fn group(&self) -> Result<Pid> {
        Ok(Pid::from_raw(self.vng.id().try_into()?))
    }

    /// Ends all of it.
    fn stop(&mut self) -> Result<()> {
        let group = self.group()?;
        let (mut signal, mut end) = (Signal::SIGTERM, Instant::now() + GRACE);
        // Until nobody is left in it: a zombie that is ours counts, and is taken along.
        while killpg(group, signal) != Err(Errno::ESRCH) {
            self.vng.try_wait()?;
            #[expect(clippy::disallowed_methods, reason = "also after Ctrl-C, when a pause would not wait")]
            std::thread::sleep(Duration::from_millis(20));
            if Instant::now() > end {
                ensure!(signal != Signal::SIGKILL, "processes of group {group} stay, whatever they are sent");
                (signal, end) = (Signal::SIGKILL, Instant::now() + GRACE);
            }
        }
        self.vng.wait()?;
        drop(self.alive.take());
        self.janitor.wait()?;
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            run::show_error(&error.context("ending the machine"));
        }
    }
}

fn console(folder: &Path) -> PathBuf {
    folder.join("console.log")
}

/// A word for a shell.
fn quoted(word: &Path) -> String {
    format!("'{}'", word.display().to_string().replace('\'', r"'\''"))
}
