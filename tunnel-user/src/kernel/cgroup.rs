//! Cgroups: find, create and remove them.
//!
//! # Invariants
//! - It works where no cgroup2 mount is visible (`ip netns exec` gives its command a fresh /sys): a detached mount is used.
//! - A process is moved only where the caller asks for it.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

/// Groups that `exec` makes are called this and its process id.
pub const EXEC_PREFIX: &str = "tunnel-exec-";
/// How long an emptied group may take to become removable: the kernel reaps in the background.
const REMOVE_PATIENCE: Duration = Duration::from_secs(2);

/// What went wrong with a control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No mount is visible and none can be made.
    #[error("no cgroup2 hierarchy is mounted, and a private mount failed: {0}")]
    Mount(#[source] io::Error),
    /// A directory of the hierarchy could not be opened, made or removed.
    #[error("cgroup {name}: {source}")]
    Io {
        /// Which.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A path that leads into no hierarchy.
    #[error("cgroup {0}: no cgroup2 hierarchy is mounted there")]
    NoHierarchy(String),
    /// Deeper in the hierarchy than the programs look, or called as nothing can be.
    #[error("cgroup {0}: a captured group is at most {max} levels below its mount, each with a name of 1 to 255 bytes", max = tunnel_common::group::DEPTH_MAX)]
    TooDeep(String),
}

/// The cgroup2 hierarchy of this process's cgroup namespace.
#[derive(Debug)]
pub struct Hierarchy {
    root: OwnedFd,
}

impl Hierarchy {
    /// Finds the mount, wherever it is, or makes one that only this process sees.
    pub fn open() -> Result<Self, CgroupError> {
        if let Some(path) = mounted()
            && let Ok(dir) = fs::File::open(&path)
        {
            return Ok(Self { root: dir.into() });
        }
        detached_mount("cgroup2").map(|root| Self { root }).map_err(CgroupError::Mount)
    }

    /// Makes an empty group below this process's own, so that limits and accounting go on as they were.
    pub fn create_fresh(&self) -> Result<Fresh, CgroupError> {
        let parent = self.own()?;
        sweep(&parent);
        let name = format!("{EXEC_PREFIX}{}", std::process::id());
        let error = |source: rustix::io::Errno| CgroupError::Io { name: name.clone(), source: source.into() };
        match mkdirat(&parent, &name, Mode::from_raw_mode(0o755)) {
            // Ours by its number: an earlier process of the same id has left it.
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(error(e)),
        }
        let dir = open_dir(&parent, &name).map_err(error)?;
        Ok(Fresh { parent, name, dir, removed: false })
    }

    /// The group that this process is in; the root if that is outside of what is mounted.
    pub fn own(&self) -> Result<OwnedFd, CgroupError> {
        let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let path = text.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
        let path = if path.is_empty() || path.starts_with("..") { "." } else { path };
        open_dir(&self.root, path)
            .or_else(|_| open_dir(&self.root, "."))
            .map_err(|e| CgroupError::Io { name: path.to_owned(), source: e.into() })
    }

    /// Its root.
    pub fn into_root(self) -> OwnedFd {
        self.root
    }
}

/// Opens a group by the path that an operator wrote.
pub fn open_path(path: &Path) -> Result<OwnedFd, CgroupError> {
    fs::File::open(path)
        .map(OwnedFd::from)
        .map_err(|source| CgroupError::Io { name: path.display().to_string(), source })
}

/// Opens a group below another one.
pub fn open_below(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(root, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The inode number of a group, which is its id.
pub fn id(group: BorrowedFd<'_>) -> io::Result<u64> {
    fs::metadata(fd_path(group)).map(|m| m.ino())
}

/// The processes in a group and in those below it.
pub fn processes(group: BorrowedFd<'_>) -> Vec<u32> {
    let mut found = Vec::new();
    let mut dirs = vec![fd_path(group)];
    while let Some(dir) = dirs.pop() {
        let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()));
        let below = fs::read_dir(&dir).into_iter().flatten().flatten();
        dirs.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    found
}

/// A path to a directory that may be mounted nowhere.
pub fn fd_path(dir: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()))
}

/// A group of our own, removed when dropped.
#[derive(Debug)]
pub struct Fresh {
    parent: OwnedFd,
    name: String,
    dir: OwnedFd,
    removed: bool,
}

impl Fresh {
    /// The group.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// `cgroup.procs`, opened for writing: a process that writes "0" to it joins.
    pub fn open_procs(&self) -> io::Result<fs::File> {
        fs::OpenOptions::new().write(true).open(fd_path(self.fd()).join("cgroup.procs"))
    }

    /// The processes that are still in it.
    pub fn processes(&self) -> Vec<u32> {
        processes(self.fd())
    }

    /// Kills whatever is still in it, and removes it.
    pub fn remove(&mut self) -> Result<(), CgroupError> {
        if self.removed {
            return Ok(());
        }
        self.removed = true;
        let error = |source| CgroupError::Io { name: self.name.clone(), source };
        let deadline = Instant::now() + REMOVE_PATIENCE;
        loop {
            kill_all(self.fd());
            match remove_tree(&self.parent, &self.name) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => return Ok(()),
                Err(rustix::io::Errno::BUSY) if Instant::now() < deadline => {
                    #[expect(
                        clippy::disallowed_methods,
                        reason = "the kernel signals nothing when the last dead process has left"
                    )]
                    thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(error(e.into())),
            }
        }
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if let Err(e) = self.remove() {
            tracing::warn!("{e}");
        }
    }
}

/// `cgroup.kill` is there since 5.14; before that, one by one.
fn kill_all(group: BorrowedFd<'_>) {
    if fs::write(fd_path(group).join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for pid in processes(group) {
        let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
        // It may have ended by itself.
        let _gone = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
}

/// Removes a group with those that its processes made below it.
fn remove_tree(parent: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    let dir = open_dir(parent, name)?;
    for entry in fs::read_dir(fd_path(dir.as_fd())).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir())
            && let Some(below) = entry.file_name().to_str()
        {
            remove_tree(&dir, below)?;
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Removes what a killed `exec` left beside us, once its last process has gone. Until then its programs
/// stay attached and refuse that process's connections.
fn sweep(parent: &OwnedFd) {
    for entry in fs::read_dir(fd_path(parent.as_fd())).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.strip_prefix(EXEC_PREFIX)) else { continue };
        if pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists() {
            // Busy while a process lives in it.
            let _later = unlinkat(parent, Path::new(&name), AtFlags::REMOVEDIR);
        }
    }
}

fn open_dir(parent: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
    openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Where the whole cgroup2 hierarchy is mounted.
pub fn mounted() -> Option<PathBuf> {
    mount_point("cgroup2")
}

/// The first mount of this type whose root is the file system's own (proc_pid_mountinfo(5)).
pub fn mount_point(kind: &str) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts(&text, kind).find_map(|(root, point)| (root == "/").then_some(point))
}

/// Where the part of a cgroup2 hierarchy is mounted that a path leads into: of several the nearest, and the topmost.
pub fn mount_of(path: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let around = mounts(&text, "cgroup2").map(|(_, point)| point).filter(|point| path.starts_with(point));
    around.max_by_key(|point| point.components().count())
}

/// The root and the place of each mount of this type.
fn mounts<'t>(mountinfo: &'t str, kind: &'t str) -> impl Iterator<Item = (&'t str, PathBuf)> {
    mountinfo.lines().filter_map(move |line| {
        let (mount, fs) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        // Spaces are written as \040.
        (fs.split(' ').next()? == kind).then(|| (root, PathBuf::from(point.replace("\\040", " "))))
    })
}

/// Mounts a file system without a place: it is gone when the descriptor is.
pub fn detached_mount(kind: &str) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}
