//! How many flows a worker may carry, from the limit of file descriptors and the configuration.
//!
//! New connections run out of descriptors before established ones do. Limits are raised, never lowered.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Action, Config, Protocol, Relay};

/// Descriptors kept for everything that is not a flow: maps, listeners, connections, files.
const RESERVED: u64 = 512;
/// The most descriptors one flow takes: two sockets.
pub const PER_FLOW: u64 = 2;
/// The same where one side is a stream on a connection that many share.
const PER_FLOW_TUNNELLED: u64 = 1;
/// The same where bytes go through pipes, of which there is one for every two flows: two sockets, half a pipe.
const PER_FLOW_PIPED: u64 = 3;

/// The same where a kernel program moves bytes: one flow in two can have a pair of mailboxes.
const PER_FLOW_SPLICED: u64 = 3;

/// The most descriptors that one flow takes with this configuration, where bytes are moved by `relay`. On either side it has
/// a socket of its own (captured, or HTTP/1; dialled, or HTTP/1), or a stream of HTTP/2.
pub fn per_flow(config: &Config, relay: Relay) -> u64 {
    match relay {
        _ if !has_two_sockets(config) => PER_FLOW_TUNNELLED,
        Relay::Copy => PER_FLOW,
        Relay::Auto | Relay::Splice => PER_FLOW_SPLICED,
        Relay::Pipe => PER_FLOW_PIPED,
    }
}

/// Whether a flow may have a socket of its own on both sides.
pub fn has_two_sockets(config: &Config) -> bool {
    let captures = !config.captures.is_empty() || !config.redirects.is_empty();
    let enters = captures || config.listeners.iter().any(|l| l.protocols.contains(&Protocol::H1));
    let dials = config.routes.iter().any(|route| matches!(route.to, Action::Direct | Action::Dial(_)));
    let leaves = dials || config.upstreams.iter().any(|u| u.protocol.first() == Protocol::H1);
    enters && leaves
}

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
pub fn flows_per_worker(configured: usize, nofile: u64, workers: usize, per_flow: u64) -> usize {
    let possible = usize::try_from(nofile.saturating_sub(RESERVED) / per_flow).unwrap_or(usize::MAX);
    (configured.min(possible) / workers).max(1)
}

/// How many flows all workers take at once, where descriptors allow fewer than the configuration.
pub fn cut_to(configured: usize, nofile: u64, workers: usize, per_flow: u64) -> Option<usize> {
    let flows = flows_per_worker(configured, nofile, workers, per_flow) * workers;
    // What does not divide is no cut.
    (flows + workers <= configured).then_some(flows)
}

/// How many pipes, or pairs of mailboxes, a worker of so many flows may have.
pub fn pipes_for(flows: usize) -> usize {
    flows.div_ceil(2)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::CheckFiles;

    #[test]
    fn descriptors_bound_the_flows_and_every_worker_takes_some() {
        let flows = |configured, nofile, workers| flows_per_worker(configured, nofile, workers, PER_FLOW);
        assert_eq!(flows(1_000_000, 20_512, 2), 5_000);
        assert_eq!(flows(100, 20_512, 2), 50);
        assert_eq!(flows(100, 10, 8), 1);
        assert_eq!(flows(1_000_000, nofile_for(10_000), 1), 10_000);
        assert_eq!(cut_to(1_000_000, 20_512, 2, PER_FLOW), Some(10_000));
        assert_eq!(cut_to(101, 20_512, 2, PER_FLOW), None);
        let piped = flows_per_worker(1_000_000, 20_512, 2, PER_FLOW_PIPED);
        assert_eq!((piped, pipes_for(piped)), (3_333, 1_667), "two sockets each, and two descriptors a pipe");
    }

    #[test]
    fn a_flow_that_rides_on_a_shared_connection_takes_one_descriptor() {
        let of = |text: &str| {
            let config = Config::parse(text, Path::new("test.toml"), CheckFiles::No);
            let config = config.unwrap_or_else(|e| panic!("{e}"));
            // Where "auto" finds that the kernel does not splice.
            let relay = Some(config.daemon.relay).filter(|relay| *relay != Relay::Auto);
            per_flow(&config, relay.unwrap_or(Relay::Copy))
        };
        const CAPTURE: &str = "[[capture]]\ncgroup = \"/sys/fs/cgroup/app\"\n";
        const IDENTITY: &str = "[identity]\ncert = \"c\"\nkey = \"k\"\nca = \"ca\"\n";
        const LISTENER: &str = "[[listener]]\naddress = \"127.0.0.1:15008\"\n";
        const TUNNEL: &str = "[[route]]\nto = [{ upstream = \"u\" }]\n\
                              [[upstream]]\nname = \"u\"\nendpoints = [\"127.0.0.1:1\"]\n";
        const DIRECT: &str = "[[route]]\nto = \"direct\"\n";
        assert_eq!(of(&[IDENTITY, CAPTURE, TUNNEL].concat()), 1);
        assert_eq!(of(&[IDENTITY, LISTENER, DIRECT].concat()), 1);
        assert_eq!(of(&[CAPTURE, DIRECT].concat()), 2);
        let h1 = LISTENER.to_owned() + "protocols = [\"h2\", \"h1\"]\n";
        assert_eq!(of(&[IDENTITY, &h1, DIRECT].concat()), 2);
        assert_eq!(of(&[IDENTITY, CAPTURE, TUNNEL, "protocol = \"h1\"\n"].concat()), 2);
        assert_eq!(of(&["[daemon]\nrelay = \"pipe\"\n", CAPTURE, DIRECT].concat()), 3);
        assert_eq!(of(&["[daemon]\nrelay = \"splice\"\n", CAPTURE, DIRECT].concat()), 3);
        assert_eq!(of(&["[daemon]\nrelay = \"copy\"\n", CAPTURE, DIRECT].concat()), 2);
    }
}
