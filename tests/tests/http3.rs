//! HTTP/3: what is peculiar to it. That flows are carried over it as over everything else, `same_result.rs` shows.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tokio::time::timeout;
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, World,
    daemon::{Daemon, through},
    dialogue::ask,
    ends::{self, Way},
    envoy::{ENVOY_ID, Envoy},
    gateway,
    h3::{self, Comes, DATA, GOAWAY, HEADERS, Peer, SETTINGS, frame, headers, integer},
    pki::{Credentials, GATEWAY_ID, NODE_ID},
    process, programs,
    target::{self, Gate},
};

/// Where ours or Envoy listens, for UDP.
const HBONE: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// Enough for many packets.
const BULK: u64 = 4 << 20;

/// One of ours in `net` that speaks `protocols`; `keys` are more of its listener.
fn gateway(world: &World, protocols: &str, keys: &str) -> Result<Daemon> {
    gateway_as(world, &world.pki().named("gateway"), protocols, keys)
}

fn gateway_as(world: &World, who: &Credentials, protocols: &str, keys: &str) -> Result<Daemon> {
    Daemon::start(world, world.net(), &gateway_config(who, protocols, keys))
}

fn gateway_config(who: &Credentials, protocols: &str, keys: &str) -> String {
    format!(
        "[daemon]\nworkers = 2\n{}[[listener]]\naddress = \"{HBONE}\"\nprotocols = [{protocols}]\n{keys}\n\
         [[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        who.toml()
    )
}

/// For `tunnel exec`: everything goes to [`HBONE`] over a protocol.
fn agent(world: &World, protocol: &str, verify: &str) -> Result<std::path::PathBuf> {
    let config = format!(
        "[daemon]\nworkers = 1\n{}{}protocol = \"{protocol}\"\n",
        world.pki().named("node").toml(),
        through(HBONE, verify)
    );
    world.file(&format!("{protocol}.toml"), config)
}

/// A listener takes HTTP/3 beside HTTP/2 on the same port, and its log names the client's identity and its stream.
#[test]
fn one_port_takes_http_3_and_http_2_and_names_the_identity_of_both() -> Result<()> {
    let world = World::new()?;
    let mut ours = gateway(&world, "\"h2\", \"h3\"", "")?;
    for protocol in ["h2", "h3"] {
        let exec = world.exec_with(&agent(&world, protocol, GATEWAY_ID)?);
        let way = Way::Captured(&world, &exec);
        ends::bytes_arrive(way, BULK)?;
        ends::is_a_byte_stream(way)?;
        ends::nobody_there_is_a_reset(way)?;
        let line = ours.process().wait_for_line("reason=closed destination=")?;
        assert!(line.contains(NODE_ID), "{line}");
    }
    Ok(())
}

/// A peer with a certificate of another CA gets no request through, over HTTP/3 as over anything else, in both directions, and
/// both ends say which check failed.
#[test]
fn a_certificate_of_another_ca_is_refused_by_both_ends_which_say_why() -> Result<()> {
    let world = World::new()?;
    let mut ours = gateway(&world, "\"h3\"", "")?;
    let target = world.serve(TARGET4, target::echo())?;
    let stranger = world.stranger(NODE_ID)?;
    let own = world.pki().named("node");
    // Of a client: it believes our CA, and its certificate is of another.
    let client = stranger.believing(&own.ca);
    let config =
        format!("[daemon]\nworkers = 1\n{}{}protocol = \"h3\"\n", client.toml(), through(HBONE, GATEWAY_ID));
    let exec = world.exec_with(&world.file("stranger.toml", config)?);
    let mut app = exec.spawn_app(&["expect-reset", &target.addr().to_string(), "1"])?;
    app.says("ended=ECONNRESET")?;
    let line = ours.process().wait_for_line("rejected peer connection")?;
    assert!(line.contains("chain check: it is not from our CA"), "{line}");
    // Of a server: the client believes another CA.
    let config = format!(
        "[daemon]\nworkers = 1\n{}{}protocol = \"h3\"\n",
        own.believing(&stranger.ca).toml(),
        through(HBONE, GATEWAY_ID)
    );
    let exec = world.exec_with(&world.file("believes.toml", config)?);
    let mut app = exec.spawn_app(&["expect-reset", &target.addr().to_string(), "1"])?;
    app.says("ended=ECONNRESET")?;
    ours.process().wait_for_line("it is not from the peer's CA")?;
    Ok(())
}

/// A client whose address changes in the middle of a transfer, as behind a NAT that forgets it, keeps its flow, whichever worker
/// serves it.
#[test]
fn a_client_whose_address_changes_keeps_its_flows() -> Result<()> {
    let world = World::new()?;
    let _ours = gateway(&world, "\"h3\"", "")?;
    let target = world.serve(TARGET4, target::echo())?;
    let (to, who) = (target.addr().to_string(), world.pki().named("node"));
    world.node().block_on(|| async move {
        // Several, so that both workers have some.
        for _ in 0..8 {
            let peer = Peer::connect(HBONE, &who).await?;
            let (mut send, mut recv) = peer.request(&h3::connect(&to), false).await?;
            ensure!(peer.comes(&mut recv).await? == Comes::Status(200));
            for moved in 0..4 {
                if moved > 0 {
                    peer.moves()?;
                }
                send.write_all(&frame(DATA, b"hello")).await?;
                let mut echo = [0; 7];
                timeout(PATIENCE, recv.read_exact(&mut echo)).await.context("it has lost its flow")??;
                ensure!(echo == *b"\x00\x05hello", "{echo:x?}");
            }
            peer.leaves().await;
        }
        Ok(())
    })
}

/// A reader that does not read holds no more than the stream's window, what the leg holds, and what the sockets hold.
#[test]
fn a_slow_reader_holds_a_bounded_number_of_bytes() -> Result<()> {
    /// The stream's window and what the leg holds (`transport/quic`, `relay/h3`), and sockets.
    const MOST: u64 = (2 << 20) + (1 << 20);
    let world = World::new()?;
    world.buffers_of_64_kib()?;
    let _ours = gateway(&world, "\"h3\"", "")?;
    let (gate, counted) = (Gate::default(), Arc::new(AtomicU64::new(0)));
    let target = world.serve(TARGET4, target::slow_reader(&gate, &counted))?;
    let (to, who) = (target.addr().to_string(), world.pki().named("node"));
    let sent = world.node().block_on(|| async move {
        let peer = Peer::connect(HBONE, &who).await?;
        let (mut send, mut recv) = peer.request(&h3::connect(&to), false).await?;
        ensure!(peer.comes(&mut recv).await? == Comes::Status(200));
        let mut sent = 0_u64;
        let mut block = vec![0; 16 * 1024];
        while timeout(Duration::from_secs(2), async {
            tunnel_tests::pattern::UP.fill(sent, &mut block);
            send.write_all(&frame(DATA, &block)).await
        })
        .await
        .is_ok()
        {
            sent += block.len() as u64;
            ensure!(sent < 64 << 20, "nothing holds it back");
        }
        // The client's library takes what the listener's window allows, and no more.
        peer.leaves().await;
        Ok(sent)
    })?;
    gate.open();
    ensure!(sent <= MOST, "{sent} bytes");
    Ok(())
}

/// What violates the protocol closes the connection with the code of RFC 9114 or RFC 9204 for it, and nobody else notices.
#[test]
fn what_violates_the_protocol_closes_its_connection_with_the_code_for_it() -> Result<()> {
    let world = World::new()?;
    let _ours = gateway(&world, "\"h3\"", "")?;
    let target = world.serve(TARGET4, target::echo())?;
    let (to, who) = (target.addr().to_string(), world.pki().named("node"));
    world.node().block_on(|| async move {
        let neighbour = Peer::connect(HBONE, &who).await?;
        let (mut send, mut recv) = neighbour.request(&h3::connect(&to), false).await?;
        ensure!(neighbour.comes(&mut recv).await? == Comes::Status(200));
        // Streams of one direction: RFC 9114 section 6.2, RFC 9204 section 4.2.
        let settings = |payload: &[u8]| [&[0][..], &frame(SETTINGS, payload)].concat();
        let good = settings(b"");
        let behind = |more: &[u8]| [&good[..], more].concat();
        for (what, streams, code) in [
            ("two control streams", vec![good.clone(), good.clone()], 0x103),
            ("no SETTINGS", vec![[&[0][..], &frame(GOAWAY, &[0])].concat()], 0x10a),
            ("SETTINGS twice", vec![behind(&frame(SETTINGS, b""))], 0x105),
            ("DATA on the control stream", vec![behind(&frame(DATA, b"x"))], 0x105),
            ("HEADERS on the control stream", vec![behind(&h3::connect(&to))], 0x105),
            ("a frame of HTTP/2 on the control stream", vec![behind(&frame(0x6, b"x"))], 0x105),
            ("PUSH_PROMISE of a client", vec![behind(&frame(0x5, b"x"))], 0x105),
            ("a setting of HTTP/2", vec![settings(b"\x03\x10")], 0x109),
            ("a setting twice", vec![settings(b"\x21\x00\x21\x00")], 0x109),
            ("SETTINGS that are cut", vec![settings(b"\x06")], 0x106),
            ("SETTINGS without end", vec![[&[0][..], &integer(SETTINGS), &integer(1 << 30)].concat()], 0x107),
            ("GOAWAY without a number", vec![behind(&frame(GOAWAY, b""))], 0x106),
            ("GOAWAY that grows", vec![behind(&[frame(GOAWAY, &[4]), frame(GOAWAY, &[8])].concat())], 0x108),
            ("a push stream of a client", vec![good.clone(), vec![1, 0]], 0x103),
            ("two encoders", vec![good.clone(), vec![2], vec![2]], 0x103),
            ("a dynamic table without room", vec![good.clone(), vec![2, 0x3f, 0xe1, 0x1f]], 0x201),
            ("an acknowledgement of nothing", vec![good.clone(), vec![3, 0x80]], 0x202),
        ] {
            let peer = Peer::silent(HBONE, &who).await?;
            let mut held = Vec::new();
            for stream in streams {
                held.push(peer.one_way(&stream).await.with_context(|| what.to_owned())?);
            }
            ensure!(peer.closed().await.context(what)? == code, "{what}");
        }
        for kind in [0_u8, 2, 3] {
            let peer = Peer::silent(HBONE, &who).await?;
            let start = if kind == 0 { good.clone() } else { vec![kind] };
            let mut stream = peer.one_way(&start).await?;
            stream.finish()?;
            ensure!(peer.closed().await? == 0x104, "the end of a stream of kind {kind}");
        }
        // Requests: RFC 9114 sections 4.1, 7.2.
        let good = h3::connect(&to);
        for (what, bytes, ends, code) in [
            ("DATA first", frame(DATA, b"x"), false, 0x105),
            ("SETTINGS in a request", frame(SETTINGS, b""), false, 0x105),
            ("GOAWAY in a request", frame(GOAWAY, &[0]), false, 0x105),
            ("a frame of HTTP/2 in a request", frame(0x8, b"x"), false, 0x105),
            ("PUSH_PROMISE in a request", frame(0x5, b"x"), false, 0x105),
            ("a frame that is cut", good[..good.len() - 1].to_vec(), true, 0x106),
            ("a field of the dynamic table", frame(HEADERS, b"\x00\x00\x80"), false, 0x200),
            ("a section that waits for the dynamic table", frame(HEADERS, b"\x02\x00\x80"), false, 0x200),
            ("an index that there is not", frame(HEADERS, b"\x00\x00\xff\x24"), false, 0x200),
        ] {
            let peer = Peer::connect(HBONE, &who).await?;
            let comes = peer.asks(&bytes, ends).await.with_context(|| what.to_owned())?;
            ensure!(comes == Comes::Closed(code), "{what}: {comes:?}");
        }
        // A tunnel has DATA and nothing else: RFC 9114 section 4.4.
        for more in [h3::connect(&to), frame(SETTINGS, b""), headers(&[("trailer", "x")])] {
            let peer = Peer::connect(HBONE, &who).await?;
            let (mut send, mut recv) = peer.request(&good, false).await?;
            ensure!(peer.comes(&mut recv).await? == Comes::Status(200));
            send.write_all(&more).await?;
            ensure!(peer.closed().await? == 0x105, "{more:x?}");
        }
        send.write_all(&frame(DATA, b"hello")).await?;
        let mut echo = [0; 7];
        timeout(PATIENCE, recv.read_exact(&mut echo)).await.context("the neighbour has noticed")??;
        ensure!(echo == *b"\x00\x05hello");
        Ok(())
    })
}

/// What is wrong with a request ends or answers that request alone, on a connection that goes on.
#[test]
fn what_is_wrong_with_a_request_ends_that_request_alone() -> Result<()> {
    let world = World::new()?;
    let _ours = gateway(&world, "\"h3\"", "")?;
    let target = world.serve(TARGET4, target::echo())?;
    let (to, who) = (target.addr().to_string(), world.pki().named("node"));
    world.node().block_on(|| async move {
        let peer = Peer::connect(HBONE, &who).await?;
        let connect = (":method", "CONNECT");
        let is = (":authority", to.as_str());
        let get = [(":method", "GET"), (":scheme", "https"), is, (":path", "/")];
        let long = "x".repeat(20 * 1024);
        for (fields, comes) in [
            (&[connect, connect, is][..], Comes::Reset(0x10e)),
            (&[is], Comes::Reset(0x10e)),
            (&[connect], Comes::Reset(0x10e)),
            (&[connect, is, is], Comes::Reset(0x10e)),
            (&[connect, is, (":scheme", "https")], Comes::Reset(0x10e)),
            (&[connect, is, (":path", "/")], Comes::Reset(0x10e)),
            (&[connect, is, (":protocol", "websocket")], Comes::Reset(0x10e)),
            (&[connect, is, (":status", "200")], Comes::Reset(0x10e)),
            (&[connect, ("x", "y"), is], Comes::Reset(0x10e)),
            (&[connect, is, ("Upper", "x")], Comes::Reset(0x10e)),
            (&[connect, is, ("connection", "close")], Comes::Reset(0x10e)),
            (&[connect, is, ("transfer-encoding", "chunked")], Comes::Reset(0x10e)),
            (&[connect, is, ("x", "a\r\nb")], Comes::Reset(0x10e)),
            (&[connect, is, ("content-length", "0")], Comes::Status(400)),
            (&[connect, (":authority", "10.200.0.10")], Comes::Status(400)),
            (&[connect, (":authority", "10.200.0.10:0")], Comes::Status(400)),
            (&[connect, (":authority", "")], Comes::Status(400)),
            (&[connect, (":authority", "user@10.200.0.10:80")], Comes::Status(400)),
            (&[connect, (":authority", "10.77.0.1:80")], Comes::Status(403)),
            (&[connect, (":authority", "10.200.0.10:9")], Comes::Status(502)),
            (&[connect, is, ("x", &long)], Comes::Status(431)),
            (&get, Comes::Status(405)),
        ] {
            let came = peer.asks(&headers(fields), false).await.with_context(|| format!("{fields:.80?}"))?;
            ensure!(came == comes, "{fields:.80?}: {came:?}");
        }
        ensure!(peer.asks(b"", true).await? == Comes::Reset(0x10d), "an end without a request");
        // What is not known is let be: frames, streams, settings (RFC 9114 section 9).
        let unknown = peer.one_way(&[integer(0x40), vec![7; 100]].concat()).await?;
        let _stopped = unknown.stopped().await?;
        let request = [frame(0x21, b"grease"), h3::connect(&to), frame(0x40, &[0; 5000])].concat();
        let (mut send, mut recv) = peer.request(&request, false).await?;
        ensure!(peer.comes(&mut recv).await? == Comes::Status(200));
        send.write_all(&frame(DATA, b"hello")).await?;
        let mut echo = [0; 7];
        timeout(PATIENCE, recv.read_exact(&mut echo)).await??;
        ensure!(echo == *b"\x00\x05hello");
        peer.leaves().await;
        Ok(())
    })
}

/// A listener that is told to stop says so (GOAWAY), refuses what comes then as not processed, and carries on what it has.
#[test]
fn a_gateway_that_drains_says_goaway_and_carries_on_what_it_has() -> Result<()> {
    let world = World::new()?;
    let mut ours = gateway(&world, "\"h3\"", "")?;
    let target = world.serve(TARGET4, target::echo())?;
    let (to, who) = (target.addr().to_string(), world.pki().named("node"));
    let pid = ours.process().id();
    world.node().block_on(|| async move {
        let peer = Peer::connect(HBONE, &who).await?;
        let (mut send, mut recv) = peer.request(&h3::connect(&to), false).await?;
        ensure!(peer.comes(&mut recv).await? == Comes::Status(200));
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.try_into()?),
            nix::sys::signal::Signal::SIGTERM,
        )?;
        // Its control stream: the kind, SETTINGS, and GOAWAY with the number of the next request.
        let mut control = timeout(PATIENCE, peer.connection.accept_uni()).await??;
        let mut heard = Vec::new();
        while !heard.ends_with(&frame(GOAWAY, &[4])) {
            let mut byte = [0];
            timeout(PATIENCE, control.read_exact(&mut byte)).await.context("no GOAWAY")??;
            heard.push(byte[0]);
        }
        ensure!(peer.asks(&h3::connect(&to), false).await? == Comes::Reset(0x10b));
        send.write_all(&frame(DATA, b"hello")).await?;
        let mut echo = [0; 7];
        timeout(PATIENCE, recv.read_exact(&mut echo)).await??;
        ensure!(echo == *b"\x00\x05hello");
        send.finish()?;
        ensure!(timeout(PATIENCE, recv.read(&mut [0])).await??.is_none());
        ensure!(peer.closed().await? == 0x100);
        Ok(())
    })?;
    ours.process().wait(PATIENCE)?;
    Ok(())
}

/// Workers of a gateway that stops end one after the other, each with its socket, and the connections of the others still reach
/// theirs.
#[test]
fn a_worker_that_has_ended_takes_no_connection_of_another_along() -> Result<()> {
    /// Fewer than there are workers, most of which end before them.
    const PEERS: usize = 5;
    let world = World::new()?;
    let config = gateway_config(&world.pki().named("gateway"), "\"h3\"", "");
    let config = config.replace("workers = 2", "workers = 12\ndrain_timeout = \"60s\"");
    let mut ours = Daemon::start(&world, world.net(), &config)?;
    let target = world.serve(TARGET4, target::echo())?;
    let (to, who) = (target.addr().to_string(), world.pki().named("node"));
    let pid = ours.process().id();
    world.node().block_on(|| async move {
        let mut flows = Vec::new();
        for _ in 0..PEERS {
            let peer = Peer::connect(HBONE, &who).await?;
            let (send, mut recv) = peer.request(&h3::connect(&to), false).await?;
            ensure!(peer.comes(&mut recv).await? == Comes::Status(200));
            flows.push((peer, send, recv));
        }
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.try_into()?),
            nix::sys::signal::Signal::SIGTERM,
        )?;
        // Workers without a connection end when nothing new has come for a while.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        for (_, send, recv) in &mut flows {
            send.write_all(&frame(DATA, b"hello")).await?;
            let mut echo = [0; 7];
            let echoed = timeout(PATIENCE, recv.read_exact(&mut echo)).await;
            echoed.context("it has lost its flow")??;
            ensure!(echo == *b"\x00\x05hello", "{echo:x?}");
        }
        for (peer, ..) in flows {
            peer.leaves().await;
        }
        Ok(())
    })?;
    ours.process().wait(PATIENCE)?;
    Ok(())
}

/// A reload changes a listener that speaks HTTP/3, removes it, and adds it again, while its flows go on: new ones are served as
/// the configuration says by then.
#[test]
fn a_listener_with_h3_is_changed_removed_and_added_by_a_reload_and_its_flows_go_on() -> Result<()> {
    let world = World::new()?;
    let (mut ours, who) = (gateway(&world, "\"h3\"", "")?, world.pki().named("gateway"));
    let target = world.serve(TARGET4, target::echo())?;
    let to = target.addr().to_string();
    let exec = world.exec_with(&agent(&world, "h3", GATEWAY_ID)?);
    let mut held = Vec::new();
    for keys in ["max_streams = 7", "max_streams = 9"] {
        let mut app = exec.spawn_app(&["hold", &to])?;
        app.says("held=1")?;
        held.push(app);
        ours.tell(&gateway_config(&who, "\"h3\"", keys))?;
    }
    let without = gateway_config(&who, "\"h2\"", "");
    ours.tell(&without)?;
    let mut app = exec.spawn_app(&["expect-reset", &to, "1"])?;
    app.says("ended=ECONNRESET")?;
    ours.tell(&gateway_config(&who, "\"h2\", \"h3\"", ""))?;
    let mut app = exec.spawn_app(&["hold", &to])?;
    app.says("held=1")?;
    held.push(app);
    for app in &mut held {
        assert_eq!(ask(app.process(), "ping")?, "ok");
    }
    let answers = ours.answers();
    assert!(answers.iter().all(|answer| answer.contains("reloaded configuration")), "{answers:?}");
    Ok(())
}

/// Envoy terminates our tunnels over HTTP/3 with mTLS.
#[test]
fn envoy_ends_what_we_carry_over_http_3_and_mtls() -> Result<()> {
    let world = World::new()?;
    let _envoy = Envoy::start(&world, world.net(), "gateway-h3.yaml", &[3128], &[])?;
    let exec = world.exec_with(&agent(&world, "h3", ENVOY_ID)?);
    let way = Way::Captured(&world, &exec);
    ends::bytes_arrive(way, BULK)?;
    ends::its_end_is_heard_and_answered(way)?;
    // It drops what comes behind.
    ends::the_targets_end_is_heard(way)?;
    ends::a_reset_of_the_target_is_a_reset(way)?;
    ends::nobody_there_is_a_reset(way)
}

/// We terminate Envoy's tunnels over HTTP/3 with mTLS.
#[test]
fn we_end_what_envoy_carries_over_http_3_and_mtls() -> Result<()> {
    let world = World::new()?;
    // Over QUIC it also checks the certificate for the name that it asks for.
    let who = world.pki().issue("gateway-h3", GATEWAY_ID, &["--dns", "gateway.example.org"])?;
    let mut ours = gateway_as(&world, &who, "\"h3\"", "")?;
    let _envoy = Envoy::start(&world, world.node(), "client-h3.yaml", &[10443], &[])?;
    let way =
        Way::Port(&world, SocketAddr::new([127, 0, 0, 1].into(), 10443), SocketAddr::new(TARGET4, 8080));
    ends::bytes_arrive(way, BULK)?;
    ends::its_end_is_heard_and_answered(way)?;
    ends::the_targets_end_is_heard_and_answered(way)?;
    ends::a_reset_of_the_application_is_a_reset(way)?;
    ends::without_a_target_it_ends(way)?;
    let line = ours.process().wait_for_line("reason=closed destination=")?;
    assert!(line.contains(ENVOY_ID), "{line}");
    Ok(())
}

/// aioquic, which shares no code with us, tunnels through our listener: bytes, ends, resets and refusals.
#[test]
fn aioquic_tunnels_through_our_listener() -> Result<()> {
    let world = World::new()?;
    let mut ours = gateway(&world, "\"h3\"", "")?;
    let who = world.pki().named("node");
    let run = |does: &str, to: SocketAddr, bytes: &str| {
        let mut command = world.node().command(programs::aioquic(&programs::tools())?);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/h3_connect.py");
        command.args([script, &HBONE.ip().to_string(), &HBONE.port().to_string()]);
        command.args([&who.ca, &who.cert, &who.key]);
        command.args([does, &to.to_string(), bytes]);
        process::output(&mut command)
    };
    let echo = world.serve(TARGET4, target::echo())?;
    let said = run("echo", echo.addr(), "1000000")?;
    assert!(said.contains("status=200") && said.contains("received=1000000 ended=FIN"), "{said}");
    let resets = world.serve(TARGET4, target::reset_after(0))?;
    let said = run("send", resets.addr(), "0")?;
    assert!(said.contains("status=200") && said.contains("ended=0x10f"), "{said}");
    drop(resets);
    let said = run("send", SocketAddr::new([10, 77, 0, 1].into(), 9), "0")?;
    assert!(said.contains("status=403"), "{said}");
    let line = ours.process().wait_for_line("reason=closed destination=")?;
    assert!(line.contains(NODE_ID), "{line}");
    Ok(())
}
