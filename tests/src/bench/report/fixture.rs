//! A report such as a machine could have given: every scenario, arms that are missing or failed, faults. The same seed gives
//! the same one.

use std::collections::BTreeMap;

use crate::{
    bench::model::{
        Arm, Cell, Machine, Memory, Program, Report, Role, Run, SCHEMA, Scenario, Settings, State, Task, Tls,
    },
    load::{Direction, Latency, Outcome, Workload},
};

/// A machine with its noise, and what is to be slower on it.
pub(in crate::bench) struct Made {
    random: u64,
    noise: f64,
    rounds: u32,
    slower: Vec<(&'static str, f64)>,
}

/// What an arm costs.
#[derive(Clone, Copy)]
struct Cost {
    /// Microseconds above those of the workload on a direct way.
    latency: f64,
    /// Gbit/s of one stream, and of many.
    gbits: (f64, f64),
    /// Seconds per GB: client, near, far, server.
    cpu: [f64; 4],
    /// KiB per idle connection: near, far.
    memory: [f64; 2],
}

/// As most tests want it.
pub(in crate::bench) fn report() -> Report {
    Made::new(1, 0.05, 11).report()
}

impl Made {
    pub(in crate::bench) fn new(seed: u64, noise: f64, rounds: u32) -> Self {
        Self { random: seed, noise, rounds, slower: Vec::new() }
    }

    /// Makes an arm of `chain` cost so many times as much.
    pub(in crate::bench) fn slower(mut self, arm: &'static str, times: f64) -> Self {
        self.slower.push((arm, times));
        self
    }

    /// SplitMix64.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Twelve of them are as good as normal.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    /// About 1, with this machine's noise.
    fn jitter(&mut self) -> f64 {
        (self.noise * self.normal()).exp()
    }

    pub(in crate::bench) fn report(&mut self) -> Report {
        let scenarios = vec![
            self.capture("capture", "Capture, with a proxy behind"),
            self.capture("capture-bare", "Capture alone"),
            self.relay(),
            self.chain("chain", "The whole way", 1.0),
            self.chain("link-20ms", "The whole way, 20 ms apart", 40.0),
            self.chain("link-100mbit", "The whole way, 100 Mbit/s between", 4.0),
        ];
        Report {
            schema: SCHEMA,
            taken: "2026-03-01T04:05:06Z".to_owned(),
            seconds: 12_345.6,
            settings: Settings {
                extent: "full".to_owned(),
                rounds: self.rounds,
                workers: 1,
                seed: 42,
                command: "cargo xtask bench --out <folder> --rounds 11".to_owned(),
            },
            machine: Machine {
                cpu: "AMD EPYC 7763 64-Core Processor".to_owned(),
                cores: 2,
                memory: 8_323_158_016,
                kernel: "6.12.9".to_owned(),
                system: "Debian GNU/Linux 12 (bookworm)".to_owned(),
                congestion_control: "cubic".to_owned(),
            },
            versions: [
                ("tunnel", "0.1.0"),
                ("envoy", "1.33.0"),
                ("iptables", "1.8.9 (legacy)"),
                ("iperf3", "3.12"),
            ]
            .map(|(name, version)| (name.to_owned(), version.to_owned()))
            .into(),
            scenarios,
            footprint: None,
            faults: vec![
                "chain, ours, up:16, round 3: 1,048,576 bytes were sent and 1,048,000 arrived".to_owned(),
            ],
        }
    }

    fn capture(&mut self, name: &str, title: &str) -> Scenario {
        let tasks =
            ["connect:1 captured", "connect:1 uncaptured"].map(|name| task(name, "Connect, 64 B, close"));
        let mut arms = vec![arm("direct", "No capture")];
        for family in ["iptables", "ebpf"] {
            for rules in [0, 100, 1000, 10_000] {
                let mut arm = arm(&format!("{family}-{rules}"), &format!("{family}, {rules} rules"));
                family.clone_into(&mut arm.family);
                arm.rules = Some(rules);
                arms.push(arm);
            }
        }
        let with_proxy = if name == "capture" { 60.0 } else { 1.0 };
        let mut cells = Vec::new();
        for arm in &arms {
            for task in &tasks {
                let rules = arm.rules.unwrap_or(0) as f64;
                let captured = !task.name.contains("uncaptured");
                let near = if arm.rules.is_some() && captured { 0.1 } else { 0.0 };
                let added = match arm.family.as_str() {
                    "iptables" => rules * 0.035 + if captured { with_proxy + 4.0 } else { 1.5 },
                    "ebpf" => rules.ln_1p() * 0.1 + if captured { with_proxy + 2.0 } else { 0.8 },
                    _ => 0.0,
                };
                let cost =
                    Cost { latency: added, gbits: (1.0, 1.0), cpu: [0.1, near, 0.0, 0.1], memory: [0.0; 2] };
                cells.push(self.cell(arm, task, 95.0, cost));
            }
        }
        scenario(
            name,
            title,
            "What it costs to capture a connection, by the number of rules beside it.",
            arms,
            tasks.into(),
            cells,
        )
    }

    fn relay(&mut self) -> Scenario {
        let costs = [
            (
                "direct",
                Cost { latency: 0.0, gbits: (28.0, 30.0), cpu: [0.14, 0.0, 0.0, 0.18], memory: [0.0; 2] },
            ),
            (
                "copy",
                Cost { latency: 11.0, gbits: (14.0, 16.0), cpu: [0.15, 0.42, 0.0, 0.2], memory: [17.0, 0.0] },
            ),
            (
                "pipe",
                Cost { latency: 14.0, gbits: (19.0, 22.0), cpu: [0.15, 0.27, 0.0, 0.2], memory: [65.0, 0.0] },
            ),
        ];
        let mut arms: Vec<Arm> = costs.iter().map(|(name, _)| arm(name, name)).collect();
        let mut unbuilt = arm("sk_skb", "sk_skb");
        unbuilt.state = State::Missing("not built yet".to_owned());
        arms.push(unbuilt);
        let tasks =
            all_tasks(&["ping-pong:64", "connect:1", "up:1", "up:4", "up:16", "down:1", "down:4", "down:16"]);
        let cells = self.cells(&arms, &tasks, &costs, 1.0);
        scenario(
            "relay",
            "Relay",
            "Two sockets of a proxy, and how bytes get from one to the other.",
            arms,
            tasks,
            cells,
        )
    }

    fn chain(&mut self, name: &str, title: &str, slow: f64) -> Scenario {
        let costs = [
            (
                "direct",
                Cost { latency: 0.0, gbits: (27.0, 29.0), cpu: [0.14, 0.0, 0.0, 0.18], memory: [0.0, 0.0] },
            ),
            (
                "ours",
                Cost { latency: 48.0, gbits: (5.1, 5.4), cpu: [0.16, 0.62, 0.66, 0.2], memory: [9.1, 8.4] },
            ),
            (
                "ours-envoy",
                Cost { latency: 71.0, gbits: (4.1, 4.3), cpu: [0.16, 0.6, 0.95, 0.2], memory: [9.2, 31.0] },
            ),
            (
                "envoy",
                Cost { latency: 96.0, gbits: (3.2, 3.5), cpu: [0.16, 1.05, 0.99, 0.2], memory: [34.0, 31.5] },
            ),
        ];
        let mut arms: Vec<Arm> = costs.iter().map(|(name, _)| arm(name, name)).collect();
        arms[1].title = "tunnel → tunnel, eBPF".to_owned();
        arms[2].title = "tunnel → Envoy, eBPF".to_owned();
        arms[3].title = "Envoy → Envoy, iptables".to_owned();
        for arm in arms.iter_mut().skip(1) {
            arm.processes = vec![
                Program {
                    role: Role::Near,
                    command: format!("{} run --config '/tmp/<x>&\"y\".toml'", arm.name),
                    configuration: Some("[[capture]]\ncgroup = \"<app>\"\n".to_owned()),
                },
                Program {
                    role: Role::Far,
                    command: format!("{} gateway --listen 10.0.0.1:15008", arm.name),
                    configuration: None,
                },
            ];
            arm.tls = Some(Tls {
                version: "TLS 1.3".to_owned(),
                cipher: "TLS_AES_128_GCM_SHA256".to_owned(),
                group: "x25519".to_owned(),
            });
        }
        let mut redsocks = arm("redsocks", "redsocks → dante, iptables");
        redsocks.state = match name {
            "chain" => State::Missing("redsocks is not in PATH: apt-get install redsocks".to_owned()),
            _ => State::Failed("exited with 1: <b>bind</b>: Address in use\x1b[31m\n\"&\"".to_owned()),
        };
        arms.push(redsocks);
        let words: &[&str] = if slow > 1.0 {
            &["ping-pong:64", "connect:1", "up:1", "up:16", "down:1", "down:16"]
        } else {
            &[
                "ping-pong:64",
                "ping-pong:16384",
                "connect:1",
                "connect:64",
                "first-byte",
                "rate:2000/100/1024",
                "up:1",
                "up:4",
                "up:16",
                "down:1",
                "down:4",
                "down:16",
                "idle:100",
                "idle:1000",
                "idle:10000",
            ]
        };
        let mut tasks = all_tasks(words);
        let mut iperf3 = task("iperf3 up:1", "iperf3, 1 stream up");
        iperf3.witness = true;
        tasks.push(iperf3);
        let cells = self.cells(&arms, &tasks, &costs, slow);
        scenario(
            name,
            title,
            "The application, a proxy beside it, a proxy at the other end, and the server.",
            arms,
            tasks,
            cells,
        )
    }

    fn cells(&mut self, arms: &[Arm], tasks: &[Task], costs: &[(&str, Cost)], slow: f64) -> Vec<Cell> {
        let mut cells = Vec::new();
        for arm in arms {
            let Some((_, cost)) = costs.iter().find(|(name, _)| *name == arm.name) else { continue };
            for task in tasks {
                let base = match task.workload {
                    Workload::PingPong { size } => 24.0 + f64::from(size) / 4000.0,
                    Workload::Connect { at_once: 1 } | Workload::FirstByte => 96.0,
                    Workload::Connect { at_once } => 40.0 * f64::from(at_once),
                    _ => 60.0,
                };
                let times = match task.workload {
                    Workload::Connect { at_once } => 1.4 * f64::from(at_once.min(20)),
                    Workload::FirstByte => 1.3,
                    _ => 1.0,
                };
                let cost = Cost {
                    latency: cost.latency * times,
                    gbits: (cost.gbits.0 / slow, cost.gbits.1 / slow),
                    ..*cost
                };
                cells.push(self.cell(arm, task, base * slow, cost));
            }
        }
        cells
    }

    fn cell(&mut self, arm: &Arm, task: &Task, base: f64, cost: Cost) -> Cell {
        let runs = (0..self.rounds).map(|round| self.run(arm, task, base, cost, round)).collect();
        Cell { arm: arm.name.clone(), task: task.name.clone(), runs }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "made-up numbers, small and positive"
    )]
    fn run(&mut self, arm: &Arm, task: &Task, base: f64, cost: Cost, round: u32) -> Run {
        let more = self.slower.iter().find(|(name, _)| *name == arm.name).map_or(1.0, |(_, times)| *times);
        let micros = (base + cost.latency) * more * self.jitter();
        let seconds = 5.0;
        let mut outcome = Outcome { seconds, ..Outcome::default() };
        let mut memory = None;
        let (one, many) = cost.gbits;
        let gb = |streams: u32, made: &mut Self| {
            let gbits = if streams == 1 { one } else { many } / more * made.jitter();
            (gbits * 1e9 / 8.0 * seconds) as u64
        };
        match task.workload {
            Workload::Bulk { streams, direction: Direction::Up } => outcome.bytes_up = gb(streams, self),
            Workload::Bulk { streams, direction: Direction::Down } => outcome.bytes_down = gb(streams, self),
            Workload::Soak { connections } => {
                (outcome.bytes_up, outcome.bytes_down) = (gb(connections, self), gb(connections, self));
            }
            Workload::Idle { connections } => {
                let each = |kib: f64, made: &mut Self| {
                    (kib * more * 1024.0 * made.jitter() * f64::from(connections) + 300_000.0) as i64
                };
                memory = Some(Memory {
                    connections: connections.into(),
                    // A part that an arm has not got is not there.
                    resident: [
                        (Role::Client, 1.0),
                        (Role::Near, cost.memory[0]),
                        (Role::Far, cost.memory[1]),
                    ]
                    .into_iter()
                    .filter(|(_, kib)| *kib > 0.0)
                    .map(|(role, kib)| (role, each(kib, self)))
                    .collect(),
                    tcp: each(0.2, self),
                    slab: each(6.0, self),
                });
            }
            Workload::Rate { per_second, size, .. } => {
                outcome.operations = u64::from(per_second) * 5;
                outcome.bytes_up = outcome.operations * u64::from(size);
                outcome.latency = Some(self.latency(outcome.operations, micros));
            }
            Workload::PingPong { .. } | Workload::FirstByte | Workload::Crowd { .. } => {
                outcome.operations = (seconds * 1e6 / micros) as u64;
                outcome.latency = Some(self.latency(outcome.operations, micros));
            }
            Workload::Connect { at_once } => {
                outcome.operations = (seconds * 1e6 / micros * f64::from(at_once.min(2))) as u64;
                outcome.latency = Some(self.latency(outcome.operations, micros));
            }
        }
        let amount = (outcome.bytes_up + outcome.bytes_down) as f64 / 1e9 + outcome.operations as f64 * 1e-4;
        let mut cpu = BTreeMap::new();
        if !task.witness {
            for (role, each) in Role::ALL.into_iter().zip(cost.cpu) {
                if each > 0.0 {
                    cpu.insert(role, each * amount * more * self.jitter());
                }
            }
        }
        Run { round, turn: round, outcome, cpu, memory }
    }

    /// Log-normal, with a heavier tail beyond the 99th percentile.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "made-up numbers, small and positive"
    )]
    fn latency(&mut self, count: u64, p50: f64) -> Latency {
        let tail = self.jitter().powi(3);
        let at = |q: f64| {
            let nines = -(1.0 - q).max(1e-9).log10();
            let body = 0.8 + 0.2 * (nines / 2f64.log10()) + 0.05 * nines * nines;
            (p50 * (body + tail * 0.12 * (nines - 2.0).max(0.0).powi(2)) * 1e3) as u64
        };
        let last = (count.max(2) as f64).log10();
        let steps = 48;
        let mut curve: Vec<(f64, u64)> = (0..steps)
            .map(|step| 1.0 - 10f64.powf(-last * f64::from(step) / f64::from(steps)))
            .map(|q| (q, at(q)))
            .collect();
        let max = at(1.0 - 1.0 / count.max(2) as f64);
        curve.push((1.0, max));
        Latency { count, p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), max, curve }
    }
}

fn arm(name: &str, title: &str) -> Arm {
    Arm {
        name: name.to_owned(),
        title: title.to_owned(),
        family: name.to_owned(),
        rules: None,
        state: State::Ran,
        processes: Vec::new(),
        tls: None,
    }
}

fn task(name: &str, title: &str) -> Task {
    let word = name.split(' ').find_map(|word| word.parse().ok());
    let workload = word.expect("a fixture's task has a workload in its name");
    Task { name: name.to_owned(), title: title.to_owned(), workload, witness: false }
}

fn all_tasks(words: &[&str]) -> Vec<Task> {
    let title = |word: &str| match word.parse() {
        Ok(Workload::PingPong { size }) => format!("{size} B round trip"),
        Ok(Workload::Connect { at_once }) => format!("Connect, 64 B, close; {at_once} at a time"),
        Ok(Workload::FirstByte) => "Time to the first byte".to_owned(),
        Ok(Workload::Rate { per_second, connections, size }) => {
            format!("{per_second} requests/s of {size} B on {connections} connections")
        }
        Ok(Workload::Crowd { connections, .. }) => format!("Round trips on {connections} connections"),
        Ok(Workload::Bulk { streams, direction: Direction::Up }) => format!("Upload, {streams} streams"),
        Ok(Workload::Bulk { streams, direction: Direction::Down }) => format!("Download, {streams} streams"),
        Ok(Workload::Idle { connections }) => format!("{connections} idle connections"),
        Ok(Workload::Soak { connections }) => format!("Soak, {connections} connections"),
        Err(e) => panic!("{e}"),
    };
    words.iter().map(|word| task(word, &title(word))).collect()
}

fn scenario(
    name: &str,
    title: &str,
    about: &str,
    arms: Vec<Arm>,
    workloads: Vec<Task>,
    cells: Vec<Cell>,
) -> Scenario {
    Scenario {
        name: name.to_owned(),
        title: title.to_owned(),
        about: about.to_owned(),
        arms,
        workloads,
        cells,
    }
}
