//! What a worker would do that runs somebody else's code, for tests of what it is left with: in debug builds only, and only
//! where the environment asks for it.

#![expect(unsafe_code, reason = "what is tried is what libraries keep one from")]

use std::{io, ptr};

/// Everything is tried where this is set.
const VARIABLE: &str = "TUNNEL_TEST_HOSTILE_WORKER";

/// Whether whoever has started the process wants it.
#[expect(clippy::disallowed_methods, reason = "what no release has is no part of the command line")]
pub fn is_wanted() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// What was tried, and the error; `None`: it succeeded.
pub type Outcome = (&'static str, Option<i32>);

/// Tries it, on the calling thread; only if it is `confined` what would leave something behind.
pub fn outcomes(confined: bool) -> Vec<Outcome> {
    let error = |what, returned: libc::c_long| {
        let failed = (returned < 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or_default());
        if returned > 2 {
            // SAFETY: a descriptor that the call has returned.
            unsafe { libc::close(i32::try_from(returned).unwrap_or(-1)) };
        }
        (what, failed)
    };
    /// A system call by its number.
    macro_rules! call {
        ($number:ident $(, $argument:expr)*) => {
            // SAFETY: numbers, null pointers, and constants of C; each call fails, or does what leaves nothing behind.
            unsafe { libc::syscall(libc::$number $(, $argument)*) }
        };
    }
    let null = ptr::null::<u8>();
    let shadow = c"/etc/shadow".as_ptr();
    let made = c"/tmp/tt-hostile".as_ptr();
    let program = c"/bin/true".as_ptr();
    let (none, first): (libc::c_long, libc::c_long) = (0, 1);
    let page = libc::PROT_READ | libc::PROT_EXEC;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let parent = call!(SYS_getppid).max(1);
    let mut outcomes = vec![
        error("read /etc/shadow", call!(SYS_openat, libc::AT_FDCWD, shadow, libc::O_RDONLY)),
        error("open a raw socket", call!(SYS_socket, libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)),
        error("open a packet socket", call!(SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, none)),
        error("signal another process", call!(SYS_kill, parent, none)),
    ];
    if confined {
        let flags = libc::O_CREAT | libc::O_WRONLY;
        outcomes.extend([
            error("open a Unix socket", call!(SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, none)),
            error("load a program", call!(SYS_bpf, 5, null, none)),
            error("make a map", call!(SYS_bpf, none, null, none)),
            error("open a map by its number", call!(SYS_bpf, 14, null, none)),
            error("signal a thread of another process", call!(SYS_tgkill, parent, parent, none)),
            error("trace another process", call!(SYS_ptrace, libc::PTRACE_ATTACH, parent, none, none)),
            error(
                "read another process's memory",
                call!(SYS_process_vm_readv, first, null, none, null, none, none),
            ),
            error("take another process's descriptor", call!(SYS_pidfd_open, parent, none)),
            error("enter a namespace", call!(SYS_setns, -1, libc::CLONE_NEWNET)),
            error("make a namespace", call!(SYS_unshare, libc::CLONE_NEWNET)),
            error("mount", call!(SYS_mount, null, null, null, none, null)),
            error("load a module", call!(SYS_init_module, null, none, null)),
            error("load a kernel", call!(SYS_kexec_load, none, none, null, none)),
            error("use the keyring", call!(SYS_keyctl, none, none, none, none, none)),
            error("trace the kernel", call!(SYS_perf_event_open, null, none, none, none, none)),
            error("handle page faults", call!(SYS_userfaultfd, first)),
            error("make an io_uring", call!(SYS_io_uring_setup, first, null)),
            error("map executable memory", call!(SYS_mmap, null, 4096usize, page, anonymous, -1, none)),
            error("raise a limit", call!(SYS_prlimit64, none, libc::RLIMIT_NOFILE, first, none)),
            error("write a file", call!(SYS_openat, libc::AT_FDCWD, made, flags, 0o600)),
            error("execute a program", call!(SYS_execve, program, null, null)),
            error("start a process", call!(SYS_clone, libc::SIGCHLD, none, none, none, none)),
        ]);
    }
    outcomes
}
