//! What is carried arrives: the first promises of the program.

use std::fs;

use anyhow::Result;
use tunnel_tests::{NET4, TARGET4, World, netns::NetNs, process, target};

/// 50 MB that do not compress, and differ everywhere.
fn big_file() -> Vec<u8> {
    let mut bytes = vec![0; 50_000_000];
    tunnel_tests::pattern::DOWN.fill(0, &mut bytes);
    bytes
}

/// An unmodified curl downloads 50 MB unchanged from a server that the node has no route to.
#[test]
fn curl_fetches_50_mb_unchanged_from_a_server_that_the_node_has_no_route_to() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let files = world.folder().join("www");
    fs::create_dir(&files)?;
    let original = big_file();
    fs::write(files.join("big"), &original)?;
    let mut server = tunnel_tests::servers::http(&world, &files)?;
    let url = format!("http://{}/big", server.addr());
    let fetched = world.folder().join("fetched");

    let mut plain = world.node().command("curl");
    plain.args(["--silent", "--show-error", "--max-time", "5", &url]);
    let failed = process::output(&mut plain).expect_err("without the tunnel there is no way");
    assert!(format!("{failed}").contains("curl: (7)"), "{failed}");

    let out = fetched.to_str().expect("the path of a temporary file is text");
    let done =
        world.exec(&gateway).run(&["curl", "--silent", "--show-error", "--fail", "--output", out, &url])?;
    assert!(done.success(), "{done}");
    assert!(fs::read(&fetched)? == original, "the file has changed on its way");

    let flows = done.flows()?;
    assert_eq!(flows.len(), 1, "{flows:?}");
    assert_eq!(flows[0]["destination"], server.addr().to_string(), "{flows:?}");
    assert!(flows[0]["received"].as_u64() > Some(50_000_000), "{flows:?}");
    assert_eq!(flows[0]["identity"], tunnel_tests::pki::GATEWAY_ID, "{flows:?}");
    // Python's log begins with the client's address.
    let log = server.process().wait_for_line("GET /big")?;
    assert!(log.starts_with(&NET4.to_string()), "the server sees somebody else: {log}");
    Ok(())
}

/// The target sees the gateway's address, and the application sees the target's.
#[test]
fn the_target_sees_the_gateway_and_the_application_sees_the_target() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::name_the_peer())?;
    let done = world.exec(&gateway).run_app(&["names", &target.addr().to_string()])?;
    assert!(done.success(), "{done}");
    assert_eq!(done.value("peer")?, target.addr().to_string(), "getpeername shows where it is connected to");
    let seen: std::net::SocketAddr = done.value("seen")?.parse()?;
    assert_eq!(seen.ip(), NET4, "the target sees the gateway");
    assert_eq!(target.peers(), [seen]);
    Ok(())
}

/// Without the tunnel the node cannot reach the target: the other tests prove something.
#[test]
fn without_the_tunnel_the_node_has_no_route() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let refused = plain(world.node(), &["connect-error", &target.addr().to_string()])?;
    assert!(refused.contains("connect=ENETUNREACH"), "{refused}");
    Ok(())
}

fn plain(host: &NetNs, words: &[&str]) -> Result<String> {
    process::output(host.command(tunnel_tests::programs::app()?).args(words))
}
