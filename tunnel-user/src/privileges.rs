//! What this process may do.
//!
//! Enters: the kernel's word on our capabilities. Leaves: the names of those that are missing. Invariant:
//! a missing privilege is found before anything is changed. It never gains one.

use std::fs;

use crate::exit::{Cause, Failure};

/// A capability that capturing takes, by its number in `linux/capability.h`, and what for.
const FOR_CAPTURE: [(u32, &str, &str); 3] = [
    (12, "CAP_NET_ADMIN", "marking our own sockets, attaching to cgroups"),
    (21, "CAP_SYS_ADMIN", "cgroups, network namespaces"),
    (39, "CAP_BPF", "loading programs"),
];

/// The capabilities that capturing takes and this process does not have.
pub fn missing_for_capture() -> Vec<(&'static str, &'static str)> {
    let effective = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|s| {
            let bits = s.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
            u64::from_str_radix(bits.trim(), 16).ok()
        })
        .unwrap_or(0);
    FOR_CAPTURE
        .into_iter()
        .filter(|(bit, ..)| effective & (1 << bit) == 0)
        .map(|(_, name, what)| (name, what))
        .collect()
}

/// The capabilities that capturing takes.
pub fn names_for_capture() -> [&'static str; 3] {
    FOR_CAPTURE.map(|(_, name, _)| name)
}

/// Fails with the names of what is missing.
pub fn require_for_capture() -> Result<(), Failure> {
    let missing = missing_for_capture();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(name, what)| format!("{name} ({what})")).collect();
    Err(Failure::Privilege(Cause::new(
        format!("capturing takes privileges that this process lacks: {}", names.join(", ")),
        "Run it as root: sudo tunnel ...",
    )))
}
