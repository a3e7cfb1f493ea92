//! Captures that are attached to a running daemon, and end.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tunnel_tests::{
    PATIENCE, TARGET4, World,
    admin::{Admin, config, tunnel},
    cgroup::Cgroup,
    node::Node,
    process::Process,
    programs, target, wait_for,
};

/// A group that an operator attaches is captured over a reload and a take-over, is shown, and is no longer captured when it is
/// detached.
#[test]
fn an_attached_capture_lasts_over_a_reload_and_a_take_over_until_it_is_detached() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    // What the file captures is another group.
    let elsewhere = Cgroup::new()?;
    let of = |keys: &str| {
        let mine = node.cgroup.path().display().to_string();
        let text = config(&node, &gateway, "").replace(&mine, &elsewhere.path().display().to_string());
        text.replace("[daemon]\n", &format!("[daemon]\n{keys}"))
    };
    let mut daemon = node.daemon(&of(""))?;
    let carried = || gateway.log().matches("tunnel accepted").count() > 0;
    let group = node.cgroup.path().display().to_string();
    let (code, text) = tunnel(&daemon, &["attach", "--cgroup", &group, "--name", "extra"])?;
    assert_eq!((code, text), (0, format!("attached {group}\n")));
    let sees = |captured: bool| -> Result<()> {
        // The target sees the gateway, or nothing comes there: the node has no route to it.
        let error = node.connect_error(&target)?;
        ensure!((error == "ok") == captured, "{error}");
        Ok(())
    };
    sees(true)?;
    wait_for("a flow through the gateway", PATIENCE, || carried().then_some(()))?;
    daemon.tell(&of("drain_timeout = \"7s\"\n"))?;
    sees(true)?;
    let (_, text) = tunnel(&daemon, &["status"])?;
    assert!(text.contains("extra"), "{text}");
    let (code, text) = tunnel(&daemon, &["attach", "--cgroup", &group])?;
    assert!(code == 1 && text.contains("already"), "{text}");

    let admin = Admin::of(&daemon);
    let first = admin.json("/status")?["pid"].clone();
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--takeover", "--log", "info", "--config"]).arg(daemon.config());
    let _next = Process::spawn("next", world.folder(), command)?;
    admin.until("another daemon", |status| status["pid"] != first)?;
    assert!(daemon.process().wait(PATIENCE)?.success());
    sees(true)?;
    let dump = admin.json("/config_dump")?;
    assert_eq!(dump["layers"][1]["source"], "attached", "{dump:#}");

    let (code, text) = tunnel(&daemon, &["detach", "--cgroup", &group])?;
    assert_eq!((code, text), (0, format!("detached {group}\n")));
    sees(false)?;
    let (code, text) = tunnel(&daemon, &["detach", "--cgroup", &group])?;
    assert!(code == 1 && text.contains("was attached"), "{text}");
    Ok(())
}

/// A capture that is attached to a process until it exits ends with it.
#[test]
fn a_capture_attached_until_exit_ends_with_its_process() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let elsewhere = Cgroup::new()?;
    let mine = node.cgroup.path().display().to_string();
    let text = config(&node, &gateway, "").replace(&mine, &elsewhere.path().display().to_string());
    let daemon = node.daemon(&text)?;
    let admin = Admin::of(&daemon);
    let mut command = world.node().command(programs::system("sleep")?);
    command.arg("600");
    node.cgroup.adopt(&mut command)?;
    let mut app = Process::spawn("sleep", world.folder(), command)?;
    let (code, text) = tunnel(&daemon, &["attach", "--pid", &app.id().to_string(), "--until-exit"])?;
    assert_eq!((code, text), (0, format!("attached {mine}\n")));
    let captures = |n: usize| {
        move |status: &serde_json::Value| status["captures"].as_array().is_some_and(|c| c.len() == n)
    };
    admin.until("the capture", captures(2))?;
    app.kill()?;
    admin.until("its end", captures(1))?;
    Ok(())
}

/// A capture that was attached and is closed on failure refuses connections while its daemon is killed, is there again with the next
/// one, and ends with one that stops in order.
///
/// Failure: daemon-killed.
#[test]
fn an_attached_capture_outlives_a_kill_and_ends_with_an_orderly_stop() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let elsewhere = Cgroup::new()?;
    let group = node.cgroup.path().display().to_string();
    let text = config(&node, &gateway, "").replace(&group, &elsewhere.path().display().to_string());
    let uncaptured = node.connect_error(&target)?;
    let mut daemon = node.daemon(&text)?;
    let (code, text) = tunnel(&daemon, &["attach", "--cgroup", &group, "--on-failure", "closed"])?;
    assert_eq!(code, 0, "{text}");
    assert_eq!(node.connect_error(&target)?, "ok");
    daemon.process().kill()?;
    assert_eq!(node.connect_error(&target)?, "ECONNREFUSED");

    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--log", "info", "--config"]).arg(daemon.config());
    let mut next = Process::spawn("next", world.folder(), command)?;
    next.wait_for_line("admin interface")?;
    assert_eq!(node.connect_error(&target)?, "ok");
    assert_eq!(next.stop()?.code(), Some(0));
    assert!(next.stderr().contains("it was attached to this daemon"), "{next}");
    assert_eq!(node.connect_error(&target)?, uncaptured);
    Ok(())
}
