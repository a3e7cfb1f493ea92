//! Makes, with bpf(2), what other programs or earlier versions would have made: links that are pinned, programs that
//! are attached.
//!
//! # Invariants
//! - Programs are attached only to cgroups of the test's own, and are detached when these are removed.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context as _, Result};

/// Commands of `linux/bpf.h`.
const PROG_LOAD: libc::c_int = 5;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const PROG_ATTACH: libc::c_int = 8;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const LINK_CREATE: libc::c_int = 28;

/// `BPF_CGROUP_SOCK_OPS`.
pub const SOCK_OPS: u32 = 3;
/// `BPF_CGROUP_INET4_CONNECT`
pub const CONNECT4: u32 = 10;
/// `BPF_CGROUP_GETSOCKOPT`
pub const GETSOCKOPT: u32 = 21;

fn bpf<const N: usize>(command: libc::c_int, attr: &mut [u32; N]) -> io::Result<OwnedFd> {
    let done = bpf_plain(command, attr)?;
    let fd = i32::try_from(done).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf_plain<const N: usize>(command: libc::c_int, attr: &mut [u32; N]) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is an initialised prefix of `union bpf_attr`, valid for its size, which the kernel is told.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

fn halves<T>(pointer: *const T) -> [u32; 2] {
    let at = pointer as u64;
    #[expect(clippy::cast_possible_truncation, reason = "halves")]
    [at as u32, (at >> 32) as u32]
}

fn fd(of: &impl std::os::fd::AsRawFd) -> u32 {
    of.as_raw_fd().cast_unsigned()
}

/// What is pinned at a path.
pub fn pinned(path: &Path) -> Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let [low, high] = halves(name.as_ptr());
    bpf(OBJ_GET, &mut [low, high, 0, 0]).with_context(|| path.display().to_string())
}

/// Attaches the program behind a pinned link to another group, and pins that link in its place, as a version did that
/// attached to the captured group itself.
pub fn move_link(path: &Path, group: &Path) -> Result<()> {
    let link = pinned(path)?;
    // struct bpf_link_info: type, id, program, a hole, the cgroup's id, the place.
    let mut info = [0u32; 8];
    let [low, high] = halves(info.as_mut_ptr());
    bpf_plain(OBJ_GET_INFO_BY_FD, &mut [fd(&link), u32::try_from(size_of_val(&info))?, low, high])?;
    let (program, at) = (info[2], info[6]);
    let program = bpf(PROG_GET_FD_BY_ID, &mut [program, 0, 0])?;
    let group = File::open(group)?;
    let new = bpf(LINK_CREATE, &mut [fd(&program), fd(&group), at, 0]).context("attaching it")?;
    std::fs::remove_file(path)?;
    let name = CString::new(path.as_os_str().as_bytes())?;
    let [low, high] = halves(name.as_ptr());
    bpf_plain(OBJ_PIN, &mut [low, high, fd(&new), 0]).context("pinning it")?;
    Ok(())
}

/// How many programs are attached to a group itself at one place.
pub fn attached(group: &Path, at: u32) -> Result<usize> {
    let group = File::open(group)?;
    let mut ids = [0u32; 64];
    let [low, high] = halves(ids.as_mut_ptr());
    let mut attr = [fd(&group), at, 0, 0, low, high, 64, 0];
    bpf_plain(PROG_QUERY, &mut attr)?;
    Ok(usize::try_from(attr[6])?)
}

/// Attaches a program to a group that lets every connect(2) go on, without `BPF_F_ALLOW_MULTI`: nobody else can attach one
/// there or below.
pub fn attach_exclusively(group: &Path) -> Result<()> {
    /// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`
    const SOCK_ADDR: u32 = 18;
    attach(group, SOCK_ADDR, CONNECT4, 0)
}

/// Attaches a program that sees every packet that leaves a group, and lets it go on.
pub fn attach_filter(group: &Path) -> Result<()> {
    /// `BPF_PROG_TYPE_CGROUP_SKB`
    const SKB: u32 = 8;
    /// `BPF_CGROUP_INET_EGRESS`
    const EGRESS: u32 = 1;
    const ALLOW_MULTI: u32 = 2;
    attach(group, SKB, EGRESS, ALLOW_MULTI)
}

/// Attaches a program called "somebody" that allows everything.
fn attach(group: &Path, kind: u32, at: u32, flags: u32) -> Result<()> {
    // r0 = 1; exit
    let code: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let license = c"GPL";
    let mut attr = [0u32; 18];
    attr[0] = kind;
    attr[1] = 2;
    attr[2..4].copy_from_slice(&halves(code.as_ptr()));
    attr[4..6].copy_from_slice(&halves(license.as_ptr()));
    // Behind the log, the kernel's version and the flags: its name, the device, and where it will be attached.
    attr[12..14].copy_from_slice(&[u32::from_ne_bytes(*b"some"), u32::from_ne_bytes(*b"body")]);
    attr[17] = at;
    let program = bpf(PROG_LOAD, &mut attr).context("loading a program")?;
    let group = File::open(group)?;
    bpf_plain(PROG_ATTACH, &mut [fd(&group), fd(&program), at, flags]).context("attaching it")?;
    Ok(())
}
