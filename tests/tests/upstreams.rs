//! Endpoints that fail, connections that end, limits that are reached.

use std::{
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tokio::{net::TcpListener, sync::watch};
use tokio_rustls::TlsAcceptor;
use tunnel_tests::{
    PATIENCE, Process, TARGET4, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    dialogue::ask,
    gateway,
    hop::{acceptor, echo},
    pki::GATEWAY_ID,
    programs, target, wait_for,
    world::NET4,
};

/// For `tunnel exec`: one worker, so that what one flow finds out holds for the next.
fn agent(world: &World, endpoints: &[SocketAddr]) -> Result<std::path::PathBuf> {
    let endpoints: Vec<_> = endpoints.iter().map(|e| format!("\"{e}\"")).collect();
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[route]]\nto = [{{ upstream = \"gateway\" }}]\n[[upstream]]\nname = \"gateway\"\n\
         endpoints = [{}]\nverify = [\"{GATEWAY_ID}\"]\nbalance = \"round_robin\"\n",
        world.pki().named("node").toml(),
        endpoints.join(", ")
    );
    world.file("agent.toml", config)
}

/// A dead endpoint is skipped, ejected, and used again when it is back.
///
/// Failure: endpoint-down.
#[test]
fn a_dead_endpoint_is_passed_over_ejected_and_found_again_when_it_is_back() -> Result<()> {
    let world = World::new()?;
    let (a, b) = (SocketAddr::new(NET4, gateway::PORT), SocketAddr::new(NET4, gateway::PORT + 1));
    let mut alive = world.gateway().listen(a).start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let exec = world.exec_with(&agent(&world, &[a, b])?).flag("--log", "info");
    let mut app = exec.spawn_app(&["reconnect", &target.addr().to_string()])?;
    app.says("ready=1")?;
    // Nobody listens at b: no flow notices.
    for _ in 0..10 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    assert!(app.says("ejected")?.contains(&b.to_string()));
    // Now b is there, and a goes.
    let mut second = world.gateway().listen(b).start()?;
    assert!(app.says("readmitted")?.contains(&b.to_string()));
    for _ in 0..10 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    second.logs("reason=closed destination=")?;
    alive.kill()?;
    for _ in 0..10 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    // And when b goes too, flows fail at once, and the log says that none is left.
    second.kill()?;
    for _ in 0..10 {
        assert_eq!(ask(app.process(), "once")?, "ECONNRESET");
    }
    app.says("no endpoint is left")?;
    alive.start_again()?;
    wait_for("a flow", PATIENCE, || (ask(app.process(), "once").ok()? == "ok").then_some(()))?;
    assert!(app.finish()?.success());
    Ok(())
}

/// A gateway that does what it is told: it answers 200, echoes, and says GOAWAY when `leave` says so.
async fn scripted(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    leave: watch::Receiver<usize>,
    connections: Arc<AtomicUsize>,
) -> Result<()> {
    loop {
        let (tcp, _) = listener.accept().await?;
        let number = connections.fetch_add(1, Ordering::Relaxed) + 1;
        let (acceptor, mut leave) = (acceptor.clone(), leave.clone());
        tokio::task::spawn_local(async move {
            let tls = acceptor.accept(tcp).await?;
            let mut connection = h2::server::handshake(tls).await?;
            let mut leaving = false;
            loop {
                tokio::select! {
                    stream = connection.accept() => match stream {
                        Some(stream) => {
                            let (request, respond) = stream?;
                            tokio::task::spawn_local(echo(request.into_body(), respond));
                        }
                        None => return anyhow::Ok(()),
                    },
                    _ = leave.wait_for(|n| *n >= number), if !leaving => {
                        leaving = true;
                        connection.graceful_shutdown();
                    }
                }
            }
        });
    }
}

/// After GOAWAY new streams open on another connection, and old ones finish.
///
/// Failure: connection-lost.
#[test]
fn after_goaway_new_streams_take_another_connection_and_old_ones_finish() -> Result<()> {
    let world = World::new()?;
    let addr = SocketAddr::new(NET4, gateway::PORT);
    let acceptor = acceptor(&world.pki().named("gateway"))?;
    let connections = Arc::new(AtomicUsize::new(0));
    let (tell, told) = watch::channel(0);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let counted = Arc::clone(&connections);
    let (ready, is_ready) = std::sync::mpsc::channel();
    let server = world.net().spawn("scripted", move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let listener = TcpListener::bind(addr).await?;
            let _test = ready.send(());
            tokio::select! {
                served = scripted(listener, acceptor, told, counted) => served,
                _ = stopped => Ok(()),
            }
        })
    })?;
    is_ready.recv_timeout(PATIENCE).context("the scripted gateway does not listen")?;

    // What it is asked for does not matter to the scripted gateway.
    let mut app = world.exec_with(&agent(&world, &[addr])?).spawn_app(&["hold", "10.200.0.10:80"])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    assert_eq!(ask(app.process(), "again")?, "ok");
    assert_eq!(connections.load(Ordering::Relaxed), 1, "both streams are on one connection");
    for leaving in 1..4 {
        tell.send_replace(leaving);
        // GOAWAY may be on its way: a request that crosses it is sent again.
        assert_eq!(ask(app.process(), "again")?, "ok");
        wait_for("a new connection", PATIENCE, || {
            let _answer = ask(app.process(), "again").ok()?;
            (connections.load(Ordering::Relaxed) == leaving + 1).then_some(())
        })?;
        assert_eq!(ask(app.process(), "again")?, "ok");
        assert_eq!(ask(app.process(), "ping")?, "ok", "the stream on the first connection goes on");
    }
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert!(!done.stdout.contains("ECONNRESET"), "not one flow failed: {done}");
    let _ended = stop.send(());
    server.join().ok().context("the scripted gateway panicked")??;
    Ok(())
}

/// A daemon with one worker that captures a group on the node; `limit` is put in front of it. `keys` are the daemon's,
/// `upstream` those of its upstream.
fn limited(world: &World, keys: &str, upstream: &str, limit: &[&str]) -> Result<(Cgroup, BpfFs, Process)> {
    let (cgroup, bpffs) = (Cgroup::new()?, BpfFs::new(world)?);
    let config = format!(
        "[daemon]\nworkers = 1\n{}{keys}\n{}[[capture]]\ncgroup = \"{}\"\n{}{upstream}\n",
        bpffs.toml(),
        world.pki().named("node").toml(),
        cgroup.path().display(),
        through(SocketAddr::new(NET4, gateway::PORT), GATEWAY_ID),
    );
    let config = world.file("limited.toml", config)?;
    let words: Vec<_> = limit.iter().map(std::path::PathBuf::from).chain([programs::tunnel()?]).collect();
    let mut command = world.node().command_ended_by(&words[0], Signal::SIGTERM);
    command.args(&words[1..]).args(["run", "--config"]).arg(config);
    let mut daemon = Process::spawn("daemon", world.folder(), command)?;
    daemon.wait_for_line("capturing")?;
    Ok((cgroup, bpffs, daemon))
}

/// An application in the group.
fn app(world: &World, cgroup: &Cgroup, word: &str, addr: SocketAddr) -> Result<Process> {
    let mut command: Command = world.node().command(programs::app()?);
    command.args([word, &addr.to_string()]);
    cgroup.adopt(&mut command)?;
    Process::spawn_with_input("app", world.folder(), command)
}

/// Holds connections until one more is refused; how many there were. They all live on.
fn fill(world: &World, cgroup: &Cgroup, addr: SocketAddr, most: usize) -> Result<usize> {
    let app = |word: &str| app(world, cgroup, word, addr);
    let mut held = Vec::new();
    let refused = loop {
        let mut one = app("hold")?;
        one.wait_for_line("held=1")?;
        match ask(&mut one, "ping")?.as_str() {
            "ok" => held.push(one),
            other => break other.to_owned(),
        }
        ensure!(held.len() <= most, "{} flows and no end", held.len());
    };
    assert_eq!(refused, "ECONNRESET");
    for one in &mut held {
        assert_eq!(ask(one, "ping")?, "ok", "an established flow lives on");
    }
    // A place that becomes free is taken again.
    let mut last = held.pop().context("there is one")?;
    last.hang_up();
    last.wait(PATIENCE)?;
    let mut next = app("reconnect")?;
    next.wait_for_line("ready=1")?;
    wait_for("a place", PATIENCE, || (ask(&mut next, "once").ok()? == "ok").then_some(()))?;
    Ok(held.len() + 1)
}

/// At `max_flows` new connections are refused, and established ones continue.
///
/// Failure: limits.
#[test]
fn at_the_limit_of_flows_new_connections_are_refused_and_established_ones_live_on() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let (cgroup, _bpffs, mut daemon) = limited(&world, "max_flows = 5", "", &["env"])?;
    assert_eq!(fill(&world, &cgroup, target.addr(), 5)?, 5);
    daemon.stop()?;
    assert!(daemon.stderr().contains("(\"over_limit\", "), "{}", daemon.stderr());
    Ok(())
}

/// At the limit of file descriptors new connections are refused, and established ones continue.
///
/// Failure: limits.
#[test]
fn at_the_limit_of_descriptors_new_connections_are_refused_and_established_ones_live_on() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    // 512 are kept for everything else, a flow that rides on a tunnel takes one.
    let (cgroup, _bpffs, mut daemon) = limited(&world, "", "", &["prlimit", "--nofile=520:520"])?;
    assert_eq!(fill(&world, &cgroup, target.addr(), 8)?, 8);
    daemon.stop()?;
    assert!(daemon.stderr().contains("(\"over_limit\", "), "{}", daemon.stderr());
    Ok(())
}

/// What an upstream with these limits takes at a time, and why it takes no more.
fn taken_by(limits: &str, most: usize) -> Result<(usize, String)> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let (cgroup, _bpffs, mut daemon) = limited(&world, "", limits, &["env"])?;
    let taken = fill(&world, &cgroup, target.addr(), most)?;
    daemon.stop()?;
    let log = daemon.stderr();
    ensure!(log.contains("(\"over_limit\", "), "{log}");
    Ok((taken, log))
}

/// `limits.streams` bounds the flows of an upstream, and established ones continue.
///
/// Failure: limits.
#[test]
fn an_upstream_takes_no_more_flows_than_its_limit_and_those_it_has_live_on() -> Result<()> {
    let (taken, log) = taken_by("limits = { streams = 3 }", 3)?;
    assert_eq!(taken, 3);
    assert!(log.contains("upstream gateway: the limit of 3 flows is reached"), "{log}");
    Ok(())
}

/// `limits.connections` bounds the connections of an upstream, and those are filled.
///
/// Failure: limits.
#[test]
fn an_upstream_opens_no_more_connections_than_its_limit_and_those_it_has_are_filled() -> Result<()> {
    let (taken, log) = taken_by("max_streams = 2\nlimits = { connections = 2 }", 4)?;
    assert_eq!(taken, 4);
    assert!(log.contains("upstream gateway: the limit of 2 connections is reached"), "{log}");
    Ok(())
}

/// `limits.pending` bounds the flows that wait for a connection, and those that wait get one.
///
/// Failure: limits.
#[test]
fn no_more_flows_wait_for_a_connection_than_the_limit_and_those_that_wait_get_one() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let addr = world.serve(TARGET4, target::echo())?;
    // It accepts, and says nothing.
    gateway.process().signal(Signal::SIGSTOP)?;
    let (cgroup, _bpffs, mut daemon) =
        limited(&world, "", "connect_timeout = \"60s\"\nlimits = { pending = 2 }", &["env"])?;
    let hold = || {
        let mut one = app(&world, &cgroup, "hold", addr.addr())?;
        one.wait_for_line("held=1")?;
        anyhow::Ok(one)
    };
    let mut waiting = [hold()?, hold()?];
    assert_eq!(ask(&mut hold()?, "ping")?, "ECONNRESET");
    daemon.wait_for_line("the limit of 2 flows that wait for a connection is reached")?;
    gateway.process().signal(Signal::SIGCONT)?;
    for one in &mut waiting {
        assert_eq!(ask(one, "ping")?, "ok");
    }
    // There is a connection now: nobody has to wait.
    assert_eq!(ask(&mut hold()?, "ping")?, "ok");
    drop(waiting);
    daemon.stop()?;
    Ok(())
}

/// At a gateway's `max_flows` requests are answered with 503, and established flows continue.
///
/// Failure: limits.
#[test]
fn at_a_gateways_limit_of_flows_requests_are_503_and_established_ones_live_on() -> Result<()> {
    let world = World::new()?;
    let addr = SocketAddr::new(NET4, gateway::PORT);
    let config = format!(
        "[daemon]\nworkers = 1\nmax_flows = 3\n{}[[listener]]\naddress = \"{addr}\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    let _daemon = Daemon::start(&world, world.net(), &config)?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut app =
        world.exec_with(&agent(&world, &[addr])?).spawn_app(&["swarm", &target.addr().to_string(), "3"])?;
    app.says("swarm=3")?;
    let more = world.exec_with(&agent(&world, &[addr])?).run_app(&[
        "expect-reset",
        &target.addr().to_string(),
        "1",
    ])?;
    assert_eq!(more.value("ended")?, "ECONNRESET", "{more}");
    assert!(more.stderr.contains("503") && more.stderr.contains("connection_limit_reached"), "{more}");
    assert!(app.process().ended()?.is_none() && !app.process().stdout().contains("ends="));
    Ok(())
}

/// One identity cannot take all flows of a gateway.
#[test]
fn one_identity_cannot_take_all_flows_of_a_gateway() -> Result<()> {
    let world = World::new()?;
    let addr = SocketAddr::new(NET4, gateway::PORT);
    let config = format!(
        "[daemon]\nworkers = 1\nmax_flows = 8\n{}[[listener]]\naddress = \"{addr}\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    let _daemon = Daemon::start(&world, world.net(), &config)?;
    let target = world.serve(TARGET4, target::echo())?;
    let to = target.addr().to_string();
    let mut greedy = world.exec_with(&agent(&world, &[addr])?).spawn_app(&["swarm", &to, "6"])?;
    greedy.says("swarm=6")?;
    let more = world.exec_with(&agent(&world, &[addr])?).run_app(&["expect-reset", &to, "1"])?;
    assert_eq!(more.value("ended")?, "ECONNRESET", "{more}");
    assert!(more.stderr.contains("503") && more.stderr.contains("limit of 6 flows"), "{more}");

    let other = world.pki().issue("other", "spiffe://test.tunnel/other", &[])?;
    let config = format!("{}{}", other.toml(), through(addr, GATEWAY_ID));
    let other = world.file("other.toml", config)?;
    let mut modest = world.exec_with(&other).spawn_app(&["swarm", &to, "2"])?;
    modest.says("swarm=2")?;
    assert!(greedy.process().ended()?.is_none() && !greedy.process().stdout().contains("ends="));
    Ok(())
}
