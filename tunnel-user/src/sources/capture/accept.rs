//! Redirected connections: the listeners that the kernel programs, or the operator's rules, send them to, and the loop that
//! accepts from one.
//!
//! # Invariants
//! - A connection without an original destination is no flow: it is reset and recorded.
//! - No other process can join a listener.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    os::fd::AsFd,
    rc::Rc,
    sync::Arc,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    task::yield_now,
};
use tunnel_common::{
    capture::lane_v4,
    flow::{FlowKey, LOCAL_CONGESTION_CONTROL},
};

use super::{bpf::FlowTable, redirect, routes};
use crate::kernel::bypass::{Candidate, Promoter};
use crate::kernel::sys;
use crate::{
    kernel::own::OwnListeners,
    model::{
        flow::{ClientAddr, OriginalDst, Target},
        mark::Mark,
    },
    process::drain::Tasks,
    relay::TcpLeg,
    sources::{ACCEPTS_PER_TURN, Answered, Event, FlowHandler, Incoming, SourceHandle, back_off},
    transport::tcp::{self, OnClose},
};

/// Listeners in one network namespace, one of each family for every worker.
#[derive(Debug)]
pub struct Sockets {
    /// The cookie of the namespace.
    pub netns: u64,
    /// The port that all of them have.
    pub port: u16,
    /// IPv4 in front, IPv6 behind where the kernel has it; one list per worker.
    pub per_worker: Vec<Vec<Socket>>,
    /// By which the namespace is asked about its routes.
    pub routes: routes::Sockets,
}

/// How many ports are tried, of those that nobody is given by chance.
const PORTS_TRIED: usize = 64;
/// Ports above what Linux gives by default (`ip_local_port_range`, 32768 to 60999).
const HIGH_PORTS: RangeInclusive<u16> = 61000..=u16::MAX;
/// Below it, where the range has been made as large as it can be: what is assigned there is bound by name, and seldom.
const LOW_PORTS: RangeInclusive<u16> = 400..=1023;

/// Opens listeners in the namespace that the calling thread is in.
///
/// Nothing connects to their addresses: the steering program gives them their connections. So they take one port, at
/// addresses that nobody binds, outside of what programs are given who do not ask for one. They share it with nobody: another
/// process could otherwise join them (SO_REUSEPORT) and would be given captured connections.
pub fn listen(workers: usize, mark: Option<Mark>) -> io::Result<Sockets> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in free_ports() {
        match listen_on(port, workers, mark) {
            Ok(per_worker) => {
                let first =
                    per_worker.first().and_then(|own| own.first()).ok_or(io::ErrorKind::InvalidInput)?;
                let netns = sys::netns_cookie(first.as_fd())?;
                let port = port_of(first).unwrap_or(port);
                return Ok(Sockets { netns, port, per_worker, routes: routes::Sockets::open()? });
            }
            // Taken, or one that takes CAP_NET_BIND_SERVICE, which a daemon need not have.
            Err(e) if matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) => {
                last = e;
            }
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

/// A port of 0 is one that the kernel picks.
fn listen_on(port: u16, workers: usize, mark: Option<Mark>) -> io::Result<Vec<Vec<Socket>>> {
    let lanes = u16::try_from(workers).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut port = port;
    (0..lanes)
        .map(|lane| {
            let mut own = vec![listen_at((Ipv4Addr::from_bits(lane_v4(lane)), port).into(), mark)?];
            port = own.first().and_then(port_of).unwrap_or(port);
            match listen_at(SocketAddr::from((lane_v6(lane), port)), mark) {
                // A kernel without IPv6: nothing comes by it.
                Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                v6 => own.push(v6?),
            }
            Ok(own)
        })
        .collect()
}

/// Where the IPv6 listener of a lane is bound: the first one to `::1`, which is all there is; the others to IPv4 addresses,
/// for what matters is the family of the socket.
fn lane_v6(lane: u16) -> Ipv6Addr {
    const LANES_V6: u32 = 0x7f55_0000;
    match lane {
        0 => Ipv6Addr::LOCALHOST,
        lane => Ipv4Addr::from_bits(LANES_V6 + u32::from(lane)).to_ipv6_mapped(),
    }
}

fn port_of(socket: &Socket) -> Option<u16> {
    socket.local_addr().ok()?.as_socket().map(|a| a.port())
}

fn listen_at(addr: SocketAddr, mark: Option<Mark>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // The interface may come up later, and IPv6 with it.
    match addr {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(v6) => {
            socket.set_freebind_v6(true)?;
            socket.set_only_v6(v6.ip().to_ipv4_mapped().is_none())?;
        }
    }
    if let Some(mark) = mark {
        tcp::set_mark(&socket, mark)?;
    }
    tcp::set_inherited_options(&socket, OnClose::Abort)?;
    // Its connections inherit it (tcp_ca_openreq_child).
    socket.set_tcp_congestion(&LOCAL_CONGESTION_CONTROL)?;
    socket.bind(&addr.into())?;
    socket.listen(tcp::BACKLOG)?;
    Ok(socket)
}

/// Ports to try, in an order of chance, and at last 0, which is what the kernel picks.
fn free_ports() -> impl Iterator<Item = u16> {
    // Of the namespace that the thread is in.
    let setting = |name| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    let mut ports = ports_of_nobody(&setting("ip_local_port_range"), &setting("ip_local_reserved_ports"));
    fastrand::shuffle(&mut ports);
    ports.truncate(PORTS_TRIED);
    ports.into_iter().chain([0])
}

/// Ports that no program is given unless it asks for that one: outside of `ip_local_port_range`, and not reserved for anybody
/// by name (`ip_local_reserved_ports`); both as the kernel writes them.
fn ports_of_nobody(given: &str, reserved: &str) -> Vec<u16> {
    let mut ends = given.split_whitespace().filter_map(|n| n.parse::<u16>().ok());
    let given = ends.next().unwrap_or(1)..=ends.next().unwrap_or(u16::MAX);
    let reserved: Vec<RangeInclusive<u16>> = reserved
        .trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse().ok()?..=last.parse().ok()?)
        })
        .collect();
    let is_nobodys = |port: &u16| !given.contains(port) && !reserved.iter().any(|r| r.contains(port));
    let high: Vec<u16> = HIGH_PORTS.filter(is_nobodys).collect();
    if high.is_empty() { LOW_PORTS.filter(is_nobodys).collect() } else { high }
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

/// Accepts until the source is told to stop. Then it takes what is waiting: the kernel has told those applications that they
/// are connected.
pub async fn serve<H: FlowHandler>(
    handler: Rc<H>,
    accept: Accept,
    source: Rc<SourceHandle>,
    tasks: Rc<Tasks>,
) {
    let mut watch = source.watch();
    let (mut draining, mut accepts) = (false, 0u32);
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = accept.next() => accepted,
            () = watch.draining(), if !draining => {
                draining = true;
                continue;
            }
            () = std::future::ready(()), if draining => return,
        };
        match accepted {
            Ok((addr, Ok(incoming))) => {
                let client = handler.captured(&source, addr);
                tasks.spawn(Rc::clone(&handler).carry(client, incoming));
            }
            Ok((_, Err(stray))) => handler.record(Event::Stray(&stray)),
            Err(e) => back_off(&e).await,
        }
        accepts = accepts.wrapping_add(1);
        if accepts.is_multiple_of(ACCEPTS_PER_TURN) && !draining {
            yield_now().await;
        }
    }
}

impl Accept {
    /// Takes over a listening socket, whose connections are born with [`OnClose::Abort`], in the runtime of its worker.
    pub fn new(socket: Socket, origins: Origins) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::from_std(socket.into())?, origins })
    }

    /// The next connection with its application's address, or why it is no flow: then it has been reset. Also a flow is
    /// reset when its leg is dropped: [`OnClose::Abort`].
    async fn next(&self) -> io::Result<(ClientAddr, Result<Incoming<Answered<TcpLeg>>, Stray>)> {
        let (stream, addr) = self.listener.accept().await?;
        let origin = self.origin(&stream, addr);
        let incoming = origin.map(|(original_dst, bypass)| Incoming {
            target: Ok(Target::from(original_dst)),
            head: None,
            request: Answered(TcpLeg::captured(stream, bypass)),
        });
        Ok((ClientAddr(addr), incoming))
    }

    fn origin(
        &self,
        stream: &TcpStream,
        peer: SocketAddr,
    ) -> Result<(OriginalDst, Option<Candidate>), Stray> {
        match &self.origins {
            Origins::Recorded { netns, flows, bypass } => {
                let local = stream.local_addr().map_err(Stray::Unreadable)?;
                let key = FlowKey::new(*netns, peer.into(), local.into());
                let origin = flows.take(&key).map_err(Stray::Unreadable)?.ok_or(Stray::NotCaptured)?;
                let candidate = bypass.as_ref().map(|b| b.candidate(origin.cookie()));
                Ok((OriginalDst(origin.dst().into()), candidate))
            }
            Origins::Redirected(own) => redirect::original_dst(stream, own).map(|dst| (dst, None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_port_is_one_that_nobody_is_given_or_has_reserved() {
        let of = ports_of_nobody;
        assert_eq!(of("32768\t60999\n", "\n").len(), HIGH_PORTS.len());
        assert_eq!(of("32768\t60999\n", "61000,61005-65534\n"), [61001, 61002, 61003, 61004, 65535]);
        assert_eq!(of("61001 65535", ""), [61000]);
        // As large as it can be made.
        assert_eq!(of("1024 65535", "400-1000"), (1001..=1023).collect::<Vec<_>>());
        assert!(of("1 65535", "").is_empty() && of("", "").is_empty());
    }

    #[test]
    fn all_listeners_have_one_port_and_share_it_with_nobody() {
        let sockets = listen(3, None).expect("a loopback interface");
        assert_eq!(sockets.per_worker.len(), 3);
        for socket in sockets.per_worker.iter().flatten() {
            assert_eq!(port_of(socket), Some(sockets.port));
            assert!(!socket.reuse_port().unwrap() && !socket.reuse_address().unwrap());
        }
        assert!(listen_on(sockets.port, 3, None).is_err());
        // One that the kernel picks is the same for all.
        let picked = listen_on(0, 2, None).expect("a port");
        let ports: Vec<_> = picked.iter().flatten().filter_map(port_of).collect();
        assert!(ports.len() >= 2 && ports.iter().all(|port| *port == ports[0]), "{ports:?}");
    }
}
