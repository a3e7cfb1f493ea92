//! An integrity soak: every connection carries both directions at once, in random sizes and with random pauses.
//!
//! Half of the connections belong to programs that block in their calls, with a thread for each direction, the others to
//! one that waits for readiness. An error that a call gives, whatever it is, ends the run: plain TCP gives none.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr},
    os::fd::{AsFd as _, AsRawFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{MsgFlags, send};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use super::{Place, Progress, after, dial};
use crate::load::{
    Outcome,
    message::expect_end,
    soak::{READ_MAX, Receiver, Sender, Word, cut, pause, read_pause, read_size},
};

/// All connections.
#[derive(Debug)]
pub(super) struct Soak {
    flows: Vec<Flow>,
}

#[derive(Debug)]
struct Flow {
    place: Place,
    /// Whether its calls block.
    blocking: bool,
    stream: TcpStream,
    up: Sender,
    down: Receiver,
}

impl Soak {
    pub(super) async fn new(to: SocketAddr, connections: u32) -> Result<Self> {
        let mut flows = Vec::new();
        for index in 0..usize::try_from(connections)? {
            let mut stream = dial(to).await?;
            let (up, down) = (fastrand::u64(..), fastrand::u64(..));
            stream.write_all(&[up.to_le_bytes(), down.to_le_bytes()].concat()).await?;
            let (place, blocking) = (Place { to, index }, index % 2 == 0);
            flows.push(Flow { place, blocking, stream, up: Sender::new(up), down: Receiver::new(down) });
        }
        Ok(Self { flows })
    }

    pub(super) async fn run(&mut self, length: Duration, progress: &Progress) -> Result<Outcome> {
        let (start, until) = (Instant::now(), after(length)?);
        let before = self.totals();
        let mut blocked = Blocked(Vec::new());
        let mut running = JoinSet::new();
        for flow in self.flows.drain(..) {
            let progress = progress.clone();
            let place = flow.place;
            if flow.blocking {
                blocked.0.push(flow.stream.as_fd().try_clone_to_owned()?.into());
                running
                    .spawn_blocking(move || flow.block(until, &progress).with_context(|| place.to_string()));
            } else {
                running.spawn(
                    async move { flow.wait(until, &progress).await.with_context(|| place.to_string()) },
                );
            }
        }
        while let Some(done) = running.join_next().await {
            self.flows.push(done.context("a connection panicked")??);
        }
        blocked.0.clear();
        let ((up, down), seconds) = (self.totals(), start.elapsed().as_secs_f64());
        let (bytes_up, bytes_down) = (up - before.0, down - before.1);
        Ok(Outcome { seconds, bytes_up, bytes_down, ..Outcome::default() })
    }

    /// Up, which the server has found right: its own stop comes behind its check of ours; and down.
    fn totals(&self) -> (u64, u64) {
        self.flows.iter().fold((0, 0), |(up, down), flow| (up + flow.up.total(), down + flow.down.total()))
    }

    pub(super) async fn end(self, progress: &Progress) -> Result<()> {
        for mut flow in self.flows {
            let place = flow.place;
            flow.stream.shutdown().await?;
            expect_end(&mut flow.stream).await.with_context(|| place.to_string())?;
            progress.made();
        }
        Ok(())
    }
}

/// The sockets that threads block on: dropped before it is cleared, it wakes them, and they end. Nothing else does.
struct Blocked(Vec<std::net::TcpStream>);

impl Drop for Blocked {
    fn drop(&mut self) {
        for socket in &self.0 {
            // One that is gone wakes its threads by itself.
            let _gone = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Flow {
    /// With calls that block.
    fn block(self, until: Instant, progress: &Progress) -> Result<Self> {
        let Self { place, blocking, stream, mut up, mut down } = self;
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        let (mut to, mut from) = (&stream, &stream);
        to.write_all(&up.go()).context("starting the server")?;
        thread::scope(|scope| -> Result<()> {
            let sending = scope.spawn(|| -> Result<()> {
                while Instant::now() < until {
                    let mut frame = up.frame();
                    while !frame.is_empty() {
                        let (now, rest) = frame.split_at(cut(frame.len()));
                        to.write_all(now).context("sending")?;
                        frame = rest;
                    }
                    progress.made();
                    wait_a_while(pause());
                }
                to.write_all(&up.stop()).context("sending the stop")
            });
            let mut buffer = vec![0; READ_MAX];
            let mut receive = || -> Result<()> {
                loop {
                    let size = read_size();
                    // Not `read_exact`, which would hide that a call was interrupted or found nothing.
                    let n = from.read(&mut buffer[..size]).context("receiving")?;
                    if taken(&stream, &mut down, &buffer[..n])? {
                        return Ok(());
                    }
                    progress.made();
                    wait_a_while(read_pause());
                }
            };
            let received = receive();
            if received.is_err() {
                // The sender may wait for a server that will not read again.
                let _gone = stream.shutdown(Shutdown::Both);
            }
            let sent = sending.join().unwrap_or_else(|_| bail!("the sender panicked"));
            received.and(sent)
        })?;
        stream.set_nonblocking(true)?;
        Ok(Self { place, blocking, stream: TcpStream::from_std(stream)?, up, down })
    }

    /// With calls that are made when the kernel says so.
    async fn wait(mut self, until: Instant, progress: &Progress) -> Result<Self> {
        let (mut from, mut to) = self.stream.split();
        let (up, down) = (&mut self.up, &mut self.down);
        to.write_all(&up.go()).await.context("starting the server")?;
        let send = async {
            while Instant::now() < until {
                let mut frame = up.frame();
                while !frame.is_empty() {
                    let (now, rest) = frame.split_at(cut(frame.len()));
                    to.write_all(now).await.context("sending")?;
                    frame = rest;
                }
                progress.made();
                if let Some(length) = pause() {
                    tokio::time::sleep(length).await;
                }
            }
            to.write_all(&up.stop()).await.context("sending the stop")
        };
        let receive = async {
            let mut buffer = vec![0; READ_MAX];
            loop {
                let size = read_size();
                let n = from.read(&mut buffer[..size]).await.context("receiving")?;
                if taken(from.as_ref(), down, &buffer[..n])? {
                    return anyhow::Ok(());
                }
                progress.made();
                if let Some(length) = read_pause() {
                    tokio::time::sleep(length).await;
                }
            }
        };
        tokio::try_join!(send, receive)?;
        Ok(self)
    }
}

/// Whether the server has stopped; nothing is its end, which comes too early, or a reset of which the sender was told: the
/// kernel says so once.
fn taken(socket: &impl AsRawFd, down: &mut Receiver, bytes: &[u8]) -> Result<bool> {
    if bytes.is_empty() {
        let reset = send(socket.as_raw_fd(), &[], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).is_err();
        bail!("the {} after {} bytes", if reset { "reset" } else { "end" }, down.total());
    }
    let mut rest = bytes;
    match down.take(&mut rest)? {
        None => Ok(false),
        Some(Word::Stop) if rest.is_empty() => Ok(true),
        Some(word) => bail!("{word:?}, and {} bytes behind it", rest.len()),
    }
}

#[expect(clippy::disallowed_methods, reason = "a program that blocks: it has threads for that")]
fn wait_a_while(pause: Option<Duration>) {
    if let Some(length) = pause {
        thread::sleep(length);
    }
}
