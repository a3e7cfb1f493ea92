//! Socket options and requests that neither the standard library nor `socket2` has: what the kernel knows of a connection, and
//! which of several sockets a packet goes to.
//!
//! # Invariants
//! - Every block of memory that the kernel is handed lives for the call, and is exactly as long as the kernel is told.
//! - What the kernel writes to is made of integers ([`Plain`]): whatever it writes is a value.

#![expect(unsafe_code, reason = "getsockopt(2), setsockopt(2) and ioctl(2) take pointers")]

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd as _},
    time::Duration,
};

use super::quic::{ID_LEN, ID_TAG};

/// `SO_MEMINFO`, and of its numbers (`linux/sock_diag.h`) what was received and not read, the bound of what waits to be
/// sent, what is set aside, and what waits to be sent.
const SO_MEMINFO: libc::c_int = 55;
const SK_MEMINFO_RMEM_ALLOC: usize = 0;
const SK_MEMINFO_SNDBUF: usize = 3;
const SK_MEMINFO_FWD_ALLOC: usize = 4;
const SK_MEMINFO_WMEM_QUEUED: usize = 5;
const SK_MEMINFO_VARS: usize = 9;

/// What may be a socket option's value.
///
/// # Safety
/// The type is made of integers, without padding: every bit pattern is a value of it, and every byte of a value is
/// initialised.
pub unsafe trait Plain: Copy {}

// SAFETY: integers.
unsafe impl Plain for i32 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: an array has no padding between its elements.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// `SO_COOKIE`: never another socket's while the node is up.
pub fn cookie(socket: &impl AsFd) -> io::Result<u64> {
    option(socket, libc::SOL_SOCKET, libc::SO_COOKIE)
}

/// Bytes that this socket's TCP has ever taken to send. What is not acknowledged is asked for last: what is
/// acknowledged in between counts nowhere, so this is never too much.
pub fn accepted(socket: &impl AsFd) -> io::Result<u64> {
    /// `struct tcp_info` up to `tcpi_bytes_acked`, which is exact where `tcpi_bytes_sent` counts what was sent again.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Info {
        _states: [u8; 8],
        _counts: [u32; 24],
        _pacing_rates: [u64; 2],
        bytes_acked: u64,
    }
    const _: () = assert!(size_of::<Info>() == 8 + 24 * 4 + 2 * 8 + 8);
    // SAFETY: made of integers; its size is the sum of its fields'.
    unsafe impl Plain for Info {}
    let info: Info = option(socket, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    Ok(info.bytes_acked.wrapping_add(ioctl(socket, libc::TIOCOUTQ)?))
}

/// The same, exactly, of a socket on which nothing is being written: a little less would not do where it is what others
/// are measured from.
pub fn accepted_exactly(socket: &impl AsFd) -> io::Result<u64> {
    /// An acknowledgement comes in between no more often than there is something to acknowledge.
    const TRIES: u32 = 100;
    let mut before = accepted(socket)?;
    for _ in 0..TRIES {
        let now = accepted(socket)?;
        if now == before {
            return Ok(now);
        }
        before = before.max(now);
    }
    Ok(before)
}

/// Whether the kernel's account of this socket's memory is right: pages were set aside for it, and whatever was not used
/// of them is what was not. None while it changes.
pub fn is_account_right(socket: &impl AsFd) -> io::Result<Option<bool>> {
    /// `SK_MEM_QUANTUM`, which is a page.
    const PAGE: u32 = 4096;
    const TRIES: u32 = 3;
    let mut seen = None;
    for _ in 0..TRIES {
        let memory: [u32; SK_MEMINFO_VARS] = option(socket, libc::SOL_SOCKET, SO_MEMINFO)?;
        let used = [SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_WMEM_QUEUED, SK_MEMINFO_FWD_ALLOC];
        let used = used.map(|which| memory[which]);
        if used.iter().fold(0, |sum: u32, n| sum.wrapping_add(*n)) % PAGE == 0 {
            return Ok(Some(true));
        }
        if seen == Some(used) {
            return Ok(Some(false));
        }
        seen = Some(used);
    }
    Ok(None)
}

/// Bytes that were written and that the peer has not acknowledged, the end among them.
pub fn unacknowledged(socket: &impl AsFd) -> io::Result<u64> {
    ioctl(socket, libc::TIOCOUTQ)
}

/// How a connection gets on with what is on its way to the peer.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Something is on its way, or waits for the peer's window.
    pub waiting: bool,
    /// The peer was asked since it last answered: something was sent again, or its window was probed.
    pub asked: bool,
    /// Since the last acknowledgement.
    pub quiet: Duration,
}

/// See [`Progress`].
pub fn progress(socket: &impl AsFd) -> io::Result<Progress> {
    /// `struct tcp_info` (linux/tcp.h) up to `tcpi_last_ack_recv`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Info {
        state: u8,
        ca_state: u8,
        retransmits: u8,
        probes: u8,
        backoff: u8,
        options: [u8; 3],
        _times_and_sizes: [u32; 4],
        unacked: u32,
        _sacked_to_last_data_recv: [u32; 7],
        last_ack_recv: u32,
    }
    const _: () = assert!(size_of::<Info>() == 8 + 4 * 4 + 4 + 7 * 4 + 4);
    // SAFETY: made of integers; its size is the sum of its fields'.
    unsafe impl Plain for Info {}
    let info: Info = option(socket, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    Ok(Progress {
        waiting: info.unacked > 0 || unacknowledged(socket)? > 0,
        asked: info.retransmits > 0 || info.probes > 0,
        quiet: Duration::from_millis(info.last_ack_recv.into()),
    })
}

/// Takes the lock under which the program runs (`tcp_get_info`), so that what ran before shows.
pub fn settle(socket: &impl AsFd) -> io::Result<()> {
    option::<u64>(socket, libc::IPPROTO_TCP, libc::TCP_INFO).map(drop)
}

/// Bytes that were received and neither read nor sent on.
pub fn unread(socket: &impl AsFd) -> io::Result<u64> {
    ioctl(socket, libc::FIONREAD)
}

/// How much of `sk_sndbuf` is free, half of it left out: beyond two thirds epoll calls a socket full
/// (`sk_stream_is_writeable`).
pub fn room(socket: &impl AsFd) -> io::Result<u64> {
    let memory: [u32; SK_MEMINFO_VARS] = option(socket, libc::SOL_SOCKET, SO_MEMINFO)?;
    Ok(u64::from((memory[SK_MEMINFO_SNDBUF] / 2).saturating_sub(memory[SK_MEMINFO_WMEM_QUEUED])))
}

/// A socket option; what the kernel does not fill is zero.
pub fn option<T: Plain>(socket: &impl AsFd, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    // SAFETY: all bits zero is a value of a `Plain`.
    let mut value: T = unsafe { mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: `value` and `len` are valid for reads and writes, for the call; the kernel writes `len` bytes at most, and
    // whatever it writes is a value of a `Plain`. The descriptor is borrowed, so it is open and no other's.
    let ret = unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut len) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Sets an option of TCP.
pub fn set<T: Plain>(socket: &impl AsFd, name: libc::c_int, value: T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: `value` is valid for reads of `len` bytes, all of which are initialised in a `Plain`; the kernel copies them.
    let ret = unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, name, (&raw const value).cast(), len) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Steers the packets of QUIC among the UDP sockets that share an address with this one. A packet whose connection id is one of
/// ours goes to the socket whose number in their group that begins with; a packet with an id that a client has made up, which
/// is the first of its handshake (RFC 9000 section 7.2), to one of `count` sockets from `first` on, by the client's address.
pub fn steer_by_connection_id(socket: &impl AsFd, first: u16, count: u16) -> io::Result<()> {
    /// A header of the long form, of the handshake (RFC 9000 section 17.2): its version, the length of the id, the id.
    const LONG: u32 = 0x80;
    const LENGTH: u32 = 5;
    const ID: u32 = 6;
    /// Where offsets are from the network's header (linux/filter.h), `SKF_NET_OFF`.
    const NET: u32 = 0x_fff0_0000;
    let load = |size, at| instruction(libc::BPF_LD | size | libc::BPF_ABS, 0, 0, at);
    let (byte, half, word) = (libc::BPF_B, libc::BPF_H, libc::BPF_W);
    let compute = |what, with| instruction(libc::BPF_ALU | what | libc::BPF_K, 0, 0, with);
    let jump = |what, k, jt, jf| instruction(libc::BPF_JMP | what | libc::BPF_K, jt, jf, k);
    let answer = instruction(libc::BPF_RET | BPF_A, 0, 0, 0);
    let keep = instruction(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0);
    let mut program = [
        load(byte, 0),
        jump(libc::BPF_JSET, LONG, 2, 0),
        load(half, 1),
        answer,
        load(byte, LENGTH),
        jump(libc::BPF_JEQ, ID_LEN.into(), 0, 4),
        load(byte, ID + 2),
        jump(libc::BPF_JEQ, ID_TAG.into(), 0, 2),
        load(half, ID),
        answer,
        // A new one. The client's address and port, of IPv4 (without options) or of IPv6: four bytes and two.
        load(byte, NET),
        compute(libc::BPF_AND, 0xf0),
        jump(libc::BPF_JEQ, 0x40, 0, 4),
        load(word, NET.wrapping_add(12)),
        keep,
        load(half, NET.wrapping_add(20)),
        jump(libc::BPF_JA, 3, 0, 0),
        load(word, NET.wrapping_add(20)),
        keep,
        load(half, NET.wrapping_add(40)),
        instruction(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_X, 0, 0, 0),
        // Knuth's multiplicative hash, whose upper bits depend on all.
        compute(libc::BPF_MUL, 0x9e37_79b1),
        compute(libc::BPF_RSH, 16),
        compute(libc::BPF_MOD, count.max(1).into()),
        compute(libc::BPF_ADD, first.into()),
        answer,
    ];
    let instructions = u16::try_from(program.len()).map_err(io::Error::other)?;
    let of = libc::sock_fprog { len: instructions, filter: program.as_mut_ptr() };
    let len = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).map_err(io::Error::other)?;
    let (fd, name) = (socket.as_fd().as_raw_fd(), libc::SO_ATTACH_REUSEPORT_CBPF);
    // SAFETY: `of` is valid for reads of `len` bytes, and points to as many instructions as it says, all of which live for the
    // call; the kernel copies and checks them.
    let ret = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, (&raw const of).cast(), len) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The accumulator, as what is returned (linux/bpf_common.h).
const BPF_A: u32 = 0x10;

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    // All codes of classic BPF have one byte.
    libc::sock_filter { code: u16::from(code.to_le_bytes()[0]), jt, jf, k }
}

/// Whether the next byte to be read is urgent (`SIOCATMARK`): a read stops in front of it, whatever is behind.
pub fn at_mark(socket: &impl AsFd) -> bool {
    /// `asm-generic/sockios.h`
    const SIOCATMARK: libc::c_ulong = 0x8905;
    ioctl(socket, SIOCATMARK).is_ok_and(|at| at != 0)
}

/// A request that answers with a number.
fn ioctl(socket: &impl AsFd, request: libc::c_ulong) -> io::Result<u64> {
    let mut n: libc::c_int = 0;
    // SAFETY: the requests of this file (TIOCOUTQ, FIONREAD, SIOCATMARK) write one int on a TCP socket, which `n` is.
    let ret = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut n) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(u64::from(n.unsigned_abs())) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn what_was_accepted_and_what_is_unread_is_exact_whoever_connected_and_whatever_was_read() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        assert_ne!(cookie(&one).unwrap(), cookie(&other).unwrap());
        let begun = [accepted(&one).unwrap(), accepted(&other).unwrap()];
        let empty = room(&one).unwrap();
        assert!(empty > 0);
        for n in [1, 1000, 100_000_usize] {
            let before = accepted(&one).unwrap();
            one.write_all(&vec![7; n]).unwrap();
            assert_eq!(accepted(&one).unwrap(), before + n as u64);
            let mut got = vec![0; n];
            other.read_exact(&mut got[..n / 2]).unwrap();
            other.read_exact(&mut got[n / 2..]).unwrap();
            assert_eq!(unread(&other).unwrap(), 0);
            assert_eq!(accepted(&one).unwrap(), before + n as u64, "acknowledged or not");
        }
        other.write_all(b"abc").unwrap();
        one.read_exact(&mut [0]).unwrap();
        assert_eq!(unread(&one).unwrap(), 2);
        assert_eq!(accepted(&one).unwrap(), begun[0] + 101_001);
        assert_eq!(accepted(&other).unwrap(), begun[1] + 3);
    }
}
