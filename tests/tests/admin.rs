//! The admin interface: what it shows, and what it does.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, World,
    admin::{Admin, config, value},
    daemon::Daemon,
    dialogue::ask,
    node::Node,
    peer,
    pki::{GATEWAY_ID, NODE_ID},
    programs, target,
    terminal::Guarded,
    wait_for,
};

/// `promtool check metrics` says nothing about the metrics, in either format's text.
fn promtool(text: &str) -> Result<String> {
    let mut command = Command::new(programs::system("promtool")?);
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("no stdin")?.write_all(text.as_bytes())?;
    let done = child.wait_with_output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    ensure!(done.status.success(), "promtool: {said}");
    Ok(said)
}

/// The metrics of a daemon count its flows and their bytes while they run, and `promtool check metrics` accepts them.
#[test]
fn metrics_count_flows_and_bytes_while_they_run() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let admin = Admin::of(&daemon);
    assert_eq!(fs::metadata(admin.path())?.permissions().mode() & 0o777, 0o600);
    assert_eq!(admin.metric("tunnel_flows_opened_total")?, 0.0);

    let mut app = node.hold(&target)?;
    for _ in 0..9 {
        assert_eq!(ask(&mut app, "ping")?, "ok");
    }
    let text = admin.get("/metrics")?.body;
    let of = |series: &str| value(&text, series).with_context(|| format!("{series} in {text}"));
    assert_eq!(of("tunnel_flows_opened_total")?, 1.0);
    assert_eq!(of("tunnel_flows_live{path=\"copy\"}")?, 1.0);
    assert_eq!(of("tunnel_flows_routed_total{upstream=\"gateway\"}")?, 1.0);
    // Ten pings, of a byte each way at least.
    assert!(of("tunnel_flow_bytes_total{direction=\"sent\"}")? >= 10.0, "{text}");
    assert!(of("tunnel_flow_bytes_total{direction=\"received\"}")? >= 10.0);
    assert_eq!(of("tunnel_flow_connect_duration_seconds_count")?, 1.0);
    assert_eq!(of("tunnel_upstream_connects_total{upstream=\"gateway\",result=\"success\"}")?, 1.0);
    assert_eq!(of("tunnel_upstream_endpoints{upstream=\"gateway\",state=\"available\"}")?, 1.0);
    assert_eq!(of("tunnel_capture_attached{capture=\"apps\"}")?, 1.0);
    assert_eq!(of("tunnel_ready")?, 1.0);
    let expiry = of("tunnel_certificate_expiry_timestamp_seconds{identity=\"default\"}")?;
    assert!(expiry > 1.7e9, "{expiry}");

    app.hang_up();
    app.wait(PATIENCE)?;
    wait_for("the end of the flow", PATIENCE, || {
        let closed = "tunnel_flows_ended_total{reason=\"closed\",fault=\"nobody\"}";
        (admin.metric(closed).ok()? == 1.0).then_some(())
    })?;
    assert_eq!(admin.metric("tunnel_flow_first_byte_duration_seconds_count")?, 1.0);
    assert_eq!(admin.metric("tunnel_flow_duration_seconds_count")?, 1.0);

    let said = promtool(&admin.get("/metrics")?.body)?;
    assert!(said.trim().is_empty(), "{said}");
    let open = admin.ask("GET", "/metrics", "Accept: application/openmetrics-text;version=1.0.0\r\n")?;
    assert!(
        open.header("content-type").is_some_and(|t| t.starts_with("application/openmetrics-text")),
        "{open:?}"
    );
    assert!(open.body.ends_with("# EOF\n"), "{}", open.body);
    Ok(())
}

/// `/healthz/ready` says 503 and what is missing while a certificate is expired, and `/healthz/live` 200.
#[test]
fn a_daemon_with_an_expired_certificate_is_live_and_not_ready() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let admin = Admin::of(&daemon);
    assert_eq!(admin.get("/healthz/ready")?.status, 200);
    world.pki().issue_expired("node", NODE_ID)?;
    let answer = wait_for("the expired certificate", PATIENCE, || {
        admin.get("/healthz/ready").ok().filter(|answer| answer.status == 503)
    })?;
    assert!(answer.body.contains("expired"), "{answer:?}");
    assert_eq!(admin.get("/healthz/live")?.status, 200);
    assert_eq!(admin.metric("tunnel_ready")?, 0.0);
    Ok(())
}

/// POST /drain ends a daemon as SIGTERM does: it is not ready, its flow may finish, and its socket is removed.
#[test]
fn a_daemon_drains_when_an_operator_asks_for_it() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&config(&node, &gateway, ""))?;
    let admin = Admin::of(&daemon);
    let mut app = node.hold(&target)?;
    assert_eq!(admin.post("/drain")?.status, 202);
    wait_for("the drain", PATIENCE, || (admin.get("/healthz/ready").ok()?.status == 503).then_some(()))?;
    assert_eq!(admin.json("/status")?["state"], "draining");
    assert_eq!(admin.json("/flows")?.as_array().map(Vec::len), Some(1), "what holds it up can be seen");
    assert_eq!(ask(&mut app, "ping")?, "ok");
    app.hang_up();
    app.wait(PATIENCE)?;
    assert!(daemon.process().wait(PATIENCE)?.success());
    assert!(!admin.path().exists());
    Ok(())
}

/// A flow that an operator kills ends with that reason, and no other does.
#[test]
fn a_flow_is_listed_and_killed_by_its_id() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let admin = Admin::of(&daemon);
    let (mut one, mut other) = (node.hold(&target)?, node.hold(&target)?);
    let flows = admin.json("/flows")?;
    let flows = flows.as_array().context("no list")?;
    assert_eq!(flows.len(), 2, "{flows:?}");
    assert_eq!(flows[0]["destination"], target.addr().to_string());
    assert_eq!(flows[0]["source"], "apps");
    assert_eq!(flows[0]["upstream"], "gateway");
    assert_eq!(flows[0]["identity"], GATEWAY_ID);
    let ids: BTreeSet<_> = flows.iter().filter_map(|f| f["id"].as_str()).collect();
    assert_eq!(ids.len(), 2);
    let none = admin.json("/flows?upstream=direct")?;
    assert_eq!(none.as_array().map(Vec::len), Some(0));
    assert_eq!(admin.get("/flows?colour=red")?.status, 400);

    let client = ask(&mut one, "local")?;
    let id =
        flows.iter().find(|f| f["client"] == client).and_then(|f| f["id"].as_str()).context("not listed")?;
    assert_eq!(admin.post(&format!("/flows/{id}/kill"))?.status, 200);
    assert_ne!(ask(&mut one, "ping").unwrap_or_default(), "ok", "it was reset");
    assert_eq!(ask(&mut other, "ping")?, "ok");
    wait_for("the record", PATIENCE, || {
        let killed = "tunnel_flows_ended_total{reason=\"killed\",fault=\"us\"}";
        (admin.metric(killed).ok()? == 1.0).then_some(())
    })?;
    assert_eq!(admin.post(&format!("/flows/{id}/kill"))?.status, 404);
    assert_eq!(admin.post("/flows/x/kill")?.status, 400);
    Ok(())
}

/// The level of one target changes while the daemon runs, and a filter that is none is refused.
#[test]
fn the_log_level_of_a_target_changes_at_runtime() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let admin = Admin::of(&daemon);
    assert!(!daemon.log().contains(" TRACE "));
    let answer = admin.post("/logging?target=tunnel::proxy&level=trace")?;
    assert!(answer.status == 200 && answer.body.contains("tunnel::proxy=trace"), "{answer:?}");
    assert_eq!(admin.post("/logging?level=loud")?.status, 400);
    assert_eq!(admin.post("/logging")?.status, 400);
    assert_eq!(admin.post("/logging?filter=off")?.status, 200);
    let before = daemon.log().len();
    let mut app = node.hold(&target)?;
    app.hang_up();
    app.wait(PATIENCE)?;
    assert_eq!(daemon.log()[before..].lines().filter(|l| l.contains("flow")).count(), 0);
    assert_eq!(admin.post("/logging?reset")?.status, 200);
    assert!(admin.get("/logging")?.body.contains("tunnel=debug"));
    Ok(())
}

/// What is in force can be read, with defaults, certificates and where it came from, and no key material.
#[test]
fn the_configuration_and_certificates_are_shown_without_keys() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let secret = "headers = { proxy-authorization = \"Basic c2VjcmV0\" }\n";
    let daemon = node.daemon(&(config(&node, &gateway, "") + secret))?;
    let admin = Admin::of(&daemon);
    let dump = admin.json("/config_dump")?;
    assert_eq!(dump["file"], daemon.config().display().to_string());
    let config = &dump["layers"][0]["config"];
    assert_eq!(dump["layers"][0]["source"], "file");
    assert_eq!(config["capture"][0]["name"], "apps");
    assert_eq!(config["daemon"]["relay"], "copy", "{config:#}");
    assert!(!dump.to_string().contains("c2VjcmV0"), "{dump:#}");
    let certificates = admin.json("/certificates")?;
    assert_eq!(certificates[0]["identity"], NODE_ID);
    assert_eq!(certificates[0]["chain"][0]["names"][0], NODE_ID);
    let upstreams = admin.json("/upstreams")?;
    assert_eq!(upstreams[0]["endpoints"][0]["address"], gateway.addr().to_string());
    for path in
        ["/config_dump", "/certificates", "/status", "/flows", "/upstreams", "/logging", "/history", "/"]
    {
        assert!(!admin.get(path)?.body.contains("PRIVATE KEY"), "{path}");
    }
    Ok(())
}

/// Every series that the dashboard and the alert rules of `examples/` use is one that a daemon has, and `promtool check rules`
/// accepts the rules.
#[test]
fn the_dashboard_and_the_alert_rules_use_series_that_exist() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let policy = "[[policy]]\nname = \"web\"\naction = \"deny\"\nidentity = \"any\"\ntarget = \"any\"\n";
    let daemon = node.daemon(&(config(&node, &gateway, "") + policy))?;
    let text = Admin::of(&daemon).get("/metrics")?.body;
    let there: BTreeSet<_> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut used = 0;
    for file in ["prometheus/alerts.yml", "grafana/tunnel.json"] {
        let text = fs::read_to_string(examples.join(file))?;
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for series in
            words.filter(|w| (w.starts_with("tunnel_") || w.starts_with("process_")) && *w != "tunnel_")
        {
            assert!(there.contains(series), "{file}: {series} is not in:\n{text}");
            used += 1;
        }
    }
    assert!(used > 40, "{used}");
    let mut command = Command::new(programs::system("promtool")?);
    let done = command.args(["check", "rules"]).arg(examples.join("prometheus/alerts.yml")).output()?;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

/// What each policy decides is counted, and with `metrics = ["istio"]` who talked to whom, with ztunnel's labels; `promtool check
/// metrics` accepts all of it.
#[test]
fn policies_are_counted_and_istio_metrics_say_who_talked_to_whom() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let to: SocketAddr = (NET4, 15008).into();
    let config = format!(
        "[admin]\nmetrics = [\"istio\"]\n{}[[listener]]\naddress = \"{to}\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nname = \"web\"\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n\
         [[policy]]\nname = \"closed\"\naction = \"deny\"\nidentity = \"any\"\ntarget = [\"10.200.0.77\"]\n",
        world.pki().named("gateway").toml()
    );
    let daemon = Daemon::start(&world, world.net(), &config)?;
    let admin = Admin::of(&daemon);
    let node = world.pki().named("node");
    let asked = |authority: &str| -> Result<u16> {
        Ok(peer::ask(world.node(), to, &node, peer::connect_request(authority)?)?.status.as_u16())
    };
    assert_eq!(asked(&target.addr().to_string())?, 200);
    assert_eq!(asked("10.200.0.77:80")?, 403);
    let text = wait_for("the end of the flow", PATIENCE, || {
        let text = admin.get("/metrics").ok()?.body;
        text.contains("istio_tcp_connections_closed_total{").then_some(text)
    })?;
    let of = |series: &str| value(&text, series).with_context(|| format!("{series} in {text}"));
    assert_eq!(of("tunnel_policy_decisions_total{policy=\"web\",decision=\"allowed\"}")?, 1.0);
    assert_eq!(of("tunnel_policy_decisions_total{policy=\"closed\",decision=\"denied\"}")?, 1.0);
    assert_eq!(of("tunnel_policy_decisions_total{policy=\"closed\",decision=\"reported\"}")?, 0.0);
    assert!(
        of("tunnel_memory_budget_bytes")? > 1e6 && of("tunnel_memory_refused_total{budget=\"peer\"}")? == 0.0
    );
    let istio = |name: &str, flags: &str| {
        let labels = [
            "reporter=\"destination\"".to_owned(),
            format!("source_principal=\"{NODE_ID}\""),
            format!("destination_principal=\"{GATEWAY_ID}\""),
            "destination_service=\"unknown\"".to_owned(),
            "request_protocol=\"tcp\"".to_owned(),
            format!("response_flags=\"{flags}\""),
            "connection_security_policy=\"mutual_tls\"".to_owned(),
        ];
        let lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        let mut found = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
        found
            .next()
            .and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .with_context(|| format!("{name} in {text}"))
    };
    assert_eq!(istio("istio_tcp_connections_opened_total", "-")?, 1.0);
    assert_eq!(istio("istio_tcp_connections_closed_total", "-")?, 1.0);
    assert_eq!(istio("istio_tcp_connections_failed_total", "DENY")?, 1.0);
    assert!(
        istio("istio_tcp_sent_bytes_total", "-")? >= 0.0
            && istio("istio_tcp_received_bytes_total", "-")? >= 0.0
    );
    let said = promtool(&text)?;
    assert!(said.trim().is_empty(), "{said}");
    Ok(())
}

/// A daemon whose standard error nobody reads carries flows on, counts the lines that are lost, and says so when it is read again,
/// with its last lines.
#[test]
fn a_log_that_nobody_reads_holds_nothing_up() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let socket = world.folder().join("admin.sock");
    let text = config(&node, &gateway, &format!("socket = \"{}\"", socket.display()));
    let file = world.file("silent.toml", text)?;
    let (mut log, unread) = std::io::pipe()?;
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--log", "info", "--config"]).arg(file).stderr(unread);
    let mut daemon = Guarded(command.spawn()?);
    // The pipe is the daemon's alone.
    drop(command);
    let admin = Admin::at(socket);
    wait_for("the daemon", PATIENCE, || (admin.get("/healthz/ready").ok()?.status == 200).then_some(()))?;
    // Each is logged, and is nearly as long as a filter may be.
    let filter = format!("/logging?filter=info,{}=off", "x".repeat(4000));
    wait_for("lost lines", PATIENCE, || {
        (0..50).all(|_| admin.post(&filter).is_ok_and(|answer| answer.status == 200)).then_some(())?;
        (admin.metric("tunnel_log_lines_lost_total").ok()? > 0.0).then_some(())
    })?;
    assert_eq!(node.connect_error(&target)?, "ok");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(daemon.0.id())?), Signal::SIGTERM)?;
    let mut text = String::new();
    log.read_to_string(&mut text)?;
    assert!(daemon.0.wait()?.success());
    assert!(text.contains("log lines were lost here: standard error was not read"), "{}", text.len());
    let last = text.lines().rev().take(20).collect::<Vec<_>>().join("\n");
    assert!(last.contains("log_lines_lost"), "{last}");
    Ok(())
}
