//! TCP sockets: connected or listening, with the options that every socket of the daemon has.
//!
//! A socket that connects is registered with the daemon's captures before it does ([`Own`]), so that it is never captured.

use std::{
    fmt, io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd},
    sync::{Arc, OnceLock},
    time::Duration,
};

use arc_swap::ArcSwap;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{io::Interest, net::TcpStream};
use tunnel_common::flow::LOCAL_CONGESTION_CONTROL;

use crate::{config::Keepalive, model::mark::Mark};

/// When a silent peer is taken for gone. It is the same for every socket of a process, and set before the first one.
static KEEPALIVE: OnceLock<Keepalive> = OnceLock::new();
/// Connections that wait to be accepted; the kernel caps it at net.core.somaxconn.
pub const BACKLOG: i32 = 4096;

/// What the kernel takes of a connection that many streams share beyond what it has sent: two of our writes. More would
/// only stand in front of the next stream's bytes; what is on its way does not count.
const UNSENT_MAX: u32 = 128 * 1024;

/// Sets a socket's mark.
pub fn set_mark(socket: &Socket, mark: Mark) -> io::Result<()> {
    let others = if mark.mask() == u32::MAX { 0 } else { socket.mark()? & !mark.mask() };
    socket.set_mark(others | mark.value())
}

/// What registers a socket with one capture.
pub type Register = Arc<dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync>;

/// How the sockets of this daemon are told from those of applications: its captures are told of each one before it connects,
/// and it carries a mark, for rules of the operator's. The captures do not look at the mark, which others can set as well
/// (CAP_NET_RAW is enough since Linux 5.17).
#[derive(Clone, Default)]
pub struct Own {
    mark: Option<Mark>,
    captures: Arc<ArcSwap<Vec<Register>>>,
}

impl Own {
    /// `mark`: `SO_MARK`; `None` where this process may not set it.
    pub fn new(mark: Option<Mark>) -> Self {
        Self { mark, captures: Arc::default() }
    }

    /// The mark.
    pub fn mark(&self) -> Option<Mark> {
        self.mark
    }

    /// From now on these are the captures. All copies know.
    pub fn set_captures(&self, captures: Vec<Register>) {
        self.captures.store(Arc::new(captures));
    }

    /// Makes a socket one of ours, before it connects. On an error it must not: it would be captured.
    pub fn claim(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        if let Some(mark) = self.mark {
            set_mark(&SockRef::from(&socket), mark)?;
        }
        self.captures.load().iter().try_for_each(|register| register(socket))
    }
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Own").field("mark", &self.mark).finish_non_exhaustive()
    }
}

/// Sets how silent peers are found, before any socket is made. Later calls change nothing.
pub fn set_keepalive(wanted: Keepalive) {
    let _set_before = KEEPALIVE.set(wanted);
}

/// How silent peers are found.
pub fn keepalive() -> Keepalive {
    KEEPALIVE.get().copied().unwrap_or_default()
}

/// What closing a connection does to bytes that are still on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnClose {
    /// They go out, and FIN behind them.
    Deliver,
    /// They are dropped, and the peer gets RST (socket(7), SO_LINGER with a timeout of zero).
    Abort,
}

/// Which side sends the first bytes on a connection that is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstSpeaker {
    /// This one, as soon as it is connected. So the ACK of the handshake waits for our bytes, and goes with them: a segment less,
    /// and a server that accepts finds them there (`tcp_rcv_synsent_state_process`, "Save one ACK").
    Local,
    /// Unknown. The ACK goes at once: a server that speaks first would otherwise wait for it (200 ms,
    /// TCP_DELACK_MAX).
    Unknown,
}

/// A connection that was made.
#[derive(Debug)]
pub struct Connected {
    /// The socket.
    pub stream: TcpStream,
    /// What became of it since, if that is known: the peer has accepted it, and may have sent something, before it reset
    /// it. What it sent can be read.
    pub failed: Option<io::Error>,
}

impl Connected {
    /// The socket, unless it has failed since.
    pub fn up(self) -> io::Result<TcpStream> {
        self.failed.map_or(Ok(self.stream), Err)
    }
}

/// A socket that is to be connected to an address.
pub fn socket_for(addr: SocketAddr) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    Socket::new(Domain::for_address(addr), kind, Some(Protocol::TCP))
}

/// Connects. The caller bounds the time.
pub async fn connect(addr: SocketAddr, own: &Own, first: FirstSpeaker) -> io::Result<Connected> {
    connect_from(socket_for(addr)?, addr, own, first).await
}

/// The same, from a socket that the caller has made with [`socket_for`]: in another network namespace, or bound.
pub async fn connect_from(
    socket: Socket,
    addr: SocketAddr,
    own: &Own,
    first: FirstSpeaker,
) -> io::Result<Connected> {
    own.claim(socket.as_fd())?;
    tune(&socket)?;
    if first == FirstSpeaker::Local {
        socket.set_tcp_quickack(false)?;
    }
    match socket.connect(&addr.into()) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => return Err(e),
        _ => {}
    }
    let stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    // Not by tokio's connect, which drops a connection that was reset before it looked, with what had come. A SYN that is
    // answered with RST is ECONNREFUSED (`tcp_reset`, net/ipv4/tcp_input.c); what else a peer does, it does afterwards.
    match stream.take_error()? {
        Some(e) if !matches!(e.raw_os_error(), Some(libc::ECONNRESET | libc::EPIPE)) => Err(e),
        failed => Ok(Connected { stream, failed }),
    }
}

/// The options of every connection: no delay for small writes, urgent data where it was sent (a byte that is read out of
/// band, which nobody here does, is lost: RFC 6093 section 3.4), and dead peers are found.
fn tune(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    let keepalive = keepalive();
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(keepalive.time)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.probes.get()),
    )
}

/// Where both ends of a connection are on this machine, spares it what congestion control costs.
pub fn spare_local(stream: &TcpStream) {
    let ip = |addr: io::Result<SocketAddr>| addr.ok().map(|a| a.ip().to_canonical());
    // A connection to one of this machine's own addresses comes from the same one (RFC 6724 section 5, rule 1).
    let (local, peer) = (ip(stream.local_addr()), ip(stream.peer_addr()));
    if local.is_some() && local == peer {
        // Fails only on a socket that is gone.
        let _gone = SockRef::from(stream).set_tcp_congestion(&LOCAL_CONGESTION_CONTROL);
    }
}

/// Ready when the peer resets a connection, or it fails: why.
pub async fn error_of(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        Ok(_) => stream.take_error().ok().flatten().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        Err(e) => e,
    }
}

/// Keeps what waits in the kernel short, for a connection that many streams share.
pub fn share(stream: &TcpStream) {
    // Fails only on a socket that is gone.
    let _gone = SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_MAX);
}

/// Gives a listening socket the options of the connections that will be accepted from it. They are born with them
/// (the kernel clones the listener, `inet_csk_clone_lock`): six system calls less for each.
pub fn set_inherited_options(listener: &Socket, on_close: OnClose) -> io::Result<()> {
    tune(listener)?;
    listener.set_linger((on_close == OnClose::Abort).then_some(Duration::ZERO))
}

/// Listening sockets that share one address, one for each worker. Port 0 is the same port for all.
/// Fails where another process listens already, although the address could be shared with it too.
pub fn listen(
    addr: SocketAddr,
    workers: usize,
    mark: Option<Mark>,
    on_close: OnClose,
) -> io::Result<Vec<Socket>> {
    if addr.port() != 0 {
        let alone = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        alone.set_reuse_address(true)?;
        alone.bind(&addr.into())?;
    }
    listen_beside(addr, workers, mark, on_close)
}

/// The same, beside sockets that listen there already.
pub fn listen_beside(
    mut addr: SocketAddr,
    count: usize,
    mark: Option<Mark>,
    on_close: OnClose,
) -> io::Result<Vec<Socket>> {
    (0..count)
        .map(|_| {
            let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            socket.set_reuse_address(true)?;
            socket.set_reuse_port(true)?;
            if let Some(mark) = mark {
                set_mark(&socket, mark)?;
            }
            // Before it listens: no connection comes in between.
            set_inherited_options(&socket, on_close)?;
            socket.bind(&addr.into())?;
            socket.listen(BACKLOG)?;
            let bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
            addr.set_port(bound.port());
            Ok(socket)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_born_with_what_its_listener_was_given() {
        for (on_close, linger) in [(OnClose::Abort, Some(Duration::ZERO)), (OnClose::Deliver, None)] {
            for addr in ["127.0.0.1:0", "[::1]:0"] {
                let listener = listen(addr.parse().unwrap(), 1, None, on_close).unwrap().remove(0);
                let at = listener.local_addr().unwrap().as_socket().unwrap();
                let _client = connect(at, &Own::default(), FirstSpeaker::Unknown).await.unwrap();
                let (accepted, _) = listener.accept().unwrap();
                assert_eq!(accepted.linger().unwrap(), linger);
                assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
                assert!(accepted.out_of_band_inline().unwrap());
                assert_eq!(accepted.tcp_keepalive_time().unwrap(), keepalive().time);
                assert_eq!(accepted.tcp_keepalive_interval().unwrap(), keepalive().interval);
                assert_eq!(accepted.tcp_keepalive_retries().unwrap(), keepalive().probes.get());
            }
        }
    }

    #[tokio::test]
    async fn a_connection_on_this_machine_is_spared_what_congestion_control_costs() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let listener = std::net::TcpListener::bind(addr).unwrap();
            let connected = connect(listener.local_addr().unwrap(), &Own::default(), FirstSpeaker::Unknown)
                .await
                .unwrap();
            let stream = connected.up().unwrap();
            let control = || SockRef::from(&stream).tcp_congestion().unwrap();
            let available =
                std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap();
            // Another one, if this kernel has one that this user may set.
            let other = available.split_whitespace().map(str::as_bytes).find(|name| {
                *name != LOCAL_CONGESTION_CONTROL && SockRef::from(&stream).set_tcp_congestion(name).is_ok()
            });
            assert!(control().starts_with(other.unwrap_or_default()));
            spare_local(&stream);
            assert!(control().starts_with(&LOCAL_CONGESTION_CONTROL));
        }
    }

    #[tokio::test]
    async fn what_we_connect_has_the_same_options() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let own = Own::default();
        let stream =
            connect(listener.local_addr().unwrap(), &own, FirstSpeaker::Local).await.unwrap().up().unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert!(socket.out_of_band_inline().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), keepalive().time);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), keepalive().interval);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), keepalive().probes.get());
    }
}
