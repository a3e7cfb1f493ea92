//! Who shares a tunnel connection with others does not notice what becomes of them, nor of an endpoint beside theirs.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tunnel_tests::{
    NET4, Running, TARGET4, World, daemon::Daemon, dialogue::ask, pki::GATEWAY_ID, process, programs, target,
    wait_for,
};

/// A gateway at this port, with more keys of its listener.
fn gateway(world: &World, port: u16, keys: &str) -> Result<Daemon> {
    let config = format!(
        "{}[[listener]]\naddress = \"{}\"\n{keys}\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml(),
        SocketAddr::new(NET4, port)
    );
    Daemon::start(world, world.net(), &config)
}

/// An agent's configuration, through gateways at these ports, with more keys of its upstream.
fn agent(world: &World, ports: &[u16], keys: &str) -> Result<std::path::PathBuf> {
    let endpoints: Vec<_> =
        ports.iter().map(|port| format!("\"{}\"", SocketAddr::new(NET4, *port))).collect();
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[route]]\nto = [{{ upstream = \"gateways\" }}]\n[[upstream]]\n\
         name = \"gateways\"\nendpoints = [{}]\nverify = [\"{GATEWAY_ID}\"]\n{keys}\n",
        world.pki().named("node").toml(),
        endpoints.join(", ")
    );
    world.file("agent.toml", config)
}

/// Thousands of connections that are reset as soon as they are there end no other flow on the same tunnel connection,
/// whether the gateway keeps up or not.
///
/// Failure: misbehaviour.
#[test]
#[expect(clippy::disallowed_methods, reason = "what is wanted is a gateway that stands still for a while")]
fn connections_that_are_reset_at_once_end_no_flow_beside_them() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let done = world.exec(&gateway).run_app(&["burst", &target.addr().to_string(), "2000"])?;
    assert!(done.success(), "{done}");
    assert_eq!(done.value("alive")?, "8");
    // A gateway that stands still for a while finds all of it at once.
    let mut app = world.exec(&gateway).spawn_app(&["burst", &target.addr().to_string(), "2000"])?;
    wait_for("the long connections", tunnel_tests::PATIENCE, || {
        world.node().sockets().ok().filter(|all| all.iter().filter(|s| s.established()).count() > 8).map(drop)
    })?;
    gateway.process().signal(Signal::SIGSTOP)?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    gateway.process().signal(Signal::SIGCONT)?;
    app.says("alive=8")?;
    assert!(app.finish()?.success());
    Ok(())
}

/// Flows on a tunnel connection that is given up, because its peer answers no PING, are recorded each, with that reason.
///
/// Failure: connection-lost.
#[test]
fn flows_of_a_connection_that_is_given_up_are_recorded() -> Result<()> {
    const FLOWS: usize = 10;
    let world = World::new()?;
    let mut gateway =
        gateway(&world, 15041, "keepalive_interval = \"200ms\"\nkeepalive_timeout = \"300ms\"")?;
    let target = world.serve(TARGET4, target::echo())?;
    let config = agent(&world, &[15041], "")?;
    let mut app =
        world.exec_with(&config).spawn_app(&["swarm", &target.addr().to_string(), &FLOWS.to_string()])?;
    target.connected(FLOWS)?;
    app.says("swarm=")?;
    app.process().signal(Signal::SIGSTOP)?;
    gateway.process().wait_for_line("no answer to PING")?;
    let recorded = wait_for("a record of each flow", tunnel_tests::PATIENCE, || {
        let log = gateway.log();
        let lines =
            log.lines().filter(|line| line.contains("tunnel::flow") && line.contains("no answer to PING"));
        (lines.count() >= FLOWS).then_some(())
    });
    app.process().signal(Signal::SIGCONT)?;
    recorded.with_context(|| gateway.log())?;
    let _ended: Running = app;
    Ok(())
}

/// New flows go to another gateway as soon as one is overdue with its answer to a PING.
///
/// Failure: connection-lost.
#[test]
fn a_gateway_that_falls_silent_gets_no_new_flows_while_another_answers() -> Result<()> {
    let world = World::new()?;
    let (silent, _other) = (gateway(&world, 15051, "")?, gateway(&world, 15052, "")?);
    let target = world.serve(TARGET4, target::echo())?;
    let config = agent(&world, &[15051, 15052], "balance = \"round_robin\"")?;
    let words = ["now-and-then", &target.addr().to_string(), "40", "250"];
    let mut app = world.exec_with(&config).spawn_app(&words)?;
    // Both have a connection by then.
    app.says("flow=3 ")?;
    let mut silent = silent;
    silent.process().signal(Signal::SIGSTOP)?;
    app.says("flow=39 ")?;
    silent.process().signal(Signal::SIGCONT)?;
    let done = app.finish()?;
    let number = |line: &str, key: &str| -> Result<u64> {
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(key)).context("no such word")?;
        Ok(word.parse()?)
    };
    // A second without a word, a second for the answer, and the flows in between.
    for line in done.stdout.lines().filter(|line| line.starts_with("flow=")) {
        if number(line, "at=")? > 5_000 {
            ensure!(number(line, "took=")? < 1_000 && line.contains("ok=true"), "{line}\n{}", done.stdout);
        }
    }
    Ok(())
}

/// A target that vanishes with bytes on their way to it is found within the bound for silent peers.
#[test]
fn a_target_that_vanishes_with_bytes_on_their_way_is_found_within_the_bound() -> Result<()> {
    let world = World::new()?;
    let silent = "tcp_keepalive = { time = \"2s\", interval = \"1s\", probes = 4 }";
    let config = format!(
        "[daemon]\n{silent}\n{}[[listener]]\naddress = \"{}\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml(),
        SocketAddr::new(NET4, 15061)
    );
    let mut gateway = Daemon::start(&world, world.net(), &config)?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut app =
        world.exec_with(&agent(&world, &[15061], "")?).spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    // What the gateway sends there goes nowhere from now on, and nothing comes back.
    let port = target.addr().port().to_string();
    for way in ["--dport", "--sport"] {
        let mut drop_all = world.net().command(programs::system("iptables")?);
        process::output(drop_all.args(["-w", "-A", "INPUT", "-p", "tcp", way, &port, "-j", "DROP"]))?;
    }
    assert_ne!(ask(app.process(), "ping")?, "ok");
    gateway.process().wait_for_line("timed out")?;
    app.finish()?;
    Ok(())
}
