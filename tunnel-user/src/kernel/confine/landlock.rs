//! Landlock (landlock(7)): a thread that opens no file, whoever its user is.

#![expect(unsafe_code, reason = "no crate in the tree has Landlock's system calls")]

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
};

/// Returns the version of the interface instead of making a set of rules.
const CREATE_RULESET_VERSION: libc::c_uint = 1;
/// How many rights to files each version knows, from the first on (`LANDLOCK_ACCESS_FS_*` of `linux/landlock.h`).
const FILE_RIGHTS: [u32; 5] = [13, 14, 15, 15, 16];
/// The first version that knows scopes, and all that it has: abstract Unix sockets and signals.
const SCOPES: (u32, u64) = (6, 0b11);

/// `struct landlock_ruleset_attr`
#[repr(C)]
struct Ruleset {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// The version of the interface; `None` where the kernel has no Landlock, or it is off.
pub fn abi() -> Option<u32> {
    // SAFETY: with this flag the kernel reads no structure.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<Ruleset>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// From now on the calling thread opens, makes, changes and removes no file, connects to no abstract Unix socket and signals no
/// process outside; what it has open, it keeps. The version of the interface, or `None` where there is none.
pub(super) fn forbid_files() -> io::Result<Option<u32>> {
    let Some(version) = abi() else { return Ok(None) };
    let known = usize::try_from(version).unwrap_or(usize::MAX).min(FILE_RIGHTS.len());
    let rules = Ruleset {
        handled_access_fs: (1 << FILE_RIGHTS[known - 1]) - 1,
        handled_access_net: 0,
        scoped: if version >= SCOPES.0 { SCOPES.1 } else { 0 },
    };
    // What an old version does not know is zero, and not handed to it.
    let size = match version {
        0..4 => size_of::<u64>(),
        4..6 => 2 * size_of::<u64>(),
        _ => size_of::<Ruleset>(),
    };
    // SAFETY: `rules` lives for the call and is at least as long as it says.
    let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const rules, size, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the call has just made it, for nobody else.
    let rules = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: numbers.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) } {
        0 => Ok(Some(version)),
        _ => Err(io::Error::last_os_error()),
    }
}
