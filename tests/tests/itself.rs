//! An upstream that is this process itself: as through a gateway, without a connection to it.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Result;
use http::{HeaderName, HeaderValue, Request};
use tunnel_tests::{
    Finished, NET4, NODE4, TARGET4, World,
    daemon::Daemon,
    gateway,
    hop::Hop,
    peer::{self, Answer, connect_request},
    pki::{GATEWAY_ID, NODE_ID},
    target,
};

const A: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
const NEXT: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 1);

/// Agent and gateway for `tunnel exec`: what is captured is asked of the listener `gw`. `keys` are more of that
/// listener; `rest` is what it does with it.
fn both(world: &World, keys: &str, rest: &str) -> Result<PathBuf> {
    let config = format!(
        "[daemon]\nworkers = 1\nrelay = \"pipe\"\n{}[[listener]]\nname = \"gw\"\naddress = \"127.0.0.1:15008\"\n{keys}\n\
         [[upstream]]\nname = \"here\"\nself = \"gw\"\n\
         [[route]]\nmatch = {{ source = [\"captured\"] }}\nto = [{{ upstream = \"here\" }}]\n{rest}",
        world.pki().named("node").toml()
    );
    world.file("both.toml", config)
}

/// The listener dials; `who` may reach the targets in `net`.
fn dials(who: &str) -> String {
    format!(
        "[[route]]\nmatch = {{ listener = [\"gw\"] }}\nto = \"direct\"\n\
         [[policy]]\nidentity = [\"{who}\"]\ntarget = [\"{NET4}/32\"]\n"
    )
}

/// How the only flow of an application that got nowhere was booked.
fn refused(done: &Finished) -> Result<String> {
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    assert_eq!(done.value("received")?, "0", "{done}");
    Ok(done.flows()?[0]["detail"].as_str().unwrap_or_default().to_owned())
}

/// A flow through the in-process upstream reaches its target as through a gateway.
#[test]
fn what_is_captured_reaches_its_target_as_if_a_gateway_had_been_asked_by_us() -> Result<()> {
    const BYTES: u64 = 1_000_000;
    let world = World::new()?;
    let config = both(&world, "", &dials(NODE_ID))?;
    let exec = || world.exec_with(&config).flag("--log", "info");
    let target = world.serve(NET4, target::duplex(BYTES))?;
    let done = exec().run_app(&["duplex", &target.addr().to_string(), &BYTES.to_string()])?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    let flow = &done.flows()?[0];
    assert_eq!((&flow["via"], &flow["identity"]), (&"direct".into(), &NODE_ID.into()), "{flow}");
    assert_eq!(flow["passed"], serde_json::json!(["here"]), "{flow}");
    let line =
        done.stderr.lines().find(|line| line.contains("reason=closed destination=")).unwrap_or_default();
    assert!(line.contains("passed=\"here\"") && line.contains(NODE_ID), "{done}");
    // Between two sockets, all of it in the kernel: there is nothing of TLS or HTTP on the way.
    assert!(done.stderr.contains(&format!("(\"bytes_piped\", {})", 2 * BYTES)), "{done}");

    let target = world.serve(NET4, target::answer_after_end())?;
    let done = exec().run_app(&["half-close", &target.addr().to_string(), "300000"])?;
    assert_eq!(done.value("answer")?, "300000", "{done}");
    let target = world.serve(NET4, target::reset_after(1000))?;
    let done = exec().run_app(&["expect-reset", &target.addr().to_string(), "1000"])?;
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    Ok(())
}

/// Policy applies to our own identity at the in-process upstream, and what it denies is reset.
#[test]
fn policy_speaks_of_our_own_identity_and_what_it_forbids_is_reset() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(NET4, target::echo())?;
    let to = target.addr().to_string();
    let run = |config: &PathBuf| world.exec_with(config).run_app(&["expect-reset", &to, "10"]);
    let said = refused(&run(&both(&world, "", &dials(GATEWAY_ID))?)?)?;
    assert!(said.contains(NODE_ID) && said.contains(&to), "{said}");
    // The listener lets in whom it wants, and a peer in plaintext has no name.
    let said = refused(&run(&both(&world, &format!("verify = [\"{GATEWAY_ID}\"]"), &dials(NODE_ID))?)?)?;
    assert!(
        said.contains("listener \"gw\" would reject our certificate") && said.contains("SAN check"),
        "{said}"
    );
    let plain = "tls = false\n[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:15009\"";
    let said = refused(&run(&both(&world, plain, &dials(NODE_ID))?)?)?;
    assert!(said.contains("a peer without identity"), "{said}");
    assert_eq!(target.peers(), []);
    Ok(())
}

/// A flow that is dispatched in process again and again is rejected as a loop.
#[test]
fn a_flow_that_is_handed_over_again_and_again_is_a_loop() -> Result<()> {
    let world = World::new()?;
    let again = "[[route]]\nto = [{ upstream = \"here\" }]\n\
                 [[policy]]\nidentity = \"any\"\ntarget = [\"0.0.0.0/0\"]\n";
    let config = both(&world, "", again)?;
    let done = world.exec_with(&config).run_app(&["expect-reset", "10.200.0.10:80", "10"])?;
    let said = refused(&done)?;
    assert!(said.ends_with("it goes around in a loop"), "{done}");
    let _gateway = gateway(&world, "[[route]]\nto = [{ upstream = \"here\" }]\n")?;
    let answer = ask(&world, "10.200.0.10:80", &[])?;
    assert_eq!(answer.status, 508, "{answer:?}");
    assert!(answer.proxy_status.contains("error=proxy_loop_detected"), "{answer:?}");
    Ok(())
}

/// A gateway in `net` with the listeners `edge` and `inner`, of which the upstream `here` is the latter.
fn gateway(world: &World, routes: &str) -> Result<Daemon> {
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\nname = \"edge\"\naddress = \"{A}\"\n\
         [[listener]]\nname = \"inner\"\naddress = \"127.0.0.1:15010\"\n\
         [[upstream]]\nname = \"here\"\nself = \"inner\"\n\
         [[upstream]]\nname = \"next\"\nendpoints = [\"{NEXT}\"]\nverify = [\"{GATEWAY_ID}\"]\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n{routes}",
        world.pki().named("gateway").toml()
    );
    Daemon::start(world, world.net(), &config)
}

fn request(authority: &str, headers: &[(&str, &str)]) -> Result<Request<()>> {
    let mut request = connect_request(authority)?;
    for (name, value) in headers {
        request.headers_mut().append(name.parse::<HeaderName>()?, HeaderValue::from_str(value)?);
    }
    Ok(request)
}

fn ask(world: &World, authority: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    peer::ask(world.node(), A, &world.pki().named("node"), request(authority, headers)?)
}

/// Headers of a request pass the in-process upstream, and this process is named once in them.
#[test]
fn what_a_peer_asked_for_goes_on_as_from_a_gateway_in_between_but_nobody_is_named_twice() -> Result<()> {
    let world = World::new()?;
    let next = Hop::start(world.net(), NEXT, &world.pki().named("gateway"))?;
    let routes = format!(
        "[[route]]\nmatch = {{ listener = [\"inner\"], identity = [\"{GATEWAY_ID}\"], headers = [{{ name = \"x-by\", \
         exact = \"edge\" }}] }}\nto = [{{ upstream = \"next\" }}]\nrequest_headers = {{ copy = [\"x-team\", \
         \"x-secret\"] }}\n\
         [[route]]\nmatch = {{ listener = [\"edge\"] }}\nto = [{{ upstream = \"here\" }}]\n\
         authority = \"10.200.0.11:81\"\nrequest_headers = {{ copy = [\"x-team\"], add = {{ x-by = \"edge\" }} }}\n"
    );
    let mut gateway = gateway(&world, &routes)?;
    let headers = [("x-team", "a"), ("x-secret", "s"), ("forwarded", "for=192.0.2.1"), ("via", "1.1 first")];
    assert_eq!(ask(&world, "10.200.0.10:80", &headers)?.status, 200);
    let asked = next.asked();
    let [request] = &asked[..] else { panic!("one request: {asked:?}") };
    assert_eq!(request.uri().to_string(), "10.200.0.11:81");
    let header = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok());
    assert_eq!((header("x-team"), header("x-secret")), (Some("a"), None), "{request:?}");
    assert_eq!(header("forwarded"), Some(&*format!("for=192.0.2.1, for={NODE4}")));
    assert_eq!(header("via").map(|via| via.split(", ").count()), Some(2), "{request:?}");
    let line = gateway.process().wait_for_line("passed=\"here\"")?;
    assert!(line.contains("next"), "{line}");
    Ok(())
}

/// A weighted route can send a share of its flows to the in-process upstream.
#[test]
fn a_share_of_the_flows_may_stay_in_the_process() -> Result<()> {
    const FLOWS: usize = 400;
    const SHARE: f64 = 0.1;
    let world = World::new()?;
    let next = Hop::start(world.net(), NEXT, &world.pki().named("gateway"))?;
    let target = world.serve(TARGET4, target::echo())?;
    let routes = "[[route]]\nmatch = { listener = [\"edge\"] }\n\
                  to = [{ upstream = \"next\", weight = 90 }, { upstream = \"here\", weight = 10 }]\n\
                  [[route]]\nto = \"direct\"\n";
    let _gateway = gateway(&world, routes)?;
    let tls = peer::tls(&world.pki().named("node"))?;
    let to = target.addr().to_string();
    world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(A, tls).await?;
        let driving = tokio::task::spawn_local(connection);
        for _ in 0..FLOWS {
            requests = requests.ready().await?;
            let (response, _body) = requests.send_request(request(&to, &[])?, true)?;
            anyhow::ensure!(response.await?.status() == 200);
        }
        driving.abort();
        anyhow::Ok(())
    })?;
    let here = FLOWS - next.asked().len();
    target.connected(here)?;
    assert_eq!(target.peers().len(), here);
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let (here, flows) = (here as f64, FLOWS as f64);
    let sigma = (flows * SHARE * (1.0 - SHARE)).sqrt();
    // Beyond four it is once in 16,000 runs.
    assert!((here - flows * SHARE).abs() < 4.0 * sigma, "{here} of {flows}, sigma {sigma}");
    Ok(())
}
