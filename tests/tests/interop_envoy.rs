//! Envoy, unmodified, with the configurations of `examples/envoy/`: at the far end, at the near end, between two of
//! ours, and on both sides of one of ours.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use anyhow::Result;
use http::Request;
use tunnel_tests::{
    NET4, TARGET4, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::Daemon,
    ends::{self, Way},
    envoy::{ENVOY_ID, Envoy},
    gateway,
    hop::Hop,
    pki::GATEWAY_ID,
    process, programs, servers, target,
};

/// HBONE's, where ours or Envoy listens.
const HBONE: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// The one behind it.
const NEXT: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 1);
/// The last one.
const LAST: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 2);
/// Of the listeners without TLS.
const PLAIN: SocketAddr = SocketAddr::new(NET4, 3128);
/// Where `examples/envoy/client.yaml` leads.
const FIXED: SocketAddr = SocketAddr::new(TARGET4, 8080);

/// Enough for many frames and records.
const BULK: u64 = 4 << 20;

/// For `tunnel exec`: everything goes through Envoy. `keys` are more of the upstream.
fn agent(world: &World, envoy: SocketAddr, tls: bool, protocol: &str, keys: &str) -> Result<PathBuf> {
    let (identity, verify) = match tls {
        true => (world.pki().named("node").toml(), format!("verify = [\"{ENVOY_ID}\"]\n")),
        false => (String::new(), String::new()),
    };
    let config = format!(
        "[daemon]\nworkers = 1\n{identity}[[route]]\nto = [{{ upstream = \"envoy\" }}]\n[[upstream]]\n\
         name = \"envoy\"\nendpoints = [\"{envoy}\"]\nprotocol = \"{protocol}\"\ntls = {tls}\n{verify}{keys}\n"
    );
    world.file("agent.toml", config)
}

/// One of ours in `net`, with TLS, that passes everything on to a next hop.
fn passing_on(world: &World, at: SocketAddr, next: SocketAddr, verify: &str) -> Result<Daemon> {
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{at}\"\n[[route]]\nto = [{{ upstream = \"next\" }}]\n\
         [[upstream]]\nname = \"next\"\nendpoints = [\"{next}\"]\nverify = [\"{verify}\"]\n\
         [[policy]]\nidentity = [\"{ENVOY_ID}\"]\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    Daemon::start(world, world.net(), &config)
}

fn envoy_ends(
    port: SocketAddr,
    tls: bool,
    protocol: &str,
    check: impl FnOnce(Way<'_>) -> Result<()>,
) -> Result<()> {
    let world = World::new()?;
    let _envoy = Envoy::start(&world, world.net(), "gateway.yaml", &[HBONE.port(), PLAIN.port()], &[])?;
    let exec = world.exec_with(&agent(&world, port, tls, protocol, "")?);
    check(Way::Captured(&world, &exec))
}

/// Envoy terminates our tunnels over HTTP/2 with mTLS.
#[test]
fn envoy_ends_what_we_carry_over_http_2_and_mtls() -> Result<()> {
    envoy_ends(HBONE, true, "h2", |way| {
        ends::bytes_arrive(way, BULK)?;
        ends::its_end_is_heard_and_answered(way)?;
        // It drops what comes behind.
        ends::the_targets_end_is_heard(way)?;
        ends::a_reset_of_the_target_is_a_reset(way)?;
        ends::nobody_there_is_a_reset(way)
    })
}

/// Envoy terminates our tunnels over HTTP/2 in plaintext.
#[test]
fn envoy_ends_what_we_carry_over_http_2_in_plaintext() -> Result<()> {
    envoy_ends(PLAIN, false, "h2", |way| {
        ends::bytes_arrive(way, BULK)?;
        ends::its_end_is_heard_and_answered(way)?;
        // It drops what comes behind.
        ends::the_targets_end_is_heard(way)?;
        ends::a_reset_of_the_target_is_a_reset(way)?;
        ends::nobody_there_is_a_reset(way)
    })
}

/// Envoy terminates our tunnels over HTTP/1 in plaintext.
#[test]
fn envoy_ends_what_we_carry_over_http_1_in_plaintext() -> Result<()> {
    envoy_ends(PLAIN, false, "h1", |way| {
        ends::bytes_arrive(way, BULK)?;
        // One end is both to Envoy.
        ends::the_targets_end_is_heard(way)?;
        ends::without_a_target_it_ends(way)
    })
}

/// One of ours ends what Envoy begins; `port` is the one of Envoy's listener.
fn envoy_begins(port: u16, check: impl FnOnce(Way<'_>) -> Result<()>) -> Result<()> {
    let world = World::new()?;
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{HBONE}\"\n[[listener]]\naddress = \"{PLAIN}\"\n\
         tls = false\nprotocols = [\"h2\", \"h1\"]\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    let mut ours = Daemon::start(&world, world.net(), &config)?;
    let _envoy = Envoy::start(&world, world.node(), "client.yaml", &[10443, 10080, 10081], &[])?;
    check(Way::Port(&world, SocketAddr::new([127, 0, 0, 1].into(), port), FIXED))?;
    let line = ours.process().wait_for_line("reason=closed destination=")?;
    assert_eq!(line.contains(ENVOY_ID), port == 10443, "{line}");
    Ok(())
}

/// We terminate Envoy's tunnels over HTTP/2 with mTLS.
#[test]
fn we_end_what_envoy_carries_over_http_2_and_mtls() -> Result<()> {
    envoy_begins(10443, |way| {
        ends::bytes_arrive(way, BULK)?;
        ends::its_end_is_heard_and_answered(way)?;
        ends::the_targets_end_is_heard_and_answered(way)?;
        ends::a_reset_of_the_application_is_a_reset(way)?;
        ends::without_a_target_it_ends(way)
    })
}

/// We terminate Envoy's tunnels over HTTP/2 in plaintext.
#[test]
fn we_end_what_envoy_carries_over_http_2_in_plaintext() -> Result<()> {
    envoy_begins(10080, |way| {
        ends::bytes_arrive(way, BULK)?;
        ends::its_end_is_heard_and_answered(way)?;
        ends::the_targets_end_is_heard_and_answered(way)?;
        ends::a_reset_of_the_application_is_a_reset(way)?;
        ends::without_a_target_it_ends(way)
    })
}

/// We terminate Envoy's tunnels over HTTP/1 in plaintext.
#[test]
fn we_end_what_envoy_carries_over_http_1_in_plaintext() -> Result<()> {
    envoy_begins(10081, |way| {
        ends::bytes_arrive(way, BULK)?;
        // One end is both to Envoy.
        ends::the_targets_end_is_heard(way)?;
        ends::without_a_target_it_ends(way)
    })
}

/// An Envoy that passes CONNECT on to [`NEXT`].
fn in_the_middle(world: &World) -> Result<Envoy> {
    let next =
        ("address: 10.9.0.2, port_value: 15008", format!("address: {NET4}, port_value: {}", NEXT.port()));
    Envoy::start(world, world.net(), "middle.yaml", &[HBONE.port()], &[(next.0, &next.1)])
}

/// Bytes, half-close and resets pass an Envoy between two of our processes.
#[test]
fn an_envoy_between_two_of_ours_passes_every_byte_end_and_reset_on() -> Result<()> {
    let world = World::new()?;
    let mut last = world.gateway().listen(NEXT).start()?;
    let _envoy = in_the_middle(&world)?;
    let exec = world.exec_with(&agent(&world, HBONE, true, "h2", "")?);
    let way = Way::Captured(&world, &exec);
    ends::bytes_arrive(way, BULK)?;
    ends::is_a_byte_stream(way)?;
    ends::nobody_there_is_a_reset(way)?;
    let line = last.logs("reason=closed destination=")?;
    assert!(line.contains(ENVOY_ID), "{line}");
    Ok(())
}

/// The value of the only line of a header.
fn only<'a>(request: &'a Request<()>, name: &str) -> &'a str {
    let lines: Vec<_> = request.headers().get_all(name).iter().collect();
    assert_eq!(lines.len(), 1, "{name}: {request:?}");
    lines[0].to_str().expect("a text")
}

/// `baggage`, `forwarded` and `traceparent` pass an Envoy between two of our processes.
#[test]
fn through_an_envoy_between_two_of_ours_baggage_forwarded_and_the_trace_arrive() -> Result<()> {
    const TO: &str = "10.200.0.10:80";
    let world = World::new()?;
    let hop = |addr| Hop::start(world.net(), addr, &world.pki().named("gateway"));
    let keys = "headers = { baggage = \"k8s.cluster.name=a,k8s.namespace.name=b\" }";
    let exec = world.exec_with(&agent(&world, HBONE, true, "h2", keys)?);
    let _envoy = in_the_middle(&world)?;
    let asked = |hop: &Hop| -> Result<Request<()>> {
        let done = exec.run_app(&["many", TO, "1", "1000"])?;
        assert!(done.success(), "{done}");
        let [request] = &hop.asked()[..] else { panic!("one request: {:?}", hop.asked()) };
        Ok(request.clone())
    };
    // What Envoy makes of ours.
    let next = hop(NEXT)?;
    let request = asked(&next)?;
    drop(next);
    assert_eq!(request.uri().to_string(), TO);
    assert_eq!(only(&request, "baggage"), "k8s.cluster.name=a,k8s.namespace.name=b");
    assert_eq!(only(&request, "forwarded"), "for=127.0.0.1");
    assert_eq!(only(&request, "traceparent").len(), 55, "{request:?}");
    // And what ours makes of Envoy's.
    let _ours = passing_on(&world, NEXT, LAST, GATEWAY_ID)?;
    let last = hop(LAST)?;
    let request = asked(&last)?;
    assert_eq!(request.uri().to_string(), TO);
    assert_eq!(only(&request, "baggage"), "k8s.cluster.name=a,k8s.namespace.name=b");
    assert_eq!(only(&request, "forwarded"), format!("for=127.0.0.1, for={NET4}"));
    assert_eq!(only(&request, "traceparent").len(), 55, "{request:?}");
    let hops: Vec<_> = only(&request, "via").split(", ").collect();
    assert!(hops[0].contains("envoy-middle") && hops[1].starts_with("2 tunnel-"), "{hops:?}");
    Ok(())
}

/// Bytes and headers between two Envoys pass one of our processes.
#[test]
fn one_of_ours_between_two_envoys_passes_on_what_they_tell_each_other() -> Result<()> {
    let world = World::new()?;
    let hbone = ("port_value: 15008", format!("port_value: {}", NEXT.port()));
    let ports = [NEXT.port(), PLAIN.port()];
    let _far = Envoy::start(&world, world.net(), "gateway.yaml", &ports, &[(hbone.0, &hbone.1)])?;
    let mut ours = passing_on(&world, HBONE, NEXT, ENVOY_ID)?;
    let _near = Envoy::start(&world, world.node(), "client.yaml", &[10443], &[])?;
    let way = Way::Port(&world, SocketAddr::new([127, 0, 0, 1].into(), 10443), FIXED);
    ends::bytes_arrive(way, BULK)?;
    ends::its_end_is_heard_and_answered(way)?;
    ends::the_targets_end_is_heard(way)?;
    ends::without_a_target_it_ends(way)?;
    let line = ours.process().wait_for_line("reason=closed destination=")?;
    assert!(line.contains(ENVOY_ID), "{line}");
    Ok(())
}

/// A page at the server behind it all.
fn page(world: &World) -> Result<servers::Server> {
    let files = world.folder().join("files");
    std::fs::create_dir_all(&files)?;
    std::fs::write(files.join("page"), "hello\n")?;
    servers::http(world, &files)
}

/// HTTP requests that Envoy tunnels in CONNECT leave our gateway unchanged.
#[test]
fn http_requests_that_envoy_puts_into_connect_are_taken_out_by_ours() -> Result<()> {
    let world = World::new()?;
    let mut ours = world.gateway().start()?;
    let server = page(&world)?;
    let _envoy = Envoy::start(&world, world.node(), "encapsulate.yaml", &[10080], &[])?;
    let mut curl = world.node().command("curl");
    curl.args(["-sS", "--fail", "--include", "--max-time", "20", "http://127.0.0.1:10080/page"]);
    let said = process::output(&mut curl)?;
    assert!(said.contains("server: envoy") && said.ends_with("\r\n\r\nhello\n"), "{said}");
    let line = ours.logs(&format!("destination={}", server.addr()))?;
    assert!(line.contains(ENVOY_ID), "{line}");
    Ok(())
}

/// HTTP requests that we tunnel in CONNECT are extracted and routed by Envoy.
#[test]
fn http_requests_that_ours_puts_into_connect_are_taken_out_and_routed_by_envoy() -> Result<()> {
    let world = World::new()?;
    let server = page(&world)?;
    let _envoy = Envoy::start(&world, world.net(), "decapsulate.yaml", &[HBONE.port()], &[])?;
    let exec = world.exec_with(&agent(&world, HBONE, true, "h2", "")?);
    let url = format!("http://{}/page", server.addr());
    let done = exec.run(&["curl", "-sS", "--fail", "--include", "--max-time", "20", &url])?;
    assert!(done.success(), "{done}");
    assert!(done.stdout.contains("x-decapsulated-by: envoy\r\n"), "{done}");
    assert!(done.stdout.ends_with("\r\n\r\nhello\n"), "{done}");
    Ok(())
}

/// An unmodified Envoy reads the original destination from our capture.
#[test]
fn an_unmodified_envoy_asks_our_capture_where_a_connection_wanted_to_go() -> Result<()> {
    const BYTES: u64 = 300_000;
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let (group, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let adopt = |command: &mut Command| group.adopt(command);
    // It is asked about connections of the group's, so it is in the group.
    let _envoy = Envoy::start_with(&world, world.node(), "original-dst.yaml", &[15001], &[], adopt)?;
    let config = format!(
        "[daemon]\n{}\n[[capture]]\ncgroup = \"{}\"\ninclude = [\"10.200.0.0/24\"]\nproxy = \"127.0.0.1:15001\"\n",
        bpffs.toml(),
        group.path().display()
    );
    let _capture = Daemon::start(&world, world.node(), &config)?;
    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let mut app = world.node().command(programs::app()?);
    app.args(["duplex", &target.addr().to_string(), &BYTES.to_string()]);
    group.adopt(&mut app)?;
    let said = process::output(&mut app)?;
    assert!(said.contains(&format!("duplex={BYTES}")), "{said}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    let line = gateway.logs("reason=closed destination=")?;
    assert!(line.contains(ENVOY_ID) && line.contains(&target.addr().to_string()), "{line}");
    Ok(())
}
