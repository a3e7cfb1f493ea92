//! Requests that start when they are due, whatever the answers do.
//!
//! Request *k* is due at *k* / rate, and goes to connection *k* mod *n*. A connection carries one request at a time;
//! one that is due meanwhile waits for its turn, and its time counts from when it was due. So what a stall of the
//! server does to those who come during it is in the distribution (no coordinated omission). When all have started,
//! the last answers are awaited; what is measured ends with them.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    sync::mpsc::{self, error::TrySendError},
    task::JoinSet,
};

use super::{Place, Progress, dial_all};
use crate::load::{
    Outcome,
    latency::Recorder,
    message::{exchange, expect_end, message, request},
    pace::Pace,
};

/// Requests of a connection that are due and have not started: a server so far behind will not catch up.
const BEHIND: usize = 64 * 1024;

/// The connections.
#[derive(Debug)]
pub(super) struct Rate {
    per_second: u32,
    size: usize,
    connections: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    place: Place,
    stream: TcpStream,
    message: Vec<u8>,
    requests: u64,
}

impl Rate {
    pub(super) async fn new(to: SocketAddr, per_second: u32, connections: u32, size: u32) -> Result<Self> {
        let size = usize::try_from(size)?;
        // Fails, if it does, before anything is connected.
        request(&mut message(size), 0, false)?;
        let connections = dial_all(to, connections).await?.into_iter().enumerate().map(|(index, stream)| {
            Connection { place: Place { to, index }, stream, message: message(size), requests: 0 }
        });
        Ok(Self { per_second, size, connections: connections.collect() })
    }

    pub(super) async fn run(
        &mut self,
        length: Duration,
        record: &Recorder,
        progress: &Progress,
    ) -> Result<Outcome> {
        let (mut queues, mut running) = (Vec::new(), JoinSet::new());
        for mut connection in self.connections.drain(..) {
            let (queue, due) = mpsc::channel(BEHIND);
            queues.push(queue);
            let (record, progress) = (record.clone(), progress.clone());
            running.spawn(async move {
                let served = connection.serve(due, &record, &progress).await;
                let served = served.with_context(|| connection.place.to_string())?;
                anyhow::Ok((connection, served))
            });
        }
        let start = Instant::now();
        self.start_all(start, length, &queues).await?;
        drop(queues);
        let mut operations = 0;
        while let Some(done) = running.join_next().await {
            let (connection, served) = done.context("a connection panicked")??;
            operations += served;
            self.connections.push(connection);
        }
        let seconds = start.elapsed().as_secs_f64();
        // The order of those who were done; what a connection is asked does not depend on it.
        self.connections.sort_by_key(|connection| connection.place.index);
        let bytes = operations * self.size as u64;
        Ok(Outcome { seconds, operations, bytes_up: bytes, bytes_down: bytes, latency: None })
    }

    /// Lets every request start when it is due; at least one.
    async fn start_all(
        &self,
        start: Instant,
        length: Duration,
        queues: &[mpsc::Sender<Instant>],
    ) -> Result<()> {
        let mut pace = Pace::new()?;
        for (k, queue) in (0..).zip(queues.iter().cycle()) {
            let at = Duration::from_secs_f64(f64::from(k) / f64::from(self.per_second));
            if at >= length && k > 0 {
                break;
            }
            let due = start + at;
            pace.until(due).await?;
            match queue.try_send(due) {
                Ok(()) => {}
                // Its task says why.
                Err(TrySendError::Closed(_)) => break,
                Err(TrySendError::Full(_)) => bail!("{BEHIND} requests of a connection are due, and wait"),
            }
        }
        Ok(())
    }

    pub(super) async fn end(self) -> Result<()> {
        for Connection { place, mut stream, .. } in self.connections {
            stream.shutdown().await?;
            expect_end(&mut stream).await.with_context(|| place.to_string())?;
        }
        Ok(())
    }
}

impl Connection {
    /// Carries the requests that are due, to the last; how many.
    async fn serve(
        &mut self,
        mut due: mpsc::Receiver<Instant>,
        record: &Recorder,
        progress: &Progress,
    ) -> Result<u64> {
        let mut served = 0;
        while let Some(due) = due.recv().await {
            request(&mut self.message, self.requests, false)?;
            self.requests += 1;
            exchange(&mut self.stream, &self.message).await?;
            record.record(due.elapsed())?;
            progress.made();
            served += 1;
        }
        Ok(served)
    }
}
