//! connect(2) by io_uring, without a library: one request, one completion (`linux/io_uring.h`). Each request has a ring
//! of its own, which is removed with it.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};

/// `struct io_sqring_offsets`, `struct io_cqring_offsets`, `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
struct Offsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    /// Of the submission ring: flags, dropped, array. Of the completion ring: overflow, entries, flags.
    rest: [u32; 3],
    resv1: u32,
    user_addr: u64,
}

#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    sq: Offsets,
    cq: Offsets,
}

/// `struct io_uring_sqe`, as far as IORING_OP_CONNECT uses it.
#[repr(C)]
struct Request {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    /// The length of the address.
    off: u64,
    addr: u64,
    len: u32,
    op_flags: u32,
    user_data: u64,
    rest: [u64; 3],
}

const OP_CONNECT: u8 = 16;
const SETUP_SQPOLL: u32 = 1 << 1;
/// `IOSQE_ASYNC`: by a worker of the kernel's.
const ASYNC: u8 = 1 << 4;
const ENTER_GETEVENTS: libc::c_uint = 1;
const ENTER_SQ_WAKEUP: libc::c_uint = 1 << 1;
const OFF_SQES: libc::off_t = 0x1000_0000;
const OFF_CQ_RING: libc::off_t = 0x0800_0000;
/// A page, which rings of one request fit into, and beyond which the kernel maps nothing.
const RING: usize = 4096;

/// Whose thread makes the connection.
#[derive(Clone, Copy)]
pub(super) enum By {
    /// The caller's.
    Caller,
    /// A worker of the kernel's.
    Worker,
    /// The kernel's thread that looks for requests by itself.
    Poller,
}

/// Memory that is shared with the kernel.
struct Shared(*mut u8);

impl Shared {
    fn map(ring: &OwnedFd, offset: libc::off_t) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of the ring's own memory, wherever there is room for it.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), RING, protection, libc::MAP_SHARED, ring.as_raw_fd(), offset)
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(at.cast())) }
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the kernel gave the offset, which is within the mapping and aligned, and words there are written atomically.
        unsafe { &*self.0.add(offset as usize).cast::<AtomicU32>() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by us, with this length, and nobody uses it any more.
        unsafe { libc::munmap(self.0.cast(), RING) };
    }
}

/// Connects `socket`; fails with what the kernel answered, ENOSYS or EPERM where it has no io_uring for us.
pub(super) fn connect(socket: &OwnedFd, to: SocketAddr, by: By) -> io::Result<()> {
    let mut params = Params::default();
    if matches!(by, By::Poller) {
        (params.flags, params.sq_thread_idle) = (SETUP_SQPOLL, 1000);
    }
    // SAFETY: one entry; the parameters are valid for reading and writing.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut params) };
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    let ring = i32::try_from(ring).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let ring = unsafe { OwnedFd::from_raw_fd(ring) };
    let submissions = Shared::map(&ring, 0)?;
    let completions = Shared::map(&ring, OFF_CQ_RING)?;
    let requests = Shared::map(&ring, OFF_SQES)?;
    let address = SockaddrStorage::from(to);
    let request = Request {
        opcode: OP_CONNECT,
        flags: if matches!(by, By::Worker) { ASYNC } else { 0 },
        ioprio: 0,
        fd: socket.as_raw_fd(),
        off: u64::from(address.len()),
        addr: address.as_ptr() as u64,
        len: 0,
        op_flags: 0,
        user_data: 1,
        rest: [0; 3],
    };
    // SAFETY: the first of the ring's requests, which the kernel does not read before the tail says so.
    unsafe { requests.0.cast::<Request>().write(request) };
    submissions.word(params.sq.rest[2]).store(0, Ordering::Relaxed);
    submissions.word(params.sq.tail).store(1, Ordering::Release);
    let flags = ENTER_GETEVENTS | if matches!(by, By::Poller) { ENTER_SQ_WAKEUP } else { 0 };
    while completions.word(params.cq.tail).load(Ordering::Acquire) == 0 {
        let submitted = submissions.word(params.sq.head).load(Ordering::Acquire);
        // SAFETY: numbers, and no signal mask.
        let entered = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                ring.as_raw_fd(),
                1 - submitted.min(1),
                1,
                flags,
                ptr::null::<libc::c_void>(),
                0,
            )
        };
        if entered < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return Err(io::Error::last_os_error());
        }
    }
    // struct io_uring_cqe: user_data, res, flags. Behind its offset, which stands where `array` does among submissions.
    let result = completions.word(params.cq.rest[1] + 8).load(Ordering::Acquire).cast_signed();
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}
