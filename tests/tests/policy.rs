//! Policies: who is allowed and denied what, by which rule, and what becomes of live flows when that changes.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::Request;
use tokio::io::AsyncWriteExt as _;
use tunnel_tests::{
    NET4, PATIENCE, Process, TARGET4, World,
    daemon::{Daemon, through},
    dialogue::{ask, lines_with},
    each_mode, gateway,
    modes::{Mode, Stage},
    node::Node,
    peer::{self, connect_request},
    pki::{GATEWAY_ID, NODE_ID},
    programs, target, wait_for,
};

const GATEWAY: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
const NEXT: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 1);
/// What the contract allows, from when another configuration is in force.
const AT_ONCE: Duration = Duration::from_secs(1);

const ALLOW: &str = "[[policy]]\nname = \"targets\"\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n";

/// A policy that denies one target.
fn deny(target: SocketAddr) -> String {
    format!(
        "[[policy]]\nname = \"closed\"\naction = \"deny\"\nidentity = \"any\"\ntarget = [\"{target}\"]\n{ALLOW}"
    )
}

/// A gateway that dials. `keys` are more of its `[daemon]`, `listener` of its listener.
fn gateway(world: &World, keys: &str, listener: &str, policies: &str) -> String {
    let identity = world.pki().named("gateway").toml();
    format!(
        "[daemon]\nworkers = 2\n{keys}\n{identity}[[listener]]\naddress = \"{GATEWAY}\"\n{listener}\n\
         [[route]]\nto = \"direct\"\n{policies}"
    )
}

/// What the node gets for a request to the gateway.
fn asked(world: &World, request: Request<()>) -> Result<peer::Answer> {
    peer::ask(world.node(), GATEWAY, &world.pki().named("node"), request)
}

/// Changes a daemon's configuration, and waits until each of these applications, which read, is reset: within a second from
/// when it is in force.
fn ends(apps: &mut [&mut Process], change: impl FnOnce() -> Result<()>) -> Result<()> {
    for app in &mut *apps {
        app.tell("read")?;
    }
    change()?;
    let since = Instant::now();
    for app in apps {
        app.wait_for_line("read=ECONNRESET")?;
    }
    ensure!(since.elapsed() < AT_ONCE, "after {:?}", since.elapsed());
    Ok(())
}

/// How the one flow that a policy ended is logged.
fn ended_by(daemon: &Daemon, rule: &str) -> Result<String> {
    let rule = format!("rule=\"{rule}\"");
    wait_for("the record of the flow", PATIENCE, || {
        lines_with(&daemon.log(), &["flow ended", "reason=policy_changed", &rule]).pop()
    })
    .with_context(|| daemon.log())
}

/// A policy that denies wins over those that allow, by name before the target is resolved and by the address that it resolves
/// to; the peer is told neither that address nor the policy, and the log names both.
///
/// Failure: refused.
#[test]
fn what_a_policy_denies_is_403_whatever_others_allow_and_the_answer_holds_no_address() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let port = target.addr().port();
    let policies = "[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\", \"*.internal\"]\n\
         [[policy]]\nname = \"no-secrets\"\naction = \"deny\"\nidentity = [\"spiffe://test.tunnel/**\"]\n\
         target = [\"secret.internal\", \"10.200.0.77\"]\n\
         [[policy]]\nname = \"other-domain\"\naction = \"deny\"\nidentity = [\"spiffe://other.tunnel/**\"]\ntarget = \"any\"\n\
         [[policy]]\nname = \"no-clients-from-there\"\naction = \"deny\"\nidentity = \"any\"\nclient = [\"192.0.2.0/24\"]\ntarget = \"any\"\n\
         [[policy]]\nname = \"quarantine\"\naction = \"deny\"\nidentity = \"any\"\ntarget = \"any\"\n\
         headers = [{ name = \"x-quarantine\", present = true }]\n";
    let config = gateway(&world, "", "", policies);
    let hosts = world.file("hosts", format!("{TARGET4} web.internal\n10.200.0.77 moved.internal\n"))?;
    let mut daemon = Daemon::start_seeing(&world, world.net(), &config, &[(hosts, "/etc/hosts")])?;
    let request = |authority: String| connect_request(&authority);
    for allowed in [target.addr().to_string(), format!("web.internal:{port}")] {
        assert_eq!(asked(&world, request(allowed)?)?.status, 200);
    }
    let mut marked = request(target.addr().to_string())?;
    marked.headers_mut().insert("x-quarantine", "yes".parse()?);
    for (denied, rule) in [
        (request(format!("secret.internal:{port}"))?, "no-secrets"),
        (request("10.200.0.77:80".to_owned())?, "no-secrets"),
        (request("moved.internal:80".to_owned())?, "no-secrets"),
        (marked, "quarantine"),
    ] {
        let authority = denied.uri().authority().context("an authority")?.to_string();
        let answer = asked(&world, denied)?;
        assert_eq!(answer.status, 403, "{authority}");
        let told = &answer.proxy_status;
        assert!(told.contains("http_request_denied") && !told.contains(rule), "{told}");
        assert!(!told.contains("10.200.0.77") || authority.starts_with("10.200.0.77"), "{told}");
        let rule = format!("rule=\"{rule}\"");
        let logged =
            lines_with(&daemon.log(), &["flow refused", "reason=policy_denied", &rule, &authority, NODE_ID]);
        assert_eq!(logged.len(), 1, "{}", daemon.log());
    }
    assert!(daemon.log().contains("which resolves to 10.200.0.77:80"), "{}", daemon.log());
    assert_eq!(daemon.stop_and_count("policy_denied{no-secrets}")?, 3, "{}", daemon.log());
    Ok(())
}

/// A policy in report mode is counted and logged, and changes nothing.
#[test]
fn a_policy_in_report_mode_denies_nothing_and_is_counted_and_logged() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let report = deny(target.addr()).replacen("action", "mode = \"report\"\naction", 1);
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&world, "", "", &report))?;
    for _ in 0..2 {
        assert_eq!(asked(&world, connect_request(&target.addr().to_string())?)?.status, 200);
    }
    let logged = lines_with(&daemon.log(), &["report mode", "rule=\"closed\"", "would=\"deny\"", NODE_ID]);
    assert_eq!(logged.len(), 2, "{}", daemon.log());
    assert_eq!(daemon.stop_and_count("policy_reported{closed}")?, 2, "{}", daemon.log());
    Ok(())
}

/// When a policy changes, the streams of an HTTP/2 connection that it no longer allows are reset within a second, with that
/// reason and the policy's name; others on the same connection go on.
///
/// Failure: policy-changes.
#[test]
fn http_2_streams_that_a_changed_policy_denies_end_within_a_second_and_others_go_on() -> Result<()> {
    let world = World::new()?;
    let (closed, open) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET4, target::echo())?);
    let mut daemon = Daemon::start(&world, world.net(), &gateway(&world, "", "", ALLOW))?;
    let denied = gateway(&world, "", "", &deny(closed.addr()));
    let config = peer::tls(&world.pki().named("node"))?;
    let targets = [closed.addr().to_string(), open.addr().to_string()];
    world.node().block_on(|| async {
        let (requests, connection) = peer::connect(GATEWAY, config).await?;
        let driving = tokio::task::spawn_local(connection);
        let mut streams = Vec::new();
        for target in &targets {
            let (response, send) =
                requests.clone().ready().await?.send_request(connect_request(target)?, false)?;
            let response = response.await?;
            assert_eq!(response.status(), 200);
            streams.push((send, response.into_body()));
        }
        daemon.tell(&denied)?;
        let ended = tokio::time::timeout(AT_ONCE, streams[0].1.data()).await.context("it goes on")?;
        let reset = ended.context("a clean end")?.err().context("bytes")?;
        assert!(reset.is_reset(), "{reset}");
        let (send, body) = &mut streams[1];
        send.send_data(Bytes::from_static(b"x"), false)?;
        let back = body.data().await.context("the other has ended too")??;
        assert_eq!(&*back, b"x");
        driving.abort();
        let _aborted = driving.await;
        anyhow::Ok(())
    })?;
    let line = ended_by(&daemon, "closed")?;
    assert!(line.contains(&targets[0]) && line.contains(NODE_ID), "{line}");
    assert_eq!(daemon.stop_and_count("ended_policy_changed")?, 1, "{}", daemon.log());
    Ok(())
}

/// A policy that is gone ends what it had allowed; SIGHUP does it where the file is not watched.
///
/// Failure: policy-changes.
#[test]
fn a_policy_that_is_gone_ends_its_flows_after_sighup() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let by_name = ALLOW.replace("10.200.0.0/24", "*.internal");
    let config = |policies: &str| gateway(&world, "watch = false", "", policies);
    let hosts = world.file("hosts", format!("{TARGET4} web.internal\n"))?;
    let mut daemon = Daemon::start_seeing(&world, world.net(), &config(&by_name), &[(hosts, "/etc/hosts")])?;
    let tls = peer::tls(&world.pki().named("node"))?;
    let authority = format!("web.internal:{}", target.addr().port());
    world.node().block_on(|| async {
        let (requests, connection) = peer::connect(GATEWAY, tls).await?;
        let driving = tokio::task::spawn_local(connection);
        let (response, _send) = requests.ready().await?.send_request(connect_request(&authority)?, false)?;
        let mut body = response.await?.into_body();
        // Another policy, of the address: it is still allowed.
        fs::write(daemon.config(), config(ALLOW))?;
        daemon.hang_up()?;
        assert!(tokio::time::timeout(AT_ONCE / 2, body.data()).await.is_err(), "it was allowed");
        fs::write(daemon.config(), config(&ALLOW.replace("10.200.0.0/24", "10.201.0.0/24")))?;
        daemon.hang_up()?;
        let ended = tokio::time::timeout(AT_ONCE, body.data()).await.context("it goes on")?;
        assert!(ended.context("a clean end")?.is_err_and(|e| e.is_reset()));
        driving.abort();
        let _aborted = driving.await;
        anyhow::Ok(())
    })?;
    let lines =
        lines_with(&daemon.log(), &["flow ended", "reason=policy_changed", "no policy lets", NODE_ID]);
    assert_eq!(lines.len(), 1, "{}", daemon.log());
    Ok(())
}

/// The same of flows that came in plaintext over HTTP/1, and whose bytes are moved in the kernel, or are not.
///
/// Failure: policy-changes.
#[test]
fn http_1_flows_that_a_changed_policy_denies_end_within_a_second_spliced_or_copied() -> Result<()> {
    for relay in ["splice", "copy", "pipe"] {
        let world = World::new()?;
        let target = world.serve(TARGET4, target::echo())?;
        let listener = "protocols = [\"h1\"]\ntls = false";
        let keys = format!("relay = \"{relay}\"");
        let mut daemon = Daemon::start(&world, world.net(), &gateway(&world, &keys, listener, ALLOW))?;
        let node = Node::new(&world)?;
        let upstream = format!(
            "[daemon]\n{}[[capture]]\ncgroup = \"{}\"\n[[route]]\nto = [{{ upstream = \"next\" }}]\n\
             [[upstream]]\nname = \"next\"\nendpoints = [\"{GATEWAY}\"]\nprotocol = \"h1\"\ntls = false\n",
            node.bpffs.toml(),
            node.cgroup.path().display()
        );
        let _agent = node.daemon(&upstream)?;
        let mut app = node.hold(&target)?;
        chat(&mut app)?;
        ends(&mut [&mut app], || daemon.tell(&gateway(&world, &keys, listener, &deny(target.addr()))))?;
        ended_by(&daemon, "closed")?;
        if relay == "splice" {
            assert_ne!(daemon.stop_and_count("flows_spliced")?, 0, "{}", daemon.log());
        }
    }
    Ok(())
}

/// So many exchanges, with so much time between, that a path that looks at flows has seen enough of this one.
fn chat(app: &mut Process) -> Result<()> {
    for _ in 0..25 {
        assert_eq!(ask(app, "ping")?, "ok");
    }
    Ok(())
}

/// In a chain of gateways either one's change ends the flow, at the application too.
///
/// Failure: policy-changes.
#[test]
fn a_change_at_either_gateway_of_a_chain_resets_the_application() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let last =
        |policies: &str| gateway(&world, "", "", policies).replace(&GATEWAY.to_string(), &NEXT.to_string());
    let first = |policies: &str| {
        gateway(&world, "", "", policies).replace("[[route]]\nto = \"direct\"\n", &through(NEXT, GATEWAY_ID))
    };
    let mut next = Daemon::start(&world, world.net(), &last(ALLOW))?;
    let mut near = Daemon::start(&world, world.net(), &first(ALLOW))?;
    let node = Node::new(&world)?;
    let config = format!(
        "[daemon]\n{}{}[[capture]]\ncgroup = \"{}\"\n{}",
        node.bpffs.toml(),
        world.pki().named("node").toml(),
        node.cgroup.path().display(),
        through(GATEWAY, GATEWAY_ID)
    );
    let _agent = node.daemon(&config)?;
    let mut app = node.hold(&target)?;
    ends(&mut [&mut app], || next.tell(&last(&deny(target.addr()))))?;
    ended_by(&next, "closed")?;
    next.tell(&last(ALLOW))?;
    let mut app = node.hold(&target)?;
    ends(&mut [&mut app], || near.tell(&first(&deny(target.addr()))))?;
    ended_by(&near, "closed")?;
    Ok(())
}

/// What was handed to a listener of the same process ends when the policy there changes.
///
/// Failure: policy-changes.
#[test]
fn a_flow_that_was_handed_over_in_the_process_ends_when_a_policy_denies_its_own_identity() -> Result<()> {
    let world = World::new()?;
    world.node().ip(&format!("route add default via {NET4}"))?;
    let (closed, open) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET4, target::echo())?);
    let node = Node::new(&world)?;
    let config = |policies: &str| {
        format!(
            "[daemon]\n{}{}[[capture]]\ncgroup = \"{}\"\n[[listener]]\nname = \"gw\"\naddress = \"127.0.0.1:15008\"\n\
             [[upstream]]\nname = \"here\"\nself = \"gw\"\n\
             [[route]]\nmatch = {{ source = [\"captured\"] }}\nto = [{{ upstream = \"here\" }}]\n\
             [[route]]\nto = \"direct\"\n{policies}",
            node.bpffs.toml(),
            world.pki().named("node").toml(),
            node.cgroup.path().display()
        )
    };
    let mut daemon = node.daemon(&config(ALLOW))?;
    let (mut denied, mut other) = (node.hold(&closed)?, node.hold(&open)?);
    let ours = deny(closed.addr()).replacen("\"any\"", &format!("[\"{NODE_ID}\"]"), 1);
    ends(&mut [&mut denied], || daemon.tell(&config(&ours)))?;
    ended_by(&daemon, "closed")?;
    assert_eq!(ask(&mut other, "ping")?, "ok");
    Ok(())
}

each_mode! {
    /// A route that denies what it took before ends the live flows of a capture within a second, whatever way their bytes
    /// go; flows to other targets go on.
    ///
    /// Failure: policy-changes.
    captured_flows_that_a_new_route_denies_end_within_a_second = denied_by_a_route;
}

fn denied_by_a_route(mode: &Mode) -> Result<()> {
    let stage = Stage::new()?;
    let (closed, open) =
        (stage.world.serve(TARGET4, target::echo())?, stage.world.serve(TARGET4, target::echo())?);
    let far = stage.gateway(mode)?;
    let mut daemon = stage.daemon(mode, far.as_ref())?;
    let hold = |addr: SocketAddr| {
        let mut command = stage.program(programs::app()?, true)?;
        command.args(["hold", &addr.to_string()]);
        let mut app = Process::spawn_with_input("app", stage.world.folder(), command)?;
        app.wait_for_line("held=1")?;
        for _ in 0..mode.chat {
            assert_eq!(ask(&mut app, "ping")?, "ok");
            #[expect(
                clippy::disallowed_methods,
                reason = "a flow has to be at rest: that is what its path waits for"
            )]
            std::thread::sleep(Duration::from_millis(mode.rest.into()));
        }
        anyhow::Ok(app)
    };
    let (mut app, mut other) = (hold(closed.addr())?, hold(open.addr())?);
    let deny = format!(
        "[[route]]\nname = \"shut\"\nmatch = {{ destination = [\"{}\"] }}\nto = \"deny\"\n[[route]]",
        closed.addr()
    );
    let config = fs::read_to_string(daemon.config())?.replacen("[[route]]", &deny, 1);
    ends(&mut [&mut app], || daemon.tell(&config))?;
    ended_by(&daemon, "shut")?;
    assert_eq!(ask(&mut other, "ping")?, "ok");
    Ok(())
}

/// A flow whose target answers only after the policy has changed is refused, or ended, and never carried.
///
/// Failure: policy-changes.
#[test]
fn a_flow_that_was_being_established_when_the_policy_changed_is_not_carried() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let target = target.addr();
    // The gateway's next hop accepts connections, and answers nothing until it is told to.
    let hop = world.net().run(|| std::net::TcpListener::bind(NEXT))?;
    hop.set_nonblocking(true)?;
    let through = format!(
        "[[route]]\nto = [{{ upstream = \"proxy\" }}]\n[[upstream]]\nname = \"proxy\"\nendpoints = [\"{NEXT}\"]\n\
         protocol = \"h1\"\ntls = false\n"
    );
    let config =
        |policies: &str| gateway(&world, "", "", policies).replace("[[route]]\nto = \"direct\"\n", &through);
    let mut daemon = Daemon::start(&world, world.net(), &config(ALLOW))?;
    let tls = peer::tls(&world.pki().named("node"))?;
    let status = world.node().block_on(|| async {
        let (requests, connection) = peer::connect(GATEWAY, tls).await?;
        let driving = tokio::task::spawn_local(connection);
        let request = connect_request(&target.to_string())?;
        let (response, _send) = requests.ready().await?.send_request(request, false)?;
        let (mut waiting, _) = tokio::net::TcpListener::from_std(hop)?.accept().await?;
        daemon.tell(&config(&deny(target)))?;
        waiting.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
        let status = response.await?.status();
        driving.abort();
        let _aborted = driving.await;
        anyhow::Ok(status)
    })?;
    assert_eq!(status, 403, "{}", daemon.log());
    let logged = lines_with(&daemon.log(), &["flow refused", "reason=policy_denied", "rule=\"closed\""]);
    assert_eq!(logged.len(), 1, "{}", daemon.log());
    Ok(())
}
