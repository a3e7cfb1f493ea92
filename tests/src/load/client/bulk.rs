//! As many bytes as it goes.
//!
//! What is measured begins when the first byte may be sent (up: the client begins to send; down: it tells the
//! sources to go), on connections where nothing is under way. It ends when everything that was sent has been received
//! and checked, on all connections: the sender stops after the time that was asked for, sends a mark, and the time that
//! it takes what is in buffers to arrive counts, as do its bytes. So bytes and seconds describe the same interval, and
//! it is the same for both directions.
//!
//! Slow start has happened in the warm-up, as far as the kernel lets that count: after a pause longer than a
//! retransmission timeout it begins anew (`tcp_slow_start_after_idle`), on every arm alike.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher as _,
    net::SocketAddr,
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use super::{Place, Progress, after, dial};
use crate::load::{
    Direction, Outcome,
    buffer::receive,
    message::expect_end,
    port,
    server::{GO, STOP, finish},
    stream::{Check, Id},
};

/// All streams.
#[derive(Debug)]
pub(super) struct Bulk {
    direction: Direction,
    flows: Vec<Flow>,
}

#[derive(Debug)]
struct Flow {
    place: Place,
    stream: TcpStream,
    id: Id,
    /// Sent, if it goes up.
    sent: u64,
    /// What comes, if it goes down.
    check: Check,
}

impl Bulk {
    pub(super) async fn new(to: SocketAddr, direction: Direction, streams: u32) -> Result<Self> {
        let offset = match direction {
            Direction::Up => port::SINK,
            Direction::Down => port::SOURCE,
        };
        let port = to.port().checked_add(offset).context("the base port is too high")?;
        let to = SocketAddr::new(to.ip(), port);
        let mut flows = Vec::new();
        for index in 0..usize::try_from(streams)? {
            let mut stream = dial(to).await?;
            // The keys of the standard library's tables are random numbers: it has no others.
            let id = Id(RandomState::new().hash_one(index));
            if direction == Direction::Down {
                stream.write_all(&id.0.to_le_bytes()).await?;
            }
            let place = Place { to, index };
            flows.push(Flow { place, stream, id, sent: 0, check: Check::new(Some(id)) });
        }
        Ok(Self { direction, flows })
    }

    pub(super) async fn run(&mut self, length: Duration, progress: &Progress) -> Result<Outcome> {
        let (start, until, direction) = (Instant::now(), after(length)?, self.direction);
        let mut running = JoinSet::new();
        for mut flow in self.flows.drain(..) {
            let progress = progress.clone();
            running.spawn(async move {
                let done = match direction {
                    Direction::Up => flow.up(until, &progress).await,
                    Direction::Down => flow.down(until, &progress).await,
                };
                let bytes = done.with_context(|| flow.place.to_string())?;
                anyhow::Ok((flow, bytes))
            });
        }
        let mut bytes = 0;
        while let Some(done) = running.join_next().await {
            let (flow, came) = done.context("a stream panicked")??;
            self.flows.push(flow);
            bytes += came;
        }
        let seconds = start.elapsed().as_secs_f64();
        Ok(match direction {
            Direction::Up => Outcome { seconds, bytes_up: bytes, ..Outcome::default() },
            Direction::Down => Outcome { seconds, bytes_down: bytes, ..Outcome::default() },
        })
    }

    pub(super) async fn end(self, progress: &Progress) -> Result<()> {
        for flow in self.flows {
            let place = flow.place;
            flow.end().await.with_context(|| place.to_string())?;
            progress.made();
        }
        Ok(())
    }
}

impl Flow {
    /// Sends until then, and waits until the sink has everything: how much that was.
    async fn up(&mut self, until: Instant, progress: &Progress) -> Result<u64> {
        let before = self.sent;
        while Instant::now() < until || self.sent == before {
            self.sent += self.id.send(&mut self.stream, self.sent, false).await.context("sending")?;
            progress.made();
        }
        finish(&mut self.stream, self.id, &mut self.sent).await.context("sending")?;
        self.count().await?;
        Ok(self.sent - before)
    }

    /// The sink has as much as was sent.
    async fn count(&mut self) -> Result<()> {
        let mut word = [0; 8];
        self.stream.read_exact(&mut word).await.context("waiting for the sink's count")?;
        let count = u64::from_le_bytes(word);
        ensure!(count == self.sent, "the sink has {count} bytes of {}", self.sent);
        Ok(())
    }

    /// Has the source send until then, and receives all of it: how much that was.
    async fn down(&mut self, until: Instant, progress: &Progress) -> Result<u64> {
        let before = self.check.total();
        self.stream.write_all(&[GO]).await.context("starting the source")?;
        let check = &mut self.check;
        let (mut from, mut to) = self.stream.split();
        let mut receive_all = pin!(async {
            loop {
                let taken = receive(&mut from, |_, bytes| check.take(bytes)).await.context("receiving")?;
                match taken {
                    Some(Ok(None)) => progress.made(),
                    Some(Ok(Some(mark))) => return anyhow::Ok(mark.total - before),
                    Some(Err(e)) => return Err(e),
                    None => bail!("the end after {} bytes, in the middle of a stream", check.total()),
                }
            }
        });
        tokio::select! {
            biased;
            early = &mut receive_all => {
                bail!("a mark after {} bytes, and nobody asked for it", early?)
            }
            () = tokio::time::sleep_until(until.into()) => {}
        }
        to.write_all(&[STOP]).await.context("stopping the source")?;
        receive_all.await
    }

    async fn end(mut self) -> Result<()> {
        self.stream.shutdown().await?;
        expect_end(&mut self.stream).await
    }
}
