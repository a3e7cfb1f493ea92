//! What this process may use.
//!
//! Enters: the kernel's limits and the configuration's. Leaves: how many flows one worker takes. Invariant:
//! descriptors run out for new connections before they do for what is running. It never lowers a limit.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors kept for everything that is not a flow: maps, listeners, connections, files.
const RESERVED: u64 = 512;
/// The most descriptors one flow takes: two sockets.
const PER_FLOW: u64 = 2;

/// Raises the soft limit of descriptors to the hard one; the limit in force.
pub fn raise_nofile() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        return hard;
    }
    soft
}

/// The limit of descriptors that so many flows take.
pub fn nofile_for(flows: usize) -> u64 {
    RESERVED + PER_FLOW * flows as u64
}

/// How many flows one of `workers` takes at once.
pub fn flows_per_worker(configured: usize, nofile: u64, workers: usize) -> usize {
    let possible = usize::try_from(nofile.saturating_sub(RESERVED) / PER_FLOW).unwrap_or(usize::MAX);
    (configured.min(possible) / workers).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_bound_the_flows_and_every_worker_takes_some() {
        assert_eq!(flows_per_worker(1_000_000, 20_512, 2), 5_000);
        assert_eq!(flows_per_worker(100, 20_512, 2), 50);
        assert_eq!(flows_per_worker(100, 10, 8), 1);
        assert_eq!(flows_per_worker(1_000_000, nofile_for(10_000), 1), 10_000);
    }
}
