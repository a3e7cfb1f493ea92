//! Processes that have left a captured group: what they connect to from then on is in plaintext.
//!
//! What others start on behalf of a process (systemd-run, a container engine) is not found: it is nobody's descendant.
//!
//! # Invariants
//! - No process is named that is in the group, has ended, or was never in it.

use std::{
    collections::HashSet,
    fs,
    time::{Duration, Instant},
};

use crate::kernel::group::Group;

/// At most one warning in this time for a group: of processes that leave one after the other the first is named.
const QUIET: Duration = Duration::from_secs(600);
/// How often it looks, with a read of /proc for each process of the group: 10 µs each.
const EVERY: Duration = Duration::from_secs(5);
/// Groups of so few processes are looked at each time that somebody asks, once a second.
const FEW: usize = 64;
/// Processes of a group beyond which only those that vanish are looked after, and not what each has started.
const PROCESSES_MAX: usize = 1024;
/// Clock ticks in a second, in which the kernel says when a process has started (`USER_HZ`).
const TICKS: f64 = 100.0;

/// What was seen of a group.
#[derive(Default)]
pub(super) struct Leavers {
    before: HashSet<u32>,
    /// In clock ticks since boot.
    seen: u64,
    looked: Option<Instant>,
    warned: Option<Instant>,
    warnings: u64,
}

impl Leavers {
    /// How often it has warned.
    pub(super) fn warnings(&self) -> u64 {
        self.warnings
    }

    /// Looks, if it is time to.
    pub(super) fn look(&mut self, group: &Group, processes: &[u32]) {
        if processes.len() <= FEW || self.looked.is_none_or(|at| at.elapsed() >= EVERY) {
            self.look_now(group, processes);
        }
    }

    /// Looks. `processes` are those of the group.
    pub(super) fn look_now(&mut self, group: &Group, processes: &[u32]) {
        self.looked = Some(Instant::now());
        let now: HashSet<u32> = processes.iter().copied().collect();
        let gone = self.before.difference(&now).copied();
        // A number that was given to another process since says nothing.
        let mut outside: Vec<u32> =
            gone.filter(|pid| started(*pid).is_some_and(|at| at <= self.seen)).collect();
        if now.len() <= PROCESSES_MAX {
            outside.extend(now.iter().flat_map(|pid| children(*pid)).filter(|pid| !now.contains(pid)));
        }
        self.seen = uptime();
        self.before = now;
        if outside.is_empty() {
            return;
        }
        // Whoever was started since the list was made is in this one.
        let again: HashSet<u32> = group.processes().into_iter().collect();
        let left = outside.into_iter().filter(|pid| !again.contains(pid) && started(*pid).is_some());
        let Some(first) = left.min() else { return };
        if self.warned.is_some_and(|at| at.elapsed() < QUIET) {
            return;
        }
        self.warned = Some(Instant::now());
        self.warnings += 1;
        let name = fs::read_to_string(format!("/proc/{first}/comm")).unwrap_or_default();
        let at = fs::read_to_string(format!("/proc/{first}/cgroup")).unwrap_or_default();
        let at = at.lines().find_map(|l| l.strip_prefix("0::")).unwrap_or_default();
        tracing::warn!(
            group = group.called(),
            pid = first,
            name = name.trim_end(),
            now_in = at,
            "a process has left the captured group: its new connections are NOT captured"
        );
    }
}

/// What a process has started by its first thread (CONFIG_PROC_CHILDREN).
fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// When a process was started, in clock ticks since boot. `None` of one that has ended.
pub(super) fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name may have brackets and spaces (proc_pid_stat(5)).
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn uptime() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text.split(' ').next().and_then(|s| s.parse().ok()).unwrap_or(0.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and less than 2^53"
    )]
    let ticks = (seconds * TICKS) as u64;
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_was_started_before_now_and_one_that_ended_never() {
        let own = started(std::process::id()).expect("it runs");
        assert!(own > 0 && own <= uptime() + 1);
        assert_eq!(started(u32::MAX), None);
    }

    #[test]
    fn what_a_process_has_started_is_known() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("it starts");
        // This test has a thread of its own, and the child is that thread's.
        let text = fs::read_to_string("/proc/thread-self/children").expect("the kernel says");
        assert!(text.split(' ').any(|pid| pid == child.id().to_string()), "{text}");
        child.kill().expect("it runs");
        child.wait().expect("it has ended");
        assert_eq!(started(child.id()), None);
    }
}
