//! What a gateway answers to a CONNECT request, word by word.

use std::net::SocketAddr;

use anyhow::Result;
use http::{Method, Request};
use tunnel_tests::{
    BLACKHOLE, Gateway, NET4, NOWHERE, TARGET4, TARGET6, World,
    daemon::{Daemon, through},
    peer::{self, Answer, connect_request},
    pki::GATEWAY_ID,
    target,
};

/// What the gateway answers to CONNECT for `authority`.
fn ask(world: &World, gateway: &Gateway<'_>, authority: &str) -> Result<Answer> {
    let who = world.pki().named("node");
    peer::ask(world.node(), gateway.addr(), &who, connect_request(authority)?)
}

/// The status, and the error of `proxy-status` with what stands in front of it.
fn parts(answer: &Answer) -> (u16, &str) {
    let error = answer.proxy_status.split("; details=").next().unwrap_or_default();
    (answer.status.as_u16(), error)
}

/// A CONNECT request for a reachable target is answered with 200, and only after the target has accepted.
#[test]
fn a_target_that_answers_is_200() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for ip in [TARGET4, TARGET6] {
        let target = world.serve(ip, target::echo())?;
        assert_eq!(parts(&ask(&world, &gateway, &target.addr().to_string())?), (200, ""));
    }
    Ok(())
}

/// The gateway resolves a target that is a name.
#[test]
fn a_name_is_resolved_at_the_gateway() -> Result<()> {
    let world = World::new()?;
    let hosts = format!("{TARGET4} web.internal\n{TARGET6} six.internal\n10.200.0.99 dead.internal\n");
    let gateway = world.gateway().hosts(&hosts)?.allow("*.internal").start()?;
    for (ip, name) in [(TARGET4, "web.internal"), (TARGET6, "six.internal")] {
        let target = world.serve(ip, target::echo())?;
        let answer = ask(&world, &gateway, &format!("{name}:{}", target.addr().port()))?;
        assert_eq!(parts(&answer), (200, ""), "{answer:?}");
        target.connected(1)?;
    }
    Ok(())
}

/// A name that does not resolve is answered with 502 and `dns_error`.
///
/// Failure: target-fails.
#[test]
fn a_name_that_does_not_resolve_is_502_dns_error() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("*.internal").start()?;
    let answer = ask(&world, &gateway, "nobody.internal:80")?;
    assert_eq!(parts(&answer), (502, "tunnel; error=dns_error"), "{answer:?}");
    assert!(answer.proxy_status.contains("nobody.internal"), "{answer:?}");
    Ok(())
}

/// A target that refuses the connection is answered with 502 and `connection_refused`.
///
/// Failure: target-fails.
#[test]
fn a_target_that_refuses_is_502_connection_refused() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let answer = ask(&world, &gateway, &format!("{TARGET4}:9"))?;
    assert_eq!(parts(&answer), (502, "tunnel; error=connection_refused"), "{answer:?}");
    Ok(())
}

/// A target without a route is answered with 503 and `destination_ip_unroutable`.
///
/// Failure: target-fails.
#[test]
fn a_target_without_a_route_is_503_destination_ip_unroutable() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let answer = ask(&world, &gateway, &format!("{NOWHERE}:80"))?;
    assert_eq!(parts(&answer), (503, "tunnel; error=destination_ip_unroutable"), "{answer:?}");
    Ok(())
}

/// A target that never answers is reported as 504 and `connection_timeout` after the dial timeout.
///
/// Failure: target-fails.
#[test]
fn a_target_that_never_answers_is_504_connection_timeout() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().flag("--dial-timeout", "300ms").start()?;
    let answer = ask(&world, &gateway, &format!("{BLACKHOLE}:80"))?;
    assert_eq!(parts(&answer), (504, "tunnel; error=connection_timeout"), "{answer:?}");
    Ok(())
}

/// A target that no policy allows is answered with 403 and `http_request_denied`.
///
/// Failure: refused.
#[test]
fn what_policy_does_not_allow_is_403_http_request_denied() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().hosts(&format!("{TARGET4} web.internal\n"))?;
    let gateway = gateway.allow_only(&["10.200.0.0/24:80", "*.allowed:82"]).start()?;
    // The last two are refused before anybody is asked for their addresses: no rule takes their port.
    for authority in
        ["10.200.0.10:81", "10.9.9.9:80", "[fd00:200::10]:80", "web.internal:81", "web.elsewhere:82"]
    {
        let answer = ask(&world, &gateway, authority)?;
        assert_eq!(parts(&answer), (403, "tunnel; error=http_request_denied"), "{authority}: {answer:?}");
    }
    Ok(())
}

/// A wide policy does not allow metadata and link-local addresses, nor the gateway's own listeners.
///
/// Failure: refused.
#[test]
fn metadata_and_link_local_addresses_and_our_own_listeners_are_403_under_any_wide_rule() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().hosts("169.254.169.254 metadata.internal\n")?;
    let gateway = gateway.allow_only(&["0.0.0.0/0", "::/0", "*.internal"]).start()?;
    let own = format!("{NET4}:{}", gateway.addr().port());
    for authority in
        ["169.254.169.254:80", "[fe80::1]:80", "[::ffff:169.254.169.254]:80", "metadata.internal:80", &own]
    {
        let answer = ask(&world, &gateway, authority)?;
        assert_eq!(parts(&answer), (403, "tunnel; error=http_request_denied"), "{authority}: {answer:?}");
    }
    Ok(())
}

/// A CONNECT request whose authority is not HOST:PORT is answered with 400.
#[test]
fn an_authority_that_is_no_target_is_400() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for authority in ["web.internal", "10.200.0.10", "user@10.200.0.10:80", "10.200.0.10:0", "10.200.0:80"] {
        let answer = ask(&world, &gateway, authority)?;
        assert_eq!(parts(&answer), (400, "tunnel; error=http_request_error"), "{authority}: {answer:?}");
    }
    Ok(())
}

/// A method other than CONNECT is answered with 405.
#[test]
fn a_method_that_is_not_connect_is_405() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for method in [Method::GET, Method::POST, Method::OPTIONS] {
        let request = Request::builder().method(method).uri(format!("https://{TARGET4}:80/")).body(())?;
        let answer = peer::ask(world.node(), gateway.addr(), &world.pki().named("node"), request)?;
        assert_eq!(parts(&answer), (405, "tunnel; error=http_request_error"), "{answer:?}");
    }
    Ok(())
}

/// In a chain the status of the next hop is passed on as received, with the next hop's own reason behind it (RFC 9209
/// section 2.1.5).
#[test]
fn what_the_next_hop_answers_is_passed_on_as_received() -> Result<()> {
    let world = World::new()?;
    let back = world.gateway().allow_only(&["10.200.0.99:1"]).listen(SocketAddr::new(NET4, 15009)).start()?;
    let front = SocketAddr::new(NET4, 15010);
    let config = format!(
        "{}[[listener]]\naddress = \"{front}\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n{}",
        world.pki().named("gateway").toml(),
        through(back.addr(), GATEWAY_ID)
    );
    let _front = Daemon::start(&world, world.net(), &config)?;
    for (authority, status) in [("10.200.0.10:80", 403), ("10.200.0.99:1", 503)] {
        let who = world.pki().named("node");
        let answer = peer::ask(world.node(), front, &who, connect_request(authority)?)?;
        assert_eq!(parts(&answer), (status, &*format!("tunnel; received-status={status}")), "{answer:?}");
    }
    Ok(())
}
