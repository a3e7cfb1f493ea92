//! The same observable result: what a program can see of its connection does not change when we carry it.
//!
//! Each behaviour of `src/bin/tt-calls/` is shown twice between the same two hosts, over plain TCP and through us, and
//! both ends print what they saw. Whatever differs is in [`DIFFERENCES`], with the reason, or fails the test. Each way to
//! carry a flow is one [`Mode`](tunnel_tests::modes); each is tried with the behaviour in the application and in its target.

use std::{
    fmt::Write as _,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tunnel_tests::{
    Process, TARGET4, each_mode,
    modes::{COPY, Mode, Stage},
    process, programs, target,
};

each_mode! {
    /// An application observes at its socket what it would observe over TCP, whatever calls it makes.
    what_an_application_sees_is_what_it_sees_over_tcp = |mode: &Mode| same(mode, Subject::Application);
    /// A target observes at its socket what it would observe over TCP, whatever calls it makes.
    what_a_target_sees_is_what_it_sees_over_tcp = |mode: &Mode| same(mode, Subject::Target);
    /// The first and the last bytes of a connection arrive, whatever its end is.
    what_comes_first_and_last_arrives = at_once;
    /// A peer that reads late gets every byte.
    who_reads_late_gets_everything = late;
}

/// What ends before anything was said before: its target may not have been dialled yet.
const AT_ONCE: [&str; 5] =
    ["reset-behind-some", "reset-behind-much", "reset-at-once", "answer-and-close-unread", "close-at-once"];

/// The first bytes of a connection that ends behind them arrive, whatever the end is.
fn at_once(mode: &Mode) -> Result<()> {
    let mode = Mode { chat: 0, rest: 0, proof: None, ..*mode };
    for subject in [Subject::Application, Subject::Target] {
        same_of(Stage::new()?, &mode, subject, |name| AT_ONCE.contains(&name))?;
    }
    Ok(())
}

/// What takes its time, on hosts that forget closed connections soon.
const LATE: &str = "late-reader";

/// Who reads late gets everything that was sent before an orderly end, whatever has become of the sender since.
fn late(mode: &Mode) -> Result<()> {
    let of = |subject| same_of(Stage::forgetful()?, mode, subject, |name| name == LATE);
    thread::scope(|scope| {
        let application = scope.spawn(|| of(Subject::Application));
        of(Subject::Target)?;
        application.join().expect("showing it does not panic")
    })
}

/// What is not the same through any proxy that carries bytes, and why.
struct Difference {
    behaviour: &'static str,
    /// Whose observation.
    part: &'static str,
    key: &'static str,
    /// Over TCP.
    plain: &'static str,
    /// Through us, whatever the mode.
    through: &'static str,
    why: &'static str,
}

const fn differs(
    behaviour: &'static str,
    part: &'static str,
    key: &'static str,
    plain: &'static str,
    through: &'static str,
    why: &'static str,
) -> Difference {
    Difference { behaviour, part, key, plain, through, why }
}

/// HTTP/2 and TLS have no urgent data, and nothing else here carries a mark: it is a byte like others.
const NO_URGENCY: &str = "a proxy of bytes has no urgent data";

const DIFFERENCES: &[Difference] = &[
    differs("urgent", "partner", "poll", "PRI", "none", NO_URGENCY),
    differs("urgent", "partner", "out of band", "!", "EINVAL", NO_URGENCY),
    // Nothing is lost: what was urgent stands where it was sent (RFC 6093).
    differs("urgent", "partner", "in band", "abcdef", "abc!def", NO_URGENCY),
    differs("urgent", "partner", "marks", "1", "0", NO_URGENCY),
    differs("urgent-inline", "partner", "poll", "PRI", "none", NO_URGENCY),
    differs("urgent-inline", "partner", "marks", "1", "0", NO_URGENCY),
];

/// Which end shows the behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Application,
    Target,
}

/// Everything that both ends have seen of one behaviour: `PART: KEY=VALUE`.
type Seen = Vec<String>;

fn same(mode: &Mode, subject: Subject) -> Result<()> {
    same_of(Stage::new()?, mode, subject, |name| name != LATE)
}

fn same_of(stage: Stage, mode: &Mode, subject: Subject, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let behaviours = process::output(Command::new(programs::calls()?).arg("list"))?;
    let behaviours: Vec<_> = behaviours.lines().map(str::to_owned).collect();
    for difference in DIFFERENCES {
        ensure!(behaviours.iter().any(|b| b == difference.behaviour), "there is no {}", difference.behaviour);
    }
    let behaviours: Vec<_> = behaviours.into_iter().filter(|name| wanted(name)).collect();
    let all = |captured| -> Result<Vec<Seen>> {
        behaviours.iter().map(|name| show(&stage, name, mode, subject, captured)).collect()
    };
    let gateway = stage.gateway(mode)?;
    let mut daemon = stage.daemon(mode, gateway.as_ref())?;
    // Most of it is waiting.
    let (plain, carried) = thread::scope(|scope| {
        let plain = scope.spawn(|| all(false));
        let carried = all(true);
        (plain.join().expect("showing it over TCP does not panic"), carried)
    });
    let (plain, carried) = (plain?, carried?);
    stage.end(&mut daemon, mode)?;
    let mut wrong = String::new();
    for ((name, plain), carried) in behaviours.iter().zip(&plain).zip(&carried) {
        let expected = expected(name, plain);
        if *carried != expected {
            write!(wrong, "\n{name}:")?;
            for line in difference(&expected, carried) {
                write!(wrong, "\n  {line}")?;
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "with the behaviour in the {subject:?}, through us (+) it is not as over TCP (-):{wrong}"
    );
    Ok(())
}

/// What is to be seen through us: what is seen over TCP, but for what is known to differ.
fn expected(behaviour: &str, plain: &Seen) -> Seen {
    let known = DIFFERENCES.iter().filter(|d| d.behaviour == behaviour);
    let mut expected = plain.clone();
    for Difference { part, key, plain, through, why, .. } in known {
        let line = |value: &str| format!("{part}: {key}={value}");
        let found = expected.iter_mut().find(|seen| **seen == line(plain));
        let found =
            found.unwrap_or_else(|| panic!("over TCP there is no {} in {behaviour} ({why})", line(plain)));
        *found = line(through);
    }
    expected
}

/// The lines of either that are not in the other, in their order.
fn difference(expected: &Seen, carried: &Seen) -> Vec<String> {
    let lost = expected.iter().filter(|line| !carried.contains(line)).map(|line| format!("- {line}"));
    let new = carried.iter().filter(|line| !expected.contains(line)).map(|line| format!("+ {line}"));
    let all: Vec<_> = lost.chain(new).collect();
    if all.is_empty() { vec![format!("another order: {expected:#?} {carried:#?}")] } else { all }
}

/// What connect(2) says is what our listener says, for it is asked before anybody has dialled: connected. Then comes what
/// tells that it was not.
#[test]
fn a_target_that_refuses_is_a_reset_behind_a_connect_that_went_well() -> Result<()> {
    let stage = Stage::new()?;
    // The port was free a moment ago.
    let nobody = stage.world.serve(TARGET4, target::echo())?.addr().to_string();
    assert_eq!(connect(&stage, &nobody, false)?, ["connect=ECONNREFUSED"]);
    let _daemon = stage.daemon(&COPY, None)?;
    assert_eq!(connect(&stage, &nobody, true)?, ["connect=ok", "receive=ECONNRESET"]);
    Ok(())
}

/// What has not ended by then is not ended by its own alarm either: it cannot be.
const STUCK: Duration = Duration::from_secs(60);

/// How a connection goes, and ends, that nobody accepts.
fn connect(stage: &Stage, address: &str, captured: bool) -> Result<Vec<String>> {
    let mut command = stage.program(programs::calls()?, captured)?;
    command.args(["connect", address]);
    Ok(process::output(&mut command)?.lines().map(str::to_owned).collect())
}

/// Has a behaviour shown between the two hosts.
fn show(stage: &Stage, behaviour: &str, mode: &Mode, subject: Subject, captured: bool) -> Result<Seen> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let began = Instant::now();
    let control = stage.world.folder().join(format!("control-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    let (far, near) = match subject {
        Subject::Application => ("partner", "subject"),
        Subject::Target => ("subject", "partner"),
    };
    let words = |part, how, address: &str, command: &mut Command| {
        command.args([part, how, address]).arg(&control);
        command.args([behaviour, &mode.chat.to_string(), &mode.rest.to_string()]);
    };
    let mut command = stage.world.net().command(programs::calls()?);
    words(far, "listen", &format!("{TARGET4}:0"), &mut command);
    let mut target = Process::spawn("target", stage.world.folder(), command)?;
    let line = target.wait_for_line("listening=")?;
    let address = line.trim_start_matches("listening=");
    let mut command = stage.program(programs::calls()?, captured)?;
    words(near, "connect", address, &mut command);
    let mut application = Process::spawn("application", stage.world.folder(), command)?;
    let mut seen = Vec::new();
    for (part, process) in [(near, &mut application), (far, &mut target)] {
        let status = process.wait(STUCK).with_context(|| format!("{behaviour}, {part}"))?;
        let lines = process.stdout();
        let lines = lines.lines().filter(|line| !line.starts_with("listening="));
        seen.extend(lines.map(|line| format!("{part}: {line}")));
        // 142: its alarm has ended it, because a call did not come back.
        seen.push(format!("{part}: status={}", process::code(status)));
    }
    // For who looks at a test that failed.
    let path = if captured { "through us" } else { "over TCP" };
    eprintln!("{behaviour}, {path}, {:?}:\n  {}", began.elapsed(), seen.join("\n  "));
    std::fs::remove_file(control)?;
    Ok(seen)
}
