//! Redirected connections: the listeners that the kernel programs send them to.
//!
//! Enters: a network namespace. Leaves: accepted sockets, each with the address its application asked
//! for. Invariant: no original destination, no flow: such a socket is reset and counted. It never opens a
//! listener without the daemon's mark, by which the programs know it.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    thread,
};

use nix::sched::{CloneFlags, setns};
use socket2::Socket;
use tokio::net::{TcpListener, TcpStream};
use tunnel_common::{capture, flow::FlowKey};

use super::{bpf::FlowTable, sys};
use crate::{
    flow::{ClientAddr, OriginalDst},
    relay::abort_on_close,
    transport::tcp,
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
    let v4 = tcp::listen((Ipv4Addr::LOCALHOST, 0).into(), workers, Some(mark))?;
    // A node without IPv6 has no `::1`; the programs then refuse captured IPv6 connections.
    let v6 = tcp::listen((Ipv6Addr::LOCALHOST, 0).into(), workers, Some(mark)).unwrap_or_default();
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

fn port_of(socket: &Socket) -> Option<u16> {
    socket.local_addr().ok()?.as_socket().map(|a| a.port())
}

/// Opens listeners in the namespace that `netns` names. A thread of its own goes there and ends.
pub fn listen_in(netns: OwnedFd, workers: usize, mark: u32) -> io::Result<Sockets> {
    let there = thread::Builder::new().name("netns".to_owned()).spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        listen(workers, mark)
    })?;
    there.join().map_err(|_| io::Error::other("the thread that entered the namespace panicked"))?
}

/// The inode number of the network namespace that process `pid` is in.
pub fn netns_inode(pid: u32) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(Path::new("/proc").join(pid.to_string()).join("ns/net")).map(|m| m.ino())
}

/// Opens the network namespace that process `pid` is in.
pub fn open_netns(pid: u32) -> io::Result<OwnedFd> {
    fs::File::open(Path::new("/proc").join(pid.to_string()).join("ns/net")).map(OwnedFd::from)
}

/// One listener of one worker.
pub struct Accept {
    listener: TcpListener,
    local: SocketAddr,
    netns: u64,
    flows: FlowTable,
}

/// A redirected connection.
#[derive(Debug)]
pub struct Captured {
    /// The socket, connected to the application's.
    pub stream: TcpStream,
    /// The application's address.
    pub client: ClientAddr,
    /// Where it wanted to go.
    pub original_dst: OriginalDst,
}

impl Accept {
    /// Takes over a listening socket, in the runtime of its worker.
    pub fn new(socket: Socket, netns: u64, flows: FlowTable) -> io::Result<Self> {
        let listener = TcpListener::from_std(socket.into())?;
        let local = listener.local_addr()?;
        Ok(Self { listener, local, netns, flows })
    }

    /// The next connection. `None` for one that was not captured: it has been reset.
    pub async fn next(&self) -> io::Result<Option<Captured>> {
        let (stream, peer) = self.listener.accept().await?;
        let key = FlowKey::new(self.netns, peer.into(), self.local.into());
        let Some(origin) = self.flows.take(&key)? else {
            abort_on_close(&stream);
            return Ok(None);
        };
        let original_dst = OriginalDst(origin.dst().into());
        Ok(Some(Captured { stream, client: ClientAddr(peer), original_dst }))
    }
}
