//! Programs of others on a cgroup and the cgroups above it: the one that prevents others from being attached, and those that
//! filter packets.
//!
//! A program is reported by its cgroup, id and name, so that an operator finds its owner. Nothing is detached.

use std::{
    fmt, fs,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use super::{
    cgroup,
    sys::{self, AttachType, Attached},
};

/// The most groups, one in the other, that are looked at: twice what a capture may have above it.
const LEVELS_MAX: u32 = 64;

/// A program of somebody else's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The path of the group that it is attached to.
    pub cgroup: String,
    /// By which bpftool knows it.
    pub id: u32,
    /// As its loader called it; may be empty.
    pub name: String,
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() { "without a name" } else { &self.name };
        write!(f, "program {} ({name}) on cgroup {}", self.id, self.cgroup)
    }
}

/// The program that was attached without BPF_F_ALLOW_MULTI to the group or above it, for which the kernel says EPERM to
/// whoever attaches another one (`hierarchy_allows_attach`, kernel/bpf/cgroup.c).
pub fn exclusive(group: BorrowedFd<'_>, at: AttachType) -> Option<Program> {
    for group in upwards(group) {
        let Ok(attached) = sys::prog_query(group.as_fd(), at) else { continue };
        if let Attached { programs, multi: false } = &attached
            && let [id] = programs[..]
        {
            return Some(program(&group, id));
        }
    }
    None
}

/// The programs that see the packets of a group's sockets, of itself and of the groups above it.
pub fn filters(group: BorrowedFd<'_>) -> Vec<Program> {
    upwards(group).iter().flat_map(own_filters).collect()
}

/// Those of itself.
pub fn own_filters(group: &OwnedFd) -> Vec<Program> {
    let attached = [AttachType::Egress, AttachType::Ingress]
        .map(|at| sys::prog_query(group.as_fd(), at).unwrap_or_default().programs);
    let mut found: Vec<_> = attached.concat().into_iter().map(|id| program(group, id)).collect();
    found.dedup();
    found
}

fn program(group: &OwnedFd, id: u32) -> Program {
    let name = sys::prog_by_id(id).and_then(|program| sys::prog_name(program.as_fd()));
    let cgroup = fs::read_link(cgroup::fd_path(group.as_fd())).unwrap_or_default();
    Program { cgroup: cgroup.display().to_string(), id, name: name.unwrap_or_default() }
}

/// A group and those above it, as far as they can be seen.
fn upwards(group: BorrowedFd<'_>) -> Vec<OwnedFd> {
    let mut found: Vec<OwnedFd> = group.try_clone_to_owned().into_iter().collect();
    while let Some(last) = found.last()
        && found.len() < LEVELS_MAX as usize
        && let Ok(above) = cgroup::open_below(last.as_fd(), Path::new(".."))
        // Above the root of a mount is a directory of another file system, or the root itself.
        && is_cgroup(&above)
        && cgroup::id(above.as_fd()).ok() != cgroup::id(last.as_fd()).ok()
    {
        found.push(above);
    }
    found
}

fn is_cgroup(dir: &OwnedFd) -> bool {
    /// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
    const CGROUP2: i64 = 0x6367_7270;
    rustix::fs::fstatfs(dir).is_ok_and(|s| {
        #[expect(clippy::unnecessary_cast, reason = "its width depends on the architecture")]
        let kind = s.f_type as i64;
        kind == CGROUP2
    })
}
