//! What was pinned before a daemon put something of its own there, and how it is put back.
//!
//! # Invariants
//! - The newest goes first, so that what stands in the end is what stood in the beginning.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
};

use aya::maps::{HashMap, MapData};
use tunnel_common::{capture::Listener, names};

use super::links::{self, LinkError, Spot};
use crate::kernel::bpf::BpfError;
use crate::kernel::sys::{self, AttachType};

/// See the module.
#[derive(Default)]
pub(super) struct Before {
    listeners: Vec<(u64, Option<Listener>)>,
    programs: Vec<(PathBuf, OwnedFd)>,
    /// Links to another group.
    moved: Vec<Moved>,
    /// Links that were not there.
    made: Vec<PathBuf>,
}

struct Moved {
    link: PathBuf,
    at: AttachType,
    group: OwnedFd,
    program: OwnedFd,
}

impl Before {
    /// The listeners of a namespace are replaced or forgotten.
    pub(super) fn listener(&mut self, netns: u64, before: Option<Listener>) {
        self.listeners.push((netns, before));
    }

    /// The program behind a pinned link is replaced.
    pub(super) fn program(&mut self, link: PathBuf, before: OwnedFd) {
        self.programs.push((link, before));
    }

    /// A program is attached elsewhere than the one before, which was at `group`.
    pub(super) fn moved(&mut self, link: PathBuf, at: AttachType, group: OwnedFd, program: OwnedFd) {
        self.moved.push(Moved { link, at, group, program });
    }

    /// A link is pinned where there was none.
    pub(super) fn made(&mut self, link: PathBuf) {
        self.made.push(link);
    }

    /// Puts everything back, as far as it can be; the first thing that could not.
    pub(super) fn put_back(self, listeners: &mut HashMap<MapData, u64, Listener>) -> Result<(), BpfError> {
        let mut done = Ok(());
        for (path, program) in self.programs.into_iter().rev() {
            let back = sys::obj_get(&path).and_then(|link| sys::link_update(link.as_fd(), program.as_fd()));
            done = done.and(back.map_err(|source| BpfError::Pin { path, source }));
        }
        for Moved { link, at, group, program } in self.moved.into_iter().rev() {
            let spot = Spot { cgroup: group.as_fd(), at, path: &link, by_name: false };
            let back = spot.renew(program.as_fd()).map_err(|(LinkError::Attach(e) | LinkError::Pin(e))| e);
            done = done.and(back.map_err(|source| BpfError::Pin { path: link, source }));
        }
        for path in self.made {
            let removed = links::remove(&path);
            done = done.and(removed.map_err(|source| BpfError::Pin { path, source }));
        }
        for (netns, listener) in self.listeners.into_iter().rev() {
            let back = match listener {
                Some(listener) => listeners.insert(netns, listener, 0),
                None => listeners.remove(&netns),
            };
            done = done.and(back.map_err(|source| BpfError::Map { name: names::LISTENERS, source }));
        }
        done
    }
}
