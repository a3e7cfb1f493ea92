//! `[[access_log]]`: a line for each flow, where to, and of which flows.

use std::time::Duration;

use super::{
    endpoints::Percent,
    reader::{At, Reader, Section},
    section::section,
    value::FuturePath,
};

/// Where journald listens (systemd.journal-fields(7), the native protocol).
pub const JOURNAL: &str = "/run/systemd/journal/socket";

/// Where lines go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Output {
    /// Standard output.
    #[default]
    Stdout,
    /// A file.
    File,
    /// The journal, by its native protocol.
    Journal,
}

/// What a line looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LineFormat {
    /// A JSON object.
    #[default]
    Json,
    /// `key=value`, with quotes where a value needs them.
    Text,
}

/// Which flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Only {
    /// All of them.
    #[default]
    All,
    /// Those that did not end in order.
    Failures,
}

section! {
    /// `[[access_log]]`: one line for each flow when it ends, or is refused.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct AccessLog {
        /// Where the lines go: "stdout", "file", or "journal" (its native protocol, with a field for each value).
        output: required Output,
        /// The file, which is created with mode 0640 and appended to; reopened on SIGUSR1. With output = "journal", the
        /// socket of the journal; default: /run/systemd/journal/socket.
        path: optional FuturePath,
        /// "json", one object per line, or "text", key=value. The journal has fields instead.
        format: default LineFormat = LineFormat::Json,
        /// Whether a flow has a line when its target is reached, too.
        start: default bool = false,
        /// Interval of further lines of a flow that lasts longer, with its bytes so far.
        interval: optional Duration,
        /// Which flows: "all", or "failures", those that did not end in order (at their ends only).
        only: default Only = Only::All,
        /// Names of routes: flows of other routes have no lines.
        routes: default Vec<String> = Vec::new(),
        /// Percentage of the flows, chosen at random; all lines of a flow are written, or none.
        share: default Percent = Percent::ALL,
    }
    check |r| {
        match output {
            Some(Output::File) => r.demand("path"),
            Some(Output::Stdout) if path.is_some() => {
                r.wrong("path", "has no meaning with output = \"stdout\"");
            }
            _ => {}
        }
        if output == Some(Output::Stdout) && r.for_exec() {
            r.wrong("output", "is \"stdout\", which belongs to the command: log to a file or the journal");
        }
        if output == Some(Output::Journal) && r.has("format") {
            r.wrong("format", "has no meaning with output = \"journal\": it has a field for each value");
        }
        for key in ["start", "interval"].into_iter().filter(|key| r.has(key)) {
            if only == Only::Failures {
                r.wrong(key, "has no meaning with only = \"failures\": a flow fails at its end");
            }
        }
        if interval.is_some_and(|interval| interval < INTERVAL_MIN) {
            r.wrong("interval", "is less than \"1s\"");
        }
        // Told already.
        if output == Some(Output::File) && path.is_none() {
            return None;
        }
    }
}

/// Workers look at their flows that often.
const INTERVAL_MIN: Duration = Duration::from_secs(1);

/// An access log and the place of its routes.
impl Section for At<AccessLog> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let log = AccessLog::read(r)?;
        Some(r.at("routes", log))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::config::{Config, Wanted, tests::mistakes};

    const REST: &str = "[[capture]]\nmode = \"redirect\"\nlisten = [\"127.0.0.1:1\"]\n\
        [[route]]\nname = \"web\"\nto = \"direct\"\n";

    #[test]
    fn a_log_says_where_to_and_of_which_flows() {
        let text = "[[access_log]]\noutput = \"file\"\npath = \"a.log\"\ninterval = \"5m\"\nroutes = [\"web\"]\nshare = 5\n\
                    [[access_log]]\noutput = \"journal\"\nonly = \"failures\"\n";
        let file = Path::new("etc/agent.toml");
        let config = Config::parse(&format!("{text}{REST}"), file, crate::config::CheckFiles::No);
        let [log, journal] = &config.unwrap_or_else(|e| panic!("{e}")).access_logs[..] else { panic!("two") };
        assert_eq!(log.path, Some(FuturePath("etc/a.log".into())), "beside the file that names it");
        assert_eq!((log.interval, log.routes.len(), log.start), (Some(Duration::from_secs(300)), 1, false));
        assert!(log.share.holds(4) && !log.share.holds(5));
        assert_eq!((journal.output, journal.only, &journal.path), (Output::Journal, Only::Failures, &None));
    }

    #[test]
    fn what_makes_no_sense_in_a_log_is_named() {
        for (keys, said) in [
            ("output = \"file\"", "1:1: access_log.path: is missing"),
            (
                "output = \"stdout\"\npath = \"x\"",
                "3:8: access_log.path: has no meaning with output = \"stdout\"",
            ),
            (
                "output = \"stdout\"\nroutes = [\"wep\"]",
                "3:10: access_log.routes: no route is named \"wep\", did you mean \"web\"?",
            ),
            (
                "output = \"stdout\"\nonly = \"failures\"\nstart = true",
                "4:9: access_log.start: has no meaning with only = \"failures\": a flow fails at its end",
            ),
            ("output = \"stdout\"\ninterval = \"10ms\"", "3:12: access_log.interval: is less than \"1s\""),
        ] {
            assert_eq!(mistakes(&format!("[[access_log]]\n{keys}\n{REST}")), [said], "{keys}");
        }
    }

    #[test]
    fn the_standard_output_of_exec_is_the_commands() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.toml");
        fs::write(&file, "[[access_log]]\noutput = \"stdout\"\n[[route]]\nto = \"direct\"\n").unwrap();
        let said = Config::load_for_exec(&file, Wanted::default()).unwrap_err().to_string();
        assert!(said.contains("which belongs to the command"), "{said}");
    }
}
