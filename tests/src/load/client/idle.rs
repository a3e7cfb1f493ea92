//! Connections that do nothing.
//!
//! Each has carried a request and its answer before it is idle, so that every proxy on the way has all that it keeps
//! for a connection; and carries another in the end, which shows that it was there all the time.

use std::{
    future::Future,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{net::TcpStream, task::JoinSet};

use super::{Place, Progress, dial};
use crate::load::{
    Outcome,
    message::{exchange, expect_end, message, request},
};

/// Bytes of a request, and of its answer.
const SIZE: usize = 64;
/// Connections that are worked on at a time: fewer than any proxy's backlog.
const AT_ONCE: usize = 64;

/// The connections.
#[derive(Debug)]
pub(super) struct Idle {
    connections: Vec<(Place, TcpStream)>,
    took: Duration,
}

impl Idle {
    pub(super) async fn new(to: SocketAddr, connections: u32, progress: &Progress) -> Result<Self> {
        let start = Instant::now();
        let places = (0..usize::try_from(connections)?).map(|index| Place { to, index });
        let open = async |place: Place| {
            let mut stream = dial(place.to).await?;
            talk(&mut stream, place, false).await?;
            anyhow::Ok((place, stream))
        };
        let connections = some_at_once(places, open, progress).await?;
        Ok(Self { connections, took: start.elapsed() })
    }

    /// How many there are, what they have carried, and how long it took to make them.
    pub(super) fn outcome(&self) -> Outcome {
        let operations = self.connections.len() as u64;
        let bytes = operations * SIZE as u64;
        let seconds = self.took.as_secs_f64();
        Outcome { seconds, operations, bytes_up: bytes, bytes_down: bytes, latency: None }
    }

    pub(super) async fn end(self, progress: &Progress) -> Result<()> {
        let end = async |(place, mut stream): (Place, TcpStream)| {
            talk(&mut stream, place, true).await?;
            expect_end(&mut stream).await.with_context(|| place.to_string())
        };
        some_at_once(self.connections, end, progress).await.map(drop)
    }
}

async fn talk(stream: &mut TcpStream, place: Place, last: bool) -> Result<()> {
    let mut bytes = message(SIZE);
    // Neither another connection's number nor that of this one's other request.
    request(&mut bytes, 2 * place.index as u64 + u64::from(last), last)?;
    exchange(stream, &bytes).await.with_context(|| place.to_string())
}

/// Does something with all of them, with [`AT_ONCE`] at a time.
async fn some_at_once<T, U: Send + 'static, F: Future<Output = Result<U>> + Send + 'static>(
    all: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> F,
    progress: &Progress,
) -> Result<Vec<U>> {
    let (mut running, mut done) = (JoinSet::new(), Vec::new());
    let mut all = all.into_iter();
    loop {
        while running.len() < AT_ONCE
            && let Some(next) = all.next()
        {
            running.spawn(work(next));
        }
        let Some(ended) = running.join_next().await else { return Ok(done) };
        done.push(ended.context("a connection panicked")??);
        progress.made();
    }
}
