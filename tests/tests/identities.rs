//! Several identities in one daemon, and several trust domains: each connection shows the one that was named for it, and none
//! is shared between two.

use std::{
    io::Read as _,
    net::{SocketAddr, TcpListener},
};

use anyhow::Result;
use tunnel_tests::{
    NET4, TARGET4, World,
    daemon::Daemon,
    pki::{Credentials, GATEWAY_ID, NODE_ID, Pki},
    target,
};

const GATEWAY: SocketAddr = SocketAddr::new(NET4, 15008);
const SERVES: &str =
    "[[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n";

/// An identity of several, with more keys.
fn named(name: &str, who: &Credentials, more: &str) -> String {
    let table = who.toml().replace("[identity]", "[[identity]]");
    format!("{table}name = \"{name}\"\n{more}\n")
}

/// A gateway with one listener and one identity.
fn gateway(identity: &str) -> String {
    format!("{identity}{SERVES}[[listener]]\naddress = \"{GATEWAY}\"\n")
}

/// Through one upstream two captures show two identities, each on connections of its own; and an upstream its own where the
/// capture names none.
#[test]
fn a_capture_shows_its_own_identity_and_shares_no_connection_with_another() -> Result<()> {
    const OTHER: &str = "spiffe://test.tunnel/other";
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&world.pki().named("gateway").toml()))?;
    let identities = named("node", &world.pki().named("node"), "")
        + &named("other", &world.pki().issue("other", OTHER, &[])?, "");
    let config = |capture: &str| {
        format!(
            "[daemon]\nworkers = 1\n{identities}[[capture]]\ninclude = [\"0.0.0.0/0\"]\n{capture}\n[[route]]\n\
             to = [{{ upstream = \"gateway\" }}]\n[[upstream]]\nname = \"gateway\"\nidentity = \"node\"\n\
             endpoints = [\"{GATEWAY}\"]\nverify = [\"{GATEWAY_ID}\"]\n"
        )
    };
    for (capture, shown) in [("", NODE_ID), ("identity = \"other\"", OTHER)] {
        let exec = world.exec_with(&world.file("agent.toml", config(capture))?);
        let done = exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?;
        assert!(done.success(), "{done}\n{}", daemon.log());
        daemon.process().wait_for_line(&format!("identity={shown}"))?;
    }
    Ok(())
}

/// Two upstreams to one endpoint, and two listeners of one daemon, each have the identity that is named for them.
#[test]
fn listeners_and_upstreams_each_show_the_identity_that_they_name() -> Result<()> {
    const OTHER: &str = "spiffe://test.tunnel/other";
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let other = world.pki().issue("other", OTHER, &[])?;
    let listeners = format!(
        "{}{}{SERVES}[[listener]]\naddress = \"{NET4}:15001\"\nidentity = \"gateway\"\n[[listener]]\n\
         address = \"{NET4}:15002\"\nidentity = \"other\"\n",
        named("gateway", &world.pki().named("gateway"), ""),
        named("other", &other, ""),
    );
    let mut daemon = Daemon::start(&world, world.net(), &listeners)?;
    for (port, id, own, shown) in [(15001, GATEWAY_ID, "node", NODE_ID), (15002, OTHER, "other", OTHER)] {
        let config = format!(
            "[daemon]\nworkers = 1\n{}{}[[route]]\nto = [{{ upstream = \"gateway\" }}]\n[[upstream]]\nname = \"gateway\"\n\
             identity = \"{own}\"\nendpoints = [\"{NET4}:{port}\"]\nverify = [\"{id}\"]\n",
            named("node", &world.pki().named("node"), ""),
            named("other", &other, ""),
        );
        let exec = world.exec_with(&world.file("agent.toml", config)?);
        let done = exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?;
        assert!(done.success(), "{done}\n{}", daemon.log());
        daemon.process().wait_for_line(&format!("identity={shown}"))?;
    }
    Ok(())
}

/// A certificate with two URI names is no SVID: it is rejected with that reason, though one of them would be taken.
///
/// Failure: peer-certificate.
#[test]
fn a_certificate_with_two_uri_names_is_rejected_as_an_svid() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut gateway = world.gateway().start()?;
    let two = world.pki().issue_with_names("two", &[NODE_ID, "spiffe://test.tunnel/another"])?;
    let exec = world.exec(&gateway).credentials(two);
    assert!(!exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?.success());
    gateway.logs("it has 2 URI names, and an SVID has exactly one")?;
    Ok(())
}

/// A trust domain with a bundle of its own lets in its members by that bundle only, and of them only those that it verifies.
///
/// Failure: peer-certificate.
#[test]
fn a_trust_domain_has_roots_and_verified_names_of_its_own() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let web = world.stranger("spiffe://guest.test/web")?;
    let (db, impostor) = (
        Pki::of(&web).issue("db", "spiffe://guest.test/db", &[])?,
        Pki::of(&web).issue("impostor", NODE_ID, &[])?,
    );
    // Ours may not vouch for a member of the other domain either.
    let ours = world.pki().issue("ours", "spiffe://guest.test/web", &[])?;
    let own = world.pki().named("gateway");
    let identity = format!(
        "{}trust_domain = [{{ name = \"guest.test\", ca = \"{}\", verify = [\"spiffe://guest.test/web\"] }}]\n",
        own.toml(),
        web.ca.display()
    );
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&identity))?;
    let passes = |who: &Credentials| -> Result<bool> {
        let config = format!(
            "[daemon]\nworkers = 1\n{}[[route]]\nto = [{{ upstream = \"gateway\" }}]\n[[upstream]]\nname = \"gateway\"\n\
             endpoints = [\"{GATEWAY}\"]\nverify = [\"{GATEWAY_ID}\"]\n",
            who.believing(&own.ca).toml()
        );
        let exec = world.exec_with(&world.file("agent.toml", config)?);
        Ok(exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?.success())
    };
    assert!(passes(&web)? && passes(&world.pki().named("node"))?, "{}", daemon.log());
    assert!(!passes(&impostor)? && !passes(&ours)?, "{}", daemon.log());
    daemon.process().wait_for_line("failed the chain check")?;
    assert!(!passes(&db)?, "{}", daemon.log());
    daemon.process().wait_for_line("failed the SAN check: wanted spiffe://guest.test/web")?;
    Ok(())
}

/// Where TCP connects and nothing answers a long ClientHello, the error says what may be the matter. With
/// `key_exchange = ["x25519"]` the ClientHello is short, and a gateway accepts it.
#[test]
fn a_long_client_hello_without_an_answer_is_hinted_at_and_key_exchange_shortens_it() -> Result<()> {
    const HINT: &str = "key_exchange = [\"x25519\"] in [identity] keeps it within one";
    /// The key share of ML-KEM-768 by itself (FIPS 203).
    const KEY_SHARE: usize = 1184;
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let silent = SocketAddr::new(NET4, 15010);
    let listener = world.net().run(|| TcpListener::bind(silent))?;
    let _daemon = Daemon::start(&world, world.net(), &gateway(&world.pki().named("gateway").toml()))?;
    let config = |more: &str, endpoint: SocketAddr| {
        format!(
            "[daemon]\nworkers = 1\n{}{more}\n[[route]]\nto = [{{ upstream = \"gateway\" }}]\n[[upstream]]\nname = \"gateway\"\n\
             connect_timeout = \"1s\"\nendpoints = [\"{endpoint}\"]\nverify = [\"{GATEWAY_ID}\"]\n",
            world.pki().named("node").toml()
        )
    };
    for (more, is_long) in [("", true), ("key_exchange = [\"x25519\"]", false)] {
        let exec = world.exec_with(&world.file("agent.toml", config(more, silent))?);
        let done = exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?;
        assert!(!done.success(), "{done}");
        assert_eq!(done.stderr.replace("\\\"", "\"").contains(HINT), is_long, "{done}");
        let mut hello = Vec::new();
        listener.accept()?.0.read_to_end(&mut hello)?;
        assert_eq!(hello.len() > KEY_SHARE, is_long, "{} bytes", hello.len());
        let exec = world.exec_with(&world.file("agent.toml", config(more, GATEWAY))?);
        let done = exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?;
        assert!(done.success(), "{done}");
        // Of the attempts before.
        listener.set_nonblocking(true)?;
        while listener.accept().is_ok() {}
        listener.set_nonblocking(false)?;
    }
    Ok(())
}
