//! What one peer may use of a gateway, and what a flow may use of time: each limit, exceeded.

use std::{
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep, timeout};
use tunnel_tests::{
    NET4, PATIENCE, Process, TARGET4, World,
    cgroup::Cgroup,
    daemon::Daemon,
    gateway::PORT,
    node::Node,
    peer::{self, connect_request},
    pki::Credentials,
    programs,
    raw::{self, ACK, DATA, END_HEADERS, Frame, GOAWAY, HEADERS, PING},
    target::{self, Gate},
};

const MIB: u64 = 1 << 20;

fn at() -> SocketAddr {
    SocketAddr::new(NET4, PORT)
}

/// A gateway of one worker with these limits, and more keys of its listener.
fn gateway(world: &World, limits: &str, listener: &str) -> Result<Daemon> {
    let config = format!(
        "[daemon]\nworkers = 1\n[daemon.limits]\n{limits}\n{}[[listener]]\naddress = \"{}\"\n{listener}\n\
         [[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml(),
        at()
    );
    Daemon::start(world, world.net(), &config)
}

fn status(world: &World, who: &Credentials, target: SocketAddr) -> Result<(u16, String)> {
    let answer = peer::ask(world.node(), at(), who, connect_request(&target.to_string())?)?;
    Ok((answer.status.as_u16(), answer.proxy_status))
}

/// A peer whose streams lead to a target that does not read makes the gateway hold its part of the memory and no more; then its
/// new flows are refused, its established ones live on, and another peer does not notice.
///
/// Failure: limits.
#[test]
fn a_peer_beyond_its_memory_is_refused_and_others_are_not() -> Result<()> {
    const CONNECTIONS: usize = 4;
    const STREAMS: u32 = 100;
    const PEER: u64 = 16 * MIB;
    let world = World::new()?;
    world.buffers_of_64_kib()?;
    let mut daemon = gateway(&world, "memory = \"64MiB\"\npeer_memory = \"16MiB\"", "")?;
    let gate = Gate::default();
    let closed = gate.clone();
    let stuck = world.serve(TARGET4, move |stream: &TcpStream| {
        closed.wait();
        std::io::copy(&mut { stream }, &mut std::io::sink()).map(drop)
    })?;
    let echo = world.serve(TARGET4, target::echo())?;
    let greedy = world.pki().issue("greedy", "spiffe://test.tunnel/greedy", &[])?;
    let before = daemon.process().memory()?;
    let (who, authority) = (&greedy, stuck.addr().to_string());
    let refused = world.node().block_on(|| async move {
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let (requests, connection) = peer::connect(at(), peer::tls(who)?).await?;
            let driving = tokio::task::spawn_local(connection);
            let mut requests = requests.ready().await?;
            let (mut streams, mut refused) = (Vec::new(), None);
            for _ in 0..STREAMS {
                let (response, mut send) = requests.send_request(connect_request(&authority)?, false)?;
                let response = timeout(PATIENCE, response).await.context("no answer")??;
                if response.status() != 200 {
                    refused = Some(response);
                    break;
                }
                // As much as its window takes; the rest waits in this process.
                send.send_data(vec![0; 1 << 20].into(), false)?;
                streams.push((send, response));
                requests = requests.ready().await?;
            }
            connections.push((driving, requests, streams));
            if refused.is_some() {
                return anyhow::Ok((refused, connections.iter().map(|(.., streams)| streams.len()).sum()));
            }
            sleep(Duration::from_millis(500)).await;
        }
        Ok((None, 0usize))
    })?;
    let (refused, streams) = refused;
    let refused = refused.context("all of its flows were taken")?;
    assert_eq!(refused.status(), 503);
    let why = refused.headers()["proxy-status"].to_str()?.to_owned();
    assert!(why.contains("memory"), "{why}");
    let kept = daemon.process().memory()?.saturating_sub(before);
    println!("{streams} streams, {} MiB kept", kept / MIB);
    // What is not counted: tasks, TLS records on their way.
    assert!(kept < PEER + 16 * MIB, "{} MiB are kept", kept / MIB);
    // Its connections have ended; another peer is served at once in any case.
    assert_eq!(status(&world, &world.pki().named("node"), echo.addr())?.0, 200);
    gate.open();
    assert!(daemon.stop_and_count("ended_peer_memory")? > 0);
    Ok(())
}

/// A peer that has as many connections as it may has the next one closed after its handshake; another peer connects.
///
/// Failure: limits.
#[test]
fn beyond_its_connections_a_peer_is_closed_and_others_are_not() -> Result<()> {
    let world = World::new()?;
    let mut daemon = gateway(&world, "peer_connections = 3", "")?;
    let echo = world.serve(TARGET4, target::echo())?;
    let (greedy, node) =
        (world.pki().issue("greedy", "spiffe://test.tunnel/greedy", &[])?, world.pki().named("node"));
    let (who, other) = (&greedy, &node);
    let authority = echo.addr().to_string();
    world.node().block_on(|| async move {
        let served = async |who: &Credentials| {
            let (requests, connection) = peer::connect(at(), peer::tls(who)?).await?;
            let driving = tokio::task::spawn_local(connection);
            let (response, send) =
                requests.ready().await?.send_request(connect_request(&authority)?, false)?;
            let response = timeout(PATIENCE, response).await.context("no answer")??;
            anyhow::Ok((driving, send, response))
        };
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(served(who).await?);
        }
        assert!(served(who).await.is_err(), "a fourth was served");
        served(other).await.context("another peer")?;
        // One ends, and makes room.
        let (driving, ..) = held.remove(0);
        driving.abort();
        let since = Instant::now();
        while served(who).await.is_err() {
            assert!(since.elapsed() < PATIENCE, "there is no room for another");
            sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    })?;
    daemon.process().wait_for_line("the limit of 3 connections of one peer is reached")?;
    assert!(daemon.stop_and_count("connections_over_limit")? > 0);
    Ok(())
}

/// A peer that begins more flows in a second than it may has the rest refused with 503, and the next second it has as many again.
///
/// Failure: limits.
#[test]
fn beyond_its_new_flows_in_a_second_a_peer_is_refused() -> Result<()> {
    const RATE: usize = 20;
    let world = World::new()?;
    let mut daemon = gateway(&world, &format!("peer_flows_per_second = {RATE}"), "")?;
    let echo = world.serve(TARGET4, target::echo())?;
    let (config, authority) = (peer::tls(&world.pki().named("node"))?, echo.addr().to_string());
    let (taken, again) = world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(at(), config).await?;
        let _driving = tokio::task::spawn_local(connection);
        let mut burst = async || {
            let mut waiting = Vec::new();
            for _ in 0..3 * RATE {
                requests = requests.clone().ready().await?;
                waiting.push(requests.send_request(connect_request(&authority)?, true)?.0);
            }
            let mut taken = 0;
            for response in waiting {
                let status = response.await?.status().as_u16();
                assert!(status == 200 || status == 503, "{status}");
                taken += usize::from(status == 200);
            }
            anyhow::Ok(taken)
        };
        let taken = burst().await?;
        sleep(Duration::from_millis(1100)).await;
        anyhow::Ok((taken, burst().await?))
    })?;
    // A burst takes a moment itself.
    assert!((RATE..2 * RATE).contains(&taken) && (RATE..2 * RATE).contains(&again), "{taken}, {again}");
    assert!(daemon.stop_and_count("ended_peer_rate")? > 0);
    Ok(())
}

/// A flow on which no byte moves, and one that lasts too long, are reset with their reasons; one that talks goes on.
///
/// Failure: limits.
#[test]
fn a_flow_without_bytes_and_one_that_lasts_too_long_are_reset_with_their_reasons() -> Result<()> {
    let world = World::new()?;
    let echo = world.serve(TARGET4, target::echo())?;
    for (limits, talks, reason) in [
        ("flow_idle_timeout = \"2s\"", false, "idle_timeout"),
        ("flow_max_duration = \"2s\"", true, "max_duration"),
    ] {
        let mut daemon = gateway(&world, limits, "")?;
        let (who, authority) = (world.pki().named("node"), echo.addr().to_string());
        let ended = world.node().block_on(|| async move {
            let (mut sender, mut receiver) = raw::connect(at(), &who).await?;
            raw::settle(&mut sender, &mut receiver).await?;
            for stream in [1, 3] {
                sender.frame(HEADERS, END_HEADERS, stream, &raw::connect_block(&authority)).await?;
            }
            let start = Instant::now();
            let mut ended = Vec::new();
            while ended.len() < 1 + usize::from(talks) && start.elapsed() < PATIENCE {
                // One of them talks.
                sender.frame(DATA, 0, 3, b"x").await?;
                while let Ok(Ok(Some(Frame { kind, stream, .. }))) =
                    timeout(Duration::from_millis(100), receiver.frame()).await
                {
                    if kind == raw::RST_STREAM {
                        ended.push(stream);
                    }
                }
            }
            assert!(start.elapsed() >= Duration::from_secs(1), "after {:?}", start.elapsed());
            anyhow::Ok(ended)
        })?;
        assert!(ended.contains(&1), "{reason}: {ended:?}");
        assert_eq!(ended.contains(&3), talks, "{reason}: {ended:?}");
        daemon.process().wait_for_line(&format!("reason={reason}"))?;
        daemon.process().stop()?;
    }
    Ok(())
}

/// While a member of one captured group opens and resets connections as fast as it can, the connections of another group all reach
/// their own destination.
///
/// Failure: misbehaviour.
#[test]
fn heavy_a_group_that_connects_as_fast_as_it_can_takes_nothing_from_another() -> Result<()> {
    const CONNECTIONS: u32 = 100;
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let (echo, other) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET4, target::echo())?);
    let (node, quiet) = (Node::new(&world)?, Cgroup::new()?);
    let second = format!("[[capture]]\ncgroup = \"{}\"\n", quiet.path().display());
    let config = node.config(&gateway, "workers = 1", "") + &second;
    let mut daemon = node.daemon(&config)?;
    daemon.process().wait_for_line(&quiet.path().display().to_string())?;
    let mut hostile = node.app(&["churn", &other.addr().to_string(), "4"])?;
    hostile.wait_for_line("churning")?;
    let mut command = world.node().command(programs::app()?);
    command.args(["now-and-then", &echo.addr().to_string(), &CONNECTIONS.to_string(), "20"]);
    quiet.adopt(&mut command)?;
    let mut app = Process::spawn("quiet", world.folder(), command)?;
    app.wait(PATIENCE)?;
    hostile.hang_up();
    hostile.wait_for_line("made=")?;
    hostile.wait(PATIENCE)?;
    let out = app.stdout();
    let took: Vec<u64> = out
        .lines()
        .map(|line| {
            assert!(line.ends_with("ok=true"), "{line}");
            let took = line.split("took=").nth(1).and_then(|rest| rest.split(' ').next());
            took.context("no time")?.parse().context("no number")
        })
        .collect::<Result<_>>()?;
    println!("{}; the slowest of {} took {:?} ms", hostile.stdout().trim(), took.len(), took.iter().max());
    assert_eq!((took.len(), echo.peers().len()), (CONNECTIONS as usize, CONNECTIONS as usize));
    assert!(took.iter().all(|ms| *ms < 10_000), "{took:?}");
    daemon.process().stop()?;
    Ok(())
}

/// A connection without a stream is closed with GOAWAY(NO_ERROR) after the listener's `idle_timeout`.
#[test]
fn a_connection_without_a_stream_is_closed_after_its_idle_timeout() -> Result<()> {
    let world = World::new()?;
    let _daemon = gateway(&world, "", "idle_timeout = \"1s\"")?;
    let who = world.pki().named("node");
    let frames = world.node().block_on(|| async move {
        let (mut sender, mut receiver) = raw::connect(at(), &who).await?;
        let mut frames = Vec::new();
        while let Some(frame) = receiver.frame().await? {
            // A graceful GOAWAY waits for what is on its way, for a round trip.
            if frame.kind == PING && frame.flags & ACK == 0 {
                sender.frame(PING, ACK, 0, &frame.payload).await?;
            }
            frames.push(frame);
        }
        anyhow::Ok(frames)
    })?;
    let goaway = frames.iter().rfind(|f| f.kind == GOAWAY).and_then(Frame::code);
    assert_eq!(goaway, Some(0), "{frames:?}");
    Ok(())
}
