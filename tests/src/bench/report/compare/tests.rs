//! What a comparison promises.

use proptest::prelude::*;

use super::*;
use crate::bench::{
    model::{Cell, Role},
    plan::OTHER,
    report::fixture::{self, Made},
};

fn moved(comparison: &Comparison) -> Vec<&Change> {
    comparison.changes.iter().filter(|c| matches!(c.verdict, Verdict::Better | Verdict::Worse)).collect()
}

proptest! {
    // A report is a few hundred cells: what matters is how many metrics one case has.
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn a_report_has_not_changed_against_itself(seed: u64, rounds in 1u32..12) {
        let report = Made::new(seed, 0.05, rounds).report();
        let comparison = compare(&report, &report);
        prop_assert!(moved(&comparison).is_empty());
        prop_assert!(comparison.added.is_empty() && comparison.removed.is_empty());
        let few = comparison.count(Verdict::TooFew);
        prop_assert_eq!(few, if (rounds as usize) < FEWEST { comparison.changes.len() } else { 0 });
    }

    #[test]
    fn noise_is_not_a_change(seed: u64, rounds in 7u32..16, noise in 0.005..0.2) {
        let old = Made::new(seed, noise, rounds).report();
        let new = Made::new(seed ^ 0x5555, noise, rounds).report();
        let comparison = compare(&old, &new);
        // One in 500 would be about 1 of 400; ratios of one arm share what their first arm did, and many
        // metrics are read off one run, so that the unlucky ones come together.
        prop_assert!(comparison.changes.len() > 300);
        prop_assert!(moved(&comparison).len() <= comparison.changes.len() / 25, "{}", comparison.text(false));
    }

    #[test]
    fn twenty_percent_are_found_in_five_percent_of_noise(seed: u64, rounds in 9u32..16) {
        let old = Made::new(seed, 0.05, rounds).report();
        let new = Made::new(seed ^ 0x5555, 0.05, rounds).slower("ours", 1.2).report();
        let comparison = compare(&old, &new);
        // The client's memory is lost in what it takes once.
        let slower = [Metric::P50, Metric::Gbits, Metric::Resident(Role::Near), Metric::Resident(Role::Far)];
        let ours = |c: &&Change| c.scenario == "chain" && c.arm == "ours" && slower.contains(&c.metric);
        let all: Vec<&Change> = comparison.changes.iter().filter(ours).collect();
        let found = all.iter().filter(|c| c.verdict == Verdict::Worse).count();
        prop_assert!(all.len() > 15);
        prop_assert!(found * 10 >= all.len() * 6, "{found} of {}: {}", all.len(), comparison.text(false));
    }
}

#[test]
fn the_first_arm_is_compared_by_values_and_the_others_by_ratios_where_there_are_some() {
    let report = fixture::report();
    let comparison = compare(&report, &report);
    for change in &comparison.changes {
        let proxies_alone = matches!(change.metric, Metric::ProxyCpuPerGb | Metric::ProxyCpuPerThousand);
        if change.arm == "direct" {
            assert_eq!(change.basis, Basis::Value);
        } else if change.metric == Metric::P50 {
            assert_eq!(change.basis, Basis::Ratio);
        } else if proxies_alone && change.scenario == "chain" {
            assert_eq!(change.basis, Basis::Value, "direct has no proxies");
        }
    }
}

#[test]
fn what_differs_besides_the_numbers_is_said_first() {
    let old = fixture::report();
    let mut new = old.clone();
    new.machine.kernel = "6.13.0".to_owned();
    new.settings.workers = 2;
    new.versions.insert("envoy".to_owned(), "1.34.0".to_owned());
    new.scenarios[3].arms[1].tls.as_mut().unwrap().cipher = "TLS_CHACHA20_POLY1305_SHA256".to_owned();
    new.scenarios[3].workloads.retain(|task| task.name != "first-byte");
    new.scenarios[3].cells.retain(|cell| cell.task != "first-byte" && cell.arm != "envoy");
    new.scenarios.remove(0);
    let text = compare(&old, &new).text(false);
    for line in [
        "kernel: 6.12.9 → 6.13.0",
        "threads of each proxy: 1 → 2",
        "envoy: 1.33.0 → 1.34.0",
        "chain, ours: TLS: TLS 1.3, TLS_AES_128_GCM_SHA256, x25519 → TLS 1.3, TLS_CHACHA20_POLY1305_SHA256",
        "the newer benchmark failed: 1 fault",
        "Only in the older:\n  scenario capture\n  chain: arm envoy\n  chain: first-byte\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    assert!(text.starts_with("0 better, 0 worse, "), "{text}");
    assert!(compare(&new, &old).text(false).contains("Only in the newer:\n  scenario capture\n"));
}

#[test]
fn few_runs_are_never_a_change() {
    let old = Made::new(1, 0.01, 6).report();
    let new = Made::new(2, 0.01, 6).slower("ours", 3.0).report();
    let comparison = compare(&old, &new);
    assert!(moved(&comparison).is_empty());
    let text = comparison.text(false);
    assert!(text.contains("too few runs (6 and 6, 7 needed)"), "{text}");
    assert!(text.lines().next().unwrap().ends_with("with too few runs (under 7) to say"), "{text}");
}

#[test]
fn more_throughput_is_better_and_more_latency_is_worse() {
    let old = Made::new(1, 0.01, 11).report();
    let new = Made::new(2, 0.01, 11).slower("ours", 0.5).report();
    let comparison = compare(&old, &new);
    let verdict = |task: &str, metric| {
        let found = |c: &&Change| {
            (c.scenario == "chain" && c.arm == "ours") && (c.task == task && c.metric == metric)
        };
        comparison.changes.iter().find(found).unwrap().verdict
    };
    assert_eq!(verdict("up:1", Metric::Gbits), Verdict::Better);
    assert_eq!(verdict("ping-pong:64", Metric::P50), Verdict::Better);
    let back = compare(&new, &old);
    assert!(back.changes.iter().any(|c| c.verdict == Verdict::Worse && c.metric == Metric::Gbits));
    assert!(back.changes[0].verdict != Verdict::Inside, "what moved comes first");
}

/// The rank test tells samples that lie apart from samples that are mixed.
#[test]
fn ranks_of_apart_and_of_mixed_samples() {
    let low: Vec<f64> = (0..7).map(f64::from).collect();
    let high: Vec<f64> = (7..14).map(f64::from).collect();
    assert!(deviate(&low, &high) > DEVIATES, "seven runs on each side can be told apart");
    assert_eq!(deviate(&low, &low), 0.0);
    assert_eq!(deviate(&[], &low), 0.0);
}

/// Every arm of a report once more as the other build's, with runs of its own.
fn with_twins(seed: u64, noise: f64, slower: f64) -> Report {
    let mut report = Made::new(seed, noise, 11).slower("ours", slower).report();
    let others = Made::new(seed ^ 0x5555, noise, 11).report();
    for (scenario, other) in report.scenarios.iter_mut().zip(others.scenarios) {
        let twin = |name: &str| format!("{name}{OTHER}");
        scenario.arms.extend(other.arms.into_iter().map(|arm| Arm { name: twin(&arm.name), ..arm }));
        scenario.cells.extend(other.cells.into_iter().map(|cell| Cell { arm: twin(&cell.arm), ..cell }));
    }
    report
}

#[test]
fn builds_that_took_turns_differ_only_where_one_is_slower() {
    let same = beside(&with_twins(3, 0.05, 1.0));
    assert!(
        same.changes.len() > 300 && moved(&same).len() <= same.changes.len() / 25,
        "{}",
        same.text(false)
    );
    let slower = beside(&with_twins(3, 0.02, 1.3));
    let latency = |c: &&&Change| (c.arm.as_str(), c.metric) == ("ours", Metric::P50) && c.scenario == "chain";
    let all = moved(&slower);
    let found: Vec<_> = all.iter().filter(latency).collect();
    assert!(!found.is_empty() && found.iter().all(|c| c.verdict == Verdict::Worse), "{}", slower.text(false));
    assert!(slower.text(false).contains("in turns"));
}
