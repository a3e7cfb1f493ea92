//! One connection, one message there and back at a time.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use super::{Progress, after, dial};
use crate::load::{
    Outcome,
    latency::Recorder,
    message::{exchange, expect_end, message, number},
};

/// The connection.
#[derive(Debug)]
pub(super) struct PingPong {
    to: SocketAddr,
    stream: TcpStream,
    message: Vec<u8>,
    trips: u64,
}

impl PingPong {
    pub(super) async fn new(to: SocketAddr, size: u32) -> Result<Self> {
        Ok(Self { to, stream: dial(to).await?, message: message(usize::try_from(size)?), trips: 0 })
    }

    pub(super) async fn run(
        &mut self,
        length: Duration,
        record: &Recorder,
        progress: &Progress,
    ) -> Result<Outcome> {
        let (first, start, end) = (self.trips, Instant::now(), after(length)?);
        let mut now = start;
        while now < end || self.trips == first {
            number(&mut self.message, self.trips);
            let trip = Instant::now();
            exchange(&mut self.stream, &self.message)
                .await
                .with_context(|| format!("round trip {} to {}", self.trips, self.to))?;
            now = Instant::now();
            record.record(now - trip)?;
            progress.made();
            self.trips += 1;
        }
        let operations = self.trips - first;
        let bytes = operations * self.message.len() as u64;
        let seconds = (now - start).as_secs_f64();
        Ok(Outcome { seconds, operations, bytes_up: bytes, bytes_down: bytes, latency: None })
    }

    pub(super) async fn end(mut self) -> Result<()> {
        self.stream.shutdown().await?;
        expect_end(&mut self.stream).await.with_context(|| format!("connection to {}", self.to))
    }
}
