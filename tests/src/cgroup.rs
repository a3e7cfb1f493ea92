//! A control group for a test's own processes.

use std::{
    fs,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};

use crate::{janitor::Janitor, leftovers};

/// The kernel needs a moment after the last process is gone.
const CLEAN_UP: &str = r#"echo 1 >"$1/cgroup.kill"; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
rmdir "$1" && exit 0; sleep 0.1; done; exit 1"#;

/// A group, called `tunnel-test-PID-N`; its processes are killed and it is removed in the end.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    janitor: Janitor,
}

impl Cgroup {
    /// Makes one.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = mounts().into_iter().next().context("no cgroup2 hierarchy is mounted")?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("tunnel-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let janitor = Janitor::new(CLEAN_UP, &path.display().to_string())?;
        Ok(Self { path, janitor })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a command join it.
    pub fn adopt(&self, command: &mut Command) -> Result<()> {
        let procs = fs::OpenOptions::new().write(true).open(self.path.join("cgroup.procs"))?;
        let procs = Arc::new(procs);
        // SAFETY: between fork and exec the closure makes one system call; it does not allocate.
        unsafe { command.pre_exec(move || (&*procs).write_all(b"0")) };
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let cleaned = self.janitor.finish().and_then(|()| {
            ensure!(!self.path.exists(), "it is still there");
            Ok(())
        });
        leftovers::report(&self.path.display().to_string(), cleaned);
    }
}

/// Where cgroup2 hierarchies are mounted.
pub fn mounts() -> Vec<PathBuf> {
    mounted("cgroup2")
}

/// Where file systems of a kind are mounted.
pub fn mounted(kind: &str) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let point = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let same = right.split(' ').next() == Some(kind);
        same.then(|| left.split(' ').nth(4).map(PathBuf::from))?
    };
    table.lines().filter_map(point).collect()
}
