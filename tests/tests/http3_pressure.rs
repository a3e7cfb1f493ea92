//! What a hostile peer does over HTTP/3: it is closed where it floods, memory stays bounded, and an honest peer of the same worker
//! keeps its pace. Over HTTP/2 `pressure.rs` shows the same.

use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use quinn::VarInt;
use tokio::time::timeout;
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, World,
    daemon::Daemon,
    gateway,
    h3::{self, Comes, Peer},
    honest::{Honest, Pace},
    pki::Credentials,
    process, programs, target,
};

const MIB: u64 = 1 << 20;
const HBONE: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// What the gateway may hold, whatever is done to it.
const MEMORY_MAX: u64 = 256 * MIB;
/// H3_EXCESSIVE_LOAD (RFC 9114 section 8.1).
const EXCESSIVE_LOAD: u64 = 0x107;
/// Streams that a listener takes on one connection (`max_streams`).
const STREAMS: usize = 200;
/// How much slower the honest peer may become, and below what round trips say nothing where all sides share two cores.
const SLOWER_MAX: u32 = 3;
const FLOOR: Duration = Duration::from_millis(20);

/// A gateway of one worker with little memory, that takes both.
fn gateway(world: &World) -> Result<Daemon> {
    let config = format!(
        "[daemon]\nworkers = 1\nlimits = {{ memory = \"64MiB\" }}\n{}[[listener]]\naddress = \"{HBONE}\"\nprotocols = [\"h2\", \"h3\"]\n\
         [[route]]\nto = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    Daemon::start(world, world.net(), &config)
}

/// Since `start`, beside that of a while `before` it, or of one behind it, if that was slower: what else the machine does comes
/// and goes.
fn assert_pace(what: &str, honest: &Honest, before: Pace, start: Instant) -> Result<()> {
    let during = honest.pace_since(start)?;
    println!("{what}: {during:?}");
    let behind = usual(honest)?;
    let most = SLOWER_MAX * before.p50.max(behind.p50).max(FLOOR);
    assert!(during.p50 <= most, "{what}: {before:?} before, {behind:?} behind, and meanwhile {during:?}");
    Ok(())
}

/// The honest peer's pace in a while of nothing else.
#[expect(clippy::disallowed_methods, reason = "a pace takes time")]
fn usual(honest: &Honest) -> Result<Pace> {
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(300));
    honest.pace_since(start)
}

/// What is done with streams.
#[derive(Clone, Copy, Debug)]
enum Flood {
    /// Requests that are reset as soon as they are sent.
    RapidResets,
    /// Streams that end without a request.
    Churn,
}

/// Floods until the connection is closed; with which code, and after how many streams.
async fn flood(what: Flood, who: &Credentials, echo: &str) -> Result<(u64, usize)> {
    const MOST: usize = 100_000;
    let peer = Peer::connect(HBONE, who).await?;
    let request = h3::connect(echo);
    let flooded = async {
        for n in 0..MOST {
            let Ok((mut send, mut recv)) = peer.connection.open_bi().await else { return n };
            match what {
                Flood::RapidResets => {
                    let _closed = send.write_all(&request).await;
                    let _closed = send.reset(VarInt::from_u32(0x10c));
                    let _closed = recv.stop(VarInt::from_u32(0x10c));
                }
                Flood::Churn => {
                    let _closed = send.finish();
                }
            }
        }
        MOST
    };
    let streams = timeout(PATIENCE, flooded).await.context("it goes on")?;
    Ok((peer.closed().await?, streams))
}

/// A peer that floods a connection of HTTP/3 with streams that it resets, streams without a request, or PINGs is closed, and an
/// established flow keeps its pace.
///
/// Failure: hostile-peers.
#[test]
fn a_peer_that_floods_over_http_3_is_closed_and_others_keep_their_pace() -> Result<()> {
    let world = World::new()?;
    let mut ours = gateway(&world)?;
    let echo = world.serve(TARGET4, target::echo())?;
    let (offender, to) =
        (world.pki().issue("offender", "spiffe://test.tunnel/offender", &[])?, echo.addr().to_string());
    let honest = Honest::start(world.node(), HBONE, &world.pki().named("node"), echo.addr())?;
    let pace = usual(&honest)?;
    for what in [Flood::RapidResets, Flood::Churn] {
        let (start, offender, to) = (Instant::now(), &offender, &to);
        let (code, streams) = world.node().block_on(|| async move { flood(what, offender, to).await })?;
        println!("{what:?}: closed after {streams} streams");
        assert_eq!(code, EXCESSIVE_LOAD, "{what:?}");
        assert!(streams < 10_000, "{what:?}: {streams}");
        assert_pace(&format!("{what:?}"), &honest, pace, start)?;
    }
    let start = Instant::now();
    let mut pings = world.node().command(programs::aioquic(&programs::tools())?);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/h3_pings.py");
    pings.args([script, &HBONE.ip().to_string(), &HBONE.port().to_string()]);
    pings.args([&offender.ca, &offender.cert, &offender.key]).arg("20000");
    let said = process::output(&mut pings)?;
    assert!(said.contains("ended=closed 0x107"), "{said}");
    assert_pace("PINGs", &honest, pace, start)?;
    ours.process().wait_for_line("flooded by the peer")?;
    honest.end()
}

/// A peer with 200 streams over HTTP/3 that reads nothing, or sends to targets that read nothing, holds its part of the memory,
/// and others get theirs.
///
/// Failure: hostile-peers.
#[test]
fn a_peer_that_reads_nothing_over_http_3_holds_its_part_of_the_memory() -> Result<()> {
    let world = World::new()?;
    // What the kernel takes of 200 sockets is not what is measured.
    world.buffers_of_64_kib()?;
    let mut ours = gateway(&world)?;
    let echo = world.serve(TARGET4, target::echo())?;
    let source = world.serve(TARGET4, target::offer(64 * MIB, &Arc::new(AtomicU64::new(0))))?;
    let silent = world.serve(TARGET4, |stream: &TcpStream| {
        // Until the other side has gone.
        stream.peek(&mut [0]).map(drop)?;
        std::thread::park_timeout(Duration::from_secs(3));
        Ok(())
    })?;
    let offender = world.pki().issue("offender", "spiffe://test.tunnel/offender", &[])?;
    let honest = Honest::start(world.node(), HBONE, &world.pki().named("node"), echo.addr())?;
    for (what, to, sends) in [("reads nothing", &source, false), ("sends to silence", &silent, true)] {
        let (offender, to, start) = (&offender, to.addr().to_string(), Instant::now());
        let sent = world.node().block_on(|| async move {
            let peer = Peer::connect(HBONE, offender).await?;
            let (mut streams, mut sent) = (Vec::new(), 0_u64);
            for _ in 0..STREAMS {
                let (send, mut recv) = peer.request(&h3::connect(&to), false).await?;
                // 503 where there is no room for another flow.
                let comes = timeout(PATIENCE, peer.comes(&mut recv)).await??;
                ensure!(matches!(comes, Comes::Status(200 | 503)), "{comes:?}");
                if comes == Comes::Status(200) {
                    streams.push((send, recv));
                }
            }
            let until = tokio::time::Instant::now() + Duration::from_secs(1);
            let block = h3::frame(h3::DATA, &[7; 16 * 1024]);
            for (send, _) in streams.iter_mut().filter(|_| sends) {
                while let Ok(Ok(())) = timeout(Duration::from_millis(5), send.write_all(&block)).await {
                    sent += block.len() as u64;
                }
            }
            tokio::time::sleep_until(until).await;
            peer.leaves().await;
            Ok(sent)
        })?;
        println!("{what}: {} MiB were sent", sent / MIB);
        // A fourth of 64 MiB, what its library takes, and sockets.
        ensure!(sent < 128 * MIB, "{what}: {sent}");
        let pace = honest.pace_since(start)?;
        println!("{what}: {pace:?}");
        let peak = ours.process().memory_peak()?;
        println!("{what}: {} MiB at most so far", peak / MIB);
        assert!(peak < MEMORY_MAX, "{what}: {} MiB", peak / MIB);
    }
    honest.end()
}

/// The first datagrams of so many clients, each of which begins a handshake.
async fn hellos(count: usize, who: &Credentials) -> Result<Vec<Vec<u8>>> {
    let there = UdpSocket::bind("127.0.0.1:0")?;
    there.set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut hellos = Vec::new();
    for _ in 0..count {
        let begun = Peer::begin(there.local_addr()?, who)?;
        // Its driver has a turn.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let mut datagram = [0; 2048];
        while let Ok(length) = there.recv(&mut datagram) {
            hellos.push(datagram[..length].to_vec());
            if hellos.len() % 2 == 0 {
                break;
            }
        }
        drop(begun);
    }
    Ok(hellos)
}

/// Thousands of handshakes over QUIC that go no further slow no established flow, and keep out nobody who proves its address.
///
/// Failure: hostile-peers.
#[test]
fn handshakes_over_quic_that_go_no_further_slow_nobody_and_keep_nobody_out() -> Result<()> {
    const HELLOS: usize = 200;
    const TIMES: usize = 10;
    let world = World::new()?;
    let mut ours = gateway(&world)?;
    let echo = world.serve(TARGET4, target::echo())?;
    let (who, to) = (world.pki().named("node"), echo.addr().to_string());
    let honest = Honest::start(world.node(), HBONE, &who, echo.addr())?;
    let pace = usual(&honest)?;
    let (all, start) = (&who, Instant::now());
    let hellos = world.node().block_on(|| async move { hellos(HELLOS, all).await })?;
    ensure!(hellos.len() >= HELLOS, "{}", hellos.len());
    let begun = Instant::now();
    let flooding = world.node().spawn("flood", move || {
        let mut sent = 0;
        for _ in 0..TIMES {
            // Of another address, the same is a handshake of its own.
            let from = UdpSocket::bind("0.0.0.0:0")?;
            for hello in &hellos {
                sent += usize::from(from.send_to(hello, HBONE).is_ok());
            }
        }
        anyhow::Ok(sent)
    })?;
    let mut connected = 0;
    while !flooding.is_finished() || connected < 3 {
        let (who, to) = (&who, &to);
        world.node().block_on(|| async move {
            let peer = Peer::connect(HBONE, who).await?;
            ensure!(peer.asks(&h3::connect(to), false).await? == Comes::Status(200));
            peer.leaves().await;
            Ok(())
        })?;
        connected += 1;
    }
    let sent = flooding.join().ok().context("the flood panicked")??;
    println!(
        "{sent} datagrams in {:?} of {:?}, {connected} honest connections",
        begun.elapsed(),
        start.elapsed()
    );
    assert_pace("handshakes", &honest, pace, begun)?;
    let peak = ours.process().memory_peak()?;
    assert!(peak < MEMORY_MAX, "{} MiB", peak / MIB);
    honest.end()
}
