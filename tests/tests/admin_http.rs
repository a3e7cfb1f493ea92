//! The admin interface as a server: its sockets, whom it refuses, and what a flood of requests does.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tunnel_tests::{
    PATIENCE, TARGET4, World,
    admin::{Admin, config, over_tcp},
    daemon::Daemon,
    dialogue::ask,
    node::Node,
    process::Process,
    programs, target, wait_for,
};

/// Where tests have it serve TCP, in a namespace of their own.
const TCP: &str = "127.0.0.1:15000";

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

/// A daemon that is replaced hands its admin socket over: whoever asks is answered by one of the two, at every moment; over TCP by
/// the new one alone, while the old one drains.
#[test]
fn the_admin_socket_answers_through_a_take_over() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&config(&node, &gateway, &format!("listen = \"{TCP}\"")))?;
    let admin = Admin::of(&daemon);
    let mut app = node.hold(&target)?;
    let first = admin.json("/status")?["pid"].clone();
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--takeover", "--log", "info", "--config"]).arg(daemon.config());
    let _next = Process::spawn("next", world.folder(), command)?;
    let second = admin.until("another daemon", |status| status["pid"] != first)?;
    let tcp = || -> Result<serde_json::Value> {
        let answer = over_tcp(world.node(), TCP.parse()?, "GET", "/status", &format!("Host: {TCP}\r\n"))?;
        Ok(answer.json()?["pid"].clone())
    };
    wait_for("the old one to leave TCP", PATIENCE, || {
        daemon.log().contains("has taken over: draining").then_some(())
    })?;
    wait_for("the new one over TCP", PATIENCE, || {
        (0..20).all(|_| tcp().is_ok_and(|pid| pid == second["pid"])).then_some(())
    })?;
    assert_eq!(ask(&mut app, "ping")?, "ok", "the old one drains");
    app.hang_up();
    app.wait(PATIENCE)?;
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
