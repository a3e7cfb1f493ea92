//! The capabilities of a thread (capabilities(7)).

use std::io;

use rustix::{
    io::Errno,
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities,
    },
};

/// The names of those in a set, as `linux/capability.h` has them; one that is not known by its number.
pub(super) fn names(set: u64) -> Vec<String> {
    let set = CapabilitySet::from_bits_retain(set);
    let known = set.iter_names().map(|(name, _)| format!("CAP_{name}"));
    // Not what is in no name of `CapabilitySet::all()`, which has every bit.
    let others = set.iter_names().fold(set.bits(), |others, (_, one)| others & !one.bits());
    known.chain((0..u64::BITS).filter(|bit| others & (1 << bit) != 0).map(|bit| bit.to_string())).collect()
}

/// Those that the calling thread may have.
pub(super) fn permitted() -> io::Result<CapabilitySet> {
    Ok(capabilities(None)?.permitted)
}

/// Leaves the calling thread those of `kept` that it has: effective and permitted; none inheritable or ambient, and no others
/// in its bounding set, as far as it may take them from that.
pub(super) fn keep(kept: CapabilitySet) -> io::Result<()> {
    for capability in (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        if kept.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // That was the last one; or without CAP_SETPCAP, and nothing is gained from the set then, by no_new_privs.
            Err(Errno::INVAL | Errno::PERM) => break,
            done => done?,
        }
    }
    clear_ambient_capability_set()?;
    let before = capabilities(None)?;
    let permitted = before.permitted & kept;
    let sets = CapabilitySets { effective: permitted, permitted, inheritable: CapabilitySet::empty() };
    // Where there is nothing to drop, a service manager's filter may not permit the call.
    if sets == before {
        return Ok(());
    }
    Ok(set_capabilities(None, sets)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_named_as_the_manual_names_them() {
        assert_eq!(
            names(1 << 1 | 1 << 13 | 1 << 39 | 1 << 63),
            ["CAP_DAC_OVERRIDE", "CAP_NET_RAW", "CAP_BPF", "63"]
        );
    }
}
