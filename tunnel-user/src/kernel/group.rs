//! A captured cgroup, identified by a path or by the name of a systemd unit.
//!
//! The programs are attached to a cgroup that lasts, the root of the hierarchy or of what is mounted of it, and decide by names.
//! What this module finds is used to look at processes only, so that a capture never depends on how soon it is found.

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::fs::{AtFlags, statat};
use tunnel_common::group::{self, DEPTH_MAX, Name};

use super::cgroup::{self, CgroupError, Hierarchy};

/// A group that may be removed and made again.
#[derive(Debug)]
pub struct Group {
    called: String,
    place: Place,
    now: Mutex<Option<Found>>,
}

#[derive(Debug)]
enum Place {
    /// Whatever happens, it is this directory.
    Fixed,
    Path {
        root: OwnedFd,
        names: Vec<OsString>,
    },
    Unit {
        root: OwnedFd,
        unit: String,
    },
}

/// What bears the name.
#[derive(Clone, Debug)]
struct Found {
    dir: Arc<OwnedFd>,
    id: u64,
}

/// What has become of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Nothing new.
    None,
    /// There was none of the name, and now there is.
    Appeared,
    /// It was removed, and made again.
    MadeAnew,
    /// It was removed.
    Gone,
}

/// What the programs are told of a group that they know by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByName {
    /// [`group::BY_PATH`] or [`group::BY_UNIT`].
    pub kind: u32,
    /// Below which group, and how far.
    pub place: group::Place,
    /// The names, each with its index.
    pub names: Vec<(u32, Name)>,
}

impl Group {
    /// One that nobody makes again.
    pub fn fixed(dir: OwnedFd, called: &str) -> Result<Self, CgroupError> {
        let id = cgroup::id(dir.as_fd()).map_err(|source| io_error(called, source))?;
        let found = Found { dir: Arc::new(dir), id };
        Ok(Self { called: called.to_owned(), place: Place::Fixed, now: Mutex::new(Some(found)) })
    }

    /// The group at a path, which need not exist.
    pub fn at(path: &Path) -> Result<Self, CgroupError> {
        let called = path.display().to_string();
        let full = resolve(path).map_err(|source| io_error(&called, source))?;
        let mount = cgroup::mount_of(&full).ok_or_else(|| CgroupError::NoHierarchy(called.clone()))?;
        let root = cgroup::open_path(&mount)?;
        let below = full.strip_prefix(&mount).unwrap_or(&full);
        let names: Vec<OsString> = below.iter().map(ToOwned::to_owned).collect();
        if names.is_empty() {
            return Self::fixed(root, &called);
        }
        let levels = u32::try_from(names.len()).unwrap_or(u32::MAX);
        if levels > DEPTH_MAX || names.iter().any(|n| Name::new(n.as_bytes()).is_none()) {
            return Err(CgroupError::TooDeep(called));
        }
        Ok(Self::new(called, Place::Path { root, names }))
    }

    /// The group of a systemd unit, which need not run.
    pub fn of_unit(unit: &str) -> Result<Self, CgroupError> {
        if Name::new(unit.as_bytes()).is_none() {
            return Err(CgroupError::TooDeep(unit.to_owned()));
        }
        let root = Hierarchy::open()?.into_root();
        Ok(Self::new(unit.to_owned(), Place::Unit { root, unit: unit.to_owned() }))
    }

    fn new(called: String, place: Place) -> Self {
        let group = Self { called, place, now: Mutex::new(None) };
        let _first = group.look();
        group
    }

    /// As the operator calls it.
    pub fn called(&self) -> &str {
        &self.called
    }

    /// Where programs are attached that know it by name. `None`: nobody makes it again, so they are attached to it.
    pub fn root(&self) -> Option<BorrowedFd<'_>> {
        match &self.place {
            Place::Fixed => None,
            Place::Path { root, .. } | Place::Unit { root, .. } => Some(root.as_fd()),
        }
    }

    /// What programs are told that are attached to [`Group::root`].
    pub fn by_name(&self) -> Option<ByName> {
        let (kind, names): (_, Vec<_>) = match &self.place {
            Place::Fixed => return None,
            Place::Path { names, .. } => {
                (group::BY_PATH, (1..).zip(names.iter().filter_map(|n| Name::new(n.as_bytes()))).collect())
            }
            Place::Unit { unit, .. } => {
                (group::BY_UNIT, Name::new(unit.as_bytes()).map(|n| (0, n)).into_iter().collect())
            }
        };
        let depth = names.last().map_or(0, |(depth, _)| *depth);
        let root = self.root().and_then(|root| cgroup::id(root).ok())?;
        Some(ByName { kind, place: group::Place { root, depth, reserved: 0 }, names })
    }

    /// Looks whether another directory bears the name.
    pub fn look(&self) -> News {
        let found = match &self.place {
            Place::Fixed => return News::None,
            Place::Path { root, names } => {
                let path: PathBuf = names.iter().collect();
                self.unless_same(root.as_fd(), &path)
            }
            Place::Unit { root, unit } => match of_unit(root.as_fd(), unit) {
                Some(path) => self.unless_same(root.as_fd(), &path),
                None => Ok(None),
            },
        };
        let Ok(found) = found else { return News::None };
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let news = match (&*now, &found) {
            (None, Some(_)) => News::Appeared,
            (Some(_), Some(_)) => News::MadeAnew,
            (Some(_), None) => News::Gone,
            (None, None) => News::None,
        };
        *now = found;
        news
    }

    /// What is at a path; the error is that it is what was there before.
    fn unless_same(&self, root: BorrowedFd<'_>, path: &Path) -> Result<Option<Found>, Same> {
        let Ok(stat) = statat(root, path, AtFlags::SYMLINK_NOFOLLOW) else { return Ok(None) };
        if self.current().is_some_and(|now| now.id == stat.st_ino) {
            return Err(Same);
        }
        // It may have gone since.
        let Ok(dir) = cgroup::open_below(root, path) else { return Ok(None) };
        Ok(cgroup::id(dir.as_fd()).ok().map(|id| Found { dir: Arc::new(dir), id }))
    }

    fn current(&self) -> Option<Found> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The directory that bears the name at present.
    pub fn now(&self) -> Option<Arc<OwnedFd>> {
        self.current().map(|found| found.dir)
    }

    /// The processes in it and below it.
    pub fn processes(&self) -> Vec<u32> {
        self.now().map(|dir| cgroup::processes(dir.as_fd())).unwrap_or_default()
    }

    /// The names on the way to it. `None` for a unit, which may be in any slice.
    fn path(&self) -> Option<&[OsString]> {
        match &self.place {
            Place::Fixed => Some(&[]),
            Place::Path { names, .. } => Some(names),
            Place::Unit { .. } => None,
        }
    }

    /// Whether it lies in another one, or may.
    pub fn is_within(&self, other: &Self) -> bool {
        match (self.path(), other.path()) {
            (Some(mine), Some(theirs)) => mine.len() > theirs.len() && mine.starts_with(theirs),
            // Every name above a unit's is a slice's.
            (None, Some(theirs)) => theirs.iter().all(|n| is_slice(n)),
            (Some(mine), None) => {
                let unit = mine.iter().position(|n| !is_slice(n));
                unit.is_some_and(|at| at + 1 < mine.len() && mine[at] == *other.called)
            }
            (None, None) => false,
        }
    }
}

/// The directory is the one that is known.
struct Same;

fn is_slice(name: &std::ffi::OsStr) -> bool {
    let name = name.as_bytes();
    name.len() > group::SLICE.len() && name.ends_with(&group::SLICE)
}

/// Where a unit's group is: called like it, with nothing but slices above it.
fn of_unit(root: BorrowedFd<'_>, unit: &str) -> Option<PathBuf> {
    let top = cgroup::fd_path(root);
    let mut level = vec![PathBuf::new()];
    for _ in 0..DEPTH_MAX {
        let mut next = Vec::new();
        for slice in &level {
            let own = slice.join(unit);
            if top.join(&own).is_dir() {
                return Some(own);
            }
            for entry in fs::read_dir(top.join(slice)).into_iter().flatten().flatten() {
                if is_slice(&entry.file_name()) && entry.file_type().is_ok_and(|t| t.is_dir()) {
                    next.push(slice.join(entry.file_name()));
                }
            }
        }
        if next.is_empty() {
            return None;
        }
        level = next;
    }
    None
}

/// A path without links and dots, of which the end need not exist.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    for there in path.ancestors() {
        let Ok(real) = fs::canonicalize(there) else { continue };
        let rest = path.strip_prefix(there).unwrap_or(Path::new(""));
        if rest.components().any(|c| !matches!(c, Component::Normal(_))) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the path has \"..\" behind what exists",
            ));
        }
        return Ok(real.join(rest));
    }
    Ok(path)
}

fn io_error(name: &str, source: io::Error) -> CgroupError {
    CgroupError::Io { name: name.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Group {
        let names = path.split('/').filter(|n| !n.is_empty()).map(OsString::from).collect();
        let root = fs::File::open("/").expect("a directory").into();
        Group { called: path.to_owned(), place: Place::Path { root, names }, now: Mutex::new(None) }
    }

    fn unit(name: &str) -> Group {
        let root = fs::File::open("/").expect("a directory").into();
        Group {
            called: name.to_owned(),
            place: Place::Unit { root, unit: name.to_owned() },
            now: Mutex::new(None),
        }
    }

    #[test]
    fn a_group_within_another_is_known_by_their_names() {
        for (inner, outer) in [
            (at("/a.slice/b"), at("/a.slice")),
            (unit("x.service"), at("/a.slice")),
            (at("/a.slice/x.service/own"), unit("x.service")),
        ] {
            assert!(inner.is_within(&outer) && !outer.is_within(&inner), "{inner:?} {outer:?}");
        }
        for (one, other) in [
            (at("/a"), at("/b")),
            (at("/a"), at("/a")),
            (at("/ab"), at("/a")),
            (unit("x.service"), unit("y.service")),
            (unit("x.service"), at("/system.slice/y.service")),
            (at("/a.slice/y.service/x.service/own"), unit("x.service")),
        ] {
            assert!(!one.is_within(&other) && !other.is_within(&one), "{one:?} {other:?}");
        }
    }

    #[test]
    fn a_unit_is_found_below_slices_and_nowhere_else() {
        let top = tempfile::tempdir().expect("a directory");
        let make = |path: &str| fs::create_dir_all(top.path().join(path)).expect("a directory");
        make("user.slice/user-1.slice/user@1.service/app.slice/x.service");
        make("system.slice/docker-1.scope/x.service");
        let root: OwnedFd = fs::File::open(top.path()).expect("it is there").into();
        assert_eq!(of_unit(root.as_fd(), "x.service"), None);
        make("a.slice/a-b.slice/x.service");
        assert_eq!(of_unit(root.as_fd(), "x.service"), Some("a.slice/a-b.slice/x.service".into()));
    }

    #[test]
    fn a_path_is_resolved_as_far_as_it_exists() {
        let top = tempfile::tempdir().expect("a directory");
        let real = fs::canonicalize(top.path()).expect("it is there");
        std::os::unix::fs::symlink(&real, real.join("link")).expect("a link");
        assert_eq!(resolve(&real.join("link/none/at/all")).ok(), Some(real.join("none/at/all")));
        assert!(resolve(&real.join("none/../x")).is_err());
    }
}
