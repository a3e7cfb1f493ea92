//! The system calls of a worker (seccomp(2)): what it may call is listed, everything else fails with EPERM and is written to
//! the kernel's audit log.
//!
//! The list is what workers were seen to call in the end-to-end tests, and what the C library calls for memory, threads and
//! time. Where arguments decide, they are looked at: a socket is no raw one and no Unix one, a command of bpf(2) acts on a map that is there, a
//! page is not made executable. clone3(2), of which a filter cannot see the flags, does not exist (ENOSYS), and the C library
//! falls back to clone(2).

#![expect(unsafe_code, reason = "seccomp(2) takes a program by its address")]

use std::io;

/// Instructions of classic BPF (`linux/bpf_common.h`).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

/// What a filter answers (`linux/seccomp.h`).
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// Where the halves of an argument are.
const LOWER_HALF: u32 = if cfg!(target_endian = "big") { 4 } else { 0 };
const UPPER_HALF: u32 = 4 - LOWER_HALF;

/// `AUDIT_ARCH_*` of `linux/audit.h`; `None` where no list was made.
const NATIVE: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else {
    None
};
/// From here on they are those of x32, which has the architecture of x86-64.
const X32: u32 = 0x4000_0000;

/// The filter is written to the log where it refuses, and does not slow what the kernel does about speculation.
const FLAGS: libc::c_ulong = libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;

/// One half of an argument, of which the bits of `mask` are to be `value`.
#[derive(Clone, Copy)]
struct Argument {
    /// Where in `struct seccomp_data` it is.
    offset: u32,
    mask: u32,
    value: u32,
}

/// The kernel looks at the lower half only, where the argument is an `int`.
const fn is(index: u32, value: libc::c_int) -> Argument {
    has(index, -1, value)
}

const fn has(index: u32, mask: libc::c_int, value: libc::c_int) -> Argument {
    let offset = ARGUMENTS + 8 * index + LOWER_HALF;
    Argument { offset, mask: mask.cast_unsigned(), value: value.cast_unsigned() }
}

/// Of a pointer, whose lower half alone says nothing.
const fn upper_half_is_null(index: u32) -> Argument {
    Argument { offset: ARGUMENTS + 8 * index + UPPER_HALF, mask: u32::MAX, value: 0 }
}

/// Called whatever the arguments.
const PLAIN: &[libc::c_long] = &[
    // Descriptors. No file is opened: what system files say, the privileged thread reads.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    // Sockets.
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Threads, and the end of the process.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // Time, chance, and what is known of the system.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
];

/// The same, where the architecture has them beside their successors.
#[cfg(target_arch = "x86_64")]
const PLAIN_OLD: &[libc::c_long] = &[libc::SYS_poll, libc::SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const PLAIN_OLD: &[libc::c_long] = &[];

/// The protocol of a netlink socket.
const NETLINK_ROUTE: libc::c_int = 0;
/// Of a socket's type, without flags (`SOCK_TYPE_MASK`).
const TYPE: libc::c_int = 0xf;
/// Commands of bpf(2): on a map, or a run of a program, that is there.
const BPF: [libc::c_int; 7] = [
    1,  // BPF_MAP_LOOKUP_ELEM
    2,  // BPF_MAP_UPDATE_ELEM
    3,  // BPF_MAP_DELETE_ELEM
    4,  // BPF_MAP_GET_NEXT_KEY
    10, // BPF_PROG_TEST_RUN
    15, // BPF_OBJ_GET_INFO_BY_FD
    21, // BPF_MAP_LOOKUP_AND_DELETE_ELEM
];
/// Commands of fcntl(2). Not those that have signals sent.
const FCNTL: [libc::c_int; 8] = [
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_GETPIPE_SZ,
    libc::F_SETPIPE_SZ,
];
/// Requests of ioctl(2): `TIOCOUTQ`, `FIONREAD`, `FIONBIO` (asm-generic/ioctls.h), `SIOCATMARK` (asm-generic/sockios.h),
/// `SIOCOUTQNSD` (linux/sockios.h).
const IOCTL: [libc::c_int; 5] = [0x5411, 0x541b, 0x5421, 0x8905, 0x894b];

/// Those of which arguments decide, each with one way in which it is allowed; `own` is this process.
fn conditional(own: libc::c_int) -> Vec<(libc::c_long, Vec<Argument>)> {
    let mut rules = Vec::new();
    // No Unix socket, by which a worker would be at those of container runtimes, of the system's manager, of this daemon.
    for family in [libc::AF_INET, libc::AF_INET6] {
        for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
            rules.push((libc::SYS_socket, vec![is(0, family), has(1, TYPE, kind)]));
        }
    }
    // Asked whether an address is this host's; without CAP_NET_ADMIN it changes nothing.
    rules.push((libc::SYS_socket, vec![is(0, libc::AF_NETLINK), is(2, NETLINK_ROUTE)]));
    // A pair of streams stays one; a datagram socket of a pair could be connected to another.
    rules.push((libc::SYS_socketpair, vec![is(0, libc::AF_UNIX), has(1, TYPE, libc::SOCK_STREAM)]));
    rules.extend(BPF.map(|command| (libc::SYS_bpf, vec![is(0, command)])));
    rules.extend(FCNTL.map(|command| (libc::SYS_fcntl, vec![is(1, command)])));
    rules.extend(IOCTL.map(|request| (libc::SYS_ioctl, vec![is(1, request)])));
    rules.push((libc::SYS_mmap, vec![has(2, libc::PROT_EXEC, 0)]));
    rules.push((libc::SYS_mprotect, vec![has(2, libc::PROT_EXEC, 0)]));
    // A thread of this process, and no process.
    let thread = libc::CLONE_THREAD | libc::CLONE_VM;
    rules.push((libc::SYS_clone, vec![has(0, thread, thread)]));
    rules.push((libc::SYS_prctl, vec![is(0, libc::PR_SET_NAME)]));
    // abort(3)
    rules.push((libc::SYS_tgkill, vec![is(0, own)]));
    // Its own limits, read.
    rules.push((libc::SYS_prlimit64, vec![is(0, 0), is(2, 0), upper_half_is_null(2)]));
    rules
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

fn number(of: libc::c_long) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

/// The program. Every block begins with the number of the call in the accumulator.
fn program(native: u32, own: libc::c_int) -> Vec<libc::sock_filter> {
    let answer = |what| instruction(RETURN, 0, 0, what);
    let refuse = |errno: libc::c_int| answer(ERRNO | errno.cast_unsigned());
    let mut program = vec![
        instruction(LOAD, 0, 0, ARCHITECTURE),
        instruction(JUMP_IF_EQUAL, 1, 0, native),
        refuse(libc::EPERM),
        instruction(LOAD, 0, 0, NUMBER),
        instruction(JUMP_IF_AT_LEAST, 0, 1, X32),
        refuse(libc::ENOSYS),
    ];
    for call in PLAIN.iter().chain(PLAIN_OLD) {
        program.extend([instruction(JUMP_IF_EQUAL, 0, 1, number(*call)), answer(ALLOW)]);
    }
    program.extend([instruction(JUMP_IF_EQUAL, 0, 1, number(libc::SYS_clone3)), refuse(libc::ENOSYS)]);
    for (call, arguments) in conditional(own) {
        // Three instructions for each argument, the answer, and the number again, to which a mismatch jumps.
        let length = u8::try_from(3 * arguments.len() + 2).unwrap_or(u8::MAX);
        program.push(instruction(JUMP_IF_EQUAL, 0, length, number(call)));
        for (at, Argument { offset, mask, value }) in arguments.iter().enumerate() {
            let rest = u8::try_from(3 * (arguments.len() - 1 - at) + 1).unwrap_or(u8::MAX);
            program.extend([
                instruction(LOAD, 0, 0, *offset),
                instruction(AND, 0, 0, *mask),
                instruction(JUMP_IF_EQUAL, 0, rest, *value),
            ]);
        }
        program.extend([answer(ALLOW), instruction(LOAD, 0, 0, NUMBER)]);
    }
    program.push(refuse(libc::EPERM));
    program
}

/// From now on the calling thread, and those that it starts, call nothing else. It has no_new_privs.
pub(super) fn install() -> io::Result<()> {
    let native = NATIVE.ok_or(io::ErrorKind::Unsupported)?;
    let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    let mut program = program(native, own);
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: `filter` is as many instructions as it says, which live for the call; the kernel copies and checks them.
    let set =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, FLAGS, &raw const filter) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program answers to a call, as the kernel's interpreter would.
    fn answer(program: &[libc::sock_filter], native: u32, call: libc::c_long, arguments: [u64; 6]) -> u32 {
        let (mut at, mut a) = (0, 0u32);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                LOAD if k == NUMBER => a = number(call),
                LOAD if k == ARCHITECTURE => a = native,
                LOAD => {
                    let argument = arguments[usize::try_from((k - ARGUMENTS) / 8).unwrap()];
                    let upper = (k - ARGUMENTS) % 8 == UPPER_HALF;
                    a = u32::try_from(if upper { argument >> 32 } else { argument & 0xffff_ffff }).unwrap();
                }
                AND => a &= k,
                JUMP_IF_EQUAL => at += usize::from(if a == k { jt } else { jf }),
                JUMP_IF_AT_LEAST => at += usize::from(if a >= k { jt } else { jf }),
                RETURN => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn of_calls_the_listed_ones_are_allowed_with_the_arguments_that_were_meant() {
        const OWN: libc::c_int = 4242;
        let program = program(1, OWN);
        let ask = |call, arguments: &[libc::c_int]| {
            let mut all = [0; 6];
            for (to, from) in all.iter_mut().zip(arguments) {
                *to = from.cast_unsigned().into();
            }
            match answer(&program, 1, call, all) {
                ALLOW => 0,
                refused => (refused & 0xffff).cast_signed(),
            }
        };
        let stream = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        for (call, arguments, expected) in [
            (libc::SYS_read, &[][..], 0),
            (libc::SYS_getegid, &[], 0),
            (libc::SYS_openat, &[], libc::EPERM),
            (libc::SYS_execve, &[], libc::EPERM),
            (libc::SYS_clone3, &[], libc::ENOSYS),
            (libc::SYS_read + i64::from(X32), &[], libc::ENOSYS),
            (libc::SYS_socket, &[libc::AF_INET6, stream, libc::IPPROTO_TCP], 0),
            (libc::SYS_socket, &[libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP], libc::EPERM),
            (libc::SYS_socket, &[libc::AF_PACKET, libc::SOCK_DGRAM], libc::EPERM),
            (libc::SYS_socket, &[libc::AF_UNIX, stream], libc::EPERM),
            (libc::SYS_socket, &[libc::AF_UNIX, libc::SOCK_DGRAM], libc::EPERM),
            (libc::SYS_socketpair, &[libc::AF_UNIX, stream], 0),
            (libc::SYS_socketpair, &[libc::AF_UNIX, libc::SOCK_DGRAM], libc::EPERM),
            (libc::SYS_socketpair, &[libc::AF_UNIX, libc::SOCK_SEQPACKET], libc::EPERM),
            (libc::SYS_socket, &[libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_ROUTE], 0),
            (libc::SYS_socket, &[libc::AF_NETLINK, libc::SOCK_RAW, 4], libc::EPERM),
            (libc::SYS_bpf, &[2], 0),
            (libc::SYS_bpf, &[5], libc::EPERM),
            (libc::SYS_mmap, &[0, 1, libc::PROT_READ | libc::PROT_WRITE], 0),
            (libc::SYS_mmap, &[0, 1, libc::PROT_READ | libc::PROT_EXEC], libc::EPERM),
            (libc::SYS_fcntl, &[3, libc::F_SETFL], 0),
            (libc::SYS_fcntl, &[3, libc::F_SETOWN, 1], libc::EPERM),
            (libc::SYS_tgkill, &[OWN, 1, libc::SIGABRT], 0),
            (libc::SYS_tgkill, &[1, 1, libc::SIGKILL], libc::EPERM),
            (libc::SYS_kill, &[OWN, libc::SIGTERM], libc::EPERM),
            (libc::SYS_clone, &[libc::SIGCHLD], libc::EPERM),
            (libc::SYS_prlimit64, &[0, 7, 0], 0),
            (libc::SYS_prlimit64, &[0, 7, 8], libc::EPERM),
        ] {
            assert_eq!(ask(call, arguments), expected, "{call} {arguments:?}");
        }
        let refused = ERRNO | libc::EPERM.cast_unsigned();
        assert_eq!(answer(&program, 2, libc::SYS_read, [0; 6]), refused);
        // New limits, at an address of which the lower half is 0.
        assert_eq!(answer(&program, 1, libc::SYS_prlimit64, [0, 7, 1 << 32, 0, 0, 0]), refused);
    }
}
