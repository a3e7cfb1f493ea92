//! Where the programs of a capture are attached, and by whom.
//!
//! # Invariants
//! - `connect` is attached last, detached first, and never twice for one capture longer than it takes to replace a link.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::PoisonError,
};

use aya::programs::Program;
use tunnel_common::names;

use super::{Capture, Lifetime, PROGRAMS, link_path, program_fd, unpin};
use crate::kernel::bpf::BpfError;
use crate::{
    kernel::{
        blockers,
        sys::{self, AttachType},
    },
    sources::capture::{
        before::Before,
        links::{self, LinkError, Spot},
    },
};

/// Whose programs are attached through pinned links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This daemon's.
    Us,
    /// A later daemon's, which has adopted them.
    Another,
    /// There are none.
    Nobody,
}

impl Capture {
    /// Whether the programs know the captured group by its name, and are attached above it.
    pub fn is_by_name(&self) -> bool {
        self.by_name
    }

    /// Attaches every program to `cgroup`, or takes over the links that an earlier daemon pinned. If one fails, those before
    /// it are detached again. `group` is the captured group itself, if it exists.
    pub fn attach(&mut self, cgroup: BorrowedFd<'_>, group: Option<&OwnedFd>) -> Result<(), BpfError> {
        match self.lifetime.clone() {
            Lifetime::Cgroup => {
                for (name, at) in PROGRAMS {
                    let fd = program_fd(&self.ebpf, name)?;
                    sys::prog_attach(fd.as_fd(), cgroup, at)
                        .map_err(|source| attach_error(name, cgroup, at, source))?;
                }
                Ok(())
            }
            Lifetime::Pinned(dir) => {
                let attached = PROGRAMS.into_iter().try_for_each(|(name, at)| {
                    if self.is_groups_own(name) {
                        return group.map_or(Ok(()), |group| self.attach_to_group(group));
                    }
                    self.link((name, at), cgroup, &dir, |spot, program, before| {
                        spot.attach(program, group, before)
                    })
                });
                // A capture that is half attached captures without answering getpeername, or worse. One that was
                // there before stays: it refuses connections while no daemon listens, which nothing that
                // fails may turn into plaintext.
                if attached.is_err() && !self.adopted {
                    let _best_effort = unpin(&dir);
                }
                attached
            }
        }
    }

    /// Attaches what belongs to the captured group itself, where the others are above it.
    pub fn attach_to_group(&self, group: &OwnedFd) -> Result<(), BpfError> {
        let Lifetime::Pinned(dir) = &self.lifetime else { return Ok(()) };
        for which in PROGRAMS.into_iter().filter(|(name, _)| self.is_groups_own(name)) {
            let done = self.link(which, group.as_fd(), dir, |spot, program, before| {
                match spot.attach(program, None, before) {
                    // It has gone meanwhile.
                    Err(LinkError::Attach(e))
                        if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) =>
                    {
                        Ok(())
                    }
                    done => done,
                }
            });
            done?;
        }
        Ok(())
    }

    /// Whether a program stays with the captured group where the others are attached above it. At the root, `getsockopt` would
    /// cost every call of every program on this node 0.17 µs, for an answer that only proxies ask for; and so would
    /// `setsockopt`.
    fn is_groups_own(&self, name: &str) -> bool {
        self.by_name && (name == names::SETSOCKOPT || !self.for_proxy && name == names::GETSOCKOPT)
    }

    /// Attaches the programs behind all others that are attached to `cgroup`.
    pub fn attach_last(&self, cgroup: BorrowedFd<'_>) -> Result<(), BpfError> {
        let Lifetime::Pinned(dir) = &self.lifetime else { return Ok(()) };
        let above = PROGRAMS.into_iter().filter(|(name, _)| !self.is_groups_own(name));
        above
            .into_iter()
            .try_for_each(|which| self.link(which, cgroup, dir, |spot, program, _| spot.renew(program)))
    }

    fn link(
        &self,
        (name, at): (&'static str, AttachType),
        cgroup: BorrowedFd<'_>,
        dir: &Path,
        work: impl FnOnce(&Spot<'_>, BorrowedFd<'_>, Option<&mut Before>) -> Result<(), LinkError>,
    ) -> Result<(), BpfError> {
        let path = link_path(dir, name);
        let program = program_fd(&self.ebpf, name)?;
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let spot = Spot { cgroup, at, path: &path, by_name: self.by_name };
        let done = work(&spot, program.as_fd(), before.as_mut());
        done.map_err(|e| match e {
            LinkError::Attach(source) => attach_error(name, cgroup, at, source),
            LinkError::Pin(source) => BpfError::Pin { path: path.clone(), source },
        })
    }

    /// The id of the program that decides on IPv4 connections: by it its place among others is seen.
    pub fn connect_id(&self) -> Option<u32> {
        match self.ebpf.program(names::CONNECT4) {
            Some(Program::CgroupSockAddr(p)) => p.info().map(|i| i.id()).ok(),
            _ => None,
        }
    }

    /// Whose programs are behind the pinned links.
    pub fn owner(&self) -> Owner {
        let Lifetime::Pinned(dir) = &self.lifetime else { return Owner::Nobody };
        let behind =
            sys::obj_get(&link_path(dir, names::CONNECT4)).and_then(|link| sys::link_info(link.as_fd()));
        let ours = self.connect_id();
        match behind {
            Ok(link) if Some(link.program) == ours => Owner::Us,
            Ok(_) => Owner::Another,
            Err(_) => Owner::Nobody,
        }
    }

    /// Captures no new connections; what is captured goes on, and still has its answers.
    pub fn detach_connect(&self) -> Result<(), BpfError> {
        let Lifetime::Pinned(dir) = &self.lifetime else { return Ok(()) };
        for name in [names::CONNECT4, names::CONNECT6] {
            let path = link_path(dir, name);
            match links::remove(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(BpfError::Pin { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Why a program cannot be attached: root, too, is told EPERM where another program keeps it away.
fn attach_error(name: &'static str, cgroup: BorrowedFd<'_>, at: AttachType, source: io::Error) -> BpfError {
    match source.raw_os_error() {
        Some(libc::EPERM) => match blockers::exclusive(cgroup, at) {
            Some(by) => BpfError::Blocked { name, by },
            None => BpfError::Attach { name, source },
        },
        Some(libc::E2BIG) => BpfError::Full { name },
        _ => BpfError::Attach { name, source },
    }
}
