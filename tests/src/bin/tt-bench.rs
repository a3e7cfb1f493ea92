//! The benchmarks: `cargo xtask bench` builds what they need and starts this.

use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use nix::unistd::geteuid;
use tunnel_tests::{
    bench::{
        flags::Flags,
        hold::hold,
        model::Report,
        peers::Peers,
        plan::{Extent, Plan},
        report::{self, Progress},
        runner::{self, Options},
    },
    programs,
};

/// Measures tunnel against direct TCP, iptables redirection, Envoy and redsocks: started by `cargo xtask bench`.
#[derive(Parser)]
#[command(name = "tt-bench")]
struct Cli {
    #[command(flatten)]
    flags: Flags,

    /// The project's tools, where Envoy is looked for.
    #[arg(long, value_name = "FOLDER", default_value = ".tools")]
    tools: PathBuf,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    if let Some(path) = &cli.flags.publish {
        let document =
            Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("docs").join("testing/results.md");
        report::publish(&report::load(path)?, &document, "../benchmarks")?;
        println!("{}", document.display());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(path) = &cli.flags.redraw {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
        report::save(&report::load(path)?, folder)?;
        println!("{}", folder.join("report.html").display());
        return Ok(ExitCode::SUCCESS);
    }
    let colour = std::io::stdout().is_terminal() && !no_colour();
    let old = cli.flags.compare.as_deref().map(report::load).transpose()?;
    let new = match &cli.flags.with {
        Some(path) => Some(report::load(path)?),
        None => measure(cli, colour)?,
    };
    let Some(new) = new else { return Ok(ExitCode::SUCCESS) };
    if let Some(old) = &old {
        println!("{}", report::compare(old, &new).text(colour));
    }
    if new.faults.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("error: the benchmark failed:");
    for fault in &new.faults {
        eprintln!("  {fault}");
    }
    Ok(ExitCode::FAILURE)
}

/// No report of an arm that was only kept up.
fn measure(cli: &Cli, colour: bool) -> Result<Option<Report>> {
    ensure!(
        geteuid().is_root(),
        "benchmarks make network namespaces and load kernel programs: run them as root"
    );
    // Found before anything is started, and not an hour later.
    let (tunnel, load) = (programs::tunnel()?, programs::load()?);
    for program in [&tunnel, &load] {
        if program.components().any(|part| part.as_os_str() == "debug") {
            bail!("{} is a debug build: cargo xtask bench builds what is worth measuring", program.display());
        }
    }
    let mut peers = Peers::find(&cli.tools);
    if let Some(other) = &cli.flags.beside {
        let other = other.canonicalize().with_context(|| other.display().to_string())?;
        ensure!(other.is_file(), "{} is no program", other.display());
        peers = peers.beside(other);
    }
    let options = Options { workers: cli.flags.workers, seed: cli.flags.seed, command: command(), peers };
    if let (Some(arm), Some(workload)) = (&cli.flags.hold, &cli.flags.workload) {
        let length = Duration::from_secs(cli.flags.seconds);
        let workload = workload.parse()?;
        hold(&cli.flags.scenario, arm, workload, length, &options, std::io::stdout())?;
        return Ok(None);
    }
    let extent = if cli.flags.quick { Extent::Quick } else { Extent::Full };
    let mut plan = Plan::new(extent, &cli.flags.scenario, cli.flags.rounds);
    if cli.flags.beside.is_some() {
        plan = plan.beside();
    }
    let progress = Progress::new(plan.steps());
    let report = runner::run(&plan, &options, &progress)?;
    println!("{}", report::table(&report, width(), colour));
    if cli.flags.beside.is_some() {
        println!("{}", report::beside(&report).text(colour));
    }
    report::save(&report, &cli.flags.out)
        .with_context(|| format!("writing to {}", cli.flags.out.display()))?;
    let page = cli.flags.out.join("report.html");
    println!("{}", Path::display(&page));
    Ok(Some(report))
}

/// What was typed, as far as it matters to somebody else.
fn command() -> String {
    let words = std::env::args().skip(1).collect::<Vec<_>>();
    let mut shown = vec!["cargo xtask bench".to_owned()];
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        if word == "--tools" || word == "--out" {
            words.next();
        } else {
            shown.push(word);
        }
    }
    shown.join(" ")
}

#[expect(clippy::disallowed_methods, reason = "NO_COLOR is a program's interface (no-color.org)")]
fn no_colour() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Columns of the terminal; enough for every table where there is none.
fn width() -> u16 {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    size.map(|size| size.ws_col).ok().filter(|columns| *columns > 0).unwrap_or(120)
}
