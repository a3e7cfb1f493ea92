//! A TCP socket as a leg.
//!
//! # Invariants
//! - Closed before both directions ended, be it by a drop or by the death of this process, it sends RST, never a clean FIN.
//! - An idle leg holds no buffer.

use std::{
    cell::Cell,
    future::Future,
    io::{self, IoSlice, Read as _},
    mem,
    net::Shutdown,
    ops::Deref,
    os::fd::AsFd,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream};

use super::{
    Broken, Cause, Leg, Queue,
    bypass::Hot,
    silence::{Socket, timed_out},
};
use crate::{
    kernel::bypass::Candidate,
    transport::{
        sockopt::{self, at_mark, progress, unacknowledged, unread},
        tcp,
    },
};

/// The first read of a flow, and the least later ones: a request fits.
const READ_MIN: usize = 4 * 1024;
/// What is copied out of the buffer that it was read into: cheaper than to allocate another one of those.
const COPIED: usize = 1024;
/// The most one read takes: a DATA frame of ours, which fills four TLS records; beyond it the profile of a bulk flow no
/// longer changes.
const READ_MAX: usize = 64 * 1024 - 9;

/// After so many bytes to a peer it is looked whether that is on this machine: its own congestion control takes longer
/// than this to matter, and most flows never send as much.
const MUCH: usize = 256 * 1024;

/// See the module.
pub struct TcpLeg {
    /// None while the kernel moves the flow's bytes, or once it has moved the last one ([`take`](TcpLeg::take)).
    stream: Option<Rc<Socket>>,
    /// Of [`MUCH`], what is still to be sent.
    until_much: usize,
    /// 0: it is to be asked whether the runtime has heard of anything or not.
    next_read: usize,
    error: ErrorWatch,
    /// The first error that the kernel told other than by a read. It tells each once, and a read then says that the
    /// connection has ended.
    failed: Option<i32>,
    /// Of a captured connection that may go past TCP.
    hot: Option<Box<Hot>>,
    /// A kernel program may have passed bytes to it, and what is wrong with its account of memory is counted here.
    taken_by: Option<Rc<Accounts>>,
}

impl TcpLeg {
    /// Takes over a connected socket.
    pub fn new(stream: TcpStream) -> Self {
        abort_on_close(&stream);
        let mut leg = Self::aborting(stream);
        leg.until_much = MUCH;
        leg
    }

    /// The same of one that was just made.
    pub fn connected(connected: tcp::Connected) -> Self {
        let mut leg = Self::new(connected.stream);
        if let Some(e) = connected.failed {
            leg.note(&e);
        }
        leg
    }

    /// The same of one that was accepted from a listener with [`OnClose::Abort`](crate::transport::tcp::OnClose), and so
    /// aborts already.
    pub fn aborting(stream: TcpStream) -> Self {
        Self::captured(stream, None)
    }

    /// The same of a captured connection, which may ask to go past TCP.
    pub fn captured(stream: TcpStream, bypass: Option<Candidate>) -> Self {
        Self {
            stream: Some(Socket::new(stream)),
            until_much: 0,
            next_read: READ_MIN,
            error: ErrorWatch::default(),
            failed: None,
            hot: bypass.map(|candidate| Box::new(Hot::new(candidate))),
            taken_by: None,
        }
    }

    /// From now on its socket is read and written in other ways than by this leg, which those of a bypass do not stand.
    pub(super) fn stay_with_tcp(&mut self) {
        self.hot = None;
    }
}

pub(super) fn reset(e: io::Error) -> Broken {
    Broken::Reset(Cause::Tcp(e))
}

/// Waits for EPOLLERR; made when it is first needed.
#[derive(Default)]
pub(super) struct ErrorWatch(Option<Pin<Box<dyn Future<Output = io::Error>>>>);

impl ErrorWatch {
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, stream: &Rc<Socket>) -> Poll<io::Error> {
        let error = self.0.get_or_insert_with(|| {
            let stream = Rc::clone(stream);
            Box::pin(async move { tcp::error_of(&stream).await })
        });
        let e = ready!(error.as_mut().poll(cx));
        // It is polled no more than to its end.
        self.0 = None;
        Poll::Ready(e)
    }
}

/// Sends FIN.
pub(super) fn shut_down(stream: &impl AsFd) -> Result<(), Broken> {
    match SockRef::from(stream).shutdown(Shutdown::Write) {
        // The peer closed both directions, and then the connection went away: nothing is lost.
        Err(e) if e.kind() != io::ErrorKind::NotConnected => Err(reset(e)),
        _ => Ok(()),
    }
}

thread_local! {
    /// A buffer for a first read, which most reads of a flow are: one for each worker, when it is not in use.
    static SPARE: Cell<BytesMut> = Cell::default();
}

/// Room for one read.
struct Room(BytesMut);

impl Room {
    fn take(size: usize) -> Self {
        if size == READ_MIN {
            let spare = SPARE.take();
            if spare.capacity() == READ_MIN {
                return Self(spare);
            }
        }
        Self(BytesMut::with_capacity(size))
    }

    /// What was read: few bytes in a buffer of their own size, so that they hold no more than that while they wait, and
    /// this one is there for the next read.
    fn filled(mut self) -> Bytes {
        if self.0.capacity() == READ_MIN && self.0.len() <= COPIED {
            return Bytes::copy_from_slice(&self.0);
        }
        mem::take(&mut self.0).freeze()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.0.capacity() == READ_MIN {
            self.0.clear();
            SPARE.set(mem::take(&mut self.0));
        }
    }
}

/// From here on a close is clean: what is queued still has to arrive.
pub(super) fn let_arrive(stream: &impl AsFd) {
    // Fails only on a socket that is gone already.
    let _gone = SockRef::from(stream).set_linger(None);
}

impl Leg for TcpLeg {
    fn prefetches(&self) -> bool {
        false
    }

    fn ask_now(&mut self) {
        self.next_read = 0;
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        if self.next_read == 0 {
            self.next_read = READ_MIN;
            if let Some(first) = self.recv_unheard() {
                if let Ok(None) = first {
                    return Poll::Ready(self.ended());
                }
                if let (Some(hot), Some(stream), Ok(Some(bytes))) = (&mut self.hot, &self.stream, &first) {
                    hot.received(bytes.len(), stream);
                }
                return Poll::Ready(first);
            }
        }
        loop {
            ready!(self.stream().poll_read_ready(cx)).map_err(reset)?;
            let mut buf = Room::take(self.next_read);
            let passed = self.hot.as_ref().map_or(0, |hot| hot.passed());
            match self.stream().try_read_buf(&mut buf.0) {
                Ok(0) => return Poll::Ready(self.ended()),
                Ok(n) => {
                    let is_all = n < self.next_read && self.hot.as_ref().is_none_or(|hot| hot.short_is_all());
                    if is_all && !at_mark(self.stream()) {
                        self.not_ready(Interest::READABLE);
                    }
                    if n == self.next_read {
                        self.next_read = (self.next_read * 2).min(READ_MAX);
                    } else if n < self.next_read / 4 {
                        self.next_read = (self.next_read / 2).max(READ_MIN);
                    }
                    if let (Some(hot), Some(stream)) = (&mut self.hot, &self.stream) {
                        hot.received(n, stream);
                    }
                    return Poll::Ready(Ok(Some(buf.filled())));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(hot) = &mut self.hot {
                        hot.was_empty(passed);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.note(&e);
                    return Poll::Ready(Err(reset(e)));
                }
            }
        }
    }

    fn accepted(&mut self, _n: usize) {
        // The kernel's window follows what was read, and nothing is read ahead.
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        loop {
            let mut is_retry = false;
            match (self.stream().poll_write_ready(cx), &mut self.hot) {
                (Poll::Ready(ready), _) => ready.map_err(reset)?,
                (Poll::Pending, Some(hot)) => {
                    ready!(hot.poll_retry(cx));
                    is_retry = true;
                }
                (Poll::Pending, None) => return Poll::Pending,
            }
            let most = match &mut self.hot {
                Some(hot) => ready!(hot.poll_room(cx)),
                None => usize::MAX,
            };
            // One that goes past TCP ends later than it is told to.
            let is_hot = self.hot.is_some();
            let written = queue.with_slices_of(most, |slices, end_follows| {
                let offered: usize = slices.iter().map(|s| s.len()).sum();
                let sent = if end_follows && !is_hot {
                    self.send_before_end(slices)
                } else if is_retry {
                    SockRef::from(self.stream()).send_vectored_with_flags(slices, libc::MSG_NOSIGNAL)
                } else {
                    self.stream().try_write_vectored(slices)
                };
                sent.map(|n| (n, offered))
            });
            match written {
                Ok((n, offered)) => {
                    queue.advance(n);
                    if self.until_much > 0 {
                        self.until_much = self.until_much.saturating_sub(n);
                        if self.until_much == 0 {
                            tcp::spare_local(self.stream());
                        }
                    }
                    // Not by what is left in the queue: that may never have been offered, and a socket that
                    // was never full raises no edge.
                    if n < offered && !self.hot.as_ref().is_some_and(|hot| hot.is_on()) {
                        self.not_ready(Interest::WRITABLE);
                    }
                    if let Some(hot) = &mut self.hot {
                        hot.sent(n);
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(hot) = &mut self.hot {
                        hot.would_block();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e)
                    if e.raw_os_error() == Some(libc::ENOMEM)
                        && self.hot.as_mut().is_some_and(|hot| hot.was_refused()) => {}
                Err(e) => {
                    let e = if self.is_silent() { timed_out() } else { e };
                    self.note(&e);
                    return Poll::Ready(Err(reset(e)));
                }
            }
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if let Some(hot) = &mut self.hot {
            // Whoever dies behind its own end would take along what is queued in front of it.
            ready!(hot.poll_drained(cx));
        }
        Poll::Ready(shut_down(self.stream()))
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        let Some(stream) = &self.stream else { return Poll::Pending };
        let e = ready!(self.error.poll(cx, stream));
        self.note(&e);
        Poll::Ready(reset(e))
    }

    fn is_acknowledged(&self) -> bool {
        true
    }

    fn was_forgotten(&self) -> bool {
        // Probes leave after that long without a word (`tcp_keepalive_timer`, net/ipv4/tcp_timer.c).
        let quiet =
            |stream: &Rc<Socket>| progress(&***stream).is_ok_and(|p| p.quiet >= tcp::keepalive().time);
        self.stream.as_ref().is_some_and(quiet)
    }

    fn has_unread(&self) -> bool {
        self.stream.as_ref().is_some_and(|stream| unread(&***stream).is_ok_and(|n| n > 0))
    }

    fn unacknowledged(&self) -> u64 {
        // Nobody acknowledges anything on a connection that has failed.
        let stream = self.stream.as_ref().filter(|stream| self.failed.is_none() && !stream.is_silent());
        stream.and_then(|stream| unacknowledged(&***stream).ok()).unwrap_or(0)
    }

    fn close(&mut self) {
        if let Some(stream) = &self.stream {
            let_arrive(&***stream);
        }
    }

    fn release(&mut self) {
        self.close();
    }

    fn abort(&mut self) {
        // The drop does it.
    }

    fn is_bypassed(&self) -> bool {
        self.hot.as_ref().is_some_and(|hot| hot.is_on())
    }
}

impl TcpLeg {
    /// A read says that there is no more. That is the peer's end unless the connection has failed before: who has ended
    /// and then resets is told of by EPIPE (`tcp_reset`, net/ipv4/tcp_input.c).
    pub(super) fn ended(&self) -> Result<Option<Bytes>, Broken> {
        match self.failed {
            _ if self.is_silent() => Err(reset(timed_out())),
            None | Some(libc::EPIPE) => Ok(None),
            Some(errno) => Err(reset(io::Error::from_raw_os_error(errno))),
        }
    }

    /// The peer was given up.
    fn is_silent(&self) -> bool {
        self.stream.as_ref().is_some_and(|stream| stream.is_silent())
    }

    /// An error that was told while somebody else had the socket.
    pub(super) fn has_failed(&mut self, errno: Option<i32>) {
        self.failed = self.failed.or(errno);
    }

    /// An error that was told other than by a read.
    pub(super) fn note(&mut self, e: &io::Error) {
        self.failed.get_or_insert(e.raw_os_error().unwrap_or(libc::ECONNRESET));
    }

    /// What has come before the runtime could hear of it. Nothing is lost where it has heard: the next read says that
    /// there is nothing, and waits.
    fn recv_unheard(&self) -> Option<Result<Option<Bytes>, Broken>> {
        let mut buf = [0; READ_MIN];
        match (&*SockRef::from(self.stream())).read(&mut buf) {
            Ok(0) => Some(Ok(None)),
            Ok(n) => Some(Ok(Some(Bytes::copy_from_slice(&buf[..n])))),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => None,
            Err(e) => Some(Err(reset(e))),
        }
    }

    /// Sends what is followed by FIN at once: it goes out with it, in one segment (`tcp_send_fin` takes the last one that
    /// has not left), and a peer that waits for both wakes once.
    fn send_before_end(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        const FLAGS: i32 = libc::MSG_MORE | libc::MSG_NOSIGNAL;
        let send = || SockRef::from(self.stream()).send_vectored_with_flags(slices, FLAGS);
        self.stream().try_io(Interest::WRITABLE, send)
    }

    /// The socket.
    pub(super) fn stream(&self) -> &TcpStream {
        self.stream.as_ref().expect("a leg is polled only while it has its socket")
    }

    /// Takes the socket away, out of the runtime's epoll: until it is [`put`](Self::put) back nothing may poll the leg.
    /// An error leaves nothing of the connection.
    pub(super) fn take(&mut self, by: &Rc<Accounts>) -> io::Result<Taken> {
        self.error = ErrorWatch::default();
        let stream = self.stream.take().and_then(|stream| Rc::try_unwrap(stream).ok());
        stream
            .ok_or(io::ErrorKind::NotConnected)?
            .into_inner()
            .into_std()
            .map(|stream| Taken(Some(stream), Rc::clone(by)))
    }

    /// Puts the socket back.
    pub(super) fn put(&mut self, mut stream: Taken) -> io::Result<()> {
        let stream_by = Rc::clone(&stream.1);
        if let Some(stream) = stream.0.take() {
            self.stream = Some(Socket::new(TcpStream::from_std(stream)?));
            self.taken_by = Some(stream_by);
        }
        Ok(())
    }

    /// A short read or write has emptied or filled the socket: what comes next raises a new edge
    /// (epoll(7), question 9), so the call that would only say EAGAIN is spared.
    pub(super) fn not_ready(&self, interest: Interest) {
        let _cleared = self.stream().try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
}

impl Drop for TcpLeg {
    fn drop(&mut self) {
        if let (Some(by), Some(stream)) = (&self.taken_by, &self.stream) {
            empty(&SockRef::from(&***stream));
            by.look_at(&***stream);
        }
    }
}

/// A leg's socket that is polled by somebody else.
pub(super) struct Taken(Option<std::net::TcpStream>, Rc<Accounts>);

impl Deref for Taken {
    type Target = std::net::TcpStream;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref().expect("only `put` and `drop` take it")
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            empty(&SockRef::from(stream));
            self.1.look_at(stream);
        }
    }
}

/// What was found of sockets that a kernel program has had, just before they were closed: how many have an account of
/// memory, and how many a wrong one (SO_MEMINFO). The kernel warns of those when it frees them (`inet_sock_destruct`).
#[derive(Debug, Default)]
pub(super) struct Accounts(Cell<(u64, u64)>);

impl Accounts {
    /// What was found since this was last called.
    pub(super) fn take(&self) -> (u64, u64) {
        self.0.take()
    }

    fn look_at(&self, socket: &impl AsFd) {
        // One that is still being written to, or read, has no account yet.
        if let Ok(Some(right)) = sockopt::is_account_right(socket) {
            let (all, wrong) = self.0.get();
            self.0.set((all + 1, wrong + u64::from(!right)));
        }
    }
}

/// Reads and forgets what a kernel program has passed to a socket that is about to be closed. The kernel would free it
/// after the socket has settled its account of memory, and warn (`sk_psock_destroy`, `inet_sock_destruct`). No more than
/// a receive buffer may hold (tcp_rmem).
fn empty(socket: &SockRef<'_>) {
    const READS: usize = 4096;
    let mut buf = [0; 16 * 1024];
    for _ in 0..READS {
        if !matches!((&**socket).read(&mut buf), Ok(1..)) {
            return;
        }
    }
}

/// Makes close send RST and drop what is queued (socket(7), SO_LINGER with a timeout of zero), also when it
/// is the kernel that closes.
pub(super) fn abort_on_close(stream: &TcpStream) {
    // Fails only on a socket that is gone already.
    let _gone = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
