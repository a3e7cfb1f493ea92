//! What runs cost: processor time and memory of each part, by its control group.
//!
//! Whatever a process of a group does is counted, its children and its time in the kernel included; softirqs count for whom they
//! interrupt, as the kernel does it.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use nix::unistd::{SysconfVar, sysconf};

use super::model::{Memory, Role};
use crate::cgroup::Cgroup;

/// Processor time that each part has used so far.
pub(super) fn cpu<'g>(
    groups: impl IntoIterator<Item = (Role, &'g Cgroup)>,
) -> Result<BTreeMap<Role, Duration>> {
    groups.into_iter().map(|(role, group)| Ok((role, used(group.path())?))).collect()
}

/// `usage_usec` of `cpu.stat`, which every group of version 2 has (Documentation/admin-guide/cgroup-v2.rst).
fn used(group: &Path) -> Result<Duration> {
    let path = group.join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let usage = usage.with_context(|| format!("{} has no usage_usec", path.display()))?;
    Ok(Duration::from_micros(usage.trim().parse()?))
}

/// What each part has used between two readings, in seconds.
pub(super) fn spent(
    before: &BTreeMap<Role, Duration>,
    after: &BTreeMap<Role, Duration>,
) -> BTreeMap<Role, f64> {
    let since = |role: &Role| before.get(role).copied().unwrap_or_default();
    after.iter().map(|(role, now)| (*role, now.saturating_sub(since(role)).as_secs_f64())).collect()
}

/// What is held at one moment.
#[derive(Clone, Debug)]
pub(super) struct Held {
    resident: BTreeMap<Role, i64>,
    tcp: i64,
    slab: i64,
}

impl Held {
    /// Looks.
    pub(super) fn now<'g>(groups: impl IntoIterator<Item = (Role, &'g Cgroup)>) -> Result<Self> {
        let resident = groups.into_iter().map(|(role, group)| Ok((role, resident(group.path())?)));
        Ok(Self { resident: resident.collect::<Result<_>>()?, tcp: tcp_buffers()?, slab: slab()? })
    }

    /// What `connections` have added since.
    pub(super) fn grown(&self, before: &Self, connections: u64) -> Memory {
        let since = |role: &Role| before.resident.get(role).copied().unwrap_or_default();
        Memory {
            connections,
            resident: self.resident.iter().map(|(role, now)| (*role, now - since(role))).collect(),
            tcp: self.tcp - before.tcp,
            slab: self.slab - before.slab,
        }
    }
}

/// Resident memory of a group's processes. Of `smaps_rollup`: the counters behind `statm` are off by up to 64
/// pages per processor (percpu_counter), which is as much as a hundred connections.
fn resident(group: &Path) -> Result<i64> {
    let processes = fs::read_to_string(group.join("cgroup.procs"))?;
    let mut sum = 0;
    for pid in processes.lines() {
        // Gone since: it holds nothing.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
        sum += kib(&text, "Rss:").with_context(|| format!("/proc/{pid}/smaps_rollup has no Rss"))?;
    }
    Ok(sum)
}

/// Slab memory: sockets, and what belongs to them.
fn slab() -> Result<i64> {
    kib(&fs::read_to_string("/proc/meminfo")?, "Slab:").context("/proc/meminfo has no Slab")
}

/// A line such as `Slab:  1234 kB`, in bytes.
fn kib(text: &str, key: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<i64>().ok().map(|kib| kib * 1024)
}

/// Pages in TCP buffers; one counter for all namespaces (`tcp_memory_allocated`).
fn tcp_buffers() -> Result<i64> {
    let text = fs::read_to_string("/proc/net/sockstat")?;
    let line = text.lines().find(|line| line.starts_with("TCP:")).context("sockstat has no TCP line")?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "mem");
    let pages: i64 = words.nth(1).context("sockstat says nothing about memory")?.parse()?;
    Ok(pages * sysconf(SysconfVar::PAGE_SIZE)?.context("the page size is unknown")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of /proc files in kB are read as bytes.
    #[test]
    fn a_line_in_kib_is_read_as_bytes() {
        assert_eq!(kib("MemFree: 7 kB\nSlab:   12 kB\n", "Slab:"), Some(12 * 1024));
        assert_eq!(kib("Slab: many kB", "Slab:"), None);
    }

    #[test]
    fn the_kernel_says_what_tcp_and_slabs_hold() -> Result<()> {
        assert!(tcp_buffers()? >= 0);
        assert!(slab()? > 0);
        Ok(())
    }
}
