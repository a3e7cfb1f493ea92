//! What is written when much goes wrong at once, and when a limit is reached.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use anyhow::{Context as _, Result};
use tunnel_tests::{
    NET4, PATIENCE, Process, TARGET4, World,
    daemon::Daemon,
    gateway::PORT,
    peer::{self, connect_request},
    programs, target, wait_for,
};

fn at() -> SocketAddr {
    SocketAddr::new(NET4, PORT)
}

fn config(world: &World, daemon: &str) -> String {
    format!(
        "[daemon]\n{daemon}\n{}[[listener]]\naddress = \"{}\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml(),
        at()
    )
}

/// How many lines hold `words`, and how many more the log says there were.
fn written(log: &str, words: &str, more: &str) -> Result<(usize, usize)> {
    let lines = log.lines().filter(|line| line.contains(words)).count();
    let left_out = log.lines().filter(|line| line.contains(more)).map(|line| {
        let n = line.split_once("suppressed=").context("no number")?.1;
        Ok(n.split_whitespace().next().unwrap_or(n).parse::<usize>()?)
    });
    Ok((lines, left_out.sum::<Result<usize>>()?))
}

/// Of 1,000 peers that do not speak TLS, and of 1,000 requests that policy denies, the first have a line each, and what the
/// log says of the rest adds up.
///
/// Failure: limits.
#[test]
fn of_many_refusals_the_first_are_logged_and_the_rest_is_counted() -> Result<()> {
    const MANY: usize = 1000;
    let world = World::new()?;
    let mut gateway = Daemon::start(&world, world.net(), &config(&world, "workers = 1"))?;
    let strangers: Result<Vec<_>> = world.node().run(|| {
        (0..MANY)
            .map(|_| {
                let mut stream = TcpStream::connect(at())?;
                stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
                Ok(stream)
            })
            .collect()
    });
    for mut stream in strangers? {
        stream.set_read_timeout(Some(PATIENCE))?;
        // An alert, or a reset: it is over.
        let _over = stream.read_to_end(&mut Vec::new());
    }
    let who = peer::tls(&world.pki().named("node"))?;
    world.node().block_on(|| async move {
        let (requests, connection) = peer::connect(at(), who).await?;
        let driving = tokio::task::spawn_local(connection);
        for _ in 0..MANY {
            let mut ready = requests.clone().ready().await?;
            let (response, _body) = ready.send_request(connect_request("192.0.2.1:80")?, true)?;
            assert_eq!(response.await?.status(), 403);
        }
        driving.abort();
        anyhow::Ok(())
    })?;
    gateway.process().stop()?;
    let log = gateway.log();
    let peers = written(&log, "rejected peer connection peer=", "more rejected peer connections")?;
    let denied = written(&log, "reason=policy_denied", "more flows that policy or a route refused")?;
    for (lines, left_out) in [peers, denied] {
        assert_eq!(lines + left_out, MANY, "{lines} lines, {left_out} left out");
        assert!(lines >= 100 && left_out > 0, "{lines} lines, {left_out} left out");
    }
    Ok(())
}

/// An agent that resets connections because it has as many flows as it may names the limit, once a second.
///
/// Failure: limits.
#[test]
fn an_agent_at_its_limit_of_flows_says_so_once_a_second() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let config = format!(
        "[daemon]\nworkers = 1\nmax_flows = 1\n{}[[route]]\nto = [{{ upstream = \"next\" }}]\n[[upstream]]\nname = \"next\"\n\
         endpoints = [\"{}\"]\nverify = [\"{}\"]\n",
        world.pki().named("node").toml(),
        gateway.addr(),
        tunnel_tests::pki::GATEWAY_ID
    );
    let exec = world.exec_with(&world.file("agent.toml", config)?);
    let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    for _ in 0..3 {
        tunnel_tests::dialogue::ask(app.process(), "again")?;
    }
    wait_for("a word on the limit", PATIENCE, || {
        app.process().stderr().contains("the limit of 1 flows is reached (daemon.max_flows)").then_some(())
    })?;
    app.finish()?;
    Ok(())
}

/// A daemon whose descriptors allow fewer flows than `max_flows` says at start how many they allow, and the remedy.
///
/// Failure: limits.
#[test]
fn what_descriptors_cut_from_max_flows_is_said_at_start() -> Result<()> {
    let world = World::new()?;
    let file = world.file("few.toml", config(&world, "workers = 1\nmax_flows = 1000"))?;
    for (descriptors, said) in [(1000, true), (4000, false)] {
        let mut command = world.net().command(&programs::system("prlimit")?);
        command.arg(format!("--nofile={descriptors}")).arg(programs::tunnel()?);
        command.args(["run", "--config"]).arg(&file);
        let mut process = Process::spawn("few", world.folder(), command)?;
        process.wait_for_line("listening")?;
        let log = process.stderr();
        let line = log.lines().find(|line| line.contains("fewer flows are taken than max_flows"));
        assert_eq!(line.is_some(), said, "{log}");
        if let Some(line) = line {
            for words in ["max_flows=1000", "flows=488", "nofile=1000", "LimitNOFILE="] {
                assert!(line.contains(words), "no {words} in {line}");
            }
        }
        process.stop()?;
    }
    Ok(())
}
