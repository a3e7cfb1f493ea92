//! CONNECT over HTTP/1 and in plaintext, on both sides: with curl, redsocks and tinyproxy at the other end, with
//! ourselves, and with peers that do not mean well.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tunnel_tests::{
    Exec, NET4, NetNs, PATIENCE, Process, TARGET4, TARGET6, Target, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::Daemon,
    dialogue::ask,
    ends::{self, Way},
    pattern::{DOWN, UP},
    peer,
    pki::{GATEWAY_ID, NODE_ID},
    process, programs, proxies, servers, target, wait_for,
};

const MIB: u64 = 1 << 20;
/// What a proxy in front of the target listens on.
const PORT: u16 = 3128;

fn proxy() -> SocketAddr {
    SocketAddr::new(NET4, PORT)
}

/// A gateway of ours; `keys` are more of its listener.
fn gateway(world: &World, tls: bool, protocols: &str, keys: &str) -> Result<Daemon> {
    gateway_with(world, "", tls, protocols, keys)
}

/// The same, with a table of the process.
fn gateway_with(world: &World, daemon: &str, tls: bool, protocols: &str, keys: &str) -> Result<Daemon> {
    let identity = if tls { world.pki().named("gateway").toml() } else { String::new() };
    let config = format!(
        "{daemon}{identity}[[listener]]\naddress = \"{}\"\nprotocols = [{protocols}]\ntls = {tls}\n{keys}\n\
         [[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24:1024-65535\", \"10.200.0.10:80\", \"fd00:200::/64\"]\n",
        proxy()
    );
    Daemon::start(world, world.net(), &config)
}

/// For `tunnel exec`: everything goes to the proxy. `keys` are more of the upstream.
fn agent(world: &World, tls: bool, protocol: &str, keys: &str) -> Result<PathBuf> {
    let (identity, verify) = match tls {
        true => (world.pki().named("node").toml(), format!("verify = [\"{GATEWAY_ID}\"]\n")),
        false => (String::new(), String::new()),
    };
    let config = format!(
        "[daemon]\nworkers = 1\nrelay = \"pipe\"\n{identity}[[route]]\nto = [{{ upstream = \"next\" }}]\n\
         [[upstream]]\nname = \"next\"\nendpoints = [\"{}\"]\nprotocol = \"{protocol}\"\ntls = {tls}\n{verify}{keys}\n",
        proxy()
    );
    world.file("agent.toml", config)
}

/// A page behind the proxy, and curl in front of it.
fn curl(world: &World, flags: &[&str]) -> Result<String> {
    let files = world.folder().join("files");
    std::fs::create_dir_all(&files)?;
    std::fs::write(files.join("page"), "hello\n")?;
    let server = servers::http(world, &files)?;
    let mut command = world.node().command("curl");
    command.args(["-sS", "--fail", "--proxytunnel", "--max-time", "20", "--noproxy", ""]);
    process::output(command.args(flags).arg(format!("http://{}/page", server.addr())))
}

/// curl tunnels through a plaintext HTTP/1 listener.
#[test]
fn curl_tunnels_through_a_listener_in_plaintext() -> Result<()> {
    let world = World::new()?;
    for protocols in ["\"h1\"", "\"h2\", \"h1\""] {
        let mut daemon = gateway(&world, false, protocols, "")?;
        let page = curl(&world, &["-x", &format!("http://{}", proxy())])?;
        assert_eq!(page, "hello\n");
        // HTTP/1.0 as well.
        let page = curl(&world, &["--proxy1.0", &proxy().to_string()])?;
        assert_eq!(page, "hello\n");
        daemon.process().stop()?;
    }
    Ok(())
}

/// curl tunnels through an HTTP/1 listener with mTLS, and is rejected without a certificate.
#[test]
fn curl_tunnels_through_a_listener_with_tls_and_a_certificate_and_not_without() -> Result<()> {
    let world = World::new()?;
    let mut daemon = gateway(&world, true, "\"h2\", \"h1\"", "")?;
    let who = world.pki().named("node");
    let (url, files) =
        (format!("https://{}", proxy()), [&who.ca, &who.cert, &who.key].map(|f| f.to_string_lossy()));
    let anonymous = ["-x", &url, "--proxy-cacert", &*files[0]];
    let page =
        curl(&world, &[&anonymous[..], &["--proxy-cert", &*files[1], "--proxy-key", &*files[2]]].concat())?;
    assert_eq!(page, "hello\n");
    let line = daemon.process().wait_for_line("reason=closed destination=")?;
    assert!(line.contains(NODE_ID), "{line}");
    assert!(curl(&world, &anonymous).is_err());
    daemon.process().wait_for_line("rejected peer connection")?;
    Ok(())
}

/// A command of the tests' application in a group.
fn app(host: &NetNs, group: &Cgroup, words: &[&str]) -> Result<Command> {
    let mut command = host.command(programs::app()?);
    command.args(words);
    group.adopt(&mut command)?;
    Ok(command)
}

/// redsocks carries captured connections to an HTTP/1 listener.
#[test]
fn redsocks_carries_what_we_capture_through_a_listener_of_ours() -> Result<()> {
    const BYTES: u64 = 300_000;
    let world = World::new()?;
    let _gateway = gateway(&world, false, "\"h1\"", "")?;
    let (group, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let config = format!(
        "base {{ log_debug = off; log_info = on; log = stderr; daemon = off; redirector = iptables; }}\n\
         redsocks {{ local_ip = 127.0.0.1; local_port = 12345; ip = {NET4}; port = {PORT}; type = http-connect; }}\n"
    );
    let mut redsocks = world.node().command(programs::system("redsocks")?);
    redsocks.arg("-c").arg(world.file("redsocks.conf", config)?);
    // It is asked about connections of the group's, so it is in the group.
    group.adopt(&mut redsocks)?;
    let mut redsocks = Process::spawn("redsocks", world.folder(), redsocks)?;
    wait_for("redsocks to listen", PATIENCE, || {
        let ended = redsocks.ended().is_ok_and(|e| e.is_some());
        (ended || world.node().listens(12345).is_ok_and(|listens| listens)).then_some(())
    })?;
    let config = format!(
        "[daemon]\n{}\n[[capture]]\ncgroup = \"{}\"\ninclude = [\"10.200.0.0/24\"]\nproxy = \"127.0.0.1:12345\"\n",
        bpffs.toml(),
        group.path().display()
    );
    let _daemon = Daemon::start(&world, world.node(), &config)?;
    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let addr = target.addr().to_string();
    let client = process::output(&mut app(world.node(), &group, &["duplex", &addr, &BYTES.to_string()])?)?;
    assert!(client.contains(&format!("duplex={BYTES}")), "{client}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    // A target that is not there: 502, and what redsocks makes of it.
    drop(target);
    assert!(process::output(&mut app(world.node(), &group, &["duplex", &addr, "1"])?).is_err());
    Ok(())
}

/// What a byte stream with two ends promises: all bytes once and in order, each end by itself, resets as resets.
fn is_a_byte_stream(world: &World, exec: &Exec<'_>, bulk: u64) -> Result<()> {
    for ip in [TARGET4, TARGET6] {
        let target = world.serve(ip, target::duplex(bulk))?;
        let done = exec.run_app(&["duplex", &target.addr().to_string(), &bulk.to_string()])?;
        assert!(done.success(), "{done}");
        assert_eq!(target.outcomes(1)?, [Ok(())]);
        let flow = &done.flows()?[0];
        assert_eq!((flow["sent"].as_u64(), flow["received"].as_u64()), (Some(bulk), Some(bulk)), "{flow}");
        assert_eq!(flow["reason"], "closed", "{flow}");
    }
    ends::is_a_byte_stream(Way::Captured(world, exec))
}

/// What the next hop refuses resets the application, and says why.
fn refusals_reset(world: &World, exec: &Exec<'_>) -> Result<()> {
    let nobody = world.serve(TARGET4, target::echo())?.addr().to_string();
    for (target, said) in [
        (nobody.as_str(), "502 Bad Gateway (tunnel; error=connection_refused"),
        ("10.200.0.10:81", "403 Forbidden"),
    ] {
        let done = exec.run_app(&["expect-reset", target, "1000"])?;
        assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
        assert_eq!(done.value("received")?, "0", "{done}");
        let detail = &done.flows()?[0]["detail"];
        assert!(detail.as_str().is_some_and(|d| d.contains(said)), "{detail}");
    }
    Ok(())
}

/// One chain: the application, our agent, our gateway.
fn through_ourselves(tls: bool, protocol: &str, keys: &str) -> Result<()> {
    let world = World::new()?;
    let _gateway = gateway(&world, tls, "\"h2\", \"h1\"", "")?;
    let exec = world.exec_with(&agent(&world, tls, protocol, keys)?);
    is_a_byte_stream(&world, &exec, 4 * MIB)?;
    refusals_reset(&world, &exec)
}

/// An HTTP/1 tunnel in plaintext carries bytes, half-close and resets.
#[test]
fn http_1_in_plaintext_between_ourselves_is_a_byte_stream() -> Result<()> {
    through_ourselves(false, "h1", "")
}

/// An HTTP/1 tunnel over TLS carries bytes, half-close and resets.
#[test]
fn http_1_over_tls_between_ourselves_is_a_byte_stream() -> Result<()> {
    through_ourselves(true, "h1", "")
}

/// An HTTP/2 tunnel in plaintext carries bytes, half-close and resets.
#[test]
fn http_2_in_plaintext_between_ourselves_is_a_byte_stream() -> Result<()> {
    through_ourselves(false, "h2", "max_streams = 10")
}

/// 64 MiB in each direction at once arrive unchanged over HTTP/1, with and without TLS.
#[test]
fn heavy_64_mib_each_way_at_once_arrive_unchanged_over_http_1_with_and_without_tls() -> Result<()> {
    const BYTES: u64 = 64 * MIB;
    for tls in [false, true] {
        let world = World::new()?;
        let _gateway = gateway(&world, tls, "\"h1\"", "")?;
        let target = world.serve(TARGET4, target::duplex(BYTES))?;
        let exec = world.exec_with(&agent(&world, tls, "h1", "")?).limit(Duration::from_secs(120));
        let done = exec.run_app(&["duplex", &target.addr().to_string(), &BYTES.to_string()])?;
        assert!(done.success(), "{done}");
        assert_eq!(target.outcomes(1)?, [Ok(())]);
    }
    Ok(())
}

/// tinyproxy carries captured connections, and its refusal resets the application.
#[test]
fn tinyproxy_carries_what_we_capture_and_what_it_refuses_resets_the_application() -> Result<()> {
    let world = World::new()?;
    let _proxy = proxies::tinyproxy(&world, proxy())?;
    let exec = world.exec_with(&agent(&world, false, "h1", "headers = { x-by = \"tunnel\" }")?);
    for ip in [TARGET4, TARGET6] {
        let target = world.serve(ip, target::echo())?;
        let done = exec.run_app(&["many", &target.addr().to_string(), "20", "100000"])?;
        assert!(done.success(), "{done}");
        let flow = &done.flows()?[0];
        assert_eq!(flow["via"]["tunnel"]["peer"], proxy().to_string(), "{flow}");
        assert!(flow["via"]["tunnel"]["stream"].is_null(), "{flow}");
    }
    let nobody = world.serve(TARGET4, target::echo())?.addr().to_string();
    let done = exec.run_app(&["expect-reset", &nobody, "1000"])?;
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    let detail = &done.flows()?[0]["detail"];
    assert!(detail.as_str().is_some_and(|d| d.contains("refused")), "{detail}");
    Ok(())
}

/// An HTTP/1 proxy that is down or never answers resets the application.
#[test]
fn a_proxy_that_is_not_there_or_says_nothing_resets_the_application() -> Result<()> {
    let world = World::new()?;
    let exec = world.exec_with(&agent(&world, false, "h1", "response_timeout = \"500ms\"")?);
    let done = exec.run_app(&["expect-reset", "10.200.0.10:80", "0"])?;
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    let _silent = Target::start(world.net(), proxy(), |stream: &TcpStream| {
        io::copy(&mut &*stream, &mut io::sink()).map(drop)
    })?;
    let done = exec.run_app(&["expect-reset", "10.200.0.10:80", "0"])?;
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    let detail = &done.flows()?[0]["detail"];
    assert!(detail.as_str().is_some_and(|d| d.contains("did not answer CONNECT")), "{detail}");
    assert_eq!(done.flows()?[0]["reason"], "upstream_timeout");
    Ok(())
}

/// A dead HTTP/1 proxy is skipped, ejected, and used again when it is back.
///
/// Failure: endpoint-down.
#[test]
fn a_dead_proxy_is_passed_over_ejected_and_found_again_when_it_is_back() -> Result<()> {
    let world = World::new()?;
    let mut first = gateway(&world, false, "\"h1\"", "")?;
    let dead = SocketAddr::new(NET4, PORT + 1);
    let config = format!(
        "[daemon]\nworkers = 1\n[[route]]\nto = [{{ upstream = \"next\" }}]\n[[upstream]]\nname = \"next\"\n\
         endpoints = [\"{}\", \"{dead}\"]\nprotocol = \"h1\"\ntls = false\nbalance = \"round_robin\"\n",
        proxy()
    );
    let target = world.serve(TARGET4, target::echo())?;
    let exec = world.exec_with(&world.file("two.toml", config)?).flag("--log", "info");
    let mut app = exec.spawn_app(&["reconnect", &target.addr().to_string()])?;
    app.says("ready=1")?;
    for _ in 0..10 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    assert!(app.says("ejected")?.contains(&dead.to_string()));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let _second = Target::start(world.net(), dead, target::connect_proxy(&asked))?;
    assert!(app.says("readmitted")?.contains(&dead.to_string()));
    first.process().stop()?;
    for _ in 0..10 {
        assert_eq!(ask(app.process(), "once")?, "ok");
    }
    assert_eq!(asked.lock().expect("no handler panicked").last(), Some(&target.addr().to_string()));
    assert!(app.finish()?.success());
    Ok(())
}

/// A gateway that is stopped drains its HTTP/1 flows and accepts no new ones.
#[test]
fn a_gateway_that_is_stopped_lets_its_http_1_flows_finish_and_takes_no_new_ones() -> Result<()> {
    for tls in [false, true] {
        let world = World::new()?;
        let mut daemon = gateway(&world, tls, "\"h1\"", "")?;
        let target = world.serve(TARGET4, target::echo())?;
        let exec = world.exec_with(&agent(&world, tls, "h1", "")?);
        let mut app = exec.spawn_app(&["hold", &target.addr().to_string()])?;
        app.says("held=1")?;
        assert_eq!(ask(app.process(), "ping")?, "ok");
        daemon.process().signal(Signal::SIGTERM)?;
        daemon.process().wait_for_line("draining")?;
        wait_for("the listener to close", PATIENCE, || {
            world.net().listens(PORT).is_ok_and(|listens| !listens).then_some(())
        })?;
        assert_eq!(ask(app.process(), "ping")?, "ok", "its flow goes on");
        assert_eq!(ask(app.process(), "again")?, "ECONNRESET");
        assert!(app.finish()?.success());
        assert!(daemon.process().wait(PATIENCE)?.success());
    }
    Ok(())
}

/// Reads an answer's head; what came behind it is left where it is.
fn answer(mut from: impl io::Read) -> Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(from.read(&mut byte)? == 1, "it ended after {:?}", String::from_utf8_lossy(&head));
        head.push(byte[0]);
    }
    Ok(String::from_utf8(head)?)
}

/// Bytes behind an HTTP/1 request reach the target once and in order after a 200, and nobody after a refusal.
///
/// Failure: hostile-peers.
#[test]
fn what_is_sent_behind_the_request_arrives_once_in_order_after_a_200_and_nowhere_after_a_refusal()
-> Result<()> {
    const BYTES: u64 = 300_000;
    let world = World::new()?;
    let _gateway = gateway(&world, false, "\"h1\", \"h2\"", "")?;
    let target = world.serve(TARGET4, target::answer_after_end())?;
    // In one piece, and in pieces of which one ends within the head.
    for within in [vec![], vec![3], vec![3, 100_000]] {
        let mut said = format!("CONNECT {} HTTP/1.1\r\n\r\n", target.addr()).into_bytes();
        let head = said.len();
        said.resize(head + usize::try_from(BYTES)?, 0);
        UP.fill(0, &mut said[head..]);
        let stream = world.node().run(|| TcpStream::connect(proxy()))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let sending = stream.try_clone()?;
        let sender = std::thread::spawn(move || -> io::Result<()> {
            let mut rest = &said[..];
            for cut in within {
                let (now, later) = rest.split_at(cut);
                (&sending).write_all(now)?;
                rest = later;
            }
            (&sending).write_all(rest)?;
            sending.shutdown(Shutdown::Write)
        });
        assert_eq!(answer(&stream)?, "HTTP/1.1 200 OK\r\n\r\n");
        assert_eq!(DOWN.receive_to_end(&mut &stream)?, BYTES);
        sender.join().ok().context("the sender panicked")??;
    }
    assert_eq!(target.outcomes(3)?, [Ok(()), Ok(()), Ok(())]);
    let denied = Target::start(world.net(), SocketAddr::new(TARGET4, 81), target::echo())?;
    let mut said = format!("CONNECT {} HTTP/1.1\r\n\r\n", denied.addr()).into_bytes();
    said.extend([b'x'; 10_000]);
    assert!(peer::say_and_hear(world.node(), proxy(), &said, false)?.starts_with("HTTP/1.1 403 "));
    assert_eq!((denied.peers(), target.peers().len()), (Vec::new(), 3));
    Ok(())
}

/// Without TLS one client address cannot take all flows of a gateway.
#[test]
fn without_identities_the_flows_of_one_address_leave_some_to_the_others() -> Result<()> {
    let world = World::new()?;
    let mut gateway = gateway_with(&world, "[daemon]\nworkers = 1\nmax_flows = 4\n", false, "\"h1\"", "")?;
    let target = world.serve(TARGET4, target::echo())?;
    let request = format!("CONNECT {} HTTP/1.1\r\n\r\n", target.addr());
    let connect = |host: &NetNs| -> Result<(TcpStream, String)> {
        let stream = host.run(|| TcpStream::connect(proxy()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        (&stream).write_all(request.as_bytes())?;
        let head = answer(&stream)?;
        Ok((stream, head))
    };
    let mut held = Vec::new();
    for _ in 0..3 {
        let (stream, head) = connect(world.node())?;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        held.push(stream);
    }
    let (_, head) = connect(world.node())?;
    assert!(head.starts_with("HTTP/1.1 503 ") && head.contains("connection_limit_reached"), "{head}");
    // From another address there is room, and where one has ended too.
    let (_other, head) = connect(world.net())?;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    held.pop();
    gateway.process().wait_for_line("reason=closed destination=")?;
    held.push(wait_for("a place", PATIENCE, || {
        connect(world.node())
            .ok()
            .filter(|(_, head)| head.starts_with("HTTP/1.1 200 "))
            .map(|(stream, _)| stream)
    })?);
    for mut stream in held {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
    }
    Ok(())
}

/// A TLS connection to the proxy, with such protocols in ALPN, and a tunnel on it.
async fn over_tls(world: &World, alpn: &[&str], to: SocketAddr) -> Result<TlsStream<tokio::net::TcpStream>> {
    let mut config = (*peer::tls(&world.pki().named("node"))?).clone();
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    let tcp = tokio::net::TcpStream::connect(proxy()).await?;
    let name = ServerName::IpAddress(NET4.into());
    let mut tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
    tls.write_all(format!("CONNECT {to} HTTP/1.1\r\n\r\n").as_bytes()).await?;
    let mut head = [0; 19];
    tls.read_exact(&mut head).await?;
    ensure!(head == *b"HTTP/1.1 200 OK\r\n\r\n", "{:?}", String::from_utf8_lossy(&head));
    Ok(tls)
}

/// In a tunnel over TLS close_notify is an orderly end, and an end without it is a reset.
#[test]
fn over_tls_close_notify_is_an_end_and_an_end_without_it_is_a_reset() -> Result<()> {
    let world = World::new()?;
    let mut daemon = gateway(&world, true, "\"h2\", \"h1\"", "")?;
    // Agreed on, or not spoken of.
    for alpn in [&["http/1.1"][..], &[]] {
        let target = world.serve(TARGET4, target::answer_after_end())?;
        let answered = world.node().block_on(|| async {
            let mut tls = over_tls(&world, alpn, target.addr()).await?;
            let mut bytes = vec![0; 100_000];
            UP.fill(0, &mut bytes);
            tls.write_all(&bytes).await?;
            tls.shutdown().await?;
            let mut heard = Vec::new();
            tls.read_to_end(&mut heard).await.context("its end is close_notify too")?;
            anyhow::Ok(heard)
        })?;
        assert_eq!(answered.len(), 100_000);
        DOWN.check(0, &answered)?;
        assert_eq!(target.outcomes(1)?, [Ok(())]);
    }
    let target = world.serve(TARGET4, target::expect_reset_after(1000))?;
    world.node().block_on(|| async {
        let mut tls = over_tls(&world, &["http/1.1"], target.addr()).await?;
        let mut bytes = vec![0; 1000];
        UP.fill(0, &mut bytes);
        tls.write_all(&bytes).await?;
        tls.read_exact(&mut [0]).await?;
        // FIN, and nothing that says so under the key.
        let (mut tcp, _session) = tls.into_inner();
        tcp.shutdown().await?;
        let _reset = tcp.read(&mut [0]).await;
        anyhow::Ok(())
    })?;
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    daemon.process().wait_for_line("client_reset")?;
    Ok(())
}

/// An HTTP/1 request that drips, or never comes, is ended after `handshake_timeout`.
///
/// Failure: hostile-peers.
#[test]
fn a_head_that_drips_and_silence_are_ended_after_the_handshake_timeout() -> Result<()> {
    let world = World::new()?;
    let mut daemon = gateway(&world, false, "\"h2\", \"h1\"", "handshake_timeout = \"1s\"")?;
    // Nothing; as much as does not tell HTTP/2 from HTTP/1; half a head, and more of it.
    for (first, drip) in [("", false), ("PRI * HT", false), ("CONNECT 10.200.0.10:80 HTTP/1.1\r\nx: ", true)]
    {
        let stream = world.node().run(|| TcpStream::connect(proxy()))?;
        (&stream).write_all(first.as_bytes())?;
        stream.set_read_timeout(Some(Duration::from_millis(50)))?;
        let start = Instant::now();
        loop {
            match (&stream).read(&mut [0; 64]) {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    ensure!(start.elapsed() < PATIENCE, "{first:?} is still open");
                    if drip {
                        let _closed = (&stream).write_all(b"y");
                    }
                }
                Ok(n) if n > 0 => anyhow::bail!("{first:?} was answered"),
                _ => break,
            }
        }
        let took = start.elapsed();
        assert!((Duration::from_millis(900)..Duration::from_secs(5)).contains(&took), "{first:?}: {took:?}");
    }
    daemon.process().wait_for_line("no complete handshake within 1s")?;
    Ok(())
}
