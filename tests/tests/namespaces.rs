//! What connects from a network namespace that the daemon has not seen yet waits for it, and is carried.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use tunnel_tests::{
    Gateway, NET4, NET6, NetNs, PATIENCE, TARGET4, TARGET6, Target, World, daemon::Daemon, dialogue::ask,
    node::Node, target, wait_for,
};

/// A connection that waits in vain ends in this time: six doublings of 5 jiffies at 100 Hz, and the machine is busy.
const IN_VAIN: Duration = Duration::from_secs(8);

/// A node whose group is captured, and a host of its own, with a way to the targets, for what goes its own way.
struct Scene<'w> {
    node: Node<'w>,
    gateway: Gateway<'w>,
    targets: [Target; 2],
}

impl<'w> Scene<'w> {
    fn new(world: &'w World) -> Result<Self> {
        Ok(Self {
            node: Node::new(world)?,
            gateway: world.gateway().start()?,
            targets: [world.serve(TARGET4, target::echo())?, world.serve(TARGET6, target::echo())?],
        })
    }

    fn daemon(&self, capture: &str) -> Result<Daemon> {
        self.node.daemon(&self.node.config(&self.gateway, "", capture))
    }

    /// Everybody whom the targets have seen is the gateway, and there are so many.
    fn all_by_the_gateway(&self, n: usize) {
        let seen: Vec<SocketAddr> = self.targets.iter().flat_map(Target::peers).collect();
        assert!(seen.len() == n && seen.iter().all(|p| [NET4, NET6].contains(&p.ip())), "{n}: {seen:?}");
    }

    /// What an application says in the group, whose first word is a verb and whose second is the target.
    fn says(&self, verb: &str, target: &Target, more: &[&str], key: &str) -> Result<String> {
        let addr = target.addr().to_string();
        let words: Vec<&str> = [verb, &addr].into_iter().chain(more.iter().copied()).collect();
        let mut app = self.node.app(&words)?;
        let said = app.wait_for_line(&format!("{key}="))?;
        app.wait(PATIENCE)?;
        Ok(said.split_once('=').map(|(_, value)| value.to_owned()).unwrap_or_default())
    }
}

/// A host that has a way to the targets by itself, as a container has: what is not captured there is in plaintext.
fn host(world: &World) -> Result<NetNs> {
    let host = NetNs::new("box")?;
    host.join(&["10.78.0.1/30", "fd78::1/64"], world.net(), &["10.78.0.2/30", "fd78::2/64"])?;
    host.ip("route add default via 10.78.0.2")?;
    host.ip("-6 route add default via fd78::2")?;
    Ok(host)
}

/// Of new namespaces with one connection each, every one is carried, over both families.
#[test]
fn the_first_connection_of_each_of_ten_new_namespaces_is_carried() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let mut daemon = scene.daemon("")?;
    for target in &scene.targets {
        assert_eq!(scene.says("new-namespaces", target, &["10"], "ok")?, "10 of 10", "{target:?}");
    }
    scene.all_by_the_gateway(20);
    daemon.process().stop()?;
    Ok(())
}

/// A thread may be in another namespace than its process.
#[test]
fn a_thread_in_a_namespace_of_its_own_is_carried() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let mut daemon = scene.daemon("")?;
    for target in &scene.targets {
        assert_eq!(scene.says("from-a-thread", target, &[], "went")?, "ok", "{target:?}");
    }
    scene.all_by_the_gateway(2);
    daemon.process().stop()?;
    Ok(())
}

/// A socket may be in a namespace that nobody is in.
#[test]
fn a_socket_of_a_namespace_without_a_process_is_carried() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let mut daemon = scene.daemon("")?;
    for target in &scene.targets {
        assert_eq!(scene.says("by-a-socket-of-nobodys", target, &[], "went")?, "ok", "{target:?}");
    }
    scene.all_by_the_gateway(2);
    daemon.process().stop()?;
    Ok(())
}

/// More namespaces at once than the kernel attaches programs to one of them.
#[test]
fn sixty_five_namespaces_at_once_are_carried() -> Result<()> {
    const N: &str = "65";
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let mut daemon = scene.daemon("")?;
    let mut apps = Vec::new();
    for target in &scene.targets {
        let mut app = scene.node.app(&["many-namespaces", &target.addr().to_string(), N])?;
        assert_eq!(app.wait_for_line("held=")?, format!("held={N} of {N}"), "{}", daemon.log());
        apps.push(app);
    }
    scene.all_by_the_gateway(130);
    for app in &mut apps {
        assert_eq!(ask(app, "alive")?, N);
    }
    for mut app in apps {
        app.hang_up();
        app.wait(PATIENCE)?;
    }
    daemon.process().stop()?;
    Ok(())
}

/// Whom the target sees in a connection from a host that nobody has been on, and how it went.
fn first_from_elsewhere(scene: &Scene<'_>, target: &Target, host: &NetNs) -> Result<String> {
    let mut app = scene.node.app_on(host, &["connect-error", &target.addr().to_string()])?;
    let said = app.wait_for_line("connect=")?;
    app.wait(PATIENCE)?;
    Ok(said.trim_start_matches("connect=").to_owned())
}

/// `on_failure = "open"` is for when there is no daemon; while there is one, nothing of a new namespace is in plaintext.
#[test]
fn with_on_failure_open_and_a_daemon_the_first_connection_of_a_new_namespace_is_carried() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let mut daemon = scene.daemon("on_failure = \"open\"")?;
    for (n, target) in scene.targets.iter().enumerate() {
        let host = host(&world)?;
        assert_eq!(first_from_elsewhere(&scene, target, &host)?, "ok", "{target:?}");
        target.connected(1)?;
        scene.all_by_the_gateway(n + 1);
    }
    // Without one it is.
    daemon.process().kill()?;
    let host = host(&world)?;
    assert_eq!(first_from_elsewhere(&scene, &scene.targets[0], &host)?, "ok");
    let peers = scene.targets[0].peers();
    assert_eq!(peers.last().map(SocketAddr::ip), Some("10.78.0.1".parse::<IpAddr>()?), "the host by itself");
    Ok(())
}

/// A daemon that does not run any more, and is not gone, carries nothing: what waits for it fails in the end, and nothing is
/// in plaintext, also where another capture's programs see the same connections.
#[test]
fn while_the_daemon_stands_still_a_connection_of_a_new_namespace_times_out() -> Result<()> {
    for on_failure in ["closed", "open"] {
        let world = World::new()?;
        let scene = Scene::new(&world)?;
        let mut daemon = scene.daemon(&format!("on_failure = \"{on_failure}\""))?;
        let other = Node::new(&world)?;
        let mut beside = other.daemon(&other.config(&scene.gateway, "", ""))?;
        for target in &scene.targets {
            let host = host(&world)?;
            daemon.process().signal(Signal::SIGSTOP)?;
            let began = Instant::now();
            let went = first_from_elsewhere(&scene, target, &host);
            let took = began.elapsed();
            daemon.process().signal(Signal::SIGCONT)?;
            assert_eq!(went?, "ETIMEDOUT", "{target:?}");
            assert!(took < IN_VAIN, "{took:?}");
            assert_eq!(target.peers(), [], "{on_failure}");
            // It has heard of it meanwhile.
            assert_eq!(first_from_elsewhere(&scene, target, &host)?, "ok", "{target:?}");
            target.connected(1)?;
        }
        scene.all_by_the_gateway(2);
        daemon.process().stop()?;
        beside.process().stop()?;
    }
    Ok(())
}

/// Descriptors of a process, and the namespaces that sockets of its are in.
fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// A namespace that its last process has left is given up: the daemon keeps nothing of it, neither a descriptor nor a program
/// nor the namespace itself.
#[test]
fn a_namespace_that_goes_leaves_nothing() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    // One worker, so that all flows share what the first of them leave open.
    let mut daemon = scene.node.daemon(&scene.node.config(&scene.gateway, "workers = 1\n", ""))?;
    let id = daemon.process().id();
    // What it takes for the first flow it keeps.
    for target in &scene.targets {
        let mut app = scene.node.hold(target)?;
        app.hang_up();
        app.wait(PATIENCE)?;
    }
    let before = descriptors(id)?;
    let mut inodes = Vec::new();
    for target in &scene.targets {
        let host = host(&world)?;
        assert_eq!(first_from_elsewhere(&scene, target, &host)?, "ok");
        inodes.push(fs::metadata(format!("/run/netns/{}", host.name()))?.ino());
    }
    assert!(descriptors(id)? > before, "its listeners there");
    // 30 s after the last process, and a look each second.
    wait_for("the namespaces to be given up", 3 * PATIENCE, || {
        (descriptors(id).ok()? <= before).then_some(())
    })
    .with_context(|| format!("{before} descriptors before, {:?} now", descriptors(id)))?;
    let left = std::process::Command::new("lsns").args(["-n", "-t", "net", "-o", "NS"]).output()?;
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    for inode in inodes {
        assert!(!left.split_whitespace().any(|ns| ns == inode.to_string()), "{inode}: {left}");
    }
    daemon.process().stop()?;
    Ok(())
}
