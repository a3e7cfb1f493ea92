//! Another configuration for a daemon that runs: new flows have it, old ones keep what they had.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use h2::client::SendRequest;
use http::StatusCode;
use tunnel_tests::{
    PATIENCE, Process, TARGET4, World,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    dialogue::ask,
    gateway,
    node::Node,
    peer::{self, connect_request},
    pki::GATEWAY_ID,
    programs, target, wait_for,
    world::{NET4, NODE4},
};

const FIRST: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
const SECOND: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 1);

/// How often something is told anew under load.
const TIMES: usize = 20;

/// A gateway's configuration: where it listens, and whom it lets reach what.
fn gateway(world: &World, listen: &[SocketAddr], policies: &str) -> String {
    let listeners: String = listen.iter().map(|a| format!("[[listener]]\naddress = \"{a}\"\n")).collect();
    format!(
        "[daemon]\nworkers = 2\n{}{listeners}[[route]]\nto = \"direct\"\n{policies}",
        world.pki().named("gateway").toml()
    )
}

const ANY: &str = "[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n";

/// After a reload new flows take the new upstream, and established ones keep theirs.
#[test]
fn new_flows_take_another_upstream_and_old_ones_keep_theirs() -> Result<()> {
    let world = World::new()?;
    let (first, second) = (world.gateway().start()?, world.gateway().listen(SECOND).start()?);
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&first, "", ""))?;
    let mut old = node.hold(&target)?;
    let carried = |gateway: &tunnel_tests::Gateway<'_>| gateway.log().matches("tunnel accepted").count();
    assert_eq!((carried(&first), carried(&second)), (1, 0));

    daemon.tell(&node.config(&second, "", ""))?;
    let mut new = node.hold(&target)?;
    assert_eq!((carried(&first), carried(&second)), (1, 1));
    for app in [&mut old, &mut new] {
        assert_eq!(ask(app, "ping")?, "ok");
        assert_eq!(ask(app, "peer")?, target.addr().to_string(), "each sees the address that it asked for");
    }
    old.hang_up();
    old.wait(PATIENCE)?;
    // Nobody uses the first upstream any more: its connection is closed, long before it would be for idleness.
    wait_for("the end of the old connection", PATIENCE, || {
        let sockets = world.net().sockets().ok()?;
        (!sockets.iter().any(|s| s.established() && s.local == FIRST)).then_some(())
    })?;
    assert_eq!(ask(&mut new, "ping")?, "ok");
    Ok(())
}

/// After a reload both kept and new upstreams follow their endpoints.
#[test]
fn an_upstream_that_stays_follows_its_endpoints_and_one_that_is_new_does_too() -> Result<()> {
    let world = World::new()?;
    let (first, second) = (world.gateway().start()?, world.gateway().listen(SECOND).start()?);
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let file = |name: &str, at: SocketAddr| world.file(&format!("{name}.endpoints"), format!("{at}\n"));
    file("east", FIRST)?;
    let of_file = |name: &str| {
        let fixed = format!("endpoints = [\"{}\"]", first.addr());
        node.config(&first, "", "").replace(&fixed, &format!("endpoints_file = \"{name}.endpoints\""))
    };
    let carried =
        |gateway: &tunnel_tests::Gateway<'_>| gateway.log().matches("reason=closed destination=").count();
    let flows_reach = |gateway: &tunnel_tests::Gateway<'_>| {
        let before = carried(gateway);
        wait_for("a flow through the other gateway", PATIENCE, || {
            let mut app = node.hold(&target).ok()?;
            app.hang_up();
            app.wait(PATIENCE).ok()?;
            (carried(gateway) > before).then_some(())
        })
    };
    let mut daemon = node.daemon(&of_file("east"))?;
    flows_reach(&first)?;
    // Something else changes, and the upstream stays.
    daemon.tell(&format!("{}[[route]]\nto = \"deny\"\n", of_file("east")))?;
    file("east", SECOND)?;
    flows_reach(&second)?;
    // Another file, so another upstream.
    file("west", FIRST)?;
    daemon.tell(&of_file("west"))?;
    flows_reach(&first)?;
    file("west", SECOND)?;
    flows_reach(&second)?;
    let answers = daemon.answers();
    assert!(
        answers.len() == 2 && answers.iter().all(|a| a.contains("reloaded configuration")),
        "{answers:?}"
    );
    Ok(())
}

/// A configuration with mistakes changes nothing, and every mistake is logged.
///
/// Failure: fails-half-way.
#[test]
fn a_file_with_mistakes_changes_nothing_and_every_mistake_is_named() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let good = node.config(&gateway, "", "");
    let mut daemon = node.daemon(&good)?;
    let mut app = node.hold(&target)?;
    daemon.tell(&good.replace("[[route]]", "[[rout]]").replace("endpoints", "endpoint"))?;
    let log = daemon.log();
    assert!(log.contains("keeping the previous configuration"), "{log}");
    for mistake in ["rout", "did you mean `route`", "upstream.endpoints: is missing"] {
        assert!(log.contains(mistake), "no {mistake} in {log}");
    }
    assert_eq!(ask(&mut app, "ping")?, "ok");
    node.hold(&target)?;
    // The same again, on demand.
    daemon.hang_up()?;
    assert_eq!(daemon.answers().len(), 2, "{:?}", daemon.answers());
    node.hold(&target)?;
    daemon.tell(&good)?;
    assert!(daemon.answers()[2].contains("reloaded configuration"), "{:?}", daemon.answers());
    node.hold(&target)?;
    Ok(())
}

/// A reload names each setting that needs a restart.
///
/// Failure: fails-half-way.
#[test]
fn what_a_running_daemon_cannot_change_is_named_with_its_remedy() -> Result<()> {
    let world = World::new()?;
    let config = gateway(&world, &[FIRST], ANY);
    let mut daemon = Daemon::start(&world, world.net(), &config)?;
    daemon.tell(&config.replace("workers = 2", "workers = 1"))?;
    let log = daemon.log();
    assert!(log.contains(": daemon.workers cannot change") && log.contains("--takeover"), "{log}");
    Ok(())
}

/// A reload of `relay` applies to new flows, and established ones continue.
#[test]
fn how_bytes_are_moved_changes_for_new_flows_and_old_ones_go_on() -> Result<()> {
    /// A flow is promoted after 16 wake-ups.
    const PINGS: usize = 100;
    let world = World::new()?;
    world.node().ip(&format!("route add default via {NET4}"))?;
    let echo = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let moved_by = |relay: &str| {
        format!(
            "[daemon]\nworkers = 1\nrelay = \"{relay}\"\n{}[[capture]]\ncgroup = \"{}\"\n[[route]]\nto = \"direct\"\n",
            node.bpffs.toml(),
            node.cgroup.path().display(),
        )
    };
    let chat = |app: &mut Process| -> Result<()> {
        for _ in 0..PINGS {
            assert_eq!(ask(app, "ping")?, "ok");
        }
        Ok(())
    };
    let mut daemon = node.daemon(&moved_by("copy"))?;
    let mut apps = Vec::new();
    for relay in ["splice", "pipe", "copy"] {
        let mut app = node.hold(&echo)?;
        chat(&mut app)?;
        apps.push(app);
        daemon.tell(&moved_by(relay))?;
        assert!(
            daemon.answers().iter().all(|answer| answer.contains("reloaded configuration")),
            "{}",
            daemon.log()
        );
        // Whatever moves them.
        apps.iter_mut().try_for_each(chat)?;
    }
    for mut app in apps {
        app.hang_up();
        app.wait(PATIENCE)?;
    }
    daemon.process().stop()?;
    let log = daemon.log();
    assert!(log.contains("(\"flows_spliced\", 1)"), "the second, and no other: {log}");
    let piped = log.split_once("(\"bytes_piped\", ").context("it counts")?.1;
    assert!(!piped.starts_with("0)"), "{log}");
    Ok(())
}

/// A reload of `include` and `exclude` applies to new connections.
#[test]
fn what_is_included_or_excluded_changes_for_new_connections() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let (far, near) = (world.serve(TARGET4, target::echo())?, world.serve(NET4, target::echo())?);
    let node = Node::new(&world)?;
    let only = |prefix: &str| node.config(&gateway, "", &format!("include = [\"{prefix}\"]"));
    let mut daemon = node.daemon(&only("10.200.0.0/24"))?;
    let mut app = node.hold(&far)?;
    node.hold(&near)?;
    assert_eq!(near.peers()[0].ip(), NODE4, "by itself");

    daemon.tell(&only("10.77.0.0/24"))?;
    node.hold(&near)?;
    assert_eq!(near.peers()[1].ip(), NET4, "through the gateway");
    assert_eq!(node.connect_error(&far)?, "ENETUNREACH", "by itself");
    assert_eq!(ask(&mut app, "ping")?, "ok", "what was captured goes on");
    assert_eq!(ask(&mut app, "peer")?, far.addr().to_string());
    app.hang_up();
    app.wait(PATIENCE)?;

    daemon.process().stop()?;
    let log = daemon.log();
    let captured = log.split_once("(\"captured\", ").context("it counts")?.1;
    assert!(captured.starts_with("2)"), "what both programs have counted: {captured}");
    Ok(())
}

/// A reload that spells the path of a captured cgroup in another way leaves it captured, and nothing in plaintext.
#[test]
fn a_group_whose_path_is_spelled_otherwise_stays_captured() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let target = world.serve(NET4, target::echo())?;
    let node = Node::new(&world)?;
    let path = node.cgroup.path().display().to_string();
    let config = node.config(&gateway, "", "on_failure = \"open\"");
    let mut daemon = node.daemon(&config)?;
    node.hold(&target)?;
    for spelled in [format!("{path}/"), path.replacen("/sys/", "/sys/./", 1), path.clone()] {
        daemon.tell(&config.replace(&format!("\"{path}\""), &format!("\"{spelled}\"")))?;
        for _ in 0..3 {
            node.hold(&target)?;
        }
    }
    assert_eq!(target.peers().len(), 10);
    assert!(target.peers().iter().all(|peer| peer.ip() == NET4), "{:?}", target.peers());
    daemon.process().stop()?;
    Ok(())
}

/// A reload attaches a new capture and detaches a removed one.
#[test]
fn a_group_is_captured_from_now_on_and_another_is_let_go() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let other = Cgroup::new()?;
    let mut command = world.node().command(programs::app()?);
    command.args(["reconnect", &target.addr().to_string()]);
    other.adopt(&mut command)?;
    let mut there = Process::spawn_with_input("app", world.folder(), command)?;
    there.wait_for_line("ready=1")?;

    let one = node.config(&gateway, "", "");
    let mut daemon = node.daemon(&one)?;
    let mut held = node.hold(&target)?;
    assert_eq!(ask(&mut there, "once")?, "ENETUNREACH");
    let path = |group: &Cgroup| group.path().display().to_string();
    daemon.tell(&format!("{one}[[capture]]\ncgroup = \"{}\"\n", path(&other)))?;
    assert_eq!(ask(&mut there, "once")?, "ok");
    node.hold(&target)?;

    daemon.tell(&one.replace(&path(&node.cgroup), &path(&other)))?;
    assert_eq!(node.connect_error(&target)?, "ENETUNREACH", "nothing is attached any more");
    assert_eq!(ask(&mut there, "once")?, "ok");
    assert_eq!(ask(&mut held, "ping")?, "ok", "what was captured goes on");
    let pins = node.bpffs.pins();
    let of = |group: &Cgroup| {
        let name = group
            .path()
            .file_name()
            .map(|n| n.to_string_lossy().replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
        pins.iter().filter(|p| name.as_ref().is_some_and(|n| p.to_string_lossy().contains(n))).count()
    };
    assert!(of(&other) > 0 && of(&node.cgroup) == 0, "{pins:?}");
    Ok(())
}

/// A CONNECT on a connection that is there already; its status, and the stream when that is 200.
async fn request(
    requests: &mut SendRequest<Bytes>,
    authority: &str,
) -> Result<(StatusCode, h2::SendStream<Bytes>, h2::RecvStream)> {
    let mut ready = requests.clone().ready().await?;
    let (response, send) = ready.send_request(connect_request(authority)?, false)?;
    let response = response.await?;
    Ok((response.status(), send, response.into_body()))
}

/// Sends a byte and waits for it to come back.
async fn ping(send: &mut h2::SendStream<Bytes>, body: &mut h2::RecvStream) -> Result<()> {
    send.send_data(Bytes::from_static(b"x"), false)?;
    let back = body.data().await.context("the stream has ended")??;
    body.flow_control().release_capacity(back.len())?;
    Ok(())
}

/// An unchanged listener keeps its connections over a reload, and their streams are subject to the new policies.
#[test]
fn a_listener_that_is_the_same_keeps_its_connections_and_their_streams_have_the_new_policies() -> Result<()> {
    let world = World::new()?;
    let serving = world.serve(TARGET4, target::echo())?;
    let target = serving.addr().to_string();
    let with = |policies: &str| gateway(&world, &[FIRST], policies);
    let mut daemon = Daemon::start(&world, world.net(), &with(ANY))?;
    let config = peer::tls(&world.pki().named("node"))?;
    world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(FIRST, config).await?;
        let driving = tokio::task::spawn_local(connection);
        let (status, mut send, mut body) = request(&mut requests, &target).await?;
        assert_eq!(status, 200);
        ping(&mut send, &mut body).await?;
        let none = "[[policy]]\nidentity = \"any\"\ntarget = [\"192.0.2.0/24\"]\n";
        daemon.tell(&with(none))?;
        assert_eq!(request(&mut requests, &target).await?.0, 403, "on the same connection");
        assert!(ping(&mut send, &mut body).await.is_err(), "what was allowed has ended");
        daemon.tell(&with(ANY))?;
        assert_eq!(request(&mut requests, &target).await?.0, 200);
        driving.abort();
        let _aborted = driving.await;
        Ok(())
    })
}

/// A removed listener closes its port, and its streams continue.
#[test]
fn a_listener_that_is_taken_out_closes_its_port_and_its_streams_go_on() -> Result<()> {
    let world = World::new()?;
    let serving = world.serve(TARGET4, target::echo())?;
    let target = serving.addr().to_string();
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&world, &[FIRST], ANY))?;
    let moved = gateway(&world, &[SECOND], ANY);
    let config = peer::tls(&world.pki().named("node"))?;
    world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(FIRST, config.clone()).await?;
        let driving = tokio::task::spawn_local(connection);
        let (_, mut send, mut body) = request(&mut requests, &target).await?;
        daemon.tell(&moved)?;
        ping(&mut send, &mut body).await?;
        // GOAWAY: nothing new on the old connection.
        assert!(request(&mut requests, &target).await.is_err());
        let refused = tokio::net::TcpStream::connect(FIRST).await.map_err(|e| e.kind());
        assert_eq!(refused.err(), Some(std::io::ErrorKind::ConnectionRefused));
        let (mut requests, connection) = peer::connect(SECOND, config).await?;
        let other = tokio::task::spawn_local(connection);
        assert_eq!(request(&mut requests, &target).await?.0, 200);
        ping(&mut send, &mut body).await?;
        for driving in [driving, other] {
            driving.abort();
            let _aborted = driving.await;
        }
        Ok(())
    })
}

/// A reload that cannot open a listener changes nothing.
///
/// Failure: fails-half-way.
#[test]
fn what_cannot_be_opened_leaves_everything_as_it_was() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let busy = world.serve(NET4, target::echo())?;
    let config = gateway(&world, &[FIRST], ANY);
    let mut daemon = Daemon::start(&world, world.net(), &config)?;
    let none = "[[policy]]\nidentity = \"any\"\ntarget = [\"192.0.2.0/24\"]\n";
    daemon.tell(&gateway(&world, &[FIRST, SECOND, busy.addr()], none))?;
    let said = daemon.answers().remove(0);
    assert!(said.contains("failed to reload") && said.contains(&busy.addr().to_string()), "{said}");
    let ask = |gateway| {
        let request = connect_request(&target.addr().to_string())?;
        peer::ask(world.node(), gateway, &world.pki().named("node"), request)
    };
    assert_eq!(ask(FIRST)?.status, 200, "with the old policy");
    assert!(ask(SECOND).is_err(), "what could be opened is closed again");
    Ok(())
}

/// No connection is refused during repeated reloads.
#[test]
fn no_connection_is_refused_while_the_configuration_changes_again_and_again() -> Result<()> {
    let world = World::new()?;
    let (first, second) = (world.gateway().start()?, world.gateway().listen(SECOND).start()?);
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    // Upstreams, rules and names change.
    let config = |turn: usize| {
        let gateway = if turn.is_multiple_of(2) { &first } else { &second };
        let exclude = format!("name = \"turn-{turn}\"\nexclude = [\"192.0.2.{turn}/32\"]");
        node.config(gateway, "", &exclude)
    };
    let mut daemon = node.daemon(&config(0))?;
    let mut busy = node.app(&["keep-connecting", &target.addr().to_string()])?;
    busy.wait_for_line("started=1")?;
    let mut held = node.hold(&target)?;
    for turn in 1..=TIMES {
        let before = target.peers().len();
        daemon.tell(&config(turn))?;
        wait_for("the load", PATIENCE, || (target.peers().len() > before + 5).then_some(()))?;
        assert_eq!(ask(&mut held, "ping")?, "ok");
    }
    busy.hang_up();
    assert!(busy.wait(PATIENCE)?.success(), "{busy}");
    let answers = daemon.answers();
    assert!(
        answers.len() == TIMES && answers.iter().all(|a| a.contains("reloaded configuration")),
        "{answers:?}"
    );
    Ok(())
}

/// SIGHUP without a configuration file is logged and changes nothing.
#[test]
fn a_daemon_without_a_file_says_so_and_goes_on() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    gateway.process().signal(nix::sys::signal::Signal::SIGHUP)?;
    gateway.process().wait_for_line("no configuration file")?;
    let agent = format!("{}{}", world.pki().named("node").toml(), through(gateway.addr(), GATEWAY_ID));
    let exec = world.exec_with(&world.file("agent.toml", agent)?);
    assert!(exec.run_app(&["duplex", &target.addr().to_string(), "1"]).is_ok());
    Ok(())
}
