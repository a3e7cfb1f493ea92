//! `cargo xtask matrix`: the same tests on other kernels.
//!
//! Kernels run under QEMU, without KVM, on this machine's files, which they cannot change. It is not part of `cargo xtask ci`: a
//! processor in software is ten times slower, and a kernel is downloaded.

mod events;
pub(crate) mod guest;
mod kernels;
mod machine;
mod report;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    events::{Event, Outcome, Plan, Shared, Test, Trial},
    kernels::Kernel,
    machine::Machine,
    report::Verdict,
};
use crate::{
    dmesg,
    leftovers::Snapshot,
    run::{self, Checkout, Interrupted, blue, dim, green, red, took},
    setup::{self, Group},
    test,
};

/// The kernels that capture and the fast path are to be good on: Debian 12's, and that of Debian 13 and its backports.
const KERNELS: [&str; 2] = ["6.1", "6.12"];
/// What is run when nothing is named: what touches the kernel, in as many ways as one run has time for.
const TESTS: &[&str] = &[
    "original_dst::so_original_dst",
    "connect::getpeername_shows",
    "connect::a_socket_that_connects_twice",
    "group::a_unit_is_followed",
    "group::links_of",
    "own_network::a_captured_program_sees",
    "own_network::as_many_connections",
    "own_network::as_many_short_connections",
    "own_network::getsockname_follows",
    "ours::whoever_takes",
    "ours::cap_net_raw_alone",
    "ours::carries_each_connection_once",
    "namespaces::the_first_connection",
    "namespaces::of_a_new_namespace",
    "namespaces::a_socket_of",
    "escape::whatever",
    "pipe::a_reset",
    "same_result::spliced::what_an_application",
    "same_result::past_tcp::what_an_application",
    "killed::spliced",
    "killed::past_tcp::a_daemon",
    "soak::spliced::heavy",
    "soak::past_tcp::heavy",
];
/// Tests that are about amounts would measure the emulation.
const TOO_MUCH: &str = "heavy";
/// A heartbeat where nothing else is said.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// A kernel that runs no program by then does not boot. Without KVM it takes half a minute, and ten times that on a busy machine.
const BOOT: Duration = Duration::from_secs(600);

/// Minutes that a kernel may take with the default tests.
const TIMEOUT: u64 = 30;
/// Seconds: what nextest gives a test (.config/nextest.toml).
const TEST_TIMEOUT: u64 = 240;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which tests: a file of tests/tests, or FILE::TEXT for those with TEXT in their names.
    ///
    /// A file's tests named heavy_* are left out unless TEXT names them.
    #[arg(value_name = "TEST")]
    tests: Vec<String>,

    /// A line of kernels that apt knows, or the file of a package (.deb); may be repeated. Default: 6.1 and 6.12.
    #[arg(long, value_name = "LINE")]
    kernel: Vec<String>,

    /// How long one kernel may take.
    #[arg(long, value_name = "MINUTES", default_value_t = TIMEOUT, value_parser = clap::value_parser!(u64).range(1..=600))]
    timeout: u64,

    /// How long one test may take.
    #[arg(long, value_name = "SECONDS", default_value_t = TEST_TIMEOUT, value_parser = clap::value_parser!(u64).range(1..=36_000))]
    test_timeout: u64,

    /// How many processors a kernel has: mistakes that take two at once cannot show with one.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,

    /// Sets kernel.panic_on_warn once a kernel has booted: its first warning ends it. Daemons splice there all the same.
    #[arg(long)]
    panic_on_warn: bool,

    /// A variable of the tests, such as TUNNEL_SPLICE_ACCOUNTS=1000; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,

    /// Another build of `tunnel` that is tested in place of this checkout's: to see a test fail with it.
    #[arg(long, value_name = "FILE")]
    tunnel: Option<PathBuf>,

    /// Only says which tests would be run.
    #[arg(long)]
    list: bool,

    /// Tells programs: JSON on standard output.
    #[arg(long)]
    json: bool,
}

impl Default for Args {
    /// As if nothing was typed.
    fn default() -> Self {
        Self {
            tests: Vec::new(),
            kernel: Vec::new(),
            timeout: TIMEOUT,
            test_timeout: TEST_TIMEOUT,
            cpus: 1,
            panic_on_warn: false,
            env: Vec::new(),
            tunnel: None,
            list: false,
            json: false,
        }
    }
}

/// `NAME=VALUE`
fn variable(text: &str) -> Result<(String, String)> {
    let (name, value) = text.split_once('=').context("is not NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask matrix                              the default tests on Debian's 6.1 and 6.12
  cargo xtask matrix --kernel 6.1 pipe            one kernel, one file of tests
  cargo xtask matrix pipe::a_reset streams        tests by a part of their name
  cargo xtask matrix --kernel linux-image-6.6.13_amd64.deb --timeout 30 pipe::heavy_64_mib
  cargo xtask matrix --panic-on-warn --cpus 2 splice killed::spliced
  cargo xtask matrix --json >matrix.json
Ends with 1 when a test failed, a kernel complained, or one did not come up.";

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "these kernels are for x86-64, and so are the tests' programs to be"
    );
    setup::ensure(checkout, &[Group::Build, Group::Matrix])?;
    run::catch_interrupts()?;
    let before = Snapshot::take(checkout);
    let tests = build(checkout, &args.tests)?;
    if args.list {
        tests.iter().for_each(|test| println!("{}", test.full_name()));
        return Ok(());
    }
    let plan = Plan {
        tests,
        limit_seconds: args.test_timeout,
        env: args.env.clone(),
        panic_on_warn: args.panic_on_warn,
    };

    let verdicts = verdicts(checkout, args, &plan);
    let clean = before.compare(checkout);
    if let (Err(_), Err(left)) = (&verdicts, &clean) {
        run::show_error(left);
    }
    let verdicts = verdicts?;
    if args.json {
        println!("{}", report::json(&verdicts)?);
    } else {
        print!("\n{}", report::text(&verdicts));
    }
    clean?;
    let bad: Vec<_> = verdicts.iter().filter(|v| !v.good()).map(|v| v.release.as_str()).collect();
    ensure!(bad.is_empty(), "not as it should be: {}", bad.join(", "));
    Ok(())
}

fn verdicts(checkout: &Checkout, args: &Args, plan: &Plan) -> Result<Vec<Verdict>> {
    let cache = checkout.target.join("matrix");
    let all = KERNELS.map(str::to_owned);
    let lines = if args.kernel.is_empty() { &all[..] } else { &args.kernel };
    // All of them first: what is not to be had is known before anything runs for minutes.
    let kernels = lines.iter().map(|line| Kernel::fetch(line, &cache)).collect::<Result<Vec<_>>>()?;
    kernels.iter().map(|kernel| try_kernel(checkout, args, plan, kernel, &cache)).collect()
}

/// Builds the programs and the tests that are named, and finds the tests in them.
fn build(checkout: &Checkout, named: &[String]) -> Result<Vec<Test>> {
    let named: Vec<&str> =
        if named.is_empty() { TESTS.to_vec() } else { named.iter().map(String::as_str).collect() };
    let wanted: Vec<(&str, &str)> =
        named.iter().map(|word| word.split_once("::").unwrap_or((word, ""))).collect();
    // As `cargo xtask test` builds them, so that nothing is built twice.
    test::build_programs(checkout)?;
    let programs = programs(checkout, &wanted)?;
    let mut found: Vec<Test> = Vec::new();
    for (file, text) in wanted {
        let program = &programs[file];
        let known = found.len();
        for name in names(program)?.into_iter().filter(|name| picked(name, text)) {
            if !found.iter().any(|test| test.file == file && test.name == name) {
                found.push(Test { program: program.clone(), file: file.to_owned(), name });
            }
        }
        ensure!(known < found.len() || !text.is_empty(), "{file} has no test that is not heavy: name one");
        ensure!(
            found.iter().any(|t| t.file == file && picked(&t.name, text)),
            "{file} has no test with {text} in its name"
        );
    }
    Ok(found)
}

fn picked(name: &str, text: &str) -> bool {
    name.contains(text) && (text.contains(TOO_MUCH) || !name.contains(TOO_MUCH))
}

/// The programs of these files, by the files' names.
fn programs(checkout: &Checkout, wanted: &[(&str, &str)]) -> Result<BTreeMap<String, PathBuf>> {
    let mut build =
        checkout.cargo(["test", "--locked", "--no-run", "--message-format=json-render-diagnostics"]);
    test::from_source(build.args(test::WORKSPACE));
    for (file, _) in wanted {
        build.args(["--test", file]);
    }
    // Another one may run at the same time.
    let messages = checkout.target.join(format!("xtask/matrix-build-{}.json", std::process::id()));
    fs::create_dir_all(checkout.target.join("xtask"))?;
    let built = File::create(&messages)
        .map_err(anyhow::Error::from)
        .and_then(|file| run::foreground("building the tests", build.stdout(file)));
    let told = fs::read_to_string(&messages);
    fs::remove_file(&messages)?;
    built?;
    let mut found = BTreeMap::new();
    for line in told?.lines() {
        let message: serde_json::Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        if let (Some("test"), Some(name), Some(program)) = (
            message.pointer("/target/kind/0").and_then(serde_json::Value::as_str),
            message.pointer("/target/name").and_then(serde_json::Value::as_str),
            message.get("executable").and_then(serde_json::Value::as_str),
        ) {
            found.insert(name.to_owned(), PathBuf::from(program));
        }
    }
    match wanted.iter().find(|(file, _)| !found.contains_key(*file)) {
        Some((file, _)) => bail!("cargo built no program for the tests of {file}"),
        None => Ok(found),
    }
}

/// The names of a program's tests.
fn names(program: &Path) -> Result<Vec<String>> {
    let list = run::output(Command::new(program).args(["--list", "--format", "terse"]))?;
    Ok(list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// Boots a kernel, and hears what happens. An error is one of ours; what goes wrong inside is in the verdict.
fn try_kernel(
    checkout: &Checkout,
    args: &Args,
    plan: &Plan,
    kernel: &Kernel,
    cache: &Path,
) -> Result<Verdict> {
    let started = Instant::now();
    eprintln!("{} {} ({}), {} tests", blue("==>"), kernel.release, kernel.version, plan.tests.len());
    let folder = cache.join(format!("run-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    Shared(&folder).write_plan(plan)?;
    bring_programs(checkout, plan, args.tunnel.as_deref(), &Shared(&folder).programs())?;
    let mut machine = Machine::boot(checkout, kernel, args.cpus, &folder)?;
    let mut verdict = Verdict {
        kernel: kernel.line.clone(),
        release: kernel.release.clone(),
        version: kernel.version.clone(),
        booted_seconds: None,
        seconds: 0.0,
        doctor: Vec::new(),
        planned: plan.tests.len(),
        tests: Vec::new(),
        warnings: Vec::new(),
        faults: Vec::new(),
    };
    let heard = hear(&mut machine, &mut verdict, started, Duration::from_secs(60 * args.timeout));
    verdict.seconds = started.elapsed().as_secs_f64();
    let console = cache.join(format!("console-{}.log", kernel.release));
    fs::write(&console, machine.console())?;
    drop(machine);
    match heard {
        Err(error) if error.is::<Interrupted>() => return Err(error),
        Err(error) => verdict.faults.push(format!("{error:#}; its console is in {}", console.display())),
        Ok(()) => {}
    }
    let (mark, passed) =
        if verdict.good() { (green("ok "), "all passed") } else { (red("bad"), "not all passed") };
    eprintln!("{mark} {}, {passed} {}", kernel.release, dim(&took(started)));
    Ok(verdict)
}

/// Puts what tests start where the machine finds it: without the tables for debuggers, which are most of it, because
/// every page of a program comes through 9p.
fn bring_programs(checkout: &Checkout, plan: &Plan, tunnel: Option<&Path>, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    // What tests start: the program itself, and what is called tt-*.
    let built = fs::read_dir(checkout.target.join("debug"))?.flatten().map(|entry| entry.path());
    let is_started = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name == "tunnel" || name.starts_with("tt-") && !name.contains('.')
    };
    let started: Vec<PathBuf> = built.filter(is_started).collect();
    let tests: BTreeSet<&Path> = plan.tests.iter().map(|test| test.program.as_path()).collect();
    let bring = |program: &Path, name: &Path| {
        let mut strip = Command::new("strip");
        run::output(strip.arg("--strip-debug").arg("-o").arg(folder.join(name)).arg(program)).map(drop)
    };
    for program in started.iter().map(PathBuf::as_path).chain(tests) {
        bring(program, program.file_name().context("a program has a name")?.as_ref())?;
    }
    if let Some(tunnel) = tunnel {
        bring(tunnel, "tunnel".as_ref())?;
    }
    // This program, even when another has taken its place since it was started.
    bring(format!("/proc/{}/exe", std::process::id()).as_ref(), machine::INSIDE.as_ref())
}

/// Takes note of what happens until everything is done.
fn hear(machine: &mut Machine, verdict: &mut Verdict, started: Instant, limit: Duration) -> Result<()> {
    let (mut running, mut said) = (None::<(String, Instant)>, Instant::now());
    let heard = loop {
        let booted = verdict.booted_seconds.is_some();
        let idle = || {
            ensure!(started.elapsed() < limit, "it was not done after {limit:?}");
            ensure!(booted || started.elapsed() < BOOT, "it ran no program within {BOOT:?}");
            if said.elapsed() > HEARTBEAT {
                said = Instant::now();
                let what = running
                    .as_ref()
                    .map_or(if booted { "tunnel doctor" } else { "booting" }, |(name, _)| name);
                eprintln!("    {} {what}", took(started));
            }
            Ok(())
        };
        let event = match machine.next(idle) {
            Ok(event) => event,
            Err(error) => break Err(error),
        };
        said = Instant::now();
        match event {
            Some(Event::Booted { release, seconds }) => {
                (verdict.release, verdict.booted_seconds) = (release, Some(seconds));
                eprintln!("    booted {}", dim(&took(started)));
            }
            Some(Event::Doctor(findings)) => verdict.doctor = findings,
            Some(Event::Began(name)) => running = Some((name, Instant::now())),
            Some(Event::Ended(trial)) => {
                running = None;
                let bad = trial.outcome != Outcome::Passed || !trial.warnings.is_empty();
                let mark = if bad { red("bad") } else { green("ok ") };
                let again =
                    if trial.attempts > 1 { format!(", attempt {}", trial.attempts) } else { String::new() };
                eprintln!("{mark} {} {}", trial.name, dim(&format!("{:.1} s{again}", trial.seconds)));
                verdict.tests.push(trial);
            }
            Some(Event::Done { warnings }) => {
                verdict.warnings = warnings;
                break Ok(());
            }
            None => break Err(anyhow::anyhow!("it ended before everything was done")),
        }
    };
    if heard.is_err() {
        // What nobody inside could tell any more.
        let console: Vec<String> = machine.console().lines().map(str::to_owned).collect();
        verdict.warnings.extend(dmesg::complaints(&console));
        if let Some((name, since)) = running {
            let (outcome, seconds) = (Outcome::CutOff, since.elapsed().as_secs_f64());
            verdict.tests.push(Trial { name, outcome, attempts: 1, seconds, ..Trial::default() });
        }
    }
    heard
}
