//! Many connections, one after the other or at once: how many succeeded, and how the others failed. A failure does not
//! stop the rest.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use anyhow::Result;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{
    PATIENCE, ping, result, say,
    ways::{fastopen, fastopen_with},
};

/// One after the other, each for one byte, by plain connect(2) or with data in the SYN.
pub(super) fn many_short(addr: SocketAddr, connections: usize, how: &str) -> Result<()> {
    let once = || -> Result<()> {
        let stream = match how {
            "fastopen" => fastopen(addr)?,
            "sendto" => {
                let mut stream = fastopen_with(addr, b"p")?;
                stream.read_exact(&mut [0])?;
                stream
            }
            _ => TcpStream::connect(addr)?,
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(ping(&stream)?)
    };
    let mut outcomes = BTreeMap::<String, usize>::new();
    for _ in 0..connections {
        let outcome = once().map_or_else(|e| format!("{e:#}"), |()| "ok".to_owned());
        *outcomes.entry(outcome).or_default() += 1;
    }
    tell(&outcomes);
    Ok(())
}

/// One after the other, to each target in its turn; each is closed here first, and is in TIME-WAIT then.
pub(super) fn short_by_turns(connections: usize, targets: &[&str]) -> Result<()> {
    let targets = targets.iter().map(|word| word.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
    let mut outcomes = BTreeMap::<String, usize>::new();
    for target in targets.iter().cycle().take(connections) {
        let once = TcpStream::connect(target).and_then(|stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            ping(&stream)
        });
        *outcomes.entry(result(once)).or_default() += 1;
    }
    tell(&outcomes);
    Ok(())
}

/// So many to each target, all of them held, each with an answer; until standard input ends.
pub(super) fn hold_many(each: usize, targets: &[&str]) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let targets = targets.iter().map(|word| word.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
    let mut held = Vec::new();
    let mut failures = BTreeMap::<String, usize>::new();
    for n in 0..each {
        for target in &targets {
            let one = TcpStream::connect(target).and_then(|stream| {
                stream.set_read_timeout(Some(PATIENCE))?;
                ping(&stream).map(|()| stream)
            });
            match one {
                Ok(stream) => held.push(stream),
                Err(e) => *failures.entry(result::<()>(Err(e))).or_default() += 1,
            }
        }
        if n % 50 == 49 {
            // Whoever waits sees that it goes on.
            say(&format!("so far {}", held.len()));
        }
    }
    for (failure, n) in &failures {
        say(&format!("{failure}={n}"));
    }
    say(&format!("held={} of {}", held.len(), each * targets.len()));
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let alive = held.iter().filter(|stream| ping(stream).is_ok()).count();
    println!("alive={alive}");
    io::stdout().flush()?;
    Ok(())
}

fn tell(outcomes: &BTreeMap<String, usize>) {
    for (outcome, n) in outcomes {
        println!("{outcome}={n}");
    }
}
