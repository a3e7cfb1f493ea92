//! What one application does beside others: floods of connections that are reset, and one new connection after another.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tunnel_tests::target::reset;

use super::{open, ping, say};

/// Long connections of an application.
const LONG: usize = 8;
/// A long connection has to make a round trip after so many of the others.
const EVERY: usize = 50;

/// Keeps some connections to an echo, and beside them makes so many that are reset as soon as they are there.
pub(super) fn burst(addr: &str, connections: usize) -> Result<()> {
    let long = (0..LONG).map(|_| open(addr)).collect::<Result<Vec<_>>>()?;
    let all = || long.iter().try_for_each(ping);
    all().context("before")?;
    let address: SocketAddr = addr.parse()?;
    for n in 0..connections {
        let stream = TcpStream::connect(address)?;
        reset(&stream)?;
        drop(stream);
        if n % EVERY == 0 {
            all().with_context(|| format!("after {n} resets"))?;
        }
    }
    all().context("afterwards")?;
    say(&format!("alive={}", long.len()));
    Ok(())
}

/// Connects and resets as fast as it can, from so many threads, until its standard input ends; then how often.
pub(super) fn churn(addr: SocketAddr, threads: usize) -> Result<()> {
    let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(stream) = TcpStream::connect(addr) {
                        let _reset = reset(&stream);
                        made.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        say("churning=yes");
        let _end = io::stdin().read_line(&mut String::new());
        stop.store(true, Ordering::Relaxed);
    });
    say(&format!("made={}", made.load(Ordering::Relaxed)));
    Ok(())
}

/// Makes a connection to an echo after every so many milliseconds, and says of each when it began and how long its first
/// round trip took, in milliseconds.
#[expect(clippy::disallowed_methods, reason = "a program that does something now and then is what is wanted")]
pub(super) fn now_and_then(addr: &str, connections: u64, pause: u64) -> Result<()> {
    let began = Instant::now();
    let one = |n: u64| {
        let addr = addr.to_owned();
        thread::spawn(move || {
            let started = Instant::now();
            let at = started.duration_since(began).as_millis();
            let result = open(&addr).and_then(|stream| Ok(ping(&stream)?));
            let took = started.elapsed().as_millis();
            say(&format!("flow={n} at={at} took={took} ok={}", result.is_ok()));
        })
    };
    let all: Vec<_> = (0..connections)
        .map(|n| {
            thread::sleep(Duration::from_millis(pause));
            one(n)
        })
        .collect();
    for thread in all {
        thread.join().ok().context("a thread panicked")?;
    }
    Ok(())
}
