//! An upstream that is reached through another one: what is inside stays inside, and is a byte stream to the end.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, World,
    daemon::Daemon,
    dialogue::ask,
    gateway,
    node::Node,
    pki::{Credentials, GATEWAY_ID, NODE_ID},
    stopped, target, wait_for,
};

const MIB: u64 = 1 << 20;
/// The only one that the node reaches.
const OUTER: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// The node has no route to it.
const INNER: SocketAddr = SocketAddr::new(TARGET4, gateway::PORT + 1);
/// Nor to it.
const INNERMOST: SocketAddr = SocketAddr::new(TARGET4, gateway::PORT + 2);

/// How a gateway is spoken to: HTTP version, TLS.
type How = (&'static str, bool);

/// A gateway in `net` that dials what it is asked for, as far as `allow` goes.
fn gateway_as(world: &World, who: &Credentials, at: SocketAddr, how: How, allow: &str) -> Result<Daemon> {
    let ((protocol, tls), identity) = (how, who.toml());
    let config = format!(
        "[daemon]\nworkers = 1\n{identity}[[listener]]\naddress = \"{at}\"\nprotocols = [\"{protocol}\"]\ntls = {tls}\n\
         [[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"{allow}\"]\n"
    );
    Daemon::start(world, world.net(), &config)
}

fn gateway(world: &World, at: SocketAddr, how: How, allow: &str) -> Result<Daemon> {
    gateway_as(world, &world.pki().named("gateway"), at, how, allow)
}

/// One that lets through what leads to `next`, and nothing else.
fn outer(world: &World, how: How, next: SocketAddr) -> Result<Daemon> {
    gateway(world, OUTER, how, &format!("{}/32:{}", next.ip(), next.port()))
}

/// One that lets through to every target.
fn inner(world: &World, how: How) -> Result<Daemon> {
    gateway(world, INNER, how, "10.200.0.0/24")
}

fn upstream(name: &str, at: &str, (protocol, tls): How, via: Option<&str>) -> String {
    let verify = if tls { format!("verify = [\"{GATEWAY_ID}\"]\n") } else { String::new() };
    let via = via.map(|via| format!("via = \"{via}\"\n")).unwrap_or_default();
    format!(
        "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{at}\"]\nprotocol = \"{protocol}\"\ntls = {tls}\n{verify}{via}"
    )
}

/// For `tunnel exec`: everything goes through `inner`; whoever goes through another is named before it.
fn agent(world: &World, upstreams: &[String]) -> Result<PathBuf> {
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[route]]\nto = [{{ upstream = \"inner\" }}]\n{}",
        world.pki().named("node").toml(),
        upstreams.concat()
    );
    world.file("agent.toml", config)
}

fn double(world: &World, outer: How, inner: How) -> Result<PathBuf> {
    let inner = upstream("inner", &INNER.to_string(), inner, Some("outer"));
    agent(world, &[inner, upstream("outer", &OUTER.to_string(), outer, None)])
}

const H2: How = ("h2", true);

/// In a nested tunnel the outer gateway carries one stream to the inner one, which alone sees target and
/// client.
#[test]
fn the_outer_gateway_carries_one_stream_to_the_inner_one_which_alone_sees_the_target_and_who_asks()
-> Result<()> {
    const BYTES: u64 = 4 * MIB;
    let world = World::new()?;
    let (mut outer, mut inner) = (outer(&world, H2, INNER)?, inner(&world, H2)?);
    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let addr = target.addr().to_string();
    let exec = world.exec_with(&double(&world, H2, H2)?);
    let done = exec.run_app(&["duplex", &addr, &BYTES.to_string()])?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    let flow = &done.flows()?[0];
    let via = &flow["via"]["tunnel"];
    assert_eq!((via["upstream"].as_str(), via["peer"].as_str()), (Some("inner"), Some(&*INNER.to_string())));
    assert_eq!(flow["identity"], GATEWAY_ID, "{flow}");

    let line = inner.process().wait_for_line("reason=closed destination=")?;
    assert!(line.contains(&addr) && line.contains(NODE_ID), "{line}");
    // What the outer one carried was the connection, which ended by itself: it was closed before the outer one was.
    let line = outer.process().wait_for_line("reason=closed destination=")?;
    assert!(line.contains(&format!("destination={INNER} ")) && line.contains(NODE_ID), "{line}");
    assert!(!outer.log().contains(&addr), "{}", outer.log());
    Ok(())
}

/// Bytes both ways at once, ends that come one after the other, resets of either side.
fn assert_byte_stream(world: &World, agent: &Path, what: &str) -> Result<()> {
    const BYTES: u64 = 2 * MIB;
    let exec = || world.exec_with(agent);
    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let done = exec().run_app(&["duplex", &target.addr().to_string(), &BYTES.to_string()])?;
    assert!(done.success(), "{what}: {done}");
    assert_eq!(target.outcomes(1)?, [Ok(())], "{what}");

    let target = world.serve(TARGET4, target::answer_after_end())?;
    for bytes in ["0", "300000"] {
        let done = exec().run_app(&["half-close", &target.addr().to_string(), bytes])?;
        assert!(done.success(), "{what}, {bytes} bytes: {done}");
        assert_eq!(done.value("answer")?, bytes, "{what}");
    }
    for bytes in [1, 300_000] {
        let target = world.serve(TARGET4, target::end_then_listen(bytes))?;
        let done = exec().run_app(&["hear-end-first", &target.addr().to_string(), &bytes.to_string()])?;
        assert!(done.success(), "{what}, {bytes} bytes: {done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "{what}, {bytes} bytes");
    }

    let target = world.serve(TARGET4, target::reset_after(200_000))?;
    let done = exec().run_app(&["expect-reset", &target.addr().to_string(), "200000"])?;
    assert_eq!(done.value("ended")?, "ECONNRESET", "{what}: {done}");
    let target = world.serve(TARGET4, target::expect_reset_after(200_000))?;
    let mut app = exec().spawn_app(&["reset", &target.addr().to_string(), "200000"])?;
    app.says("answered")?;
    app.tell("reset")?;
    assert!(app.finish()?.success(), "{what}");
    assert_eq!(target.outcomes(1)?, [Ok(())], "{what}");
    Ok(())
}

fn assert_pairs(pairs: &[(How, How)]) -> Result<()> {
    let world = World::new()?;
    for &(outside, inside) in pairs {
        let (_outer, _inner) = (outer(&world, outside, INNER)?, inner(&world, inside)?);
        assert_byte_stream(&world, &double(&world, outside, inside)?, &format!("{inside:?} in {outside:?}"))?;
    }
    Ok(())
}

/// HTTP/2 nested in HTTP/2 carries bytes, half-close and resets.
#[test]
fn http_2_inside_http_2_is_a_byte_stream() -> Result<()> {
    assert_pairs(&[(H2, H2), (("h2", false), ("h2", false))])
}

/// HTTP/1 nested in HTTP/2 carries bytes, half-close and resets.
#[test]
fn http_1_inside_http_2_is_a_byte_stream() -> Result<()> {
    assert_pairs(&[(H2, ("h1", true)), (H2, ("h1", false))])
}

/// HTTP/2 nested in HTTP/1 carries bytes, half-close and resets.
#[test]
fn http_2_inside_http_1_is_a_byte_stream() -> Result<()> {
    assert_pairs(&[(("h1", true), H2), (("h1", false), H2)])
}

/// HTTP/1 nested in HTTP/1 carries bytes, half-close and resets.
#[test]
fn http_1_inside_http_1_is_a_byte_stream() -> Result<()> {
    assert_pairs(&[(("h1", true), ("h1", true)), (("h1", false), ("h1", false))])
}

/// Three nested tunnels carry bytes, half-close and resets, and each gateway sees the next one only.
#[test]
fn three_deep_is_a_byte_stream_and_each_gateway_sees_the_next_one_only() -> Result<()> {
    const H1: How = ("h1", true);
    for [outside, middle, inside] in [[H2, H2, H2], [H2, H1, H1], [H1, H2, H1]] {
        let world = World::new()?;
        let outer = outer(&world, outside, INNER)?;
        let between = gateway(&world, INNER, middle, &format!("{TARGET4}/32:{}", INNERMOST.port()))?;
        let mut last = gateway(&world, INNERMOST, inside, "10.200.0.0/24")?;
        let upstreams = [
            upstream("inner", &INNERMOST.to_string(), inside, Some("between")),
            upstream("between", &INNER.to_string(), middle, Some("outer")),
            upstream("outer", &OUTER.to_string(), outside, None),
        ];
        assert_byte_stream(
            &world,
            &agent(&world, &upstreams)?,
            &format!("{inside:?} in {middle:?} in {outside:?}"),
        )?;
        let line = last.process().wait_for_line("reason=closed destination=")?;
        assert!(line.contains(NODE_ID), "{line}");
        for (of, next) in [(&outer, INNER), (&between, INNERMOST)] {
            let log = of.log();
            let flows: Vec<_> = log.lines().filter(|line| line.contains(" destination=")).collect();
            let all = flows.iter().all(|line| line.contains(&format!("destination={next} ")));
            assert!(!flows.is_empty() && all, "{log}");
        }
    }
    Ok(())
}

/// The outer gateway resolves the name of the inner one.
#[test]
fn an_inner_gateway_that_has_a_name_is_resolved_by_the_outer_one() -> Result<()> {
    let world = World::new()?;
    let name = format!("gw.inner.internal:{}", INNER.port());
    let outer = world.gateway().hosts(&format!("{TARGET4} gw.inner.internal\n"))?;
    let _outer = outer.allow_only(&[&name]).start()?;
    let _inner = inner(&world, H2)?;
    let target = world.serve(TARGET4, target::duplex(1000))?;
    let upstreams =
        [upstream("inner", &name, H2, Some("outer")), upstream("outer", &OUTER.to_string(), H2, None)];
    let exec = world.exec_with(&agent(&world, &upstreams)?);
    let done = exec.run_app(&["duplex", &target.addr().to_string(), "1000"])?;
    assert!(done.success(), "{done}");
    assert_eq!(done.flows()?[0]["via"]["tunnel"]["peer"], name.as_str());
    Ok(())
}

/// What is said of the only flow, which got nowhere.
fn refusal(world: &World, agent: &Path) -> Result<String> {
    let target = world.serve(TARGET4, target::echo())?;
    let done = world.exec_with(agent).run_app(&["expect-reset", &target.addr().to_string(), "10"])?;
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    assert_eq!(target.peers(), []);
    Ok(done.flows()?[0]["detail"].as_str().unwrap_or_default().to_owned())
}

/// An error of a nested tunnel names the hop that failed.
#[test]
fn whoever_fails_on_the_way_is_named() -> Result<()> {
    let world = World::new()?;
    let agent = double(&world, H2, H2)?;
    let said = refusal(&world, &agent)?;
    assert_eq!(said, format!("upstream inner via outer: upstream outer: {OUTER} refused the connection"));
    let mut first = outer(&world, H2, INNER)?;
    let said = refusal(&world, &agent)?;
    let wanted = format!("upstream inner via outer: {OUTER} refused {INNER}: 502 Bad Gateway (");
    assert!(said.starts_with(&wanted), "{said}");
    // Its certificate is good, but another's.
    let other = world.pki().issue("other", "spiffe://test.tunnel/other", &[])?;
    let mut impostor = gateway_as(&world, &other, INNER, H2, "10.200.0.0/24")?;
    let said = refusal(&world, &agent)?;
    let wanted = format!(
        "upstream inner via outer: TLS with {INNER} failed: the peer's certificate failed the SAN check"
    );
    assert!(said.starts_with(&wanted), "{said}");
    impostor.process().stop()?;
    // It lets in whom it knows, and that is not us.
    let theirs = Credentials { ca: world.stranger(GATEWAY_ID)?.ca, ..world.pki().named("gateway") };
    let _inner = gateway_as(&world, &theirs, INNER, H2, "10.200.0.0/24")?;
    let said = refusal(&world, &agent)?;
    let wanted =
        format!("HTTP/2 with {INNER} failed: the peer refused our certificate: it is not from the peer's CA");
    assert!(said.contains(&wanted), "{said}");
    // The outer one does not let everything through.
    first.process().stop()?;
    let _outer = outer(&world, H2, INNERMOST)?;
    let said = refusal(&world, &agent)?;
    let wanted = format!("upstream inner via outer: {OUTER} refused {INNER}: 403 Forbidden (");
    assert!(said.starts_with(&wanted), "{said}");
    Ok(())
}

/// When the outer gateway is killed, its flows are reset, the inner endpoint is not ejected, and new flows
/// work once it is back.
///
/// Failure: connection-lost.
#[test]
fn when_the_outer_gateway_is_killed_flows_are_reset_and_new_ones_work_once_it_is_back() -> Result<()> {
    const FLOWS: usize = 20;
    for inside in [H2, ("h1", true)] {
        let world = World::new()?;
        let mut outer = world.gateway().start()?;
        let _inner = inner(&world, inside)?;
        let target = world.serve(TARGET4, target::echo())?;
        let exec = world.exec_with(&double(&world, H2, inside)?);
        let mut app = exec.spawn_app(&["swarm", &target.addr().to_string(), &FLOWS.to_string()])?;
        app.says("swarm=")?;
        outer.kill()?;
        assert_eq!(app.says("ends=")?, "ends=ECONNRESET");
        // What the inner gateway sees is a connection that was cut off.
        for outcome in target.outcomes(FLOWS)?.iter().take(FLOWS) {
            assert!(outcome.as_ref().is_err_and(|e| e.contains("reset")), "{outcome:?}");
        }
        for _ in 0..5 {
            assert_eq!(ask(app.process(), "again")?, "ECONNRESET");
        }
        outer.start_again()?;
        wait_for("a flow", PATIENCE, || (ask(app.process(), "again").ok()? == "ok").then_some(()))?;
        let done = app.finish()?;
        assert!(done.success() && !done.stderr.contains("panicked"), "{done}");
    }
    Ok(())
}

/// A reload reconnects only upstreams whose `via` has changed.
#[test]
fn when_the_configuration_changes_only_what_goes_through_something_else_is_connected_anew() -> Result<()> {
    /// Where the outer gateway moves.
    const MOVED: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 3);
    let world = World::new()?;
    let (first, second) = (world.gateway().start()?, world.gateway().listen(MOVED).start()?);
    let mut inner = inner(&world, H2)?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let config = |outer: SocketAddr, before: &str| {
        format!(
            "[daemon]\nworkers = 1\n{}\n{}[[capture]]\ncgroup = \"{}\"\n{before}[[route]]\nto = [{{ upstream = \
             \"inner\" }}]\n{}{}",
            node.bpffs.toml(),
            world.pki().named("node").toml(),
            node.cgroup.path().display(),
            upstream("inner", &INNER.to_string(), H2, Some("outer")),
            upstream("outer", &outer.to_string(), H2, None),
        )
    };
    let accepted = |log: String| log.matches("tunnel accepted").count();
    let mut daemon = node.daemon(&config(OUTER, ""))?;
    let mut old = node.hold(&target)?;
    // The places of both change, and nothing else.
    daemon.tell(&config(OUTER, &upstream("unused", "10.77.0.2:1", H2, None)))?;
    let mut same = node.hold(&target)?;
    assert_eq!((accepted(first.log()), accepted(inner.log())), (1, 1), "{}", daemon.log());
    // What the inner one goes through moves, so its connections are others too.
    daemon.tell(&config(MOVED, ""))?;
    let mut new = node.hold(&target)?;
    assert_eq!((accepted(first.log()), accepted(second.log()), accepted(inner.log())), (1, 1, 2));
    for app in [&mut old, &mut same] {
        assert_eq!(ask(app, "ping")?, "ok");
        app.hang_up();
        app.wait(PATIENCE)?;
    }
    // Nobody uses the first way any more: both of its connections are closed, cleanly.
    wait_for("the end of the old connections", PATIENCE, || {
        let sockets = world.net().sockets().ok()?;
        (!sockets.iter().any(|s| s.established() && s.local == OUTER)).then_some(())
    })?;
    let line = first.log().lines().find(|l| l.contains(" destination=")).unwrap_or_default().to_owned();
    assert!(line.contains(" reason=closed destination="), "{line}");
    assert_eq!(ask(&mut new, "ping")?, "ok");
    inner.process().stop()?;
    Ok(())
}

/// In a nested tunnel an application that does not read holds a bounded amount of memory.
///
/// Failure: misbehaviour.
#[test]
fn heavy_an_application_that_does_not_read_costs_a_bounded_amount_of_memory_in_a_tunnel_in_a_tunnel()
-> Result<()> {
    /// What is offered to somebody who does not read.
    const OFFERED: u64 = 64 * MIB;
    /// What the three processes may hold of it: a stream's window each, of the inner connection and of the outer,
    /// and the buffers of both.
    const BUFFERED_MAX: u64 = 12 * MIB;
    for inside in [H2, ("h1", true)] {
        let world = World::new()?;
        let (mut outer, mut inner) = (outer(&world, H2, INNER)?, inner(&world, inside)?);
        let taken = Arc::new(AtomicU64::new(0));
        let source = world.serve(TARGET4, target::offer(OFFERED, &taken))?;
        let echo = world.serve(TARGET4, target::echo())?;
        let exec = world.exec_with(&double(&world, H2, inside)?).limit(Duration::from_secs(120));
        let words = ["read-late", &source.addr().to_string(), &echo.addr().to_string(), &OFFERED.to_string()];
        let mut app = exec.spawn_app(&words)?;
        app.says("ready")?;
        let mut memory = |app: &mut tunnel_tests::exec::Running| -> Result<u64> {
            Ok(outer.process().memory()? + inner.process().memory()? + app.process().memory()?)
        };
        let before = memory(&mut app)?;
        app.tell("connect")?;
        app.says("waiting")?;
        stopped(&taken)?;
        // Another flow goes on meanwhile.
        app.tell("ping")?;
        app.says("paced")?;
        let grown = memory(&mut app)?.saturating_sub(before);
        let taken = taken.load(Ordering::Relaxed);
        println!("{inside:?}: taken {taken}, memory grown by {grown}");
        assert!(taken < OFFERED, "everything was taken: nothing was held back");
        assert!(grown < BUFFERED_MAX, "the processes grew by {grown} bytes");
        app.tell("read")?;
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        assert_eq!(source.outcomes(1)?, [Ok(())]);
    }
    Ok(())
}

/// A health check through another gateway takes an unreachable endpoint out, and readmits it.
#[test]
fn an_endpoint_behind_another_gateway_that_accepts_no_connection_gets_no_flows_until_it_does() -> Result<()> {
    let world = World::new()?;
    let plain = ("h1", false);
    let _outer = gateway(&world, OUTER, H2, "10.200.0.0/24")?;
    let _well = gateway(&world, INNER, plain, "10.200.0.0/24")?;
    let mut ill = gateway(&world, INNERMOST, plain, "10.200.0.0/24")?;
    let target = world.serve(TARGET4, target::echo())?;
    let both = upstream("inner", &format!("{INNER}\", \"{INNERMOST}"), plain, Some("outer"));
    let checked = format!(
        "{both}balance = \"round_robin\"\nhealth_check = {{ type = \"tcp\", interval = \"100ms\", unhealthy_threshold = 2 }}\n"
    );
    let config = agent(&world, &[checked, upstream("outer", &OUTER.to_string(), H2, None)])?;
    let exec = world.exec_with(&config).flag("--log", "info");
    let mut app = exec.spawn_app(&["reconnect", &target.addr().to_string()])?;
    app.says("ready=1")?;
    for _ in 0..4 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    ill.process().kill()?;
    assert!(app.says("unhealthy: ")?.contains(&INNERMOST.to_string()));
    // Each of these would be passed on to the other one, and say so.
    for _ in 0..10 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    let _again = gateway(&world, INNERMOST, plain, "10.200.0.0/24")?;
    assert!(app.says(": healthy")?.contains(&INNERMOST.to_string()));
    assert!(!app.process().stderr().contains("ejected"), "no flow has met a failure");
    assert!(app.finish()?.success());
    Ok(())
}
