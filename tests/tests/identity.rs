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

/// URI name constraints of a CA are checked: a certificate within them works on either side, and one outside is rejected by both
/// sides with the CA's name. Constraints of a kind that is not supported are named.
///
/// Failure: peer-certificate.
#[test]
fn uri_name_constraints_of_a_ca_are_checked() -> Result<()> {
    const VIOLATED: &str =
        "the name constraints of its CA do not permit spiffe://test.tunnel/node (\"CN=constrained\")";
    const UNSUPPORTED: &str = "the CA \"CN=constrained\" has name constraints for directory names, and directory name constraints \
                               are not supported";
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let (node_id, gateway_id) = (format!("URI:{NODE_ID}"), format!("URI:{GATEWAY_ID}"));
    let issue =
        |name: &str, id: &str, constraints: &str| world.pki().issue_constrained(name, id, constraints);
    let within = [
        "critical,permitted;URI:test.tunnel",
        "permitted;URI:test.tunnel",
        "critical,excluded;URI:elsewhere.test",
    ];
    for (i, constraints) in within.iter().enumerate() {
        let gateway = issue("c-gateway", &gateway_id, constraints)?;
        let mut gateway = world.gateway().credentials(gateway).listen(port(i, 0)).start()?;
        let exec = world.exec(&gateway).credentials(issue("c-node", &node_id, constraints)?);
        let done = exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?;
        assert!(done.success(), "{constraints}: {done}\n{}", gateway.log());
        gateway.stop()?;
    }
    // A target of its own, which nobody comes to.
    let lonely = world.serve(TARGET4, target::echo())?;
    let outside = ["critical,permitted;URI:elsewhere.test", "critical,excluded;URI:test.tunnel"];
    for (i, constraints) in outside.iter().enumerate() {
        let node = issue("c-node", &node_id, constraints)?;
        let mut gateway = world.gateway().listen(port(i, 1)).start()?;
        let done = assert_no_byte_passes(&world.exec(&gateway).credentials(node), &lonely)?;
        let said = unquoted(&gateway.logs("rejected peer connection")?);
        assert!(said.contains("failed the chain check") && said.contains(VIOLATED), "{said}");
        assert!(
            !lines_with(&unquoted(&done.stderr), &["the peer refused our certificate", VIOLATED]).is_empty(),
            "{done}"
        );
    }
    let constraints = "critical,permitted;dirName:dir\\n[dir]\\nO=elsewhere";
    let script = issue_with_subject(&world, &node_id, constraints)?;
    let mut gateway = world.gateway().listen(port(2, 1)).start()?;
    assert_no_byte_passes(&world.exec(&gateway).credentials(script), &lonely)?;
    let said = unquoted(&gateway.logs("rejected peer connection")?);
    assert!(said.contains(UNSUPPORTED), "{said}");

    let dns = "critical,permitted;DNS:test.tunnel";
    let outside = issue("d", &format!("URI:{NODE_ID},DNS:elsewhere.test"), dns)?;
    let mut gateway = world.gateway().start()?;
    assert_no_byte_passes(&world.exec(&gateway).credentials(outside), &lonely)?;
    let said = unquoted(&gateway.logs("rejected peer connection")?);
    assert!(said.contains("the name constraints of its CA do not permit elsewhere.test"), "{said}");
    let inside = issue("d", &format!("URI:{NODE_ID},DNS:a.test.tunnel"), dns)?;
    let exec = world.exec(&gateway).credentials(inside);
    let done = exec.run_app(&["many", &target.addr().to_string(), "1", "64"])?;
    assert!(done.success(), "{done}");
    Ok(())
}

/// A certificate with a subject, of a CA whose constraints speak of subjects.
fn issue_with_subject(world: &World, id: &str, constraints: &str) -> Result<Credentials> {
    world.pki().issue_by("s", &[("subject", "/O=node"), ("constraints", constraints)], id)
}

/// Chains as corporate CAs have them: two paths of which one has expired, a cross-signed CA whose other root is not known, an
/// unrelated intermediate first, and a bundle of 200 roots of which one is broken.
///
/// Failure: peer-certificate.
#[test]
fn a_chain_with_one_good_path_is_accepted() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let script = "
        key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out $1.key; }
        root() { key $1; openssl req -x509 -new -key $1.key -days 2 -subj /CN=$1 -out $1.pem -addext basicConstraints=critical,CA:true -addext keyUsage=critical,keyCertSign; }
        root old; root new; key int; key leaf
        openssl req -new -key int.key -subj /CN=int -out int.csr
        printf 'basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign\n' > int.ext
        openssl x509 -req -in int.csr -CA old.pem -CAkey old.key -set_serial 1 -days 2 -extfile int.ext -out int-old.pem
        openssl x509 -req -in int.csr -CA new.pem -CAkey new.key -set_serial 2 -days 2 -extfile int.ext -out int-new.pem
        openssl x509 -req -in int.csr -CA new.pem -CAkey new.key -set_serial 3 -days -1 -extfile int.ext -out int-expired.pem
        openssl req -new -key leaf.key -subj / -out leaf.csr
        printf 'subjectAltName=critical,URI:spiffe://test.tunnel/node\nextendedKeyUsage=serverAuth,clientAuth\n' > leaf.ext
        openssl x509 -req -in leaf.csr -CA int-new.pem -CAkey int.key -set_serial 4 -days 1 -extfile leaf.ext -out leaf.pem
    ";
    let folder = world.pki().run("chains", script)?;
    let read = |name: &str| fs::read_to_string(folder.join(name));
    // 200 roots of which one is broken, and the one that matters.
    let broken = "-----BEGIN CERTIFICATE-----\nMIIBAAAA\n-----END CERTIFICATE-----\n";
    let own = fs::read_to_string(world.pki().ca())?;
    let bundle = read("old.pem")?.repeat(100) + broken + &own + &read("old.pem")?.repeat(99);
    let with_new = bundle + &read("new.pem")?;
    let ca = world.file("200.pem", with_new)?;
    let gateway = world.pki().named("gateway").believing(&ca);
    let mut gateway = world.gateway().credentials(gateway).start()?;
    gateway.logs("left out a CA certificate")?;
    let chains = [
        read("int-new.pem")?,
        // Cross-signed by a root that is known as well, and by one that has expired.
        read("int-old.pem")? + &read("int-new.pem")?,
        read("int-expired.pem")? + &read("int-new.pem")?,
        // An unrelated certificate in between, and the root at the end.
        own + &read("int-new.pem")? + &read("new.pem")?,
    ];
    for (i, above) in chains.iter().enumerate() {
        let cert = world.file(&format!("chain-{i}.pem"), read("leaf.pem")? + above)?;
        let node = Credentials { cert, key: folder.join("leaf.key"), ca: world.pki().ca() };
        let done = world.exec(&gateway).credentials(node).run_app(&[
            "many",
            &target.addr().to_string(),
            "1",
            "64",
        ])?;
        assert!(done.success(), "chain {i}: {done}\n{}", gateway.log());
    }
    Ok(())
}

/// A certificate that a list revokes is rejected with that reason, and after a change of the list its connections take no new
/// streams.
///
/// Failure: peer-certificate.
#[test]
fn a_revoked_certificate_is_rejected_and_its_connections_take_no_new_streams() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let crl = world.file("ca.crl", world.pki().crl(&[])?)?;
    let address = SocketAddr::new(NET4, 15300);
    let config = format!(
        "{}crls = [\"{}\"]\n[[listener]]\naddress = \"{address}\"\n[[route]]\nto = \"direct\"\n[[policy]]\n\
         identity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml(),
        crl.display()
    );
    let mut daemon = Daemon::start(&world, world.net(), &config)?;
    let config = world.pki().named("node").toml() + &tunnel_tests::daemon::through(address, GATEWAY_ID);
    let exec = world.exec_with(&world.file("agent.toml", config)?);
    let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "again")?, "ok");

    fs::write(&crl, world.pki().crl(&[&world.pki().named("node")])?)?;
    let line = daemon.process().wait_for_line("draining connection of a peer")?;
    assert!(line.contains("evoked"), "{line}");
    assert_ne!(ask(app.process(), "again")?, "ok");
    assert_eq!(ask(app.process(), "ping")?, "ok", "its flow goes on");
    let line = daemon.process().wait_for_line("rejected peer connection")?;
    assert!(line.contains("evoked"), "{line}");
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
