//! Takes from a thread what it does not need: capabilities, system calls, files.
//!
//! A thread is confined and not the process: the control thread goes on to load programs and to enter network namespaces.
//! docs/adr/0050 says what that holds against, and what it does not.
//!
//! # Invariants
//! - What was taken from a thread is taken from every thread that it starts, and cannot be had back.

mod capabilities;
#[cfg(debug_assertions)]
pub mod hostile;
mod landlock;
mod seccomp;

use std::{fs, io};

use rustix::thread::{CapabilitySet, gettid};

pub use self::landlock::abi as landlock_abi;
use super::version::Kernel;

/// What a thread was left with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confined {
    /// Its number (gettid(2)), for [`Seen::of_thread`].
    pub thread: i32,
    /// The version of Landlock's interface that its rules were made with; `None` where the kernel has none.
    pub landlock: Option<u32>,
}

/// Why a thread could not be confined.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct ConfineError {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> ConfineError {
    move |source| ConfineError { what, source }
}

/// What a worker keeps of those that it `has`: it marks its sockets, where `marking`, and its pipes are not counted against its
/// user's.
fn of_worker(marking: bool, has: CapabilitySet) -> CapabilitySet {
    let kernel = Kernel::running();
    let mut kept = CapabilitySet::SYS_RESOURCE;
    if marking {
        // CAP_NET_RAW sets SO_MARK since Linux 5.17, and the filter below makes no raw sockets. A service manager may have
        // left this process the other one only.
        let raw = kernel.is_at_least((5, 17)) && has.contains(CapabilitySet::NET_RAW);
        kept |= if raw { CapabilitySet::NET_RAW } else { CapabilitySet::NET_ADMIN };
    }
    // Until 5.19 every bpf(2) took it where unprivileged programs are off; the filter leaves it to what acts on maps.
    if !kernel.is_at_least((5, 19)) {
        kept |= CapabilitySet::BPF;
    }
    kept
}

/// What the control thread of a daemon keeps, and the threads that it starts but for the workers.
const OF_CONTROL: CapabilitySet = CapabilitySet::empty()
    // Files of identities, of the configuration and of logs that belong to other users.
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    // Marks, listeners in network namespaces, programs.
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_RAW)
    // Listeners below 1024.
    .union(CapabilitySet::NET_BIND_SERVICE)
    // Network namespaces, cgroups, bpffs, programs.
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::BPF)
    .union(CapabilitySet::PERFMON)
    // Whose socket it is, for bypass and for the network namespace of a connection.
    .union(CapabilitySet::SYS_PTRACE)
    // The limit of descriptors; pipes; memory of maps before Linux 5.11.
    .union(CapabilitySet::SYS_RESOURCE)
    .union(CapabilitySet::IPC_LOCK)
    // To take all these from the workers' bounding sets.
    .union(CapabilitySet::SETPCAP);

/// Has the calling thread, which is the only one so far, do without the capabilities that a daemon never uses, and gain none
/// by executing a program.
pub fn control_thread() -> Result<(), ConfineError> {
    capabilities::keep(OF_CONTROL).map_err(failed("capabilities"))?;
    no_new_privileges()
}

/// Confines the calling thread, which serves flows from then on. A kernel without Landlock confines it without.
pub fn worker_thread(marking: bool) -> Result<Confined, ConfineError> {
    let has = capabilities::permitted().map_err(failed("capabilities"))?;
    capabilities::keep(of_worker(marking, has)).map_err(failed("capabilities"))?;
    no_new_privileges()?;
    let landlock = landlock::forbid_files().map_err(failed("Landlock"))?;
    seccomp::install().map_err(failed("seccomp"))?;
    Ok(Confined { thread: gettid().as_raw_nonzero().get(), landlock })
}

fn no_new_privileges() -> Result<(), ConfineError> {
    nix::sys::prctl::set_no_new_privs().map_err(|e| failed("no_new_privs")(e.into()))
}

/// What the kernel says of a thread of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its effective user.
    pub user: u32,
    /// Its effective capabilities, by name.
    pub capabilities: Vec<String>,
    /// Whether executing a program gives it no more.
    pub no_new_privs: bool,
    /// 0 without, 1 strict, 2 with a filter.
    pub seccomp: u32,
}

impl Seen {
    /// Of a thread of this process, by its number.
    pub fn of_thread(thread: i32) -> io::Result<Self> {
        fs::read_to_string(format!("/proc/self/task/{thread}/status")).map(|status| Self::read(&status))
    }

    /// Of the first thread.
    pub fn of_process() -> io::Result<Self> {
        fs::read_to_string("/proc/self/status").map(|status| Self::read(&status))
    }

    fn read(status: &str) -> Self {
        let field = |name: &str| {
            let found = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            found.unwrap_or_default().trim()
        };
        Self {
            // Real, effective, saved, of file systems (proc_pid_status(5)).
            user: field("Uid")
                .split_ascii_whitespace()
                .nth(1)
                .and_then(|n| n.parse().ok())
                .unwrap_or_default(),
            capabilities: capabilities::names(u64::from_str_radix(field("CapEff"), 16).unwrap_or_default()),
            no_new_privs: field("NoNewPrivs") == "1",
            seccomp: field("Seccomp").parse().unwrap_or_default(),
        }
    }
}

/// Whether the kernel has filters of system calls.
pub fn has_seccomp() -> bool {
    fs::exists("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default()
}

/// Whether this process may leave a core dump.
pub fn is_dumpable() -> bool {
    nix::sys::prctl::get_dumpable().unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_marks_by_the_lesser_capability_where_it_has_that() {
        let (raw, admin) = (CapabilitySet::NET_RAW, CapabilitySet::NET_ADMIN);
        if Kernel::running().is_at_least((5, 17)) {
            assert!(
                of_worker(true, raw | admin).contains(raw) && !of_worker(true, raw | admin).contains(admin)
            );
        }
        assert!(of_worker(true, admin).contains(admin));
        assert!(!of_worker(false, raw | admin).intersects(raw | admin));
    }

    #[test]
    fn what_the_kernel_says_of_a_thread_is_read() {
        let seen = Seen::read(
            "Name:\tworker-0\nUid:\t0\t7\t0\t0\nCapEff:\t0000000001002000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n",
        );
        let capabilities = vec!["CAP_NET_RAW".to_owned(), "CAP_SYS_RESOURCE".to_owned()];
        assert_eq!(seen, Seen { user: 7, capabilities, no_new_privs: true, seccomp: 2 });
    }

    /// What is taken from one thread is its own loss: others go on, and it goes on to do what workers do.
    #[test]
    fn a_confined_thread_serves_and_opens_no_file_and_others_do() {
        let confined = std::thread::spawn(|| {
            let confined = worker_thread(false).unwrap();
            let seen = fs::read_to_string("/proc/self/status").map_err(|e| e.raw_os_error());
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            listener.accept().unwrap();
            // It may start threads, and no process.
            std::thread::spawn(|| ()).join().unwrap();
            let process = std::process::Command::new("/bin/true").status().map_err(|e| e.raw_os_error());
            (confined, seen, process.map(drop))
        });
        let (confined, seen, process) = confined.join().unwrap();
        assert_eq!(seen, Err(Some(libc::EPERM)));
        assert_eq!(process, Err(Some(libc::EPERM)));
        assert_eq!(confined.landlock.is_some(), landlock_abi().is_some());
        fs::read_to_string("/proc/self/status").unwrap();
        std::process::Command::new("/bin/true").status().unwrap();
    }
}
