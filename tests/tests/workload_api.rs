//! Identities that a SPIFFE Workload API pushes: used at once, kept while it is away, given up when it takes them back.

use std::net::SocketAddr;

use anyhow::Result;
use serde_json::json;
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, World,
    daemon::Daemon,
    dialogue::ask,
    pki::{GATEWAY_ID, NODE_ID},
    providers::{Provider, svid, svids},
    target, wait_for,
};

/// Where the gateway of these tests listens.
const GATEWAY: SocketAddr = SocketAddr::new(NET4, 15008);
/// The tables of a gateway beside its identity.
const SERVES: &str = "[[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n\
                      [[listener]]\naddress = \"10.77.0.2:15008\"\n";

/// An identity that a server has.
fn from(server: &Provider, more: &str) -> String {
    format!("[identity]\nworkload_api = \"{}\"\n{more}\n", server.address())
}

/// A node that goes through the gateway.
fn node(identity: &str) -> String {
    format!(
        "[daemon]\nworkers = 1\n{identity}[[route]]\nto = [{{ upstream = \"gateway\" }}]\n[[upstream]]\nname = \"gateway\"\n\
         endpoints = [\"{GATEWAY}\"]\nverify = [\"{GATEWAY_ID}\"]\n"
    )
}

/// Both sides have their certificates and roots from a Workload API, and use another one for new connections as soon as it is
/// sent, while established flows go on.
#[test]
fn an_identity_of_a_workload_api_is_used_and_replaced_when_another_is_sent() -> Result<()> {
    const ROTATED: &str = "spiffe://test.tunnel/node-rotated";
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let served = svids(GATEWAY_ID, &world.pki().named("gateway"));
    let of_gateway = Provider::workload_api(&world, world.net(), "wl-gateway", &served)?;
    let mut daemon = Daemon::start(&world, world.net(), &(from(&of_gateway, "") + SERVES))?;
    let served = svids(NODE_ID, &world.pki().named("node"));
    let mut of_node = Provider::workload_api(&world, world.node(), "wl-node", &served)?;
    let exec = world.exec_with(&world.file("agent.toml", node(&from(&of_node, "")))?).flag("--log", "info");
    let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    daemon.process().wait_for_line(&format!("identity={NODE_ID}"))?;

    of_node.send(&svids(ROTATED, &world.pki().issue("rotated", ROTATED, &[])?))?;
    wait_for("the new identity", PATIENCE, || app.process().stderr().contains(ROTATED).then_some(()))?;
    assert_eq!(ask(app.process(), "again")?, "ok");
    daemon.process().wait_for_line(&format!("identity={ROTATED}"))?;
    assert_eq!(ask(app.process(), "ping")?, "ok", "the old flow goes on");
    assert!(app.finish()?.success());
    Ok(())
}

/// While the Workload API is away, the last identity is used; when it is back, what it sends is used again.
#[test]
fn the_last_identity_is_used_while_the_workload_api_is_away() -> Result<()> {
    const ROTATED: &str = "spiffe://test.tunnel/node-back";
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut gateway = world.gateway().start()?;
    let served = svids(NODE_ID, &world.pki().named("node"));
    let mut server = Provider::workload_api(&world, world.node(), "wl", &served)?;
    let config = node(&from(&server, "")).replace(&GATEWAY.to_string(), &gateway.addr().to_string());
    let exec = world.exec_with(&world.file("agent.toml", config)?).flag("--log", "info");
    let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    server.kill()?;
    wait_for("the loss", PATIENCE, || {
        app.process().stderr().contains("lost the identity provider").then_some(())
    })?;
    assert_eq!(ask(app.process(), "again")?, "ok");
    assert_eq!(ask(app.process(), "ping")?, "ok");

    server.start_again(&world, world.node(), &svids(ROTATED, &world.pki().issue("back", ROTATED, &[])?))?;
    wait_for("the new identity", PATIENCE, || app.process().stderr().contains(ROTATED).then_some(()))?;
    assert_eq!(ask(app.process(), "again")?, "ok");
    gateway.logs(&format!("identity={ROTATED}"))?;
    assert!(app.finish()?.success());
    Ok(())
}

/// A withdrawn identity is not used any more: no connection is made or taken with it, and flows are reset where the identity
/// says so, with that reason; they are back when an identity is sent again.
#[test]
fn a_withdrawn_identity_is_given_up_at_once() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let served = svids(GATEWAY_ID, &world.pki().named("gateway"));
    let mut server = Provider::workload_api(&world, world.net(), "wl-gateway", &served)?;
    let config = from(&server, "on_expiry = \"end\"") + SERVES;
    let mut daemon = Daemon::start(&world, world.net(), &config)?;
    let files = world.pki().named("node").toml();
    let exec = world.exec_with(&world.file("agent.toml", node(&files))?);
    let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");

    server.send(&json!({ "deny": "no identity issued" }))?;
    daemon.process().wait_for_line("identity withdrawn")?;
    daemon.process().wait_for_line("reason=identity_expired")?;
    assert_ne!(ask(app.process(), "ping")?, "ok", "its flow is reset");
    assert_ne!(ask(app.process(), "again")?, "ok", "and no other is taken");
    daemon.process().wait_for_line("the identity was withdrawn: PERMISSION_DENIED: no identity issued")?;

    server.send(&served)?;
    daemon.process().wait_for_line("identity reloaded")?;
    wait_for("a flow", PATIENCE, || {
        ask(app.process(), "again").map(|said| (said == "ok").then_some(())).transpose()
    })
    .and_then(|flow| flow)
}

/// Without an identity from its Workload API a daemon does not start, and says what it waited for.
#[test]
fn a_start_without_an_identity_of_the_workload_api_fails_with_its_reason() -> Result<()> {
    let world = World::new()?;
    let denied = Provider::workload_api(&world, world.net(), "wl", &json!({ "deny": "no identity issued" }))?;
    let mut one = Daemon::spawn(&world, world.net(), &(from(&denied, "") + SERVES))?;
    let missing = "[identity]\nworkload_api = \"unix:///nowhere/agent.sock\"\n".to_owned() + SERVES;
    let mut other = Daemon::spawn(&world, world.net(), &missing.replace(":15008", ":15009"))?;
    for (daemon, why) in [(&mut one, "no identity issued"), (&mut other, "connecting failed: No such file")] {
        let status = daemon.process().wait(2 * PATIENCE)?;
        assert_eq!(status.code(), Some(1), "{}", daemon.log());
        let log = daemon.log();
        assert!(log.contains("no identity was received") && log.contains(why), "{log}");
    }
    Ok(())
}

/// The roots of a trust domain vouch for its own members only: a federated bundle lets that domain's nodes in, and lets none in
/// that claims to be of another.
#[test]
fn a_federated_bundle_vouches_for_its_own_trust_domain_only() -> Result<()> {
    const GUEST: &str = "spiffe://guest.test/node";
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let guest = world.stranger(GUEST)?;
    let impostor = tunnel_tests::pki::Pki::of(&guest).issue("impostor", NODE_ID, &[])?;
    let gateway = world.pki().named("gateway");
    let state =
        json!({ "svids": [svid(GATEWAY_ID, &gateway)], "federated": { "spiffe://guest.test": guest.ca } });
    let server = Provider::workload_api(&world, world.net(), "wl-gateway", &state)?;
    let mut daemon = Daemon::start(&world, world.net(), &(from(&server, "") + SERVES))?;
    let run = |who: &tunnel_tests::pki::Credentials, name: &str| {
        let config = node(&who.believing(&gateway.ca).toml());
        let exec = world.exec_with(&world.file(name, config)?);
        exec.run_app(&["many", &target.addr().to_string(), "1", "64"])
    };
    let done = run(&guest, "guest.toml")?;
    assert!(done.success(), "{done}\n{}", daemon.log());
    assert!(!run(&impostor, "impostor.toml")?.success());
    daemon.process().wait_for_line("failed the chain check")?;
    let third = world.pki().issue("third", "spiffe://third.test/node", &[])?;
    assert!(!run(&third, "third.toml")?.success());
    daemon
        .process()
        .wait_for_line("of the trust domain \"third.test\", for which there are no CA certificates")?;
    Ok(())
}
