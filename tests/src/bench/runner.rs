//! Runs a plan. The report is complete also when something failed.
//!
//! # Invariants
//! - In each round every workload is run on every arm before the next workload, in an order drawn anew.
//! - What an arm did not deliver is a fault that names scenario, arm, workload and round.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Context as _, Result};
use fastrand::Rng;

use super::{
    arms::{Bed, SetUp},
    footprint, machine,
    model::{self, Cell, Report, Run, SCHEMA, Settings, State, Task},
    peers::Peers,
    plan::{Arm, Plan, Scenario, Work},
    report::Progress,
};
use crate::load::{Direction, Workload};

/// After so many failed runs in a row an arm is given up: it would only hold up the others.
const FAILURES_MAX: u32 = 3;

/// How a plan is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads of each proxy.
    pub workers: u32,
    /// Decides the order of runs.
    pub seed: u64,
    /// The command line, for the report.
    pub command: String,
    /// Where the programs of others are.
    pub peers: Peers,
}

/// Runs all of it.
pub fn run(plan: &Plan, options: &Options, progress: &Progress) -> Result<Report> {
    // Before anything is run: the checkout may be another an hour later.
    let (began, taken) = (Instant::now(), machine::now()?);
    let (machine, versions) = (machine::describe()?, options.peers.versions());
    let mut runner = Runner { options, progress, random: Rng::with_seed(options.seed), faults: Vec::new() };
    let footprint = plan.footprint.then(footprint::measure).transpose();
    let footprint = footprint.unwrap_or_else(|e| {
        runner.fault(format!("footprint: {e:#}"));
        None
    });
    let scenarios = plan.scenarios.iter().map(|scenario| runner.scenario(scenario)).collect();
    progress.finish();
    Ok(Report {
        schema: SCHEMA,
        taken,
        seconds: began.elapsed().as_secs_f64(),
        settings: Settings {
            extent: plan.extent.to_string(),
            rounds: plan.rounds(),
            workers: options.workers,
            seed: options.seed,
            command: options.command.clone(),
        },
        machine,
        versions,
        scenarios,
        faults: runner.faults,
        footprint,
    })
}

struct Runner<'r> {
    options: &'r Options,
    progress: &'r Progress,
    random: Rng,
    faults: Vec<String>,
}

/// An arm that runs, and how it has been doing.
struct Running {
    index: usize,
    bed: Box<Bed>,
    failures: u32,
}

impl Runner<'_> {
    fn scenario(&mut self, plan: &Scenario) -> model::Scenario {
        self.progress.scenario(plan.title, plan.steps());
        let mut report = model::Scenario {
            name: plan.name.to_owned(),
            title: plan.title.to_owned(),
            about: plan.about.to_owned(),
            arms: plan.arms.iter().map(described).collect(),
            workloads: plan.tasks.iter().map(|work| work.task.clone()).collect(),
            cells: Vec::new(),
        };
        let mut results = Results::default();
        if plan.is_memory() {
            self.memory(plan, &mut report, &mut results);
        } else {
            self.rounds(plan, &mut report, &mut results);
        }
        report.cells = results.cells(plan);
        for fault in different_ciphers(&report) {
            self.fault(fault);
        }
        report
    }

    fn rounds(&mut self, plan: &Scenario, report: &mut model::Scenario, results: &mut Results) {
        let indices = 0..plan.arms.len();
        let mut running: Vec<Running> =
            indices.filter_map(|index| self.set_up(plan, index, report)).collect();
        for round in 0..plan.rounds {
            for work in &plan.tasks {
                self.random.shuffle(&mut running);
                running.retain_mut(|arm| self.turn(plan, work, round, arm, report, results));
            }
        }
    }

    /// One run on one arm; false when the arm is given up.
    fn turn(
        &mut self,
        plan: &Scenario,
        work: &Work,
        round: u32,
        running: &mut Running,
        report: &mut model::Scenario,
        results: &mut Results,
    ) -> bool {
        let arm = &plan.arms[running.index];
        self.progress.step(&format!("{}, {}", work.task.title, arm.title));
        match once(&mut running.bed, work).and_then(|run| running.bed.check().map(|()| run)) {
            Ok(run) => {
                results.add(&arm.name, &work.task, Run { round, ..run });
                running.failures = 0;
                true
            }
            Err(e) => {
                self.fault(format!(
                    "{}, {}, {}, round {}: {e:#}",
                    plan.name,
                    arm.name,
                    work.task.name,
                    round + 1
                ));
                running.failures += 1;
                let given_up = running.failures >= FAILURES_MAX;
                if given_up {
                    report.arms[running.index].state =
                        State::Failed(format!("given up after {FAILURES_MAX} failed runs in a row: {e:#}"));
                }
                !given_up
            }
        }
    }

    /// Proxies of their own for each round: what an allocator has had once it does not give back.
    fn memory(&mut self, plan: &Scenario, report: &mut model::Scenario, results: &mut Results) {
        let connections = |work: &Work| match work.task.workload {
            Workload::Idle { connections } => Some(connections),
            _ => None,
        };
        let steps: Vec<u32> = plan.tasks.iter().filter_map(connections).collect();
        let mut order: Vec<usize> = (0..plan.arms.len()).collect();
        for round in 0..plan.rounds {
            self.random.shuffle(&mut order);
            for &index in &order {
                let arm = &plan.arms[index];
                let Some(mut running) = self.set_up(plan, index, report) else { continue };
                self.progress.step(&format!("idle connections, {}", arm.title));
                let most = arm.idle_max.unwrap_or(u32::MAX);
                let reached: Vec<u32> = steps.iter().copied().filter(|step| *step <= most).collect();
                let mut runs = Vec::new();
                let counted = running.bed.idle(&reached, &mut runs).and_then(|()| running.bed.check());
                for (work, run) in plan.tasks.iter().zip(runs) {
                    results.add(&arm.name, &work.task, Run { round, ..run });
                }
                if let Err(e) = counted {
                    self.fault(format!("{}, {}, round {}: {e:#}", plan.name, arm.name, round + 1));
                }
            }
        }
    }

    fn set_up(&mut self, plan: &Scenario, index: usize, report: &mut model::Scenario) -> Option<Running> {
        let Ok(build) = plan.arms[index].build else { return None };
        let described = &mut report.arms[index];
        // An earlier round has found that out.
        if matches!(described.state, State::Missing(_) | State::Failed(_)) && !described.processes.is_empty()
        {
            return None;
        }
        match Bed::set_up(build, plan.network, self.options.workers, &self.options.peers) {
            Ok(SetUp::Ready(bed)) => {
                described.describe(&bed);
                Some(Running { index, bed, failures: 0 })
            }
            Ok(SetUp::Missing(what)) => {
                if described.state != State::Missing(what.clone()) {
                    self.progress.note(&format!("{}: {what}", described.title));
                    described.state = State::Missing(what);
                }
                None
            }
            Err(e) => {
                let why = format!("{e:#}");
                let fault = format!("{}, {}: it could not be set up: {why}", plan.name, described.name);
                described.state = State::Failed(why);
                self.fault(fault);
                None
            }
        }
    }

    fn fault(&mut self, fault: String) {
        self.progress.note(&fault);
        self.faults.push(fault);
    }
}

/// Arms that spend different amounts of work on the same bytes cannot be compared. The group is used once for each
/// connection between proxies, and no workload counts those.
fn different_ciphers(report: &model::Scenario) -> Vec<String> {
    let with: Vec<_> = report.arms.iter().filter_map(|arm| Some((&arm.name, arm.tls.as_ref()?))).collect();
    let Some(((first, tls), rest)) = with.split_first() else { return Vec::new() };
    let other =
        |(_, theirs): &&(_, &model::Tls)| (&theirs.version, &theirs.cipher) != (&tls.version, &tls.cipher);
    let fault = |(name, theirs): &(&String, &model::Tls)| {
        format!(
            "{}: {first} ran with {} {}, and {name} with {} {}: they cannot be compared",
            report.name, tls.version, tls.cipher, theirs.version, theirs.cipher
        )
    };
    rest.iter().filter(other).map(fault).collect()
}

fn described(arm: &Arm) -> model::Arm {
    model::Arm {
        name: arm.name.clone(),
        title: arm.title.clone(),
        family: arm.family.clone(),
        rules: arm.rules.map(u64::from),
        state: match arm.build {
            Ok(_) => State::Failed("it was not run".to_owned()),
            Err(why) => State::Missing(why.to_owned()),
        },
        processes: Vec::new(),
        tls: None,
    }
}

fn once(bed: &mut Bed, work: &Work) -> Result<Run> {
    match work.task.workload {
        Workload::Bulk { streams, direction } if work.task.witness => {
            bed.iperf(streams, direction == Direction::Down, work.time).context("iperf3")
        }
        workload => bed.run(workload, work.whose, work.time),
    }
}

/// Runs, as they come.
#[derive(Default)]
struct Results {
    runs: BTreeMap<(String, String), Vec<Run>>,
    turns: u32,
}

impl Results {
    fn add(&mut self, arm: &str, task: &Task, mut run: Run) {
        run.turn = self.turns;
        self.turns += 1;
        self.runs.entry((arm.to_owned(), task.name.clone())).or_default().push(run);
    }

    /// In the order of the plan.
    fn cells(mut self, plan: &Scenario) -> Vec<Cell> {
        let mut cells = Vec::new();
        for arm in &plan.arms {
            for work in &plan.tasks {
                let (arm, task) = (arm.name.clone(), work.task.name.clone());
                if let Some(runs) = self.runs.remove(&(arm.clone(), task.clone())) {
                    cells.push(Cell { arm, task, runs });
                }
            }
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        model::Tls,
        plan::{Extent, Plan},
    };

    #[test]
    fn arms_with_different_ciphers_are_a_fault_and_different_groups_are_none() {
        let plan = Plan::new(Extent::Quick, &["chain".to_owned()], None);
        let arms = plan.scenarios[0].arms.iter().map(described).collect();
        let mut report = model::Scenario {
            name: "chain".to_owned(),
            title: String::new(),
            about: String::new(),
            arms,
            workloads: Vec::new(),
            cells: Vec::new(),
        };
        let tls = |cipher: &str, group: &str| {
            Some(Tls { version: "TLS 1.3".to_owned(), cipher: cipher.to_owned(), group: group.to_owned() })
        };
        report.arms[1].tls = tls("TLS_AES_128_GCM_SHA256", "x25519");
        report.arms[2].tls = tls("TLS_AES_128_GCM_SHA256", "X25519MLKEM768");
        assert_eq!(different_ciphers(&report), Vec::<String>::new());
        report.arms[3].tls = tls("TLS_AES_256_GCM_SHA384", "x25519");
        let faults = different_ciphers(&report);
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].contains("envoy") && faults[0].contains("TLS_AES_256_GCM_SHA384"), "{faults:?}");
    }
}
