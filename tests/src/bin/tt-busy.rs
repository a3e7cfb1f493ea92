//! An application that exchanges messages with an echo on non-blocking sockets (tokio, edge-triggered epoll, where a
//! short read ends the reading), and with `blocking` on a blocking one. `busy` and `crowd` take commands from standard
//! input, one a line.
//!
//! # Invariants
//! - Every byte of the echo is checked. Nothing that calls splice(2) is linked.

use std::{
    env,
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
    time::timeout,
};
use tunnel_tests::pattern::{CHUNK, DOWN, UP};

/// No answer by then is none.
const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing was taken for so long: nothing more will be.
const STALLED: Duration = Duration::from_millis(700);

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&format!("failed={e:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["busy", addr, rounds] => busy(addr.parse()?, rounds.parse()?),
        ["crowd", addr, rounds, connections] => crowd(addr.parse()?, rounds.parse()?, connections.parse()?),
        ["follow", addr, rounds] => follow(addr.parse()?, rounds.parse()?),
        ["shared", addr, rounds] => shared(addr.parse()?, rounds.parse()?),
        ["blocking", addr, rounds] => blocking(addr.parse()?, rounds.parse()?),
        _ => bail!("unknown: {words:?}"),
    }
}

fn say(line: &str) {
    println!("{line}");
    // Who does not listen any more has ended.
    let _gone = io::stdout().flush();
}

/// One byte there and back at a time, on a socket that blocks.
fn blocking(addr: SocketAddr, rounds: u64) -> Result<()> {
    let mut stream = std::net::TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    for round in 0..rounds {
        let (sent, mut got) = ([round.to_le_bytes()[0]], [0]);
        stream.write_all(&sent)?;
        stream.read_exact(&mut got)?;
        ensure!(sent == got, "another byte came back in round {round}");
    }
    say(&format!("chat={rounds}"));
    Ok(())
}

/// A connection to an echo, and how far both directions are.
struct Busy {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    sent: u64,
    received: u64,
}

/// Connects, makes this many exchanges, and does what it is told: "chat N", that many more; "duplex N", so many bytes both
/// ways at once; "stall", writes until nothing more is taken; "drain", reads the echo of all that; "half", ends and reads
/// to the end; "read", reads on; "close", ends, whatever there is to be read.
fn busy(addr: SocketAddr, rounds: u64) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut busy = Busy::open(addr).await?;
        busy.chat(rounds).await?;
        say(&format!("busy={rounds}"));
        let (tell, mut told) = tokio::sync::mpsc::channel(1);
        // It ends with the process.
        thread::spawn(move || {
            io::stdin().lines().map_while(Result::ok).all(|line| tell.blocking_send(line).is_ok())
        });
        while let Some(line) = told.recv().await {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["chat", n] => {
                    busy.chat(n.parse()?).await?;
                    say("chat=ok");
                }
                ["duplex", n] => {
                    busy.duplex(n.parse()?).await?;
                    say("duplex=ok");
                }
                ["stall"] => say(&format!("stall={}", busy.stall().await?)),
                ["drain"] => {
                    let end = busy.sent;
                    busy.receive(end).await?;
                    say("drain=ok");
                }
                ["half"] => {
                    busy.to.shutdown().await?;
                    say(&format!("half={}", busy.read_on().await));
                }
                ["read"] => say(&format!("read={}", busy.read_on().await)),
                _ => break,
            }
        }
        Ok(())
    })
}

/// So many connections, each of which has made these exchanges, and then all at once: "stall", each writes until nothing more
/// is taken of it; "drain", each reads the echo of all that.
fn crowd(addr: SocketAddr, rounds: u64, connections: usize) -> Result<()> {
    /// Fewer than may wait to be promoted.
    const AT_ONCE: usize = 20;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut all = Vec::new();
        while all.len() < connections {
            let mut chatting = JoinSet::new();
            for _ in 0..AT_ONCE.min(connections - all.len()) {
                chatting.spawn(async move {
                    let mut busy = Busy::open(addr).await?;
                    busy.chat(rounds).await.map(|()| busy)
                });
            }
            while let Some(busy) = chatting.join_next().await {
                all.push(busy??);
            }
            say(&format!("crowd={}", all.len()));
        }
        // Nothing else happens until it is told.
        let mut told = io::stdin().lines();
        ensure!(told.next().transpose()?.as_deref() == Some("stall"), "stall comes first");
        let mut stalling = JoinSet::new();
        for mut busy in all.drain(..) {
            stalling.spawn(async move { busy.stall().await.map(|taken| (busy, taken)) });
        }
        let mut taken = 0;
        while let Some(stalled) = stalling.join_next().await {
            let (busy, of_one) = stalled??;
            taken += of_one;
            all.push(busy);
        }
        say(&format!("stall={taken}"));
        ensure!(told.next().transpose()?.as_deref() == Some("drain"), "then drain");
        let mut draining = JoinSet::new();
        for mut busy in all {
            draining.spawn(async move {
                let end = busy.sent;
                busy.receive(end).await
            });
        }
        while let Some(drained) = draining.join_next().await {
            drained??;
        }
        say("drain=ok");
        Ok(())
    })
}

/// The same exchanges, and then what the target says of itself, to its end.
fn follow(addr: SocketAddr, rounds: u64) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut busy = Busy::open(addr).await?;
        busy.chat(rounds).await?;
        say(&format!("follow={}", busy.sent));
        let (mut buf, mut followed) = (vec![0; CHUNK], 0);
        loop {
            let n = timeout(PATIENCE, busy.from.read(&mut buf)).await??;
            if n == 0 {
                break;
            }
            DOWN.check(followed, &buf[..n])?;
            followed += n as u64;
        }
        say(&format!("followed={followed}"));
        Ok(())
    })
}

/// The same exchanges while a child has the socket too.
fn shared(addr: SocketAddr, rounds: u64) -> Result<()> {
    let stream = std::net::TcpStream::connect(addr)?;
    // Its standard input is the socket.
    let theirs = std::os::fd::OwnedFd::from(stream.try_clone()?);
    let mut child = std::process::Command::new("sleep").arg("1000").stdin(theirs).spawn()?;
    stream.set_nonblocking(true)?;
    let chatted = tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (from, to) = TcpStream::from_std(stream)?.into_split();
        Busy { from, to, sent: 0, received: 0 }.chat(rounds).await
    });
    child.kill()?;
    child.wait()?;
    chatted
}

impl Busy {
    async fn open(addr: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        let (from, to) = stream.into_split();
        Ok(Self { from, to, sent: 0, received: 0 })
    }

    /// One message there and back at a time, of sizes that vary.
    async fn chat(&mut self, rounds: u64) -> Result<()> {
        for round in 0..rounds {
            let size = 1 + round * 37 % 900;
            let mut message = vec![0; usize::try_from(size)?];
            UP.fill(self.sent, &mut message);
            self.to.write_all(&message).await?;
            self.sent += size;
            let end = self.sent;
            self.receive(end).await?;
        }
        Ok(())
    }

    async fn receive(&mut self, end: u64) -> Result<()> {
        let Self { from, received, .. } = self;
        timeout(PATIENCE, receive(from, received, end)).await?
    }

    /// As many bytes both ways at once, in writes of sizes that vary.
    async fn duplex(&mut self, bytes: u64) -> Result<()> {
        let Self { from, to, sent, received } = self;
        let end = *sent + bytes;
        let sending = async {
            let mut n = 0u64;
            while *sent < end {
                n += 1;
                let size = (1 + n * n * 7919 % 150_000).min(end - *sent);
                let mut message = vec![0; usize::try_from(size)?];
                UP.fill(*sent, &mut message);
                to.write_all(&message).await?;
                *sent += size;
                if n.is_multiple_of(7) {
                    tokio::time::sleep(Duration::from_micros(n % 11 * 200)).await;
                }
            }
            anyhow::Ok(())
        };
        let (sent, received) =
            tokio::join!(timeout(PATIENCE, sending), timeout(PATIENCE, receive(from, received, end)));
        sent??;
        received?
    }

    async fn stall(&mut self) -> Result<u64> {
        let before = self.sent;
        let mut message = vec![0; CHUNK];
        loop {
            UP.fill(self.sent, &mut message);
            match timeout(STALLED, self.to.write(&message)).await {
                Ok(n) => self.sent += n? as u64,
                Err(_) => return Ok(self.sent - before),
            }
        }
    }

    async fn read_on(&mut self) -> String {
        let end = self.sent;
        let (mut buf, mut more) = (vec![0; CHUNK], 0);
        loop {
            match timeout(PATIENCE, self.from.read(&mut buf)).await {
                Ok(Ok(0)) if self.received == end => return format!("end after {more}"),
                Ok(Ok(0)) => return format!("early end after {more}"),
                Ok(Ok(n)) => {
                    if UP.check(self.received, &buf[..n]).is_err() {
                        return "wrong".to_owned();
                    }
                    self.received += n as u64;
                    more += n;
                }
                Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionReset => return "ECONNRESET".to_owned(),
                Ok(Err(e)) => return e.to_string(),
                Err(_) => return "nothing".to_owned(),
            }
        }
    }
}

async fn receive(from: &mut OwnedReadHalf, received: &mut u64, end: u64) -> Result<()> {
    let mut buf = vec![0; CHUNK];
    while *received < end {
        let most = usize::try_from(end - *received)?.min(CHUNK);
        let n = from.read(&mut buf[..most]).await?;
        ensure!(n > 0, "end after {received} of {end} bytes");
        UP.check(*received, &buf[..n])?;
        *received += n as u64;
    }
    Ok(())
}
