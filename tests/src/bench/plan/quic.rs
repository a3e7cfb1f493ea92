//! The scenarios of HTTP/3, beside HTTP/2.

use std::time::Duration;

use super::{Arm, DIRECT, Extent, Scenario, arm, bulk, rounds, time, work};
use crate::{
    bench::arms::{Build, Capture, Far, Near, Network},
    link::Profile,
    load::{Direction, Workload},
};

/// HTTP/3, beside ours over HTTP/2 and Envoy's.
pub(super) fn arms() -> Vec<Arm> {
    let build =
        |capture, near, far| Build { capture: Some(capture), near: Some(near), far: Some(far), ..DIRECT };
    vec![
        arm("ours", "ours → ours, HTTP/2", build(Capture::Ebpf, Near::Ours, Far::Ours)),
        arm("ours-h3", "ours → ours, HTTP/3", build(Capture::Ebpf, Near::OursH3, Far::Ours)),
        arm(
            "envoy-h3",
            "iptables, Envoy → Envoy, HTTP/3",
            build(Capture::Iptables, Near::EnvoyH3, Far::EnvoyH3),
        ),
    ]
}

pub(super) fn h3(extent: Extent) -> Scenario {
    let second = time(extent, 0.35, 0.2);
    let mut tasks = vec![work(bulk(1, Direction::Up), "bulk up, 1 stream", second)];
    if extent != Extent::Quick {
        tasks.extend([
            work(bulk(4, Direction::Up), "bulk up, 4 streams", second),
            work(bulk(1, Direction::Down), "bulk down, 1 stream", second),
            work(Workload::PingPong { size: 64 }, "64 B round trip", second),
        ]);
    }
    Scenario {
        name: "h3",
        title: "HTTP/3",
        about: "The whole chain over HTTP/3, beside ours over HTTP/2: the same certificates, UDP instead of TCP, over a \
                veth cable.",
        network: Network::CABLE,
        arms: arms(),
        tasks,
        rounds: rounds(extent),
    }
}

pub(super) fn lossy(extent: Extent) -> Scenario {
    let beside = Workload::Crowd { connections: 50, size: 64, bulk: Some(Direction::Down) };
    let mut tasks =
        vec![work(beside, "64 B round trips on 50 connections, beside bulk down", time(extent, 1.0, 0.35))];
    if extent != Extent::Quick {
        tasks.push(work(Workload::FirstByte, "connect + 1 B to the first byte back", time(extent, 0.4, 0.2)));
    }
    Scenario {
        name: "lossy",
        title: "20 ms apart, and one packet in a hundred lost",
        about: "Node and gateway with a round trip of 20 ms between them, of whose packets one in a hundred is lost, each \
                way and by chance. Over HTTP/2 one lost packet holds up all connections; over HTTP/3 the one whose bytes \
                were in it.",
        network: Network::over(Profile::delay(Duration::from_millis(10)).loss(10_000)),
        arms: arms(),
        tasks,
        rounds: rounds(extent),
    }
}
