//! Finds processes and cgroups that a test left behind. Nothing is removed: a test that leaves something behind is
//! broken, or has found a broken program.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Result, bail};

use crate::wait::wait_for;

/// The kernel frees namespaces and groups a little after their last user is gone.
const SETTLE: Duration = Duration::from_secs(5);
/// Nothing has to be found this often in a row: what /proc says of a process is not said at one moment.
const CERTAIN: u32 = 3;

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its id.
    pub pid: u32,
    /// What it was started as.
    pub command: String,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}: {}", self.pid, self.command)
    }
}

/// The processes of which the first thread is in a namespace, zombies left out: those that it took to
/// clean up are on their way.
pub fn in_namespace(namespace: &fs::File) -> Result<Vec<Found>> {
    let wanted = namespace.metadata()?;
    let mut found = Vec::new();
    for pid in pids() {
        let same = fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|theirs| theirs.ino() == wanted.ino() && theirs.dev() == wanted.dev());
        if same && let Some(command) = command_of(pid) {
            found.push(Found { pid, command });
        }
    }
    Ok(found)
}

/// The processes with `text` in their command line, this one left out.
pub fn started_with(text: &str) -> Vec<Found> {
    let others = pids().into_iter().filter(|pid| *pid != std::process::id());
    let all = others.filter_map(|pid| Some(Found { pid, command: command_of(pid)? }));
    all.filter(|found| found.command.contains(text)).collect()
}

/// The control groups of these names, wherever they are in the hierarchies that are mounted.
pub fn cgroups(names: &[String]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for point in crate::cgroup::mounts() {
        below(&point, 6, &mut |path| {
            if path.file_name().is_some_and(|name| names.iter().any(|wanted| name == wanted.as_str())) {
                found.push(path.to_owned());
            }
        });
    }
    found
}

/// Fails when the groups or processes that `look` finds do not go within a short time.
pub fn gone<T: fmt::Debug>(what: &str, mut look: impl FnMut() -> Vec<T>) -> Result<()> {
    let mut left = Vec::new();
    let mut nothing = 0;
    let waited = wait_for(what, SETTLE, || {
        let found = look();
        nothing = if found.is_empty() { nothing + 1 } else { 0 };
        if !found.is_empty() {
            left = found;
        }
        (nothing == CERTAIN).then_some(())
    });
    if waited.is_err() {
        bail!("{what} left behind: {left:?}");
    }
    Ok(())
}

/// Lets a guard's failure fail the test; while the test is failing already, it is only printed.
pub fn report(whose: &str, outcome: Result<()>) {
    let Err(e) = outcome else { return };
    assert!(thread::panicking(), "{whose}: {e:#}");
    eprintln!("{whose}: {e:#}");
}

/// `None` for a zombie.
fn command_of(pid: u32) -> Option<String> {
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    (!command.is_empty()).then_some(command)
}

fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn below(folder: &Path, depth: usize, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            visit(&entry.path());
            if depth > 0 {
                below(&entry.path(), depth - 1, visit);
            }
        }
    }
}
