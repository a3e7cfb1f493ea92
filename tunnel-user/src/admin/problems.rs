//! What is wrong with a running daemon, and what helps.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use super::view::{Capture, Certificate, Overview, Problem, Severity};
use crate::{model::span::span, sinks::upstream::report::UpstreamReport};

/// A certificate whose validity ends sooner is warned of. Who rotates certificates of a day does so long before.
const EXPIRES_SOON: i64 = 3600;
/// And one of which this part of its validity is left, if it is valid for longer.
const EXPIRES_SOON_PART: i64 = 10;
/// The same at most this long before it ends.
const EXPIRES_SOON_MAX: i64 = 14 * 86_400;

/// All that is known, the worst first.
pub(super) fn of(overview: &Overview, upstreams: &BTreeMap<String, UpstreamReport>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let now =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| i64::try_from(t.as_secs()).unwrap_or(0));
    for identity in &overview.identities {
        problems.extend(
            identity.chain.first().and_then(|leaf| expiry(&identity.name, &identity.origin, leaf, now)),
        );
    }
    problems.extend(overview.captures.iter().filter_map(capture));
    problems.extend(upstreams.iter().filter_map(|(name, report)| upstream(name, report)));
    if let Some(error) = &overview.reloads.last_error {
        problems.push(Problem {
            severity: Severity::Warning,
            blocks_ready: false,
            what: format!("the configuration file was changed and not put in force: {error}"),
            remedy: "Correct it: `tunnel config check FILE` lists every mistake. The configuration before is in force.".to_owned(),
        });
    }
    problems.sort_by_key(|problem| problem.severity);
    problems
}

fn expiry(name: &str, origin: &str, leaf: &Certificate, now: i64) -> Option<Problem> {
    let Certificate { not_before, not_after, .. } = *leaf;
    let remedy =
        format!("Issue another certificate in place of {origin}: it is read as soon as the file changes.");
    let error =
        |what| Some(Problem { severity: Severity::Error, blocks_ready: true, what, remedy: remedy.clone() });
    if not_after == 0 {
        return None;
    }
    if now > not_after {
        return error(format!(
            "the certificate of identity \"{name}\" expired {} ago: peers reject it",
            span((now - not_after).unsigned_abs())
        ));
    }
    if now < not_before {
        return error(format!(
            "the certificate of identity \"{name}\" is valid in {} only: peers reject it",
            span((not_before - now).unsigned_abs())
        ));
    }
    let soon = ((not_after - not_before) / EXPIRES_SOON_PART).clamp(EXPIRES_SOON, EXPIRES_SOON_MAX);
    (not_after - now < soon).then(|| Problem {
        severity: Severity::Warning,
        blocks_ready: false,
        what: format!(
            "the certificate of identity \"{name}\" expires in {}",
            span((not_after - now).unsigned_abs())
        ),
        remedy,
    })
}

fn capture(capture: &Capture) -> Option<Problem> {
    let name = capture.label();
    if !capture.present {
        return Some(Problem {
            severity: Severity::Warning,
            blocks_ready: false,
            what: format!("capture \"{name}\" waits for its cgroup: {} does not exist", capture.group),
            remedy: "Start what runs in it; it is captured from its first connection on. If it runs already, its cgroup has \
                     another name: see /proc/PID/cgroup."
                .to_owned(),
        });
    }
    (!capture.attached).then(|| Problem {
        severity: Severity::Error,
        blocks_ready: true,
        what: format!("capture \"{name}\": its programs are not attached, or belong to another daemon"),
        remedy: "See the log for why; `tunnel doctor` says what this kernel and these privileges allow."
            .to_owned(),
    })
}

fn upstream(name: &str, report: &UpstreamReport) -> Option<Problem> {
    if let Some(why) = &report.unavailable {
        let why = if why.is_empty() { "none is known yet" } else { why };
        return Some(Problem {
            severity: Severity::Error,
            blocks_ready: false,
            what: format!("upstream \"{name}\" has no endpoints: {why}"),
            remedy: "Flows through it are refused with no_endpoint. Check its endpoints, the file, or the name server.".to_owned(),
        });
    }
    let out: Vec<_> = report.endpoints.iter().filter(|e| e.ejected + e.unhealthy > 0).collect();
    let first = out.first()?;
    let all = out.len() == report.endpoints.len() && out.iter().all(|e| e.available == 0);
    let why = if first.last_error.is_empty() { String::new() } else { format!(": {}", first.last_error) };
    let what = if all {
        format!("no endpoint of upstream \"{name}\" is available{why}")
    } else {
        let (out, of) = (out.len(), report.endpoints.len());
        format!(
            "{out} of {of} endpoints of upstream \"{name}\" are ejected or unhealthy; {}{why}",
            first.address
        )
    };
    Some(Problem {
        severity: if all { Severity::Error } else { Severity::Warning },
        blocks_ready: false,
        what,
        remedy: "They come back by themselves as soon as they can be connected to.".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_warned_of_before_they_expire() {
        let leaf = |not_before, not_after| Certificate { not_before, not_after, ..Certificate::default() };
        let found = |leaf: Certificate, now| {
            expiry("default", "cert.pem", &leaf, now).map(|p| (p.severity, p.blocks_ready))
        };
        let day = 86_400;
        assert_eq!(found(leaf(0, day), day + 1), Some((Severity::Error, true)));
        assert_eq!(found(leaf(10, day), 5), Some((Severity::Error, true)));
        assert_eq!(found(leaf(0, day), day - 3000), Some((Severity::Warning, false)));
        assert_eq!(found(leaf(0, day), day / 2), None);
        // A year: two weeks before.
        assert_eq!(found(leaf(0, 365 * day), 350 * day), None);
        assert_eq!(found(leaf(0, 365 * day), 352 * day), Some((Severity::Warning, false)));
    }
}
