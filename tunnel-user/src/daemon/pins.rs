//! Where captures are pinned, so that they outlive the daemon and the next one finds them.
//!
//! # Invariants
//! - A name that a configuration gives to a group is one folder, in every version of this program.

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

/// `tunnel detach`: ends the captures of a configuration, whether or not a daemon runs.
pub fn detach(config: &Config) -> Result<(), Failure> {
    for capture in &config.captures {
        if let Some(dir) = pin_dir(config, capture).filter(|dir| dir.exists()) {
            let _lock = bpf::lock(&config.daemon.bootstrap.bpffs).map_err(bpf_failure)?;
            bpf::unpin(&dir).map_err(bpf_failure)?;
        }
    }
    for address in config.redirects.iter().flat_map(|r| &r.listen) {
        tracing::warn!(%address, "nothing is attached that redirects connections there: the rules are yours to remove");
    }
    Ok(())
}

/// Where a capture is pinned.
pub(super) fn pin_dir(config: &Config, capture: &config::Capture) -> Option<PathBuf> {
    (capture.cgroup != CgroupRef::Fresh).then(|| pin_dir_of(config, &capture.cgroup.name()))
}

/// Where the capture of a group is pinned: a folder named after it, so that the next daemon finds it.
pub(super) fn pin_dir_of(config: &Config, name: &str) -> PathBuf {
    // bpffs allows no dots in names; every other byte that is not a letter or digit goes the same way,
    // and the hash keeps names apart that would become one.
    let plain: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let plain = plain.trim_matches('_');
    let tail = &plain[plain.len().saturating_sub(PIN_NAME_MAX)..];
    config.daemon.bootstrap.bpffs.join("tunnel").join(format!("{tail}_{:016x}", fnv1a(name.as_bytes())))
}

/// The most of a group's name that its folder shows.
const PIN_NAME_MAX: usize = 64;

/// Keeps other daemons from what is pinned, where anything of these captures is.
pub(super) fn lock_if_pinned<'a>(
    config: &Config,
    captures: impl IntoIterator<Item = &'a config::Capture>,
) -> Result<Option<OwnedFd>, Failure> {
    let pinning = captures.into_iter().any(|c| pin_dir(config, c).is_some());
    pinning.then(|| lock_pins(&config.daemon.bootstrap.bpffs)).transpose()
}

fn lock_pins(bpffs: &Path) -> Result<OwnedFd, Failure> {
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
