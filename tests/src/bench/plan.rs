//! What is run: scenarios, their arms, their workloads, and for how long.
//!
//! # Invariants
//! - The first arm of a scenario is what the others are ratios to, and every other arm differs from another in one thing that
//!   its title names.

mod quic;

use std::{fmt, time::Duration};

use super::{
    arms::{Build, Capture, Far, Near, Network, Place, Whose},
    model::Task,
};
use crate::{
    link::Profile,
    load::{Direction, Workload},
};

/// What the name of an arm with the other build ends with.
pub(super) const OTHER: &str = ", other build";

/// What has no arms.
const FOOTPRINT: &str = "footprint";

/// How much is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Everything, in 35 minutes on two cores.
    Full,
    /// The headlines, in seven minutes.
    Quick,
    /// One run of each arm, to see that it works.
    Test,
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Quick => "quick",
            Self::Test => "test",
        })
    }
}

/// Everything that is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How much that is.
    pub extent: Extent,
    /// Whether what the program takes by itself is measured.
    pub(super) footprint: bool,
    pub(super) scenarios: Vec<Scenario>,
}

/// Arms that are compared with each other.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) about: &'static str,
    pub(super) network: Network,
    pub(super) arms: Vec<Arm>,
    pub(super) tasks: Vec<Work>,
    pub(super) rounds: u32,
}

/// A way for bytes to go.
#[derive(Clone, Debug)]
pub(super) struct Arm {
    pub(super) name: String,
    pub(super) title: String,
    pub(super) family: String,
    pub(super) rules: Option<u32>,
    /// Idle connections that it can have with the descriptors that there are here.
    pub(super) idle_max: Option<u32>,
    /// Or why there is nothing to build.
    pub(super) build: Result<Build, &'static str>,
}

/// Something to do on each arm.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) task: Task,
    pub(super) whose: Whose,
    pub(super) time: Duration,
}

impl Plan {
    /// The scenarios of these names (of [`SCENARIOS`](super::flags::SCENARIOS)), or all.
    pub fn new(extent: Extent, only: &[String], rounds: Option<u32>) -> Self {
        let footprint = only.is_empty() || only.iter().any(|name| name == FOOTPRINT);
        let mut scenarios = vec![capture(extent, true), capture(extent, false), relay(extent), chain(extent)];
        scenarios.extend([fairness(extent), paced(extent), memory(extent)]);
        scenarios.extend([link_20ms(extent), link_100mbit(extent), quic::h3(extent), quic::lossy(extent)]);
        scenarios.retain(|scenario| only.is_empty() || only.iter().any(|name| name == scenario.name));
        if let Some(rounds) = rounds {
            scenarios.iter_mut().for_each(|scenario| scenario.rounds = rounds);
        }
        Self { extent, footprint, scenarios }
    }

    /// Only what is ours, and each arm a second time with another build of `tunnel`, before the first of which it is put.
    pub fn beside(mut self) -> Self {
        self.footprint = false;
        for scenario in &mut self.scenarios {
            let ours = scenario.arms.drain(..).filter_map(|arm| {
                let build = arm.build.ok().filter(Build::has_ours)?;
                let other = Arm {
                    name: format!("{}{OTHER}", arm.name),
                    title: format!("{}{OTHER}", arm.title),
                    build: Ok(Build { other: true, ..build }),
                    ..arm.clone()
                };
                Some([other, arm])
            });
            scenario.arms = ours.flatten().collect();
        }
        self.scenarios.retain(|scenario| !scenario.arms.is_empty());
        self
    }

    /// How many rounds its scenarios have, at most.
    pub(super) fn rounds(&self) -> u32 {
        self.scenarios.iter().map(|scenario| scenario.rounds).max().unwrap_or(0)
    }

    /// How many runs it takes.
    pub fn steps(&self) -> u64 {
        self.scenarios.iter().map(Scenario::steps).sum()
    }
}

impl Scenario {
    /// How many runs it takes, if every arm can be set up.
    pub(super) fn steps(&self) -> u64 {
        let built = self.arms.iter().filter(|arm| arm.build.is_ok()).count() as u64;
        let runs = if self.is_memory() { 1 } else { self.tasks.len() as u64 };
        built * runs * u64::from(self.rounds)
    }

    /// Whether idle connections are counted, for which each round needs proxies that have not carried anything.
    pub(super) fn is_memory(&self) -> bool {
        self.tasks.iter().all(|work| matches!(work.task.workload, Workload::Idle { .. }))
    }
}

/// Seven runs have quartiles that are runs themselves; fewer make no claim.
const fn rounds(extent: Extent) -> u32 {
    match extent {
        Extent::Full | Extent::Quick => 7,
        Extent::Test => 1,
    }
}

/// For as long as it takes in a full run, or what else is enough.
fn time(extent: Extent, full: f64, quick: f64) -> Duration {
    Duration::from_secs_f64(match extent {
        Extent::Full => full,
        Extent::Quick => quick,
        // A dozen workloads: all in all a second for each arm.
        Extent::Test => 0.1,
    })
}

fn work(workload: Workload, title: &str, time: Duration) -> Work {
    let task = Task { name: workload.to_string(), title: title.to_owned(), workload, witness: false };
    Work { task, whose: Whose::Captured, time }
}

fn arm(name: &str, title: &str, build: Build) -> Arm {
    Arm {
        name: name.to_owned(),
        title: title.to_owned(),
        family: name.to_owned(),
        rules: None,
        idle_max: None,
        build: Ok(build),
    }
}

const DIRECT: Build =
    Build { capture: None, rules: 0, near: None, far: None, server: Place::Away, other: false };

fn direct() -> Arm {
    arm("direct", "direct TCP", DIRECT)
}

/// Both ways of capturing, in front of our own daemon, or of nothing (`bare`).
fn capture(extent: Extent, bare: bool) -> Scenario {
    let rules: &[u32] = match extent {
        Extent::Full => &[0, 100, 1_000, 10_000],
        Extent::Quick => &[0, 10_000],
        Extent::Test => &[100],
    };
    let server = if bare { Place::Node } else { Place::Away };
    let near = (!bare).then_some(Near::Dialling("copy"));
    let mut arms = vec![arm("direct", "direct TCP", Build { server, ..DIRECT })];
    for (family, what, capture) in
        [("iptables", "iptables REDIRECT", Capture::Iptables), ("ebpf", "our hooks", Capture::Ebpf)]
    {
        arms.extend(rules.iter().map(|&rules| Arm {
            name: format!("{family}-{rules}"),
            title: format!("{what}, {rules} unrelated rules"),
            family: family.to_owned(),
            rules: Some(rules),
            idle_max: None,
            build: Ok(Build { capture: Some(capture), rules, near, server, ..DIRECT }),
        }));
    }
    const CONNECT: Workload = Workload::Connect { at_once: 1 };
    let tasks = [
        (Whose::Captured, "captured", "captured"),
        (Whose::Excluded, "excluded", "of the captured group, to what is not captured"),
        (Whose::Other, "uncaptured", "of another process on the node"),
    ];
    let wanted = |whose| extent != Extent::Quick || whose != Whose::Excluded;
    let tasks = tasks.into_iter().filter(|(whose, ..)| wanted(*whose)).map(|(whose, name, of)| {
        let mut work = work(CONNECT, &format!("connect + 64 B + close, {of}"), time(extent, 0.4, 0.25));
        work.task.name = format!("{CONNECT} {name}");
        Work { whose, ..work }
    });
    let (name, title, about) = if bare {
        (
            "capture-bare",
            "Capture alone",
            "What capturing a connection costs by itself: redirected to a server on the node's loopback, with no proxy \
             behind. The baseline connects to that server.",
        )
    } else {
        (
            "capture",
            "Capture, with our daemon behind",
            "The same daemon (captured → dialled, plain TCP on both sides) behind iptables REDIRECT and behind our \
             hooks, with rules around it that have nothing to do with the connections measured.",
        )
    };
    Scenario {
        name,
        title,
        about,
        network: Network::CABLE,
        arms,
        tasks: tasks.collect(),
        rounds: rounds(extent),
    }
}

fn relay(extent: Extent) -> Scenario {
    let ours = |name: &'static str, title: &str| {
        let near = Some(Near::Dialling(name));
        arm(name, title, Build { capture: Some(Capture::Ebpf), near, ..DIRECT })
    };
    let mut tasks = vec![
        work(Workload::PingPong { size: 64 }, "64 B round trip", time(extent, 1.0, 0.4)),
        work(Workload::Connect { at_once: 1 }, "connect + 64 B + close", time(extent, 1.0, 0.25)),
        work(bulk(1, Direction::Up), "bulk up, 1 stream", time(extent, 1.0, 0.4)),
    ];
    if extent == Extent::Full {
        tasks.extend([
            work(Workload::PingPong { size: 1024 }, "1 KiB round trip", time(extent, 1.0, 0.5)),
            work(bulk(4, Direction::Up), "bulk up, 4 streams", time(extent, 1.0, 0.5)),
            work(bulk(1, Direction::Down), "bulk down, 1 stream", time(extent, 1.0, 0.5)),
        ]);
    }
    Scenario {
        name: "relay",
        title: "Relay of two TCP connections",
        about: "How our daemon moves bytes from a captured connection to one that it dialled: through userspace, \
                through a pipe with splice(2), or in the kernel's sockmap.",
        network: Network::CABLE,
        arms: vec![
            direct(),
            ours("copy", "userspace copy"),
            ours("pipe", "splice(2)"),
            ours("splice", "sk_skb, while it is interactive"),
        ],
        tasks,
        rounds: rounds(extent),
    }
}

fn chain_arms() -> Vec<Arm> {
    let build =
        |capture, near, far| Build { capture: Some(capture), near: Some(near), far: Some(far), ..DIRECT };
    vec![
        direct(),
        arm("ours", "ours → ours", build(Capture::Ebpf, Near::Ours, Far::Ours)),
        arm("ours-envoy", "ours → Envoy", build(Capture::Ebpf, Near::Ours, Far::Envoy)),
        arm("envoy", "iptables, Envoy → Envoy", build(Capture::Iptables, Near::Envoy, Far::Envoy)),
        Arm {
            idle_max: Some(2_500),
            ..arm(
                "redsocks",
                "iptables, redsocks → tinyproxy (no TLS)",
                build(Capture::Iptables, Near::Redsocks, Far::Tinyproxy),
            )
        },
    ]
}

fn bulk(streams: u32, direction: Direction) -> Workload {
    Workload::Bulk { streams, direction }
}

fn chain(extent: Extent) -> Scenario {
    let second = time(extent, 0.8, 0.4);
    let mut tasks = vec![
        work(Workload::PingPong { size: 64 }, "64 B round trip", second),
        work(Workload::Connect { at_once: 1 }, "connect + 64 B + close, serial", second),
        work(Workload::Connect { at_once: 64 }, "connect + 64 B + close, 64 at once", second),
        work(bulk(1, Direction::Up), "bulk up, 1 stream", second),
        work(bulk(4, Direction::Up), "bulk up, 4 streams", second),
    ];
    if extent != Extent::Quick {
        const RATE: Workload = Workload::Rate { per_second: 2_000, connections: 100, size: 16 * 1024 };
        tasks.extend([
            work(Workload::PingPong { size: 1024 }, "1 KiB round trip", second),
            work(bulk(16, Direction::Up), "bulk up, 16 streams", second),
            work(bulk(1, Direction::Down), "bulk down, 1 stream", second),
            work(bulk(4, Direction::Down), "bulk down, 4 streams", second),
            work(bulk(16, Direction::Down), "bulk down, 16 streams", second),
            work(RATE, "16 KiB request and response, 2,000/s on 100 connections", time(extent, 1.2, 0.5)),
        ]);
        let mut witness = work(bulk(1, Direction::Up), "bulk up, 1 stream, by iperf3", second);
        witness.task.name = "iperf3 up:1".to_owned();
        witness.task.witness = true;
        tasks.push(witness);
    }
    Scenario {
        name: "chain",
        title: "The whole chain",
        about: "From an application that knows nothing, through the proxy on its node and HTTP/2 CONNECT over mTLS, to \
                a gateway that dials the server. Node and gateway are two network namespaces with a veth cable.",
        network: Network::CABLE,
        arms: chain_arms(),
        tasks,
        rounds: rounds(extent),
    }
}

fn crowd(bulk: Option<Direction>, title: &str, time: Duration) -> Work {
    let workload = Workload::Crowd { connections: 99, size: 64, bulk };
    work(workload, &format!("64 B round trips on 99 connections{title}"), time)
}

/// Those that carry many connections on one: redsocks has one for each.
fn sharing_arms() -> Vec<Arm> {
    let mut arms = chain_arms();
    arms.retain(|arm| arm.name != "redsocks");
    arms
}

fn fairness(extent: Extent) -> Scenario {
    let second = time(extent, 1.0, 0.5);
    let mut tasks = vec![crowd(None, "", second), crowd(Some(Direction::Up), ", beside bulk up", second)];
    if extent != Extent::Quick {
        tasks.push(crowd(Some(Direction::Down), ", beside bulk down", second));
    }
    Scenario {
        name: "fairness",
        title: "One bulk stream among a hundred",
        about: "What a connection that carries as much as it can does to 99 others that share its HTTP/2 connection: \
                their round trips without it, and with it.",
        network: Network::CABLE,
        arms: sharing_arms(),
        tasks,
        rounds: rounds(extent),
    }
}

fn paced(extent: Extent) -> Scenario {
    let (bulk_time, crowd_time) = (time(extent, 0.6, 0.3), time(extent, 0.8, 0.3));
    let mut tasks = vec![
        work(bulk(1, Direction::Up), "bulk up, 1 stream", bulk_time),
        work(bulk(1, Direction::Down), "bulk down, 1 stream", bulk_time),
    ];
    if extent != Extent::Quick {
        tasks.extend([
            work(bulk(4, Direction::Up), "bulk up, 4 streams", bulk_time),
            work(bulk(4, Direction::Down), "bulk down, 4 streams", bulk_time),
            crowd(None, "", crowd_time),
            crowd(Some(Direction::Up), ", beside bulk up", crowd_time),
            crowd(Some(Direction::Down), ", beside bulk down", crowd_time),
        ]);
    }
    Scenario {
        name: "paced",
        title: "The whole chain, paced by BBR",
        about: "Both hosts with BBR in place of CUBIC; otherwise as above. It sends in small portions that a timer lets \
                go, which costs processor time where there is no network to be gentle with.",
        network: Network::PACED,
        arms: sharing_arms(),
        tasks,
        rounds: rounds(extent),
    }
}

fn memory_arms() -> Vec<Arm> {
    let mut arms = chain_arms();
    arms.extend(quic::arms().into_iter().filter(|arm| arm.name == "ours-h3"));
    arms
}

fn memory(extent: Extent) -> Scenario {
    let steps: &[u32] = match extent {
        Extent::Full => &[1_000, 2_500, 5_000, 10_000],
        Extent::Quick => &[1_000],
        Extent::Test => &[50],
    };
    let idle = |&connections: &u32| {
        work(Workload::Idle { connections }, &format!("{connections} idle connections"), Duration::ZERO)
    };
    Scenario {
        name: "memory",
        title: "Idle connections",
        about: "What connections hold that have carried 64 bytes each way and then do nothing: resident memory of each \
                process, TCP buffers and slabs of the kernel, above what was held before they came. redsocks stops at \
                2,500: it takes six descriptors for each, and 20,000 is what many systems have.",
        network: Network::CABLE,
        arms: memory_arms(),
        tasks: steps.iter().map(idle).collect(),
        // Each takes new proxies, because memory that was used once is kept.
        rounds: if extent == Extent::Full { 3 } else { 1 },
    }
}

fn link_20ms(extent: Extent) -> Scenario {
    let mut tasks =
        vec![work(Workload::FirstByte, "connect + 1 B to the first byte back", time(extent, 1.5, 0.6))];
    if extent == Extent::Full {
        tasks.extend([
            work(Workload::PingPong { size: 64 }, "64 B round trip", time(extent, 0.8, 0.5)),
            work(
                Workload::Connect { at_once: 64 },
                "connect + 64 B + close, 64 at once",
                time(extent, 1.0, 0.5),
            ),
            work(bulk(1, Direction::Up), "bulk up, 1 stream", time(extent, 1.2, 0.5)),
            work(bulk(1, Direction::Down), "bulk down, 1 stream", time(extent, 1.2, 0.5)),
            work(bulk(4, Direction::Down), "bulk down, 4 streams", time(extent, 1.2, 0.5)),
        ]);
    }
    Scenario {
        name: "link-20ms",
        title: "The whole chain, 20 ms apart",
        about: "Node and gateway with a round trip of 20 ms between them; otherwise as above.",
        network: Network::over(Profile::delay(Duration::from_millis(10))),
        arms: chain_arms(),
        tasks,
        rounds: rounds(extent),
    }
}

fn link_100mbit(extent: Extent) -> Scenario {
    let mut tasks = vec![work(bulk(1, Direction::Up), "bulk up, 1 stream", time(extent, 1.2, 0.5))];
    if extent == Extent::Full {
        tasks.extend([
            work(Workload::PingPong { size: 64 }, "64 B round trip", time(extent, 0.7, 0.4)),
            work(
                Workload::Connect { at_once: 64 },
                "connect + 64 B + close, 64 at once",
                time(extent, 1.0, 0.5),
            ),
            work(bulk(4, Direction::Up), "bulk up, 4 streams", time(extent, 1.2, 0.5)),
            work(bulk(4, Direction::Down), "bulk down, 4 streams", time(extent, 1.2, 0.5)),
        ]);
    }
    Scenario {
        name: "link-100mbit",
        title: "The whole chain, 100 Mbit/s apart",
        about: "Node and gateway with 100 Mbit/s each way between them; otherwise as above.",
        network: Network::over(Profile::delay(Duration::ZERO).rate(100_000_000)),
        arms: chain_arms(),
        tasks,
        rounds: rounds(extent),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::bench::flags::SCENARIOS;

    #[test]
    fn names_are_unique_and_every_scenario_can_be_asked_for() {
        for extent in [Extent::Full, Extent::Quick, Extent::Test] {
            let plan = Plan::new(extent, &[], None);
            assert_eq!(plan.scenarios.iter().map(|s| s.name).collect::<Vec<_>>(), SCENARIOS[1..]);
            for scenario in &plan.scenarios {
                let arms: HashSet<_> = scenario.arms.iter().map(|arm| &arm.name).collect();
                assert_eq!(arms.len(), scenario.arms.len(), "{}", scenario.name);
                let tasks: HashSet<_> = scenario.tasks.iter().map(|work| &work.task.name).collect();
                assert_eq!(tasks.len(), scenario.tasks.len(), "{}", scenario.name);
            }
        }
    }

    #[test]
    fn beside_another_build_each_arm_of_ours_has_its_twin_and_nothing_else_is_run() {
        let plan = Plan::new(Extent::Quick, &[], None).beside();
        assert!(!plan.scenarios.is_empty());
        for scenario in &plan.scenarios {
            for pair in scenario.arms.chunks(2) {
                let [other, this] = pair else { panic!("{}: an arm alone", scenario.name) };
                assert_eq!(other.name, format!("{}{OTHER}", this.name));
                let (theirs, ours) = (other.build.expect("built"), this.build.expect("built"));
                assert!(ours.has_ours() && !ours.other);
                assert_eq!(theirs, Build { other: true, ..ours });
            }
        }
    }

    #[test]
    fn runs_are_within_the_time_that_is_promised() {
        for (extent, seconds) in [(Extent::Full, 35 * 60), (Extent::Quick, 7 * 60)] {
            let plan = Plan::new(extent, &[], None);
            // Starting a client, warming it up and ending it. Setting arms up and counting idle connections is on
            // top: a fifth.
            const START: Duration = Duration::from_millis(160);
            let total: Duration = plan
                .scenarios
                .iter()
                .flat_map(|s| s.tasks.iter().flat_map(move |w| s.arms.iter().map(move |_| (w, s.rounds))))
                .map(|(work, rounds)| (work.time + START) * rounds)
                .sum();
            assert!(total.as_secs() < seconds * 8 / 10, "{extent}: {total:?}");
        }
    }
}
