//! What a capture pins in its folder of a bpffs: which links and maps, whether those that are there are of this version, and how
//! they are removed.
//!
//! # Invariants
//! - A map that is pinned is used only if it has the sizes that this version's programs need.
//! - Links go before maps: nothing is captured that finds no map.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use tunnel_common::names;

use super::{BpfError, OBJECT, PROGRAMS};
use crate::{
    kernel::{
        map::Mismatch,
        sys::{self, MapInfo},
    },
    sources::capture::links,
};

/// Maps that are pinned with the links.
pub(super) const PINNED: [&str; 7] = [
    names::FLOWS,
    names::ORIGINS,
    names::LISTENERS,
    names::SOCKETS,
    names::OWN,
    names::SOURCES_V4,
    names::SOURCES_V6,
];

/// Compares the maps that are pinned here with those that this version makes. The kernel reads and writes as much as a map says,
/// and aya takes what is pinned for what the object declares.
pub(super) fn check(dir: &Path) -> Result<(), BpfError> {
    let object = aya_obj::Object::parse(OBJECT).map_err(|e| BpfError::Load(Box::new(e.into())))?;
    for name in PINNED {
        let path = map_path(dir, name);
        let pinned = match sys::obj_get(&path) {
            Ok(pinned) => pinned,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(BpfError::Pin { path, source }),
        };
        let declared = object.maps.get(name).ok_or(BpfError::Missing(name))?;
        let needs = MapInfo {
            kind: declared.map_type(),
            key_size: declared.key_size(),
            value_size: declared.value_size(),
            max_entries: declared.max_entries(),
        };
        let has = match sys::map_info(pinned.as_fd()) {
            Ok(has) => has,
            Err(source) => return Err(BpfError::Pin { path, source }),
        };
        Mismatch::check(has, needs).map_err(|why| BpfError::PinnedMap { name, path, why })?;
    }
    Ok(())
}

/// Removes what another version has pinned here and this one does not use: programs that have another name now, which it
/// detaches, and maps that mean something else. The caller keeps other daemons away.
pub(super) fn forget_other_versions(dir: &Path) -> Result<(), BpfError> {
    let ours = PROGRAMS.into_iter().map(|(name, _)| link_path(dir, name));
    let ours: Vec<_> = ours.chain(PINNED.into_iter().map(|name| map_path(dir, name))).collect();
    let entries = fs::read_dir(dir).map_err(|source| BpfError::Pin { path: dir.to_owned(), source })?;
    let mut done = Ok(());
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| !ours.contains(path)) {
        let removed = remove_pin(&path);
        done = done.and(removed.map_err(|source| BpfError::Pin { path, source }));
    }
    done
}

pub(super) fn map_path(dir: &Path, map: &str) -> PathBuf {
    dir.join(format!("{map}_{}", names::ABI))
}

fn is_link(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("link_"))
}

/// Removes a pin; what is behind a link is detached.
fn remove_pin(path: &Path) -> io::Result<()> {
    if is_link(path) { links::remove(path) } else { fs::remove_file(path) }
}

pub(super) fn link_path(dir: &Path, program: &str) -> PathBuf {
    dir.join(format!("link_{program}"))
}

/// Keeps other daemons from changing what is pinned in this bpffs, as long as the descriptor is open.
pub fn lock(bpffs: &Path) -> Result<OwnedFd, BpfError> {
    let pin_error = |source| BpfError::Pin { path: bpffs.to_owned(), source };
    let dir = fs::File::open(bpffs).map_err(pin_error)?;
    rustix::fs::flock(&dir, rustix::fs::FlockOperation::LockExclusive).map_err(|e| pin_error(e.into()))?;
    Ok(dir.into())
}

/// Detaches a pinned capture: removes its links first, then its maps and the folder. What is not there is
/// no error.
pub fn unpin(dir: &Path) -> Result<(), BpfError> {
    let pin_error = |path: &Path| {
        let path = path.to_owned();
        move |source| BpfError::Pin { path, source }
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(pin_error(dir)(e)),
    };
    let mut paths: Vec<_> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    // connect first: what is captured a moment longer would find no origin.
    paths.sort_by_key(|p| (!is_link(p), !p.to_string_lossy().contains("connect")));
    let mut done = Ok(());
    for path in paths {
        // What cannot be removed keeps nothing else.
        done = done.and(remove_pin(&path).map_err(pin_error(&path)));
    }
    done?;
    fs::remove_dir(dir).map_err(pin_error(dir))?;
    if let Some(ours) = dir.parent() {
        // Fails while another capture has its folder there.
        let _in_use = fs::remove_dir(ours);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Capture, Lifetime, Spec},
        *,
    };
    use crate::sources::capture::rules::Rules;

    /// A pinned map whose keys or values have another size is refused by its name and stays; one of this version is adopted.
    #[test]
    fn a_pinned_map_of_another_size_is_refused_by_its_name_and_stays_and_one_of_this_version_is_adopted() {
        /// `BPF_MAP_TYPE_HASH` of `linux/bpf.h`.
        const HASH: u32 = 1;
        // A bpffs of its own, in a mount namespace of the thread's own.
        let tested = std::thread::spawn(|| {
            use nix::{mount::MsFlags, sched::CloneFlags};
            let (none, fs) = (None::<&str>, tempfile::tempdir().unwrap());
            nix::sched::unshare(CloneFlags::CLONE_NEWNS).expect("this takes root: run the tests as root");
            nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            nix::mount::mount(Some("bpf"), fs.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
            let dir = fs.path().join("capture");
            let lifetime = Lifetime::Pinned(dir.clone());
            let spec = Spec { on_failure: 0, generation: 1, for_proxy: false, group: None, lifetime };
            let load = || Capture::load(&spec, &Rules::default()).map(drop);
            load().expect("nothing is pinned");
            load().expect("what this version has pinned is its own");
            let flows = map_path(&dir, names::FLOWS);
            for (key, value, said) in
                [(48, 56, "has values of 56 bytes, this version needs 48"), (40, 48, "has keys of 40 bytes")]
            {
                fs::remove_file(&flows).unwrap();
                let other = sys::map_create(HASH, key, value, 16, 0).unwrap();
                sys::obj_pin(other.as_fd(), &flows).unwrap();
                let refused = load().expect_err("another size").summary();
                let wanted = format!("pinned map FLOWS {said}");
                assert!(
                    refused.starts_with(&wanted) && refused.contains(&flows.display().to_string()),
                    "{refused}"
                );
                assert!(flows.exists(), "it is somebody's");
            }
            fs::remove_file(&flows).unwrap();
            load().expect("nothing stands in the way any more");
            nix::mount::umount2(fs.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        });
        tested.join().unwrap();
    }
}
