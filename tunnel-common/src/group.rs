//! Whether a cgroup lies in a captured one, by the names of the cgroups around a task, from the attach root down.
//!
//! # Invariants
//! - A cgroup that is recreated under its name matches from the first moment on. A path matches in its place only, the
//!   name of a unit below slices only.

/// How a capture names its group: everything below the place where its programs are attached,
pub const EVERYTHING: u32 = 0;
/// the names of all groups on the way to it,
pub const BY_PATH: u32 = 1;
/// or the name of a systemd unit, below slices only.
pub const BY_UNIT: u32 = 2;

/// The most levels between the attach root and a captured group. systemd's own trees have five; a deeper path is a
/// configuration error, and a unit below more slices than that is not found.
pub const DEPTH_MAX: u32 = 32;
/// The most levels above the attach root: cgroup namespaces, one in the other.
pub const ROOT_DEPTH_MAX: u32 = 32;

/// Bytes of a name that are compared at a time: a quarter of a program's stack.
pub const CHUNK: usize = 128;
/// Chunks of a name: with its terminator it has `NAME_MAX` + 1 bytes at most (kernfs allows no more).
pub const CHUNKS: usize = 2;
/// Words of a chunk.
pub const WORDS: usize = CHUNK / 8;

/// How systemd calls a slice, which holds other units and no process of its own.
pub const SLICE: [u8; 6] = *b".slice";
const SLICE_LEN: u32 = 6;

/// Verdicts on groups that are remembered. The least recently used ones are forgotten and found again, at the cost of a walk.
pub const GROUPS_MAX: usize = 4096;

/// A group's name, padded with zeros.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    words: [u64; WORDS * CHUNKS],
}

impl Name {
    /// `None` if it is longer than a file's name can be.
    pub fn new(name: &[u8]) -> Option<Self> {
        if name.is_empty() || name.len() >= CHUNK * CHUNKS {
            return None;
        }
        let mut words = [0; WORDS * CHUNKS];
        for (word, bytes) in words.iter_mut().zip(name.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(padded);
        }
        Some(Self { words })
    }

    /// Zero if one of its chunks is this one, which is padded with zeros too. Without branches: the verifier follows both
    /// sides of each.
    #[inline(always)]
    pub const fn differs(&self, chunk: usize, is: &[u64; WORDS]) -> u64 {
        if chunk >= CHUNKS {
            return 1;
        }
        let (mut differs, mut i) = (0, 0);
        while i < WORDS {
            differs |= self.words[chunk * WORDS + i] ^ is[i];
            i += 1;
        }
        differs
    }
}

/// Where the kernel keeps what is read of a task's group: offsets in `task_struct`, `css_set`, `cgroup` and `kernfs_node`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// `task_struct.cgroups`
    pub cgroups: u32,
    /// `css_set.dfl_cgrp`
    pub dfl_cgrp: u32,
    /// `cgroup.level`
    pub level: u32,
    /// `cgroup.ancestors`
    pub ancestors: u32,
    /// `cgroup.kn`
    pub kn: u32,
    /// `kernfs_node.name`
    pub name: u32,
}

/// Which group is captured.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The id of the group that the programs are attached to.
    pub root: u64,
    /// [`BY_PATH`]: how many levels below it the captured one is.
    pub depth: u32,
    /// Zero.
    pub reserved: u32,
}

/// What a name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The group is the captured one, or in it.
    Captured,
    /// It is neither, and nothing below it is.
    Outside,
    /// The next level decides.
    Deeper,
}

/// What the name at `depth` levels below the attach root says, where `same` means that it is the one that the capture has
/// there (for [`BY_UNIT`] it has one), and `slice` that it ends as a slice's does.
///
/// A unit's own groups, and those that it hands to others (`Delegate=`, a user's manager, a container), are not slices right
/// below the root: who may make groups there cannot pass one off as the unit.
#[inline(always)]
pub fn step(kind: u32, wanted_depth: u32, depth: u32, same: bool, slice: impl FnOnce() -> bool) -> Step {
    match (kind, same) {
        (BY_UNIT, true) => Step::Captured,
        (BY_UNIT, false) if slice() => Step::Deeper,
        (BY_PATH, true) if depth >= wanted_depth => Step::Captured,
        (BY_PATH, true) => Step::Deeper,
        _ => Step::Outside,
    }
}

/// Whether the last bytes of a name, so many as [`SLICE`] has, are those of a slice's: the first four and the last two of them.
#[inline(always)]
pub const fn is_slice(first: u32, last: u16, len: u32) -> bool {
    const FIRST: u32 = u32::from_ne_bytes([SLICE[0], SLICE[1], SLICE[2], SLICE[3]]);
    const LAST: u16 = u16::from_ne_bytes([SLICE[4], SLICE[5]]);
    // One comparison: the verifier follows both sides of each.
    (first ^ FIRST) | (last ^ LAST) as u32 == 0 && len > SLICE_LEN
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::{string::String, vec::Vec};

    use proptest::prelude::*;

    use super::*;

    /// As the kernel's side reads a name.
    fn chunks(name: &str) -> Vec<[u64; WORDS]> {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(CHUNK * CHUNKS, 0);
        let word = |b: &[u8]| u64::from_ne_bytes(b.try_into().unwrap());
        let chunk = |c: &[u8]| {
            let words: Vec<u64> = c.chunks(8).map(word).collect();
            words.try_into().unwrap()
        };
        bytes.chunks(CHUNK).map(chunk).collect()
    }

    fn same(wanted: &str, name: &str) -> bool {
        let wanted = Name::new(wanted.as_bytes()).expect("a name");
        chunks(name).iter().enumerate().all(|(i, chunk)| wanted.differs(i, chunk) == 0)
    }

    fn slice(name: &str) -> bool {
        let Some(at) = name.len().checked_sub(SLICE.len()) else { return false };
        let end = &name.as_bytes()[at..];
        let (first, last) = (end[..4].try_into().unwrap(), end[4..].try_into().unwrap());
        is_slice(u32::from_ne_bytes(first), u16::from_ne_bytes(last), name.len().try_into().unwrap())
    }

    /// Goes from the root down, as the program does.
    fn is_captured(kind: u32, wanted: &[&str], path: &str) -> bool {
        let depth = u32::try_from(wanted.len()).unwrap();
        for (i, name) in path.split('/').filter(|n| !n.is_empty()).enumerate() {
            let of = if kind == BY_UNIT { wanted[0] } else { wanted.get(i).copied().unwrap_or("?") };
            let at = u32::try_from(i).unwrap() + 1;
            match step(kind, depth, at, same(of, name), || slice(name)) {
                Step::Captured => return true,
                Step::Outside => return false,
                Step::Deeper => {}
            }
        }
        false
    }

    #[test]
    fn a_path_is_its_names_from_the_root() {
        let wanted = ["system.slice", "app"];
        for path in ["/system.slice/app", "/system.slice/app/worker/1"] {
            assert!(is_captured(BY_PATH, &wanted, path), "{path}");
        }
        for path in [
            "",
            "/",
            "/system.slice",
            "/system.slice/app2",
            "/app",
            "/x/system.slice/app",
            "/system.slice/x/app",
        ] {
            assert!(!is_captured(BY_PATH, &wanted, path), "{path}");
        }
    }

    #[test]
    fn a_unit_is_its_name_below_slices_only() {
        let wanted = ["legacy.service"];
        for path in
            ["/legacy.service", "/system.slice/legacy.service", "/a.slice/a-b.slice/legacy.service/payload"]
        {
            assert!(is_captured(BY_UNIT, &wanted, path), "{path}");
        }
        for path in [
            "",
            "/system.slice",
            "/user.slice/user-1.slice/user@1.service/app.slice/legacy.service",
            "/system.slice/docker-1.scope/system.slice/legacy.service",
            "/legacy.service2",
            "/slice/legacy.service",
            "/.slice/legacy.service",
        ] {
            assert!(!is_captured(BY_UNIT, &wanted, path), "{path}");
        }
    }

    #[test]
    fn a_slice_is_more_than_its_ending() {
        assert!(slice("a.slice") && slice("user-1000.slice"));
        for name in [".slice", "slice", "a.slicf", "b.tlice", "a.scope", "x", ""] {
            assert!(!slice(name), "{name}");
        }
    }

    #[test]
    fn a_name_is_as_long_as_a_files() {
        assert!(Name::new(b"").is_none());
        assert!(Name::new(&[b'x'; 256]).is_none());
        let long: String = core::iter::repeat_n('x', 255).collect();
        assert!(same(&long, &long));
        assert!(!same(&long, &long[1..]));
    }

    #[test]
    fn an_unknown_kind_captures_nothing() {
        assert_eq!(step(9, 1, 1, true, || true), Step::Outside);
    }

    proptest! {
        #[test]
        fn names_are_the_same_when_every_byte_is(a in "[a-z.-]{1,80}", b in "[a-z.-]{1,80}", cut in 0usize..80) {
            prop_assert!(same(&a, &a));
            prop_assert_eq!(same(&a, &b), a == b);
            let prefix: String = a.chars().take(cut.max(1)).collect();
            prop_assert_eq!(same(&a, &prefix), a == prefix);
        }
    }
}
