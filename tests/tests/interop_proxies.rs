//! Other proxies and other clients, unmodified, at the end that each can take: haproxy, nghttpx and squid behind ours,
//! nghttpx and hey in front of it. (curl, redsocks and tinyproxy are in `http1.rs`, Envoy in `interop_envoy.rs`.)

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Result;
use tunnel_tests::{
    NET4, NODE4, Process, TARGET4, Target, World,
    daemon::Daemon,
    ends::{self, Way},
    gateway,
    pki::GATEWAY_ID,
    process, programs, proxies, servers, target,
};

/// What takes HTTP/2 over mTLS.
const HBONE: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// What takes HTTP/1.1 in plaintext.
const PLAIN: SocketAddr = SocketAddr::new(NET4, 3128);
/// A proxy on the node.
const FRONT: SocketAddr = SocketAddr::new(NODE4, 3129);

/// Enough for many frames and records.
const BULK: u64 = 4 << 20;

/// nghttpx would pass on what goes ahead before the next proxy has answered, over HTTP/1.1.
const NGHTTPX: &str = "optimistic_data = false";

/// For `tunnel exec`: everything goes to the proxy, over HTTP/2 and mTLS or over HTTP/1.1 in plaintext. `more` keys of
/// the upstream.
fn agent(world: &World, proxy: SocketAddr, more: &str) -> Result<PathBuf> {
    let (identity, keys) = match proxy {
        HBONE => (world.pki().named("node").toml(), format!("verify = [\"{GATEWAY_ID}\"]")),
        _ => (String::new(), "protocol = \"h1\"\ntls = false".to_owned()),
    };
    let config = format!(
        "[daemon]\nworkers = 1\n{identity}[[route]]\nto = [{{ upstream = \"proxy\" }}]\n\
         [[upstream]]\nname = \"proxy\"\nendpoints = [\"{proxy}\"]\n{keys}\n{more}\n"
    );
    world.file("agent.toml", config)
}

/// One of ours in `net` that takes HTTP/1.1 in plaintext.
fn ours(world: &World) -> Result<Daemon> {
    let config = format!(
        "[daemon]\nworkers = 1\n[[listener]]\naddress = \"{PLAIN}\"\ntls = false\nprotocols = [\"h1\"]\n\
         [[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n"
    );
    Daemon::start(world, world.net(), &config)
}

/// What every one of them carries: bytes both ways, on one connection and on many, and the target's end.
fn carries(way: Way<'_>) -> Result<()> {
    ends::bytes_arrive(way, BULK)?;
    let target = way.serve(target::echo())?;
    way.run_with("many", target.addr(), &["20", "100000"])?;
    ends::the_targets_end_is_heard(way)
}

/// HAProxy accepts our tunnels over HTTP/2 with mTLS and passes them on to tinyproxy.
#[test]
fn haproxy_takes_what_we_carry_over_http_2_and_mtls_and_passes_it_on_to_tinyproxy() -> Result<()> {
    let world = World::new()?;
    let _last = proxies::tinyproxy(&world, PLAIN)?;
    let _haproxy = proxies::haproxy(&world, HBONE, PLAIN)?;
    let exec = world.exec_with(&agent(&world, HBONE, "")?);
    let way = Way::Captured(&world, &exec);
    carries(way)?;
    ends::nobody_there_is_a_reset(way)
}

/// Bytes and half-close pass an HAProxy between two of our processes.
#[test]
fn haproxy_between_two_of_ours_passes_every_byte_and_end_on() -> Result<()> {
    let world = World::new()?;
    let _last = ours(&world)?;
    let _haproxy = proxies::haproxy(&world, HBONE, PLAIN)?;
    let exec = world.exec_with(&agent(&world, HBONE, "")?);
    let way = Way::Captured(&world, &exec);
    carries(way)?;
    ends::its_end_is_heard_and_answered(way)?;
    ends::the_targets_end_is_heard_and_answered(way)?;
    // A target's reset is an end to haproxy; one that cannot be reached is not.
    ends::nobody_there_is_a_reset(way)
}

/// nghttpx accepts our tunnels over HTTP/2 with mTLS and passes them on to tinyproxy.
#[test]
fn nghttpx_takes_what_we_carry_over_http_2_and_mtls_and_passes_it_on_to_tinyproxy() -> Result<()> {
    let world = World::new()?;
    let _last = proxies::tinyproxy(&world, PLAIN)?;
    let _nghttpx = proxies::nghttpx(&world, HBONE, PLAIN)?;
    let exec = world.exec_with(&agent(&world, HBONE, NGHTTPX)?);
    let way = Way::Captured(&world, &exec);
    // It does not pass an application's end on.
    ends::bytes_arrive_until_the_target_ends(way, BULK)?;
    ends::the_targets_end_is_heard(way)?;
    ends::nobody_there_is_a_reset(way)
}

/// Whether what goes ahead waits in a proxy until the next one, over HTTP/1.1, has answered.
fn what_goes_ahead_waits(world: &World, keys: &str) -> Result<()> {
    const A_WHILE: Duration = Duration::from_millis(300);
    let last = Target::start(world.net(), PLAIN, target::late_proxy(A_WHILE, BULK))?;
    let agent = agent(world, HBONE, keys)?;
    let done = world.exec_with(&agent).run_app(&["duplex", "10.200.0.10:80", &BULK.to_string()])?;
    assert_eq!(last.outcomes(1)?, [Ok(())], "{done}");
    assert!(done.success(), "{done}");
    Ok(())
}

/// HAProxy holds optimistic data until its next hop has answered.
#[test]
fn what_goes_ahead_waits_in_haproxy() -> Result<()> {
    let world = World::new()?;
    let _haproxy = proxies::haproxy(&world, HBONE, PLAIN)?;
    what_goes_ahead_waits(&world, "")
}

/// With `optimistic_data = false` nghttpx gets no DATA before its answer.
#[test]
fn where_nothing_goes_ahead_nghttpx_passes_nothing_on_before_the_answer() -> Result<()> {
    let world = World::new()?;
    let _nghttpx = proxies::nghttpx(&world, HBONE, PLAIN)?;
    what_goes_ahead_waits(&world, NGHTTPX)
}

/// Squid carries our tunnels over HTTP/1.
#[test]
fn squid_takes_what_we_carry_over_http_1() -> Result<()> {
    let world = World::new()?;
    let _squid = proxies::squid(&world, PLAIN)?;
    let exec = world.exec_with(&agent(&world, PLAIN, "")?);
    let way = Way::Captured(&world, &exec);
    // One end is both to it, as to tinyproxy.
    carries(way)?;
    ends::nobody_there_is_a_reset(way)
}

/// Pages over TLS behind a listener of ours that takes `protocols`, which a program in Go asks for through tunnels of its
/// own: with `through`, by that proxy, which it talks to in their place. Ours has `logged` that.
fn pages_come_through(
    protocols: &str,
    through: impl FnOnce(&World) -> Result<Option<Process>>,
    logged: &[&str],
) -> Result<()> {
    const PAGES: u64 = 40;
    let world = World::new()?;
    let files = world.folder().join("files");
    std::fs::create_dir_all(&files)?;
    std::fs::write(files.join("page"), "hello\n".repeat(1000))?;
    let server = servers::https(&world, &files)?;
    let config = format!(
        "[daemon]\nworkers = 1\n[[listener]]\naddress = \"{PLAIN}\"\ntls = false\nprotocols = [{protocols}]\n\
         [[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"{TARGET4}:443\"]\n"
    );
    let mut ours = Daemon::start(&world, world.net(), &config)?;
    let proxy = through(&world)?;
    let mut hey = world.node().command(programs::system("hey")?);
    hey.args(["-n", &PAGES.to_string(), "-c", "4"]);
    hey.arg("-x").arg(format!("http://{}", if proxy.is_some() { FRONT } else { PLAIN }));
    let said = process::output(hey.arg(format!("https://{}/page", server.addr())))?;
    assert!(said.contains(&format!("[200]\t{PAGES} responses")), "{said}");
    assert!(!said.contains("Error distribution"), "{said}");
    // nghttpx resets a stream whose client has left only where the target had not ended before: it leaves the others half
    // closed, so they end with it.
    drop(proxy);
    for line in logged {
        ours.process().wait_for_line(line)?;
    }
    Ok(())
}

/// Whoever speaks HTTP/2 CONNECT in plaintext, whatever its own clients speak, gets its pages through a listener.
#[test]
fn nghttpx_gets_pages_through_a_listener_over_http_2_in_plaintext() -> Result<()> {
    let before = |world: &World| proxies::nghttpx_before(world, FRONT, PLAIN).map(Some);
    pages_come_through(
        "\"h2\"",
        before,
        &["accepted in plaintext peer=10.77.0.1:", "destination=10.200.0.10:443"],
    )
}

/// Whoever speaks HTTP/1.1 CONNECT in plaintext gets its pages through a listener.
#[test]
fn a_program_in_go_gets_its_pages_through_a_listener_over_http_1() -> Result<()> {
    pages_come_through("\"h1\"", |_| Ok(None), &["reason=closed destination=10.200.0.10:443"])
}
