//! A scripted gateway: HTTP/2 over mTLS, frame by frame, in which a test's script decides on every answer.
//!
//! # Invariants
//! - Only the frames that keep a connection alive (SETTINGS, PING) are answered without the script.
//! - A script that fails, fails the test that waits for its end.

use std::{future::Future, net::SocketAddr, sync::mpsc, thread::JoinHandle};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{net::TcpListener, runtime, sync::oneshot, task};
use tokio_rustls::TlsAcceptor;

use crate::{
    hop,
    netns::NetNs,
    pattern::UP,
    pki::Credentials,
    raw::{
        self, ACK, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, RST_STREAM, Receiver,
        SETTINGS, Sender, WINDOW_UPDATE,
    },
    wait::PATIENCE,
};

/// `:status: 200`, which the static table has at 8 (RFC 7541 appendix A).
const OK: u8 = 0x88;
/// What a stream may bring before its answer, and what all may: more than any script waits for.
const WINDOW: u32 = 1 << 20;

/// A running one.
pub struct Script {
    addr: SocketAddr,
    played: mpsc::Receiver<Result<()>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// One connection, in the hands of a script.
pub struct Talk {
    sender: Sender,
    receiver: Receiver,
}

impl Script {
    /// Starts one on `host` that shows this certificate; returns when it listens. `play` is called for each connection,
    /// with its number from 1 on.
    pub fn start<F, Fut>(host: &NetNs, addr: SocketAddr, who: &Credentials, play: F) -> Result<Self>
    where
        F: Fn(usize, Talk) -> Fut + Send + 'static,
        Fut: Future<Output = Result<()>> + 'static,
    {
        let acceptor = hop::acceptor(who)?;
        let (stop, stopped) = oneshot::channel();
        let ((tell, told), (done, played)) = (mpsc::channel(), mpsc::channel());
        let thread = host.spawn("script", move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            task::LocalSet::new().block_on(&runtime, async {
                let listener = TcpListener::bind(addr).await?;
                tell.send(listener.local_addr()?)?;
                tokio::select! {
                    served = serve(listener, acceptor, play, done) => served,
                    _ = stopped => Ok(()),
                }
            })
        })?;
        let addr = told.recv_timeout(PATIENCE).context("it does not listen")?;
        Ok(Self { addr, played, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Waits until a connection was played to its end, as it should.
    pub fn played(&self) -> Result<()> {
        self.played.recv_timeout(PATIENCE).context("no script has come to its end")?
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Ok(Err(e))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("script {}: {e:#}", self.addr);
        }
        for failed in self.played.try_iter().filter_map(Result::err) {
            eprintln!("script {}: {failed:#}", self.addr);
        }
    }
}

async fn serve<Fut: Future<Output = Result<()>> + 'static>(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    play: impl Fn(usize, Talk) -> Fut,
    done: mpsc::Sender<Result<()>>,
) -> Result<()> {
    for number in 1.. {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        // SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113 section 6.5.2).
        let mut settings = vec![0, 4];
        settings.extend(WINDOW.to_be_bytes());
        let (mut sender, receiver) = raw::accept(acceptor.accept(tcp).await?, &settings).await?;
        sender.frame(WINDOW_UPDATE, 0, 0, &WINDOW.to_be_bytes()).await?;
        let (playing, done) = (play(number, Talk { sender, receiver }), done.clone());
        task::spawn_local(async move { done.send(playing.await) });
    }
    Ok(())
}

impl Talk {
    /// The next frame of any stream; `None` when the connection is closed.
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        while let Some(frame) = self.receiver.frame().await? {
            match (frame.kind, frame.flags & ACK != 0) {
                (SETTINGS, false) => self.sender.frame(SETTINGS, ACK, 0, &[]).await?,
                (PING, false) => self.sender.frame(PING, ACK, 0, &frame.payload).await?,
                (HEADERS | DATA | RST_STREAM, _) => return Ok(Some(frame)),
                _ => {}
            }
        }
        Ok(None)
    }

    /// Waits for a request; its stream.
    pub async fn request(&mut self) -> Result<u32> {
        let frame = self.next().await?.context("the connection was closed before a request")?;
        ensure!(frame.kind == HEADERS, "no request, but {frame:?}");
        Ok(frame.stream)
    }

    /// Waits for bytes of an application's, from `offset` to `end`, and for nothing else. Whether the stream's end came
    /// with them.
    pub async fn bytes(&mut self, stream: u32, offset: usize, end: usize) -> Result<bool> {
        let (mut at, mut ended) = (offset, false);
        while at < end {
            let frame = self.next().await?.with_context(|| format!("closed at byte {at}"))?;
            ensure!((frame.kind, frame.stream) == (DATA, stream), "no DATA at byte {at}, but {frame:?}");
            UP.check(at as u64, &frame.payload)?;
            at += frame.payload.len();
            ended = frame.flags & END_STREAM != 0;
        }
        ensure!(at == end, "{at} bytes came, where {end} should");
        Ok(ended)
    }

    /// Waits for a stream's end, with nothing in front of it.
    pub async fn end(&mut self, stream: u32) -> Result<()> {
        match self.next().await? {
            Some(Frame { kind: DATA, flags, stream: of, payload })
                if of == stream && flags & END_STREAM != 0 && payload.is_empty() =>
            {
                Ok(())
            }
            other => bail!("no end, but {other:?}"),
        }
    }

    /// Waits for a stream's reset, whatever is in front of it; its code.
    pub async fn reset(&mut self, stream: u32) -> Result<u32> {
        loop {
            let frame = self.next().await?.context("closed without a reset")?;
            if (frame.kind, frame.stream) == (RST_STREAM, stream) {
                return frame.code().context("a reset without a code");
            }
        }
    }

    /// Answers 200.
    pub async fn accept(&mut self, stream: u32) -> Result<()> {
        self.sender.frame(HEADERS, END_HEADERS, stream, &[OK]).await
    }

    /// Answers with another status, and ends the stream.
    pub async fn refuse(&mut self, stream: u32, status: &str) -> Result<()> {
        let block = raw::field(b":status", status.as_bytes());
        self.sender.frame(HEADERS, END_HEADERS | END_STREAM, stream, &block).await
    }

    /// Resets a stream.
    pub async fn cut(&mut self, stream: u32, code: u32) -> Result<()> {
        self.sender.frame(RST_STREAM, 0, stream, &code.to_be_bytes()).await
    }

    /// GOAWAY: no stream beyond this one was acted on.
    pub async fn leave(&mut self, last: u32) -> Result<()> {
        self.sender.frame(GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat()).await
    }

    /// Sends bytes of a target's, from its first, and the end if it is to come.
    pub async fn send(&mut self, stream: u32, bytes: &[u8], ended: bool) -> Result<()> {
        self.sender.frame(DATA, if ended { END_STREAM } else { 0 }, stream, bytes).await
    }

    /// Sends back what comes on a stream, to its end.
    pub async fn echo(&mut self, stream: u32) -> Result<()> {
        while let Some(frame) = self.next().await? {
            ensure!((frame.kind, frame.stream) == (DATA, stream), "no DATA, but {frame:?}");
            self.sender.frame(DATA, frame.flags, stream, &frame.payload).await?;
            if frame.flags & END_STREAM != 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Holds the connection until the other side closes it; nothing may come meanwhile.
    pub async fn hold(&mut self) -> Result<()> {
        match self.next().await? {
            None => Ok(()),
            Some(frame) => bail!("something more: {frame:?}"),
        }
    }
}
