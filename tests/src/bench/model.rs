//! A report, as `report.json` has it, for years: field names and [`SCHEMA`] are an interface.
//!
//! # Invariants
//! - An arm that did not run has no numbers, and a number that is not there was not measured; nothing is 0 for lack of a
//!   measurement.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use crate::load::{Outcome, Workload};

/// Raised when an older reader would misunderstand a report.
pub const SCHEMA: u32 = 1;

/// One benchmark, all of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// When it began: RFC 3339, UTC.
    pub taken: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// How it was asked for.
    pub settings: Settings,
    /// Where it ran.
    pub machine: Machine,
    /// Program → version, of everything that took part.
    pub versions: BTreeMap<String, String>,
    /// What was run.
    pub scenarios: Vec<Scenario>,
    /// Why this benchmark failed; empty when it did not.
    pub faults: Vec<String>,
    /// What the program takes before it carries anything; `None` where that was not asked for.
    #[serde(default)]
    pub footprint: Option<Footprint>,
}

/// What the program takes before it carries anything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Footprint {
    /// Bytes of the program without symbols.
    pub stripped: u64,
    /// Milliseconds of each `tunnel exec -- true`, in order.
    pub exec_ms: Vec<f64>,
    /// Bytes of resident memory of a gateway that listens.
    pub gateway: u64,
}

impl Footprint {
    /// Its rows: what, and how much.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let quartile =
            |quarter: usize| self.exec_ms.get(self.exec_ms.len() * quarter / 4).copied().unwrap_or(f64::NAN);
        let time = format!("{:.0} ms ({:.0} to {:.0})", quartile(2), quartile(1), quartile(3));
        vec![
            ("size of the program, stripped", mib(self.stripped)),
            ("exec -- true, median (quartiles)", time),
            ("resident memory of a gateway that listens", mib(self.gateway)),
        ]
    }
}

/// How a benchmark was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// `full`, `quick` or `test`.
    pub extent: String,
    /// How often each workload was run on each arm.
    pub rounds: u32,
    /// Threads of each proxy.
    pub workers: u32,
    /// The seed of the order.
    pub seed: u64,
    /// The command line.
    pub command: String,
}

/// Where it ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// As /proc/cpuinfo has it.
    pub cpu: String,
    /// Those this process could use.
    pub cores: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Kernel release.
    pub kernel: String,
    /// Distribution.
    pub system: String,
    /// TCP congestion control of the hosts that it makes, where a scenario does not say otherwise.
    pub congestion_control: String,
}

/// Arms that are compared with each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// In file names and on the command line: `chain`.
    pub name: String,
    /// For people.
    pub title: String,
    /// What is compared, in a sentence or two.
    pub about: String,
    /// Compared; the first is what the others are ratios to.
    pub arms: Vec<Arm>,
    /// What was run, in this order.
    pub workloads: Vec<Task>,
    /// What came of it.
    pub cells: Vec<Cell>,
}

/// A way for bytes to go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// In file names and on the command line: `envoy`.
    pub name: String,
    /// For people: `Envoy → Envoy, iptables`.
    pub title: String,
    /// Arms that differ in `rules` only share it; otherwise the name.
    pub family: String,
    /// How many unrelated rules there were, where that is what the scenario varies.
    pub rules: Option<u64>,
    /// Whether it ran.
    pub state: State,
    /// What was started, as it could be typed.
    pub processes: Vec<Program>,
    /// What the tunnel's TLS agreed on, as read off the wire.
    pub tls: Option<Tls>,
}

/// Whether an arm ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It did.
    Ran,
    /// What it needs is not on this machine, or not built yet; says what, and what helps.
    Missing(String),
    /// It could not be started, or broke; says why.
    Failed(String),
}

/// A process of an arm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Which part it plays.
    pub role: Role,
    /// Its command line.
    pub command: String,
    /// The file that it names, if it is not too long.
    #[serde(default)]
    pub configuration: Option<String>,
}

/// The part that a process plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The load generator's client: the application.
    Client,
    /// The proxy on the application's node.
    Near,
    /// The proxy at the other end.
    Far,
    /// The load generator's server: the target.
    Server,
}

impl Role {
    /// All of them, in the order in which a byte meets them.
    pub const ALL: [Self; 4] = [Self::Client, Self::Near, Self::Far, Self::Server];
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Near => "near proxy",
            Self::Far => "far proxy",
            Self::Server => "server",
        })
    }
}

/// What a TLS handshake agreed on, by the names of IANA's registries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tls {
    /// `TLS 1.3`.
    pub version: String,
    /// `TLS_AES_128_GCM_SHA256`.
    pub cipher: String,
    /// `x25519`.
    pub group: String,
}

/// A workload of a scenario, and where the client ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// In file names and in [`Cell`]s: `connect:1`, or `connect:1 uncaptured`.
    pub name: String,
    /// For people: `64 B round trip`.
    pub title: String,
    /// What the client did; nothing for `iperf3`, which is the outside witness and has no outcome but bytes.
    pub workload: Workload,
    /// Whether iperf3 did it, and not the load generator.
    pub witness: bool,
}

/// The runs of one workload on one arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// [`Arm::name`].
    pub arm: String,
    /// [`Task::name`].
    pub task: String,
    /// One per round, in the order of rounds.
    pub runs: Vec<Run>,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its round, from 0. Ratios are of runs of the same round.
    pub round: u32,
    /// When in the scenario it was its turn, from 0.
    pub turn: u32,
    /// What the load generator measured.
    pub outcome: Outcome,
    /// Processor seconds of each part (cgroup `cpu.stat`) in the measured time.
    pub cpu: BTreeMap<Role, f64>,
    /// What idle connections held.
    pub memory: Option<Memory>,
}

/// What connections hold, above what was held before they came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// How many connections.
    pub connections: u64,
    /// Bytes of resident memory, by part.
    pub resident: BTreeMap<Role, i64>,
    /// Bytes in TCP buffers of the whole kernel (/proc/net/sockstat).
    pub tcp: i64,
    /// Bytes of slab memory of the whole kernel (/proc/meminfo): sockets themselves.
    pub slab: i64,
}

impl Scenario {
    /// The arm that the others are ratios to.
    pub fn baseline(&self) -> Option<&Arm> {
        self.arms.first()
    }

    /// The runs of a workload on an arm; empty when there are none.
    pub fn runs(&self, arm: &str, task: &str) -> &[Run] {
        self.cells.iter().find(|c| c.arm == arm && c.task == task).map_or(&[], |cell| &cell.runs)
    }
}
