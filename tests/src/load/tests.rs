//! The load generator against itself, on a host of its own; and with something in between that breaks what it carries.

use std::{
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{Direction, Outcome, Workload, client::Session, driver, port, server::Server};
use crate::{netns::NetNs, programs};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Where the server is.
const SERVER: SocketAddr = SocketAddr::new(LOOPBACK, 7000);
/// Where what is in between is.
const BETWEEN: SocketAddr = SocketAddr::new(LOOPBACK, 7100);
/// How long is measured.
const SHORT: Duration = Duration::from_millis(300);
const WARM_UP: Duration = Duration::from_millis(50);

const ALL: [&str; 15] = [
    "ping-pong:1",
    "ping-pong:64",
    "ping-pong:300000",
    "connect:1",
    "connect:8",
    "first-byte",
    "up:3",
    "down:3",
    "rate:500/7/64",
    "rate:200/3/100000",
    "crowd:5/64",
    "crowd:5/64/up",
    "crowd:5/64/down",
    "idle:200",
    "soak:6",
];

fn workload(word: &str) -> Workload {
    word.parse().unwrap()
}

/// Runs a workload to its end, at a server of this module.
async fn run(to: SocketAddr, workload: Workload) -> Result<Outcome> {
    let mut session = Session::prepare(to, workload, WARM_UP).await?;
    let outcome = session.measure(SHORT).await?;
    session.end().await?;
    Ok(outcome)
}

/// Has a client do something on a host where a server runs.
fn served<F: Future<Output = Result<()>>>(client: impl FnOnce() -> F + Send) -> Result<()> {
    let host = NetNs::new("load")?;
    host.block_on(async || {
        let server = Server::bind(SERVER.ip(), SERVER.port())?;
        tokio::select! {
            done = client() => done,
            failed = server.run() => failed,
        }
    })
}

#[test]
fn every_workload_arrives_whole_and_is_counted() -> Result<()> {
    served(async || {
        for word in ALL {
            let workload = workload(word);
            let Outcome { seconds, operations, bytes_up, bytes_down, latency } =
                run(SERVER, workload).await.map_err(|e| e.context(word))?;
            let each = match workload {
                Workload::PingPong { size } | Workload::Rate { size, .. } | Workload::Crowd { size, .. } => {
                    u64::from(size)
                }
                Workload::Connect { .. } | Workload::Idle { .. } => 64,
                Workload::FirstByte => 1,
                Workload::Bulk { .. } | Workload::Soak { .. } => 0,
            };
            match workload {
                Workload::Soak { .. } => assert!(bytes_up > 0 && bytes_down > 0),
                Workload::Bulk { direction: Direction::Up, .. } => assert!(bytes_up > 0 && bytes_down == 0),
                Workload::Crowd { bulk: Some(direction), .. } => {
                    let (bulk, other) = match direction {
                        Direction::Up => (bytes_up, bytes_down),
                        Direction::Down => (bytes_down, bytes_up),
                    };
                    assert!(bulk > other && other == operations * each, "{word}");
                }
                Workload::Bulk { direction: Direction::Down, .. } => {
                    assert!(bytes_down > 0 && bytes_up == 0);
                }
                _ => assert_eq!((bytes_up, bytes_down), (operations * each, operations * each), "{word}"),
            }
            match workload {
                Workload::Idle { connections } => assert_eq!(operations, u64::from(connections)),
                Workload::Rate { per_second, .. } => {
                    assert_eq!(operations, u64::from(per_second) * 300 / 1000);
                }
                _ => assert!(seconds >= SHORT.as_secs_f64(), "{word}: {seconds}"),
            }
            match workload {
                Workload::Bulk { .. } | Workload::Idle { .. } | Workload::Soak { .. } => {
                    assert_eq!(latency, None, "{word}");
                }
                _ => assert_eq!(latency.unwrap().count, operations, "{word}"),
            }
        }
        Ok(())
    })
}

/// What is done to the bytes of one direction.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    /// The byte at this offset is lost.
    Lose(u64),
    /// It comes twice.
    Repeat(u64),
    /// It is another.
    Alter(u64),
    /// Nothing gets on for so long.
    Stall(u64, Duration),
    /// The end comes in its place.
    End(u64),
}

/// Carries connections to the server, and does something to the first that gets far enough for it.
async fn between(fault: Fault, direction: Direction) -> Result<()> {
    let done = Arc::new(AtomicBool::new(false));
    let mut listeners = Vec::new();
    for offset in 0..port::COUNT {
        let listener = TcpListener::bind((BETWEEN.ip(), BETWEEN.port() + offset)).await?;
        let done = Arc::clone(&done);
        listeners.push(tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await?;
                let far = TcpStream::connect((SERVER.ip(), SERVER.port() + offset)).await?;
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                let (up, down) = match direction {
                    Direction::Up => (fault, Fault::None),
                    Direction::Down => (Fault::None, fault),
                };
                tokio::spawn(carry(near_in, far_out, up, Arc::clone(&done)));
                tokio::spawn(carry(far_in, near_out, down, Arc::clone(&done)));
            }
        }));
    }
    for listener in listeners {
        let accepted: std::io::Result<()> = listener.await?;
        accepted?;
    }
    Ok(())
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    fault: Fault,
    done: Arc<AtomicBool>,
) -> std::io::Result<()> {
    let (mut buffer, mut at) = (vec![0; 16 * 1024], 0);
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        let mut bytes = buffer[..n].to_vec();
        let wrong = match fault {
            Fault::None => None,
            Fault::Lose(w) | Fault::Repeat(w) | Fault::Alter(w) | Fault::Stall(w, _) | Fault::End(w) => {
                w.checked_sub(at)
            }
        };
        let here = wrong.and_then(|w| usize::try_from(w).ok()).filter(|w| *w < n);
        if let Some(here) = here
            && !done.swap(true, Ordering::Relaxed)
        {
            match fault {
                Fault::None => {}
                Fault::Lose(_) => drop(bytes.remove(here)),
                Fault::Repeat(_) => bytes.insert(here, bytes[here]),
                Fault::Alter(_) => bytes[here] ^= 1,
                Fault::Stall(_, length) => tokio::time::sleep(length).await,
                Fault::End(_) => {
                    to.write_all(&bytes[..here]).await?;
                    return to.shutdown().await;
                }
            }
        }
        at += n as u64;
        to.write_all(&bytes).await?;
    }
}

/// Runs a workload through what is in between.
fn through(word: &'static str, fault: Fault, direction: Direction) -> Result<Outcome> {
    let mut outcome = None;
    let result = &mut outcome;
    served(async move || {
        tokio::select! {
            biased;
            failed = between(fault, direction) => failed,
            // A lost byte, and one side waits for it: that nothing gets on is the error then, and it is found later.
            done = tokio::time::timeout(10 * SHORT, run(BETWEEN, workload(word))) => {
                *result = Some(done?);
                Ok(())
            }
        }
    })?;
    outcome.unwrap_or_else(|| bail!("there was none"))
}

/// Every workload through a proxy that alters nothing ends without an error.
#[test]
fn what_breaks_nothing_is_not_noticed() -> Result<()> {
    let all = ["ping-pong:64", "connect:2", "first-byte", "up:2", "down:2", "rate:300/3/3000", "idle:10"];
    for word in all.into_iter().chain(["soak:4"]) {
        through(word, Fault::None, Direction::Up)?;
    }
    Ok(())
}

#[test]
fn one_byte_lost_repeated_or_altered_on_the_way_is_an_error() {
    // Behind what is said in front of the payload; in a stream, in the filler of a block, and in a stamp.
    for (word, offset) in
        [("ping-pong:64", 1000), ("connect:2", 20), ("rate:300/3/3000", 4000), ("idle:10", 30)]
    {
        for direction in [Direction::Up, Direction::Down] {
            let wrong = through(word, Fault::Alter(offset), direction);
            assert!(wrong.is_err(), "{word}, {direction:?}: {wrong:?}");
            let wrong = through(word, Fault::Repeat(offset), direction);
            assert!(wrong.is_err(), "{word}, {direction:?}: {wrong:?}");
            let wrong = through(word, Fault::Lose(offset), direction);
            assert!(wrong.is_err(), "{word}, {direction:?}: {wrong:?}");
        }
    }
    let soaked = [Direction::Up, Direction::Down].map(|direction| ("soak:2", direction));
    for (word, direction) in [("up:2", Direction::Up), ("down:2", Direction::Down)].into_iter().chain(soaked)
    {
        // A soak that chats carries little in so short a time.
        let block = if word == "soak:2" { 4096 } else { 25 * 4096 };
        for offset in [block - 2400, block, block + 7] {
            for fault in
                [Fault::Alter(offset), Fault::Repeat(offset), Fault::Lose(offset), Fault::End(offset)]
            {
                // On a busy machine the connection of a soak may not get as far as the fault.
                let tries = if word == "soak:2" { 3 } else { 1 };
                let noticed = (0..tries).any(|_| through(word, fault, direction).is_err());
                assert!(noticed, "{word}, {fault:?}: nothing is noticed");
            }
        }
    }
}

#[test]
fn an_end_in_the_wrong_place_is_an_error() {
    for word in ["ping-pong:64", "connect:1", "rate:300/3/3000", "idle:10"] {
        let wrong = through(word, Fault::End(10), Direction::Down);
        assert!(wrong.is_err(), "{word}: {wrong:?}");
    }
}

#[test]
fn a_server_that_stalls_is_in_the_distribution_of_all_who_came_meanwhile() -> Result<()> {
    // Behind 50 requests of the warm-up; of the 300 that are measured, some 100 are due meanwhile.
    let stall = Fault::Stall(64 * 110, Duration::from_millis(100));
    let latency = through("rate:1000/1/64", stall, Direction::Down)?.latency.unwrap();
    let millis = Duration::from_millis;
    let at = |nanoseconds| Duration::from_nanos(nanoseconds);
    assert!(at(latency.p50) < millis(50), "{latency:?}");
    assert!(at(latency.p90) > millis(50), "{latency:?}");
    assert!(at(latency.p99) > millis(80), "{latency:?}");
    Ok(())
}

#[test]
fn a_server_that_is_not_there_or_goes_is_an_error_that_says_where() -> Result<()> {
    let host = NetNs::new("load")?;
    for word in ALL {
        let e = host.block_on(|| run(SERVER, workload(word))).unwrap_err();
        assert!(format!("{e:#}").contains("127.0.0.1:700"), "{word}: {e:#}");
    }
    for word in ["ping-pong:64", "up:2", "down:2", "rate:300/3/64", "idle:3", "soak:2"] {
        let folder = tempfile::tempdir()?;
        let server = driver::Server::start(&host, folder.path(), LOOPBACK, None)?;
        let mut client = start(&host, folder.path(), server.addr(), workload(word))?;
        client.wait_ready()?;
        drop(server);
        let failed = client.measure().and_then(|_| client.end());
        let e = format!("{:#}", failed.unwrap_err());
        assert!(e.contains("connection") || e.contains("round trip"), "{word}: {e}");
    }
    Ok(())
}

#[test]
fn a_soak_that_does_not_get_on_ends_although_its_calls_block() -> Result<()> {
    const STALL: Duration = Duration::from_secs(3600);
    /// A soak that chats carries little in so short a time.
    const BEHIND: u64 = 4096;
    let host = NetNs::new("load")?;
    host.block_on(async || {
        let server = Server::bind(SERVER.ip(), SERVER.port())?;
        let session = async {
            let mut session = Session::prepare(BETWEEN, workload("soak:2"), WARM_UP).await?;
            session.measure(SHORT).await
        };
        // What is between listens before it is connected to.
        tokio::select! {
            biased;
            _served = server.run() => bail!("the server ended"),
            _carried = between(Fault::Stall(BEHIND, STALL), Direction::Down) => bail!("what is between ended"),
            // What was begun is dropped then, and so is the runtime, which waits for threads.
            done = tokio::time::timeout(4 * SHORT, session) => {
                assert!(done.is_err(), "{done:?}");
                Ok(())
            }
        }
    })
}

#[test]
fn both_sides_take_turns() -> Result<()> {
    let (host, folder) = (NetNs::new("load")?, tempfile::tempdir()?);
    let server = driver::Server::start(&host, folder.path(), LOOPBACK, None)?;
    for word in ["ping-pong:64", "idle:50"] {
        let mut client = start(&host, folder.path(), server.addr(), workload(word))?;
        client.wait_ready()?;
        assert!(client.measure()?.operations > 0);
        // Its connections are open until it is told.
        let up = host
            .sockets()?
            .iter()
            .filter(|s| {
                s.established() && s.local.port() >= 7000 && s.local.port() < SERVER.port() + port::COUNT
            })
            .count();
        assert_eq!(up, if word == "idle:50" { 50 } else { 1 });
        client.end()?;
    }
    Ok(())
}

fn start(host: &NetNs, folder: &Path, to: SocketAddr, workload: Workload) -> Result<driver::Client> {
    let command = host.command(programs::load()?);
    driver::Client::start(command, folder, to, workload, SHORT, WARM_UP)
}
