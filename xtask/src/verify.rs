//! `cargo xtask verify`: what has to hold before an issue is closed, and takes too long for every merge.
//!
//! The suite under each congestion control that hosts commonly have, the default tests on other kernels, long soaks, a long
//! try to escape, a thousand rotations of certificates. The first part that fails ends it.
//!
//! # Invariants
//! - The host's own congestion control is put back, whatever ends this process, SIGKILL included.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    dmesg::Mark,
    guide, matrix, package,
    run::{self, Checkout, bold, catch_interrupts, foreground, green, red, took},
    setup::{self, Group},
    test,
};

/// What hosts have as their default: most distributions CUBIC, and whoever asked for pacing BBR.
const CONTROLS: [&str; 2] = ["bbr", "cubic"];
/// Where the host's choice stands.
const CHOICE: &str = "/proc/sys/net/ipv4";
const CURRENT: &str = "tcp_congestion_control";
const ALLOWED: &str = "tcp_allowed_congestion_control";
const AVAILABLE: &str = "tcp_available_congestion_control";

/// How long a captured program tries to escape.
const ESCAPE: [&str; 2] = ["TUNNEL_ESCAPE_SECONDS", "600"];

/// How often certificates are replaced under load.
const ROTATIONS: [&str; 2] = ["TUNNEL_ROTATIONS", "1000"];
/// How long each flood lasts.
const PRESSURE: [&str; 2] = ["TUNNEL_PRESSURE_SECONDS", "10"];
/// How many spliced sockets have their account of memory looked at. Before bytes went by mailboxes 1 in 100 to
/// 1,000 was wrong.
const ACCOUNTS: [&str; 2] = ["TUNNEL_SPLICE_ACCOUNTS", "10000"];

/// The arms that are kept busy: tunnels, and what a kernel program moves.
const SOAKS: [&[&str]; 2] = [&["--hold", "ours"], &["--scenario", "relay", "--hold", "splice"]];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this part; may be given several times. Default: all of them, in this order.
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<Part>,

    /// How long each of the two soaks takes.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    soak: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Every test, with BBR as the host's default congestion control, and again with CUBIC.
    Suite,
    /// The default tests of `cargo xtask matrix`, on Debian's 6.1 and 6.12.
    Matrix,
    /// All bytes compared for ten minutes, through tunnels and through a kernel program.
    Soak,
    /// A captured program that tries to escape for ten minutes, while every frame is read.
    Escape,
    /// A thousand rotations of certificates under load.
    Rotations,
    /// Every known flood for ten seconds, and an honest peer beside it.
    Pressure,
    /// The kernel's account of memory of ten thousand spliced sockets, just before they are closed.
    Splice,
    /// Containers of podman and runc.
    Containers,
    /// The admin interface beside 18,000 flows, and its page in a browser beside 10,000.
    Flows,
    /// Every command of the guide, as it stands on its page.
    Guide,
    /// The Debian package: built, installed in a tree of Debian, replaced, removed, purged.
    Package,
}

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask verify                              two suites, two kernels, two soaks, an escape, floods, rotations, containers, flows
  cargo xtask verify --only guide                 what the guide says, done
  cargo xtask verify --only suite                 every test under BBR and under CUBIC
  cargo xtask verify --only soak --soak 3600      two soaks of an hour each

The host's default congestion control is changed while the suite runs, and put back, also on Ctrl-C.
Run it as the first thing after a boot: most warnings of the kernel are given once a boot. Where they
cannot be had again, the end says which tests could not have noticed any.";

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    run::require_root("changing the host's congestion control, and the tests,")?;
    let started = Instant::now();
    catch_interrupts()?;
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    let heading = |text: &str| eprintln!("\n{} {}", bold(&format!("## {text}")), took(started));
    if wanted(Part::Suite) {
        for name in CONTROLS {
            heading(&format!("the suite, with {name} as the host's congestion control"));
            let _back = Choice::set(Path::new(CHOICE), name)?;
            test::run(checkout, &test::Args::thorough())
                .with_context(|| format!("the suite under {name}"))?;
        }
    }
    if wanted(Part::Matrix) {
        heading("other kernels");
        matrix::run(checkout, &matrix::Args::default())?;
    }
    if wanted(Part::Soak) {
        for arm in SOAKS {
            heading(&format!("{} s of soak: {}", args.soak, arm.join(" ")));
            soak(arm, args.soak)?;
        }
    }
    if wanted(Part::Escape) {
        heading(&format!("{} s of trying to escape", ESCAPE[1]));
        escape()?;
    }
    if wanted(Part::Rotations) {
        heading(&format!("{} rotations under load", ROTATIONS[1]));
        longer("test(many_rotations_under_load)", ROTATIONS)?;
    }
    if wanted(Part::Pressure) {
        heading(&format!("floods of {} s each", PRESSURE[1]));
        longer("binary(=pressure)", PRESSURE)?;
    }
    if wanted(Part::Splice) {
        heading(&format!("the accounts of memory of {} spliced sockets", ACCOUNTS[1]));
        longer("binary(=splice) and test(wrong_account_of_memory)", ACCOUNTS)?;
    }
    if wanted(Part::Containers) {
        heading("containers");
        setup::ensure(checkout, &[Group::Containers])?;
        ignored("binary(=containers)")?;
    }
    if wanted(Part::Flows) {
        heading("thousands of flows");
        setup::ensure(checkout, &[Group::Page])?;
        ignored("binary(=many_flows)")?;
    }
    if wanted(Part::Guide) {
        heading("the guide's commands");
        guide::verify(checkout)?;
    }
    if wanted(Part::Package) {
        heading("the Debian package");
        package::run(checkout, &package::Args::install_test())?;
    }
    println!("\n{} all of it held, {}", green("ok "), took(started));
    Ok(())
}

/// Runs tests that the suite leaves out.
fn ignored(tests: &str) -> Result<()> {
    let mut test = Command::new(std::env::current_exe()?);
    // One after the other: they measure, or fill the machine.
    test.args([
        "test",
        "--e2e",
        "--",
        "--profile",
        "verify",
        "--run-ignored",
        "only",
        "--test-threads",
        "1",
        "--no-capture",
        "-E",
        tests,
    ]);
    foreground("the test", &mut test)
}

/// Runs the test whose program tries to escape for longer than in the suite.
fn escape() -> Result<()> {
    longer("binary(=escape)", ESCAPE)
}

/// Runs tests for longer than in the suite.
fn longer(tests: &str, [name, value]: [&str; 2]) -> Result<()> {
    let mut test = Command::new(std::env::current_exe()?);
    test.args(["test", "--e2e", "--", "--profile", "verify", "-E", tests]);
    foreground("the test", test.env(name, value))
}

/// Keeps an arm busy with the soak of the load generator, which compares every byte; the kernel has nothing to complain of.
fn soak(arm: &[&str], seconds: u64) -> Result<()> {
    let mut kernel = Mark::now()?;
    let mut bench = Command::new(std::env::current_exe()?);
    bench.arg("bench").args(arm).args(["--workload", "soak:16", "--seconds", &seconds.to_string()]);
    foreground("the soak", &mut bench)?;
    let heard = kernel.heard()?;
    if kernel.is_blind() {
        println!("{} this kernel has warned before: one more would NOT have been noticed", red("but"));
    }
    ensure!(heard.is_empty(), "the kernel complained:\n{}", heard.join("\n"));
    Ok(())
}

/// The host's default congestion control, changed for as long as this is there.
struct Choice {
    janitor: Child,
    /// Its end is the janitor's signal, which the kernel gives when this process is gone.
    alive: Option<ChildStdin>,
}

/// Puts back what was there. What has been the default is allowed from then on (tcp_set_default_congestion_control,
/// net/ipv4/tcp_cong.c), so what is allowed is put back as well, and after it.
const PUT_BACK: &str = r#"cat >/dev/null; echo "$2" >"$1/tcp_congestion_control"; echo "$3" >"$1/tcp_allowed_congestion_control""#;

impl Choice {
    fn set(folder: &Path, name: &str) -> Result<Self> {
        let read = |file: &str| {
            let path = folder.join(file);
            fs::read_to_string(&path)
                .map(|text| text.trim().to_owned())
                .with_context(|| path.display().to_string())
        };
        let (current, allowed) = (read(CURRENT)?, read(ALLOWED)?);
        let mut janitor = Command::new("/bin/sh");
        janitor.args(["-c", PUT_BACK, "janitor"]).arg(folder).args([&current, &allowed]);
        // A group of its own: Ctrl-C is for this process.
        janitor.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0).current_dir("/");
        let mut janitor =
            janitor.spawn().context("starting a shell that puts the congestion control back")?;
        let alive = janitor.stdin.take();
        let choice = Self { janitor, alive };
        let path: PathBuf = folder.join(CURRENT);
        fs::write(&path, name).with_context(|| {
            format!(
                "{}: {name}: this kernel has {}; modprobe tcp_{name} loads it where it is a module",
                path.display(),
                read(AVAILABLE).unwrap_or_default()
            )
        })?;
        Ok(choice)
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        drop(self.alive.take());
        match self.janitor.wait() {
            Ok(status) if status.success() => {}
            failed => {
                eprintln!("{} the host's congestion control was not put back: {failed:?}", red("error:"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the host has as its default, and lets others choose, it has again afterwards.
    #[test]
    fn the_hosts_congestion_control_is_put_back() -> Result<()> {
        // Not the host's own: other tests run beside this one.
        let folder = std::env::temp_dir().join(format!("xtask-verify-{}", std::process::id()));
        fs::create_dir(&folder)?;
        for (file, text) in [(CURRENT, "bbr\n"), (ALLOWED, "reno bbr\n"), (AVAILABLE, "reno bbr cubic\n")] {
            fs::write(folder.join(file), text)?;
        }
        let choice = Choice::set(&folder, "cubic")?;
        assert_eq!(fs::read_to_string(folder.join(CURRENT))?, "cubic");
        fs::write(folder.join(ALLOWED), "reno bbr cubic\n")?;
        drop(choice);
        let after = [CURRENT, ALLOWED].map(|file| fs::read_to_string(folder.join(file)).unwrap_or_default());
        fs::remove_dir_all(&folder)?;
        assert_eq!(after, ["bbr\n", "reno bbr\n"]);
        Ok(())
    }
}
