//! The admin interface: what it shows, what it does, and whom it refuses.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tunnel_tests::{
    PATIENCE, TARGET4, World,
    admin::{Admin, over_tcp, value},
    cgroup::Cgroup,
    daemon::Daemon,
    dialogue::ask,
    node::Node,
    pki::GATEWAY_ID,
    process::Process,
    programs, target, wait_for,
};

/// Where tests have it serve TCP, in a namespace of their own.
const TCP: &str = "127.0.0.1:15000";

/// A configuration of a node that captures, with more in `[admin]`.
fn config(node: &Node<'_>, gateway: &tunnel_tests::Gateway<'_>, admin: &str) -> String {
    format!("[admin]\n{admin}\n{}", node.config(gateway, "", "name = \"apps\""))
}

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

/// A Prometheus server scrapes the daemon, and finds it ready.
#[test]
fn prometheus_scrapes_the_daemon() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let _daemon = node.daemon(&config(&node, &gateway, &format!("listen = \"{TCP}\"")))?;
    let file = world.file(
        "prometheus.yml",
        format!("scrape_configs:\n- job_name: tunnel\n  scrape_interval: 1s\n  static_configs:\n  - targets: ['{TCP}']\n"),
    )?;
    let mut command = world.node().command(programs::system("prometheus")?);
    command.arg(format!("--config.file={}", file.display()));
    command.arg(format!("--storage.tsdb.path={}", world.folder().join("tsdb").display()));
    command.arg("--web.listen-address=127.0.0.1:9090");
    let _prometheus = Process::spawn("prometheus", world.folder(), command)?;
    let asked = |query: &str| {
        let to: SocketAddr = "127.0.0.1:9090".parse()?;
        let path = format!("/api/v1/query?query={query}");
        over_tcp(world.node(), to, "GET", &path, "Host: localhost\r\n")?.json()
    };
    let found = wait_for("a scrape", 3 * PATIENCE, || {
        let found = asked("tunnel_ready").ok()?;
        let value = found["data"]["result"][0]["value"][1].as_str()?.to_owned();
        Some((value, found))
    })?;
    assert_eq!(found.0, "1", "{:#}", found.1);
    let up = asked("up")?;
    assert_eq!(up["data"]["result"][0]["value"][1], "1", "{up:#}");
    Ok(())
}

/// Over TCP a name that DNS could give to this machine, and a browser that visits another site, are refused, and so is every
/// change.
#[test]
fn browsers_of_other_sites_and_changes_over_tcp_are_refused() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, &format!("listen = \"{TCP}\"")))?;
    let to: SocketAddr = TCP.parse()?;
    let asked = |method: &str, path: &str, headers: &str| over_tcp(world.node(), to, method, path, headers);
    assert_eq!(asked("GET", "/metrics", &format!("Host: {TCP}\r\n"))?.status, 200);
    assert_eq!(asked("GET", "/healthz/live", "Host: localhost:15000\r\n")?.status, 200);
    for headers in [
        "Host: attacker.example:15000\r\n".to_owned(),
        String::new(),
        format!("Host: {TCP}\r\nOrigin: http://attacker.example\r\n"),
        format!("Host: {TCP}\r\nSec-Fetch-Site: cross-site\r\n"),
    ] {
        for (method, path) in [("GET", "/metrics"), ("GET", "/config_dump"), ("POST", "/drain")] {
            let answer = asked(method, path, &headers)?;
            assert!(matches!(answer.status, 400 | 403), "{method} {path} {headers:?}: {answer:?}");
            assert!(!answer.body.contains("tunnel_flows"), "{answer:?}");
        }
    }
    let answer = asked("POST", "/drain", &format!("Host: {TCP}\r\n"))?;
    assert_eq!(answer.status, 403, "{answer:?}");
    assert!(answer.body.contains("write_over_tcp"), "{answer:?}");
    let admin = Admin::of(&daemon);
    let answer = admin.ask("POST", "/drain", "Origin: http://attacker.example\r\n")?;
    assert_eq!(answer.status, 403, "{answer:?}");
    assert_eq!(admin.get("/drain")?.status, 405);
    assert_eq!(admin.json("/status")?["state"], "running");
    Ok(())
}

/// A browser gets a page that needs nothing from elsewhere, and may load nothing from elsewhere; any other client a list of paths.
#[test]
fn a_browser_gets_a_page_that_needs_nothing_from_elsewhere() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let admin = Admin::of(&daemon);
    let page = admin.ask("GET", "/", "Accept: text/html,application/xhtml+xml\r\n")?;
    assert_eq!(page.status, 200);
    assert!(page.header("content-type").is_some_and(|t| t.starts_with("text/html")), "{page:?}");
    assert!(
        page.header("content-security-policy").is_some_and(|p| p.contains("default-src 'none'")),
        "{page:?}"
    );
    for file in ["page.css", "page.js"] {
        assert!(page.body.contains(file), "{}", page.body);
        let answer = admin.get(&format!("/{file}"))?;
        assert_eq!(answer.status, 200);
        assert!(!answer.body.contains("https://") && !answer.body.contains("@import"), "{file}");
    }
    assert!(!page.body.contains("http"), "{}", page.body);
    let index = admin.get("/")?;
    assert!(index.body.contains("/healthz/ready"), "{index:?}");
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
    world.pki().issue_expired("node", tunnel_tests::pki::NODE_ID)?;
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
    assert_eq!(certificates[0]["identity"], tunnel_tests::pki::NODE_ID);
    assert_eq!(certificates[0]["chain"][0]["names"][0], tunnel_tests::pki::NODE_ID);
    let upstreams = admin.json("/upstreams")?;
    assert_eq!(upstreams[0]["endpoints"][0]["address"], gateway.addr().to_string());
    for path in
        ["/config_dump", "/certificates", "/status", "/flows", "/upstreams", "/logging", "/history", "/"]
    {
        assert!(!admin.get(path)?.body.contains("PRIVATE KEY"), "{path}");
    }
    Ok(())
}

/// Connections that flood the admin interface, say nothing, say half of something or garbage, take nothing from flows: an
/// exchange on an established flow stays as fast.
#[test]
fn a_flooded_admin_interface_slows_no_flow() -> Result<()> {
    const EXCHANGES: usize = 500;
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, &format!("listen = \"{TCP}\"")))?;
    let admin = Admin::of(&daemon);
    let mut app = node.hold(&target)?;
    let mut p99 = || -> Result<Duration> {
        let mut took = Vec::new();
        for _ in 0..EXCHANGES {
            let started = Instant::now();
            ensure!(ask(&mut app, "ping")? == "ok", "the flow has ended");
            took.push(started.elapsed());
        }
        took.sort_unstable();
        Ok(took[EXCHANGES * 99 / 100])
    };
    let quiet = p99()?;
    // More than are served at once, and each of them in another bad way.
    let to: SocketAddr = TCP.parse()?;
    let held = world.node().run(|| -> Result<Vec<TcpStream>> {
        let mut held = Vec::new();
        for said in [
            &b""[..],
            b"GET /metr",
            b"GET / HTTP/1.1\r\nHost: loc",
            b"\x16\x03\x01\xff\x00",
            b"POST / HTTP/1.1\r\n",
        ] {
            for _ in 0..16 {
                let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                stream.write_all(said)?;
                held.push(stream);
            }
        }
        Ok(held)
    })?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let flooded = std::thread::scope(|scope| {
        for path in ["/metrics", "/status"] {
            let (admin, stop) = (&admin, &stop);
            scope.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // One that is refused is as good.
                    let _answer = admin.get(path);
                    let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(100_000));
                    if let Ok(mut stream) = UnixStream::connect(admin.path()) {
                        let _refused = stream.write_all(long.as_bytes());
                        let _refused = stream.read(&mut [0; 64]);
                    }
                }
            });
        }
        let flooded = p99();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        flooded
    })?;
    drop(held);
    // Two cores carry the flood, both ends of it, and the flow.
    assert!(flooded < quiet * 5 + Duration::from_millis(20), "p99 {quiet:?} became {flooded:?}");
    assert_eq!(admin.get("/healthz/ready")?.status, 200);
    Ok(())
}

/// A daemon that is replaced hands its admin socket over: whoever asks is answered by one of the two, at every moment.
#[test]
fn the_admin_socket_answers_through_a_take_over() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&config(&node, &gateway, ""))?;
    let admin = Admin::of(&daemon);
    let first = admin.json("/status")?["pid"].clone();
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--takeover", "--log", "info", "--config"]).arg(daemon.config());
    let _next = Process::spawn("next", world.folder(), command)?;
    let second = admin.until("another daemon", |status| status["pid"] != first)?;
    assert!(daemon.process().wait(PATIENCE)?.success());
    assert_eq!(
        admin.json("/status")?["pid"],
        second["pid"],
        "the old one has left the socket of the new one alone"
    );
    Ok(())
}

/// A second daemon does not take the socket of one that runs; where the configuration names it, it does not start.
#[test]
fn a_socket_of_another_daemon_is_not_taken() -> Result<()> {
    let world = World::new()?;
    let socket = world.folder().join("admin.sock");
    let listener = |port: u16| {
        format!(
            "[admin]\nsocket = \"{}\"\n[[listener]]\naddress = \"127.0.0.1:{port}\"\ntls = false\n[[route]]\nto = \"deny\"\n",
            socket.display()
        )
    };
    let _first = Daemon::start(&world, world.node(), &listener(1))?;
    let mut second = Daemon::spawn(&world, world.node(), &listener(2))?;
    let status = second.process().wait(PATIENCE)?;
    assert_eq!(tunnel_tests::process::code(status), 1);
    assert!(second.log().contains("another daemon"), "{}", second.log());
    assert!(UnixStream::connect(&socket).is_ok());
    Ok(())
}

/// `tunnel` with words, about a daemon; its status and what it prints.
fn tunnel(daemon: &Daemon, words: &[&str]) -> Result<(i32, String)> {
    // The socket comes after what is captured, which is what starting a daemon waits for.
    let _there = Admin::of(daemon);
    let mut command = Command::new(programs::tunnel()?);
    command.args(words).arg("--config").arg(daemon.config());
    let done = command.output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    Ok((tunnel_tests::process::code(done.status), said))
}

/// `tunnel status` shows captures, upstreams, certificates and flows on one screen, and a problem with its remedy when the
/// upstream cannot be reached.
#[test]
fn status_shows_one_screen_and_names_problems_with_their_remedy() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let mut app = node.hold(&target)?;
    let (code, text) = tunnel(&daemon, &["status"])?;
    assert_eq!(code, 0, "{text}");
    for part in [
        "running, ready",
        "flows 1 of",
        "apps",
        "capturing",
        &gateway.addr().to_string(),
        tunnel_tests::pki::NODE_ID,
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("PROBLEMS"), "{text}");
    let (code, json) = tunnel(&daemon, &["status", "--json"])?;
    assert_eq!(code, 0);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json)?["flows"]["live"], 1, "{json}");
    let (_, text) = tunnel(&daemon, &["flows", "--upstream", "gateway"])?;
    assert!(text.lines().count() == 2 && text.contains(&target.addr().to_string()), "{text}");
    let (_, text) = tunnel(&daemon, &["flows", "--destination", "10.9.9.9"])?;
    assert_eq!(text, "no flows\n");

    app.hang_up();
    app.wait(PATIENCE)?;
    gateway.kill()?;
    wait_for("a problem", PATIENCE, || {
        node.connect_error(&target).ok()?;
        let (_, text) = tunnel(&daemon, &["status"]).ok()?;
        (text.contains("PROBLEMS") && text.contains("upstream \"gateway\"")).then_some(())
    })?;
    Ok(())
}

/// `tunnel flows --kill` ends a flow; an ID that is none, or of no flow, is an error that says so.
#[test]
fn flows_are_killed_from_the_command_line() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let mut app = node.hold(&target)?;
    let id = Admin::of(&daemon).json("/flows")?[0]["id"].as_str().context("no flow")?.to_owned();
    let (code, text) = tunnel(&daemon, &["flows", "--kill", &id])?;
    assert_eq!((code, text), (0, format!("ended flow {id}\n")));
    assert_ne!(ask(&mut app, "ping").unwrap_or_default(), "ok");
    wait_for("its end", PATIENCE, || {
        let (code, text) = tunnel(&daemon, &["flows", "--kill", &id]).ok()?;
        (code == 1 && text.contains("there is no flow")).then_some(())
    })?;
    let (code, text) = tunnel(&daemon, &["flows", "--kill", "seven"])?;
    assert!(code == 64 && text.contains("two numbers"), "{code}: {text}");
    Ok(())
}

/// `tunnel explain` says whether a connection would be captured, which route takes it, why the others do not, and which upstream
/// and endpoint it may take; the daemon's own traffic says the same.
#[test]
fn explain_says_which_route_and_upstream_and_why_not_the_others() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let routes = "[[route]]\nmatch.destination = [\"10.9.0.0/16\"]\nto = \"deny\"\n\
                  [[route]]\nmatch.destination = [\"10.8.0.0/16:443\"]\nmatch.sni = [\"*.example\"]\nto = \"direct\"\n";
    let daemon = node.daemon(&format!("{routes}{}", config(&node, &gateway, "")))?;
    let addr = target.addr().to_string();
    let (code, text) = tunnel(&daemon, &["explain", "--to", &addr])?;
    assert_eq!(code, 0, "{text}");
    for part in [
        "captured: yes",
        "route 0: does not match: destination",
        "route 1: does not match: destination",
        "route 2: takes it",
        "through upstream gateway",
        &format!("endpoint {}: available", gateway.addr()),
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let explained = |words: &[&str]| tunnel(&daemon, &[&["explain", "--to"], words].concat());
    let (_, text) = explained(&["10.9.0.1:80"])?;
    assert!(text.contains("ECONNREFUSED"), "{text}");
    assert_eq!(node.connect_error_of("10.9.0.1:80".parse()?)?, "ECONNREFUSED");
    let (_, text) = explained(&["10.8.0.1:443"])?;
    assert!(text.contains("route 1: takes it if its first bytes match"), "{text}");
    let (_, text) = explained(&["10.8.0.1:443", "--sni", "a.example"])?;
    assert!(text.contains("route 1: takes it\n") && text.contains("route 2: is not asked"), "{text}");
    let (_, text) = explained(&["127.0.0.1:80"])?;
    assert!(text.contains("captured: no") && text.contains("left alone by default"), "{text}");
    let inside = node.cgroup.path().join("below").display().to_string();
    let (_, text) = explained(&[&addr, "--cgroup", &inside])?;
    assert!(text.contains("captured: yes"), "{text}");
    let (_, text) = explained(&[&addr, "--cgroup", "/sys/fs/cgroup/elsewhere"])?;
    assert!(text.contains("no capture is of") && text.contains("connects directly"), "{text}");
    let (code, text) = explained(&[&addr, "--listener", "none"])?;
    assert!(code == 1 && text.contains("there is no listener"), "{text}");
    assert_eq!(target.peers().len(), 0, "nothing was sent");
    Ok(())
}

/// `tunnel explain` says of a listener's peer whether policy allows it, as a request of that peer is answered.
#[test]
fn explain_says_what_policy_says_of_a_peer() -> Result<()> {
    let world = World::new()?;
    let config = format!(
        "{}[[listener]]\nname = \"mesh\"\naddress = \"{}:15008\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = [\"{}\"]\ntarget = [\"{TARGET4}/32\"]\n",
        world.pki().named("gateway").toml(),
        tunnel_tests::NET4,
        tunnel_tests::pki::NODE_ID
    );
    let daemon = Daemon::start(&world, world.net(), &config)?;
    let explained = |to: &str, who: &str| {
        tunnel(&daemon, &["explain", "--to", to, "--listener", "mesh", "--identity", who])
            .map(|(_, text)| text)
    };
    let to = format!("{TARGET4}:80");
    let text = explained(&to, tunnel_tests::pki::NODE_ID)?;
    assert!(text.contains("allowed: yes") && text.contains("dialled from here"), "{text}");
    let text = explained(&to, "spiffe://other/x")?;
    assert!(text.contains("allowed: no") && text.contains("policy_denied"), "{text}");
    Ok(())
}

/// `tunnel support` writes a folder that only its owner can read, with the configuration and the latest log lines and no key.
#[test]
fn support_writes_a_report_without_secrets() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let secret = "headers = { proxy-authorization = \"Basic c2VjcmV0\" }\n";
    let daemon = node.daemon(&(config(&node, &gateway, "") + secret))?;
    let folder = world.folder().join("report");
    let (code, text) = tunnel(&daemon, &["support", "--output", &folder.display().to_string()])?;
    assert_eq!(code, 0, "{text}");
    assert_eq!(fs::metadata(&folder)?.permissions().mode() & 0o777, 0o700);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(&folder)? {
        let entry = entry?;
        let text = String::from_utf8_lossy(&fs::read(entry.path())?).into_owned();
        assert!(!text.contains("PRIVATE KEY") && !text.contains("c2VjcmV0"), "{:?}", entry.path());
        names.insert(entry.file_name().to_string_lossy().into_owned());
    }
    for name in ["status.json", "metrics.txt", "config.json", "doctor.json", "log.txt", "certificates.json"] {
        assert!(names.contains(name), "{name} of {names:?}");
    }
    assert!(fs::read_to_string(folder.join("log.txt"))?.contains("capturing"));
    let (code, text) = tunnel(&daemon, &["support", "--output", &folder.display().to_string()])?;
    assert!(code == 1 && text.contains("does not exist yet"), "{text}");
    Ok(())
}

/// Every series that the dashboard and the alert rules of `examples/` use is one that a daemon has, and `promtool check rules`
/// accepts the rules.
#[test]
fn the_dashboard_and_the_alert_rules_use_series_that_exist() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
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

/// A group that an operator attaches is captured over a reload and a take-over, is shown, and is no longer captured when it is
/// detached.
#[test]
fn an_attached_capture_lasts_over_a_reload_and_a_take_over_until_it_is_detached() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    // What the file captures is another group.
    let elsewhere = Cgroup::new()?;
    let of = |keys: &str| {
        let mine = node.cgroup.path().display().to_string();
        let text = config(&node, &gateway, "").replace(&mine, &elsewhere.path().display().to_string());
        text.replace("[daemon]\n", &format!("[daemon]\n{keys}"))
    };
    let mut daemon = node.daemon(&of(""))?;
    let carried = || gateway.log().matches("tunnel accepted").count() > 0;
    let group = node.cgroup.path().display().to_string();
    let (code, text) = tunnel(&daemon, &["attach", "--cgroup", &group, "--name", "extra"])?;
    assert_eq!((code, text), (0, format!("attached {group}\n")));
    let sees = |captured: bool| -> Result<()> {
        // The target sees the gateway, or nothing comes there: the node has no route to it.
        let error = node.connect_error(&target)?;
        ensure!((error == "ok") == captured, "{error}");
        Ok(())
    };
    sees(true)?;
    wait_for("a flow through the gateway", PATIENCE, || carried().then_some(()))?;
    daemon.tell(&of("drain_timeout = \"7s\"\n"))?;
    sees(true)?;
    let (_, text) = tunnel(&daemon, &["status"])?;
    assert!(text.contains("extra"), "{text}");
    let (code, text) = tunnel(&daemon, &["attach", "--cgroup", &group])?;
    assert!(code == 1 && text.contains("already"), "{text}");

    let admin = Admin::of(&daemon);
    let first = admin.json("/status")?["pid"].clone();
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--takeover", "--log", "info", "--config"]).arg(daemon.config());
    let _next = Process::spawn("next", world.folder(), command)?;
    admin.until("another daemon", |status| status["pid"] != first)?;
    assert!(daemon.process().wait(PATIENCE)?.success());
    sees(true)?;
    let dump = admin.json("/config_dump")?;
    assert_eq!(dump["layers"][1]["source"], "attached", "{dump:#}");

    let (code, text) = tunnel(&daemon, &["detach", "--cgroup", &group])?;
    assert_eq!((code, text), (0, format!("detached {group}\n")));
    sees(false)?;
    let (code, text) = tunnel(&daemon, &["detach", "--cgroup", &group])?;
    assert!(code == 1 && text.contains("was attached"), "{text}");
    Ok(())
}

/// A capture that is attached to a process until it exits ends with it.
#[test]
fn a_capture_attached_until_exit_ends_with_its_process() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let elsewhere = Cgroup::new()?;
    let mine = node.cgroup.path().display().to_string();
    let text = config(&node, &gateway, "").replace(&mine, &elsewhere.path().display().to_string());
    let daemon = node.daemon(&text)?;
    let admin = Admin::of(&daemon);
    let mut command = world.node().command(programs::system("sleep")?);
    command.arg("600");
    node.cgroup.adopt(&mut command)?;
    let mut app = Process::spawn("sleep", world.folder(), command)?;
    let (code, text) = tunnel(&daemon, &["attach", "--pid", &app.id().to_string(), "--until-exit"])?;
    assert_eq!((code, text), (0, format!("attached {mine}\n")));
    let captures = |n: usize| {
        move |status: &serde_json::Value| status["captures"].as_array().is_some_and(|c| c.len() == n)
    };
    admin.until("the capture", captures(2))?;
    app.kill()?;
    admin.until("its end", captures(1))?;
    Ok(())
}
