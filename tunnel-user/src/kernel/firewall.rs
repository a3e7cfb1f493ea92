//! Rules of iptables and nftables that break a capture, or that a capture makes ineffective.
//!
//! It reads what `nft` and `iptables-save` print for the network namespace of this process, and changes nothing. Where a program
//! is missing, or its output cannot be parsed, no rule is reported.

use std::{fmt, process::Command};

use serde_json::Value;

/// What a rule does to a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Harm {
    /// It drops packets on the loopback, over which captured connections reach the daemon.
    DropsLoopback,
    /// It is for the daemon's mark.
    MatchesMark,
    /// It is for the sockets of a user or a group: captured connections pass it with the loopback as their destination.
    MatchesOwner,
}

impl fmt::Display for Harm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DropsLoopback => "may drop captured connections on their way to the daemon over lo",
            Self::MatchesMark => "is for the mark of the daemon's own connections",
            Self::MatchesOwner => {
                "is for a user or cgroup, whose captured connections it sees go to the loopback: what it says of \
                 destinations is void"
            }
        })
    }
}

/// A rule that matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What it does.
    pub harm: Harm,
    /// As its program prints it.
    pub text: String,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.text, self.harm)
    }
}

/// The rules of this network namespace that matter to captures.
pub fn examine(mark: u32) -> Vec<Rule> {
    let mut found: Vec<Rule> = ["iptables-save", "ip6tables-save"]
        .into_iter()
        .filter_map(|program| output(program, &[]))
        .flat_map(|text| of_iptables(&text, mark))
        .collect();
    // Rules of iptables-nft are in both.
    if found.is_empty() {
        found = output("nft", &["-j", "list", "ruleset"]).map(|text| of_nft(&text, mark)).unwrap_or_default();
    }
    for family in ["-4", "-6"] {
        let rules = output("ip", &["-j", family, "rule"]);
        found.extend(rules.iter().flat_map(|text| of_ip_rules(text, family, mark)));
    }
    found.sort_by(|a, b| (a.harm, &a.text).cmp(&(b.harm, &b.text)));
    found.dedup();
    found
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From `iptables-save`.
fn of_iptables(text: &str, mark: u32) -> Vec<Rule> {
    let mut found = Vec::new();
    let mut table = "";
    let rule = |harm, table: &str, line: &str| Rule { harm, text: format!("iptables -t {table} {line}") };
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        }
        // ":INPUT DROP [0:0]"
        if let Some((chain, rest)) = line.strip_prefix(':').and_then(|l| l.split_once(' '))
            && rest.starts_with("DROP")
            && ["INPUT", "OUTPUT"].contains(&chain)
        {
            let flag = if chain == "INPUT" { "-i lo" } else { "-o lo" };
            let passes = |l: &str| {
                l.starts_with(&format!("-A {chain} "))
                    && l.ends_with("-j ACCEPT")
                    && (l.contains(flag) || l == format!("-A {chain} -j ACCEPT"))
            };
            if !text.lines().any(passes) {
                found.push(rule(Harm::DropsLoopback, table, &format!("-P {chain} DROP")));
            }
        }
        if !line.starts_with("-A ") {
            continue;
        }
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let after = |flag: &str| {
            let at = words.iter().position(|w| *w == flag)?;
            // "! -i lo" is every other device.
            let negated = at > 0 && words[at - 1] == "!";
            words.get(at + 1).filter(|_| !negated).copied()
        };
        let drops = matches!(after("-j"), Some("DROP" | "REJECT"));
        if drops && (after("-i") == Some("lo") || after("-o") == Some("lo")) {
            found.push(rule(Harm::DropsLoopback, table, line));
        }
        if after("--mark").is_some_and(|value| matches_mark(value, mark)) {
            found.push(rule(Harm::MatchesMark, table, line));
        }
        let of_owner = ["--uid-owner", "--gid-owner", "--path", "--cgroup"].iter().any(|f| words.contains(f));
        if drops && of_owner {
            found.push(rule(Harm::MatchesOwner, table, line));
        }
    }
    found
}

/// Whether "0x1/0xff" is for a mark.
fn matches_mark(value: &str, mark: u32) -> bool {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    let (wanted, mask) = value.split_once('/').unwrap_or((value, "0xffffffff"));
    number(wanted).zip(number(mask)).is_some_and(|(wanted, mask)| mark & mask == wanted && wanted != 0)
}

/// Whether a match of nftables, `meta mark 0x1` or `meta mark & 0xff == 0x1`, is for a mark.
fn is_for_mark(found: &Value, mark: u32) -> bool {
    let (left, wanted) = (&found["left"], found["right"].as_u64());
    let is_mark = |operand: &Value| operand["meta"]["key"] == "mark";
    let mask = match left["&"].as_array().map(Vec::as_slice) {
        Some([operand, mask]) if is_mark(operand) => mask.as_u64(),
        _ if is_mark(left) => Some(u32::MAX.into()),
        _ => None,
    };
    mask.zip(wanted).is_some_and(|(mask, wanted)| wanted != 0 && u64::from(mark) & mask == wanted)
}

/// From `ip -j rule` (ip-rule(8)).
fn of_ip_rules(text: &str, family: &str, mark: u32) -> Vec<Rule> {
    let all: Vec<Value> = serde_json::from_str(text).unwrap_or_default();
    all.iter()
        .filter(|rule| {
            let mask = rule["fwmask"].as_str().map_or(String::new(), |mask| format!("/{mask}"));
            rule["fwmark"].as_str().is_some_and(|value| matches_mark(&format!("{value}{mask}"), mark))
        })
        .map(|rule| {
            let of = |key: &str| rule[key].as_str().unwrap_or_default().to_owned();
            let priority = rule["priority"].as_u64().unwrap_or_default();
            let text = format!("ip {family} rule {priority}: fwmark {} lookup {}", of("fwmark"), of("table"));
            Rule { harm: Harm::MatchesMark, text }
        })
        .collect()
}

/// From `nft -j list ruleset` (libnftables-json(5)).
fn of_nft(text: &str, mark: u32) -> Vec<Rule> {
    let all: Value = serde_json::from_str(text).unwrap_or_default();
    let objects = all["nftables"].as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for rule in objects.iter().map(|o| &o["rule"]).filter(|rule| rule.is_object()) {
        let statements = rule["expr"].as_array().cloned().unwrap_or_default();
        let drops = statements.iter().any(|s| s.get("drop").is_some() || s.get("reject").is_some());
        let matches: Vec<&Value> = statements.iter().map(|s| &s["match"]).filter(|m| m.is_object()).collect();
        let meta = |keys: &[&str]| {
            matches.iter().find(|m| {
                m["op"] != "!=" && m["left"]["meta"]["key"].as_str().is_some_and(|key| keys.contains(&key))
            })
        };
        let text = |harm| {
            let of = |key: &str| rule[key].as_str().unwrap_or_default().to_owned();
            let place = format!("{} {} {}", of("family"), of("table"), of("chain"));
            let handle = rule["handle"].as_u64().unwrap_or_default();
            Rule { harm, text: format!("nft rule {place} handle {handle}") }
        };
        if drops && meta(&["iif", "iifname", "oif", "oifname"]).is_some_and(|m| m["right"] == "lo") {
            found.push(text(Harm::DropsLoopback));
        }
        if matches.iter().any(|m| m["op"] != "!=" && is_for_mark(m, mark)) {
            found.push(text(Harm::MatchesMark));
        }
        let of_group = matches.iter().any(|m| m["left"]["socket"]["key"] == "cgroupv2");
        if drops && (of_group || meta(&["skuid", "skgid", "cgroup"]).is_some()) {
            found.push(text(Harm::MatchesOwner));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: u32 = 0x1000;

    fn harms(rules: &[Rule]) -> Vec<Harm> {
        rules.iter().map(|r| r.harm).collect()
    }

    #[test]
    fn rules_of_iptables_that_matter_are_found_and_no_others() {
        let text = "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [1:2]\n\
                    -A INPUT -i lo -j ACCEPT\n-A INPUT -i eth0 -j DROP\n-A OUTPUT ! -o lo -j DROP\nCOMMIT\n";
        assert_eq!(of_iptables(text, MARK), []);
        let text = "*filter\n:INPUT DROP [0:0]\n-A INPUT -i eth0 -j ACCEPT\n-A OUTPUT -o lo -p tcp -j REJECT\n\
                    -A OUTPUT -d 10.0.0.1/32 -m owner --uid-owner 33 -j DROP\n\
                    -A OUTPUT -m mark --mark 0x1000/0xf000 -j ACCEPT\n-A OUTPUT -m mark --mark 0x1 -j ACCEPT\n";
        assert_eq!(
            harms(&of_iptables(text, MARK)),
            [Harm::DropsLoopback, Harm::DropsLoopback, Harm::MatchesOwner, Harm::MatchesMark]
        );
        assert!(of_iptables(text, MARK)[1].text.contains("-t filter -A OUTPUT -o lo"));
    }

    #[test]
    fn rules_of_nftables_that_matter_are_found_and_no_others() {
        let rule = |expr: &str| {
            let rule = format!(
                "{{\"nftables\": [{{\"metainfo\": {{}}}}, {{\"rule\": {{\"family\": \"inet\", \"table\": \"t\", \
                 \"chain\": \"c\", \"handle\": 7, \"expr\": [{expr}]}}}}]}}"
            );
            harms(&of_nft(&rule, MARK))
        };
        let meta = |key: &str, op: &str, right: &str| {
            format!(
                "{{\"match\": {{\"op\": \"{op}\", \"left\": {{\"meta\": {{\"key\": \"{key}\"}}}}, \"right\": {right}}}}}"
            )
        };
        let drop = "{\"drop\": null}";
        assert_eq!(rule(&format!("{}, {drop}", meta("oifname", "==", "\"lo\""))), [Harm::DropsLoopback]);
        assert_eq!(rule(&format!("{}, {drop}", meta("oifname", "!=", "\"lo\""))), []);
        assert_eq!(rule(&format!("{}, {drop}", meta("skuid", "==", "33"))), [Harm::MatchesOwner]);
        assert_eq!(rule(&meta("mark", "==", &MARK.to_string())), [Harm::MatchesMark]);
        let masked = |wanted: u32| {
            let left = "{\"&\": [{\"meta\": {\"key\": \"mark\"}}, 61440]}";
            rule(&format!("{{\"match\": {{\"op\": \"==\", \"left\": {left}, \"right\": {wanted}}}}}"))
        };
        assert_eq!((masked(0x1000), masked(0x2000)), (vec![Harm::MatchesMark], vec![]));
        assert_eq!(rule(drop), []);
        assert_eq!(of_nft("no JSON", MARK), []);
    }

    #[test]
    fn policy_routing_by_our_mark_is_found() {
        let text = r#"[{"priority":0,"src":"all","table":"local"},
            {"priority":90,"src":"all","fwmark":"0x1000","fwmask":"0x1000","table":"100"},
            {"priority":91,"src":"all","fwmark":"0x2000","fwmask":"0x2000","table":"101"}]"#;
        let found = of_ip_rules(text, "-4", MARK);
        assert_eq!(harms(&found), [Harm::MatchesMark]);
        assert!(
            found[0].text.contains("rule 90") && found[0].text.contains("lookup 100"),
            "{}",
            found[0].text
        );
        assert_eq!(of_ip_rules("no JSON", "-6", MARK), []);
    }
}
