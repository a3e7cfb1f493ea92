//! The flags of `cargo xtask bench`: shared with xtask, which has to know them before it builds for minutes.

use std::path::PathBuf;

/// What is run, and what it is compared with.
#[derive(clap::Args, Clone, Debug)]
pub struct Flags {
    /// The headlines, in 7 minutes on two cores; without it everything, in 35.
    #[arg(long)]
    pub quick: bool,

    /// Only this scenario; may be repeated.
    #[arg(long, value_name = "NAME", value_parser = SCENARIOS)]
    pub scenario: Vec<String>,

    /// How often each workload is run on each arm. Below 7 nothing is claimed about changes.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,

    /// Threads of each proxy.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,

    /// Decides the order of runs.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// Tells what has moved since the run that wrote this report.json.
    #[arg(long, value_name = "OLD.json")]
    pub compare: Option<PathBuf>,

    /// Compares with this report.json, and runs nothing.
    #[arg(long, value_name = "NEW.json", requires = "compare", conflicts_with_all = ["quick", "scenario", "rounds"])]
    pub with: Option<PathBuf>,

    /// Another build of tunnel: runs every arm with a part of ours with both builds, in turns, and tells what differs.
    #[arg(long, value_name = "TUNNEL", conflicts_with_all = ["with", "compare"])]
    pub beside: Option<PathBuf>,

    /// Writes this report.json into docs/testing/results.md, with its plots, and runs nothing.
    #[arg(long, value_name = "REPORT.json", conflicts_with_all = ["quick", "scenario", "rounds", "compare"])]
    pub publish: Option<PathBuf>,

    /// Writes report.html and the plots of this report.json beside it, and runs nothing.
    #[arg(long, value_name = "REPORT.json", conflicts_with_all = ["quick", "scenario", "rounds", "compare", "publish"])]
    pub redraw: Option<PathBuf>,

    /// Keeps one arm of a scenario up under one workload for others to look at (perf, strace), tells what its
    /// processes are, and reports nothing.
    #[arg(long, value_name = "ARM", requires = "workload", conflicts_with_all = ["quick", "rounds", "compare", "publish", "redraw"])]
    pub hold: Option<String>,

    /// What the arm is kept up under: ping-pong:64, connect:1, up:4, idle:1000, soak:16, …
    #[arg(long, value_name = "WORKLOAD", requires = "hold")]
    pub workload: Option<String>,

    /// How long it is kept up.
    #[arg(long, default_value_t = 20, requires = "hold", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,

    /// Where report.html, report.json and plots/ go.
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    pub out: PathBuf,
}

/// The scenarios, in the order in which they are run.
/// `footprint` is none: it has no arms, and is measured first.
pub const SCENARIOS: [&str; 12] = [
    "footprint",
    "capture-bare",
    "capture",
    "relay",
    "chain",
    "fairness",
    "paced",
    "memory",
    "link-20ms",
    "link-100mbit",
    "h3",
    "lossy",
];

/// What the help ends with.
pub const EXAMPLES: &str = "\
Examples:
  cargo xtask bench --peers                      install Envoy, redsocks and tinyproxy to compare with
  cargo xtask bench --quick                      the headlines, 7 minutes
  cargo xtask bench                              everything, 35 minutes
  cargo xtask bench --scenario chain --rounds 15
  cargo xtask bench --hold ours --workload connect:64 --seconds 60
  cargo xtask bench --hold ours --workload soak:16 --seconds 600      every byte compared, for ten minutes
  cargo xtask bench --compare old/report.json    run, and tell what moved since
  cargo xtask bench --compare old.json --with new.json
  cargo xtask bench --quick --beside old/tunnel  this build and that one, in turns
  cargo xtask bench --publish target/bench/report.json
  cargo xtask bench --redraw target/bench/report.json    report.html and plots anew, of numbers that are there";
