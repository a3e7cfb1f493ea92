//! System calls that no library in the tree has in a safe form: bpf(2) as far as aya keeps it to itself, and a few others.
//!
//! # Invariants
//! - Every block of memory that the kernel is handed lives for the call, and is as long as the kernel takes it for.

#![expect(unsafe_code, reason = "system calls take pointers, and return descriptors as numbers")]

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Commands and flags of `linux/bpf.h`.
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_F_ALLOW_MULTI: u32 = 2;
/// `enum bpf_map_type`
pub const BPF_MAP_TYPE_ARRAY: u32 = 2;

/// `enum bpf_attach_type`: where a program sits.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachType {
    /// `BPF_CGROUP_INET_INGRESS`
    Ingress = 0,
    /// `BPF_CGROUP_INET_EGRESS`
    Egress = 1,
    /// `BPF_CGROUP_SOCK_OPS`
    SockOps = 3,
    /// `BPF_CGROUP_INET4_CONNECT`
    Connect4 = 10,
    /// `BPF_CGROUP_INET6_CONNECT`
    Connect6 = 11,
    /// `BPF_CGROUP_GETSOCKOPT`
    Getsockopt = 21,
    /// `BPF_CGROUP_SETSOCKOPT`
    Setsockopt = 22,
    /// `BPF_CGROUP_INET4_GETPEERNAME`
    Getpeername4 = 29,
    /// `BPF_CGROUP_INET6_GETPEERNAME`
    Getpeername6 = 30,
    /// `BPF_CGROUP_INET4_GETSOCKNAME`
    Getsockname4 = 31,
    /// `BPF_CGROUP_INET6_GETSOCKNAME`
    Getsockname6 = 32,
    /// `BPF_SK_LOOKUP`: on a network namespace.
    SkLookup = 36,
}

/// bpf(2).
///
/// # Safety
/// `T` is `repr(C)`, made of integers without padding, and a beginning of `union bpf_attr` as this command reads it; what its
/// pointers point to lives for the call, and is as large as the kernel takes it for.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is valid for reads and writes of its size, which is what the kernel is told, and all of it is
    // initialised; the rest is as the caller says.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Attaches a program to a cgroup without a link: it stays until the cgroup is removed, whoever dies.
pub fn prog_attach(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, at: AttachType) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        target_fd: i32,
        attach_bpf_fd: i32,
        attach_type: u32,
        attach_flags: u32,
    }
    let mut attr = Attr {
        target_fd: cgroup.as_raw_fd(),
        attach_bpf_fd: program.as_raw_fd(),
        attach_type: at as u32,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: four numbers.
    unsafe { bpf(BPF_PROG_ATTACH, &mut attr) }.map(drop)
}

/// Attaches a program to a cgroup, or to a network namespace, for as long as the link's descriptor, or a pin of it, is there.
/// Links are multi by nature and take no flag that says so.
pub fn link_create(program: BorrowedFd<'_>, target: BorrowedFd<'_>, at: AttachType) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_fd: i32,
        target_fd: i32,
        attach_type: u32,
        flags: u32,
    }
    let mut attr = Attr {
        prog_fd: program.as_raw_fd(),
        target_fd: target.as_raw_fd(),
        attach_type: at as u32,
        flags: 0,
    };
    // SAFETY: four numbers.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &mut attr) }?;
    // SAFETY: this command returns a descriptor.
    unsafe { owned(fd) }
}

/// Pins a link at `path`, in a bpffs.
pub fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let bpf_fd = object.as_raw_fd().cast_unsigned();
    let mut attr = ObjAttr { pathname: path.as_ptr() as u64, bpf_fd, file_flags: 0 };
    // SAFETY: the path is a C string that lives for the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Puts another program behind a link, with no moment in which none is attached.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: i32,
        new_prog_fd: i32,
        flags: u32,
        old_prog_fd: u32,
    }
    let mut attr =
        Attr { link_fd: link.as_raw_fd(), new_prog_fd: program.as_raw_fd(), flags: 0, old_prog_fd: 0 };
    // SAFETY: four numbers.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches what is behind a link, now: the kernel drops the last reference to a link some time later.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: i32,
    }
    // SAFETY: a number.
    unsafe { bpf(BPF_LINK_DETACH, &mut Attr { link_fd: link.as_raw_fd() }) }.map(drop)
}

/// Opens what is pinned at `path`.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the path is a C string that lives for the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    // SAFETY: this command returns a descriptor.
    unsafe { owned(fd) }
}

/// Loads a program of type `BPF_PROG_TYPE_SK_LOOKUP`, under a licence that is compatible with the GPL.
pub fn load_sk_lookup(name: &str, instructions: &[[u8; 8]]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
    /// A start of `union bpf_attr`, for this command.
    #[repr(C)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
    }
    let mut prog_name = [0; 16];
    // The last byte stays 0.
    for (to, from) in prog_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let mut attr = Attr {
        prog_type: BPF_PROG_TYPE_SK_LOOKUP,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: AttachType::SkLookup as u32,
    };
    // SAFETY: as many instructions as it says, and a C string, both of which live for the call; no log is asked for.
    let fd = unsafe { bpf(BPF_PROG_LOAD, &mut attr) }?;
    // SAFETY: this command returns a descriptor.
    unsafe { owned(fd) }
}

/// What is attached to a cgroup itself at one place, in the order in which it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// The ids of the programs.
    pub programs: Vec<u32>,
    /// Whether others may be attached beside them, and below (`BPF_F_ALLOW_MULTI`). Without programs it says nothing.
    pub multi: bool,
}

/// What is attached to a cgroup itself.
pub fn prog_query(cgroup: BorrowedFd<'_>, at: AttachType) -> io::Result<Attached> {
    /// `BPF_CGROUP_MAX_PROGS` of `linux/bpf-cgroup.h`.
    const PROGRAMS_MAX: usize = 64;
    #[repr(C)]
    struct Attr {
        target_fd: i32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        _hole: u32,
    }
    let mut ids = [0u32; PROGRAMS_MAX];
    let mut attr = Attr {
        target_fd: cgroup.as_raw_fd(),
        attach_type: at as u32,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: u32::try_from(PROGRAMS_MAX).unwrap_or(u32::MAX),
        _hole: 0,
    };
    // SAFETY: `ids` has room for as many as it says, which are written at most, and lives for the call.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    let n = usize::try_from(attr.prog_cnt).map_or(PROGRAMS_MAX, |n| n.min(PROGRAMS_MAX));
    Ok(Attached { programs: ids[..n].to_vec(), multi: attr.attach_flags & BPF_F_ALLOW_MULTI != 0 })
}

/// What the kernel tells of a program or a link, as far as `T` takes it; what it does not tell is zero.
///
/// # Safety
/// `T` is `repr(C)`, a beginning of the kernel's structure, and made of integers only.
unsafe fn object_info<T>(object: BorrowedFd<'_>) -> io::Result<T> {
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    // SAFETY: as the caller says.
    let mut info: T = unsafe { mem::zeroed() };
    let mut attr = Attr {
        bpf_fd: object.as_raw_fd().cast_unsigned(),
        info_len: u32::try_from(size_of::<T>()).map_err(io::Error::other)?,
        info: (&raw mut info) as u64,
    };
    // SAFETY: `info` is as long as it says, and the kernel writes no more; no list is asked for, since all counts are zero.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// The name of a program, as its loader called it.
pub fn prog_name(program: BorrowedFd<'_>) -> io::Result<String> {
    /// The beginning of `struct bpf_prog_info`, up to the name.
    #[repr(C)]
    struct Info {
        _before: [u64; 8],
        name: [u8; 16],
    }
    // SAFETY: made of integers only.
    let info: Info = unsafe { object_info(program) }?;
    let end = info.name.iter().position(|b| *b == 0).unwrap_or(info.name.len());
    Ok(String::from_utf8_lossy(&info.name[..end]).into_owned())
}

/// The program of this id (CAP_SYS_ADMIN).
pub fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_id: u32,
        next_id: u32,
        open_flags: u32,
    }
    // SAFETY: three numbers.
    let fd = unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut Attr { prog_id: id, next_id: 0, open_flags: 0 }) }?;
    // SAFETY: this command returns a descriptor.
    unsafe { owned(fd) }
}

#[repr(C)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// A descriptor that a system call has returned. The kernel sets close-on-exec on those of bpf(2).
///
/// # Safety
/// The call has just made it, for nobody else.
unsafe fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: as the caller says.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What is known of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// The id of the program behind it.
    pub program: u32,
    /// The cgroup that it is attached to (its inode number); zero once that is gone.
    pub cgroup: u64,
}

/// What `struct bpf_link_info` tells of a link to a cgroup.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    #[repr(C)]
    struct Info {
        link_type: u32,
        id: u32,
        prog_id: u32,
        // The kernel's struct has a hole here: what follows is aligned to eight bytes.
        _hole: u32,
        cgroup_id: u64,
        attach_type: u32,
        _rest: [u32; 5],
    }
    // SAFETY: made of integers only.
    let info: Info = unsafe { object_info(link) }?;
    Ok(LinkInfo { program: info.prog_id, cgroup: info.cgroup_id })
}

/// What is known of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value, as the map was made with.
    pub value_size: u32,
    /// The most entries.
    pub max_entries: u32,
}

/// What `struct bpf_map_info` tells of a map.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    #[repr(C)]
    struct Info {
        kind: u32,
        _id: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    // SAFETY: a beginning of `struct bpf_map_info`, made of integers only.
    let Info { kind, key_size, value_size, max_entries, .. } = unsafe { object_info(map) }?;
    Ok(MapInfo { kind, key_size, value_size, max_entries })
}

/// Makes a map.
#[cfg(test)]
pub(crate) fn map_create(kind: u32, key: u32, value: u32, entries: u32, flags: u32) -> io::Result<OwnedFd> {
    const BPF_MAP_CREATE: libc::c_int = 0;
    let mut attr = [kind, key, value, entries, flags];
    // SAFETY: of this command these are five numbers.
    let fd = unsafe { bpf(BPF_MAP_CREATE, &mut attr) }?;
    // SAFETY: this command returns a descriptor.
    unsafe { owned(fd) }
}

/// Whether a descriptor has `O_NONBLOCK`.
pub fn is_nonblocking(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(rustix::fs::fcntl_getfl(fd)?.contains(rustix::fs::OFlags::NONBLOCK))
}

/// The network namespace of a socket (`SIOCGSKNS`, netdevice(7)); `ENOTSOCK` of anything else.
pub fn netns_of(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // To a driver the number may mean anything.
    rustix::net::sockopt::socket_type(socket)?;
    // SAFETY: on a socket, which it is, it takes no argument, and makes a descriptor or fails.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request has returned a descriptor.
    unsafe { owned(fd.into()) }
}

/// A duplicate of a descriptor of another process. Whoever gets it closes it at once: the application's close() sends no
/// FIN before.
pub fn duplicate(pid: u32, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if process < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has returned a descriptor.
    let process = unsafe { owned(process) }?;
    // SAFETY: numbers.
    let theirs = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
    if theirs < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has returned a descriptor of ours.
    unsafe { owned(theirs) }
}

/// Sends a signal. It is no error where the process has ended.
pub fn kill(pid: libc::pid_t, signal: libc::c_int) {
    // SAFETY: numbers.
    let _ended = unsafe { libc::kill(pid, signal) };
}

/// Sends one message.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: `bytes` is valid for reads of its length.
    let n = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives one message; its length.
pub fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `into` is valid for writes of its length.
    let n = unsafe { libc::recv(socket.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), 0) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `SO_COOKIE`: which socket it is, as no other while the node is up.
pub fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    u64_option(socket, libc::SO_COOKIE)
}

/// `SO_NETNS_COOKIE`: the cookie of the network namespace that a socket lives in.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    u64_option(socket, libc::SO_NETNS_COOKIE)
}

/// Whether the kernel knows TCP MD5 signatures (RFC 2385; CONFIG_TCP_MD5SIG): it then finds no key to be removed.
pub fn has_tcp_md5(socket: BorrowedFd<'_>) -> bool {
    /// `struct tcp_md5sig` of `linux/tcp.h`: an address, and a key, here without length.
    #[repr(C)]
    struct Signature {
        family: u16,
        address: [u8; 126],
        flags_prefix_and_length: [u8; 4],
        device: i32,
        key: [u8; 80],
    }
    let family = u16::try_from(libc::AF_INET).unwrap_or_default();
    let signature =
        Signature { family, address: [0; 126], flags_prefix_and_length: [0; 4], device: 0, key: [0; 80] };
    let length = libc::socklen_t::try_from(size_of::<Signature>()).unwrap_or_default();
    // SAFETY: `signature` is valid for reads of its length.
    let ret = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_MD5SIG,
            (&raw const signature).cast(),
            length,
        )
    };
    ret == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOPROTOOPT)
}

/// An option of a socket's own level, of which the value is a number.
pub fn int_option(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<libc::c_int> {
    socket_option(socket, option)
}

fn u64_option(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u64> {
    socket_option(socket, option)
}

fn socket_option<T: Default + aya::Pod>(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: `value` and `len` live for the call; the kernel writes `len` bytes at most, and any bytes are a `Pod`.
    let ret = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len)
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}
