//! Where endpoints come from, and which of them get flows.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use anyhow::Result;
use nix::sys::signal::Signal;
use tunnel_tests::{
    PATIENCE, Process, World,
    daemon::Daemon,
    dialogue::ask,
    dns::Dns,
    gateway,
    hop::Hop,
    peer,
    pki::{Credentials, GATEWAY_ID},
    target, wait_for,
    world::{NET4, TARGET4},
};

/// Two more hosts behind the gateway's.
const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 0, 1));
const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 0, 2));
/// What the flows ask for does not matter to a hop.
const ANYWHERE: &str = "10.200.0.10:80";

fn at(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, gateway::PORT)
}

/// A hop at each of the addresses, which the node can reach.
fn hops(world: &World, who: &Credentials) -> Result<(Hop, Hop)> {
    for ip in [A, B] {
        world.net().add_address(&format!("{ip}/32"), "lo")?;
        world.node().ip(&format!("route add {ip}/32 via {NET4}"))?;
    }
    Ok((Hop::start(world.net(), at(A), who)?, Hop::start(world.net(), at(B), who)?))
}

/// For `tunnel exec`, with one worker, and these keys of its one upstream.
fn agent(world: &World, keys: &str) -> Result<PathBuf> {
    let identity = world.pki().named("node").toml();
    let config = format!(
        "[daemon]\nworkers = 1\n{identity}[[route]]\nto = [{{ upstream = \"east\" }}]\n[[upstream]]\nname = \"east\"\n{keys}\n"
    );
    world.file("agent.toml", config)
}

/// New flows until one has gone through this hop; every one of them gets through.
fn flows_reach(app: &mut Process, hop: &Hop) -> Result<()> {
    let before = hop.asked().len();
    wait_for("a flow through the other hop", PATIENCE, || {
        let answer = ask(app, "again");
        assert!(answer.as_ref().is_ok_and(|a| a == "ok"), "{answer:?}");
        (hop.asked().len() > before).then_some(())
    })
}

/// With `discovery = "dns"` endpoints follow the DNS answers, and the last ones stay while DNS fails.
#[test]
fn an_upstream_from_dns_follows_the_answers_and_keeps_them_while_there_are_none() -> Result<()> {
    let world = World::new()?;
    let who = world.pki().issue("hop", "spiffe://test.tunnel/hop", &["--dns", "gw.test"])?;
    let (a, b) = hops(&world, &who)?;
    let dns = Dns::start(world.net(), NET4)?;
    dns.says("gw.test", &[A]);
    let resolv = world.file("resolv.conf", format!("nameserver {NET4}\noptions timeout:1 attempts:1\n"))?;
    // Without verify: the certificates are valid for the name, and for no address.
    let port = gateway::PORT;
    let config = agent(&world, &format!("endpoints = [\"gw.test:{port}\"]\ndiscovery = \"dns\""))?;
    let exec = world.exec_with(&config).sees(&resolv, "/etc/resolv.conf").flag("--log", "info");
    let mut app = exec.spawn_app(&["hold", ANYWHERE])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok", "a flow waits for the first answer");
    assert_eq!((a.asked().len(), b.asked().len()), (1, 0));
    // Another answer: new flows go there, the old one where it is.
    dns.says("gw.test", &[B]);
    app.says(&format!("endpoints=\"{}\"", at(B)))?;
    flows_reach(app.process(), &b)?;
    let at_first = a.asked().len();
    for _ in 0..5 {
        assert_eq!(ask(app.process(), "again")?, "ok");
    }
    assert_eq!(a.asked().len(), at_first, "the address that is gone gets no new flows");
    assert_eq!(ask(app.process(), "ping")?, "ok", "the flow there goes on");
    // None: what is known stays.
    dns.falls_silent();
    let asked = dns.asked();
    assert!(app.says("does not resolve")?.contains("what was known of it stays"));
    assert!(dns.asked() > asked);
    assert_eq!(ask(app.process(), "again")?, "ok");
    // That there is no address any more is an answer too.
    dns.says("gw.test", &[]);
    app.says("endpoints=\"none")?;
    wait_for("the end of the last endpoint", PATIENCE, || {
        (ask(app.process(), "again").ok()? == "ECONNRESET").then_some(())
    })?;
    app.says("upstream east has no endpoints: gw.test does not resolve: it has no address")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    assert!(app.finish()?.success());
    Ok(())
}

/// An upstream whose name never resolved fails flows at once and logs why.
#[test]
fn a_name_that_never_had_an_address_fails_flows_at_once_and_says_so() -> Result<()> {
    let world = World::new()?;
    let _dns = Dns::start(world.net(), NET4)?;
    let resolv = world.file("resolv.conf", format!("nameserver {NET4}\n"))?;
    let config = agent(&world, "endpoints = [\"gw.test:1\"]\ndiscovery = \"dns\"")?;
    let exec = world.exec_with(&config).sees(&resolv, "/etc/resolv.conf");
    let done = exec.run_app(&["expect-reset", ANYWHERE, "1"])?;
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    assert!(done.stderr.contains("upstream east has no endpoints: gw.test does not resolve"), "{done}");
    Ok(())
}

/// With `endpoints_file` endpoints follow the file, and a mistake in it keeps the previous ones.
#[test]
fn an_upstream_from_a_file_follows_the_file_and_a_mistake_in_it_changes_nothing() -> Result<()> {
    let world = World::new()?;
    let (a, b) = hops(&world, &world.pki().named("gateway"))?;
    let file = world.file("east.endpoints", format!("# one\n{}\n", at(A)))?;
    let replace = |text: String| -> Result<()> {
        let new = world.file("east.endpoints.new", text)?;
        Ok(fs::rename(new, &file)?)
    };
    let keys = format!("endpoints_file = \"east.endpoints\"\nverify = [\"{GATEWAY_ID}\"]");
    let exec = world.exec_with(&agent(&world, &keys)?).flag("--log", "info");
    let mut app = exec.spawn_app(&["hold", ANYWHERE])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    assert_eq!(a.asked().len(), 1);
    replace(format!("{}\nnonsense\n", at(B)))?;
    assert!(app.says("the endpoints stay as they were")?.contains("east.endpoints:2: \"nonsense\""));
    assert_eq!(ask(app.process(), "again")?, "ok");
    assert_eq!(b.asked().len(), 0);
    replace(format!("{}\n", at(B)))?;
    app.says(&format!("endpoints=\"{}\"", at(B)))?;
    flows_reach(app.process(), &b)?;
    assert_eq!(ask(app.process(), "ping")?, "ok", "the flow at the endpoint that is gone goes on");
    replace("# none\n".to_owned())?;
    app.says("endpoints=\"none")?;
    wait_for("the end of the last endpoint", PATIENCE, || {
        (ask(app.process(), "again").ok()? == "ECONNRESET").then_some(())
    })?;
    let why = app.says("upstream east has no endpoints")?;
    assert!(why.contains("east.endpoints lists none"), "{why}");
    assert_eq!(ask(app.process(), "ping")?, "ok");
    assert!(app.finish()?.success());
    Ok(())
}

/// A mistake in an endpoints file fails the start.
#[test]
fn a_daemon_does_not_start_with_a_mistake_in_a_file_of_endpoints() -> Result<()> {
    let world = World::new()?;
    world.file("east.endpoints", "10.9.0.1:15008\n10.9.0.2\n")?;
    let done = world.exec_with(&agent(&world, "endpoints_file = \"east.endpoints\"")?).run(&["true"])?;
    assert_eq!(done.code(), 64, "{done}");
    assert!(done.stderr.contains("east.endpoints:2: \"10.9.0.2\": authority has no port"), "{done}");
    Ok(())
}

/// What checks find out before a flow does: one of two gateways stops, which `stop` does, and comes back.
fn is_taken_out_and_comes_back(
    check: &str,
    stop: fn(&mut gateway::Gateway<'_>) -> Result<()>,
    come_back: fn(&mut gateway::Gateway<'_>) -> Result<()>,
) -> Result<()> {
    let world = World::new()?;
    let (a, b) = (at(NET4), SocketAddr::new(NET4, gateway::PORT + 1));
    let _well = world.gateway().listen(a).start()?;
    let mut ill = world.gateway().listen(b).start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let keys = format!(
        "endpoints = [\"{a}\", \"{b}\"]\nverify = [\"{GATEWAY_ID}\"]\nbalance = \"round_robin\"\n\
         health_check = {{ type = \"{check}\", interval = \"100ms\", timeout = \"400ms\", unhealthy_threshold = 2 }}"
    );
    let exec = world.exec_with(&agent(&world, &keys)?).flag("--log", "info");
    let mut app = exec.spawn_app(&["reconnect", &target.addr().to_string()])?;
    app.says("ready=1")?;
    for _ in 0..4 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    stop(&mut ill)?;
    assert!(app.says("unhealthy: ")?.contains(&b.to_string()));
    // Each of these would wait for it, or be reset: none is given to it.
    for _ in 0..10 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    let before = closed(&ill);
    come_back(&mut ill)?;
    assert!(app.says(": healthy")?.contains(&b.to_string()));
    wait_for("a flow through it", PATIENCE, || {
        let answer = ask(app.process(), "once");
        assert!(answer.as_ref().is_ok_and(|a| a == "ok"), "{answer:?}");
        (closed(&ill) > before).then_some(())
    })?;
    assert!(!app.process().stderr().contains("ejected"), "no flow has met a failure");
    assert!(app.finish()?.success());
    Ok(())
}

/// Flows that have ended at a gateway.
fn closed(gateway: &gateway::Gateway<'_>) -> usize {
    gateway.log().matches("reason=closed destination=").count()
}

/// A health check by PING takes an unresponsive endpoint out before a flow fails, and readmits it.
///
/// Failure: endpoint-down.
#[test]
fn an_endpoint_that_answers_no_ping_is_taken_out_before_a_flow_fails_and_comes_back() -> Result<()> {
    is_taken_out_and_comes_back(
        "ping",
        |gateway| gateway.process().signal(Signal::SIGSTOP),
        |gateway| gateway.process().signal(Signal::SIGCONT),
    )
}

/// A health check by TCP takes an unreachable endpoint out before a flow fails, and readmits it.
///
/// Failure: endpoint-down.
#[test]
fn an_endpoint_that_takes_no_connection_is_taken_out_before_a_flow_fails_and_comes_back() -> Result<()> {
    is_taken_out_and_comes_back("tcp", |gateway| gateway.kill().map(drop), |gateway| gateway.start_again())
}

/// A gateway that answers 503 is ejected only with `consecutive_gateway_failures`.
///
/// Failure: endpoint-down.
#[test]
fn a_gateway_that_answers_503_is_ejected_only_where_that_counts() -> Result<()> {
    let world = World::new()?;
    let (a, _b) = hops(&world, &world.pki().named("gateway"))?;
    // Its own upstream is not there: it says 503 for every target.
    let ill = SocketAddr::new(NET4, gateway::PORT);
    let config = format!(
        "{}[[listener]]\naddress = \"{ill}\"\n[[route]]\nto = [{{ upstream = \"none\" }}]\n[[upstream]]\nname = \"none\"\n\
         endpoints = [\"{NET4}:9\"]\n[[policy]]\nidentity = \"any\"\ntarget = [\"0.0.0.0/0\"]\n",
        world.pki().named("gateway").toml()
    );
    let _ill = Daemon::start(&world, world.net(), &config)?;
    let keys = format!(
        "endpoints = [\"{}\", \"{ill}\"]\nverify = [\"{GATEWAY_ID}\"]\nbalance = \"round_robin\"\n",
        a.addr()
    );
    let answers =
        |app: &mut Process, n: usize| -> Result<Vec<String>> { (0..n).map(|_| ask(app, "once")).collect() };
    let failed = |answers: &[String]| answers.iter().filter(|a| *a == "ECONNRESET").count();

    let mut app = world.exec_with(&agent(&world, &keys)?).spawn_app(&["reconnect", ANYWHERE])?;
    app.says("ready=1")?;
    assert_eq!(failed(&answers(app.process(), 12)?), 6, "every other");
    assert!(app.finish()?.success());

    let counted = "outlier_detection = { consecutive_gateway_failures = 3, base_ejection_time = \"60s\", \
                   max_ejection_time = \"60s\" }";
    let exec = world.exec_with(&agent(&world, &(keys + counted))?).flag("--log", "info");
    let mut app = exec.spawn_app(&["reconnect", ANYWHERE])?;
    app.says("ready=1")?;
    assert_eq!(failed(&answers(app.process(), 6)?), 3);
    assert!(app.says("ejected")?.contains("503"));
    assert_eq!(failed(&answers(app.process(), 8)?), 0);
    assert!(app.finish()?.success());
    Ok(())
}

/// A request beyond an upstream's limit is answered with 503 and `connection_limit_reached`.
///
/// Failure: limits.
#[test]
fn beyond_an_upstreams_limit_a_request_is_503_connection_limit_reached() -> Result<()> {
    let world = World::new()?;
    let (a, _b) = hops(&world, &world.pki().named("gateway"))?;
    let listen = at(NET4);
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{listen}\"\n[[route]]\nto = [{{ upstream = \"next\" }}]\n\
         [[upstream]]\nname = \"next\"\nendpoints = [\"{}\"]\nverify = [\"{GATEWAY_ID}\"]\nlimits = {{ streams = 1 }}\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"0.0.0.0/0\"]\n",
        world.pki().named("gateway").toml(),
        a.addr(),
    );
    let _chain = Daemon::start(&world, world.net(), &config)?;
    let request = || peer::connect_request(ANYWHERE);
    let node = world.pki().named("node");
    let keys = format!("endpoints = [\"{listen}\"]\nverify = [\"{GATEWAY_ID}\"]");
    let mut app = world.exec_with(&agent(&world, &keys)?).spawn_app(&["hold", ANYWHERE])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    let answer = peer::ask(world.node(), listen, &node, request()?)?;
    assert_eq!(answer.status.as_u16(), 503);
    assert!(answer.proxy_status.contains("error=connection_limit_reached"), "{answer:?}");
    assert_eq!(ask(app.process(), "ping")?, "ok");
    assert!(app.finish()?.success());
    wait_for("the place", PATIENCE, || {
        let answer = peer::ask(world.node(), listen, &node, request().ok()?).ok()?;
        answer.status.is_success().then_some(())
    })
}
