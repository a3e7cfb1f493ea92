//! `cargo xtask fuzz`: looks for inputs that break what is promised of every input.
//!
//! A committed corpus grows only by inputs that reach code that no other one reaches. `cargo xtask test` tries the committed
//! corpora without a fuzzer.

use std::{fs, path::PathBuf, process::Command, time::Instant};

use anyhow::{Context as _, Result, ensure};

use crate::{
    run::{self, Checkout, bold, dim, foreground, green, took},
    setup::{self, Group},
    test,
};

/// Every target, by the name of its corpus.
const TARGETS: [&str; 9] = [
    "admin_request",
    "connect_request",
    "h1_head",
    "http3",
    "sniff",
    "proxy_header",
    "config",
    "records",
    "certificate_names",
];
/// The longest input: longer ones reach nothing that shorter ones do not, and a corpus of them is large. A head of
/// HTTP/1 may be four times as long; its bound has a test of its own.
const LENGTH_MAX: u32 = 4096;
/// An input that takes longer is a bug: parsers take microseconds.
const HANG: u32 = 10;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which; default: every one.
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
    /// How long each is fuzzed.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask fuzz                         every target, a minute each
  cargo xtask fuzz --seconds 600 h1_head   one target, ten minutes";

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    setup::ensure(checkout, &[Group::Fuzz])?;
    run::catch_interrupts()?;
    let all = TARGETS.map(str::to_owned);
    let targets = if args.targets.is_empty() { &all[..] } else { &args.targets };
    for target in targets {
        let started = Instant::now();
        println!("{}", bold(&format!("{target}: {} s", args.seconds)));
        let fuzzer = Fuzzer::new(checkout, target)?;
        let looked = fuzzer.look(args.seconds);
        // Also when something was found: what was reached on the way there is worth keeping.
        let kept = fuzzer.keep();
        looked.with_context(|| format!("the input that broke it is in {}", fuzzer.artifacts().display()))?;
        println!("{} {target}: {} inputs {}", green("ok "), kept?, dim(&took(started)));
    }
    Ok(())
}

struct Fuzzer<'a> {
    checkout: &'a Checkout,
    target: &'a str,
    /// Where the fuzzer writes every input that seems new to it.
    work: PathBuf,
}

impl<'a> Fuzzer<'a> {
    fn new(checkout: &'a Checkout, target: &'a str) -> Result<Self> {
        let work = checkout.target.join("fuzz/corpus").join(target);
        fs::create_dir_all(&work)?;
        let fuzzer = Self { checkout, target, work };
        fs::create_dir_all(fuzzer.artifacts())?;
        Ok(fuzzer)
    }

    /// The committed corpus.
    fn corpus(&self) -> PathBuf {
        self.checkout.root.join("fuzz/corpus").join(self.target)
    }

    fn artifacts(&self) -> PathBuf {
        self.checkout.target.join("fuzz/artifacts").join(self.target)
    }

    fn look(&self, seconds: u32) -> Result<()> {
        let mut command = self.command(&[&self.work, &self.corpus()])?;
        command.arg(format!("-max_total_time={seconds}"));
        foreground(&format!("fuzzing {}", self.target), &mut command)
    }

    /// Adds to the committed corpus what reaches code that it does not, however often; its size.
    fn keep(&self) -> Result<usize> {
        let mut command = self.command(&[&self.corpus(), &self.work])?;
        foreground("keeping what is new", command.args(["-merge=1", "-use_counters=0"]))?;
        let inputs = fs::read_dir(self.corpus())?.count();
        ensure!(inputs > 0, "the corpus is empty");
        Ok(inputs)
    }

    fn command(&self, corpora: &[&PathBuf]) -> Result<Command> {
        let mut command = self.checkout.cargo(["fuzz", "run", "--fuzz-dir", "fuzz", "--release"]);
        command
            .arg("--target-dir")
            .arg(self.checkout.target.join("fuzz"))
            .arg(self.target)
            .args(corpora)
            .arg("--")
            .arg(format!("-artifact_prefix={}/", self.artifacts().display()))
            .args([format!("-max_len={LENGTH_MAX}"), format!("-timeout={HANG}"), "-verbosity=0".to_owned()])
            .env("PATH", test::path_with_tools(self.checkout)?)
            // The sanitizers are unstable in this toolchain, and they are all that is.
            .env("RUSTC_BOOTSTRAP", "1");
        Ok(command)
    }
}
