//! `tunnel run`: a daemon, the captures that outlive it, and the daemon after it.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use tunnel_tests::{
    NetNs, PATIENCE, Process, TARGET4, TARGET6, World,
    cgroup::Cgroup,
    daemon::Daemon,
    dialogue::ask,
    node::Node,
    process, programs, target, wait_for,
    world::{NET4, NODE4},
};

fn detach(config: &Path) -> Result<String> {
    process::output(Command::new(programs::tunnel()?).args(["detach", "--config"]).arg(config))
}

/// The kernel's counter of this name, as the daemon logs it at its end.
fn counter(log: &str, name: &str) -> Option<u64> {
    let (_, rest) = log.split_once(&format!("(\"{name}\", "))?;
    rest.split_once(')')?.0.parse().ok()
}

/// The daemon's own connections are not captured, although it runs in the captured cgroup.
#[test]
fn the_daemons_own_connections_are_not_captured_although_it_runs_in_the_captured_group() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let config = world.file("inside.toml", node.config(&gateway, "", ""))?;
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--config"]).arg(config);
    node.cgroup.adopt(&mut command)?;
    let mut daemon = Process::spawn("daemon", world.folder(), command)?;
    daemon.wait_for_line("capturing")?;

    let mut app = node.hold(&target)?;
    assert_eq!(ask(&mut app, "peer")?, target.addr().to_string());
    let seen = target.peers();
    assert_eq!(seen.iter().map(|p| p.ip()).collect::<Vec<_>>(), [NET4], "it came through the gateway");
    app.hang_up();
    app.wait(PATIENCE)?;
    daemon.stop()?;
    let log = daemon.stderr();
    assert_eq!(counter(&log, "captured"), Some(1), "{log}");
    assert!(counter(&log, "own_sockets") >= Some(1), "{log}");
    Ok(())
}

/// While no daemon runs captured connections are refused, and the next daemon carries them again.
///
/// Failure: daemon-killed.
#[test]
fn while_no_daemon_runs_captured_connections_are_refused_and_the_next_daemon_carries_them_again() -> Result<()>
{
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let config = node.config(&gateway, "", "");
    let mut daemon = node.daemon(&config)?;
    let mut app = node.hold(&target)?;
    let pinned = node.bpffs.pins();

    daemon.process().kill()?;
    assert_eq!(ask(&mut app, "read")?, "ECONNRESET", "a killed daemon is no clean end");
    for _ in 0..3 {
        assert_eq!(node.connect_error(&target)?, "ECONNREFUSED");
    }
    assert_eq!(node.bpffs.pins(), pinned);
    // It would reach this one by itself: still nothing leaves in plaintext.
    let near = world.serve(NET4, target::echo())?;
    assert_eq!(node.connect_error(&near)?, "ECONNREFUSED");
    assert_eq!(near.peers(), []);

    let mut daemon = node.daemon(&config)?;
    node.hold(&target)?;
    assert_eq!(node.bpffs.pins(), pinned, "the pins were adopted");
    daemon.process().stop()?;
    assert_eq!(node.connect_error(&target)?, "ECONNREFUSED", "also after an orderly end");
    Ok(())
}

/// With `on_failure = "open"` connections leave uncaptured while no daemon runs.
///
/// Failure: daemon-killed.
#[test]
fn with_on_failure_open_connections_go_out_as_if_there_were_no_capture_while_no_daemon_runs() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let near = world.serve(NET4, target::echo())?;
    let node = Node::new(&world)?;
    let config = node.config(&gateway, "", "on_failure = \"open\"");
    let mut daemon = node.daemon(&config)?;
    node.hold(&near)?;
    let came_from =
        |n: usize| wait_for("a connection", PATIENCE, || near.peers().get(n).map(std::net::SocketAddr::ip));
    assert_eq!(came_from(0)?, NET4, "through the gateway");

    daemon.process().kill()?;
    let mut app = node.hold(&near)?;
    assert_eq!(came_from(1)?, NODE4, "by itself");
    assert_eq!(ask(&mut app, "peer")?, near.addr().to_string());

    let mut daemon = node.daemon(&config)?;
    node.hold(&near)?;
    assert_eq!(came_from(2)?, NET4, "through the gateway again");
    assert_eq!(ask(&mut app, "ping")?, "ok", "what went out by itself goes on by itself");
    daemon.process().stop()?;
    assert_eq!(node.bpffs.pins(), Vec::<std::path::PathBuf>::new(), "an orderly end ends an open capture");
    node.hold(&near)?;
    assert_eq!(came_from(3)?, NODE4, "by itself");
    Ok(())
}

/// On SIGTERM established flows finish, and new connections are refused.
#[test]
fn on_sigterm_established_flows_finish_and_new_connections_are_refused() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "drain_timeout = \"60s\"", ""))?;
    let mut app = node.hold(&target)?;
    daemon.process().signal(Signal::SIGTERM)?;
    daemon.process().wait_for_line("draining")?;
    wait_for("new connections to be refused", PATIENCE, || {
        (node.connect_error(&target).ok()? == "ECONNREFUSED").then_some(())
    })?;
    for _ in 0..3 {
        assert_eq!(ask(&mut app, "ping")?, "ok");
    }
    assert_eq!(ask(&mut app, "peer")?, target.addr().to_string());
    assert!(daemon.process().ended()?.is_none(), "it waits for the flow");
    app.hang_up();
    app.wait(PATIENCE)?;
    // Long before drain_timeout.
    assert!(daemon.process().wait(PATIENCE)?.success());
    assert!(daemon.log().contains("reason=closed destination="), "{}", daemon.log());
    Ok(())
}

/// Flows that outlast `drain_timeout` are reset, and a second signal ends the drain at once.
#[test]
fn flows_that_outlast_the_drain_timeout_are_reset_and_a_second_signal_does_not_wait_for_it() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    for (timeout, signals) in [("200ms", 1), ("10m", 2)] {
        let node = Node::new(&world)?;
        let mut daemon =
            node.daemon(&node.config(&gateway, &format!("drain_timeout = \"{timeout}\""), ""))?;
        let mut app = node.hold(&target)?;
        for _ in 0..signals {
            daemon.process().signal(Signal::SIGTERM)?;
            daemon.process().wait_for_line("draining")?;
        }
        assert_eq!(ask(&mut app, "read")?, "ECONNRESET");
        assert!(daemon.process().wait(PATIENCE)?.success());
        assert!(daemon.log().contains("1 flows were reset at the drain deadline"), "{}", daemon.log());
    }
    Ok(())
}

/// A daemon that starts while another one drains adopts its captures, and the flows of both continue.
#[test]
fn a_daemon_that_starts_while_the_old_one_drains_adopts_the_capture_and_both_kinds_of_flows_go_on()
-> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    for on_failure in ["closed", "open"] {
        let node = Node::new(&world)?;
        let capture = format!("on_failure = \"{on_failure}\"");
        let config = node.config(&gateway, "drain_timeout = \"60s\"", &capture);
        let mut old = node.daemon(&config)?;
        let mut before = node.hold(&target)?;
        old.process().signal(Signal::SIGTERM)?;
        old.process().wait_for_line("draining")?;
        let mut new = node.daemon(&config)?;
        let mut after = node.hold(&target)?;
        for app in [&mut before, &mut after] {
            assert_eq!(ask(app, "ping")?, "ok");
            assert_eq!(ask(app, "peer")?, target.addr().to_string(), "{on_failure}");
        }
        before.hang_up();
        before.wait(PATIENCE)?;
        assert!(old.process().wait(PATIENCE)?.success());
        // The end of the old one took nothing from the new one.
        assert_eq!(ask(&mut after, "again")?, "ok", "{on_failure}");
        new.process().wait_for_line("reason=closed destination=")?;
    }
    Ok(())
}

/// A daemon that cannot adopt a capture leaves it closed.
#[test]
fn a_daemon_that_cannot_adopt_a_capture_leaves_it_closed() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let config = node.config(&gateway, "", "");
    let mut daemon = node.daemon(&config)?;
    daemon.process().kill()?;
    // Something that is no link stands where one was.
    let pins = node.bpffs.pins();
    let link = pins.iter().find(|p| p.ends_with("link_peer_name4")).context("the link is pinned")?;
    std::fs::remove_file(link)?;
    std::fs::create_dir(link)?;
    let mut next = Daemon::spawn(&world, world.node(), &config)?;
    assert!(!next.process().wait(PATIENCE)?.success());
    assert!(next.log().contains("link_peer_name4"), "{}", next.log());
    assert_eq!(node.connect_error(&target)?, "ECONNREFUSED", "nothing that fails opens a closed capture");
    std::fs::remove_dir(link)?;
    Ok(())
}

/// `tunnel detach` removes all pins, and connections are no longer captured.
#[test]
fn detach_leaves_no_pins_and_connections_go_their_own_way() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "", ""))?;
    assert!(!node.bpffs.pins().is_empty());
    daemon.process().stop()?;
    assert_eq!(node.connect_error(&target)?, "ECONNREFUSED");
    detach(daemon.config())?;
    assert_eq!(node.bpffs.pins(), Vec::<std::path::PathBuf>::new());
    // The node has no route: it is the kernel's own answer.
    assert_eq!(node.connect_error(&target)?, "ENETUNREACH");
    // A second time there is nothing to do, which is no mistake.
    detach(daemon.config())?;
    Ok(())
}

/// `tunnel detach` removes all pins although cgroup and certificates are gone.
#[test]
fn detach_leaves_no_pins_although_the_group_and_the_certificates_are_gone() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "", ""))?;
    daemon.process().stop()?;
    let Node { cgroup, bpffs, .. } = node;
    drop(cgroup);
    std::fs::remove_file(world.pki().named("node").cert)?;
    assert!(!bpffs.pins().is_empty());
    detach(daemon.config())?;
    assert_eq!(bpffs.pins(), Vec::<std::path::PathBuf>::new());
    Ok(())
}

/// A systemd unit is found by name below slices, and its sub-groups are captured.
#[test]
fn a_systemd_unit_is_found_by_its_name_below_slices_and_its_subgroups_are_captured() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    // As systemd would have it: a slice, the unit, and a group of the unit's own.
    let unit = format!("tt-{}.service", std::process::id());
    let slice = Cgroup::slice()?;
    let own = slice.path().join("app.slice").join(&unit).join("own");
    std::fs::create_dir_all(&own)?;
    let config = node.config(&gateway, "", "");
    let path = format!("cgroup = \"{}\"", node.cgroup.path().display());
    assert!(config.contains(&path));
    let mut daemon = node.daemon(&config.replace(&path, &format!("unit = \"{unit}\"")))?;
    let mut app = node.app(&["reconnect", &target.addr().to_string()])?;
    app.wait_for_line("ready=1")?;
    assert_eq!(ask(&mut app, "once")?, "ENETUNREACH", "outside of the unit nothing is captured");
    std::fs::write(own.join("cgroup.procs"), app.id().to_string())?;
    assert_eq!(ask(&mut app, "once")?, "ok");
    app.hang_up();
    app.wait(PATIENCE)?;
    daemon.process().stop()?;
    Ok(())
}

/// A process of the cgroup in another network namespace is captured too.
#[test]
fn a_process_of_another_network_namespace_in_the_group_is_captured_too() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    // It has no network at all, but its own loopback.
    let pod = NetNs::new("pod")?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "", ""))?;
    let mut app = node.app_on(&pod, &["reconnect", &target.addr().to_string()])?;
    app.wait_for_line("ready=1")?;
    daemon.process().wait_for_line("capturing in a network namespace")?;
    for _ in 0..10 {
        assert_eq!(ask(&mut app, "once")?, "ok");
    }
    let seen = target.peers();
    assert!(seen.len() == 10 && seen.iter().all(|p| p.ip() == NET4), "{seen:?}");
    // Beside it the daemon's own namespace goes on.
    node.hold(&target)?;
    Ok(())
}

/// Missing privilege exits with 77, and a wrong configuration with 64 and every mistake.
#[test]
fn a_daemon_without_privilege_ends_with_77_and_one_with_five_mistakes_with_64() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let run = |program: &Path, config: &Path, as_nobody: bool| -> Result<std::process::Output> {
        let mut command = Command::new(if as_nobody { Path::new("setpriv") } else { program });
        if as_nobody {
            command.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]).arg(program);
        }
        Ok(command.args(["run", "--config"]).arg(config).output()?)
    };
    // Where nobody may read.
    let open = tempfile::tempdir()?;
    let program = open.path().join("tunnel");
    std::fs::copy(programs::tunnel()?, &program)?;
    let copies = world.pki().named("node");
    for (from, to) in [(&copies.cert, "node.pem"), (&copies.key, "node-key.pem"), (&copies.ca, "ca.pem")] {
        std::fs::copy(from, open.path().join(to))?;
        process::output(Command::new("chmod").arg("644").arg(open.path().join(to)))?;
    }
    process::output(Command::new("chmod").arg("755").arg(open.path()))?;
    let own = node.config(&gateway, "", "");
    let (_, rest) = own.split_once("[[capture]]").context("it has a capture")?;
    let config = open.path().join("agent.toml");
    let identity = "[identity]\ncert = \"node.pem\"\nkey = \"node-key.pem\"\nca = \"ca.pem\"\n";
    std::fs::write(&config, format!("{identity}[[capture]]{rest}"))?;
    let output = run(&program, &config, true)?;
    assert_eq!(output.status.code(), Some(77), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("CAP_NET_ADMIN") && said.contains("CAP_BPF"), "{said}");

    let wrong = "[daemon]\nworkers = 0\n[[capture]]\ncgroup = \"/a\"\ninclude = [\"10.0.0.1/8\"]\n\
                 onfailure = \"open\"\n[[route]]\nto = [{ upstream = \"east\" }]\n[[listener]]\naddress = \"here\"\n";
    let config = world.file("wrong.toml", wrong)?;
    let output = run(&programs::tunnel()?, &config, false)?;
    assert_eq!(output.status.code(), Some(64), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    for mistake in [
        ":2:11: daemon.workers",
        ":5:12: capture.include[0]",
        ":6:1: capture.onfailure",
        ":8:20: route.to[0].upstream",
        ":10:11: listener.address",
    ] {
        assert!(said.lines().any(|l| l.contains(mistake)), "no {mistake} in:\n{said}");
    }
    Ok(())
}

/// Captured connections over loopback are not paced, whatever congestion control the host uses.
#[test]
fn a_captured_connection_runs_over_loopback_and_is_not_paced_whatever_its_host_does_to_others() -> Result<()>
{
    let world = World::new()?;
    // The node's own: it was the host's when the node was made.
    let control = || std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
    let host = world.node().run(control)?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let _daemon = node.daemon(&node.config(&gateway, "", ""))?;
    let _app = node.hold(&target)?;
    let mut ss = world.node().command(programs::system("ss")?);
    let sockets = process::output(ss.args(["-tinH", "state", "established"]))?;
    // A line for the addresses of each, and one with what it does.
    let lines: Vec<_> = sockets.lines().collect();
    let controls = |of: &str| -> Vec<_> {
        let wanted = lines.chunks(2).filter(|pair| pair[0].contains(of));
        wanted.map(|pair| pair[1].split_whitespace().next().unwrap_or_default()).collect()
    };
    assert_eq!(controls("127.0.0.1:"), ["reno", "reno"], "{sockets}");
    assert_eq!(controls(&gateway.addr().to_string()), [host.trim()], "{sockets}");
    Ok(())
}

/// A node that gets `::1` only after the daemon has started is captured over IPv6 too from then on.
#[test]
fn ipv6_that_comes_after_the_start_is_captured_too() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET6, target::echo())?;
    let without = |off: &str| {
        let off = off.to_owned();
        world.node().run(move || std::fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", off))
    };
    without("1")?;
    let node = Node::new(&world)?;
    let _daemon = node.daemon(&node.config(&gateway, "", ""))?;
    assert_eq!(node.connect_error(&target)?, "ENETUNREACH", "as without us, and not let through");
    without("0")?;
    node.hold(&target)?;
    Ok(())
}

/// `drain_timeout` is the time for flows and for the connections that they were on together: with a gateway that answers
/// nothing it is not spent twice.
#[test]
fn the_drain_timeout_is_for_flows_and_their_connections_together() -> Result<()> {
    const DRAIN: Duration = Duration::from_secs(4);
    let world = World::new()?;
    // More than the sockets take waits in the daemon, so that its connection cannot be closed.
    world.buffers_of_64_kib()?;
    let mut gateway = world.gateway().start()?;
    let gateway_addr = gateway.addr();
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let drain = format!("drain_timeout = \"{}s\"\n", DRAIN.as_secs());
    let mut daemon = node.daemon(&node.config(&gateway, &drain, ""))?;
    let _sending = node.app(&["duplex", &target.addr().to_string(), "1000000000"])?;
    target.connected(1)?;
    gateway.process().signal(Signal::SIGSTOP)?;
    let queued = || -> Option<u64> {
        let sockets = world.node().sockets().ok()?;
        sockets.iter().find(|s| s.established() && s.remote == gateway_addr).map(|s| s.send_queue)
    };
    // Full is what no longer grows.
    let mut seen = (0, Instant::now());
    wait_for("the connection to fill up", PATIENCE, || {
        let now = queued()?;
        if now != seen.0 {
            seen = (now, Instant::now());
        }
        (now > 10_000 && seen.1.elapsed() > Duration::from_millis(200)).then_some(())
    })?;
    let asked = Instant::now();
    daemon.process().signal(Signal::SIGTERM)?;
    assert!(daemon.process().wait(PATIENCE)?.success());
    let took = asked.elapsed();
    gateway.process().signal(Signal::SIGCONT)?;
    assert!(took >= DRAIN && took < DRAIN + DRAIN * 3 / 4, "{took:?}");
    Ok(())
}
