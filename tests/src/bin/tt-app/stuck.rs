//! Connections on which one side does not read: how many bytes are accepted, and how fast another connection stays
//! meanwhile. Every step waits for a line on standard input.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tunnel_tests::pattern::{CHUNK, DOWN, UP};

use super::{expect_end, open, ping, say};

/// Offers `bytes` to a target that does not read; when nothing more is taken, pings another one; then offers
/// the rest. Waits for a line before each step.
pub(super) fn offer(addr: &str, pinged: &str, bytes: u64) -> Result<()> {
    let (stream, friend) = (open(addr)?, open(pinged)?);
    pace(&friend)?;
    let mut line = String::new();
    say("ready=1");
    io::stdin().read_line(&mut line)?;
    stream.set_nonblocking(true)?;
    let mut to = &stream;
    let mut written = 0;
    let mut buf = vec![0; CHUNK];
    let stuck = Duration::from_secs(2);
    'offering: while written < bytes {
        let n = usize::try_from(bytes - written).map_or(buf.len(), |left| left.min(buf.len()));
        UP.fill(written, &mut buf[..n]);
        match to.write(&buf[..n]) {
            Ok(n) => written += n as u64,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut asked = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
                // SAFETY: one valid pollfd.
                if unsafe { libc::poll(&raw mut asked, 1, i32::try_from(stuck.as_millis())?) } == 0 {
                    break 'offering;
                }
            }
            Err(e) => return Err(e).context("offering"),
        }
    }
    pace(&friend)?;
    say(&format!("written={written}"));
    io::stdin().read_line(&mut line)?;
    stream.set_nonblocking(false)?;
    UP.send_from(&mut to, written, bytes).context("the rest")?;
    stream.shutdown(Shutdown::Write)?;
    expect_end(&stream)?;
    println!("offered={bytes}");
    Ok(())
}

/// On each of so many connections, which have exchanged N single bytes ("ADDR+N"), writes small messages to a target that does not read until nothing more is taken;
/// pings another one; says how much was taken, and waits for a line. While it is at it, it says how far it has got.
pub(super) fn stick(addr: &str, pinged: &str, connections: usize) -> Result<()> {
    const MESSAGE: usize = 100;
    /// How often it says how far it has got.
    const PROGRESS: Duration = Duration::from_secs(1);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let friend = open(pinged)?;
    let (addr, pings) = addr.split_once('+').unwrap_or((addr, "0"));
    let streams = (0..connections).map(|_| open(addr)).collect::<Result<Vec<_>>>()?;
    let mut said = Instant::now();
    // All of them at once: one after the other, each would wait for a busy machine again and again.
    for round in 0..pings.parse::<usize>()? {
        for mut stream in &streams {
            stream.write_all(b"p")?;
        }
        for mut stream in &streams {
            stream.read_exact(&mut [0]).context("pinging all")?;
        }
        if said.elapsed() > PROGRESS {
            said = Instant::now();
            say(&format!("pinged {round} times"));
        }
    }
    say("ready=1");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    let (mut written, mut quiet) = (0, Instant::now());
    for stream in &streams {
        stream.set_nonblocking(true)?;
    }
    while quiet.elapsed() < Duration::from_secs(2) {
        if said.elapsed() > PROGRESS {
            said = Instant::now();
            say(&format!("so far: {written}"));
        }
        for mut stream in &streams {
            // A few at a time, so that they leave as they were written.
            for _ in 0..16 {
                match stream.write(&[7; MESSAGE]) {
                    Ok(n) => (written, quiet) = (written + n, Instant::now()),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e).context("sticking"),
                }
            }
        }
    }
    pace(&friend)?;
    say(&format!("written={written}"));
    io::stdin().read_line(&mut line)?;
    Ok(())
}

/// Is offered `bytes` and reads nothing; pings another target meanwhile; then reads everything. Waits for a
/// line before each step.
pub(super) fn read_late(addr: &str, pinged: &str, bytes: u64) -> Result<()> {
    let friend = open(pinged)?;
    pace(&friend)?;
    let mut line = String::new();
    say("ready=1");
    io::stdin().read_line(&mut line)?;
    let stream = open(addr)?;
    say("waiting=1");
    io::stdin().read_line(&mut line)?;
    pace(&friend)?;
    say("paced=1");
    io::stdin().read_line(&mut line)?;
    let mut from = &stream;
    let read = DOWN.receive_to_end(&mut from)?;
    ensure!(read == bytes, "{read} bytes of {bytes}");
    println!("read={read}");
    Ok(())
}

/// 200 round trips; the slowest and the median, in milliseconds.
fn pace(friend: &TcpStream) -> Result<()> {
    let mut times = Vec::new();
    for _ in 0..200 {
        let start = Instant::now();
        ping(friend).context("pinging")?;
        times.push(start.elapsed());
    }
    times.sort();
    println!(
        "pings={}\nmedian_ms={}\nslowest_ms={}",
        times.len(),
        times[100].as_millis(),
        times[199].as_millis()
    );
    Ok(())
}
