//! The client of the load generator: it runs a [`Workload`] against a server's base port, and waits for a line before
//! each step.
//!
//! Everything but a soak runs in one thread, so that a run's processor time is that of one client that does one thing.
//!
//! # Invariants
//! - An outcome is of a run in which every expected byte arrived, and no other. It is given before the connections are
//!   closed, and [`Session::end`] fails when they do not end well.
//! - A run that makes no progress for [`STALL`] is an error.

mod bulk;
mod crowd;
mod idle;
mod once;
mod ping_pong;
mod rate;
mod soak;

use std::{
    fmt,
    future::Future,
    io::{BufRead, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::net::TcpStream;

use self::{
    bulk::Bulk,
    crowd::Crowd,
    idle::Idle,
    once::{Kind, Once},
    ping_pong::PingPong,
    rate::Rate,
    soak::Soak,
};
use super::{Outcome, Workload, latency::Recorder, port, server::raise_descriptors};

/// Nothing got on for so long: no proxy that works takes a tenth of it for anything that is asked here.
pub const STALL: Duration = Duration::from_secs(30);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(500);

/// Takes turns with whoever writes `input` and reads `output`, as the [module](super) says. The end of `input` is the
/// end of the run, at whichever turn it comes.
pub fn run(
    to: SocketAddr,
    workload: Workload,
    seconds: Duration,
    warm_up: Duration,
    mut input: impl BufRead,
    mut output: impl Write,
) -> Result<()> {
    raise_descriptors()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut session = runtime.block_on(Session::prepare(to, workload, warm_up))?;
    writeln!(output, "ready")?;
    output.flush()?;
    if go_on(&mut input)? {
        let outcome = runtime.block_on(session.measure(seconds))?;
        writeln!(output, "{}", serde_json::to_string(&outcome)?)?;
        output.flush()?;
        go_on(&mut input)?;
    }
    runtime.block_on(session.end())
}

/// Waits for a line: whether there is one.
fn go_on(input: &mut impl BufRead) -> Result<bool> {
    Ok(input.read_line(&mut String::new()).context("reading standard input")? > 0)
}

/// A workload, connected and warmed up.
#[derive(Debug)]
pub struct Session {
    place: String,
    what: What,
    progress: Progress,
}

#[derive(Debug)]
enum What {
    PingPong(PingPong),
    Once(Once),
    Bulk(Bulk),
    Crowd(Crowd),
    Rate(Rate),
    Idle(Idle),
    Soak(Soak),
}

impl Session {
    /// Connects to the server whose base port is given, and does what it will do for so long; at least once.
    pub async fn prepare(to: SocketAddr, workload: Workload, warm_up: Duration) -> Result<Self> {
        let at = |offset| {
            let port = to.port().checked_add(offset).context("the base port is too high")?;
            anyhow::Ok(SocketAddr::new(to.ip(), port))
        };
        let progress = Progress::new(STALL);
        let prepare = async {
            anyhow::Ok(match workload {
                Workload::PingPong { size } => What::PingPong(PingPong::new(at(port::ECHO)?, size).await?),
                Workload::Connect { at_once } => {
                    What::Once(Once::new(at(port::MESSAGES)?, Kind::Message, at_once))
                }
                Workload::FirstByte => What::Once(Once::new(at(port::MESSAGES)?, Kind::Byte, 1)),
                Workload::Bulk { streams, direction } => What::Bulk(Bulk::new(to, direction, streams).await?),
                Workload::Crowd { connections, size, bulk } => {
                    What::Crowd(Crowd::new(to, at(port::ECHO)?, connections, size, bulk).await?)
                }
                Workload::Rate { per_second, connections, size } => {
                    What::Rate(Rate::new(at(port::MESSAGES)?, per_second, connections, size).await?)
                }
                Workload::Idle { connections } => {
                    What::Idle(Idle::new(at(port::MESSAGES)?, connections, &progress).await?)
                }
                Workload::Soak { connections } => What::Soak(Soak::new(at(port::SOAK)?, connections).await?),
            })
        };
        let place = format!("{workload} at {to}");
        let what = progress.watch(prepare).await.with_context(|| format!("{place}, connecting"))?;
        let mut session = Self { place, what, progress };
        if !matches!(session.what, What::Idle(_)) {
            session.measure(warm_up).await.context("warming up")?;
        }
        Ok(session)
    }

    /// Does it for so long.
    pub async fn measure(&mut self, length: Duration) -> Result<Outcome> {
        let (progress, record) = (self.progress.clone(), Recorder::new()?);
        let work = async {
            match &mut self.what {
                What::PingPong(ping_pong) => ping_pong.run(length, &record, &progress).await,
                What::Once(once) => once.run(length, &record, &progress).await,
                What::Bulk(bulk) => bulk.run(length, &progress).await,
                What::Crowd(crowd) => crowd.run(length, &record, &progress).await,
                What::Rate(rate) => rate.run(length, &record, &progress).await,
                What::Idle(idle) => Ok(idle.outcome()),
                What::Soak(soak) => soak.run(length, &progress).await,
            }
        };
        let mut outcome = self.progress.watch(work).await.with_context(|| self.place.clone())?;
        outcome.latency = Some(record.latency()).filter(|latency| latency.count > 0);
        Ok(outcome)
    }

    /// Ends the connections, and fails unless each ends as it should.
    pub async fn end(self) -> Result<()> {
        let progress = self.progress.clone();
        let work = async {
            match self.what {
                What::PingPong(ping_pong) => ping_pong.end().await,
                What::Once(_) => Ok(()),
                What::Bulk(bulk) => bulk.end(&progress).await,
                What::Crowd(crowd) => crowd.end(&progress).await,
                What::Rate(rate) => rate.end().await,
                What::Idle(idle) => idle.end(&progress).await,
                What::Soak(soak) => soak.end(&progress).await,
            }
        };
        self.progress.watch(work).await.with_context(|| format!("{}, ending", self.place))
    }
}

/// Counts whatever gets on.
#[derive(Clone, Debug)]
struct Progress {
    count: Arc<AtomicU64>,
    /// How long nothing may get on.
    limit: Duration,
}

impl Progress {
    fn new(limit: Duration) -> Self {
        Self { count: Arc::default(), limit }
    }

    /// Something did.
    fn made(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Does work, as long as it gets on.
    async fn watch<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            done = work => done,
            () = self.stalled() => bail!("nothing got on for {:?}", self.limit),
        }
    }

    async fn stalled(&self) {
        let (mut seen, mut since) = (self.count.load(Ordering::Relaxed), Instant::now());
        while since.elapsed() < self.limit {
            tokio::time::sleep(LOOK).await;
            let now = self.count.load(Ordering::Relaxed);
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
        }
    }
}

/// One of several connections, in messages.
#[derive(Clone, Copy, Debug)]
struct Place {
    to: SocketAddr,
    index: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection {} to {}", self.index, self.to)
    }
}

async fn dial(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).await.with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Dials so many, one after the other.
async fn dial_all(to: SocketAddr, connections: u32) -> Result<Vec<TcpStream>> {
    let mut all = Vec::new();
    for _ in 0..connections {
        all.push(dial(to).await?);
    }
    Ok(all)
}

/// A moment that is so far away. Fails when that is beyond what a clock can show.
fn after(length: Duration) -> Result<Instant> {
    let now = Instant::now();
    ensure!(length <= Duration::from_secs(24 * 3600), "{length:?} is longer than a day");
    Ok(now + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_get_on_is_given_up_and_what_does_is_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let progress = Progress::new(2 * LOOK);
            let e = progress.watch(std::future::pending::<Result<()>>()).await.unwrap_err();
            assert!(e.to_string().contains("nothing got on"), "{e}");
            let slow = async {
                for _ in 0..8 {
                    tokio::time::sleep(LOOK / 2).await;
                    progress.made();
                }
                Ok(())
            };
            progress.watch(slow).await.unwrap();
        });
    }
}
