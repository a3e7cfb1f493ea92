//! Peers that have fallen silent while bytes are on their way to them.
//!
//! Keep-alive probes leave only when nothing is unacknowledged; with bytes on their way a peer that vanished is found once
//! Linux has given up sending them again, 15 minutes and more (`tcp_retries2`). TCP_USER_TIMEOUT would find it sooner, and
//! end a live peer whose window stays closed too, although that answers every probe (`tcp_probe_timer`,
//! net/ipv4/tcp_timer.c). So each worker looks at its sockets from time to time.
//!
//! # Invariants
//! - A peer is given up when it has acknowledged nothing for as long as it may be silent when idle, although it was asked
//!   at least once, by a retransmission or by a probe of its window, and that on two looks in a row.
//! - What it had sent before can still be read.

use std::{
    cell::{Cell, RefCell},
    io,
    ops::Deref,
    os::fd::AsFd,
    rc::{Rc, Weak},
    time::Duration,
};

use socket2::SockRef;
use tokio::{net::TcpStream, time::Instant};

use crate::transport::{
    sockopt::{Progress, progress},
    tcp::keepalive,
};

/// Of the time that a peer may be silent, a look comes after each such part.
const PARTS: u32 = 8;
/// And no sooner than this: longer than the answer to a probe may take.
const PERIOD_MIN: Duration = Duration::from_secs(1);

thread_local! {
    static WATCHED: RefCell<Watched> = RefCell::default();
}

#[derive(Default)]
struct Watched {
    sockets: Vec<(Weak<Socket>, bool)>,
    looked: Option<Instant>,
}

/// A socket whose peer is watched for as long as it is held.
pub(super) struct Socket {
    stream: TcpStream,
    silent: Cell<bool>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Rc<Self> {
        let socket = Rc::new(Self { stream, silent: Cell::default() });
        WATCHED.with_borrow_mut(|all| all.sockets.push((Rc::downgrade(&socket), false)));
        socket
    }

    /// The peer was given up: a read still gets what had come, and then says that the connection has ended.
    pub(super) fn is_silent(&self) -> bool {
        self.silent.get()
    }

    pub(super) fn into_inner(self) -> TcpStream {
        self.stream
    }
}

impl Deref for Socket {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.stream
    }
}

/// How often sockets are looked at.
pub(super) fn period() -> Duration {
    (keepalive().bound() / PARTS).max(PERIOD_MIN)
}

/// Whether the peer does not answer, as far as one look can tell: so long that after another one it has been silent for
/// the whole bound.
pub(super) fn seems_silent(socket: &impl AsFd) -> bool {
    let allowed = keepalive().bound().saturating_sub(period() * 2);
    progress(socket).is_ok_and(|Progress { waiting, asked, quiet }| waiting && asked && quiet >= allowed)
}

/// What is told of a peer that was given up.
pub(super) fn timed_out() -> io::Error {
    io::Error::from_raw_os_error(libc::ETIMEDOUT)
}

/// Looks at this worker's sockets, when it is time to; to be called once a second.
pub fn give_up_silent_peers() {
    let now = Instant::now();
    WATCHED.with_borrow_mut(|all| {
        // Those that are closed hold their memory until they are forgotten here.
        all.sockets.retain(|(socket, _)| socket.strong_count() > 0);
        if all.looked.is_some_and(|looked| now.duration_since(looked) < period()) {
            return;
        }
        all.looked = Some(now);
        all.sockets.retain_mut(|(socket, suspect)| {
            let Some(socket) = socket.upgrade() else { return false };
            let silent = seems_silent(&socket.stream);
            if silent && *suspect {
                socket.silent.set(true);
                // Whoever waits to read or to write hears of it. What has come stays.
                let _gone = SockRef::from(&socket.stream).shutdown(std::net::Shutdown::Both);
                return false;
            }
            *suspect = silent;
            true
        });
    });
}
