//! Every way in which a program connects is carried, and what is not TCP is left alone.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use tunnel_tests::{
    BLACKHOLE, Finished, NET4, NET6, NODE4, TARGET4, TARGET6, Target, World,
    target::{self, UdpTarget},
};

const BYTES: u64 = 100_000;

/// Runs the application with `words`, in which `ADDR` stands for a target at `ip`; every byte is checked at
/// both ends, and the target sees the gateway.
fn carried(ip: IpAddr, words: &[&str]) -> Result<(Finished, SocketAddr)> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(ip, target::duplex(BYTES))?;
    let (addr, bytes) = (target.addr().to_string(), BYTES.to_string());
    let put = |&word: &&str| match word {
        "ADDR" => addr.clone(),
        "BYTES" => bytes.clone(),
        word => word.to_owned(),
    };
    let words: Vec<String> = words.iter().map(put).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = world.exec(&gateway).run_app(&words)?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())], "{done}");
    let gateway_address = if ip.is_ipv4() { NET4 } else { NET6 };
    assert_eq!(target.peers().iter().map(SocketAddr::ip).collect::<Vec<_>>(), [gateway_address], "{done}");
    assert_eq!(done.flows()?.len(), 1, "{done}");
    Ok((done, target.addr()))
}

/// Connections over IPv6 are captured and carried.
#[test]
fn ipv6_is_carried() -> Result<()> {
    carried(TARGET6, &["duplex", "ADDR", "BYTES"]).map(drop)
}

/// getpeername() on a captured IPv6 socket returns the target.
#[test]
fn getpeername_shows_the_ipv6_target() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET6, target::name_the_peer())?;
    let done = world.exec(&gateway).run_app(&["names", &target.addr().to_string()])?;
    assert_eq!(done.value("peer")?, target.addr().to_string());
    assert_eq!(done.value("seen")?.parse::<SocketAddr>()?.ip(), NET6);
    Ok(())
}

/// An IPv6 socket that connects to a v4-mapped address is captured and carried.
#[test]
fn an_ipv6_socket_that_connects_to_a_v4_mapped_address_is_carried() -> Result<()> {
    let (done, target) = carried(TARGET4, &["v4mapped", "ADDR", "BYTES"])?;
    assert_eq!(done.value("peer")?, format!("[::ffff:{}]:{}", target.ip(), target.port()));
    Ok(())
}

/// A non-blocking connect() is captured and carried.
#[test]
fn a_non_blocking_connect_is_carried() -> Result<()> {
    for ip in [TARGET4, TARGET6] {
        let (done, target) = carried(ip, &["nonblocking", "ADDR", "BYTES"])?;
        assert_eq!(done.value("connect")?, "EINPROGRESS");
        assert_eq!(done.value("so_error")?, "0");
        // Once it is up, Linux says so to the first that asks in this way.
        assert_eq!(done.value("connect_again")?, "None");
        assert_eq!(done.value("peer")?, target.to_string());
    }
    Ok(())
}

/// A socket that was bound before connect() is captured and carried.
#[test]
fn a_socket_bound_before_it_connects_is_carried() -> Result<()> {
    let (done, target) = carried(TARGET4, &["bound", "ADDR", "0.0.0.0:4567", "BYTES"])?;
    assert_eq!(done.value("peer")?, target.to_string());
    let local: SocketAddr = done.value("local")?.parse()?;
    assert_eq!(local.port(), 4567, "the port that it was bound to");
    Ok(())
}

/// A socket that was bound to an address of the node before connect() is captured and carried.
#[test]
fn a_socket_bound_to_an_address_of_the_node_before_it_connects_is_carried() -> Result<()> {
    let (done, target) = carried(TARGET4, &["bound", "ADDR", &format!("{NODE4}:0"), "BYTES"])?;
    assert_eq!(done.value("peer")?, target.to_string());
    assert_eq!(done.value("local")?.parse::<SocketAddr>()?.ip(), NODE4);
    Ok(())
}

/// A socket with TCP_FASTOPEN_CONNECT is captured and carried.
#[test]
fn tcp_fastopen_connect_is_carried() -> Result<()> {
    for ip in [TARGET4, TARGET6] {
        carried(ip, &["fastopen", "ADDR", "BYTES"])?;
    }
    Ok(())
}

/// A connection that sendto() with MSG_FASTOPEN opens is captured and carried.
#[test]
fn sendto_with_msg_fastopen_is_carried() -> Result<()> {
    for ip in [TARGET4, TARGET6] {
        let (done, target) = carried(ip, &["fastopen-sendto", "ADDR", "BYTES"])?;
        assert_eq!(done.value("peer")?, target.to_string());
    }
    Ok(())
}

/// Whom a target at an address that the node reaches by itself sees: a program that escapes shows itself.
fn seen(world: &World, ip: IpAddr, words: &[&str]) -> Result<Finished> {
    let gateway = world.gateway().allow("10.77.0.0/30").allow("fd77::/64").start()?;
    let target = Target::start(world.net(), SocketAddr::new(ip, 0), target::name_the_peer())?;
    let addr = target.addr().to_string();
    let words: Vec<&str> = words.iter().map(|&word| if word == "ADDR" { &addr } else { word }).collect();
    world.exec(&gateway).run_app(&words)
}

/// A Multipath TCP socket does not bypass the capture.
#[test]
fn mptcp_does_not_escape() -> Result<()> {
    for ip in [NET4, NET6] {
        let world = World::new()?;
        let done = seen(&world, ip, &["mptcp", "ADDR"])?;
        // Carried or refused; never past us. A kernel without MPTCP refuses by itself.
        if done.value("socket")? == "ok" && done.value("connect")? == "ok" {
            assert_eq!(done.value("seen")?.parse::<SocketAddr>()?.ip(), ip, "{done}");
        }
    }
    Ok(())
}

/// A socket that connects again reaches the target of its last connect().
#[test]
fn a_socket_that_connects_twice_goes_where_it_was_told_last() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let one = world.serve(TARGET4, target::name_the_peer())?;
    let two = world.serve(TARGET4, target::name_the_peer())?;
    let loopback = Target::start(world.node(), "127.0.0.1:0".parse()?, target::name_the_peer())?;
    for (first, second, carried) in [(&one, &two, 2), (&one, &loopback, 1), (&loopback, &two, 1)] {
        let (first, second) = (first.addr().to_string(), second.addr().to_string());
        let done = world.exec(&gateway).run_app(&["again", &first, &second])?;
        assert!(done.success(), "{done}");
        let peers: Vec<_> = done.stdout.lines().filter_map(|line| line.strip_prefix("peer=")).collect();
        assert_eq!(peers, [&first, &second], "{done}");
        assert_eq!(done.value("between")?, "ENOTCONN", "{done}");
        assert_eq!(done.flows()?.len(), carried, "{done}");
    }
    Ok(())
}

/// A connection to the unspecified address reaches this host and is not captured.
#[test]
fn the_unspecified_address_is_this_host_and_left_alone() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for (own, typed) in [("127.0.0.1:0", "0.0.0.0"), ("[::1]:0", "[::]")] {
        let target = Target::start(world.node(), own.parse()?, target::name_the_peer())?;
        let done = world.exec(&gateway).run_app(&["names", &format!("{typed}:{}", target.addr().port())])?;
        assert!(done.success(), "{done}");
        assert_eq!(done.value("peer")?, target.addr().to_string(), "{done}");
        assert_eq!(done.flows()?.len(), 0, "{done}");
    }
    Ok(())
}

/// Connections of child processes are captured and carried.
#[test]
fn a_process_tree_is_carried() -> Result<()> {
    carried(TARGET4, &["tree", "ADDR", "BYTES", "3"]).map(drop)
}

/// Connections that many threads open at once are captured, each to its own target.
#[test]
fn many_threads_that_connect_at_once_are_carried() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let done = world.exec(&gateway).run_app(&["many", &target.addr().to_string(), "100", "10000"])?;
    assert!(done.success(), "{done}");
    let outcomes = target.outcomes(100)?;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(done.flows()?.len(), 100);
    Ok(())
}

/// Loopback is not captured unless the configuration includes it.
#[test]
fn loopback_is_left_alone_unless_it_is_asked_for() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("127.0.0.1/32").start()?;
    let own = Target::start(world.node(), "127.0.0.1:0".parse()?, target::duplex(BYTES))?;
    let (addr, bytes) = (own.addr().to_string(), BYTES.to_string());
    let done = world.exec(&gateway).run_app(&["duplex", &addr, &bytes])?;
    assert!(done.success(), "{done}");
    assert_eq!(done.flows()?.len(), 0, "{done}");
    drop(own);

    // The gateway's loopback, not the node's.
    let far = Target::start(world.net(), addr.parse()?, target::duplex(BYTES))?;
    let capture = format!("127.0.0.1/32:{}", far.addr().port());
    let done = world.exec(&gateway).flag("--capture", capture).run_app(&["duplex", &addr, &bytes])?;
    assert!(done.success(), "{done}");
    assert_eq!(far.outcomes(1)?, [Ok(())]);
    assert_eq!(done.flows()?.len(), 1, "{done}");
    Ok(())
}

/// An excluded destination is not captured.
#[test]
fn what_is_excluded_goes_its_own_way() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let target = Target::start(world.net(), SocketAddr::new(NET4, 0), target::name_the_peer())?;
    let addr = target.addr().to_string();
    let through = world.exec(&gateway).run_app(&["names", &addr])?;
    assert_eq!(through.value("seen")?.parse::<SocketAddr>()?.ip(), NET4, "captured: the gateway dials");
    let direct = world.exec(&gateway).flag("--exclude", format!("{NET4}/32")).run_app(&["names", &addr])?;
    assert_eq!(direct.value("seen")?.parse::<SocketAddr>()?.ip(), NODE4, "excluded: the node connects");
    assert_eq!(direct.flows()?.len(), 0, "{direct}");
    Ok(())
}

/// UDP is not captured.
#[test]
fn udp_is_left_alone() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for ip in [NET4, NET6] {
        let target = UdpTarget::start(world.net(), SocketAddr::new(ip, 0))?;
        let done = world.exec(&gateway).run_app(&["udp", &target.addr().to_string()])?;
        assert_eq!(done.value("loose")?, "ok", "{done}");
        assert_eq!(done.value("from")?, target.addr().to_string());
        assert_eq!(done.value("joined")?, "ok", "{done}");
        assert_eq!(done.value("peer")?, target.addr().to_string());
        assert_eq!(done.flows()?.len(), 0, "{done}");
    }
    // Where TCP would be carried, a datagram fails as it would without us.
    let done = world.exec(&gateway).run_app(&["udp", &format!("{TARGET4}:53")])?;
    assert_eq!((done.value("loose")?, done.value("joined")?), ("ENETUNREACH", "ENETUNREACH"), "{done}");
    Ok(())
}

/// A connection to a target that never answers delays no other connection.
#[test]
fn a_connect_to_where_nobody_answers_holds_up_no_other() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().flag("--workers", "1").start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let script =
        "\"$0\" expect-reset \"$1\" 0 >/dev/null & \"$0\" many \"$2\" 20 1000; s=$?; kill $!; exit $s";
    let app = tunnel_tests::programs::app()?;
    let words = [
        "sh",
        "-c",
        script,
        &app.display().to_string(),
        &format!("{BLACKHOLE}:80"),
        &target.addr().to_string(),
    ];
    let done = world.exec(&gateway).flag("--workers", "1").run(&words)?;
    assert!(done.success(), "{done}");
    Ok(())
}
