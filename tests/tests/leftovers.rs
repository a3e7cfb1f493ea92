//! After every test, also a failed one, nothing is left: shown on tests that fail on purpose.
//!
//! Each runs itself once more in a process of its own, where it fails or is killed, and then looks for
//! everything that was made there.

use std::{env, fs, path::Path, process::Command};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tunnel_tests::{
    Gateway, NODE4, PATIENCE, Process, TARGET4, World,
    bpffs::BpfFs,
    cgroup::{self, Cgroup},
    daemon::Daemon,
    exec::Running,
    leftovers, servers, target, wait_for,
};

/// Everything that any test makes, running; then `end`, with what keeps it alive.
fn with_everything(end: impl FnOnce(&World, &mut Gateway<'_>, &mut Running) -> Result<()>) -> Result<()> {
    let world = World::new()?;
    let (group, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let mut gateway = world.gateway().start()?;
    let _server = servers::redis(&world)?;
    let target = world.serve(TARGET4, target::echo())?;
    let config = format!(
        "[daemon]\n{}\n[[capture]]\ncgroup = \"{}\"\nproxy = \"127.0.0.1:1\"\n",
        bpffs.toml(),
        group.path().display()
    );
    let _daemon = Daemon::start(&world, world.node(), &config)?;
    ensure!(!bpffs.pins().is_empty(), "this shows less than it could: nothing is pinned");
    // With a grandchild that does not want to go.
    let script = "(trap '' TERM INT HUP; sleep 1000) & exec \"$0\" hold \"$1\"";
    let app = tunnel_tests::programs::app()?.display().to_string();
    let mut app = world.exec(&gateway).spawn(&["sh", "-c", script, &app, &target.addr().to_string()])?;
    app.says("held")?;
    app.tell("ping")?;
    app.says("ping=ok")?;
    println!("world={}", world.folder().display());
    println!("everything=1");
    end(&world, &mut gateway, &mut app)
}

/// Set in the environment of a test that is to fail.
const ON_PURPOSE: &str = "TT_FAIL_ON_PURPOSE";

/// Whether this process is the one that is to fail.
fn on_purpose() -> bool {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    env::var_os(ON_PURPOSE).is_some()
}

/// Starts a test of this file in a process of its own, where it is to fail; returns when it has made everything.
fn fail(folder: &Path, name: &str) -> Result<Process> {
    let mut command = Command::new(env::current_exe()?);
    command.args(["--exact", name, "--nocapture", "--test-threads", "1"]).env(ON_PURPOSE, "1");
    let mut process = Process::spawn(name, folder, command)?;
    process.wait_for_line("everything=1")?;
    Ok(process)
}

/// What a test's process has made and is still there, by the process's id, which is in every name.
fn left_by(pid: u32, folder: Option<&str>) -> Vec<String> {
    let mut found = Vec::new();
    let own = format!("tt-{pid}-");
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        found.extend(entry.file_name().into_string().ok().filter(|name| name.starts_with(&own)));
    }
    for entry in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        found.extend(
            entry.file_name().into_string().ok().filter(|name| name.starts_with(&format!("tt{pid}"))),
        );
    }
    found.extend(
        leftovers::cgroups(&[format!("tunnel-test-{pid}-0")]).iter().map(|path| path.display().to_string()),
    );
    if let Some(folder) = folder {
        found.extend(leftovers::started_with(folder).iter().map(ToString::to_string));
        let mounts = cgroup::mounted("bpf").into_iter().filter(|point| point.starts_with(folder));
        found.extend(mounts.map(|point| point.display().to_string()));
    }
    found
}

/// Where its files are.
fn folder_of(process: &mut Process) -> Result<String> {
    let line = process.wait_for_line("world=")?;
    Ok(line.split_once("world=").map(|(_, folder)| folder.to_owned()).unwrap_or_default())
}

/// Its folder, and the groups of its `tunnel exec`.
fn made_by(process: &mut Process) -> Result<(String, Vec<String>)> {
    let folder = folder_of(process)?;
    let made = left_by(process.id(), Some(&folder));
    for what in ["node", "net", "tunnel-test", "tunnel gateway", "tunnel run", "tunnel exec", "bpffs"] {
        ensure!(
            made.iter().any(|one| one.contains(what)),
            "this shows less than it could: no {what} in {made:?}"
        );
    }
    let execs =
        leftovers::started_with(&folder).into_iter().filter(|found| found.command.contains("tunnel exec"));
    let groups: Vec<_> = execs.map(|found| format!("tunnel-exec-{}", found.pid)).collect();
    ensure!(leftovers::cgroups(&groups).len() == 1, "one group of tunnel exec");
    Ok((folder, groups))
}

fn assert_nothing_left(pid: u32, folder: &str, groups: &[String]) -> Result<()> {
    leftovers::gone("something", || {
        let mut left = left_by(pid, Some(folder));
        left.extend(leftovers::cgroups(groups).iter().map(|path| path.display().to_string()));
        left
    })
}

fn failed_and_clean(name: &str) -> Result<()> {
    let here = tempfile::tempdir()?;
    let mut process = fail(here.path(), name)?;
    let folder = folder_of(&mut process)?;
    ensure!(!process.wait(3 * PATIENCE)?.success(), "it should have failed\n{process}");
    assert_nothing_left(process.id(), &folder, &[])?;
    ensure!(!Path::new(&folder).exists(), "{folder} is left");
    let said = process.stderr() + &process.stdout();
    ensure!(said.contains("on purpose") && !said.contains("left behind"), "{process}");
    Ok(())
}

/// A test that panics leaves no namespace, cgroup or process.
#[test]
fn a_test_that_panics_leaves_nothing() -> Result<()> {
    if on_purpose() {
        return with_everything(|_, _, _| panic!("on purpose"));
    }
    failed_and_clean("a_test_that_panics_leaves_nothing")
}

/// A test that returns an error leaves no namespace, cgroup or process.
#[test]
fn a_test_that_returns_an_error_leaves_nothing() -> Result<()> {
    if on_purpose() {
        return with_everything(|_, _, _| anyhow::bail!("on purpose"));
    }
    failed_and_clean("a_test_that_returns_an_error_leaves_nothing")
}

/// A test that is killed leaves nothing but files.
#[test]
fn a_test_that_is_killed_leaves_nothing_but_files() -> Result<()> {
    if on_purpose() {
        return with_everything(|_, _, _| wait_for("nothing", 30 * PATIENCE, || None));
    }
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let here = tempfile::tempdir()?;
        let mut process = fail(here.path(), "a_test_that_is_killed_leaves_nothing_but_files")?;
        let (folder, groups) = made_by(&mut process)?;
        process.signal(signal)?;
        let _status = process.wait(PATIENCE)?;
        assert_nothing_left(process.id(), &folder, &groups)?;
        fs::remove_dir_all(&folder)?;
    }
    Ok(())
}

/// A test that leaves a process behind fails, and the process is ended.
#[test]
fn a_test_that_leaves_a_process_fails_and_takes_it_along() -> Result<()> {
    if on_purpose() {
        let world = World::new()?;
        let mut orphan = world.node().command("sh");
        // Its parent ends at once, and nobody waits for it.
        let status = orphan.args(["-c", "setsid sleep 1000 >/dev/null 2>&1 &"]).status()?;
        ensure!(status.success(), "{status}");
        println!("everything=1");
        return Ok(());
    }
    let here = tempfile::tempdir()?;
    let mut process = fail(here.path(), "a_test_that_leaves_a_process_fails_and_takes_it_along")?;
    ensure!(!process.wait(3 * PATIENCE)?.success(), "it should have failed\n{process}");
    let said = process.stderr() + &process.stdout();
    ensure!(said.contains("processes left behind") && said.contains("sleep 1000"), "{process}");
    leftovers::gone("something", || left_by(process.id(), None))
}

/// The hosts of a test world have the addresses and routes that its documentation names.
#[test]
fn a_world_is_what_it_says() -> Result<()> {
    let world = World::new()?;
    let made = left_by(std::process::id(), None);
    assert_eq!(made.len(), 2, "two namespaces: {made:?}");
    assert!(world.node().ip("address show")?.contains(&NODE4.to_string()));
    drop(world);
    assert_eq!(left_by(std::process::id(), None), [""; 0]);
    Ok(())
}
