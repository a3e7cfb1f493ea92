//! A peer that does what it should, and how long its round trips take while others do not.

use std::{
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;

use crate::{
    netns::NetNs,
    peer,
    pki::Credentials,
    wait::{PATIENCE, wait_for},
};

/// What is sent, and has to come back.
const MESSAGE: [u8; 64] = [7; 64];
/// What says something of a share of them.
const COUNT_MIN: usize = 50;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(1);

/// Round trips that began in a span of time.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How many.
    pub count: usize,
    /// Half of them took no longer.
    pub p50: Duration,
    /// Of ten, nine.
    pub p90: Duration,
    /// Of a hundred, 99.
    pub p99: Duration,
    /// None took longer.
    pub longest: Duration,
}

type Trips = Arc<Mutex<Vec<(Instant, Option<Duration>)>>>;

/// One stream to an echo, on a connection of its own, and a message after the other on it.
pub struct Honest {
    trips: Trips,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Honest {
    /// Begins, from `host`; returns when the first message is back.
    pub fn start(host: &NetNs, gateway: SocketAddr, who: &Credentials, echo: SocketAddr) -> Result<Self> {
        let (trips, stop, config) = (Trips::default(), Arc::new(AtomicBool::new(false)), peer::tls(who)?);
        let (noted, stopped) = (Arc::clone(&trips), Arc::clone(&stop));
        let thread = host.spawn("honest", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let talk = talk(gateway, config, echo, &noted, &stopped);
            tokio::task::LocalSet::new().block_on(&runtime, talk)
        })?;
        let honest = Self { trips, stop, thread: Some(thread) };
        wait_for("the honest peer's first round trip", PATIENCE, || {
            honest.thread.as_ref()?.is_finished().then_some(()).or((honest.done() > 0).then_some(()))
        })?;
        ensure!(honest.done() > 0, "the honest peer got nowhere");
        Ok(honest)
    }

    fn done(&self) -> usize {
        let trips = self.trips.lock().unwrap_or_else(PoisonError::into_inner);
        trips.iter().filter(|(_, took)| took.is_some()).count()
    }

    /// Of the round trips that began since then, of which there have to be some. One that is not over counts as if it were now.
    pub fn pace_since(&self, since: Instant) -> Result<Pace> {
        let begun = || {
            let trips = self.trips.lock().unwrap_or_else(PoisonError::into_inner);
            trips.len() - trips.partition_point(|(at, _)| *at < since)
        };
        wait_for("more round trips", PATIENCE, || (begun() >= COUNT_MIN).then_some(()))?;
        let trips = self.trips.lock().unwrap_or_else(PoisonError::into_inner);
        // The one that was under way then, too.
        let first = trips.partition_point(|(at, _)| *at < since).saturating_sub(1);
        let mut took: Vec<_> = trips[first..].iter().map(|(at, took)| took.unwrap_or(at.elapsed())).collect();
        took.sort_unstable();
        let of =
            |share: usize| took.get((took.len() * share / 100).min(took.len().saturating_sub(1))).copied();
        let none = "no round trip began";
        Ok(Pace {
            count: took.len(),
            p50: of(50).context(none)?,
            p90: of(90).context(none)?,
            p99: of(99).context(none)?,
            longest: took.last().copied().context(none)?,
        })
    }

    /// Ends it in order; fails if it was cut.
    pub fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it is ended once")?;
        thread.join().ok().context("the honest peer panicked")?.context("the honest peer was cut")
    }
}

impl Drop for Honest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

async fn talk(
    gateway: SocketAddr,
    config: Arc<rustls::ClientConfig>,
    echo: SocketAddr,
    trips: &Trips,
    stop: &AtomicBool,
) -> Result<()> {
    let (requests, connection) = peer::connect(gateway, config).await?;
    let driving = tokio::task::spawn_local(connection);
    let (response, mut send) =
        requests.ready().await?.send_request(peer::connect_request(&echo.to_string())?, false)?;
    let mut body = response.await?.into_body();
    while !stop.load(Ordering::Relaxed) {
        let at = Instant::now();
        trips.lock().unwrap_or_else(PoisonError::into_inner).push((at, None));
        send.reserve_capacity(MESSAGE.len());
        while send.capacity() < MESSAGE.len() {
            poll_fn(|cx| send.poll_capacity(cx)).await.context("its stream is gone")??;
        }
        send.send_data(Bytes::from_static(&MESSAGE), false)?;
        let mut left = MESSAGE.len();
        while left > 0 {
            let chunk = body.data().await.context("its stream has ended")??;
            body.flow_control().release_capacity(chunk.len())?;
            left -= chunk.len();
        }
        let took = at.elapsed();
        if let Some(last) = trips.lock().unwrap_or_else(PoisonError::into_inner).last_mut() {
            last.1 = Some(took);
        }
        tokio::time::sleep(PAUSE).await;
    }
    send.send_data(Bytes::new(), true)?;
    while let Some(chunk) = body.data().await {
        chunk?;
    }
    driving.abort();
    Ok(())
}
