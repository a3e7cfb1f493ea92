//! Pinned links: from the one that is there to the one that is wanted.
//!
//! # Invariants
//! - At every moment one of the two links is attached and pinned, whoever is killed in between.
//! - Nothing is detached that nothing has replaced.

use std::{
    ffi::OsString,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::before::Before;
use crate::kernel::{
    cgroup,
    sys::{self, AttachType},
};

/// Behind the name of a pin: the link that is being replaced. It begins as every link's does, so that whoever unpins a
/// capture finds it.
const ASIDE: &str = "_aside";

/// What went wrong.
#[derive(Debug)]
pub(super) enum LinkError {
    Attach(io::Error),
    Pin(io::Error),
}

/// Where a program is attached.
pub(super) struct Spot<'a> {
    pub(super) cgroup: BorrowedFd<'a>,
    pub(super) at: AttachType,
    pub(super) path: &'a Path,
    /// Whether the program captures a group that it knows by name: such a one may stand anywhere above that group. Any
    /// other would capture whatever it is attached to.
    pub(super) by_name: bool,
}

impl Spot<'_> {
    /// Attaches a program. `former` is the group of the same name that earlier versions attached theirs to, for `before`.
    pub(super) fn attach(
        &self,
        program: BorrowedFd<'_>,
        former: Option<&OwnedFd>,
        before: Option<&mut Before>,
    ) -> Result<(), LinkError> {
        let link = match sys::obj_get(self.path) {
            Ok(link) => link,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let link = self.create(program)?;
                sys::obj_pin(link.as_fd(), self.path).map_err(LinkError::Pin)?;
                if let Some(before) = before {
                    before.made(self.path.to_owned());
                }
                // Of a daemon that was killed while it replaced it.
                return self.end_aside();
            }
            Err(e) => return Err(LinkError::Pin(e)),
        };
        let info = sys::link_info(link.as_fd()).map_err(LinkError::Pin)?;
        let own = cgroup::id(self.cgroup).map_err(LinkError::Pin)?;
        // Its group is gone: it is attached nowhere.
        if info.cgroup == 0 {
            let link = self.create(program)?;
            self.swap(&link)?;
            if let Some(before) = before {
                before.made(self.path.to_owned());
            }
            return Ok(());
        }
        if let Some(before) = before {
            let old = sys::prog_by_id(info.program).map_err(LinkError::Pin)?;
            let former = former.filter(|group| cgroup::id(group.as_fd()).ok() == Some(info.cgroup));
            match former.map(OwnedFd::try_clone).transpose().map_err(LinkError::Pin)? {
                Some(group) if info.cgroup != own => before.moved(self.path.to_owned(), self.at, group, old),
                _ => before.program(self.path.to_owned(), old),
            }
        }
        if self.by_name || info.cgroup == own {
            // First, so that both links have the same program, and whatever one has captured the other one knows.
            sys::link_update(link.as_fd(), program).map_err(LinkError::Attach)?;
        }
        if info.cgroup == own { self.end_aside() } else { self.renew(program) }
    }

    /// Attaches a program by another link in place of the one that is pinned: as the last one of the group.
    pub(super) fn renew(&self, program: BorrowedFd<'_>) -> Result<(), LinkError> {
        let link = self.create(program)?;
        self.swap(&link)
    }

    fn create(&self, program: BorrowedFd<'_>) -> Result<OwnedFd, LinkError> {
        sys::link_create(program, self.cgroup, self.at).map_err(LinkError::Attach)
    }

    /// Pins a link in place of another one, which is detached.
    fn swap(&self, link: &OwnedFd) -> Result<(), LinkError> {
        let aside = aside(self.path);
        fs::rename(self.path, &aside).map_err(LinkError::Pin)?;
        if let Err(e) = sys::obj_pin(link.as_fd(), self.path) {
            let _back = fs::rename(&aside, self.path);
            return Err(LinkError::Pin(e));
        }
        self.end_aside()
    }

    fn end_aside(&self) -> Result<(), LinkError> {
        match remove(&aside(self.path)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(LinkError::Pin(e)),
            _ => Ok(()),
        }
    }
}

/// Detaches what is behind a pinned link, and removes the pin.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let link = sys::obj_get(path)?;
    // Fails where its cgroup is gone, and then there is nothing to detach.
    let _detached = sys::link_detach(link.as_fd());
    fs::remove_file(path)
}

fn aside(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ASIDE);
    PathBuf::from(name)
}
