//! The server of the load generator: the target of every workload, on the ports of [`port`].
//!
//! # Invariants
//! - A client sees a FIN where everything was right, and a reset where anything was not; the error goes to standard
//!   error.
//! - An idle connection holds no buffer.

use std::{
    future::pending,
    io,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    task::JoinSet,
};

use super::{
    buffer::receive,
    message::Request,
    port,
    soak::{READ_MAX, Receiver, SEEDS, Sender, Word, cut, pause, read_pause, read_size},
    stream::{Check, Id},
};

/// Connections that wait to be accepted: more than the load generator's client dials at a time.
const BACKLOG: u32 = 4096;
/// What starts a source, and what stops it.
pub(super) const GO: u8 = b'g';
/// See [`GO`].
pub(super) const STOP: u8 = b's';

/// What is done with the connections of a port.
#[derive(Clone, Copy, Debug)]
enum Service {
    Echo,
    Sink,
    Source,
    Messages,
    Soak,
}

const SERVICES: [(u16, Service); port::COUNT as usize] = [
    (port::ECHO, Service::Echo),
    (port::SINK, Service::Sink),
    (port::SOURCE, Service::Source),
    (port::MESSAGES, Service::Messages),
    (port::SOAK, Service::Soak),
];

/// A server that listens.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<(TcpListener, Service)>,
}

impl Server {
    /// Listens at `ip`, on the ports from `base` on. Needs a runtime of tokio.
    pub fn bind(ip: IpAddr, base: u16) -> Result<Self> {
        let listen = |(offset, service): (u16, Service)| {
            let port = base.checked_add(offset).context("the base port is too high")?;
            let addr = SocketAddr::new(ip, port);
            let socket = if ip.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            socket.set_reuseaddr(true)?;
            socket.bind(addr).with_context(|| format!("listening at {addr}"))?;
            Ok((socket.listen(BACKLOG)?, service))
        };
        Ok(Self { listeners: SERVICES.into_iter().map(listen).collect::<Result<_>>()? })
    }

    /// Serves until accepting fails. Connections belong to the runtime, and end with it.
    pub async fn run(self) -> Result<()> {
        let mut accepting = JoinSet::new();
        for (listener, service) in self.listeners {
            accepting.spawn(accept(listener, service));
        }
        match accepting.join_next().await {
            Some(ended) => ended.context("a listener panicked")?,
            None => pending().await,
        }
    }
}

/// Serves at `ip`, on the ports from `base` on, in this thread; calls `ready` when all of them listen.
pub fn serve(ip: IpAddr, base: u16, ready: impl FnOnce() -> io::Result<()>) -> Result<()> {
    raise_descriptors()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let server = Server::bind(ip, base)?;
        ready()?;
        server.run().await
    })
}

/// Lets this process have as many descriptors as it may.
pub(super) fn raise_descriptors() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the number of descriptors")
}

async fn accept(listener: TcpListener, service: Service) -> Result<()> {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            // It was reset while it waited.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(e) => return Err(e).with_context(|| format!("accepting connections ({service:?})")),
        };
        tokio::spawn(async move {
            if let Err(e) = converse(stream, service).await {
                eprintln!("{service:?}, connection from {peer}: {e:#}");
            }
        });
    }
}

async fn converse(mut stream: TcpStream, service: Service) -> Result<()> {
    stream.set_nodelay(true)?;
    let done = match service {
        Service::Echo => echo(&mut stream).await,
        Service::Sink => sink(&mut stream).await,
        Service::Source => source(&mut stream).await,
        Service::Messages => messages(&mut stream).await,
        Service::Soak => soak(&mut stream).await,
    };
    if done.is_err() {
        // The client is told by a reset: an end would say that everything was right.
        stream.set_zero_linger()?;
    }
    done
}

/// Sends back what comes, until the client's end.
async fn echo(stream: &mut TcpStream) -> Result<()> {
    while let Some(rest) = receive(stream, send_now).await? {
        stream.write_all(&rest?).await?;
    }
    Ok(())
}

/// Receives and checks, and says at every mark how much came. Not at the end: what stands behind half an end of a
/// connection does not come through every proxy (tinyproxy), and half-close is not what is measured.
async fn sink(stream: &mut TcpStream) -> Result<()> {
    let mut check = Check::new(None);
    while let Some(marked) = receive(stream, |_, bytes| check.take(bytes)).await? {
        if let Some(mark) = marked? {
            stream.write_all(&mark.total.to_le_bytes()).await?;
        }
    }
    check.ended()
}

/// Is told the stream's id; sends from each [`GO`] to the [`STOP`] that follows it, and then a mark.
async fn source(stream: &mut TcpStream) -> Result<()> {
    let mut word = [0; 8];
    if let Err(e) = stream.read_exact(&mut word).await {
        return if e.kind() == io::ErrorKind::UnexpectedEof { Ok(()) } else { Err(e.into()) };
    }
    let id = Id(u64::from_le_bytes(word));
    let mut sent = 0;
    let mut told = [0];
    while stream.read(&mut told).await? > 0 {
        ensure!(told == [GO], "{told:?} where a source is to be started");
        loop {
            // Without a system call as long as nothing has come.
            match stream.try_read(&mut told) {
                Ok(1) if told == [STOP] => break,
                Ok(n) => bail!("{:?} where a source is to be stopped", &told[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
            sent += id.send(stream, sent, false).await?;
        }
        finish(stream, id, &mut sent).await?;
    }
    Ok(())
}

/// Sends the rest of a block that has begun, and a mark.
pub(super) async fn finish(stream: &mut TcpStream, id: Id, sent: &mut u64) -> Result<()> {
    while !sent.is_multiple_of(super::stream::BLOCK as u64) {
        *sent += id.send(stream, *sent, true).await?;
    }
    Ok(stream.write_all(&id.mark(*sent)).await?)
}

/// Answers each request when all of it is there; ends after the last, and expects the client's end.
async fn messages(stream: &mut TcpStream) -> Result<()> {
    // A request that is not whole yet: most come in one piece, and are answered out of the common buffer.
    let mut partial = Vec::new();
    loop {
        let Some(done) = receive(stream, |stream, bytes| answer(stream, &mut partial, bytes)).await? else {
            ensure!(partial.is_empty(), "the end in the middle of a request");
            return Ok(());
        };
        let Answered { rest, last } = done?;
        stream.write_all(&rest).await?;
        if last {
            ensure!(partial.is_empty(), "bytes behind the last request");
            stream.shutdown().await?;
            return super::message::expect_end(stream).await;
        }
    }
}

/// What is to be done yet.
struct Answered {
    /// To be sent.
    rest: Vec<u8>,
    /// Whether to end then.
    last: bool,
}

fn answer(stream: &mut TcpStream, partial: &mut Vec<u8>, bytes: &[u8]) -> Result<Answered> {
    if partial.is_empty()
        && let Some(Request { size, last }) = Request::parse(bytes)?
        && size == bytes.len()
    {
        return Ok(Answered { rest: send_now(stream, bytes)?, last });
    }
    partial.extend_from_slice(bytes);
    let mut rest = Vec::new();
    while let Some(Request { size, last }) = Request::parse(partial)?
        && size <= partial.len()
    {
        rest.extend(partial.drain(..size));
        if last {
            return Ok(Answered { rest, last });
        }
    }
    Ok(Answered { rest, last: false })
}

/// Is told both seeds; sends from each start to the stop that follows it, and receives all the time.
async fn soak(stream: &mut TcpStream) -> Result<()> {
    let mut seeds = [0; SEEDS];
    if let Err(e) = stream.read_exact(&mut seeds).await {
        return if e.kind() == io::ErrorKind::UnexpectedEof { Ok(()) } else { Err(e.into()) };
    }
    let seed = |at: usize| seeds[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    let (mut up, mut down) = (Receiver::new(seed(0)), Sender::new(seed(SEEDS / 2)));
    let (mut from, mut to) = stream.split();
    let (phase, mut told) = watch::channel(Told::default());
    let receive = async {
        let mut buffer = vec![0; READ_MAX];
        loop {
            let n = from.read(&mut buffer[..read_size()]).await.context("receiving")?;
            let mut bytes = &buffer[..n];
            if n == 0 {
                let Told { starts, stops, .. } = *phase.borrow();
                ensure!(starts == stops && up.between_frames(), "the end in the middle of a stream");
                phase.send_modify(|told| told.over = true);
                return anyhow::Ok(());
            }
            while let Some(word) = up.take(&mut bytes)? {
                phase.send_modify(|told| match word {
                    Word::Go => told.starts += 1,
                    Word::Stop => told.stops += 1,
                });
            }
            if let Some(length) = read_pause() {
                tokio::time::sleep(length).await;
            }
        }
    };
    let send = async {
        for turn in 0.. {
            // A start and its stop may have come at once.
            if told.wait_for(|told| told.starts > turn || told.over).await?.starts <= turn {
                return Ok(());
            }
            while told.borrow().stops <= turn {
                let mut frame = down.frame();
                while !frame.is_empty() {
                    let (now, rest) = frame.split_at(cut(frame.len()));
                    to.write_all(now).await.context("sending")?;
                    frame = rest;
                }
                if let Some(length) = pause() {
                    tokio::time::sleep(length).await;
                }
            }
            to.write_all(&down.stop()).await.context("sending the stop")?;
        }
        Ok(())
    };
    tokio::try_join!(receive, send).map(drop)
}

/// What a soaked connection's server was told so far.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    starts: u32,
    stops: u32,
    over: bool,
}

/// Sends what can be sent without waiting; the rest.
fn send_now(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    match stream.try_write(bytes) {
        Ok(n) => Ok(bytes[n..].to_vec()),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(bytes.to_vec()),
        Err(e) => Err(e),
    }
}
