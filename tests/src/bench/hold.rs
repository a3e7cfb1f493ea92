//! One arm under one workload, set up as it is when it is measured, for perf, strace and their like.
//!
//! It prints the numbers of its processes, and at the end how many operations they did. It writes no report.

use std::{fs, io::Write, thread, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::{
    accounting,
    arms::{Bed, SetUp, Whose},
    flags::SCENARIOS,
    plan::{Extent, Plan},
    runner::Options,
};
use crate::load::Workload;

/// The scenario whose arms are meant when none is named.
const CHAIN: &str = "chain";

/// Keeps the arm up for so long.
pub fn hold(
    scenario: &[String],
    arm: &str,
    workload: Workload,
    length: Duration,
    options: &Options,
    mut out: impl Write,
) -> Result<()> {
    let name = match scenario {
        [] => CHAIN,
        [only] => only.as_str(),
        _ => bail!("an arm is of one scenario: {}", SCENARIOS.join(", ")),
    };
    let plan = Plan::new(Extent::Quick, &[name.to_owned()], None);
    let plan = plan.scenarios.first().with_context(|| format!("there is no scenario {name}"))?;
    let found = plan.arms.iter().find(|a| a.name == arm).with_context(|| {
        let names: Vec<_> = plan.arms.iter().map(|a| a.name.as_str()).collect();
        format!("{name} has no arm {arm}, but {}", names.join(", "))
    })?;
    let build = found.build.map_err(anyhow::Error::msg)?;
    let mut bed = match Bed::set_up(build, plan.network, options.workers, &options.peers)? {
        SetUp::Ready(bed) => bed,
        SetUp::Missing(what) => bail!("{what}"),
    };
    let mut client = bed.client(workload, Whose::Captured, length)?;
    client.wait_ready()?;
    for (role, group) in bed.parts(Whose::Captured) {
        let processes = fs::read_to_string(group.path().join("cgroup.procs"))?;
        writeln!(out, "{role}: {}", processes.split_whitespace().collect::<Vec<_>>().join(" "))?;
    }
    writeln!(out, "go")?;
    out.flush()?;
    let before = accounting::cpu(bed.parts(Whose::Captured))?;
    let outcome = client.measure()?;
    let after = accounting::cpu(bed.parts(Whose::Captured))?;
    if matches!(workload, Workload::Idle { .. }) {
        #[expect(clippy::disallowed_methods, reason = "this is what it was asked for")]
        thread::sleep(length);
    }
    writeln!(
        out,
        "{} operations, {} bytes up, {} bytes down in {:.3} s",
        outcome.operations, outcome.bytes_up, outcome.bytes_down, outcome.seconds
    )?;
    for (role, seconds) in accounting::spent(&before, &after) {
        writeln!(out, "cpu {role}: {seconds:.6}")?;
    }
    client.end()?;
    bed.check()
}
