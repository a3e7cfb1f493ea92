//! Who is not who they have to be gets nothing: no byte passes, and the log names the check.

use std::{
    fs,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Result, ensure};
use h2::client::SendRequest;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use tunnel_tests::{
    Exec, Finished, Gateway, NET4, PATIENCE, TARGET4, Target, World,
    daemon::Daemon,
    dialogue::{ask, lines_with},
    peer,
    pki::{Credentials, GATEWAY_ID, NODE_ID},
    target, wait_for,
};

/// The application is connected and reset, and nobody has come to the target.
fn assert_no_byte_passes(exec: &Exec<'_>, target: &Target) -> Result<Finished> {
    let done = exec.run_app(&["expect-reset", &target.addr().to_string(), "100"])?;
    assert_eq!(done.value("connect")?, "ok", "{done}");
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    assert_eq!(done.value("received")?, "0", "{done}");
    assert_eq!(target.peers(), [], "{done}");
    Ok(done)
}

/// A node with `credentials` does not get in; both logs say why.
fn assert_client_refused(
    world: &World,
    gateway: &mut Gateway<'_>,
    credentials: Credentials,
    check: &str,
) -> Result<()> {
    let target = world.serve(TARGET4, target::echo())?;
    let done = assert_no_byte_passes(&world.exec(gateway).credentials(credentials), &target)?;
    let said = gateway.logs("rejected peer connection")?;
    assert!(said.contains(&format!("failed the {check} check")), "{said}");
    ensure!(done.stderr.contains("our certificate"), "the node does not say that it was its own: {done}");
    Ok(())
}

/// A gateway with `credentials` gets nothing; the node's log says why.
fn assert_gateway_refused(world: &World, credentials: Credentials, check: &str) -> Result<()> {
    let gateway = world.gateway().credentials(credentials).start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let done = assert_no_byte_passes(&world.exec(&gateway), &target)?;
    let wanted = format!("failed the {check} check");
    assert!(!lines_with(&done.stderr, &["refused", &wanted]).is_empty(), "no \"{wanted}\" in {done}");
    Ok(())
}

/// A client with a certificate of another CA is rejected, and no byte passes.
///
/// Failure: peer-certificate.
#[test]
fn a_client_of_another_ca_is_not_let_in() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    // It believes ours, so that only the gateway has something to object to.
    let stranger = world.stranger(NODE_ID)?.believing(&world.pki().ca());
    assert_client_refused(&world, &mut gateway, stranger, "chain")
}

/// A client with an expired certificate is rejected, and no byte passes.
///
/// Failure: peer-certificate.
#[test]
fn a_client_whose_certificate_has_expired_is_not_let_in() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let expired = world.pki().issue_expired("old", NODE_ID)?;
    assert_client_refused(&world, &mut gateway, expired, "expiry")
}

/// A client whose certificate has none of the names in `verify` is rejected.
///
/// Failure: peer-certificate.
#[test]
fn a_client_with_the_wrong_san_is_not_let_in() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().flag("--verify", "spiffe://test.tunnel/ns/*/sa/web").start()?;
    let node = world.pki().named("node");
    assert_client_refused(&world, &mut gateway, node, "SAN")?;
    let wanted = world.pki().issue("web", "spiffe://test.tunnel/ns/prod/sa/web", &[])?;
    let target = world.serve(TARGET4, target::echo())?;
    let done =
        world.exec(&gateway).credentials(wanted).run_app(&["many", &target.addr().to_string(), "1", "64"])?;
    assert!(done.success(), "who has the right one is let in: {done}");
    Ok(())
}

/// A client without a certificate is rejected.
///
/// Failure: peer-certificate.
#[test]
fn a_client_without_a_certificate_is_not_let_in() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let config = without_certificate(&world.pki().named("node"))?;
    let (addr, authority) = (gateway.addr(), target.addr().to_string());
    let answered = world.net().block_on(|| async move {
        // A client of TLS 1.3 has finished before the server has judged it (RFC 8446 section 4.4.2).
        let (mut requests, connection) = peer::connect(addr, config).await?;
        let driving = tokio::task::spawn_local(connection);
        let answer = request(&mut requests, &authority).await;
        let driven = driving.await?;
        anyhow::Ok((answer.is_ok(), driven.is_ok()))
    });
    // Either the connection fails already, or nothing on it succeeds.
    assert!(!matches!(answered, Ok((true, _) | (_, true))), "{answered:?}");
    let said = gateway.logs("rejected peer connection")?;
    assert!(said.contains("failed the presence check"), "{said}");
    assert_eq!(target.peers(), []);
    Ok(())
}

async fn request(requests: &mut SendRequest<bytes::Bytes>, authority: &str) -> Result<()> {
    let (response, mut body) = requests.send_request(peer::connect_request(authority)?, false)?;
    body.send_data("a secret".into(), false)?;
    response.await?;
    Ok(())
}

fn without_certificate(who: &Credentials) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&fs::read(&who.ca)?)?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// A gateway whose certificate has another name gets no byte of the application.
///
/// Failure: peer-certificate.
#[test]
fn a_gateway_with_the_wrong_san_gets_no_byte() -> Result<()> {
    let world = World::new()?;
    let other = world.pki().issue("other", "spiffe://test.tunnel/imposter", &["--ip", "10.77.0.2"])?;
    assert_gateway_refused(&world, other, "SAN")
}

/// A gateway with a certificate of another CA gets no byte of the application.
///
/// Failure: peer-certificate.
#[test]
fn a_gateway_of_another_ca_gets_no_byte() -> Result<()> {
    let world = World::new()?;
    // It believes ours, so that only the node has something to object to.
    let stranger = world.stranger(GATEWAY_ID)?.believing(&world.pki().ca());
    assert_gateway_refused(&world, stranger, "chain")
}

/// A gateway with an expired certificate gets no byte of the application.
///
/// Failure: peer-certificate.
#[test]
fn a_gateway_whose_certificate_has_expired_gets_no_byte() -> Result<()> {
    let world = World::new()?;
    let expired = world.pki().issue_expired("old", GATEWAY_ID)?;
    assert_gateway_refused(&world, expired, "expiry")
}

/// Without `verify` the gateway's certificate must be valid for the dialled address.
#[test]
fn without_verify_the_gateway_must_be_valid_for_the_address_that_was_dialled() -> Result<()> {
    let world = World::new()?;
    let elsewhere = world.pki().issue("elsewhere", GATEWAY_ID, &["--ip", "10.99.0.1"])?;
    let gateway = world.gateway().credentials(elsewhere).start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let done = assert_no_byte_passes(&world.exec(&gateway).verify(None), &target)?;
    assert!(done.stderr.contains("failed the SAN check"), "{done}");
    Ok(())
}

/// A log with the quotes inside its quoted fields as they were before.
fn unquoted(log: &str) -> String {
    log.replace("\\\"", "\"")
}

/// A CA with name constraints for URIs, which nobody here can check, is named by both logs, whoever has its certificate.
///
/// Failure: peer-certificate.
#[test]
fn a_ca_with_uri_name_constraints_is_named_as_unsupported_by_both_logs() -> Result<()> {
    const SAID: &str = "the CA \"CN=constrained\" has name constraints for URI names, and URI name constraints are not supported";
    let world = World::new()?;
    for (i, constraints) in
        ["critical,permitted;URI:test.tunnel", "excluded;URI:elsewhere.test"].iter().enumerate()
    {
        let node = world.pki().issue_constrained("c-node", &format!("URI:{NODE_ID}"), constraints)?;
        let mut gateway = world.gateway().listen(port(i, 0)).start()?;
        let target = world.serve(TARGET4, target::echo())?;
        let done = assert_no_byte_passes(&world.exec(&gateway).credentials(node), &target)?;
        let said = gateway.logs("rejected peer connection")?;
        assert!(said.contains("failed the chain check") && said.contains(SAID), "{said}");
        assert!(
            !lines_with(&unquoted(&done.stderr), &["the peer refused our certificate", SAID]).is_empty(),
            "{done}"
        );

        let id = format!("URI:{GATEWAY_ID}");
        let credentials = world.pki().issue_constrained("c-gateway", &id, constraints)?;
        let mut gateway = world.gateway().credentials(credentials).listen(port(i, 1)).start()?;
        let done = assert_no_byte_passes(&world.exec(&gateway), &target)?;
        assert!(!lines_with(&unquoted(&done.stderr), &["failed the chain check", SAID]).is_empty(), "{done}");
        let said = gateway.logs("rejected peer connection")?;
        assert!(said.contains("the peer refused our certificate") && said.contains(SAID), "{said}");
    }
    // What can be checked, is: the CA and its constraints are named, and a certificate within them works.
    let dns = "critical,permitted;DNS:test.tunnel";
    let outside = world.pki().issue_constrained("d", &format!("URI:{NODE_ID},DNS:elsewhere.test"), dns)?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    assert_no_byte_passes(&world.exec(&gateway).credentials(outside), &target)?;
    let said = gateway.logs("rejected peer connection")?;
    assert!(said.contains("name constraints of its CA do not permit (\"CN=constrained\")"), "{said}");
    let inside = world.pki().issue_constrained("d", &format!("URI:{NODE_ID},DNS:a.test.tunnel"), dns)?;
    let exec = world.exec(&gateway).credentials(inside);
    let done = exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?;
    assert!(done.success(), "{done}");
    Ok(())
}

fn port(i: usize, j: usize) -> SocketAddr {
    let offset = u16::try_from(2 * i + j).expect("few");
    SocketAddr::new(NET4, 15100 + offset)
}

/// A certificate that has expired is named by the logs of both sides, also where a resumed session shows it again.
///
/// Failure: peer-certificate.
#[test]
fn an_expired_certificate_in_a_resumed_session_is_named_by_both_logs() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    for whose in ["node", "gateway"] {
        let end = SystemTime::now() + Duration::from_secs(5);
        let (node, gateway) = match whose {
            "node" => (world.pki().issue_until("short", NODE_ID, end)?, world.pki().named("gateway")),
            _ => (world.pki().named("node"), world.pki().issue_until("short", GATEWAY_ID, end)?),
        };
        let address = SocketAddr::new(NET4, 15200);
        let config = format!(
            "{}[[listener]]\naddress = \"{address}\"\nprotocols = [\"h1\"]\n[[route]]\nto = \"direct\"\n\
             [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
            gateway.toml()
        );
        let mut daemon = Daemon::start(&world, world.net(), &config)?;
        // A connection for each flow, so that the second flow resumes the session of the first.
        let config = format!(
            "[daemon]\nworkers = 1\n{}[[route]]\nto = [{{ upstream = \"next\" }}]\n[[upstream]]\nname = \"next\"\n\
             endpoints = [\"{address}\"]\nprotocol = \"h1\"\nverify = [\"{GATEWAY_ID}\"]\n",
            node.toml()
        );
        let exec = world.exec_with(&world.file("agent.toml", config)?);
        let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
        app.says("held=1")?;
        assert_eq!(ask(app.process(), "ping")?, "ok");
        wait_for("the certificate to expire", PATIENCE, || {
            (SystemTime::now() > end + Duration::from_secs(1)).then_some(())
        })?;
        // Connected it always is; whether a byte passes comes afterwards.
        assert_eq!(ask(app.process(), "connect")?, "ok");

        let ours = "the peer refused our certificate: expired, or not valid yet (expiry check)";
        let theirs = "the peer's certificate failed the expiry check: it expired";
        let (node_says, gateway_says) = if whose == "node" { (ours, theirs) } else { (theirs, ours) };
        daemon.process().wait_for_line(gateway_says)?;
        let line = |log: &str| !lines_with(log, &[node_says]).is_empty();
        wait_for("the node's word", PATIENCE, || line(&app.process().stderr()).then_some(()))?;
        app.finish()?;
        daemon.process().stop()?;
    }
    target.connected(2)?;
    assert_eq!(target.peers().len(), 2, "one flow for each round");
    Ok(())
}

/// New connections use a rotated certificate, and established flows continue.
///
/// Failure: peer-certificate.
#[test]
fn new_connections_use_rotated_certificates_and_old_flows_go_on() -> Result<()> {
    const ROTATED: &str = "spiffe://test.tunnel/node-rotated";
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let exec = world.exec(&gateway).flag("--log", "info");
    let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    gateway.logs(&format!("identity={NODE_ID}"))?;

    world.pki().issue("node", ROTATED, &["--force"])?;
    wait_for("the new identity", PATIENCE, || app.process().stderr().contains(ROTATED).then_some(()))?;
    assert_eq!(ask(app.process(), "connect")?, "ok");
    let log = gateway.logs(&format!("identity={ROTATED}"))?;
    assert!(log.contains("tunnel accepted"), "{log}");
    assert_eq!(ask(app.process(), "ping")?, "ok", "the old flow goes on");

    // The gateway's own: a node that wants the new name finds it there, without a restart.
    world.pki().issue("gateway", "spiffe://test.tunnel/gateway-rotated", &["--force"])?;
    gateway.logs("identity=\"spiffe://test.tunnel/gateway-rotated\"")?;
    let other = world.exec(&gateway).verify(Some("spiffe://test.tunnel/gateway-rotated"));
    let done = other.run_app(&["many", &target.addr().to_string(), "1", "64"])?;
    assert!(done.success(), "{done}");
    assert_eq!(ask(app.process(), "ping")?, "ok", "the old flow goes on");
    assert!(app.finish()?.success());
    Ok(())
}

/// A half-written certificate file does not replace the certificate in use.
///
/// Failure: peer-certificate.
#[test]
fn half_written_certificates_do_not_replace_good_ones() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let gw = world.pki().named("gateway");
    let whole = fs::read(&gw.cert)?;
    fs::write(&gw.cert, &whole[..whole.len() / 2])?;
    gateway.logs("failed to reload identity")?;
    let done = world.exec(&gateway).run_app(&["many", &target.addr().to_string(), "1", "64"])?;
    assert!(done.success(), "{done}");
    Ok(())
}
