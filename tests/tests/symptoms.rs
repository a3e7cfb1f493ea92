//! The symptoms of the troubleshooting guide: each is caused, and found where the guide says.

use std::{fs, io::Write as _, net::TcpStream};

use anyhow::{Context as _, Result};
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, World,
    admin::{Admin, config, tunnel, value},
    daemon::Daemon,
    dialogue::lines_with,
    gateway,
    node::Node,
    peer::{self, connect_request},
    pki::NODE_ID,
    target, wait_for,
};

/// What holds a text within the patience of a test.
fn until(what: &str, mut says: impl FnMut() -> Result<String>, parts: &[&str]) -> Result<()> {
    let mut last = String::new();
    wait_for(what, PATIENCE, || {
        last = says().ok()?;
        parts.iter().all(|part| last.contains(part)).then_some(())
    })
    .with_context(|| format!("{parts:?} in {last}"))
}

/// No daemon answers: `tunnel status` says so, and what to do.
#[test]
fn status_without_a_daemon_says_that_none_listens() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&config(&node, &gateway, ""))?;
    let socket = Admin::of(&daemon).path().to_owned();
    daemon.process().stop()?;
    let (code, text) = tunnel_tests::admin::run(&["status", "--socket", &socket.display().to_string()])?;
    assert!(
        code == 1 && text.contains("no daemon listens there") && text.contains("--config"),
        "{code}: {text}"
    );
    Ok(())
}

/// connect() fails at once: `explain` names the pattern of `refuse` or the routes, and the capture counts each; a cgroup that is not
/// there is in `status` and in a metric.
///
/// Failure: refused.
#[test]
fn what_fails_in_connect_is_explained_and_counted() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let deny = "[[route]]\nmatch.destination = [\"10.9.0.0/16\"]\nto = \"deny\"\n";
    let refuse = node.config(&gateway, "", "name = \"apps\"\nrefuse = [\"10.8.0.0/16\"]");
    let absent =
        format!("[[capture]]\nname = \"late\"\ncgroup = \"{}/not-there\"\n", node.cgroup.path().display());
    let daemon = node.daemon(&format!("{deny}{refuse}{absent}"))?;
    let admin = Admin::of(&daemon);
    for (to, error, words, event) in [
        ("10.9.0.1:80", "ECONNREFUSED", "connect() fails with ECONNREFUSED", "denied_by_route"),
        ("10.8.0.1:80", "ENETUNREACH", "connect() fails with ENETUNREACH", "refused_by_rule"),
    ] {
        let (_, text) = tunnel(&daemon, &["explain", "--to", to, "--capture", "apps"])?;
        assert!(text.contains(words), "{text}");
        assert_eq!(node.connect_error_of(to.parse()?)?, error);
        let counted =
            admin.metric(&format!("tunnel_capture_events_total{{capture=\"apps\",event=\"{event}\"}}"))?;
        assert!(counted >= 1.0, "{event}: {counted}");
    }
    until("the log", || Ok(daemon.log()), &["denied by a route"])?;
    let (_, text) = tunnel(&daemon, &["status"])?;
    assert!(text.contains("waits for its cgroup") && text.contains("does not exist"), "{text}");
    assert_eq!(admin.metric("tunnel_capture_cgroup_present{capture=\"late\"}")?, 0.0);
    let (_, text) =
        tunnel(&daemon, &["explain", "--to", "10.7.0.1:80", "--cgroup", "/sys/fs/cgroup/elsewhere"])?;
    assert!(text.contains("no capture is of"), "{text}");
    Ok(())
}

/// Connections are reset because the upstream's certificate has another name: `status`, the log and a metric name the check.
///
/// Failure: peer-certificate.
#[test]
fn an_upstream_with_a_name_that_verify_does_not_list_is_named() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let wrong = "verify = [\"spiffe://test.tunnel/somebody-else\"]";
    let text = config(&node, &gateway, "");
    let start = text.find("verify = ").context("no verify")?;
    let end = start + text[start..].find('\n').context("no end")?;
    let daemon = node.daemon(&format!("{}{wrong}{}", &text[..start], &text[end..]))?;
    let admin = Admin::of(&daemon);
    let mut app = node.app(&["expect-reset", &target.addr().to_string(), "1"])?;
    assert!(app.wait(PATIENCE)?.success(), "{app}");
    let ended = "tunnel_flows_ended_total{reason=\"upstream_tls\",fault=\"upstream\"}";
    until("the metric", || Ok(admin.metric(ended)?.to_string()), &["1"])?;
    until(
        "status",
        || Ok(tunnel(&daemon, &["status"])?.1),
        &["errors of the last hour", "upstream_tls", "somebody-else"],
    )?;
    assert!(
        !lines_with(&daemon.log(), &["flow refused", "reason=upstream_tls"]).is_empty(),
        "{}",
        daemon.log()
    );
    Ok(())
}

/// A gateway that cannot reach a target, and one whose policy denies it, say which in the reason, the metric and the log; a peer
/// without TLS is counted by its check; a wrong configuration is in `status`, in a metric and in the log.
///
/// Failure: refused.
#[test]
fn a_gateways_refusals_rejected_peers_and_a_wrong_reload_are_named() -> Result<()> {
    let world = World::new()?;
    let to = (NET4, gateway::PORT).into();
    let text = format!(
        "{}[[listener]]\nname = \"mesh\"\naddress = \"{to}\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nname = \"targets\"\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    let mut daemon = Daemon::start(&world, world.net(), &text)?;
    let admin = Admin::of(&daemon);
    let node = world.pki().named("node");
    for (authority, status, reason, fault) in [
        (format!("{TARGET4}:9"), 502, "target_refused", "upstream"),
        ("10.201.0.1:80".to_owned(), 403, "policy_denied", "client"),
    ] {
        let answer = peer::ask(world.node(), to, &node, connect_request(&authority)?)?;
        assert_eq!(answer.status, status, "{authority}");
        let counted =
            admin.metric(&format!("tunnel_flows_ended_total{{reason=\"{reason}\",fault=\"{fault}\"}}"))?;
        assert_eq!(counted, 1.0, "{reason}");
        let line = ["flow refused", &format!("reason={reason}")];
        let logged = wait_for("the log", PATIENCE, || {
            let logged = lines_with(&daemon.log(), &line);
            (!logged.is_empty()).then_some(logged)
        })?;
        assert_eq!(logged.len(), 1, "{}", daemon.log());
    }
    let (_, text_of) =
        tunnel(&daemon, &["explain", "--to", "10.201.0.1:80", "--listener", "mesh", "--identity", NODE_ID])?;
    assert!(text_of.contains("policy_denied"), "{text_of}");

    world.node().run(|| -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        Ok(stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?)
    })?;
    let rejected = "tunnel_listener_connections_rejected_total{check=\"tls\"}";
    until("the metric", || Ok(admin.metric(rejected)?.to_string()), &["1"])?;
    until("the log", || Ok(daemon.log()), &["rejected peer connection"])?;

    daemon.tell(&format!("{text}[[polcy]]\n"))?;
    assert_eq!(admin.metric("tunnel_config_last_reload_successful")?, 0.0);
    let (_, status) = tunnel(&daemon, &["status"])?;
    assert!(status.contains("not put in force") && status.contains("polcy"), "{status}");
    assert!(daemon.log().contains("failed to reload"), "{}", daemon.log());
    let metrics = admin.get("/metrics")?.body;
    assert_eq!(value(&metrics, "tunnel_config_reloads_total{result=\"failure\"}"), Some(1.0));
    fs::write(daemon.config(), &text)?;
    Ok(())
}

/// An upstream without endpoints is named with why: `status` says which file is empty, and flows are refused with that reason.
#[test]
fn an_upstream_without_endpoints_is_named_with_why() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let file = world.file("endpoints", "")?;
    let text = config(&node, &gateway, "");
    let endpoints = format!("endpoints = [\"{}\"]", gateway.addr());
    assert!(text.contains(&endpoints), "{text}");
    let daemon =
        node.daemon(&text.replace(&endpoints, &format!("endpoints_file = \"{}\"", file.display())))?;
    let admin = Admin::of(&daemon);
    let mut app = node.app(&["expect-reset", &target.addr().to_string(), "1"])?;
    assert!(app.wait(PATIENCE)?.success(), "{app}");
    let ended = "tunnel_flows_ended_total{reason=\"no_endpoint\",fault=\"upstream\"}";
    until("the metric", || Ok(admin.metric(ended)?.to_string()), &["1"])?;
    until("status", || Ok(tunnel(&daemon, &["status"])?.1), &["has no endpoints", "PROBLEMS"])?;
    assert!(
        !lines_with(&daemon.log(), &["flow refused", "reason=no_endpoint"]).is_empty(),
        "{}",
        daemon.log()
    );
    Ok(())
}
