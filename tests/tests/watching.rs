//! A daemon that watches its files: it rests where nothing happens to them, and does everything else meanwhile.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use tunnel_tests::{NET4, PATIENCE, Process, TARGET4, World, daemon::Daemon, node::Node, programs, wait_for};

/// What a daemon logs, at whatever level, into a directory that it watches does not make it log more, and it ends when it
/// is told to.
#[test]
fn a_daemon_that_traces_into_the_folder_of_its_key_comes_to_rest_and_ends_on_sigterm() -> Result<()> {
    const RESTS: Duration = Duration::from_secs(2);
    let world = World::new()?;
    let identity = world.pki().named("gateway");
    let folder = identity.key.parent().context("a folder of keys")?.to_owned();
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{NET4}:15008\"\n[[route]]\nto = \"direct\"\n",
        identity.toml()
    );
    // Beside the key as well: it is watched too.
    let config_file = folder.join("gateway.toml");
    fs::write(&config_file, config)?;
    let mut command = world.net().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--log", "trace", "--config"]).arg(&config_file);
    let mut daemon = Process::spawn("daemon", &folder, command)?;
    daemon.wait_for_line("listening")?;
    fs::write(&identity.key, fs::read(&identity.key)?)?;
    let (mut said, mut since) = (0, Instant::now());
    wait_for("the log to rest", PATIENCE, || {
        let now = daemon.stderr().len();
        if now != said {
            (said, since) = (now, Instant::now());
        }
        (since.elapsed() > RESTS).then_some(())
    })?;
    daemon.signal(Signal::SIGTERM)?;
    let status = daemon.wait(PATIENCE)?;
    assert!(status.success(), "{status}");
    Ok(())
}

/// What is due once a minute is done once a minute, also where there is another configuration twice a second.
#[test]
fn flows_that_nobody_accepted_are_swept_although_the_configuration_changes_all_the_time() -> Result<()> {
    /// `SWEEP` of `app/mod.rs`, and what a busy machine may need.
    const DUE: Duration = Duration::from_secs(60 + 20);
    const AGAIN: Duration = Duration::from_millis(500);
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let _target = world.serve(TARGET4, tunnel_tests::target::echo())?;
    let node = Node::new(&world)?;
    let config = node.config(&gateway, "watch = true", "");
    let mut daemon = Daemon::start(&world, world.node(), &config)?;
    let (mut changes, mut last) = (0, Instant::now());
    wait_for("a sweep", DUE, || {
        if last.elapsed() > AGAIN {
            last = Instant::now();
            changes += 1;
            fs::write(daemon.config(), format!("# {changes}\n{config}")).ok()?;
        }
        daemon.log().contains("swept flows that nobody accepted").then_some(())
    })?;
    assert!(changes > 60 && daemon.answers().len() > 60, "{changes} changes: {}", daemon.log());
    daemon.process().stop()?;
    Ok(())
}
