//! Slow, huge, malformed and hostile peers end their own connection; the others do not notice.

use std::{
    io::Read as _,
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::time::timeout;
use tunnel_tests::{
    BLACKHOLE, Gateway, PATIENCE, TARGET4, Target, World,
    daemon::Daemon,
    dialogue::ask,
    exec::Running,
    gateway,
    pattern::{DOWN, UP},
    peer,
    raw::{self, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, RST_STREAM},
    target,
    world::NET4,
};

/// Error codes of RFC 9113 section 7.
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;
/// Streams that a listener takes on one connection (`max_streams`).
const MAX_STREAMS: usize = 200;

/// Another client of the same gateway: it must not notice anything.
struct Neighbour(Running);

impl Neighbour {
    fn new(world: &World, gateway: &Gateway<'_>, target: &Target) -> Result<Self> {
        let mut app = world.exec(gateway).spawn_app(&["hold", &target.addr().to_string()])?;
        app.says("held=1")?;
        let mut me = Self(app);
        me.does_not_notice()?;
        Ok(me)
    }

    fn does_not_notice(&mut self) -> Result<()> {
        for _ in 0..5 {
            assert_eq!(ask(self.0.process(), "ping")?, "ok", "its flow goes on");
        }
        assert_eq!(ask(self.0.process(), "again")?, "ok", "and it can have another");
        Ok(())
    }
}

/// Plays an offender against a gateway that serves somebody else too; what the offender was told, to the end
/// of its connection.
fn offend<F: Future<Output = Result<()>>>(
    play: impl FnOnce(raw::Sender, String) -> F + Send,
) -> Result<Vec<Frame>> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut neighbour = Neighbour::new(&world, &gateway, &target)?;
    let before = gateway.process().memory()?;
    let (addr, authority) = (gateway.addr(), target.addr().to_string());
    let who = world.pki().issue("offender", "spiffe://test.tunnel/offender", &[])?;
    let frames = world.node().block_on(|| async move {
        let (sender, receiver) = raw::connect(addr, &who).await?;
        let heard = tokio::task::spawn_local(receiver.to_the_end());
        // It may be stopped in the middle of a write.
        let _stopped = play(sender, authority).await;
        heard.await?.context("the offender's connection is still open")
    })?;
    neighbour.does_not_notice()?;
    let after = gateway.process().memory()?;
    assert!(after < before + (8 << 20), "the gateway has kept {} bytes", after - before);
    assert!(gateway.process().ended()?.is_none());
    Ok(frames)
}

fn goaway(frames: &[Frame]) -> Option<u32> {
    frames.iter().rfind(|f| f.kind == GOAWAY).and_then(Frame::code)
}

/// A header list that never ends closes the connection that sends it.
///
/// Failure: hostile-peers.
#[test]
fn a_header_list_without_end_closes_the_offenders_connection() -> Result<()> {
    let sent = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&sent);
    let frames = offend(move |mut sender, authority| async move {
        sender.frame(HEADERS, 0, 1, &raw::connect_block(&authority)).await?;
        // A header that is a new one each time: "x: " and 120 bytes, as a literal without indexing.
        let mut field = vec![0, 1, b'x', 120];
        field.extend([b'a'; 120]);
        let block = field.repeat(120);
        for _ in 0..5_000 {
            sender.frame(CONTINUATION, 0, 1, &block).await?;
            counted.fetch_add(block.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    })?;
    assert!(goaway(&frames).is_some_and(|code| code != 0), "{:?}", frames.last());
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent < 8 << 20, "it could send {sent} bytes of headers");
    Ok(())
}

/// A header list above the limit is rejected.
#[test]
fn a_header_list_that_is_too_large_is_refused() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut neighbour = Neighbour::new(&world, &gateway, &target)?;
    let mut request = peer::connect_request(&target.addr().to_string())?;
    for i in 0..100 {
        let name: http::HeaderName = format!("x-{i}").parse()?;
        request.headers_mut().insert(name, "a".repeat(1000).parse()?);
    }
    let answer = peer::ask(world.node(), gateway.addr(), &world.pki().named("node"), request);
    assert!(!answer.as_ref().is_ok_and(|a| a.status.is_success()), "{answer:?}");
    neighbour.does_not_notice()
}

/// A client that opens and resets streams rapidly has its connection closed.
///
/// Failure: hostile-peers.
#[test]
fn rapid_reset_closes_the_offenders_connection() -> Result<()> {
    let frames = offend(|mut sender, authority| async move {
        let block = raw::connect_block(&authority);
        for stream in (1..).step_by(2).take(100_000) {
            let mut both = raw::encode(HEADERS, END_HEADERS, stream, &block);
            both.extend(raw::encode(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
            sender.bytes(&both).await?;
        }
        Ok(())
    })?;
    assert_eq!(goaway(&frames), Some(ENHANCE_YOUR_CALM), "{:?}", frames.last());
    Ok(())
}

/// Streams beyond the limit of a connection are refused and never dialled.
///
/// Failure: hostile-peers.
#[test]
fn streams_beyond_the_limit_are_refused_and_never_dialled() -> Result<()> {
    const ASKED: usize = 1000;
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let (target, other) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET4, target::echo())?);
    let mut neighbour = Neighbour::new(&world, &gateway, &other)?;
    let (addr, authority) = (gateway.addr(), target.addr().to_string());
    let who = world.pki().named("node");
    let (refused, carried) = world.node().block_on(|| async move {
        let (mut sender, mut receiver) = raw::connect(addr, &who).await?;
        let block = raw::connect_block(&authority);
        let sending = tokio::task::spawn_local(async move {
            for stream in (1..).step_by(2).take(ASKED) {
                sender.frame(HEADERS, END_HEADERS, stream, &block).await?;
            }
            anyhow::Ok(sender)
        });
        let (mut refused, mut carried) = (0, 0);
        // A connection that is closed for it has refused them too.
        while refused + carried < ASKED
            && let Some(frame) = receiver.frame().await?
        {
            refused += usize::from(frame.code() == Some(REFUSED_STREAM));
            carried += usize::from(frame.kind == HEADERS);
        }
        drop(sending.await?);
        anyhow::Ok((refused, carried))
    })?;
    assert!(carried <= MAX_STREAMS, "{carried} streams were carried, {refused} refused");
    assert!(target.peers().len() <= MAX_STREAMS, "{} connections at the target", target.peers().len());
    neighbour.does_not_notice()
}

/// What the gateway may keep of a stream of one-byte frames: the stream's window (1 MiB), what h2 and the
/// allocator hold for the frames that one turn of the worker finds (h2's table of them doubles: 32 MiB where
/// they are more than 65,536), and slack of the measurement.
const KEPT: u64 = 40 << 20;

/// DATA frames of one byte arrive and hold a bounded amount of memory.
///
/// Failure: hostile-peers.
#[test]
fn one_byte_frames_arrive_and_cost_a_bounded_amount_of_memory() -> Result<()> {
    // As many as the stream's window has room for, while the target does not read.
    const FRAMES: usize = 1 << 20;
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let (gate, received) = (target::Gate::default(), Arc::new(AtomicU64::new(0)));
    let (closed, count) = (gate.clone(), Arc::clone(&received));
    let sink = world.serve(TARGET4, move |stream: &TcpStream| {
        closed.wait();
        let (mut from, mut buf) = (stream, vec![0; 64 * 1024]);
        loop {
            match from.read(&mut buf)? {
                0 => return Ok(()),
                n => count.fetch_add(n as u64, Ordering::Relaxed),
            };
        }
    })?;
    let other = world.serve(TARGET4, target::echo())?;
    let mut neighbour = Neighbour::new(&world, &gateway, &other)?;
    let before = gateway.process().memory()?;
    let (addr, authority) = (gateway.addr(), sink.addr().to_string());
    let who = world.pki().named("node");
    let (serving, beside) = (&mut gateway, &mut neighbour);
    let kept = world.node().block_on(|| async move {
        let (mut sender, mut receiver) = raw::connect(addr, &who).await?;
        raw::settle(&mut sender, &mut receiver).await?;
        sender.frame(HEADERS, END_HEADERS, 1, &raw::connect_block(&authority)).await?;
        let hearing = tokio::task::spawn_local(async move {
            // Until the gateway's END_STREAM: the target has ended, after it has seen everything.
            while let Some(frame) = receiver.frame().await? {
                if frame.stream == 1 && (frame.kind == RST_STREAM || frame.flags & END_STREAM != 0) {
                    return anyhow::Ok(frame.kind == DATA);
                }
            }
            Ok(false)
        });
        let thousand = raw::encode(DATA, 0, 1, b"x").repeat(1024);
        for _ in 0..FRAMES / 1024 {
            sender.bytes(&thousand).await?;
        }
        beside.does_not_notice()?;
        let kept = serving.process().memory()?.saturating_sub(before);
        gate.open();
        sender.frame(DATA, END_STREAM, 1, &[]).await?;
        assert!(hearing.await??, "the stream did not end cleanly");
        anyhow::Ok(kept)
    })?;
    assert_eq!(received.load(Ordering::Relaxed), FRAMES as u64);
    assert!(kept < KEPT, "the gateway has kept {kept} bytes");
    neighbour.does_not_notice()
}

/// DATA that arrives during the dial is accepted and takes no window from other streams.
///
/// Failure: hostile-peers.
#[test]
fn what_a_peer_sends_while_its_target_is_dialled_is_taken_and_costs_no_other_stream() -> Result<()> {
    // More than h2 lets pile up unread, less than the stream's window.
    const FRAMES: usize = 500 * 1024;
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let (addr, who) = (gateway.addr(), world.pki().named("node"));
    let (silent, echo) = (format!("{BLACKHOLE}:80"), target.addr().to_string());
    let frames = world.node().block_on(|| async move {
        let (mut sender, mut receiver) = raw::connect(addr, &who).await?;
        raw::settle(&mut sender, &mut receiver).await?;
        sender.frame(HEADERS, END_HEADERS, 1, &raw::connect_block(&silent)).await?;
        let thousand = raw::encode(DATA, 0, 1, b"x").repeat(1024);
        for _ in 0..FRAMES / 1024 {
            sender.bytes(&thousand).await?;
        }
        // Nobody has answered yet, and another stream of the same connection is served.
        sender.frame(HEADERS, END_HEADERS, 3, &raw::connect_block(&echo)).await?;
        sender.frame(DATA, END_STREAM, 3, b"hello").await?;
        let mut frames = Vec::new();
        while let Some(frame) = receiver.frame().await? {
            let ended = frame.stream == 3 && frame.flags & END_STREAM != 0;
            frames.push(frame);
            if ended {
                break;
            }
        }
        anyhow::Ok(frames)
    })?;
    let of = |stream, kind| frames.iter().filter(move |f| f.stream == stream && f.kind == kind);
    let echoed: Vec<u8> = of(3, DATA).flat_map(|f| f.payload.clone()).collect();
    assert_eq!(echoed, b"hello", "{frames:?}");
    assert_eq!(of(1, HEADERS).count() + of(1, RST_STREAM).count(), 0, "{frames:?}");
    Ok(())
}

/// DATA that arrives before the answer reaches the target once and in order, or nobody after a refusal.
///
/// Failure: hostile-peers.
#[test]
fn what_a_peer_sends_before_the_answer_arrives_once_in_order_after_it_or_nowhere() -> Result<()> {
    const BYTES: u64 = 300_000;
    let world = World::new()?;
    let gateway = world.gateway().hosts(&format!("{TARGET4} web.internal\n"))?.allow("*.internal").start()?;
    let target = world.serve(TARGET4, target::answer_after_end())?;
    let (allowed, denied) =
        (format!("web.internal:{}", target.addr().port()), format!("{TARGET4}:{}", target.addr().port() - 1));
    let (addr, config) = (gateway.addr(), peer::tls(&world.pki().named("node"))?);
    world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(addr, config).await?;
        let _driving = tokio::task::spawn_local(connection);
        for (authority, status) in [(denied, 502), (allowed, 200)] {
            requests = requests.ready().await?;
            let (response, mut send) = requests.send_request(peer::connect_request(&authority)?, false)?;
            let mut bytes = vec![0; usize::try_from(BYTES)?];
            UP.fill(0, &mut bytes);
            send.send_data(bytes.into(), true)?;
            let response = timeout(PATIENCE, response).await.context("no answer")??;
            assert_eq!(response.status().as_u16(), status);
            let (mut body, mut got) = (response.into_body(), Vec::new());
            while status == 200
                && let Some(chunk) = timeout(PATIENCE, body.data()).await.context("no more of the body")?
            {
                let chunk = chunk?;
                body.flow_control().release_capacity(chunk.len())?;
                got.extend_from_slice(&chunk);
            }
            if status == 200 {
                assert_eq!(got.len() as u64, BYTES);
                DOWN.check(0, &got)?;
            }
        }
        anyhow::Ok(())
    })?;
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    assert_eq!(target.peers().len(), 1);
    Ok(())
}

/// A gateway by configuration, which gives a handshake one second.
fn impatient(world: &World) -> Result<(Daemon, SocketAddr)> {
    let addr = SocketAddr::new(NET4, gateway::PORT);
    let config = format!(
        "{}[[listener]]\naddress = \"{addr}\"\nhandshake_timeout = \"1s\"\n\
         [[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    Ok((Daemon::start(world, world.net(), &config)?, addr))
}

/// How long it takes the other side to end a connection on which we have nothing to say.
fn closed_after(stream: &TcpStream) -> Result<Duration> {
    let start = Instant::now();
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut from = stream;
    let mut buf = [0; 1024];
    loop {
        match from.read(&mut buf) {
            Ok(0) => return Ok(start.elapsed()),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(start.elapsed()),
            Err(e) => return Err(e).context("it is still open"),
        }
    }
}

/// A TLS handshake that drips is ended after `handshake_timeout`.
///
/// Failure: hostile-peers.
#[test]
fn a_handshake_that_drips_is_ended_after_the_handshake_timeout() -> Result<()> {
    let world = World::new()?;
    let (mut daemon, addr) = impatient(&world)?;
    let stream = world.node().run(|| TcpStream::connect(addr))?;
    // The start of a ClientHello, a byte at a time, for ever.
    let dripping = stream.try_clone()?;
    let drip = std::thread::spawn(move || {
        use std::io::Write as _;
        let hello = [0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3];
        let bytes = hello.into_iter().chain(std::iter::repeat(0));
        for byte in bytes {
            if (&dripping).write_all(&[byte]).is_err() {
                return;
            }
            // Paced by the other side's patience: nothing comes back until it gives up.
            let _nothing = dripping.peek(&mut [0]).is_ok();
        }
    });
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    let took = {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let mut from = &stream;
            match from.read(&mut [0; 64]) {
                Err(e)
                    if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                _ => break,
            }
        }
        start.elapsed()
    };
    assert!(took < Duration::from_secs(5), "it took {took:?}");
    drop(stream);
    drip.join().ok().context("the dripper panicked")?;
    let said = daemon.process().wait_for_line("rejected peer connection")?;
    assert!(said.contains("no complete handshake within 1s"), "{said}");
    Ok(())
}

/// A peer that is silent before TLS or before HTTP is disconnected after `handshake_timeout`.
///
/// Failure: hostile-peers.
#[test]
fn silence_before_and_after_tls_is_ended_after_the_handshake_timeout() -> Result<()> {
    let world = World::new()?;
    let (mut daemon, addr) = impatient(&world)?;
    let silent = world.node().run(|| TcpStream::connect(addr))?;
    assert!(closed_after(&silent)? < Duration::from_secs(5));
    daemon.process().wait_for_line("no complete handshake within 1s")?;
    // TLS is done, the preface of HTTP/2 does not come.
    let config = peer::tls(&world.pki().named("node"))?;
    let took = world.node().block_on(|| async move {
        use tokio::io::AsyncReadExt as _;
        let tcp = tokio::net::TcpStream::connect(addr).await?;
        let name = rustls_pki_types::ServerName::IpAddress(NET4.into());
        let mut tls = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await?;
        let start = Instant::now();
        let mut heard = Vec::new();
        let _either_way = timeout(PATIENCE, tls.read_to_end(&mut heard)).await?;
        anyhow::Ok(start.elapsed())
    })?;
    assert!(took < Duration::from_secs(5), "it took {took:?}");
    Ok(())
}

/// Silent connections do not keep other peers from connecting.
///
/// Failure: hostile-peers.
#[test]
fn silent_connections_do_not_keep_others_out() -> Result<()> {
    // More than two workers have places for handshakes, and each would stay for ten seconds.
    const SILENT: usize = 1500;
    let world = World::new()?;
    let mut gateway = world.gateway().flag("--workers", "2").start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut old = Neighbour::new(&world, &gateway, &target)?;
    let addr = gateway.addr();
    let silent =
        world.node().run(|| (0..SILENT).map(|_| TcpStream::connect(addr)).collect::<Result<Vec<_>, _>>())?;
    let start = Instant::now();
    let mut new = Neighbour::new(&world, &gateway, &target)?;
    assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    old.does_not_notice()?;
    new.does_not_notice()?;
    gateway.logs("rejected peer connection")?;
    drop(silent);
    Ok(())
}

/// Bytes that are not TLS close the connection.
///
/// Failure: hostile-peers.
#[test]
fn garbage_is_answered_by_the_end_of_the_connection() -> Result<()> {
    use std::io::Write as _;
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut neighbour = Neighbour::new(&world, &gateway, &target)?;
    for garbage in [
        "GET / HTTP/1.1\r\nHost: gateway\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\u{16}\u{3}\u{1}\0\u{5}hello",
    ] {
        let stream = world.node().run(|| TcpStream::connect(gateway.addr()))?;
        (&stream).write_all(garbage.as_bytes())?;
        let took = closed_after(&stream)?;
        assert!(took < Duration::from_secs(5), "{garbage:?}: it took {took:?}");
    }
    gateway.logs("rejected peer connection")?;
    neighbour.does_not_notice()
}

/// Malformed HTTP/2 frames close the connection that sends them and no other.
///
/// Failure: hostile-peers.
#[test]
fn malformed_frames_close_the_offenders_connection() -> Result<()> {
    // DATA on stream 0; a frame that is longer than it may be; WINDOW_UPDATE that overflows the window.
    let frames: [Vec<u8>; 3] = [
        raw::encode(DATA, 0, 0, b"x"),
        raw::encode(HEADERS, END_HEADERS, 1, &vec![0; 1 << 20]),
        raw::encode(8, 0, 0, &0x7fff_ffffu32.to_be_bytes()),
    ];
    for bad in frames {
        let told = offend(move |mut sender, _authority| async move { sender.bytes(&bad).await })?;
        assert!(goaway(&told).is_some_and(|code| code != 0), "{told:?}");
    }
    Ok(())
}
