//! Capture without our hooks: rules of the operator's redirect, conntrack knows where to.
//!
//! The rules are those of `examples/redirect.toml`, made by iptables in the test's own namespace.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use tunnel_tests::{
    Gateway, PATIENCE, Process, TARGET4, TARGET6, Target, World,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    dialogue::ask,
    pki::GATEWAY_ID,
    process, programs, rules, target, wait_for,
    world::{NET4, NET6, NODE4},
};

/// Where the rules send connections.
const PORT: u16 = 15001;
const LISTEN: &str = "listen = [\"127.0.0.1:15001\", \"[::1]:15001\"]";

/// A node where what a group connects to is redirected.
struct Node<'w> {
    world: &'w World,
    cgroup: Cgroup,
}

impl<'w> Node<'w> {
    fn new(world: &'w World) -> Result<Self> {
        let node = Self { world, cgroup: Cgroup::new()? };
        // The kernel wants a route before it asks the rules. Whatever goes this way by itself is seen to come
        // from the node.
        world.node().ip(&format!("route add default via {NET4}"))?;
        world.node().ip(&format!("-6 route add default via {NET6}"))?;
        rules::redirect(world.node(), &node.cgroup, PORT)?;
        Ok(node)
    }

    fn config(&self, gateway: &Gateway<'_>, daemon: &str) -> String {
        format!(
            "[daemon]\n{daemon}\n{}[[capture]]\nmode = \"redirect\"\n{LISTEN}\n{}",
            self.world.pki().named("node").toml(),
            through(gateway.addr(), GATEWAY_ID),
        )
    }

    /// Pass-through: no tunnel, no certificate.
    fn direct(listen: &str) -> String {
        format!("[[capture]]\nmode = \"redirect\"\n{listen}\n[[route]]\nto = \"direct\"\n")
    }

    fn daemon(&self, config: &str) -> Result<Daemon> {
        Daemon::start(self.world, self.world.node(), config)
    }

    /// An application, in the group or beside it.
    fn command(&self, inside: bool, words: &[&str]) -> Result<Command> {
        let mut command = self.world.node().command(programs::app()?);
        command.args(words);
        if inside {
            self.cgroup.adopt(&mut command)?;
        }
        Ok(command)
    }

    fn app(&self, words: &[&str]) -> Result<Process> {
        Process::spawn_with_input("app", self.world.folder(), self.command(true, words)?)
    }

    /// An application in the group that has connected to `target` and exchanged a byte with it.
    fn hold(&self, target: &Target) -> Result<Process> {
        let mut app = self.app(&["hold", &target.addr().to_string()])?;
        app.wait_for_line("held=1")?;
        assert_eq!(ask(&mut app, "ping")?, "ok");
        Ok(app)
    }

    /// What ends a connection to `addr`, and how connect(2) went.
    fn ended(&self, inside: bool, addr: SocketAddr) -> Result<String> {
        process::output(&mut self.command(inside, &["expect-reset", &addr.to_string(), "0"])?)
    }
}

fn came_from(target: &Target) -> Vec<IpAddr> {
    target.peers().iter().map(SocketAddr::ip).collect()
}

/// A counter, as the daemon logs it at its end.
fn counter(log: &str, name: &str) -> Option<u64> {
    let (_, rest) = log.split_once(&format!("(\"{name}\", "))?;
    rest.split_once(')')?.0.parse().ok()
}

/// Connections that iptables rules redirect are carried over IPv4 and IPv6.
#[test]
fn what_rules_redirect_is_carried_through_the_tunnel_over_ipv4_and_ipv6() -> Result<()> {
    const BYTES: u64 = 300_000;
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, ""))?;
    for (ip, gateways) in [(TARGET4, NET4), (TARGET6, NET6)] {
        let target = world.serve(ip, target::duplex(BYTES))?;
        let addr = target.addr().to_string();
        let said = process::output(&mut node.command(true, &["duplex", &addr, &BYTES.to_string()])?)?;
        assert!(said.contains(&format!("duplex={BYTES}")), "{said}");
        assert_eq!(target.outcomes(1)?, [Ok(())]);
        assert_eq!(came_from(&target), [gateways], "it came through the gateway");
        let line = daemon.process().wait_for_line(&format!("destination={addr} "))?;
        assert!(line.contains("reason=closed ") && line.contains("Tunnel"), "{line}");

        let echo = world.serve(ip, target::echo())?;
        let mut app = node.hold(&echo)?;
        assert_eq!(ask(&mut app, "peer")?, echo.addr().to_string(), "it sees the address that it asked for");
    }
    // The rules decide, and they speak of the group.
    let beside = world.serve(TARGET4, target::echo())?;
    process::output(&mut node.command(false, &["many", &beside.addr().to_string(), "1", "1000"])?)?;
    assert_eq!(came_from(&beside), [NODE4], "by itself");
    daemon.process().stop()?;
    let log = daemon.log();
    assert_eq!((counter(&log, "flows"), counter(&log, "no_origin")), (Some(4), None), "{log}");
    Ok(())
}

/// The daemon's own connections are not redirected, although it runs in the matched cgroup.
#[test]
fn the_daemons_own_connections_are_not_redirected_although_it_runs_in_the_matched_group() -> Result<()> {
    let world = World::new()?;
    let node = Node::new(&world)?;
    let config = world.file("inside.toml", Node::direct(LISTEN))?;
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--config"]).arg(config);
    node.cgroup.adopt(&mut command)?;
    let mut daemon = Process::spawn("daemon", world.folder(), command)?;
    daemon.wait_for_line("capturing")?;
    for ip in [TARGET4, TARGET6] {
        let target = world.serve(ip, target::echo())?;
        node.hold(&target)?;
        assert_eq!(target.peers().len(), 1);
    }
    daemon.stop()?;
    let log = daemon.stderr();
    assert_eq!((counter(&log, "flows"), counter(&log, "to_ourselves")), (Some(2), None), "{log}");
    Ok(())
}

/// A connection without an original destination, or to the listener itself, is reset and counted.
#[test]
fn a_connection_that_was_not_redirected_or_wants_to_come_to_us_is_reset_and_counted() -> Result<()> {
    let world = World::new()?;
    let node = Node::new(&world)?;
    let at = |ip: &str| SocketAddr::new(ip.parse().expect("an address"), PORT);
    for (listen, ours) in [
        (
            LISTEN,
            &[(false, at("127.0.0.1")), (true, at("127.0.0.1")), (false, at("::1")), (true, at("::1"))][..],
        ),
        ("listen = [\"0.0.0.0:15001\"]", &[(false, at("10.77.0.1")), (true, at("10.77.0.1"))]),
        // IPv4 arrives here too.
        (
            "listen = [\"[::]:15001\"]",
            &[(true, at("10.77.0.1")), (true, at("fd77::1")), (false, at("127.0.0.1"))],
        ),
    ] {
        let mut daemon = node.daemon(&Node::direct(listen))?;
        for &(inside, addr) in ours {
            let said = node.ended(inside, addr)?;
            assert!(said.contains("connect=ok") && said.contains("ended=ECONNRESET"), "{addr}: {said}");
        }
        daemon.process().wait_for_line("where we listen: carrying it would bring it back")?;
        // A port is not all of an address, and a listener on IPv6 may take what was IPv4.
        let ip = if listen.contains("::1") { TARGET6 } else { TARGET4 };
        let far = Target::start(world.net(), SocketAddr::new(ip, PORT), target::echo())?;
        node.hold(&far)?;
        daemon.process().stop()?;
        let log = daemon.log();
        assert_eq!(counter(&log, "to_ourselves"), Some(ours.len() as u64), "{log}");
        assert_eq!(counter(&log, "flows"), Some(1), "{log}");
    }
    Ok(())
}

/// Without redirect rules there is no original destination, and a connection is reset.
#[test]
fn without_rules_nobody_knows_where_a_connection_wanted_to_go_and_it_is_reset() -> Result<()> {
    let world = World::new()?;
    // No rules: no conntrack in this namespace.
    let mut daemon = Daemon::start(&world, world.node(), &Node::direct(LISTEN))?;
    let mut command = world.node().command(programs::app()?);
    let said = process::output(command.args(["expect-reset", "127.0.0.1:15001", "1000"]))?;
    assert!(said.contains("connect=ok") && said.contains("ended=ECONNRESET"), "{said}");
    daemon.process().wait_for_line("was not redirected by a rule")?;
    daemon.process().stop()?;
    assert_eq!(counter(&daemon.log(), "no_origin"), Some(1), "{}", daemon.log());
    Ok(())
}

/// On SIGTERM redirected flows finish, and new connections are refused.
#[test]
fn on_sigterm_redirected_flows_finish_and_new_connections_are_refused() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "drain_timeout = \"60s\""))?;
    let mut app = node.hold(&target)?;
    daemon.process().signal(Signal::SIGTERM)?;
    daemon.process().wait_for_line("draining")?;
    let refused = || -> Result<bool> {
        let said = process::output(&mut node.command(true, &["connect-error", &target.addr().to_string()])?)?;
        Ok(said.contains("connect=ECONNREFUSED"))
    };
    wait_for("new connections to be refused", PATIENCE, || refused().is_ok_and(|yes| yes).then_some(()))?;
    assert_eq!(ask(&mut app, "ping")?, "ok");
    assert!(daemon.process().ended()?.is_none(), "it waits for the flow");
    app.hang_up();
    app.wait(PATIENCE)?;
    // Long before drain_timeout.
    assert!(daemon.process().wait(PATIENCE)?.success());
    assert!(refused()?, "what the rules redirect stays refused while no daemon runs");
    assert_eq!(came_from(&target), [NET4], "nothing left in plaintext");
    Ok(())
}

/// A target that refuses resets the redirected application.
#[test]
fn a_target_that_refuses_resets_the_redirected_application() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, ""))?;
    let nobody = world.serve(TARGET4, target::echo())?.addr();
    let said = node.ended(true, nobody)?;
    assert!(said.contains("connect=ok") && said.contains("ended=ECONNRESET"), "{said}");
    daemon.process().wait_for_line("502")?;
    Ok(())
}

/// Where nobody may read and run: the program, certificates, and a configuration.
fn for_nobody(world: &World, config: &str) -> Result<tempfile::TempDir> {
    let open = tempfile::tempdir()?;
    std::fs::copy(programs::tunnel()?, open.path().join("tunnel"))?;
    let node = world.pki().named("node");
    for (from, to) in [(&node.cert, "node.pem"), (&node.key, "node-key.pem"), (&node.ca, "ca.pem")] {
        std::fs::copy(from, open.path().join(to))?;
        process::output(Command::new("chmod").arg("644").arg(open.path().join(to)))?;
    }
    let key = open.path().join("node-key.pem");
    process::output(Command::new("chown").arg("nobody").arg(&key))?;
    process::output(Command::new("chmod").arg("600").arg(&key))?;
    process::output(Command::new("chmod").arg("755").arg(open.path()))?;
    let (_, rest) = config.split_once("[[capture]]").context("it has a capture")?;
    let identity = "[identity]\ncert = \"node.pem\"\nkey = \"node-key.pem\"\nca = \"ca.pem\"\n";
    std::fs::write(open.path().join("agent.toml"), format!("{identity}[[capture]]{rest}"))?;
    Ok(open)
}

/// Capture by redirection needs CAP_NET_ADMIN and no other privilege.
#[test]
fn it_takes_cap_net_admin_and_no_other_privilege() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let open = for_nobody(&world, &node.config(&gateway, ""))?;
    let as_nobody = |capabilities: &str| {
        let mut command = world.node().command_ended_by(Path::new("/usr/bin/setpriv"), Signal::SIGTERM);
        command.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--bounding-set"]);
        command.args([capabilities, "--inh-caps", capabilities, "--ambient-caps", capabilities]);
        command.arg(open.path().join("tunnel")).args(["run", "--config"]).arg(open.path().join("agent.toml"));
        command
    };
    let without = as_nobody("-all").output()?;
    assert_eq!(without.status.code(), Some(77), "{without:?}");
    let said = String::from_utf8_lossy(&without.stderr).into_owned();
    assert!(said.contains("SO_MARK") && said.contains("CAP_NET_ADMIN"), "{said}");

    let mut daemon = Process::spawn("daemon", world.folder(), as_nobody("-all,+net_admin"))?;
    daemon.wait_for_line("capturing")?;
    node.hold(&target)?;
    assert_eq!(came_from(&target), [NET4]);
    Ok(())
}

/// `relay = "splice"` without its privileges exits with 77 and names them; "auto" copies.
#[test]
fn relay_splice_takes_more_privileges_and_says_which_are_missing_with_77_and_auto_copies_without()
-> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let open = for_nobody(&world, &Node::direct(LISTEN))?;
    let with = |relay: &str, capabilities: &str| -> Result<Command> {
        let config = open.path().join("direct.toml");
        std::fs::write(&config, format!("[daemon]\nrelay = \"{relay}\"\n{}", Node::direct(LISTEN)))?;
        let mut command = world.node().command_ended_by(Path::new("/usr/bin/setpriv"), Signal::SIGTERM);
        command.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--bounding-set"]);
        command.args([capabilities, "--inh-caps", capabilities, "--ambient-caps", capabilities]);
        command.arg(open.path().join("tunnel")).args(["run", "--log", "info", "--config"]).arg(config);
        Ok(command)
    };
    for (given, missing) in
        [("-all,+net_admin", "CAP_PERFMON and CAP_BPF"), ("-all,+net_admin,+bpf", "CAP_PERFMON")]
    {
        let output = with("splice", given)?.output()?;
        assert_eq!(output.status.code(), Some(77), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(&format!("this process lacks {missing}\n")), "{said}");
        assert!(said.contains("relay = \"auto\""), "it says what else there is: {said}");
    }
    for (relay, given, says) in [
        ("auto", "-all,+net_admin", "are copied: this process lacks CAP_PERFMON and CAP_BPF"),
        ("splice", "-all,+net_admin,+bpf,+perfmon", "capturing"),
    ] {
        let mut daemon = Process::spawn("daemon", world.folder(), with(relay, given)?)?;
        daemon.wait_for_line("capturing")?;
        assert!(daemon.stderr().contains(says), "{daemon}");
        node.hold(&target)?;
        daemon.stop()?;
    }
    Ok(())
}

/// `exec` and `detach` reject captures by redirection, and mistakes are named.
#[test]
fn exec_and_detach_say_that_rules_are_not_theirs_and_mistakes_are_named() -> Result<()> {
    let world = World::new()?;
    let run = |name: &str, config: &str, words: &[&str], rest: &[&str]| -> Result<(Option<i32>, String)> {
        let config = world.file(name, config)?;
        let mut command = world.node().command(programs::tunnel()?);
        let output = command.args(words).arg(config).args(rest).output()?;
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let good = Node::direct(LISTEN);
    let (code, said) = run("exec.toml", &good, &["exec", "--config"], &["--", "echo", "it ran"])?;
    assert_eq!(code, Some(64), "{said}");
    assert!(
        said.contains("exec.toml:2:8: capture.mode: is \"redirect\"") && !said.contains("it ran"),
        "{said}"
    );

    let (code, said) = run("detach.toml", &good, &["detach", "--config"], &[])?;
    assert_eq!(code, Some(0), "{said}");
    for address in ["127.0.0.1:15001", "[::1]:15001"] {
        let named = |l: &str| l.contains("the rules are yours to remove") && l.contains(address);
        assert!(said.lines().any(named), "{said}");
    }

    let wrong =
        "[[capture]]\nmode = \"redirect\"\ncgroup = \"/x\"\non_failure = \"open\"\nlisten = [\"here\"]\n";
    let (code, said) = run("wrong.toml", wrong, &["config", "check"], &[])?;
    assert_eq!(code, Some(64), "{said}");
    for mistake in [
        ":1:1: capture: has no [[route]]",
        ":3:10: capture.cgroup: ",
        ":4:14: capture.on_failure: has no meaning in mode = \"redirect\"",
        ":5:11: capture.listen[0]: \"here\" is not an address and port",
    ] {
        assert!(said.contains(mistake), "no {mistake} in:\n{said}");
    }
    Ok(())
}
