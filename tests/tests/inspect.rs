//! Routes by what a connection says of itself: the name in its TLS, the host of its HTTP request.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use nix::sys::signal::Signal;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio::time::{sleep, timeout};
use tunnel_tests::{
    BLACKHOLE, NET4, PATIENCE, TARGET4, World,
    daemon::Daemon,
    gateway,
    hop::Hop,
    peer::{self, connect_request},
    pki::GATEWAY_ID,
    process, target, wait_for,
};

const A: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
const B: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 1);
const C: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 2);
/// More than any test takes: who waits for it waits for something else.
const FOR_EVER: &str = "[daemon]\nworkers = 1\nsniff_timeout = \"1h\"\n";
/// As the default, but no machine is too slow for it.
const LONG: &str = "[daemon]\nworkers = 1\nsniff_timeout = \"10s\"\n";

fn upstream(name: &str, at: SocketAddr) -> String {
    format!("[[upstream]]\nname = \"{name}\"\nendpoints = [\"{at}\"]\nverify = [\"{GATEWAY_ID}\"]\n")
}

/// For `tunnel exec`, with upstreams `east` at `A` and `west` at `B`.
fn agent(world: &World, daemon: &str, routes: &str) -> Result<PathBuf> {
    let identity = world.pki().named("node").toml();
    world.file(
        "agent.toml",
        format!("{daemon}{identity}{routes}{}{}", upstream("east", A), upstream("west", B)),
    )
}

/// A gateway of ours at `A`, with an upstream `next` at `C`.
fn chain(world: &World, daemon: &str, listener: &str, routes: &str) -> Result<Daemon> {
    let identity = world.pki().named("gateway").toml();
    let config = format!(
        "{daemon}{identity}[[listener]]\naddress = \"{A}\"\n{listener}\n{routes}{}\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\", \"*.internal\"]\n",
        upstream("next", C)
    );
    Daemon::start(world, world.net(), &config)
}

/// A web site with TLS, whose page is the name that it was asked for by.
fn secure_site(world: &World) -> Result<target::Target> {
    let who = world.pki().named("gateway");
    let chain = CertificateDer::pem_slice_iter(&std::fs::read(&who.cert)?).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(&std::fs::read(&who.key)?)?;
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    let config = Arc::new(config);
    world.serve(TARGET4, move |stream: &TcpStream| {
        let connection = ServerConnection::new(Arc::clone(&config)).map_err(io::Error::other)?;
        let mut tls = StreamOwned::new(connection, stream);
        head(&mut tls)?;
        let page = tls.conn.server_name().unwrap_or("nobody").to_owned();
        page_to(&mut tls, &page)?;
        tls.conn.send_close_notify();
        tls.flush()
    })
}

/// A web site whose page is the host that it was asked for.
fn site(world: &World) -> Result<target::Target> {
    world.serve(TARGET4, |stream: &TcpStream| {
        let mut stream = stream;
        let head = head(&mut stream)?;
        let host = head.iter().find_map(|line| line.strip_prefix("Host: ")).unwrap_or("nobody").to_owned();
        page_to(&mut stream, &host)
    })
}

/// The lines of a request's head.
fn head(from: &mut impl io::Read) -> io::Result<Vec<String>> {
    let lines = BufReader::new(from).lines().map_while(|line| line.ok().filter(|line| !line.is_empty()));
    Ok(lines.collect())
}

fn page_to(to: &mut impl io::Write, page: &str) -> io::Result<()> {
    write!(to, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{page}", page.len())
}

/// curl's words for a page of this site, whose name leads to `target`.
fn page(scheme: &str, name: &str, target: SocketAddr) -> Vec<String> {
    let resolve = format!("{name}:{}:{}", target.port(), target.ip());
    let url = format!("{scheme}://{name}:{}/", target.port());
    // `--no-alpn`: the site speaks HTTP/1 and says nothing of it.
    let words = ["curl", "-sSk", "--fail", "--no-alpn", "--max-time", "20", "--noproxy", "*", "--resolve"];
    words.map(str::to_owned).into_iter().chain([resolve, url]).collect()
}

/// The first bytes of a TLS client that asks for this name.
fn hello(name: &str) -> Result<Vec<u8>> {
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), name.to_owned().try_into()?)?;
    let mut out = Vec::new();
    client.write_tls(&mut out)?;
    Ok(out)
}

/// Asks the gateway at `A` for `authority` and plays `dialogue` once it has said 200.
fn tunnel<T: Send>(
    world: &World,
    authority: &str,
    dialogue: impl AsyncFnOnce(SendStream<Bytes>, RecvStream) -> Result<T> + Send,
) -> Result<T> {
    let tls = peer::tls(&world.pki().named("node"))?;
    let request = connect_request(authority)?;
    world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(A, tls).await?;
        let driving = tokio::task::spawn_local(connection);
        let (response, send) = requests.send_request(request, false)?;
        let response = response.await?;
        ensure!(response.status() == 200, "{response:?}");
        let done = dialogue(send, response.into_body()).await;
        driving.abort();
        done
    })
}

/// With what error code the stream is reset.
async fn reset_of(mut body: RecvStream) -> Result<Reason> {
    match body.data().await {
        Some(Err(e)) => e.reason().context("no error code"),
        Some(Ok(bytes)) => bail!("{} bytes where a reset should be", bytes.len()),
        None => bail!("an end where a reset should be"),
    }
}

/// What comes back, as much as was sent.
async fn echoed(body: &mut RecvStream, length: usize) -> Result<Vec<u8>> {
    let mut back = Vec::new();
    while back.len() < length {
        let chunk = body.data().await.context("an end")??;
        body.flow_control().release_capacity(chunk.len())?;
        back.extend_from_slice(&chunk);
    }
    Ok(back)
}

/// Routes on `sni` and `http_host` send flows through different gateways.
#[test]
fn the_names_that_applications_ask_for_send_them_through_different_gateways() -> Result<()> {
    let world = World::new()?;
    let mut east = world.gateway().start()?;
    let mut west = world.gateway().listen(B).start()?;
    let (site, secure) = (site(&world)?, secure_site(&world)?);
    let routes = "[[route]]\nmatch = { sni = [\"east.internal\"], http_host = [\"east.internal\"] }\n\
                  to = [{ upstream = \"east\" }]\n[[route]]\n\
                  match = { sni = [\"*.west.internal\"], http_host = [\"*.west.internal\"] }\n\
                  to = [{ upstream = \"west\" }]\n[[route]]\nto = \"deny\"\n";
    let exec = world.exec_with(&agent(&world, LONG, routes)?);
    for (scheme, target) in [("https", secure.addr()), ("http", site.addr())] {
        let done = exec.run(&page(scheme, "East.internal", target))?;
        assert!(done.success() && done.stdout.to_lowercase().starts_with("east.internal"), "{done}");
        let done = exec.run(&page(scheme, "a.b.west.internal", target))?;
        assert!(done.success() && done.stdout.starts_with("a.b.west.internal"), "{done}");
        assert!(
            !exec.run(&page(scheme, "west.internal", target))?.success(),
            "no route takes the name itself"
        );
    }
    for gateway in [&mut east, &mut west] {
        wait_for("the flows to be booked", PATIENCE, || {
            (gateway.log().matches(" tunnel::flow: ").count() == 2).then_some(())
        })?;
    }
    Ok(())
}

/// `authority = "{sni}"` puts the sniffed name into the CONNECT request.
#[test]
fn a_name_that_was_looked_at_stands_in_the_request_to_the_next_hop() -> Result<()> {
    let world = World::new()?;
    let next = Hop::start(world.net(), A, &world.pki().named("gateway"))?;
    let by = |what: &str, port: u16| {
        format!(
            "[[route]]\nmatch = {{ destination = [\"10.200.0.0/24:{port}\"] }}\nto = [{{ upstream = \"east\" }}]\n\
             authority = \"{{{what}}}\"\n"
        )
    };
    let exec = world.exec_with(&agent(&world, LONG, &(by("sni", 443) + &by("host", 80)))?);
    // The next hop echoes: what curl makes of it is its own affair.
    for (scheme, name, port) in
        [("https", "web.internal", 443), ("http", "web.internal", 80), ("http", "10.200.0.10", 80)]
    {
        exec.run(&page(scheme, name, SocketAddr::new(TARGET4, port)))?;
    }
    // Nothing says a name here, and so it stays the address.
    exec.run_app(&["half-close", "10.200.0.10:443", "100"])?;
    let asked: Vec<_> = next.asked().iter().map(|request| request.uri().to_string()).collect();
    assert_eq!(asked, ["web.internal:443", "web.internal:80", "10.200.0.10:80", "10.200.0.10:443"]);
    Ok(())
}

/// Sniffing gives up after `sniff_timeout`, so that a server that speaks first is reached.
#[test]
fn a_target_that_speaks_first_is_reached_when_nothing_was_said_in_time() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::name_the_peer())?;
    let routes = "[[route]]\nmatch = { sni = [\"*.internal\"] }\nto = \"deny\"\n\
                  [[route]]\nto = [{ upstream = \"east\" }]\n";
    let exec = world.exec_with(&agent(&world, "", routes)?);
    let done = exec.run_app(&["names", &target.addr().to_string()])?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    Ok(())
}

/// A flow that an earlier route takes is not sniffed.
#[test]
fn a_flow_that_an_earlier_route_takes_is_not_looked_at() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::name_the_peer())?;
    let routes = "[[route]]\nto = [{ upstream = \"east\" }]\n\
                  [[route]]\nmatch = { sni = [\"*.internal\"] }\nto = \"deny\"\n";
    let exec = world.exec_with(&agent(&world, FOR_EVER, routes)?);
    let done = exec.run_app(&["names", &target.addr().to_string()])?;
    assert!(done.success(), "{done}");
    Ok(())
}

/// Bytes that are neither TLS nor HTTP, and an early end, end sniffing at once and arrive unchanged.
#[test]
fn bytes_that_are_neither_tls_nor_http_and_ends_decide_at_once_and_arrive_unchanged() -> Result<()> {
    const BYTES: u64 = 1_000_000;
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let routes = "[[route]]\nmatch = { sni = [\"*.internal\"] }\nto = \"deny\"\n\
                  [[route]]\nto = [{ upstream = \"east\" }]\n";
    let exec = world.exec_with(&agent(&world, FOR_EVER, routes)?);
    let target = world.serve(TARGET4, target::answer_after_end())?;
    // Nothing but an end, and then bytes of no protocol.
    for bytes in [0, BYTES] {
        let done = exec.run_app(&["half-close", &target.addr().to_string(), &bytes.to_string()])?;
        assert!(done.success(), "{done}");
    }
    assert_eq!(target.outcomes(2)?, [Ok(()), Ok(())]);
    Ok(())
}

/// A client that leaves during sniffing releases its flow, and a stop does not wait for it.
#[test]
fn a_client_that_leaves_while_it_is_looked_at_costs_nobody_anything_and_a_stop_does_not_wait() -> Result<()> {
    let world = World::new()?;
    let next = Hop::start(world.net(), C, &world.pki().named("gateway"))?;
    let routes = "[[route]]\nmatch = { sni = [\"*.internal\"] }\nto = [{ upstream = \"next\" }]\n";
    let mut gateway = chain(&world, FOR_EVER, "", routes)?;
    let authority = "10.200.0.10:443";
    tunnel(&world, authority, async |mut send, _body| {
        send.send_reset(Reason::CANCEL);
        // The task that sends it has a turn.
        tokio::task::yield_now().await;
        timeout(PATIENCE, std::future::poll_fn(|cx| send.poll_reset(cx))).await.ok();
        Ok(())
    })?;
    gateway.process().wait_for_line("client_left")?;
    let stopped = tunnel(&world, authority, async |_send, body| {
        gateway.process().signal(Signal::SIGTERM)?;
        gateway.process().wait_for_line("draining")?;
        gateway.process().signal(Signal::SIGTERM)?;
        Ok(reset_of(body).await)
    })?;
    assert!(stopped.is_err() || stopped.is_ok_and(|code| code == Reason::CONNECT_ERROR));
    gateway.process().wait(PATIENCE)?;
    assert_eq!(next.asked().len(), 0);
    Ok(())
}

/// A ClientHello in one-byte frames is sniffed and arrives unchanged.
#[test]
fn a_hello_in_one_byte_frames_is_read_and_arrives_unchanged() -> Result<()> {
    let world = World::new()?;
    let next = Hop::start(world.net(), C, &world.pki().named("gateway"))?;
    let routes = "[[route]]\nmatch = { sni = [\"web.internal\"] }\nto = [{ upstream = \"next\" }]\n";
    let _gateway = chain(&world, LONG, "", routes)?;
    let (hello, other) = (hello("web.internal")?, hello("web.example")?);
    let back = tunnel(&world, "10.200.0.10:443", async |mut send, mut body| {
        for byte in &hello {
            send.send_data(Bytes::copy_from_slice(&[*byte]), false)?;
            tokio::task::yield_now().await;
        }
        echoed(&mut body, hello.len()).await
    })?;
    assert!(back == hello);
    assert_eq!(next.asked().len(), 1);
    // The 200 was sent already; what no route takes is reset.
    let code = tunnel(&world, "10.200.0.10:443", async |mut send, body| {
        send.send_data(other.into(), false)?;
        reset_of(body).await
    })?;
    assert_eq!(code, Reason::CONNECT_ERROR);
    // Policy speaks first, and a status.
    let answer = peer::ask(world.node(), A, &world.pki().named("node"), connect_request("10.9.9.9:443")?)?;
    assert_eq!(answer.status, 403);
    assert_eq!(next.asked().len(), 1);
    Ok(())
}

/// Waits for a line of the log that holds `text`, while connections go on.
async fn logged(daemon: &Daemon, text: &str) -> Result<()> {
    let look = async {
        while !daemon.log().contains(text) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, look).await.with_context(|| format!("no line \"{text}\":\n{}", daemon.log()))
}

/// Bytes and a reset that arrive between sniffing and the dial are not lost.
#[test]
fn what_a_client_sends_between_its_look_and_its_target_is_taken_and_its_reset_is_heard() -> Result<()> {
    const FRAMES: usize = 20_000;
    let world = World::new()?;
    let _next = Hop::start(world.net(), C, &world.pki().named("gateway"))?;
    let routes = format!(
        "[[route]]\nmatch = {{ http_host = [\"hole.internal\"] }}\nto = {{ dial = \"{BLACKHOLE}:80\" }}\n\
         timeout = \"1h\"\n[[route]]\nto = [{{ upstream = \"next\" }}]\n"
    );
    let gateway = &chain(&world, LONG, "", &routes)?;
    let tls = peer::tls(&world.pki().named("node"))?;
    world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(A, tls).await?;
        let driving = tokio::task::spawn_local(connection);
        let (response, mut stuck) = requests.send_request(connect_request("10.200.0.10:80")?, false)?;
        ensure!(response.await?.status() == 200);
        stuck.send_data("GET / HTTP/1.1\r\nHost: hole.internal\r\n\r\n".into(), false)?;
        logged(gateway, "found=Host(HostName(\"hole.internal\"))").await?;
        for _ in 0..FRAMES {
            stuck.send_data(Bytes::from_static(b"x"), false)?;
            tokio::task::yield_now().await;
        }
        // Its connection has outlived that.
        let mut requests = requests.ready().await?;
        let (response, mut send) = requests.send_request(connect_request("10.200.0.10:81")?, false)?;
        let mut body = response.await?.into_body();
        send.send_data(Bytes::from_static(b"ping"), false)?;
        ensure!(echoed(&mut body, 4).await? == b"ping");
        stuck.send_reset(Reason::CANCEL);
        logged(gateway, "client_left").await?;
        driving.abort();
        Ok(())
    })
}

/// Policy also applies to the sniffed name that a peer has dialled or passed on.
#[test]
fn a_name_that_a_peer_asks_for_inside_is_for_policy_too() -> Result<()> {
    let world = World::new()?;
    let next = Hop::start(world.net(), C, &world.pki().named("gateway"))?;
    let routes = "[[route]]\nto = [{ upstream = \"next\" }]\nauthority = \"{sni}\"\n";
    let _gateway = chain(&world, LONG, "", routes)?;
    let hello_of = |name: &str| hello(name);
    let (good, bad) = (hello_of("web.internal")?, hello_of("secret.example")?);
    let back = tunnel(&world, "10.200.0.10:443", async |mut send, mut body| {
        let length = good.len();
        send.send_data(good.into(), false)?;
        Ok(echoed(&mut body, length).await?.len())
    })?;
    assert!(back > 0);
    let code = tunnel(&world, "10.200.0.10:443", async |mut send, body| {
        send.send_data(bad.into(), false)?;
        reset_of(body).await
    })?;
    assert_eq!(code, Reason::CONNECT_ERROR);
    let asked: Vec<_> = next.asked().iter().map(|request| request.uri().to_string()).collect();
    assert_eq!(asked, ["web.internal:443"]);
    Ok(())
}

/// A flow that came by an HTTP/1 listener is routed by its `http_host`.
#[test]
fn curl_is_routed_by_its_host_through_a_listener_of_http_1() -> Result<()> {
    let world = World::new()?;
    let (one, two) = (site(&world)?, site(&world)?);
    let by = |name: &str, to: SocketAddr| {
        format!("[[route]]\nmatch = {{ http_host = [\"{name}\"] }}\nto = {{ dial = \"{to}\" }}\n")
    };
    let routes = by("one.internal", one.addr()) + &by("two.internal", two.addr());
    let who = world.pki().named("node");
    let curl = |proxy: &str, name: &str| {
        let mut command: Command = world.node().command("curl");
        command.args(["-sS", "--fail", "--proxytunnel", "--max-time", "20", "--noproxy", "", "-x"]);
        command.arg(format!("{proxy}://{A}")).arg("--proxy-cacert").arg(&who.ca);
        command.arg("--proxy-cert").arg(&who.cert).arg("--proxy-key").arg(&who.key);
        process::output(command.arg(format!("http://{name}/")))
    };
    let routed = |proxy: &str| -> Result<()> {
        assert_eq!(curl(proxy, "one.internal")?, "one.internal");
        assert_eq!(curl(proxy, "two.internal")?, "two.internal");
        assert!(curl(proxy, "three.internal").is_err(), "reset after the 200");
        Ok(())
    };
    let mut secure = chain(&world, LONG, "protocols = [\"h1\"]", &routes)?;
    routed("https")?;
    secure.process().stop()?;
    let _gateway = chain(&world, LONG, "tls = false\nprotocols = [\"h1\"]", &routes)?;
    routed("http")?;
    assert_eq!((one.peers().len(), two.peers().len()), (2, 2));
    // What comes behind the request, in one write with it, is looked at and arrives.
    let answer = world.node().run(|| -> Result<String> {
        let mut stream = TcpStream::connect(A)?;
        stream.write_all(
            b"CONNECT 10.200.0.10:80 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nHost: two.internal\r\n\r\n",
        )?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    assert!(answer.ends_with("\r\n\r\ntwo.internal"), "{answer}");
    Ok(())
}
