//! Redirected connections: the listeners that the kernel programs, or the operator's rules, send them to.
//!
//! Enters: a network namespace, or listening sockets. Leaves: accepted sockets, each with the address its
//! application asked for. Invariant: no original destination, no flow: such a socket is reset and counted. It
//! never opens a listener without the daemon's mark, by which the programs know it.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
    thread,
};

use nix::sched::{CloneFlags, setns};
use socket2::Socket;
use tokio::net::{TcpListener, TcpStream};
use tunnel_common::{
    capture,
    flow::{FlowKey, LOCAL_CONGESTION_CONTROL},
};

use super::{
    bpf::FlowTable,
    bypass::{Candidate, Promoter},
    redirect, sys,
};
use crate::{
    flow::{ClientAddr, OriginalDst},
    own::OwnListeners,
    transport::tcp::{self, OnClose},
};

/// Listeners in one network namespace, one of each family for every worker.
#[derive(Debug)]
pub struct Sockets {
    /// The cookie of the namespace.
    pub netns: u64,
    /// Where connections of the namespace go.
    pub listener: capture::Listener,
    /// One list per worker.
    pub per_worker: Vec<Vec<Socket>>,
}

/// Opens listeners in the namespace that the calling thread is in.
pub fn listen(workers: usize, mark: u32) -> io::Result<Sockets> {
    let v4 = listen_at(Ipv4Addr::LOCALHOST.into(), workers, mark)?;
    let v6 = match listen_at(Ipv6Addr::LOCALHOST.into(), workers, mark) {
        // A node without IPv6 has no `::1`; the programs refuse captured IPv6 connections until it has (`has_ipv6`).
        Err(e) if matches!(e.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)) => Vec::new(),
        v6 => v6?,
    };
    let first = v4.first().ok_or(io::ErrorKind::InvalidInput)?;
    let (netns, listener) = (
        sys::netns_cookie(first.as_fd())?,
        capture::Listener::new(port_of(first), v6.first().and_then(port_of)),
    );
    let mut v6 = v6.into_iter();
    let per_worker =
        v4.into_iter().map(|socket| std::iter::once(socket).chain(v6.next()).collect()).collect();
    Ok(Sockets { netns, listener, per_worker })
}

/// Adds listeners on `::1` to those that a namespace has on 127.0.0.1.
fn listen_v6(v4: Option<u16>, workers: usize, mark: u32) -> io::Result<Sockets> {
    let v6 = listen_at(Ipv6Addr::LOCALHOST.into(), workers, mark)?;
    let first = v6.first().ok_or(io::ErrorKind::InvalidInput)?;
    let listener = capture::Listener::new(v4, port_of(first));
    let netns = sys::netns_cookie(first.as_fd())?;
    Ok(Sockets { netns, listener, per_worker: v6.into_iter().map(|socket| vec![socket]).collect() })
}

fn listen_at(loopback: IpAddr, workers: usize, mark: u32) -> io::Result<Vec<Socket>> {
    let sockets = tcp::listen((loopback, 0).into(), workers, Some(mark), OnClose::Abort)?;
    for socket in &sockets {
        // Its connections inherit it (tcp_ca_openreq_child).
        socket.set_tcp_congestion(&LOCAL_CONGESTION_CONTROL)?;
    }
    Ok(sockets)
}

fn port_of(socket: &Socket) -> Option<u16> {
    socket.local_addr().ok()?.as_socket().map(|a| a.port())
}

/// Opens listeners in the namespace that `netns` names. A thread of its own goes there and ends.
pub fn listen_in(netns: OwnedFd, workers: usize, mark: u32) -> io::Result<Sockets> {
    within(netns, move || listen(workers, mark))
}

/// Opens the listeners on `::1` that were missing there, where `v4` is the port of those on 127.0.0.1.
pub fn listen_v6_in(netns: OwnedFd, v4: Option<u16>, workers: usize, mark: u32) -> io::Result<Sockets> {
    within(netns, move || listen_v6(v4, workers, mark))
}

fn within<T: Send + 'static>(
    netns: OwnedFd,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let there = thread::Builder::new().name("netns".to_owned()).spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        work()
    })?;
    there.join().map_err(|_| io::Error::other("the thread that entered the namespace panicked"))?
}

/// The inode number of the network namespace that process `pid` is in.
pub fn netns_inode(pid: u32) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(Path::new("/proc").join(pid.to_string()).join("ns/net")).map(|m| m.ino())
}

/// Whether the network namespace that process `pid` is in has `::1` (`/proc/net/if_inet6`).
pub fn has_ipv6(pid: u32) -> bool {
    const LOOPBACK: &str = "00000000000000000000000000000001 ";
    let addresses = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("net/if_inet6"));
    addresses.is_ok_and(|text| text.lines().any(|line| line.starts_with(LOOPBACK)))
}

/// Opens the network namespace that process `pid` is in.
pub fn open_netns(pid: u32) -> io::Result<OwnedFd> {
    fs::File::open(Path::new("/proc").join(pid.to_string()).join("ns/net")).map(OwnedFd::from)
}

/// Who knows where the connections of a listener wanted to go.
#[derive(Clone)]
pub enum Origins {
    /// The kernel programs.
    Recorded {
        /// The cookie of the listener's network namespace.
        netns: u64,
        /// Where they write it.
        flows: FlowTable,
        /// Where its connections may ask to go past TCP.
        bypass: Option<Promoter>,
    },
    /// conntrack, which followed a rule; a connection to one of these came by no rule of its own.
    Redirected(Arc<OwnListeners>),
}

impl Origins {
    /// The network namespace that the kernel programs know the listener by.
    pub fn netns(&self) -> Option<u64> {
        match self {
            Self::Recorded { netns, .. } => Some(*netns),
            Self::Redirected(_) => None,
        }
    }
}

/// One listener of one worker.
pub struct Accept {
    listener: TcpListener,
    local: SocketAddr,
    origins: Origins,
}

/// Why an accepted connection is no flow.
#[derive(Debug, thiserror::Error)]
pub enum Stray {
    /// The kernel programs have not seen it.
    #[error("was not captured")]
    NotCaptured,
    /// What they wrote cannot be read.
    #[error("cannot be looked up among the captured ones: {0}")]
    Unreadable(io::Error),
    /// conntrack does not know it.
    #[error("was not redirected by a rule (SO_ORIGINAL_DST: {0})")]
    NotRedirected(io::Error),
    /// It wanted to come here.
    #[error("wanted to go to {0}, where we listen: carrying it would bring it back")]
    ToUs(OriginalDst),
}

/// A redirected connection.
pub struct Captured {
    /// The socket, connected to the application's. Dropped, it resets that: [`OnClose::Abort`].
    pub stream: TcpStream,
    /// The application's address.
    pub client: ClientAddr,
    /// Where it wanted to go.
    pub original_dst: OriginalDst,
    /// By which it may ask to go past TCP.
    pub bypass: Option<Candidate>,
}

impl Accept {
    /// Takes over a listening socket, whose connections are born with [`OnClose::Abort`], in the runtime of its worker.
    pub fn new(socket: Socket, origins: Origins) -> io::Result<Self> {
        let listener = TcpListener::from_std(socket.into())?;
        let local = listener.local_addr()?;
        Ok(Self { listener, local, origins })
    }

    /// The next connection, or why it is no flow: then it has been reset.
    pub async fn next(&self) -> io::Result<Result<Captured, Stray>> {
        let (stream, peer) = self.listener.accept().await?;
        let origin = self.origin(&stream, peer);
        Ok(origin.map(|(original_dst, bypass)| {
            let client = ClientAddr(peer);
            Captured { stream, client, original_dst, bypass }
        }))
    }

    fn origin(
        &self,
        stream: &TcpStream,
        peer: SocketAddr,
    ) -> Result<(OriginalDst, Option<Candidate>), Stray> {
        match &self.origins {
            Origins::Recorded { netns, flows, bypass } => {
                let key = FlowKey::new(*netns, peer.into(), self.local.into());
                let origin = flows.take(&key).map_err(Stray::Unreadable)?.ok_or(Stray::NotCaptured)?;
                let candidate = bypass.as_ref().map(|b| b.candidate(origin.cookie()));
                Ok((OriginalDst(origin.dst().into()), candidate))
            }
            Origins::Redirected(own) => redirect::original_dst(stream, own).map(|dst| (dst, None)),
        }
    }
}
