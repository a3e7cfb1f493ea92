//! Every flood that is known, one after the other: an honest peer of the same worker keeps its pace, and memory stays bounded.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustls_pki_types::ServerName;
use tokio::time::{sleep_until, timeout};
use tunnel_tests::{
    NET4, NODE4, TARGET4, World, gateway,
    honest::{Honest, Pace},
    peer,
    pki::Credentials,
    raw::{
        self, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, RST_STREAM,
        SETTINGS, WINDOW_UPDATE,
    },
    target,
};

const MIB: u64 = 1 << 20;
/// What the gateway may hold, whatever is done to it.
const MEMORY_MAX: u64 = 256 * MIB;
/// How long a flood lasts, unless it is closed before; in seconds, by this variable.
const LASTS: Duration = Duration::from_secs(1);
const SECONDS: &str = "TUNNEL_PRESSURE_SECONDS";
/// How much slower the honest peer may become.
const SLOWER_MAX: u32 = 3;
/// Below this, what round trips take says nothing on a machine that has two cores for all sides, and others to serve: half of
/// them, and nine of ten. Where floods are to last long the machine is ours: half of them, and 99 of 100.
const FLOORS: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(50)];
const FLOORS_ALONE: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(10)];
/// Error code of RFC 9113 section 7.
const ENHANCE_YOUR_CALM: u32 = 11;
/// Streams that a listener takes on one connection (`max_streams`).
const STREAMS: u32 = 200;
/// Frames that are sent at once.
const BATCH: usize = 1000;

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It is closed, and told that it floods.
    Calm,
    /// It is closed for an error.
    Error,
    /// It may go on: what it does costs others nothing.
    GoesOn,
}

/// What is done on one connection of HTTP/2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flood {
    /// As much as there is room for, to a target that takes it: no flood, but what floods are compared with.
    Bulk,
    RapidResets,
    MadeYouReset,
    Continuation,
    HeaderLists,
    Settings,
    Pings,
    WindowUpdates,
    Priority,
    UnknownFrames,
    ResetsOfClosedStreams,
    EmptyData,
    OneByteData,
    ZeroWindows,
    ReadsNothing,
}

const FLOODS: [(Flood, End); 14] = [
    (Flood::RapidResets, End::Calm),
    (Flood::MadeYouReset, End::Calm),
    (Flood::Continuation, End::Error),
    (Flood::HeaderLists, End::Calm),
    (Flood::Settings, End::Calm),
    (Flood::Pings, End::Calm),
    (Flood::WindowUpdates, End::Calm),
    (Flood::Priority, End::Calm),
    (Flood::UnknownFrames, End::Calm),
    (Flood::ResetsOfClosedStreams, End::Calm),
    (Flood::EmptyData, End::Calm),
    (Flood::OneByteData, End::GoesOn),
    (Flood::ZeroWindows, End::GoesOn),
    (Flood::ReadsNothing, End::GoesOn),
];

/// Where streams of a flood go.
#[derive(Clone)]
struct Targets {
    echo: String,
    sink: String,
    source: String,
}

impl Flood {
    /// Sends until the deadline, or until the other side takes no more.
    async fn play(self, sender: &mut raw::Sender, to: &Targets, until: Instant) -> Result<()> {
        let setting = |id: u8, value: u32| {
            let [a, b, c, d] = value.to_be_bytes();
            raw::encode(SETTINGS, 0, 0, &[0, id, a, b, c, d])
        };
        let open = |authority: &str, streams: u32| -> Vec<u8> {
            let block = raw::connect_block(authority);
            (0..streams).flat_map(|n| raw::encode(HEADERS, END_HEADERS, 2 * n + 1, &block)).collect()
        };
        let again = |frame: Vec<u8>| frame.repeat(BATCH);
        let batch = match self {
            Self::Bulk => {
                sender.bytes(&open(&to.sink, 1)).await?;
                raw::encode(DATA, 0, 1, &[0; 16_384])
            }
            Self::RapidResets | Self::MadeYouReset | Self::HeaderLists => {
                return self.new_streams(sender, to, until).await;
            }
            Self::Continuation => {
                sender.frame(HEADERS, 0, 1, &raw::connect_block(&to.echo)).await?;
                raw::encode(CONTINUATION, 0, 1, &raw::field(b"x", &[b'a'; 120])).repeat(100)
            }
            Self::Settings => {
                sender.bytes(&open(&to.sink, STREAMS)).await?;
                // The id of SETTINGS_INITIAL_WINDOW_SIZE.
                again([setting(4, 65_535), setting(4, 100_000)].concat())
            }
            Self::Pings => again(raw::encode(PING, 0, 0, &[0; 8])),
            Self::WindowUpdates => again(raw::encode(WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes())),
            Self::Priority => again(raw::encode(2, 0, 1, &[0, 0, 0, 0, 1])),
            Self::UnknownFrames => again(raw::encode(0xfa, 0, 0, b"")),
            Self::ResetsOfClosedStreams => {
                sender.bytes(&open(&to.echo, 1)).await?;
                again(raw::encode(RST_STREAM, 0, 1, &8u32.to_be_bytes()))
            }
            Self::EmptyData => {
                sender.bytes(&open(&to.sink, 1)).await?;
                again(raw::encode(DATA, 0, 1, b""))
            }
            Self::OneByteData => {
                sender.bytes(&open(&to.sink, 100)).await?;
                (0..100).flat_map(|n| raw::encode(DATA, 0, 2 * n + 1, b"x")).collect::<Vec<_>>().repeat(10)
            }
            Self::ZeroWindows => {
                sender.bytes(&setting(4, 0)).await?;
                sender.bytes(&open(&to.source, STREAMS)).await?;
                sleep_until(until.into()).await;
                return Ok(());
            }
            Self::ReadsNothing => {
                sender.bytes(&setting(4, 1 << 30)).await?;
                sender.frame(WINDOW_UPDATE, 0, 0, &(1u32 << 30).to_be_bytes()).await?;
                sender.bytes(&open(&to.source, STREAMS)).await?;
                sleep_until(until.into()).await;
                return Ok(());
            }
        };
        while Instant::now() < until {
            sender.bytes(&batch).await?;
        }
        Ok(())
    }

    /// Those that take a new stream each time; 100,000 at most.
    async fn new_streams(self, sender: &mut raw::Sender, to: &Targets, until: Instant) -> Result<()> {
        let block = raw::connect_block(&to.echo);
        for stream in (1..200_000u32).step_by(2) {
            let frames = match self {
                Self::HeaderLists => {
                    let list = [&block[..], &raw::field(b"x", &[b'a'; 1000]).repeat(32)].concat();
                    let (head, rest) = list.split_at(16_000);
                    [
                        raw::encode(HEADERS, 0, stream, head),
                        raw::encode(CONTINUATION, END_HEADERS, stream, rest),
                    ]
                }
                Self::MadeYouReset => [
                    raw::encode(HEADERS, END_HEADERS, stream, &block),
                    // Beyond the largest window, for which the server has to reset the stream (RFC 9113 section 6.9.1).
                    raw::encode(WINDOW_UPDATE, 0, stream, &0x7fff_ffffu32.to_be_bytes()),
                ],
                _ => [
                    raw::encode(HEADERS, END_HEADERS, stream, &block),
                    raw::encode(RST_STREAM, 0, stream, &8u32.to_be_bytes()),
                ],
            };
            sender.bytes(&frames.concat()).await?;
            if Instant::now() > until {
                break;
            }
        }
        Ok(())
    }
}

/// Floods a gateway; what it said to that, if it closed the connection.
async fn flood(
    gateway: SocketAddr,
    who: &Credentials,
    what: Flood,
    to: &Targets,
) -> Result<Option<Vec<Frame>>> {
    let (mut sender, receiver) = raw::connect(gateway, who).await?;
    let hearing = match what {
        Flood::ReadsNothing => None,
        _ => Some(tokio::task::spawn_local(receiver.to_the_end())),
    };
    // It may be stopped in the middle of a write.
    let _stopped = what.play(&mut sender, to, Instant::now() + measure().0).await;
    let Some(mut hearing) = hearing else { return Ok(None) };
    match timeout(Duration::from_millis(500), &mut hearing).await {
        Ok(heard) => Ok(Some(heard??)),
        Err(_) => {
            hearing.abort();
            Ok(None)
        }
    }
}

/// How the honest peer fares alone, and beside others that do as they should.
struct Usual(Pace);

impl Usual {
    #[expect(clippy::disallowed_methods, reason = "what is measured takes its time")]
    fn of(honest: &Honest) -> Result<Self> {
        let start = Instant::now();
        std::thread::sleep(LASTS / 2);
        let pace = honest.pace_since(start)?;
        println!("alone: {pace:?}");
        Ok(Self(pace))
    }

    fn slower(&mut self, what: &str, pace: Pace) {
        println!("{what}: {pace:?}");
        self.0.p50 = self.0.p50.max(pace.p50);
        self.0.p90 = self.0.p90.max(pace.p90);
        self.0.p99 = self.0.p99.max(pace.p99);
    }
}

/// How long a flood lasts, and whether it is to be long.
fn measure() -> (Duration, bool) {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let seconds = std::env::var(SECONDS).ok().and_then(|text| text.parse().ok());
    seconds.map_or((LASTS, false), |seconds| (Duration::from_secs(seconds), true))
}

fn assert_pace(what: &str, Usual(usual): &Usual, during: Pace) {
    println!("{what}: {during:?}");
    let most = |usual: Duration, floor: Duration| SLOWER_MAX * usual.max(floor);
    let (most_of_half, most_of_all, all) = if measure().1 {
        let [half, all] = FLOORS_ALONE;
        (most(usual.p50, half), most(usual.p99, all), during.p99)
    } else {
        let [half, all] = FLOORS;
        (most(usual.p50, half), most(usual.p90, all), during.p90)
    };
    assert!(
        during.p50 <= most_of_half && all <= most_of_all,
        "{what}: usually {usual:?}, and now {during:?}"
    );
}

/// Under each known flood of HTTP/2 an established flow keeps its pace, the offender is closed where it floods, and memory stays
/// below 256 MiB.
///
/// Failure: hostile-peers.
#[test]
fn heavy_under_every_flood_an_honest_peer_keeps_its_pace() -> Result<()> {
    let world = World::new()?;
    // What the kernel takes of 200 sources is not what is measured.
    world.buffers_of_64_kib()?;
    let mut gateway = world.gateway().flag("--workers", "1").start()?;
    let (echo, sink) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET4, discard)?);
    let source = world.serve(TARGET4, target::offer(64 * MIB, &Arc::new(AtomicU64::new(0))))?;
    let to = Targets {
        echo: echo.addr().to_string(),
        sink: sink.addr().to_string(),
        source: source.addr().to_string(),
    };
    let (addr, who) = (gateway.addr(), world.pki().issue("offender", "spiffe://test.tunnel/offender", &[])?);
    let honest = Honest::start(world.node(), addr, &world.pki().named("node"), echo.addr())?;
    let mut usual = Usual::of(&honest)?;
    let (start, offender, targets) = (Instant::now(), &who, &to);
    let bulk = world.node().block_on(|| async move { flood(addr, offender, Flood::Bulk, targets).await })?;
    assert!(bulk.is_none(), "{bulk:?}");
    usual.slower("bulk", honest.pace_since(start)?);
    for (what, end) in FLOODS {
        let start = Instant::now();
        let (offender, targets) = (&who, &to);
        let heard = world.node().block_on(|| async move { flood(addr, offender, what, targets).await })?;
        assert_pace(&format!("{what:?}"), &usual, honest.pace_since(start)?);
        let told =
            heard.as_ref().map(|frames| frames.iter().rfind(|f| f.kind == GOAWAY).and_then(Frame::code));
        match end {
            End::Calm => assert_eq!(told, Some(Some(ENHANCE_YOUR_CALM)), "{what:?}"),
            End::Error => assert!(told.flatten().is_some_and(|code| code != 0), "{what:?}: {told:?}"),
            End::GoesOn => assert_eq!(told, None, "{what:?}"),
        }
        let peak = gateway.process().memory_peak()?;
        println!("{what:?}: {} MiB at most so far", peak / MIB);
        assert!(peak < MEMORY_MAX, "{what:?}: {} MiB", peak / MIB);
    }
    honest.end()?;
    gateway.logs("flooded by the peer")?;
    Ok(())
}

fn discard(stream: &TcpStream) -> std::io::Result<()> {
    std::io::copy(&mut { stream }, &mut std::io::sink()).map(drop)
}

/// A ClientHello, as bytes: whoever replays it costs the server a key exchange and a signature, and itself nothing.
fn hello(who: &Credentials) -> Result<Vec<u8>> {
    let name = ServerName::IpAddress(NET4.into());
    let mut connection = rustls::ClientConnection::new(peer::tls(who)?, name)?;
    let mut hello = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut hello)?;
    }
    Ok(hello)
}

/// What is done with connections that never become one of HTTP/2.
#[derive(Clone, Copy, Debug)]
enum Before {
    /// 20,000 attempts: connected, and closed.
    Attempts,
    /// Connected, and silent.
    Silence,
    /// The whole first flight, and nothing after it.
    Hellos,
    /// The first bytes of it, and nothing after them.
    HalfHellos,
}

fn attempt(what: Before, to: SocketAddr, hello: &[u8], held: &mut Vec<TcpStream>) -> std::io::Result<()> {
    const HELD_MAX: usize = 3000;
    let mut stream = TcpStream::connect(to)?;
    match what {
        Before::Attempts => return Ok(()),
        Before::Silence => {}
        Before::Hellos => stream.write_all(hello)?,
        Before::HalfHellos => stream.write_all(&hello[..hello.len() / 2])?,
    }
    held.push(stream);
    if held.len() > HELD_MAX {
        held.drain(..HELD_MAX / 2);
    }
    Ok(())
}

/// While thousands of connections a second begin and go no further, an established flow keeps its pace and an honest peer
/// connects.
///
/// Failure: hostile-peers.
#[test]
#[expect(clippy::disallowed_methods, reason = "a flood has its pace")]
fn heavy_connections_that_go_no_further_slow_nobody_and_keep_nobody_out() -> Result<()> {
    const ATTEMPTS: usize = 20_000;
    let world = World::new()?;
    // Those who flood come from an address of their own.
    world.node().ip("address add 10.79.0.1/32 dev lo")?;
    world.net().ip("address add 10.79.0.2/32 dev lo")?;
    world.node().ip(&format!("route add 10.79.0.2/32 via {NET4} src 10.79.0.1"))?;
    world.net().ip(&format!("route add 10.79.0.1/32 via {NODE4}"))?;
    let everywhere = SocketAddr::from(([0, 0, 0, 0], gateway::PORT));
    let mut gateway = world.gateway().flag("--workers", "1").listen(everywhere).start()?;
    let echo = world.serve(TARGET4, target::echo())?;
    let (addr, flooded) =
        (SocketAddr::new(NET4, gateway::PORT), SocketAddr::from(([10, 79, 0, 2], gateway::PORT)));
    let node = world.pki().named("node");
    let honest = Honest::start(world.node(), addr, &node, echo.addr())?;
    let mut usual = Usual::of(&honest)?;
    let connect = || {
        let request = peer::connect_request(&echo.addr().to_string())?;
        let answer = peer::ask(world.node(), addr, &node, request)?;
        anyhow::ensure!(answer.status == 200, "{answer:?}");
        Ok(())
    };
    let start = Instant::now();
    while start.elapsed() < LASTS / 2 {
        connect()?;
    }
    usual.slower("honest connections", honest.pace_since(start)?);
    let hello = hello(&node)?;
    for what in [Before::Attempts, Before::Silence, Before::HalfHellos, Before::Hellos] {
        let start = Instant::now();
        let flooding = {
            let hello = hello.clone();
            world.node().spawn("flood", move || {
                let (mut held, mut made) = (Vec::new(), 0);
                while made < ATTEMPTS && start.elapsed() < 2 * measure().0 {
                    made += usize::from(attempt(what, flooded, &hello, &mut held).is_ok());
                    // 3,000 a second.
                    std::thread::sleep(Duration::from_micros(300));
                }
                made
            })?
        };
        // Others connect meanwhile.
        let mut connected = 0;
        while !flooding.is_finished() {
            connect().with_context(|| format!("{what:?}"))?;
            connected += 1;
        }
        let made = flooding.join().ok().context("the flood panicked")?;
        println!("{what:?}: {made} attempts, and {connected} honest connections");
        assert!(connected > 0, "{what:?}");
        assert_pace(&format!("{what:?}"), &usual, honest.pace_since(start)?);
        let peak = gateway.process().memory_peak()?;
        assert!(peak < MEMORY_MAX, "{what:?}: {} MiB", peak / MIB);
    }
    honest.end()
}

/// Peers that send a head, or a frame, byte by byte and never to its end hold their own connection only.
///
/// Failure: hostile-peers.
#[test]
fn slow_heads_and_slow_bodies_slow_nobody() -> Result<()> {
    const SLOW: usize = 20;
    let world = World::new()?;
    let mut gateway = world.gateway().flag("--workers", "1").start()?;
    let echo = world.serve(TARGET4, target::echo())?;
    let (addr, node, authority) = (gateway.addr(), world.pki().named("node"), echo.addr().to_string());
    let honest = Honest::start(world.node(), addr, &node, echo.addr())?;
    let usual = Usual::of(&honest)?;
    let start = Instant::now();
    world.node().block_on(|| async move {
        let mut held = Vec::new();
        for n in 0..SLOW {
            let (mut sender, receiver) = raw::connect(addr, &node).await?;
            let block = raw::connect_block(&authority);
            if n % 2 == 0 {
                // The head has no end.
                sender.frame(HEADERS, 0, 1, &block).await?;
            } else {
                sender.frame(HEADERS, END_HEADERS, 1, &block).await?;
                let frame = raw::encode(DATA, END_STREAM, 1, &[0; 16_000]);
                sender.bytes(&frame[..10]).await?;
            }
            held.push((sender, receiver));
        }
        tokio::time::sleep(LASTS).await;
        anyhow::Ok(())
    })?;
    assert_pace("slow heads and bodies", &usual, honest.pace_since(start)?);
    assert!(gateway.process().memory_peak()? < MEMORY_MAX);
    honest.end()
}
