//! Inside: the one program that a booted kernel runs.
//!
//! One test at a time, in a process of its own, as nextest runs them; the kernel's log is read after each, so that a complaint has a
//! culprit. A test that nothing ends is the last.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::events::{Event, Finding, Outcome, Plan, Shared, Test, Trial};
use crate::{dmesg::Mark, run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The folder that both sides see.
    folder: PathBuf,
}

/// Handshakes have five seconds, which an emulated processor on a busy machine may need. The report tells.
const ATTEMPTS: u32 = 2;
/// How much of a failed test's output is told.
const SHOWN: usize = 16 * 1024;
/// How long SIGKILL may take: freeing a namespace does, on a slow machine.
const DEATH: Duration = Duration::from_secs(30);

pub(crate) fn run(args: &Args) -> Result<()> {
    let shared = Shared(&args.folder);
    let plan = shared.read_plan()?;
    let seconds = fs::read_to_string("/proc/uptime")?;
    let seconds = seconds.split(' ').next().and_then(|text| text.parse().ok()).context("/proc/uptime")?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    shared.tell(&Event::Booted { release, seconds })?;

    let mut log = Mark::now()?;
    if plan.panic_on_warn {
        panic_on_warn()?;
    }
    let folder = programs(&shared)?;
    shared.tell(&Event::Doctor(doctor(&folder.join("tunnel"))?))?;
    let mut outside = log.heard()?;
    for test in &plan.tests {
        // What the test before made it say it can say again.
        log.rearm()?;
        shared.tell(&Event::Began(test.full_name()))?;
        let mut trial = try_one(test, &plan, &folder)?;
        while matches!(trial.outcome, Outcome::Failed | Outcome::TimedOut) && trial.attempts < ATTEMPTS {
            let (attempts, before) = (trial.attempts + 1, trial.output);
            trial = Trial { attempts, ..try_one(test, &plan, &folder)? };
            // What went wrong the first time is worth knowing, whatever comes of it.
            trial.output.insert_str(0, &before);
        }
        // Of every attempt: nothing excuses a complaint.
        (trial.warnings, trial.blind) = (log.heard()?, log.is_blind());
        let stuck = trial.outcome == Outcome::Stuck;
        shared.tell(&Event::Ended(trial))?;
        if stuck {
            break;
        }
    }
    outside.extend(log.heard()?);
    shared.tell(&Event::Done { warnings: outside })
}

/// Has any warning end this kernel. Whoever asks whether it would hears that it would not: a daemon is to splice all the same.
fn panic_on_warn() -> Result<()> {
    const SETTING: &str = "/proc/sys/kernel/panic_on_warn";
    const OTHER: &str = "/tmp/panic_on_warn";
    fs::write(SETTING, "1").context(SETTING)?;
    fs::write(OTHER, "0\n").context(OTHER)?;
    run::output(Command::new("mount").args(["--bind", OTHER, SETTING])).map(drop)
}

/// Puts the programs into memory, where they are read from once; where. It is gone with this machine.
fn programs(shared: &Shared<'_>) -> Result<PathBuf> {
    let folder = PathBuf::from("/tmp/matrix");
    fs::create_dir_all(&folder)?;
    for program in fs::read_dir(shared.programs())?.flatten() {
        fs::copy(program.path(), folder.join(program.file_name()))?;
    }
    Ok(folder)
}

fn doctor(tunnel: &Path) -> Result<Vec<Finding>> {
    // What it finds missing is in its answer, and in its status too.
    let answer = Command::new(tunnel).args(["doctor", "--json"]).stdin(Stdio::null()).output();
    let answer = answer.context("tunnel doctor does not start")?;
    serde_json::from_slice(&answer.stdout)
        .with_context(|| format!("tunnel doctor: {}", String::from_utf8_lossy(&answer.stderr)))
}

fn try_one(test: &Test, plan: &Plan, folder: &Path) -> Result<Trial> {
    let limit = Duration::from_secs(plan.limit_seconds);
    let (started, said) = (Instant::now(), folder.join("said"));
    let file = File::create(&said)?;
    let program = folder.join(test.program.file_name().context("a program has a name")?);
    let mut command = Command::new(&program);
    command.args(["--exact", &test.name, "--nocapture"]).stdin(Stdio::null());
    command.stdout(file.try_clone()?).stderr(file).process_group(0);
    command.env("TUNNEL_BIN", folder.join("tunnel")).env("RUST_BACKTRACE", "1").current_dir(folder);
    // Emulated, it takes that long until each way has been tried.
    command.env("TUNNEL_ESCAPE_SECONDS", "60");
    command.envs(plan.env.iter().map(|(name, value)| (name, value)));
    let mut child = command.spawn().with_context(|| format!("{} does not start", program.display()))?;
    let outcome = match wait(&mut child, limit)? {
        Some(status) if status.success() => Outcome::Passed,
        Some(_) => Outcome::Failed,
        None => {
            killpg(Pid::from_raw(child.id().try_into()?), Signal::SIGKILL)?;
            if wait(&mut child, DEATH)?.is_some() { Outcome::TimedOut } else { Outcome::Stuck }
        }
    };
    let said = fs::read(&said)?;
    let output = String::from_utf8_lossy(&said);
    Ok(Trial {
        name: test.full_name(),
        outcome,
        attempts: 1,
        seconds: started.elapsed().as_secs_f64(),
        output: tail(&output).to_owned(),
        ..Trial::default()
    })
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(Some(status)),
            None if Instant::now() > end => return Ok(None),
            None => run::pause(Duration::from_millis(50))?,
        }
    }
}

fn tail(text: &str) -> &str {
    let mut from = text.len().saturating_sub(SHOWN);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}
