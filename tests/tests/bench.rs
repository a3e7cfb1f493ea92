//! The benchmarks do what they say.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use tunnel_tests::{
    amount::amount,
    bench::{
        hold::hold,
        model::{Report, State},
        peers::Peers,
        plan::{Extent, Plan},
        report::{self, Progress},
        runner::{self, Options},
    },
    load::Workload,
    programs,
};

fn run(scenarios: &[&str]) -> Result<Report> {
    let names: Vec<String> = scenarios.iter().map(|&name| name.to_owned()).collect();
    let plan = Plan::new(Extent::Test, &names, None);
    let peers = Peers::find(&programs::tools());
    let options = Options { workers: 1, seed: 1, command: "a test".to_owned(), peers };
    runner::run(&plan, &options, &Progress::new(plan.steps()))
}

/// Whether `cargo xtask test` could not install them, which it says at its end.
#[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
fn without_peers() -> bool {
    std::env::var_os("TUNNEL_TEST_WITHOUT_PEERS").is_some()
}

/// Every arm that can run on this machine has numbers for every workload, and every byte was checked.
fn every_arm_moved_its_bytes(report: &Report) {
    assert_eq!(report.faults, Vec::<String>::new());
    for scenario in &report.scenarios {
        for arm in &scenario.arms {
            let tasks: BTreeSet<_> =
                scenario.cells.iter().filter(|cell| cell.arm == arm.name).map(|cell| &cell.task).collect();
            match &arm.state {
                State::Ran => assert_eq!(tasks.len(), scenario.workloads.len(), "{}: {tasks:?}", arm.name),
                State::Missing(what) => {
                    assert!(
                        what.starts_with("not built yet")
                            || what.starts_with("this kernel does not have")
                            || without_peers(),
                        "{}, {}: {what}",
                        scenario.name,
                        arm.name
                    );
                    // Never a number for what was not there.
                    assert!(tasks.is_empty(), "{}: {tasks:?}", arm.name);
                    eprintln!("{}, {}: {what}", scenario.name, arm.name);
                }
                State::Failed(why) => panic!("{}, {}: {why}", scenario.name, arm.name),
            }
        }
        for run in scenario.cells.iter().flat_map(|cell| &cell.runs) {
            assert!(run.outcome.bytes_up + run.outcome.bytes_down > 0, "{}: {run:?}", scenario.name);
        }
        let tunnels: BTreeSet<_> =
            scenario.arms.iter().filter_map(|arm| arm.tls.as_ref()).map(|tls| &tls.cipher).collect();
        assert!(tunnels.len() <= 1, "{}: {tunnels:?}", scenario.name);
    }
}

/// Every arm of the capture benchmark moves the bytes that it reports.
#[test]
fn heavy_every_way_of_capturing_moves_the_bytes_it_claims() -> Result<()> {
    every_arm_moved_its_bytes(&run(&["capture-bare", "capture"])?);
    Ok(())
}

/// Every arm of the relay benchmark moves the bytes that it reports.
#[test]
fn heavy_every_relay_moves_the_bytes_it_claims() -> Result<()> {
    every_arm_moved_its_bytes(&run(&["relay"])?);
    Ok(())
}

/// Every arm of the chain benchmark moves the bytes that it reports.
#[test]
fn heavy_every_chain_moves_the_bytes_it_claims() -> Result<()> {
    let report = run(&["chain", "fairness", "paced", "memory"])?;
    every_arm_moved_its_bytes(&report);
    // What programs and people read is written from it.
    let folder = tempfile::tempdir()?;
    report::save(&report, folder.path())?;
    assert_eq!(report::load(&folder.path().join("report.json"))?, report);
    Ok(())
}

/// Every arm of the link benchmark moves the bytes that it reports.
#[test]
fn heavy_every_chain_over_a_link_moves_the_bytes_it_claims() -> Result<()> {
    every_arm_moved_its_bytes(&run(&["link-20ms", "link-100mbit"])?);
    Ok(())
}

/// Every arm of the HTTP/3 benchmarks moves the bytes that it reports; over a link that loses some where tests are thorough.
#[test]
fn heavy_every_chain_over_http_3_moves_the_bytes_it_claims() -> Result<()> {
    every_arm_moved_its_bytes(&run(amount(&["h3"][..], &["h3", "lossy"][..]))?);
    Ok(())
}

/// An arm that is held for profiling prints its processes first, and their processor time at the end.
#[test]
fn an_arm_that_is_kept_up_names_its_processes_before_it_goes_on_and_what_they_did_after() -> Result<()> {
    let options = Options { workers: 1, seed: 1, command: "a test".to_owned(), peers: Peers::none() };
    let mut said = Vec::new();
    hold(&[], "ours", Workload::Connect { at_once: 4 }, Duration::from_millis(200), &options, &mut said)?;
    let said = String::from_utf8(said)?;
    let (before, after) = said.split_once("go\n").expect("it goes on");
    for role in ["client: ", "near proxy: ", "far proxy: ", "server: "] {
        let process = before.lines().find_map(|line| line.strip_prefix(role)).expect(role);
        assert!(process.parse::<u32>().is_ok(), "{before}");
    }
    let operations = after.split(' ').next().and_then(|n| n.parse::<u64>().ok());
    assert!(operations.is_some_and(|n| n > 0) && after.contains("cpu near proxy: "), "{after}");
    let unknown = hold(&[], "nobody", Workload::FirstByte, Duration::ZERO, &options, &mut Vec::new());
    assert!(unknown.unwrap_err().to_string().contains("no arm nobody"));
    Ok(())
}
