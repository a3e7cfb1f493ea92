//! Small scripted servers on a host. A [`Handler`] plays a connection, and the functions here make the common ones; a
//! [`Target`] records who connected and how each connection ended.
//!
//! # Invariants
//! - Every connection is played to its end by a thread of its own, and a target that is dropped has ended all of them.

use std::{
    cell::RefCell,
    fmt,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, shutdown, sockopt},
};

use crate::{
    netns::NetNs,
    pattern::{CHUNK, DOWN, UP},
    wait::{self, PATIENCE, wait_for},
};

/// A conversation with one client.
pub trait Handler: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static {}

impl<F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static> Handler for F {}

thread_local! {
    /// In the thread of a conversation: its target.
    static TARGET: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

/// Whether this is a conversation of a target that is ending.
fn is_stopping() -> bool {
    TARGET.with_borrow(|target| target.as_ref().is_some_and(|t| t.stopping.load(Ordering::Relaxed)))
}

/// How soon a conversation that waits for a gate notices that its target is ending.
const GLANCE: Duration = Duration::from_millis(20);

/// Handlers keep their buffers on the heap; a test holds a thousand of them.
const STACK: usize = 256 * 1024;

/// A server.
pub struct Target {
    addr: SocketAddr,
    shared: Arc<Shared>,
    listener: TcpListener,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stopping: AtomicBool,
    peers: Mutex<Vec<SocketAddr>>,
    open: Mutex<Vec<(TcpStream, JoinHandle<()>)>>,
    outcomes: Mutex<Vec<Result<(), String>>>,
}

impl Target {
    /// Starts one on a host; port 0 means any.
    pub fn start(host: &NetNs, addr: SocketAddr, handler: impl Handler) -> Result<Self> {
        let listener = host.run(|| TcpListener::bind(addr)).with_context(|| format!("a target at {addr}"))?;
        // The backlog of std is 128; a test opens a thousand connections at once.
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
        let (addr, shared) = (listener.local_addr()?, Arc::new(Shared::default()));
        let (accepting, state) = (listener.try_clone()?, Arc::clone(&shared));
        let acceptor = host.spawn("target", move || accept(&accepting, &state, &Arc::new(handler)))?;
        Ok(Self { addr, shared, listener, acceptor: Some(acceptor) })
    }

    /// Where it is.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Who has connected so far. That a connection stands, its client learns from the kernel: those that still wait
    /// to be accepted count, and are waited for.
    pub fn peers(&self) -> Vec<SocketAddr> {
        loop {
            let accepts = self.acceptor.as_ref().is_some_and(|acceptor| !acceptor.is_finished());
            let peers = lock(&self.shared.peers);
            if !accepts || !is_readable(&self.listener, PollTimeout::ZERO) {
                return peers.clone();
            }
            drop(peers);
            thread::yield_now();
        }
    }

    /// Waits until `n` clients have connected.
    pub fn connected(&self, n: usize) -> Result<()> {
        let what = format!("{n} clients of {}", self.addr);
        wait_for(&what, PATIENCE, || (lock(&self.shared.peers).len() >= n).then_some(()))
    }

    /// Waits until `n` conversations have ended, and says how.
    pub fn outcomes(&self, n: usize) -> Result<Vec<Result<(), String>>> {
        let what = format!("{n} conversations to end at {}", self.addr);
        wait_for(&what, PATIENCE, || {
            let outcomes = lock(&self.shared.outcomes);
            (outcomes.len() >= n).then(|| outcomes.clone())
        })
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        // It wakes poll(2), and accept(2) fails with EINVAL.
        let _woken = shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _panicked = acceptor.join();
        }
        let open = std::mem::take(&mut *lock(&self.shared.open));
        for (stream, _) in &open {
            let _gone = stream.shutdown(Shutdown::Both);
        }
        for (stream, conversation) in open {
            drop(stream);
            let _panicked = conversation.join();
        }
        if wait::failing() {
            let failed: Vec<_> =
                lock(&self.shared.outcomes).iter().filter_map(|o| o.clone().err()).take(10).collect();
            let peers = lock(&self.shared.peers).len();
            eprintln!("target {}: {peers} connections; failures, at most 10 shown: {failed:?}", self.addr);
        }
    }
}

/// Whether there is a connection to accept, or there will never be one again.
fn is_readable(listener: &TcpListener, limit: PollTimeout) -> bool {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, limit).is_ok_and(|ready| ready > 0)
}

/// The next connection. Under one lock with being counted: who finds none waiting has them all.
fn next(listener: &TcpListener, shared: &Shared) -> Option<TcpStream> {
    is_readable(listener, PollTimeout::NONE);
    let mut peers = lock(&shared.peers);
    let (stream, peer) = listener.accept().ok()?;
    peers.push(peer);
    Some(stream)
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, handler: &Arc<impl Handler>) {
    while let Some(stream) = next(listener, shared) {
        if shared.stopping.load(Ordering::Relaxed) {
            return;
        }
        let Ok(ours) = stream.try_clone() else { return };
        let (handler, state) = (Arc::clone(handler), Arc::clone(shared));
        let play = move || {
            TARGET.set(Some(Arc::clone(&state)));
            let outcome = handler(&stream).map_err(|e| e.to_string());
            // Ends the connection although `open` holds a duplicate; nothing happens to one that was reset.
            let _gone = stream.shutdown(Shutdown::Both);
            lock(&state.outcomes).push(outcome);
        };
        match thread::Builder::new().stack_size(STACK).spawn(play) {
            Ok(conversation) => lock(&shared.open).push((ours, conversation)),
            Err(e) => lock(&shared.outcomes).push(Err(e.to_string())),
        }
    }
}

/// Sends back what comes, until the client's end; then ends too.
pub fn echo() -> impl Handler {
    |stream: &TcpStream| {
        let (mut from, mut to) = (stream, stream);
        let mut buf = vec![0; CHUNK];
        loop {
            match from.read(&mut buf)? {
                0 => return Ok(()),
                n => to.write_all(&buf[..n])?,
            }
        }
    }
}

/// Answers so many single bytes, for an application that opens "ADDR+N", and then does something
/// else.
pub fn after_pings(n: usize, then: impl Handler) -> impl Handler {
    move |stream: &TcpStream| {
        let (mut from, mut to) = (stream, stream);
        for _ in 0..n {
            let mut byte = [0];
            from.read_exact(&mut byte)?;
            to.write_all(&byte)?;
        }
        then(stream)
    }
}

/// Receives and sends `bytes`, both at once, checks every one, then waits for the client's end.
pub fn duplex(bytes: u64) -> impl Handler {
    move |stream: &TcpStream| both_ways(stream, bytes).and_then(|()| end(stream))
}

/// The same, but it is the target that ends first.
pub fn duplex_then_end(bytes: u64) -> impl Handler {
    move |stream: &TcpStream| both_ways(stream, bytes)
}

fn both_ways(stream: &TcpStream, bytes: u64) -> io::Result<()> {
    let (mut from, mut to) = (stream, stream);
    thread::scope(|scope| {
        let sending = scope.spawn(move || DOWN.send(&mut to, bytes));
        let received = UP.receive(&mut from, bytes);
        sending.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())).and(received)
    })
}

/// Receives until the client's end, checks, and only then sends as much.
pub fn answer_after_end() -> impl Handler {
    |stream: &TcpStream| {
        let (mut from, mut to) = (stream, stream);
        let n = UP.receive_to_end(&mut from)?;
        DOWN.send(&mut to, n)
    }
}

/// Sends `bytes` and its end, and only then receives as much, and the client's end.
pub fn end_then_listen(bytes: u64) -> impl Handler {
    move |stream: &TcpStream| {
        let (mut from, mut to) = (stream, stream);
        DOWN.send(&mut to, bytes)?;
        stream.shutdown(Shutdown::Write)?;
        UP.receive(&mut from, bytes)?;
        end(stream)
    }
}

/// Receives `bytes`, sends one, and resets the connection.
pub fn reset_after(bytes: u64) -> impl Handler {
    move |stream: &TcpStream| {
        let (mut from, mut to) = (stream, stream);
        UP.receive(&mut from, bytes)?;
        to.write_all(&[0])?;
        reset(stream)
    }
}

/// Receives `bytes`, says so with one byte, and expects the client to reset the connection.
pub fn expect_reset_after(bytes: u64) -> impl Handler {
    move |stream: &TcpStream| {
        let (mut from, mut to) = (stream, stream);
        UP.receive(&mut from, bytes)?;
        to.write_all(&[0])?;
        match from.read(&mut [0]) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(e) => Err(e),
            Ok(n) => Err(io::Error::other(format!("{n} bytes where a reset should be"))),
        }
    }
}

/// Sends a line with the client's address, then waits for its end.
pub fn name_the_peer() -> impl Handler {
    |stream: &TcpStream| {
        let mut to = stream;
        writeln!(to, "{}", stream.peer_addr()?)?;
        end(stream)
    }
}

/// Receives nothing until `gate` opens; then everything, checked, to the client's end.
pub fn slow_reader(gate: &Gate, counted: &Arc<AtomicU64>) -> impl Handler {
    let (gate, counted) = (gate.clone(), Arc::clone(counted));
    move |stream: &TcpStream| {
        gate.wait();
        let mut from = stream;
        counted.store(UP.receive_to_end(&mut from)?, Ordering::Relaxed);
        Ok(())
    }
}

/// Offers `bytes` and counts what the kernel has taken so far; then its end.
pub fn offer(bytes: u64, counted: &Arc<AtomicU64>) -> impl Handler {
    let counted = Arc::clone(counted);
    move |stream: &TcpStream| {
        let mut to = stream;
        let mut buf = vec![0; 16 * 1024];
        let mut at = 0;
        while at < bytes {
            let n = usize::try_from(bytes - at).map_or(buf.len(), |left| left.min(buf.len()));
            DOWN.fill(at, &mut buf[..n]);
            let mut rest = &buf[..n];
            while !rest.is_empty() {
                let written = to.write(rest)?;
                rest = &rest[written..];
                counted.fetch_add(written as u64, Ordering::Relaxed);
            }
            at += n as u64;
        }
        Ok(())
    }
}

/// An HTTP/1.x proxy that serves CONNECT; notes what it is asked for.
pub fn connect_proxy(asked: &Arc<Mutex<Vec<String>>>) -> impl Handler {
    let asked = Arc::clone(asked);
    move |stream: &TcpStream| {
        let mut head = BufReader::new(stream);
        let mut first = String::new();
        head.read_line(&mut first)?;
        let mut line = String::from("?");
        while !line.trim_end().is_empty() {
            line.clear();
            head.read_line(&mut line)?;
        }
        let authority = first.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next());
        let authority = authority.ok_or_else(|| io::Error::other(format!("no CONNECT: {first}")))?;
        lock(&asked).push(authority.to_owned());
        let onward = TcpStream::connect(authority)?;
        let mut to = stream;
        to.write_all(b"HTTP/1.0 200 Connection established\r\n\r\n")?;
        // The client waits for the answer: nothing of the tunnel can be in the buffer already.
        thread::scope(|scope| {
            let back = scope.spawn(|| copy(&onward, stream));
            copy(stream, &onward)?;
            back.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        })
    }
}

/// An HTTP/1.1 proxy that takes one request, and answers 200 when nothing has come behind it for `a_while`; then it is
/// the target itself, of [`duplex_then_end`].
pub fn late_proxy(a_while: Duration, bytes: u64) -> impl Handler {
    move |stream: &TcpStream| {
        let (mut from, mut to) = (stream, stream);
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            from.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        stream.set_read_timeout(Some(a_while))?;
        match from.read(&mut byte) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => return Err(io::Error::other(format!("{other:?} behind the head, before the answer"))),
        }
        stream.set_read_timeout(None)?;
        to.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
        both_ways(stream, bytes)
    }
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}

/// Answers every datagram with "pong", until it drops.
#[derive(Debug)]
pub struct UdpTarget {
    addr: SocketAddr,
    stopping: Arc<AtomicBool>,
    answering: Option<JoinHandle<()>>,
}

impl UdpTarget {
    /// Starts one on a host; port 0 means any.
    pub fn start(host: &NetNs, addr: SocketAddr) -> Result<Self> {
        let socket = host.run(|| UdpSocket::bind(addr))?;
        // No signal ends recv; a stop is noticed this much later.
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let (addr, stopping) = (socket.local_addr()?, Arc::new(AtomicBool::new(false)));
        let stop = Arc::clone(&stopping);
        let answer = move || {
            while !stop.load(Ordering::Relaxed) {
                if let Ok((_, peer)) = socket.recv_from(&mut [0; 64]) {
                    let _lost = socket.send_to(b"pong", peer);
                }
            }
        };
        Ok(Self { addr, stopping, answering: Some(host.spawn("udp", answer)?) })
    }

    /// Where it is.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for UdpTarget {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(answering) = self.answering.take() {
            let _panicked = answering.join();
        }
    }
}

/// Holds those who wait until it opens.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    /// Lets everybody through.
    pub fn open(&self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_all();
    }

    /// Waits until it opens, or the target whose conversation waits here ends: a test that fails before it has
    /// opened the gate must not wait for it.
    pub fn wait(&self) {
        let mut open = lock(&self.0.0);
        while !*open && !is_stopping() {
            let waited = self.0.1.wait_timeout(open, GLANCE);
            open = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Waits for the client's end; bytes in front of it are an error.
fn end(mut stream: &TcpStream) -> io::Result<()> {
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::other("more bytes than there should be")),
    }
}

/// Makes the kernel send RST: close with SO_LINGER 0 needs the last descriptor, disconnecting does not.
pub fn reset(stream: &TcpStream) -> io::Result<()> {
    setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    // AF_UNSPEC is 0 (linux/socket.h).
    let nobody = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
    const LENGTH: libc::socklen_t = 16;
    // SAFETY: the address is valid for `LENGTH` bytes and the descriptor is open.
    // tcp_disconnect (net/ipv4/tcp.c) sends RST on a connection that is up.
    match unsafe { libc::connect(stream.as_raw_fd(), &raw const nobody, LENGTH) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
