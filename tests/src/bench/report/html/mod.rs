//! A report as a page.
//!
//! One file that needs no other and no network.
//!
//! # Invariants
//! - Whatever is from the report goes through [`escape`].
//! - There is no script.

use std::fmt::{self, Write as _};

use crate::bench::model::Report;

use super::{
    plots::{Plot, plots},
    words::{machine, plain, taken},
};

mod scenario;

const STYLE: &str = include_str!("style.css");

/// How to read the numbers; its own words, so there is nothing to escape.
const READING: &str = include_str!("reading.html");

/// The page of a report.
pub fn html(report: &Report) -> String {
    page(report, &plots(report))
}

/// The same with plots that are already there.
pub(super) fn page(report: &Report, plots: &[Plot]) -> String {
    let mut out = String::new();
    // A String takes everything that is written to it.
    let _ = write(&mut out, report, plots);
    out
}

fn write(out: &mut String, report: &Report, plots: &[Plot]) -> fmt::Result {
    let title = format!("Benchmark of {}", plain(&report.taken));
    write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{0}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{0}</h1>\n<p class=\"soft\">{1}</p>\n",
        escape(&title),
        escape(&machine(report))
    )?;
    faults(out, report)?;
    contents(out, report)?;
    conditions(out, report)?;
    out.push_str(READING);
    for one in &report.scenarios {
        let plots: Vec<&Plot> = plots.iter().filter(|plot| plot.scenario == one.name).collect();
        scenario::write(out, one, &plots)?;
    }
    out.push_str("</body>\n</html>\n");
    Ok(())
}

fn faults(out: &mut String, report: &Report) -> fmt::Result {
    if report.faults.is_empty() {
        return Ok(());
    }
    out.push_str("<section class=\"faults\" role=\"alert\">\n<h2>This benchmark failed</h2>\n");
    out.push_str("<p>What follows is for finding out why, not for quoting.</p>\n<ul>\n");
    for fault in &report.faults {
        writeln!(out, "<li>{}</li>", escape(fault))?;
    }
    out.push_str("</ul>\n</section>\n");
    Ok(())
}

fn contents(out: &mut String, report: &Report) -> fmt::Result {
    out.push_str("<nav aria-label=\"Contents\">\n<ul>\n<li><a href=\"#conditions\">Conditions</a></li>\n");
    out.push_str("<li><a href=\"#reading\">How to read this</a></li>\n");
    for scenario in &report.scenarios {
        writeln!(
            out,
            "<li><a href=\"#{}\">{}</a> <span class=\"soft\">{}</span></li>",
            anchor(&scenario.name),
            escape(&scenario.title),
            escape(&scenario.name)
        )?;
    }
    out.push_str("</ul>\n</nav>\n");
    Ok(())
}

fn conditions(out: &mut String, report: &Report) -> fmt::Result {
    out.push_str("<section class=\"first\" id=\"conditions\">\n<h2>Conditions</h2>\n<dl>\n");
    let mut item =
        |what: &str, text: &str| writeln!(out, "<dt>{}</dt><dd>{}</dd>", escape(what), escape(text));
    item("Taken", &taken(report))?;
    item("Machine", &machine(report))?;
    for (program, version) in &report.versions {
        item(program, version)?;
    }
    writeln!(out, "<dt>Command</dt><dd><code>{}</code></dd>", escape(&report.settings.command))?;
    out.push_str("</dl>\n</section>\n");
    Ok(())
}

/// Text as HTML and XML have it, in elements and in attributes. Control characters, which XML has no way to
/// write, become what stands for them.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            // What reverses the direction of writing makes a command look like another one.
            c if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {
                out.push('\u{fffd}');
            }
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A name as an id, which has no spaces.
fn anchor(name: &str) -> String {
    let safe: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    format!("scenario-{safe}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        model::State,
        report::{fixture, plots::well_formed},
    };

    /// The page is written so that an XML parser takes it too.
    fn check(page: &str) {
        let body = page.strip_prefix("<!DOCTYPE html>\n").unwrap();
        let (head, rest) = body.split_once("<style>").unwrap();
        let (_, tail) = rest.split_once("</style>").unwrap();
        assert_eq!(well_formed(&format!("{head}{tail}")), Ok(()));
    }

    #[test]
    fn a_page_is_whole_and_asks_nobody_for_anything() {
        let report = fixture::report();
        let text = html(&report);
        check(&text);
        let outside = text.replace("http://www.w3.org/2000/svg", "");
        for bad in ["://", "<script", "<link", "<img", "@import", "url("] {
            assert!(!outside.contains(bad), "{bad}");
        }
        for wanted in [
            "This benchmark failed",
            "1,048,576 bytes were sent",
            "AMD EPYC 7763",
            "1.33.0",
            "cargo xtask bench --out &lt;folder&gt; --rounds 11",
            "TLS_AES_128_GCM_SHA256",
            "redsocks is not in PATH: apt-get install redsocks",
            "href=\"#scenario-chain\"",
            "id=\"scenario-chain\"",
            "How to read this",
            "prefers-color-scheme: dark",
        ] {
            assert!(text.contains(wanted), "{wanted}");
        }
        assert_eq!(text.matches("<svg").count(), plots(&report).len());
        assert_eq!(text, html(&report));
    }

    #[test]
    fn what_programs_wrote_is_text_and_nothing_else() {
        const EVIL: &str =
            "</code></title></style><script>alert(1)</script><img src=x onerror='a'>\" x=\"&\u{1b}[31m";
        let mut report = fixture::report();
        let evil = || EVIL.to_owned();
        report.taken = evil();
        report.settings.command = evil();
        report.settings.extent = evil();
        report.machine.cpu = evil();
        report.versions.insert(evil(), evil());
        report.faults.push(evil());
        let scenario = &mut report.scenarios[3];
        scenario.title = evil();
        scenario.about = evil();
        scenario.arms[1].title = evil();
        scenario.arms[1].processes[0].command = evil();
        scenario.arms[1].tls.as_mut().unwrap().cipher = evil();
        scenario.arms[2].state = State::Failed(evil());
        scenario.arms[4].state = State::Missing(evil());
        scenario.workloads[0].title = evil();
        scenario.name = evil();
        for (arm, name) in [(1, "ours"), (3, "envoy")] {
            scenario.arms[arm].name = format!("{name}{EVIL}");
            for cell in scenario.cells.iter_mut().filter(|cell| cell.arm == name) {
                cell.arm = format!("{name}{EVIL}");
            }
        }
        let text = html(&report);
        check(&text);
        for bad in ["<script", "<img", "</title></style>", "\u{1b}", "\" x=\""] {
            assert!(!text.contains(bad), "{bad}");
        }
        assert!(text.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    }
}
