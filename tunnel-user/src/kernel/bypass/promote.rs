//! Promotes connections to bypass, on a thread per capture beside the data path.
//!
//! # Invariants
//! - An application's socket is touched only once every check has passed, and our duplicate of it is closed at once.
//! - Callers never wait.

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};

use socket2::SockRef;
use tokio::sync::oneshot;

use super::{
    Bypass, Pair,
    holder::{self, Diag},
    judge::Judge,
};
use crate::kernel::{group::Group, sys};

/// Connections that wait for their turn, of all workers. One that finds no place asks again later.
const WAITING_MAX: usize = 64;

/// Why a connection has no bypass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its descriptor blocks: a blocking recv may say EAGAIN.
    Blocking,
    /// Its program may call splice(2), which does not see what is redirected.
    Splices,
    /// Its program is Go's, whose io.Copy does.
    Go,
    /// Its program is linked statically: what it calls cannot be seen.
    Static,
    /// More than one process has it, and each may do as it likes.
    Shared,
    /// It has an option that a sockmap does not heed.
    Options,
    /// It could not be found out: too many processes or descriptors, or a file that is not understood.
    Unknown,
    /// It was gone before it was found.
    Gone,
    /// The kernel does not take it, or all places are taken.
    Kernel,
}

impl Refusal {
    const ALL: [(Self, &'static str); 9] = [
        (Self::Blocking, "bypass_refused_blocking"),
        (Self::Splices, "bypass_refused_splices"),
        (Self::Go, "bypass_refused_go"),
        (Self::Static, "bypass_refused_static"),
        (Self::Shared, "bypass_refused_shared"),
        (Self::Options, "bypass_refused_options"),
        (Self::Unknown, "bypass_refused_unknown"),
        (Self::Gone, "bypass_refused_gone"),
        (Self::Kernel, "bypass_refused_kernel"),
    ];
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocking => "blocking descriptor",
            Self::Splices => "the program may call splice(2)",
            Self::Go => "the program is written in Go",
            Self::Static => "the program is statically linked",
            Self::Shared => "more than one process holds the socket",
            Self::Options => "unsupported socket options",
            Self::Unknown => "the program cannot be inspected",
            Self::Gone => "the socket is gone",
            Self::Kernel => "rejected by the kernel",
        })
    }
}

/// What was done.
#[derive(Default)]
pub struct Counts {
    promoted: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
    /// Bytes of promoted connections, past TCP and offered to TCP.
    redirected: AtomicU64,
    passed: AtomicU64,
    /// Directions that went back to TCP because their reader did not keep up.
    demoted: AtomicU64,
}

/// What one connection asks.
struct Ask {
    ours: OwnedFd,
    cookie: u64,
    answer: oneshot::Sender<Result<Pair, Refusal>>,
}

/// Where connections of one capture ask. Cheap to clone.
#[derive(Clone)]
pub struct Promoter {
    asks: mpsc::SyncSender<Option<Ask>>,
    counts: Arc<Counts>,
}

/// A captured connection, which may ask.
pub struct Candidate {
    promoter: Promoter,
    cookie: u64,
}

/// What was asked for and is not answered yet.
pub type PendingPair = oneshot::Receiver<Result<Pair, Refusal>>;

impl Promoter {
    /// For the connection of the application's socket with this cookie.
    pub fn candidate(&self, cookie: u64) -> Candidate {
        Candidate { promoter: self.clone(), cookie }
    }
}

impl Candidate {
    /// Asks; `None` where too many do.
    pub fn ask(&self, ours: &impl AsFd) -> Option<PendingPair> {
        let (answer, asked) = oneshot::channel();
        let ours = ours.as_fd().try_clone_to_owned().ok()?;
        self.promoter.asks.try_send(Some(Ask { ours, cookie: self.cookie, answer })).ok()?;
        Some(asked)
    }

    /// A direction went back to TCP.
    pub fn count_demoted(&self) {
        self.promoter.counts.demoted.fetch_add(1, Ordering::Relaxed);
    }

    /// So much has gone past TCP, and so much was offered to it, when the connection ended.
    pub fn count_bytes(&self, redirected: u64, passed: u64) {
        self.promoter.counts.redirected.fetch_add(redirected, Ordering::Relaxed);
        self.promoter.counts.passed.fetch_add(passed, Ordering::Relaxed);
    }
}

/// The thread; ends when this is dropped.
pub struct Promotions {
    promoter: Promoter,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

impl Promotions {
    /// For the connections of the processes in `group`.
    pub fn start(bypass: Arc<Bypass>, group: Arc<Group>) -> io::Result<Self> {
        let (asks, asked) = mpsc::sync_channel(WAITING_MAX);
        let counts = Arc::new(Counts::default());
        let promoter = Promoter { asks, counts: Arc::clone(&counts) };
        let thread = thread::Builder::new()
            .name("bypass".to_owned())
            .spawn(move || serve(&bypass, &group, &asked, &counts))?;
        Ok(Self { promoter, thread: Mutex::new(Some(thread)) })
    }

    /// Where connections ask.
    pub fn promoter(&self) -> Promoter {
        self.promoter.clone()
    }

    /// What was done.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let counts = &self.promoter.counts;
        let refused = Refusal::ALL.iter().zip(&counts.refused).map(|((_, name), n)| (*name, n));
        [
            ("bypass_promoted", &counts.promoted),
            ("bypass_demoted", &counts.demoted),
            ("bypass_bytes", &counts.redirected),
            ("bypass_bytes_by_tcp", &counts.passed),
        ]
        .into_iter()
        .chain(refused)
        .map(|(name, n)| (name, n.load(Ordering::Relaxed)))
        .collect()
    }
}

impl Drop for Promotions {
    fn drop(&mut self) {
        // The workers may still have copies: it is told to end. It takes milliseconds for what is in front.
        let _ended = self.promoter.asks.send(None);
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _panicked = thread.join();
        }
    }
}

fn serve(bypass: &Arc<Bypass>, group: &Group, asks: &mpsc::Receiver<Option<Ask>>, counts: &Counts) {
    let judge = Judge::default();
    let mut diag = None;
    while let Ok(Some(Ask { ours, cookie, answer })) = asks.recv() {
        if answer.is_closed() {
            continue;
        }
        let started = Instant::now();
        let made = promote(bypass, group, &judge, &mut diag, &ours, cookie);
        drop(ours);
        let took = started.elapsed();
        let counter = match &made {
            Ok(_) => Some(&counts.promoted),
            Err(why) => Refusal::ALL.iter().position(|(r, _)| r == why).map(|i| &counts.refused[i]),
        };
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        match &made {
            Ok(_) => tracing::debug!(?took, "connection bypassed"),
            Err(why) => tracing::debug!(?took, "connection not bypassed: {why}"),
        }
        // Its flow may have ended.
        let _late = answer.send(made);
    }
}

/// Options that `tcp_bpf_sendmsg` and `tcp_bpf_recvmsg` pass over (net/ipv4/tcp_bpf.c): who asks for the end of a
/// transmission or its time would wait for it for ever, and urgent data would be lost.
fn has_options(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let usual =
        [(libc::SO_ZEROCOPY, 0), (libc::SO_TIMESTAMPING, 0), (libc::SO_OOBINLINE, 0), (libc::SO_RCVLOWAT, 1)];
    for (option, value) in usual {
        if sys::int_option(socket, option)? != value {
            return Ok(true);
        }
    }
    Ok(false)
}

fn promote(
    bypass: &Arc<Bypass>,
    group: &Group,
    judge: &Judge,
    diag: &mut Option<Diag>,
    ours: &OwnedFd,
    cookie: u64,
) -> Result<Pair, Refusal> {
    let kernel = |e: io::Error| {
        tracing::debug!("bypass: {e}");
        Refusal::Kernel
    };
    let diag = match diag {
        Some(diag) if diag.is_of(ours.as_fd()) => diag,
        other => other.insert(Diag::enter(ours.as_fd()).map_err(kernel)?),
    };
    let socket = SockRef::from(ours);
    let address = |a: io::Result<socket2::SockAddr>| a.ok().and_then(|a| a.as_socket()).ok_or(Refusal::Gone);
    let (here, there) = (address(socket.local_addr())?, address(socket.peer_addr())?);
    let inode = diag.inode(there, here, cookie).map_err(|_| Refusal::Gone)?;
    let (pid, fd) = holder::only_one(group, inode)?;
    judge.process(pid)?;
    let application = sys::duplicate(pid, fd).map_err(|_| Refusal::Gone)?;
    // Another may have taken its number meanwhile.
    if sys::socket_cookie(application.as_fd()).ok() != Some(cookie) {
        return Err(Refusal::Gone);
    }
    if !sys::is_nonblocking(application.as_fd()).map_err(kernel)? {
        return Err(Refusal::Blocking);
    }
    if has_options(application.as_fd()).map_err(kernel)? {
        return Err(Refusal::Options);
    }
    bypass.pair(application.as_fd(), ours.as_fd()).map_err(kernel)
}
