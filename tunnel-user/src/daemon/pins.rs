//! Where captures are pinned, so that they outlive the daemon and the next one finds them.
//!
//! Enters: the configuration's bpffs and captures. Leaves: the folder of each, and the lock over all. Invariant: a name that
//! a configuration gives to a group is one folder, in every version of this program. It never pins anything itself.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use super::captures::bpf_failure;
use crate::{
    config::{self, CgroupRef, Config},
    daemon::takeover::fnv1a,
    process::exit::{Cause, Failure},
    sources::capture::bpf,
};

/// Where a capture is pinned: a folder named after the group, so that the next daemon finds it.
pub(super) fn pin_dir(config: &Config, capture: &config::Capture) -> Option<PathBuf> {
    let name = match &capture.cgroup {
        CgroupRef::Path(path) => path.display().to_string(),
        CgroupRef::Unit(unit) => unit.clone(),
        CgroupRef::Fresh => return None,
    };
    // bpffs allows no dots in names; every other byte that is not a letter or digit goes the same way,
    // and the hash keeps names apart that would become one.
    let plain: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let plain = plain.trim_matches('_');
    let tail = &plain[plain.len().saturating_sub(PIN_NAME_MAX)..];
    Some(config.daemon.bootstrap.bpffs.join("tunnel").join(format!("{tail}_{:016x}", fnv1a(name.as_bytes()))))
}

/// The most of a group's name that its folder shows.
const PIN_NAME_MAX: usize = 64;

pub(super) fn lock_pins(bpffs: &Path) -> Result<OwnedFd, Failure> {
    ensure_bpffs(bpffs)?;
    bpf::lock(bpffs).map_err(bpf_failure)
}

/// Mounts a bpffs where the configuration says there is one and there is none.
fn ensure_bpffs(path: &Path) -> Result<(), Failure> {
    /// `BPF_FS_MAGIC` of `linux/magic.h`.
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let is_bpffs = || {
        rustix::fs::statfs(path).is_ok_and(|s| {
            #[expect(clippy::unnecessary_cast, reason = "its width depends on the architecture")]
            let kind = s.f_type as i64;
            kind == BPF_FS_MAGIC
        })
    };
    if is_bpffs() {
        return Ok(());
    }
    let mounted = fs::create_dir_all(path).and_then(|()| {
        rustix::mount::mount("bpf", path, "bpf", rustix::mount::MountFlags::empty(), None)
            .map_err(io::Error::from)
    });
    mounted.map_err(|e| {
        let remedy = format!(
            "Mount it as root, `mount -t bpf bpf {}`, or set daemon.bpffs to where it is.",
            path.display()
        );
        let what = format!("{} is no bpffs, and mounting one failed: {e}", path.display());
        if e.kind() == io::ErrorKind::PermissionDenied {
            Failure::Privilege(Cause::new(what, remedy))
        } else {
            Failure::Other(Cause::new(what, remedy))
        }
    })
}
