//! What all workers are told of a configuration.

use std::{net::SocketAddr, sync::Arc};

use super::bootstrap::Process;
use crate::{
    config::{self, Config, Relay},
    kernel::version::{Feature, Kernel},
    observe::{access_log::Logs, istio, traces::Tracer},
    process::{
        books::PeerLimits,
        exit::{Cause, Failure},
        limits, memory,
    },
    relay::{self, PathKind},
    routing::{policy::Policies, router::Router},
    sinks::dial::Dialer,
    worker::{Limits, Shared, Timeouts},
};

/// `bound` are the addresses of the listeners for CONNECT requests.
pub(super) fn shared(
    config: &Config,
    process: &Process,
    bound: impl Iterator<Item = SocketAddr>,
    path: PathKind,
    access_logs: Logs,
    tracer: Option<Arc<Tracer>>,
) -> Arc<Shared> {
    let own: Vec<_> = bound.chain(config.redirects.iter().flat_map(|r| &r.listen).copied()).collect();
    let moved_by = match path {
        PathKind::Copy => Relay::Copy,
        PathKind::Pipe => Relay::Pipe,
        PathKind::Splice => Relay::Splice,
    };
    let per_flow = limits::per_flow(config, moved_by);
    let max_flows = config.daemon.max_flows.get();
    if let Some(flows) = limits::cut_to(max_flows, process.nofile, process.workers, per_flow) {
        warn_of_cut(config, flows, process.nofile, per_flow);
    }
    Arc::new(Shared {
        router: Router::new(config.routes.clone()),
        policies: Policies::new(config.policies.clone(), &own),
        dialer: Dialer::new(process.own.clone()),
        pseudonym: process.pseudonym.clone(),
        flows_max: limits::flows_per_worker(max_flows, process.nofile, process.workers, per_flow),
        path,
        sniff_timeout: config.daemon.sniff_timeout,
        dial_timeout: config::DIAL_TIMEOUT,
        drain_timeout: config.daemon.drain_timeout,
        keep_records: process.keep_records,
        limits: limits_of(config, process.workers),
        access_logs,
        tracer,
        istio: config
            .admin
            .metrics
            .contains(&config::MetricSet::Istio)
            .then(|| istio::SERIES_MAX.div_ceil(process.workers)),
    })
}

/// What one of so many workers gives peers and flows.
fn limits_of(config: &Config, workers: usize) -> Limits {
    let limits = &config.daemon.limits;
    let bytes = |set: Option<config::Bytes>| set.map(|config::Bytes(n)| n);
    let (memory, peer_memory) = memory::budget(bytes(limits.memory), bytes(limits.peer_memory));
    let share = u64::try_from(workers).unwrap_or(u64::MAX);
    let rate = limits.peer_flows_per_second.get();
    Limits {
        memory: memory / share,
        peer_memory: peer_memory / share,
        peer: PeerLimits {
            connections: limits.peer_connections.get().div_ceil(workers),
            flows_per_second: rate.div_ceil(u32::try_from(workers).unwrap_or(rate)),
        },
        flows: Timeouts { idle: limits.flow_idle_timeout, most: limits.flow_max_duration },
    }
}

/// Says that descriptors allow fewer flows than the configuration.
fn warn_of_cut(config: &Config, flows: usize, nofile: u64, per_flow: u64) {
    let what = "fewer flows are taken than max_flows, for want of file descriptors: raise their limit (LimitNOFILE= in a \
                systemd unit, ulimit -Hn in a shell), or lower max_flows";
    let max_flows = config.daemon.max_flows;
    // Beside a command that has its terminal, only who wants to know more is told.
    if config.captures.iter().any(|c| c.cgroup == config::CgroupRef::Fresh) {
        tracing::info!(max_flows, flows, nofile, per_flow, "{what}");
    } else {
        tracing::warn!(max_flows, flows, nofile, per_flow, "{what}");
    }
}

/// How bytes are moved between two sockets of ours. Fails where it was asked for and cannot be.
pub(super) fn path(config: &Config) -> Result<PathKind, Failure> {
    let asked = match config.daemon.relay {
        Relay::Copy => return Ok(PathKind::Copy),
        Relay::Pipe => return Ok(PathKind::Pipe),
        // No flow would have two sockets.
        Relay::Auto if !limits::has_two_sockets(config) => return Ok(PathKind::Copy),
        Relay::Auto => false,
        Relay::Splice => true,
    };
    let (why, privilege) = match Kernel::running().allows(Feature::Splice) {
        Err(why) => (why, false),
        Ok(()) => match relay::probe() {
            Ok(()) => return Ok(PathKind::Splice),
            Err(e) => (e.summary(), e.is_privilege()),
        },
    };
    if !asked {
        tracing::info!("bytes between two connections are copied: {why}");
        return Ok(PathKind::Copy);
    }
    let what = format!("relay = \"splice\": {why}");
    Err(if privilege {
        let remedy = "The program takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN: run it as root. With relay = \"auto\" bytes are \
                      copied without.";
        Failure::Privilege(Cause::new(what, remedy))
    } else {
        let remedy = "With relay = \"auto\" bytes are copied on such a kernel; `tunnel doctor` says which have what it takes.";
        Failure::Kernel(Cause::new(what, remedy))
    })
}
