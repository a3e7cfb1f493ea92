//! `cargo xtask test`: every test, and the machine as it was before.

use std::{env, fs, net::TcpListener, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    dmesg::{self, Notes},
    leftovers::{self, MARK, Snapshot},
    run::{self, Checkout, foreground, green, red},
    setup::{self, Group},
};

/// Says that benchmarks may be without their peers; otherwise a test that misses one fails.
const WITHOUT_PEERS: &str = "TUNNEL_TEST_WITHOUT_PEERS";
/// Has tests do more than every merge has time for.
const THOROUGH: &str = "TUNNEL_TEST_THOROUGH";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the tests that need no network namespaces.
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,

    /// Only the end-to-end tests.
    #[arg(long)]
    e2e: bool,

    /// More flows and longer soaks than every merge has time for.
    #[arg(long)]
    thorough: bool,

    /// Passed to `cargo nextest run`: filters, --no-capture, ...
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    nextest: Vec<String>,
}

impl Args {
    /// Every test, thoroughly.
    pub(crate) fn thorough() -> Self {
        Self { thorough: true, ..Self::all() }
    }

    /// Every test.
    pub(crate) fn all() -> Self {
        Self { unit: false, e2e: false, thorough: false, nextest: Vec::new() }
    }
}

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    run::require_root("loading kernel programs and making network namespaces, which the tests do,")?;
    require_machine()?;
    setup::ensure(checkout, &[Group::Build, Group::Test])?;
    let peers = setup::try_peers(checkout)?;
    run::catch_interrupts()?;
    let before = Snapshot::take(checkout);
    let notes = checkout.target.join(format!("xtask/notes-{}", std::process::id()));
    fs::create_dir_all(&notes).with_context(|| format!("making {}", notes.display()))?;

    let tested = tests(checkout, args, peers, &notes);
    let noted = Notes::read(&notes);
    fs::remove_dir_all(&notes)?;
    report(&noted?);
    // After failed tests above all: they are the ones that leave something.
    let clean = before.compare(checkout);
    if let (Err(_), Err(left)) = (&tested, &clean) {
        run::show_error(left);
    }
    tested?;
    clean?;
    println!("{} nothing was left behind", green("ok "));
    if !peers {
        println!("{} without the peers of the benchmarks: what needs them was NOT tested", red("but"));
    }
    if !leftovers::limits_tcp_memory() {
        println!("{} without cgroup v1's memory controller: memory pressure was NOT tested", red("but"));
    }
    Ok(())
}

/// What tests take of this machine and cannot set for themselves, because it is everybody's.
fn require_machine() -> Result<()> {
    TcpListener::bind("[::1]:0").context(
        "this machine's loopback has no IPv6 address (::1), which unit tests listen on: \
         sysctl net.ipv6.conf.lo.disable_ipv6=0",
    )?;
    let setting = |name: &str| fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
    ensure!(
        setting("panic_on_warn").trim() != "1",
        "kernel.panic_on_warn is 1: a warning of the kernel, which tests may provoke, would stop this machine"
    );
    ensure!(
        setting("printk_devkmsg").trim() != "off",
        "kernel.printk_devkmsg is off, and a test writes to the kernel's log: sysctl kernel.printk_devkmsg=ratelimit"
    );
    Ok(())
}

/// Says what tests have noted of the kernel's log.
fn report(Notes { blind }: &Notes) {
    if !blind.is_empty() {
        println!(
            "{} this kernel has warned since it booted and cannot be made to warn again (clear_warn_once in debugfs), so \
             a warning would NOT have been noticed in these {} tests; boot, or use cargo xtask matrix:",
            red("but"),
            blind.len()
        );
        blind.iter().for_each(|test| println!("      {test}"));
    }
}

fn tests(checkout: &Checkout, args: &Args, peers: bool, notes: &Path) -> Result<()> {
    build_programs(checkout)?;

    // Before the rest, so that what nextest sums up stands at the end.
    let documented = if args.e2e || !args.nextest.is_empty() { Ok(()) } else { documentation(checkout) };

    let mut nextest = checkout.cargo(["nextest", "run", "--locked"]);
    match (args.unit, args.e2e) {
        (true, _) => nextest.args(WORKSPACE).args(["--exclude", "tunnel-tests"]),
        (_, true) => nextest.args(["--package", "tunnel-tests"]),
        _ => nextest.args(WORKSPACE),
    };
    nextest
        .args(&args.nextest)
        .env("PATH", path_with_tools(checkout)?)
        .env("TUNNEL_BIN", checkout.target.join("debug/tunnel"))
        .env(MARK, std::process::id().to_string())
        .env(dmesg::NOTES, notes);
    if args.thorough {
        nextest.env(THOROUGH, "1");
    }
    if !peers {
        nextest.env(WITHOUT_PEERS, "1");
    }
    foreground("nextest", from_source(&mut nextest)).and(documented)
}

/// One selection of packages for everything, so that features are unified, and dependencies built, once.
pub(crate) const WORKSPACE: [&str; 3] = ["--workspace", "--exclude", "tunnel-ebpf"];

/// Builds the programs that tests start.
pub(crate) fn build_programs(checkout: &Checkout) -> Result<()> {
    let mut build = checkout.cargo(["build", "--locked", "--bins"]);
    foreground("building the programs", from_source(build.args(WORKSPACE)))
}

fn documentation(checkout: &Checkout) -> Result<()> {
    let mut doc = checkout.cargo(["test", "--locked", "--doc", "--quiet"]);
    doc.args(["--package", "tunnel-common", "--package", "tunnel-user"]);
    foreground("documentation tests", from_source(&mut doc))
}

/// Tests are of the sources, never of the committed object.
pub(crate) fn from_source(command: &mut Command) -> &mut Command {
    command.env("TUNNEL_BPF", "source")
}

/// `PATH` with the project's own tools first.
pub(crate) fn path_with_tools(checkout: &Checkout) -> Result<std::ffi::OsString> {
    let path = env::var_os("PATH").context("PATH is not set")?;
    Ok(env::join_paths([setup::tools_bin(checkout)].into_iter().chain(env::split_paths(&path)))?)
}
