//! What pictures promise.

use super::*;
use crate::bench::report::fixture;

/// Enough of XML to see that what was written is well-formed: one root, tags that close in order, attributes
/// in quotes that are not twice on an element, no bare `<` or `&`.
pub(in crate::bench::report) fn well_formed(text: &str) -> Result<(), String> {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = text;
    let mut roots = 0;
    while let Some(start) = rest.find('<') {
        entities(&rest[..start])?;
        if open.is_empty() && !rest[..start].trim().is_empty() {
            return Err(format!("text outside of the root: {}", &rest[..start]));
        }
        let end = rest[start..].find('>').ok_or("a tag that does not end")? + start;
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            let expected = open.pop().ok_or("more closed than opened")?;
            if name != expected {
                return Err(format!("</{name}> closes <{expected}>"));
            }
            continue;
        }
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        self::attributes(attributes)?;
        roots += usize::from(open.is_empty());
        if !closed {
            open.push(name);
        }
    }
    match (open.is_empty() && rest.trim().is_empty(), roots) {
        (true, 1) => Ok(()),
        _ => Err(format!("{roots} roots, {open:?} open, {rest:?} left")),
    }
}

fn attributes(mut text: &str) -> Result<(), String> {
    let mut seen: Vec<&str> = Vec::new();
    while !text.trim().is_empty() {
        let (name, value) = text.trim_start().split_once("=\"").ok_or_else(|| format!("no value: {text}"))?;
        let (value, rest) = value.split_once('"').ok_or_else(|| format!("no end: {text}"))?;
        entities(value)?;
        if seen.contains(&name) || value.contains('<') {
            return Err(format!("{name} twice, or < in {value}"));
        }
        seen.push(name);
        text = rest;
    }
    Ok(())
}

fn entities(text: &str) -> Result<(), String> {
    for after in text.split('&').skip(1) {
        let known = ["lt;", "gt;", "amp;", "quot;", "#39;", "apos;"];
        if !known.iter().any(|entity| after.starts_with(entity)) {
            return Err(format!("a bare & before {after}"));
        }
    }
    Ok(())
}

/// The checker of pictures finds a picture that is broken on purpose.
#[test]
fn a_checker_that_finds_nothing_would_prove_nothing() {
    assert_eq!(well_formed("<a b=\"1\"><c/>x &amp; y</a>\n"), Ok(()));
    for bad in ["<a>", "<a></b>", "<a/><b/>", "<a b=1/>", "<a b=\"1\" b=\"2\"/>", "<a>&</a>", "<a>x", "x<a/>"]
    {
        assert!(well_formed(bad).is_err(), "{bad}");
    }
}

#[test]
fn pictures_are_well_formed_small_complete_and_always_the_same() {
    let report = fixture::report();
    let all = plots(&report);
    assert_eq!(all, plots(&fixture::report()));
    for plot in &all {
        assert_eq!(well_formed(&plot.svg), Ok(()), "{}", plot.name);
        assert!(plot.svg.len() < 60_000, "{}: {} bytes", plot.name, plot.svg.len());
        assert!(!plot.svg.contains("NaN") && !plot.svg.contains("inf"), "{}", plot.name);
        // The name of the format is no request.
        let outside = plot.svg.replace("http://www.w3.org/2000/svg", "");
        assert!(!outside.contains("://") && !outside.contains("<script"), "{}", plot.name);
        assert!(!plot.caption.is_empty() && plot.title.contains(": "), "{}", plot.title);
    }
    let names: Vec<&str> = all.iter().map(|plot| plot.name.as_str()).collect();
    for name in [
        "capture-rules-connect-1",
        "capture-bare-rules-connect-1",
        "capture-latency",
        "relay-throughput",
        "chain-ratios-to-direct",
        "chain-ratios-to-ours",
        "chain-latency",
        "chain-throughput",
        "chain-cpu-per-gb",
        "chain-cpu-per-1000",
        "chain-memory",
        "link-20ms-latency",
        "link-100mbit-throughput",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    let mut unique = names.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), names.len());
}

#[test]
fn an_arm_that_did_not_run_is_named_and_not_drawn() {
    let all = plots(&fixture::report());
    let chain = all.iter().find(|plot| plot.name == "chain-throughput").unwrap();
    assert!(chain.caption.ends_with("Not here: redsocks (missing)."), "{}", chain.caption);
    assert!(!chain.svg.contains("redsocks"));
    for label in ["tunnel", "Gbit/s", "ours-envoy", "Upload, 16 streams", "iperf3"] {
        assert!(chain.svg.contains(label) || label == "tunnel", "{label}");
    }
}

#[test]
fn a_report_without_runs_has_no_pictures() {
    let mut report = fixture::report();
    for scenario in &mut report.scenarios {
        scenario.cells.clear();
    }
    assert!(plots(&report).is_empty());
    report.scenarios.clear();
    assert!(plots(&report).is_empty());
}

#[test]
fn one_round_and_hostile_names_are_drawn_all_the_same() {
    let mut report = fixture::Made::new(3, 0.05, 1).report();
    for scenario in &mut report.scenarios {
        scenario.title = "<svg onload=\"x\">&'".to_owned();
        for arm in &mut scenario.arms {
            arm.title = "]]>\u{0}<b>\"&\u{1b}".to_owned();
        }
        scenario.name.push_str("/../x");
    }
    let all = plots(&report);
    assert!(!all.is_empty());
    for plot in all {
        assert_eq!(well_formed(&plot.svg), Ok(()), "{}", plot.name);
        assert!(!plot.svg.contains("<b>") && !plot.svg.contains('\u{1b}'));
        assert!(!plot.name.contains(['/', '.']), "{}", plot.name);
    }
}
