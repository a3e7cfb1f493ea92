//! What the kernel knows of this process, under the names that every Prometheus client library gives it.

use std::fs;

use nix::{
    sys::resource::{Resource, getrlimit},
    time::{ClockId, clock_gettime},
    unistd::{SysconfVar, sysconf},
};

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Process {
    /// Seconds of CPU time.
    pub(super) cpu: f64,
    /// Bytes of memory.
    pub(super) resident: u64,
    pub(super) open_fds: u64,
    pub(super) max_fds: u64,
}

impl Process {
    /// As it is; what cannot be read is 0.
    #[expect(clippy::cast_precision_loss, reason = "seconds of CPU time are far below 2^53")]
    pub(super) fn now() -> Self {
        let cpu = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID);
        Self {
            cpu: cpu.map_or(0.0, |t| t.tv_sec() as f64 + t.tv_nsec() as f64 / 1e9),
            resident: resident().unwrap_or_default(),
            open_fds: open_fds(),
            max_fds: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft),
        }
    }
}

fn resident() -> Option<u64> {
    // proc_pid_statm(5): size, resident, …, in pages.
    let pages: u64 = fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(1)?.parse().ok()?;
    let page = sysconf(SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}

/// The kernel says it without a walk over them since Linux 6.2 (proc_fd_getattr, fs/proc/fd.c).
fn open_fds() -> u64 {
    match fs::metadata("/proc/self/fd").map(|found| found.len()) {
        Ok(n) if n > 0 => n,
        _ => fs::read_dir("/proc/self/fd").map_or(0, |fds| fds.count() as u64),
    }
}
