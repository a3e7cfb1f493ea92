//! Many connections, one message there and back at a time on each, and one that carries as many bytes as it goes beside
//! them, or none: what bulk does to its neighbours. Latency and operations are the messages'; bytes are everybody's.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use tokio::task::JoinSet;

use super::{Progress, bulk::Bulk, ping_pong::PingPong};
use crate::load::{Direction, Outcome, latency::Recorder};

/// The connections.
#[derive(Debug)]
pub(super) struct Crowd {
    messages: Vec<PingPong>,
    /// Connected first, so that it shares what the others are put on.
    bulk: Option<Bulk>,
}

impl Crowd {
    /// `to` is the server's base port, `echo` where messages come back.
    pub(super) async fn new(
        to: SocketAddr,
        echo: SocketAddr,
        connections: u32,
        size: u32,
        bulk: Option<Direction>,
    ) -> Result<Self> {
        let bulk = match bulk {
            Some(direction) => Some(Bulk::new(to, direction, 1).await?),
            None => None,
        };
        let mut messages = Vec::new();
        for _ in 0..connections {
            messages.push(PingPong::new(echo, size).await?);
        }
        Ok(Self { messages, bulk })
    }

    pub(super) async fn run(
        &mut self,
        length: Duration,
        record: &Recorder,
        progress: &Progress,
    ) -> Result<Outcome> {
        let mut running = JoinSet::new();
        for mut one in self.messages.drain(..) {
            let (record, progress) = (record.clone(), progress.clone());
            running.spawn(async move {
                let done = one.run(length, &record, &progress).await?;
                anyhow::Ok((one, done))
            });
        }
        let messages = async {
            let (mut all, mut connections) = (Outcome::default(), Vec::new());
            while let Some(done) = running.join_next().await {
                let (one, done) = done.context("a connection panicked")??;
                connections.push(one);
                all.seconds = all.seconds.max(done.seconds);
                all.operations += done.operations;
                all.bytes_up += done.bytes_up;
                all.bytes_down += done.bytes_down;
            }
            anyhow::Ok((all, connections))
        };
        let bulk = async {
            match &mut self.bulk {
                Some(bulk) => bulk.run(length, progress).await,
                None => Ok(Outcome::default()),
            }
        };
        let ((mut all, connections), bulk) = tokio::try_join!(messages, bulk)?;
        self.messages = connections;
        all.bytes_up += bulk.bytes_up;
        all.bytes_down += bulk.bytes_down;
        // What bulk has sent has all arrived then.
        all.seconds = all.seconds.max(bulk.seconds);
        Ok(all)
    }

    pub(super) async fn end(self, progress: &Progress) -> Result<()> {
        for one in self.messages {
            one.end().await?;
            progress.made();
        }
        match self.bulk {
            Some(bulk) => bulk.end(progress).await,
            None => Ok(()),
        }
    }
}
