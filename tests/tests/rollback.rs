//! A start, a reload or a take-over that fails half-way leaves everything as it was before.
//!
//! The second of two captures cannot be attached, because a folder stands where one of its links is to be pinned.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use tunnel_tests::{
    Gateway, PATIENCE, Process, TARGET4, World, cgroup::Cgroup, daemon::Daemon, dialogue::ask, node::Node,
    process, programs, target,
};

/// A node with a second group, whose capture fails.
struct Half<'w> {
    world: &'w World,
    node: Node<'w>,
    second: Cgroup,
    /// Where the second one's links are pinned.
    links: Vec<PathBuf>,
    obstacle: PathBuf,
}

impl<'w> Half<'w> {
    /// Captures both groups once, to see where the second one's links are, and puts a folder in the place of one.
    fn new(world: &'w World, gateway: &Gateway<'_>) -> Result<Self> {
        let (node, second) = (Node::new(world)?, Cgroup::new()?);
        let mut half = Self { world, node, second, links: Vec::new(), obstacle: PathBuf::new() };
        let both = half.both(gateway);
        let mut daemon = half.node.daemon(&both)?;
        daemon.process().wait_for_line(&format!("cgroup=\"{}\"", half.second.path().display()))?;
        let name =
            half.second.path().file_name().context("a name")?.to_string_lossy().replace(['-', '.'], "_");
        let pins = half.node.bpffs.pins();
        let is_link = |p: &&PathBuf| {
            let folder = p.parent().map(|f| f.display().to_string()).unwrap_or_default();
            folder.contains(&name) && p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("link_"))
        };
        half.links = pins.iter().filter(is_link).cloned().collect();
        let last = half.links.iter().rfind(|link| link.ends_with("link_capture_connect6"));
        half.obstacle = last.with_context(|| format!("no link of {name} in {pins:?}"))?.clone();
        daemon.process().stop()?;
        let mut detach = world.node().command(programs::tunnel()?);
        process::output(detach.args(["detach", "--config"]).arg(daemon.config()))?;
        assert_eq!(half.node.bpffs.pins(), [] as [PathBuf; 0]);
        fs::create_dir_all(&half.obstacle)?;
        Ok(half)
    }

    fn one(&self, gateway: &Gateway<'_>) -> String {
        self.node.config(gateway, "watch = false\n", "")
    }

    fn both(&self, gateway: &Gateway<'_>) -> String {
        format!("{}\n[[capture]]\ncgroup = \"{}\"\n", self.one(gateway), self.second.path().display())
    }

    /// Nothing of the second capture is pinned.
    fn assert_only_the_first_is_pinned(&self) {
        let folder = self.obstacle.parent().map(|f| f.display().to_string()).unwrap_or_default();
        let pins = self.node.bpffs.pins();
        assert!(!pins.iter().any(|p| p.display().to_string().starts_with(&folder)), "{pins:?}");
    }

    /// What connect(2) says to an application in the second group.
    fn second_says(&self, words: &[&str]) -> Result<Process> {
        let mut command = self.world.node().command(programs::app()?);
        command.args(words);
        self.second.adopt(&mut command)?;
        Process::spawn_with_input("app", self.world.folder(), command)
    }
}

/// Of two captures the second cannot be attached: the first is not attached either, and nothing is pinned.
///
/// Failure: fails-half-way.
#[test]
fn a_start_that_fails_after_its_first_capture_leaves_nothing_attached() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let half = Half::new(&world, &gateway)?;
    let mut daemon = Daemon::spawn(&world, world.node(), &half.both(&gateway))?;
    assert!(!daemon.process().wait(PATIENCE)?.success());
    assert!(daemon.log().contains("link_"), "{}", daemon.log());
    assert_eq!(half.node.bpffs.pins(), [] as [PathBuf; 0]);
    // A capture without a daemon would refuse; without one there is no route.
    assert_ne!(half.node.connect_error(&target)?, "ECONNREFUSED");
    Ok(())
}

/// A configuration whose new capture cannot be attached changes nothing, and is in force once it can.
///
/// Failure: fails-half-way.
#[test]
fn a_reload_that_fails_leaves_nothing_of_its_new_capture() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let half = Half::new(&world, &gateway)?;
    let mut daemon = half.node.daemon(&half.one(&gateway))?;
    let mut old = half.node.hold(&target)?;
    fs::write(daemon.config(), half.both(&gateway))?;
    daemon.hang_up()?;
    assert!(daemon.log().contains("keeping the previous configuration"), "{}", daemon.log());
    half.assert_only_the_first_is_pinned();
    let mut app = half.second_says(&["connect-error", &target.addr().to_string()])?;
    assert!(!app.wait_for_line("connect=")?.contains("ECONNREFUSED"));
    app.wait(PATIENCE)?;
    assert_eq!(ask(&mut old, "ping")?, "ok");
    half.node.hold(&target)?;

    fs::remove_dir(&half.obstacle)?;
    daemon.hang_up()?;
    let mut app = half.second_says(&["hold", &target.addr().to_string()])?;
    app.wait_for_line("held=1")?;
    assert_eq!(ask(&mut app, "ping")?, "ok", "what failed before is in force");
    Ok(())
}

/// Whichever link of the new capture cannot be pinned, nothing of it is left, and the old one goes on.
#[test]
fn a_reload_that_fails_at_any_link_leaves_nothing_of_its_new_capture() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let half = Half::new(&world, &gateway)?;
    fs::remove_dir(&half.obstacle)?;
    let mut daemon = half.node.daemon(&half.one(&gateway))?;
    fs::write(daemon.config(), half.both(&gateway))?;
    let pins = || half.node.bpffs.pins().into_iter().collect::<BTreeSet<_>>();
    let before = pins();
    for link in &half.links {
        fs::create_dir_all(link)?;
        daemon.hang_up()?;
        let answer = daemon.answers().pop().unwrap_or_default();
        assert!(answer.contains("failed to reload"), "{}: {answer}", link.display());
        assert_eq!(pins(), before, "{}", link.display());
        half.node.hold(&target)?;
        fs::remove_dir(link)?;
    }
    assert!(half.links.len() > 6, "{:?}", half.links);
    daemon.hang_up()?;
    assert!(pins().len() > before.len(), "what failed before is in force");
    Ok(())
}

/// A configuration whose new capture cannot be attached denies nothing in connect() either, and does once it can.
///
/// Failure: refused.
#[test]
fn a_reload_that_fails_takes_back_what_its_routes_deny() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let half = Half::new(&world, &gateway)?;
    let mut daemon = half.node.daemon(&half.one(&gateway))?;
    let deny = format!("[[route]]\nmatch = {{ destination = [\"{TARGET4}\"] }}\nto = \"deny\"\n");
    let denying = half.both(&gateway).replacen("[[route]]", &format!("{deny}[[route]]"), 1);
    fs::write(daemon.config(), denying)?;
    daemon.hang_up()?;
    assert!(daemon.log().contains("keeping the previous configuration"), "{}", daemon.log());
    half.node.hold(&target)?;

    fs::remove_dir(&half.obstacle)?;
    daemon.hang_up()?;
    assert_eq!(half.node.connect_error(&target)?, "ECONNREFUSED");
    assert_eq!(target.peers().len(), 1);
    assert_eq!(daemon.stop_and_count("denied_by_route")?, 1);
    Ok(())
}

/// A daemon that fails while it takes over leaves the old one's programs and listeners in their place.
///
/// Failure: fails-half-way.
#[test]
fn a_take_over_that_fails_leaves_the_old_daemon_capturing() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let half = Half::new(&world, &gateway)?;
    let daemon = half.node.daemon(&half.one(&gateway))?;
    let mut old = half.node.hold(&target)?;
    fs::write(daemon.config(), half.both(&gateway))?;
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--takeover", "--config"]).arg(daemon.config());
    let mut new = Process::spawn("new", world.folder(), command)?;
    assert!(!new.wait(PATIENCE)?.success());
    assert_eq!(ask(&mut old, "ping")?, "ok");
    half.node.hold(&target)?;
    half.assert_only_the_first_is_pinned();
    Ok(())
}
