//! A bpffs of a test's own, for daemons that pin what they load.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};

use crate::{cgroup, janitor::Janitor, leftovers, world::World};

/// What is pinned in it goes with the mount.
const CLEAN_UP: &str = r#"umount "$1""#;

/// A mount; it and what is pinned there are gone in the end.
#[derive(Debug)]
pub struct BpfFs {
    path: PathBuf,
    janitor: Janitor,
}

impl BpfFs {
    /// Mounts one.
    pub fn new(world: &World) -> Result<Self> {
        let path = tempfile::Builder::new().prefix("bpffs-").tempdir_in(world.folder())?.keep();
        const NONE: Option<&str> = None;
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), NONE).context("mounting a bpffs")?;
        let janitor = Janitor::new(CLEAN_UP, &path.display().to_string())?;
        Ok(Self { path, janitor })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As a line of a configuration file's `[daemon]`.
    pub fn toml(&self) -> String {
        format!("bpffs = \"{}\"\n", self.path.display())
    }

    /// What is pinned.
    pub fn pins(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                // The kernel puts maps.debug and progs.debug into every bpffs.
                let is_kernels = entry.path().extension().is_some_and(|e| e == "debug");
                if is_folder {
                    folders.push(entry.path());
                } else if !is_kernels {
                    found.push(entry.path());
                }
            }
        }
        found
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        let cleaned = self.janitor.finish().and_then(|()| {
            ensure!(!cgroup::mounted("bpf").contains(&self.path), "it is still mounted");
            Ok(())
        });
        leftovers::report(&self.path.display().to_string(), cleaned);
    }
}
