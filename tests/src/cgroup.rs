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

/// The kernel needs a moment after the last process is gone. The first version of control groups has no `cgroup.kill`.
const CLEAN_UP: &str = r#"if [ -e "$1/cgroup.kill" ]; then echo 1 >"$1/cgroup.kill"
else kill -KILL $(cat "$1/cgroup.procs"); fi; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
find "$1" -mindepth 1 -depth -type d -exec rmdir {} ';'; rmdir "$1" && exit 0; sleep 0.1; done; exit 1"#;

/// A group, called `tunnel-test-PID-N`; its processes are killed, and it is removed with those below it in the end.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    janitor: Janitor,
}

impl Cgroup {
    /// Makes one.
    pub fn new() -> Result<Self> {
        Self::below(&first_mount()?, "")
    }

    /// Makes one that is called as systemd's slices are, `tunnel-test-PID-N.slice`.
    pub fn slice() -> Result<Self> {
        Self::below(&first_mount()?, ".slice")
    }

    /// Makes one whose TCP sockets get so many bytes of memory together, and what is more is refused. Only the first
    /// version of control groups has a limit for them alone, and many machines have no such hierarchy: says so, and
    /// `None`.
    pub fn with_tcp_memory(bytes: u64) -> Result<Option<Self>> {
        const LIMIT: &str = "memory.kmem.tcp.limit_in_bytes";
        let Some(root) = mounted("cgroup").into_iter().find(|root| root.join(LIMIT).exists()) else {
            println!("NOT tested: no hierarchy of cgroup v1 with the memory controller is mounted");
            return Ok(None);
        };
        let group = Self::below(&root, "")?;
        fs::write(group.path.join(LIMIT), bytes.to_string()).context(LIMIT)?;
        Ok(Some(group))
    }

    fn below(root: &Path, suffix: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("tunnel-test-{}-{number}{suffix}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let janitor = Janitor::new(CLEAN_UP, &path.display().to_string())?;
        Ok(Self { path, janitor })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The most that its TCP sockets have had; what cannot be refused is beyond the limit.
    pub fn most_tcp_memory(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.path.join("memory.kmem.tcp.max_usage_in_bytes"))?.trim().parse()?)
    }

    /// Makes a command join it.
    pub fn adopt(&self, command: &mut Command) -> Result<()> {
        adopt(&self.path, command)
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

/// Makes a command join a group.
pub fn adopt(group: &Path, command: &mut Command) -> Result<()> {
    let procs = fs::OpenOptions::new().write(true).open(group.join("cgroup.procs"))?;
    let procs = Arc::new(procs);
    // SAFETY: between fork and exec the closure makes one system call; it does not allocate.
    unsafe { command.pre_exec(move || (&*procs).write_all(b"0")) };
    Ok(())
}

fn first_mount() -> Result<PathBuf> {
    const MISSING: &str =
        "no cgroup2 hierarchy is mounted, which captures and benchmarks take: mount -t cgroup2 none FOLDER";
    mounts().into_iter().next().context(MISSING)
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
