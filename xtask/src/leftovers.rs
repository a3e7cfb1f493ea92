//! What a run may leave behind on the machine, and whether it did. Nothing is removed: a test that leaves something is a broken
//! test.
//!
//! # Invariants
//! - Anything that a test or the demo makes has a name or a mark by which it is found here.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::run::{self, Checkout};

/// Set in the environment of everything that a run of the tests starts.
pub(crate) const MARK: &str = "TUNNEL_TEST_RUN";

/// How network namespaces made by tests and by the demo are called.
const NAMESPACES: [&str; 2] = ["tt-", "td-"];

/// How network devices made by tests and by the demo are called.
const DEVICES: [&str; 2] = ["tt", "td"];

/// How cgroups, pinned objects and kernel programs of ours are called.
const OURS: [&str; 2] = ["tunnel-", "tunnel_"];

/// The kernel frees sockets, programs and namespaces a little after their last user is gone.
const SETTLE: Duration = Duration::from_secs(5);

/// Everything of ours on this machine at one moment, each with its kind.
pub(crate) struct Snapshot(BTreeSet<String>);

impl Snapshot {
    pub(crate) fn take(checkout: &Checkout) -> Self {
        let mut found = BTreeSet::new();
        for name in names_in(Path::new("/run/netns")).filter(|name| begins(name, &NAMESPACES)) {
            found.insert(format!("network namespace {name}"));
        }
        for name in names_in(Path::new("/sys/class/net")).filter(|name| begins(name, &DEVICES)) {
            found.insert(format!("network device {name}"));
        }
        for (point, kind) in mounts() {
            match kind.as_str() {
                "cgroup2" | "cgroup" => below(&point, 6, &mut |path| {
                    if begins(&name_of(path), &OURS) {
                        found.insert(format!("cgroup {}", path.display()));
                    }
                }),
                "bpf" => {
                    if begins(&name_of(&point), &["tunnel"]) {
                        found.insert(format!("bpffs mounted at {}", point.display()));
                    }
                    below(&point, 6, &mut |path| {
                        if begins(&name_of(path), &["tunnel"]) {
                            found.insert(format!("pinned object {}", path.display()));
                        }
                    });
                }
                _ => {}
            }
        }
        // Sockets, locks and lists of daemons that have ended.
        for folder in ["/run/tunnel", "/tmp/tunnel-0"] {
            for name in names_in(Path::new(folder)) {
                found.insert(format!("runtime file {folder}/{name}"));
            }
        }
        programs(&mut found);
        processes(checkout, &mut found);
        Self(found)
    }

    /// Fails with the names of what is there now and was not in `self`.
    pub(crate) fn compare(&self, checkout: &Checkout) -> Result<()> {
        let end = Instant::now() + SETTLE;
        loop {
            let now = Self::take(checkout);
            let left: Vec<_> = now.0.difference(&self.0).cloned().collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("left behind on this machine:\n  {}", left.join("\n  "));
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Whether a control group can be given a limit for the memory of TCP alone, which tests of memory pressure take.
pub(crate) fn limits_tcp_memory() -> bool {
    mounts().iter().any(|(point, _)| point.join("memory.kmem.tcp.limit_in_bytes").exists())
}

/// Mount points and their file systems' kinds.
fn mounts() -> Vec<(PathBuf, String)> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?.replace("\\040", " ");
        Some((PathBuf::from(point), right.split(' ').next()?.to_owned()))
    };
    table.lines().filter_map(parse).collect()
}

/// Kernel programs of ours; bpftool is the only reader of their names that needs no code here.
fn programs(found: &mut BTreeSet<String>) {
    let Some(bpftool) = run::in_path_or_sbin("bpftool") else {
        return;
    };
    let Ok(list) = run::output(Command::new(bpftool).args(["prog", "list"])) else {
        return;
    };
    for line in list.lines().filter(|line| line.starts_with(|first: char| first.is_ascii_digit())) {
        let mut words = line.split_whitespace();
        let (id, name) = (words.next().unwrap_or_default(), words.skip_while(|word| *word != "name").nth(1));
        if let Some(name) = name.filter(|name| begins(name, &OURS)) {
            found.insert(format!("kernel program {name} (id {})", id.trim_end_matches(':')));
        }
    }
}

/// Processes of ours: started from the target folder, or carrying the mark of a test run.
fn processes(checkout: &Checkout, found: &mut BTreeSet<String>) {
    let me = std::process::id().to_string();
    let mark = format!("{MARK}=");
    for pid in names_in(Path::new("/proc")).filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
        let folder = Path::new("/proc").join(&pid);
        let ours = fs::read_link(folder.join("exe")).is_ok_and(|exe| exe.starts_with(&checkout.target));
        let marked = fs::read(folder.join("environ"))
            .is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one.starts_with(mark.as_bytes())));
        if pid == me || !(ours || marked) {
            continue;
        }
        let command = fs::read(folder.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        // A process without a command line is a zombie, which its parent's end takes along.
        if !command.is_empty() {
            found.insert(format!("process {pid}: {command:.120}"));
        }
    }
}

fn below(folder: &Path, depth: usize, visit: &mut dyn FnMut(&Path)) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let path = entry.path();
        visit(&path);
        if kind.is_dir() && depth > 0 {
            below(&path, depth - 1, visit);
        }
    }
}

fn names_in(folder: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| name_of(&entry.path()))
}

fn name_of(path: &Path) -> String {
    String::from_utf8_lossy(path.file_name().unwrap_or_default().as_bytes()).into_owned()
}

fn begins(name: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}
