//! Certificates that are replaced, that expire, and roots that leave a bundle, under connections that are up: no new streams on
//! what no handshake would accept any more, and flows that go on, or end, as configured.

use std::{
    env, fs,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, World,
    daemon::Daemon,
    dialogue::ask,
    exec::Running,
    pki::{Credentials, GATEWAY_ID, NODE_ID},
    providers::{Provider, svids},
    target, wait_for,
};

const GATEWAY: SocketAddr = SocketAddr::new(NET4, 15008);
/// Rotations in the suite; `cargo xtask verify` has more.
const ROTATIONS: usize = 100;

fn gateway(identity: &str) -> String {
    format!(
        "{identity}[[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n\
         [[listener]]\naddress = \"{GATEWAY}\"\n"
    )
}

fn node(identity: &str) -> String {
    format!(
        "[daemon]\nworkers = 1\n{identity}[[route]]\nto = [{{ upstream = \"gateway\" }}]\n[[upstream]]\nname = \"gateway\"\n\
         endpoints = [\"{GATEWAY}\"]\nverify = [\"{GATEWAY_ID}\"]\n"
    )
}

/// An application with one flow.
fn hold(world: &World, target: &target::Target, config: &str) -> Result<Running> {
    let exec = world.exec_with(&world.file("agent.toml", config)?).flag("--log", "info");
    let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    Ok(app)
}

/// Waits until an answer is another.
fn wait_until(app: &mut Running, word: &str, is: impl Fn(&str) -> bool) -> Result<()> {
    wait_for(&format!("another answer to \"{word}\""), PATIENCE, || {
        ask(app.process(), word).map(|said| is(&said).then_some(())).transpose()
    })
    .and_then(|answered| answered)
}

fn copy(from: &Credentials, to: &Credentials) -> Result<()> {
    fs::copy(&from.key, &to.key)?;
    fs::copy(&from.cert, &to.cert)?;
    Ok(())
}

/// When a node's certificate has expired, the connection that it was shown on takes no new streams on either side, and its flow
/// goes on; with a new certificate there are new connections.
///
/// Failure: peer-certificate.
#[test]
fn an_expired_certificate_takes_no_new_streams_and_its_flows_go_on() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&world.pki().named("gateway").toml()))?;
    let end = SystemTime::now() + Duration::from_secs(6);
    let short = world.pki().issue_until("short", NODE_ID, end)?;
    let mut app = hold(&world, &target, &node(&short.toml()))?;
    daemon.process().wait_for_line("reason=the peer's certificate has expired")?;
    wait_for("the node's own word", PATIENCE, || {
        app.process().stderr().contains("our certificate has expired").then_some(())
    })?;
    assert_ne!(ask(app.process(), "again")?, "ok", "nothing new");
    assert_eq!(ask(app.process(), "ping")?, "ok", "the old flow goes on");

    copy(&world.pki().named("node"), &short)?;
    wait_until(&mut app, "again", |said| said == "ok")?;
    assert_eq!(ask(app.process(), "ping")?, "ok", "the old flow goes on");
    assert!(app.finish()?.success());
    Ok(())
}

/// Where the identity says so, a flow does not outlast the certificate that its connection rests on, on either side, and ends
/// with that reason.
///
/// Failure: peer-certificate.
#[test]
fn flows_end_with_the_certificate_where_the_identity_says_so() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let own = world.pki().named("gateway").toml() + "on_expiry = \"end\"\n";
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&own))?;
    let end = SystemTime::now() + Duration::from_secs(6);
    let short = world.pki().issue_until("short", NODE_ID, end)?;
    let mut app = hold(&world, &target, &node(&short.toml()))?;
    daemon.process().wait_for_line("reason=identity_expired")?;
    assert_ne!(ask(app.process(), "ping")?, "ok");
    drop(app);

    // The gateway's certificate, and the node's configuration, over HTTP/1.
    let end = SystemTime::now() + Duration::from_secs(6);
    let short = world.pki().issue_until("short-gateway", GATEWAY_ID, end)?.toml();
    let h1 = gateway(&short).replace("[[listener]]\n", "[[listener]]\nprotocols = [\"h1\"]\n");
    daemon.process().stop()?;
    let _gateway = Daemon::start(&world, world.net(), &h1)?;
    let own = world.pki().named("node").toml() + "on_expiry = \"end\"\n";
    let config = node(&own).replace("[[upstream]]\n", "[[upstream]]\nprotocol = \"h1\"\n");
    let mut app = hold(&world, &target, &config)?;
    wait_for("the end of the flow", PATIENCE, || {
        app.process().stderr().contains("reason=identity_expired").then_some(())
    })?;
    assert_ne!(ask(app.process(), "ping")?, "ok");
    Ok(())
}

/// When a root leaves the gateway's bundle, connections of the nodes below it take no new streams, and those of other nodes do.
///
/// Failure: peer-certificate.
#[test]
fn a_root_that_leaves_the_bundle_takes_the_connections_below_it_along() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let guest = world.stranger("spiffe://guest.test/node")?;
    let own = world.pki().named("gateway");
    let bundle = world.file("bundle.pem", fs::read_to_string(&own.ca)? + &fs::read_to_string(&guest.ca)?)?;
    let identity = own.believing(&bundle).toml();
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&identity))?;
    let mut ours = hold(&world, &target, &node(&world.pki().named("node").toml()))?;
    let mut theirs = hold(&world, &target, &node(&guest.believing(&own.ca).toml()))?;

    fs::copy(&own.ca, &bundle)?;
    let line = daemon.process().wait_for_line("draining connection of a peer")?;
    assert!(line.contains("failed the chain check"), "{line}");
    assert_ne!(ask(theirs.process(), "again")?, "ok", "nothing new below the root that is gone");
    assert_eq!(ask(theirs.process(), "ping")?, "ok", "its flow goes on");
    assert_eq!(ask(ours.process(), "again")?, "ok");
    assert_eq!(ask(ours.process(), "ping")?, "ok");
    assert_eq!(daemon.log().matches("draining connection of a peer").count(), 1, "{}", daemon.log());
    Ok(())
}

/// Certificates and roots are replaced many times on both sides, while connections are made one after the other and flows are
/// up: none is refused, and none is lost.
///
/// Failure: peer-certificate.
#[test]
fn many_rotations_under_load_lose_no_flow() -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let wanted = env::var("TUNNEL_ROTATIONS").ok();
    let rotations = wanted.map_or(Ok(ROTATIONS), |n| n.parse()).context("TUNNEL_ROTATIONS")?;
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let issue = |kind: &str, id: &str| -> Result<Vec<_>> {
        (0..2)
            .map(|i| {
                let who = world.pki().issue(&format!("{kind}-{i}"), id, &["--ip", &NET4.to_string()])?;
                Ok(svids(id, &who))
            })
            .collect()
    };
    let (nodes, gateways) = (issue("n", NODE_ID)?, issue("g", GATEWAY_ID)?);
    let mut of_gateway = Provider::workload_api(&world, world.net(), "wl-gateway", &gateways[0])?;
    let mut of_node = Provider::workload_api(&world, world.node(), "wl-node", &nodes[0])?;
    let from = |p: &Provider| format!("[identity]\nworkload_api = \"{}\"\n", p.address());
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&from(&of_gateway)))?;
    let config = node(&from(&of_node));
    let mut held = hold(&world, &target, &config)?;
    let exec =
        world.exec_with(&world.file("agent-2.toml", config)?).flag("--log", "info").limit(10 * PATIENCE);
    let mut load = exec.spawn_app(&["keep-connecting", &target.addr().to_string()])?;
    load.says("started=1")?;
    let reloads = |log: &str| log.matches("identity reloaded").count();
    for n in 1..=rotations {
        of_node.send(&nodes[n % 2])?;
        of_gateway.send(&gateways[n % 2])?;
        wait_for("the rotation", PATIENCE, || {
            (reloads(&daemon.log()) >= n && reloads(&load.process().stderr()) >= n).then_some(())
        })
        .with_context(|| daemon.log())?;
    }
    load.process().hang_up();
    let done = load.ended()?;
    assert!(done.success(), "{done}");
    assert_eq!(done.value("failed")?, "0", "{done}");
    assert!(done.value("made")?.parse::<usize>()? > 10, "{done}");
    assert_eq!(ask(held.process(), "ping")?, "ok", "a flow from before all of them goes on");
    assert!(held.finish()?.success());
    assert!(!daemon.log().contains("rejected peer connection"), "{}", daemon.log());
    daemon.process().stop()?;
    Ok(())
}
