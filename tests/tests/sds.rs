//! Identities that Envoy's secret discovery service pushes: acknowledged when they are used, rejected when they cannot be.

use std::net::SocketAddr;

use anyhow::Result;
use serde_json::json;
use tunnel_tests::{
    NET4, TARGET4, World,
    daemon::Daemon,
    pki::{Credentials, GATEWAY_ID, NODE_ID},
    providers::{Provider, secrets},
    target,
};

const GATEWAY: SocketAddr = SocketAddr::new(NET4, 15008);

/// A gateway whose identity a server has.
fn gateway(server: &Provider, more: &str) -> String {
    format!(
        "[identity]\nsds = \"{}\"\nname = \"gateway\"\n{more}\n[[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\n\
         target = [\"10.200.0.0/24\"]\n[[listener]]\naddress = \"{GATEWAY}\"\n",
        server.address()
    )
}

/// Whether a node with these files gets through a gateway of that name.
fn passes(world: &World, target: &target::Target, node: &Credentials, gateway: &str) -> Result<bool> {
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[route]]\nto = [{{ upstream = \"gateway\" }}]\n[[upstream]]\nname = \"gateway\"\n\
         endpoints = [\"{GATEWAY}\"]\nverify = [\"{gateway}\"]\n",
        node.toml()
    );
    let exec = world.exec_with(&world.file("agent.toml", config)?);
    Ok(exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?.success())
}

/// A certificate and a validation context of an SDS server are used and acknowledged, and so are those that follow; a secret
/// that cannot be used is rejected with its reason, and the one before stays.
#[test]
fn secrets_of_an_sds_server_are_used_and_acknowledged_or_rejected() -> Result<()> {
    const ROTATED: &str = "spiffe://test.tunnel/gateway-rotated";
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = world.pki().named("node");
    let state = secrets("gateway", &world.pki().named("gateway"));
    let mut server = Provider::sds(&world, world.net(), "sds", &state)?;
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&server, ""))?;
    for name in ["gateway", "ROOTCA"] {
        server.process().wait_for_line(&format!("asked {name} of "))?;
        server.process().wait_for_line(&format!("accepted {name} 1"))?;
    }
    assert!(passes(&world, &target, &node, GATEWAY_ID)?, "{}", daemon.log());

    server.send(&secrets("gateway", &world.pki().issue("rotated", ROTATED, &["--ip", "10.77.0.2"])?))?;
    daemon.process().wait_for_line("gateway-rotated")?;
    server.process().wait_for_line("accepted gateway 2")?;
    assert!(passes(&world, &target, &node, ROTATED)?, "{}", daemon.log());

    server.send(&json!({ "gateway": { "broken": "nonsense" } }))?;
    let rejected = server.process().wait_for_line("rejected gateway: ")?;
    assert!(rejected.contains("private_key") || rejected.contains("certificate_chain"), "{rejected}");
    assert!(passes(&world, &target, &node, ROTATED)?, "what was there stays: {}", daemon.log());

    server.send(&json!({ "deny": "no identity issued" }))?;
    daemon.process().wait_for_line("identity withdrawn")?;
    assert!(!passes(&world, &target, &node, ROTATED)?, "it is not used any more");
    Ok(())
}

/// A validation context with a bundle for each trust domain, as SPIRE sends it, lets in members of each by their own roots.
#[test]
fn a_validation_context_with_several_trust_domains_vouches_for_each_by_its_own_roots() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let guest = world.stranger("spiffe://guest.test/node")?;
    let own = world.pki().named("gateway");
    let domains = json!({ "test.tunnel": own.ca, "guest.test": guest.ca });
    let state = json!({ "gateway": { "cert": own.cert, "key": own.key }, "ALL": { "domains": domains } });
    let server = Provider::sds(&world, world.net(), "sds", &state)?;
    let config = gateway(&server, "validation_context = \"ALL\"");
    let mut daemon = Daemon::start(&world, world.net(), &config)?;
    for node in [&world.pki().named("node"), &guest.believing(&own.ca)] {
        assert!(passes(&world, &target, node, GATEWAY_ID)?, "{}", daemon.log());
    }
    let impostor = tunnel_tests::pki::Pki::of(&guest).issue("impostor", NODE_ID, &[])?;
    assert!(!passes(&world, &target, &impostor.believing(&own.ca), GATEWAY_ID)?);
    daemon.process().wait_for_line("failed the chain check")?;
    Ok(())
}
