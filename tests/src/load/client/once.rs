//! Connections that carry one exchange each.
//!
//! A connection's life is: connect, a request, its answer, the server's end, close. The server ends first, for the
//! sake of ephemeral ports (see [`message`](crate::load::message)); the client waits for that end, for it belongs to
//! the connection, and it comes right behind the answer. What `connect` measures is all of that life; what
//! `first-byte` measures is the part up to the answer.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{io::AsyncWriteExt as _, task::JoinSet};

use super::{Progress, after, dial};
use crate::load::{
    Outcome,
    latency::Recorder,
    message::{byte, expect, expect_end, message, request},
};

/// Bytes of a request, and of its answer.
const SIZE: usize = 64;

/// What is exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// [`SIZE`] bytes.
    Message,
    /// One byte.
    Byte,
}

/// Loops of connections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Once {
    to: SocketAddr,
    kind: Kind,
    at_once: u32,
    /// Requests of earlier runs; their numbers are not used again.
    done: u64,
}

impl Once {
    pub(super) fn new(to: SocketAddr, kind: Kind, at_once: u32) -> Self {
        Self { to, kind, at_once, done: 0 }
    }

    pub(super) async fn run(
        &mut self,
        length: Duration,
        record: &Recorder,
        progress: &Progress,
    ) -> Result<Outcome> {
        let (start, end) = (Instant::now(), after(length)?);
        let mut loops = JoinSet::new();
        for index in 0..u64::from(self.at_once) {
            let (once, record, progress) = (*self, record.clone(), progress.clone());
            loops.spawn(async move {
                let mut trips = 0;
                while Instant::now() < end || trips == 0 {
                    // No two loops have a number in common, nor two connections that follow each other.
                    let number = once.done + trips * u64::from(once.at_once) + index;
                    let place = || format!("connection {number} to {}", once.to);
                    record.record(once.live(number).await.with_context(place)?)?;
                    progress.made();
                    trips += 1;
                }
                anyhow::Ok(trips)
            });
        }
        let mut operations = 0;
        while let Some(done) = loops.join_next().await {
            operations += done.context("a loop panicked")??;
        }
        self.done += operations + u64::from(self.at_once);
        let bytes = operations
            * match self.kind {
                Kind::Message => SIZE as u64,
                Kind::Byte => 1,
            };
        let seconds = start.elapsed().as_secs_f64();
        Ok(Outcome { seconds, operations, bytes_up: bytes, bytes_down: bytes, latency: None })
    }

    /// One connection: what of it is measured.
    async fn live(&self, number: u64) -> Result<Duration> {
        let mut sent = message(SIZE);
        let sent = match self.kind {
            Kind::Message => {
                request(&mut sent, number, true)?;
                sent
            }
            Kind::Byte => byte(number).to_vec(),
        };
        let start = Instant::now();
        let mut stream = dial(self.to).await?;
        stream.write_all(&sent).await.context("sending")?;
        expect(&mut stream, &sent).await?;
        let answered = start.elapsed();
        expect_end(&mut stream).await?;
        drop(stream);
        Ok(match self.kind {
            Kind::Message => start.elapsed(),
            Kind::Byte => answered,
        })
    }
}
