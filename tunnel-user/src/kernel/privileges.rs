//! Capabilities of this process, and which of the required ones are missing.
//!
//! They are checked before anything is changed.

use std::{fs, io};

/// A capability that capturing takes, by its number in `linux/capability.h`, and what for.
const FOR_CAPTURE: [(u32, &str, &str); 3] = [
    (12, "CAP_NET_ADMIN", "SO_MARK, attaching programs to cgroups"),
    (21, "CAP_SYS_ADMIN", "cgroups, network namespaces"),
    (39, "CAP_BPF", "loading BPF programs"),
];

/// What `relay = "splice"` takes: loading a program for sockets, which reads kernel memory, and trying it. Without the last
/// two the kernel does not say EPERM, but finds fault with the program.
const FOR_SPLICE: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
/// It stands for CAP_PERFMON and CAP_BPF (capabilities(7)).
const SYS_ADMIN: u32 = 21;

/// The capabilities that this process has, a bit for each.
fn effective() -> u64 {
    let status = fs::read_to_string("/proc/self/status").ok();
    let bits = status.and_then(|status| {
        let bits = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
        u64::from_str_radix(bits.trim(), 16).ok()
    });
    bits.unwrap_or(0)
}

/// The capabilities that capturing takes and this process does not have.
pub fn missing_for_capture() -> Vec<(&'static str, &'static str)> {
    let effective = effective();
    FOR_CAPTURE
        .into_iter()
        .filter(|(bit, ..)| effective & (1 << bit) == 0)
        .map(|(_, name, what)| (name, what))
        .collect()
}

/// The capabilities that `relay = "splice"` takes and this process does not have.
pub fn missing_for_splice() -> Vec<&'static str> {
    missing_of(effective())
}

fn missing_of(mut effective: u64) -> Vec<&'static str> {
    if effective & (1 << SYS_ADMIN) != 0 {
        effective |= 1 << 38 | 1 << 39;
    }
    FOR_SPLICE.into_iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| name).collect()
}

/// From now on this process leaves no core dump, and nobody without CAP_SYS_PTRACE looks into its memory. A program that it
/// executes is as dumpable as any other (execve(2)).
pub fn forbid_core_dumps() -> io::Result<()> {
    nix::sys::prctl::set_dumpable(false).map_err(io::Error::from)
}

/// The capabilities that capturing takes.
pub fn names_for_capture() -> [&'static str; 3] {
    FOR_CAPTURE.map(|(_, name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sys_admin_stands_for_bpf_and_perfmon_and_not_for_net_admin() {
        assert_eq!(missing_of(1 << SYS_ADMIN), ["CAP_NET_ADMIN"]);
        assert_eq!(missing_of(1 << 12 | 1 << 39), ["CAP_PERFMON"]);
        assert_eq!(missing_of(0), ["CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF"]);
        assert!(missing_of(1 << SYS_ADMIN | 1 << 12).is_empty() && missing_of(u64::MAX).is_empty());
    }
}
