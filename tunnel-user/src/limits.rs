//! What this process may use.
//!
//! Enters: the kernel's limits and the configuration's. Leaves: how many flows one worker takes. Invariant:
//! descriptors run out for new connections before they do for what is running. It never lowers a limit.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Relay;

/// Descriptors kept for everything that is not a flow: maps, listeners, connections, files.
const RESERVED: u64 = 512;
/// The most descriptors one flow takes: two sockets.
const PER_FLOW: u64 = 2;
/// The same where bytes go through pipes, of which there is one for every two flows: two sockets, half a pipe.
const PER_FLOW_PIPED: u64 = 3;

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
pub fn flows_per_worker(configured: usize, nofile: u64, workers: usize, relay: Relay) -> usize {
    let per_flow = match relay {
        Relay::Copy => PER_FLOW,
        Relay::Pipe => PER_FLOW_PIPED,
    };
    let possible = usize::try_from(nofile.saturating_sub(RESERVED) / per_flow).unwrap_or(usize::MAX);
    (configured.min(possible) / workers).max(1)
}

/// How many pipes a worker of so many flows may have.
pub fn pipes_for(flows: usize) -> usize {
    flows.div_ceil(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_bound_the_flows_and_every_worker_takes_some() {
        let copied = |configured, nofile, workers| flows_per_worker(configured, nofile, workers, Relay::Copy);
        assert_eq!(copied(1_000_000, 20_512, 2), 5_000);
        assert_eq!(copied(100, 20_512, 2), 50);
        assert_eq!(copied(100, 10, 8), 1);
        assert_eq!(copied(1_000_000, nofile_for(10_000), 1), 10_000);
        let piped = flows_per_worker(1_000_000, 20_512, 2, Relay::Pipe);
        assert_eq!((piped, pipes_for(piped)), (3_333, 1_667), "two sockets each, and two descriptors a pipe");
    }
}
