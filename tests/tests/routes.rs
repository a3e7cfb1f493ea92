//! Routes and chains: who is sent where, and what arrives there.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use http::{HeaderName, HeaderValue, Request};
use tunnel_tests::{
    BLACKHOLE, Finished, NET4, NODE4, TARGET4, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    gateway,
    hop::Hop,
    peer::{self, Answer, connect_request},
    pki::{Credentials, GATEWAY_ID},
    process, programs, raw, target,
};

const A: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
const B: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 1);
const C: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 2);

/// A gateway in `net` with these routes, listeners at `listen`, and an upstream for each of `upstreams`.
fn gateway(
    world: &World,
    listen: &[(&str, SocketAddr)],
    upstreams: &[(&str, SocketAddr)],
    routes: &str,
) -> Result<Daemon> {
    let mut config = format!("[daemon]\nworkers = 1\n{}", world.pki().named("gateway").toml());
    for (name, address) in listen {
        config += &format!("[[listener]]\nname = \"{name}\"\naddress = \"{address}\"\n");
    }
    for (name, address) in upstreams {
        config += &format!(
            "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{address}\"]\nverify = [\"{GATEWAY_ID}\"]\n"
        );
    }
    config +=
        "[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\", \"10.201.0.0/24\", \"*.internal\"]\n";
    config += routes;
    Daemon::start(world, world.net(), &config)
}

/// A request with these headers.
fn request(authority: &str, headers: &[(&str, &str)]) -> Result<Request<()>> {
    let mut request = connect_request(authority)?;
    for (name, value) in headers {
        request.headers_mut().append(name.parse::<HeaderName>()?, HeaderValue::from_str(value)?);
    }
    Ok(request)
}

fn ask(world: &World, gateway: SocketAddr, authority: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    peer::ask(world.node(), gateway, &world.pki().named("node"), request(authority, headers)?)
}

fn hop(world: &World, addr: SocketAddr) -> Result<Hop> {
    Hop::start(world.net(), addr, &world.pki().named("gateway"))
}

/// The value of the only line of a header.
fn only<'a>(request: &'a Request<()>, name: &str) -> &'a str {
    let lines: Vec<_> = request.headers().get_all(name).iter().collect();
    assert_eq!(lines.len(), 1, "{name}: {request:?}");
    lines[0].to_str().expect("a text")
}

/// For `tunnel exec`: these routes, then everything through the gateway at `A`.
fn agent(world: &World, more: &str) -> Result<PathBuf> {
    let config = format!("{}{more}{}", world.pki().named("node").toml(), through(A, GATEWAY_ID));
    world.file("agent.toml", config)
}

/// Whom a target sees.
fn seen(done: &Finished) -> Result<std::net::IpAddr> {
    Ok(done.value("seen")?.parse::<SocketAddr>()?.ip())
}

/// Bytes arrive unchanged through a chain of two gateways.
#[test]
fn what_an_application_sends_arrives_unchanged_through_two_gateways() -> Result<()> {
    const BYTES: u64 = 1_000_000;
    let world = World::new()?;
    let mut last = world.gateway().listen(B).start()?;
    let _first = gateway(&world, &[("a", A)], &[("b", B)], "[[route]]\nto = [{ upstream = \"b\" }]\n")?;
    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let exec = world.exec_with(&agent(&world, "")?);
    let done = exec.run_app(&["duplex", &target.addr().to_string(), &BYTES.to_string()])?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    // Its client is the first gateway, which has proved to be one.
    let line = last.logs("reason=closed destination=")?;
    assert!(line.contains(GATEWAY_ID), "{line}");
    Ok(())
}

/// In a chain the configured headers arrive, and each hop appends to `forwarded` and `via`.
#[test]
fn in_a_chain_the_headers_that_were_asked_for_arrive_and_forwarded_and_via_grow() -> Result<()> {
    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const PARENT: &str = "b7ad6b7169203331";
    let world = World::new()?;
    let next = hop(&world, C)?;
    let _last = gateway(
        &world,
        &[("b", B)],
        &[("c", C)],
        "[[route]]\nto = [{ upstream = \"c\" }]\nauthority = \"web.internal:443\"\n\
         request_headers = { copy = [\"x-route\"], add = { x-hop = \"b\" } }\n",
    )?;
    let _first = gateway(
        &world,
        &[("a", A)],
        &[("b", B)],
        "[[route]]\nto = [{ upstream = \"b\" }]\n\
         request_headers = { copy = [\"x-route\", \"x-team\"], add = { x-hop = \"a\" } }\n",
    )?;
    let parent = format!("00-{TRACE}-{PARENT}-00");
    let headers = [
        ("x-route", "canary"),
        ("x-route", "blue"),
        ("x-team", "payments"),
        ("x-secret", "s"),
        ("baggage", "k8s.cluster.name=a"),
        ("traceparent", parent.as_str()),
        ("tracestate", "vendor=1"),
        ("forwarded", "for=192.0.2.1"),
        ("via", "1.1 edge"),
    ];
    assert_eq!(ask(&world, A, "10.200.0.10:80", &headers)?.status, 200);

    let asked = next.asked();
    let [request] = &asked[..] else { panic!("one request: {asked:?}") };
    assert_eq!(request.uri().to_string(), "web.internal:443");
    let routes: Vec<_> = request.headers().get_all("x-route").iter().collect();
    assert_eq!(routes, ["canary", "blue"]);
    assert_eq!(only(request, "x-hop"), "b");
    assert_eq!(only(request, "baggage"), "k8s.cluster.name=a");
    assert_eq!(only(request, "tracestate"), "vendor=1");
    for absent in ["x-secret", "x-team"] {
        assert!(!request.headers().contains_key(absent), "{absent} was not asked for: {request:?}");
    }
    let trace = only(request, "traceparent");
    assert!(trace.starts_with(&format!("00-{TRACE}-")) && trace.ends_with("-00"), "{trace}");
    assert!(!trace.contains(PARENT), "{trace}");
    assert_eq!(only(request, "forwarded"), format!("for=192.0.2.1, for={NODE4}, for={NET4}"));
    let hops: Vec<_> = only(request, "via").split(", ").collect();
    assert_eq!((hops.len(), hops[0]), (3, "1.1 edge"), "{hops:?}");
    assert!(hops[1].starts_with("2 tunnel-") && hops[2].starts_with("2 tunnel-"), "{hops:?}");
    assert_ne!(hops[1], hops[2], "each process has a name of its own");
    Ok(())
}

/// A request that loops is answered with 508.
#[test]
fn a_request_that_comes_around_again_is_508_and_goes_no_further() -> Result<()> {
    let world = World::new()?;
    let to = |name: &str| format!("[[route]]\nto = [{{ upstream = \"{name}\" }}]\n");
    let mut first = gateway(&world, &[("a", A)], &[("b", B)], &to("b"))?;
    let _second = gateway(&world, &[("b", B)], &[("a", A)], &to("a"))?;
    let answer = ask(&world, A, "10.200.0.10:80", &[])?;
    assert_eq!(answer.status, 508, "{answer:?}");
    assert!(answer.proxy_status.contains("error=proxy_loop_detected"), "{answer:?}");
    first.process().wait_for_line("it goes around in a loop")?;
    Ok(())
}

/// A request that passes two listeners of one process is not a loop.
#[test]
fn what_passes_two_listeners_of_one_process_and_is_dialled_is_no_loop() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let routes = "[[route]]\nmatch = { listener = [\"outer\"] }\nto = [{ upstream = \"self\" }]\n\
                  [[route]]\nmatch = { listener = [\"inner\"] }\nto = \"direct\"\n";
    let _both = gateway(&world, &[("outer", A), ("inner", B)], &[("self", B)], routes)?;
    assert_eq!(ask(&world, A, &target.addr().to_string(), &[])?.status, 200);
    target.connected(1)
}

/// A route on a header takes matching requests only.
#[test]
fn a_header_sends_a_flow_to_the_canary_and_no_other() -> Result<()> {
    let world = World::new()?;
    let (stable, canary) = (hop(&world, B)?, hop(&world, C)?);
    let _gateway = gateway(
        &world,
        &[("a", A)],
        &[("stable", B), ("canary", C)],
        "[[route]]\nmatch = { headers = [{ name = \"x-route\", regex = \"canary(-[0-9]+)?\" }] }\n\
         to = [{ upstream = \"canary\" }]\n[[route]]\nto = [{ upstream = \"stable\" }]\n",
    )?;
    for value in ["canary", "canary-2", "stable", "not canary"] {
        assert_eq!(ask(&world, A, "10.200.0.10:80", &[("x-route", value)])?.status, 200);
    }
    assert_eq!(ask(&world, A, "10.200.0.10:80", &[])?.status, 200);
    assert_eq!((canary.asked().len(), stable.asked().len()), (2, 3));
    Ok(())
}

/// Weights divide flows between upstreams.
#[test]
fn weights_divide_flows_between_upstreams() -> Result<()> {
    const FLOWS: usize = 400;
    const SHARE: f64 = 0.25;
    let world = World::new()?;
    let (most, few) = (hop(&world, B)?, hop(&world, C)?);
    let routes =
        "[[route]]\nto = [{ upstream = \"most\", weight = 75 }, { upstream = \"few\", weight = 25 }]\n";
    let _gateway = gateway(&world, &[("a", A)], &[("most", B), ("few", C)], routes)?;
    let tls = peer::tls(&world.pki().named("node"))?;
    world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(A, tls).await?;
        let driving = tokio::task::spawn_local(connection);
        for _ in 0..FLOWS {
            requests = requests.ready().await?;
            let (response, _body) = requests.send_request(request("10.200.0.10:80", &[])?, true)?;
            anyhow::ensure!(response.await?.status() == 200);
        }
        driving.abort();
        anyhow::Ok(())
    })?;
    let (most, few) = (most.asked().len(), few.asked().len());
    assert_eq!(most + few, FLOWS);
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let (few, flows) = (few as f64, FLOWS as f64);
    let sigma = (flows * SHARE * (1.0 - SHARE)).sqrt();
    // Beyond four it is once in 16,000 runs.
    assert!((few - flows * SHARE).abs() < 4.0 * sigma, "{few} of {flows}, sigma {sigma}");
    Ok(())
}

/// A route with `dial` replaces the target.
#[test]
fn a_route_dials_something_else_in_place_of_the_target() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let routes = format!(
        "[[route]]\nmatch = {{ host = [\"db.internal:5432\"] }}\nto = {{ dial = \"{}\" }}\n\
         [[route]]\nmatch = {{ host = [\"me.internal\"] }}\nto = {{ dial = \"localhost:{}\" }}\n",
        target.addr(),
        A.port(),
    );
    let _gateway = gateway(&world, &[("a", A)], &[], &routes)?;
    assert_eq!(ask(&world, A, "db.internal:5432", &[])?.status, 200);
    target.connected(1)?;
    // What policy says of the target holds, whatever is dialled; and a name opens no loopback.
    assert_eq!(ask(&world, A, "db.elsewhere:5432", &[])?.status, 403);
    let guarded = ask(&world, A, "me.internal:80", &[])?;
    assert_eq!(guarded.status, 403, "{guarded:?}");
    Ok(())
}

/// The `timeout` of a route replaces the one of its upstream or listener.
#[test]
fn a_route_has_a_time_limit_of_its_own() -> Result<()> {
    let world = World::new()?;
    let routes = "[[route]]\nto = \"direct\"\ntimeout = \"300ms\"\n";
    let _gateway = gateway(&world, &[("a", A)], &[], routes)?;
    let started = Instant::now();
    let answer = ask(&world, A, &format!("{BLACKHOLE}:80"), &[])?;
    assert_eq!(answer.status, 504, "{answer:?}");
    assert!(started.elapsed() < Duration::from_secs(8), "the listener's would have been 10 s");
    Ok(())
}

/// Routes match on the peer's identity and on the listener.
#[test]
fn flows_are_told_apart_by_the_peer_and_by_the_listener() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let next = hop(&world, C)?;
    let routes = "[[route]]\nmatch = { listener = [\"inner\"] }\nto = [{ upstream = \"next\" }]\n\
                  [[route]]\nmatch = { identity = [\"spiffe://test.tunnel/ns/*/web\"] }\nto = \"direct\"\n\
                  [[route]]\nto = \"deny\"\n";
    let _gateway = gateway(&world, &[("public", A), ("inner", B)], &[("next", C)], routes)?;
    let web = world.pki().issue("web", "spiffe://test.tunnel/ns/a/web", &[])?;
    let node = world.pki().named("node");
    let addr = target.addr().to_string();
    let ask = |who: &Credentials, at| {
        anyhow::Ok(peer::ask(world.node(), at, who, request(&addr, &[])?)?.status.as_u16())
    };
    assert_eq!(ask(&web, A)?, 200);
    target.connected(1)?;
    assert_eq!(ask(&node, A)?, 403);
    assert_eq!(next.asked().len(), 0);
    assert_eq!(ask(&node, B)?, 200);
    assert_eq!((next.asked().len(), target.peers().len()), (1, 1));
    Ok(())
}

/// Routes match on the server name of the peer's TLS.
#[test]
fn flows_are_told_apart_by_the_name_that_the_peer_asked_for() -> Result<()> {
    let world = World::new()?;
    let next = hop(&world, C)?;
    let routes = "[[route]]\nmatch = { server_name = [\"*.gw.internal\"] }\nto = [{ upstream = \"next\" }]\n";
    let _last = gateway(&world, &[("b", B)], &[("next", C)], routes)?;
    let mut agent = String::new();
    for (name, sni) in
        [("good", "sni = \"east.gw.internal\""), ("other", "sni = \"gw.internal\""), ("none", "")]
    {
        agent += &format!(
            "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{B}\"]\nverify = [\"{GATEWAY_ID}\"]\n{sni}\n\
             [[route]]\nmatch = {{ host = [\"{name}.internal\"] }}\nto = [{{ upstream = \"{name}\" }}]\n"
        );
    }
    let _first = gateway(&world, &[("a", A)], &[], &agent)?;
    for (name, status) in [("good", 200), ("other", 403), ("none", 403)] {
        assert_eq!(ask(&world, A, &format!("{name}.internal:80"), &[])?.status, status, "{name}");
    }
    assert_eq!(next.asked().len(), 1);
    Ok(())
}

/// A route to "direct" passes one network through, and the rest is tunnelled.
#[test]
fn one_network_is_passed_through_and_the_rest_goes_through_the_tunnel() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let near = world.serve(NET4, target::name_the_peer())?;
    let far = world.serve(TARGET4, target::name_the_peer())?;
    let direct = format!("[[route]]\nmatch = {{ destination = [\"{NET4}/32\"] }}\nto = \"direct\"\n");
    let exec = world.exec_with(&agent(&world, &direct)?);
    let done = exec.run_app(&["names", &near.addr().to_string()])?;
    assert_eq!((done.value("peer")?, seen(&done)?), (near.addr().to_string().as_str(), NODE4), "{done}");
    assert_eq!(done.flows()?[0]["via"], "direct", "captured, and dialled from the node: {done}");
    let done = exec.run_app(&["names", &far.addr().to_string()])?;
    assert_eq!(seen(&done)?, NET4, "the gateway dials: {done}");
    Ok(())
}

/// Routes match on the name of a capture.
#[test]
fn a_route_takes_the_connections_of_one_capture() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let near = world.serve(NET4, target::name_the_peer())?;
    for (name, wanted) in [("batch", NODE4), ("other", NET4)] {
        let more = format!(
            "[[route]]\nmatch = {{ capture = [\"batch\"] }}\nto = \"direct\"\n[[capture]]\nname = \"{name}\"\n\
             [[capture]]\nname = \"{}\"\n",
            if name == "batch" { "other" } else { "batch" }
        );
        let done = world.exec_with(&agent(&world, &more)?).run_app(&["names", &near.addr().to_string()])?;
        assert_eq!(seen(&done)?, wanted, "{name}: {done}");
    }
    Ok(())
}

/// With `retries` a flow fails over to another upstream before a byte has passed; without, it fails.
#[test]
fn a_flow_fails_over_to_another_upstream_before_a_byte_has_passed_and_only_where_its_route_says_so()
-> Result<()> {
    let world = World::new()?;
    let standby = hop(&world, C)?;
    // Its policy and what it can dial are those of any gateway.
    let _refusing = gateway(&world, &[("b", B)], &[], "[[route]]\nto = \"direct\"\n")?;
    let nobody = SocketAddr::new(NET4, gateway::PORT + 3);
    let refused = world.serve(TARGET4, target::echo())?.addr();
    let to = |first: &str, host: &str, retries: &str| {
        format!(
            "[[route]]\nmatch = {{ {host} }}\n{retries}\n\
             to = [{{ upstream = \"{first}\", weight = 10000 }}, {{ upstream = \"standby\", weight = 1 }}]\n"
        )
    };
    let routes = to("nobody", "host = [\"again.internal\"]", "retries = 1")
        + &to("nobody", "host = [\"once.internal\"]", "")
        + &to("refusing", "destination = [\"10.200.0.0/24:1024-65535\"]", "retries = 2")
        + &to("refusing", "destination = [\"10.200.0.0/24:80\"]", "")
        + &to("refusing", "host = [\"elsewhere.internal\"]", "authority = \"10.9.9.9:80\"\nretries = 2");
    let upstreams = [("nobody", nobody), ("refusing", B), ("standby", C)];
    let _gateway = gateway(&world, &[("a", A)], &upstreams, &routes)?;
    let status = |authority: &str| Ok::<_, anyhow::Error>(ask(&world, A, authority, &[])?.status.as_u16());
    // Connected to, then ejected: both times another one is asked. One in ten thousand goes there anyway.
    for _ in 0..5 {
        assert_eq!(status("again.internal:80")?, 200);
    }
    assert_eq!(standby.asked().len(), 5);
    assert_eq!(status("once.internal:80")?, 503);
    // 502, of a target that refuses: said by one, and the other does better.
    assert_eq!(status(&refused.to_string())?, 200);
    assert_eq!(standby.asked().len(), 6);
    assert_eq!(status(&format!("{TARGET4}:80"))?, 502);
    // What policy refuses is not asked for elsewhere.
    assert_eq!(status("elsewhere.internal:80")?, 403);
    assert_eq!(standby.asked().len(), 6);
    Ok(())
}

/// Routes match on the cgroup of a capture, whatever its name.
#[test]
fn a_route_takes_the_connections_of_a_cgroup_whatever_its_capture_is_called() -> Result<()> {
    let world = World::new()?;
    let near = world.serve(NET4, target::name_the_peer())?;
    let (group, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let config = format!(
        "[daemon]\n{}\n[[capture]]\nname = \"batch\"\ncgroup = \"{}\"\ninclude = [\"{NET4}/32\"]\n\
         [[route]]\nmatch = {{ cgroup = [\"{}/*\"] }}\nto = \"direct\"\n",
        bpffs.toml(),
        group.path().display(),
        group.path().parent().unwrap_or(group.path()).display()
    );
    let mut daemon = Daemon::start(&world, world.node(), &config)?;
    let mut app = world.node().command(programs::app()?);
    group.adopt(app.args(["names", &near.addr().to_string()]))?;
    process::output(&mut app)?;
    daemon.process().wait_for_line("reason=closed destination=")?;
    Ok(())
}

/// Why no route can ask for a path.
#[test]
fn a_connect_request_with_a_path_is_refused_by_itself() -> Result<()> {
    const PROTOCOL_ERROR: u32 = 1;
    let world = World::new()?;
    let next = hop(&world, C)?;
    let _gateway = gateway(&world, &[("a", A)], &[("c", C)], "[[route]]\nto = [{ upstream = \"c\" }]\n")?;
    let who = world.pki().named("node");
    world.node().block_on(|| async move {
        let (mut sender, mut receiver) = raw::connect(A, &who).await?;
        let connect = raw::connect_block("10.200.0.10:80");
        // ":path: /" is the fourth of the static table (RFC 7541 appendix A).
        let with_path = [&[0x84][..], &connect].concat();
        sender.frame(raw::HEADERS, raw::END_HEADERS, 1, &with_path).await?;
        sender.frame(raw::HEADERS, raw::END_HEADERS, 3, &connect).await?;
        let mut reset = None;
        loop {
            let frame = receiver.frame().await?.context("the connection was closed")?;
            match (frame.kind, frame.stream) {
                (raw::RST_STREAM, 1) => reset = frame.code(),
                (raw::HEADERS, 3) => break,
                (raw::HEADERS, 1) => anyhow::bail!("it was answered"),
                _ => {}
            }
        }
        anyhow::ensure!(reset == Some(PROTOCOL_ERROR), "{reset:?}");
        Ok(())
    })?;
    assert_eq!(next.asked().len(), 1);
    Ok(())
}
