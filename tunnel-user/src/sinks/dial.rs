//! A plain TCP connection to the target, or to an endpoint of an upstream.
//!
//! # Invariants
//! - Every wait has a bound.
//! - Only the addresses that the caller passes are tried.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::Socket;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

use crate::{
    model::{end::EndReason, flow::Target},
    transport::{
        quic,
        resolver::{self as names, Unanswered},
        tcp::{self, Connected, FirstSpeaker, Own},
    },
};

/// How long one address is tried before the next is tried beside it (RFC 8305 section 5, "Connection
/// Attempt Delay").
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// The most addresses of one name that are tried: resolvers have been seen to return hundreds.
const ADDRESSES_MAX: usize = 16;

/// Why the target could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name has no address, or the resolver failed.
    #[error("{name} does not resolve: {source}")]
    Resolve {
        /// The name.
        name: String,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// Its name servers have not answered in time.
    #[error("{name} was not resolved within {after:?}")]
    ResolveTimeout {
        /// The name.
        name: String,
        /// The time allowed.
        after: Duration,
    },
    /// Nothing listens there.
    #[error("{addr} refused the connection")]
    Refused {
        /// The last address tried.
        addr: SocketAddr,
    },
    /// No route, or the network says so.
    #[error("{addr} is unreachable: {source}")]
    Unreachable {
        /// The last address tried.
        addr: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No answer within the time allowed.
    #[error("no answer from {target} within {after:?}")]
    Timeout {
        /// The target.
        target: Target,
        /// The time allowed.
        after: Duration,
    },
    /// This process could not make the attempt: out of descriptors, ports or memory.
    #[error("this node could not connect to {addr}: {source}")]
    Local {
        /// The last address tried.
        addr: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl DialError {
    /// Which of the ends it is.
    pub fn reason(&self) -> EndReason {
        match self {
            Self::Resolve { .. } => EndReason::DnsError,
            Self::ResolveTimeout { .. } => EndReason::DnsTimeout,
            Self::Refused { .. } => EndReason::TargetRefused,
            Self::Unreachable { .. } => EndReason::TargetUnreachable,
            Self::Timeout { .. } => EndReason::ConnectTimeout,
            Self::Local { .. } => EndReason::ConnectFailed,
        }
    }
}

/// Makes connections: by which mark they are known, and from which address.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    own: Own,
    bind: Option<IpAddr>,
}

impl Dialer {
    /// From the address that the kernel picks. `own`: the mark, and how captures know our sockets.
    pub fn new(own: Own) -> Self {
        Self { own, bind: None }
    }

    /// The same from an address, for targets of its family; others fail.
    #[must_use]
    pub fn bound_to(self, address: IpAddr) -> Self {
        Self { bind: Some(address), ..self }
    }

    /// The addresses of a target, IPv6 and IPv4 in turn (RFC 8305 section 4).
    pub async fn resolve(&self, target: &Target) -> Result<Vec<SocketAddr>, DialError> {
        let (name, port) = match target {
            Target::Addr(addr) => return Ok(vec![*addr]),
            Target::Name(name, port) => (name, *port),
        };
        let found = names::addresses_of(name, &self.own).await.map_err(|e| match e {
            Unanswered::Late => DialError::ResolveTimeout { name: name.clone(), after: names::PATIENCE },
            Unanswered::Failed(why) => {
                DialError::Resolve { name: name.clone(), source: io::Error::other(why) }
            }
        })?;
        in_turn(name, port, found)
    }

    /// A UDP socket for peers of the family of `to`, with buffers for QUIC.
    pub fn udp_socket(&self, to: SocketAddr) -> io::Result<Socket> {
        quic::client_socket(to, &self.own)
    }

    /// Connects to the first address that answers: each gets a head start over the next (RFC 8305).
    pub async fn connect(
        &self,
        target: &Target,
        addrs: &[SocketAddr],
        first: FirstSpeaker,
        deadline: Instant,
        allowed: Duration,
    ) -> Result<(Connected, SocketAddr), DialError> {
        let timeout = || DialError::Timeout { target: target.clone(), after: allowed };
        if let [addr] = addrs {
            let connected = timeout_at(deadline, self.attempt(*addr, first)).await.map_err(|_| timeout())?;
            return connected.map(|stream| (stream, *addr)).map_err(|e| classify(*addr, e));
        }
        timeout_at(deadline, self.race(addrs, first)).await.map_err(|_| timeout())?.ok_or_else(timeout)?
    }

    /// `None` for no addresses.
    async fn race(
        &self,
        addrs: &[SocketAddr],
        first: FirstSpeaker,
    ) -> Option<Result<(Connected, SocketAddr), DialError>> {
        let mut attempts = JoinSet::new();
        let mut last = None;
        let mut rest = addrs.iter().copied();
        loop {
            let next = rest.next();
            if let Some(addr) = next {
                let dialer = self.clone();
                attempts.spawn_local(async move { (addr, dialer.attempt(addr, first).await) });
            }
            let head_start = async {
                match next {
                    Some(_) => sleep(ATTEMPT_DELAY).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                done = attempts.join_next() => match done {
                    Some(Ok((addr, Ok(stream)))) => return Some(Ok((stream, addr))),
                    Some(Ok((addr, Err(e)))) => last = Some(Err(classify(addr, e))),
                    // Only a panic or an abort ends an attempt without a result.
                    Some(Err(_)) => {}
                    None => return last,
                },
                () = head_start => {}
            }
        }
    }

    async fn attempt(&self, addr: SocketAddr, first: FirstSpeaker) -> io::Result<Connected> {
        let Some(address) = self.bind else { return tcp::connect(addr, &self.own, first).await };
        let socket = tcp::socket_for(addr)?;
        // The port is picked when it connects, so that one may serve several targets (ip(7)).
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(address, 0).into())?;
        tcp::connect_from(socket, addr, &self.own, first).await
    }
}

/// The same where nobody has to be asked: the target is an address, or this host's own files know its name.
pub fn resolved(target: &Target) -> Option<Result<Vec<SocketAddr>, DialError>> {
    match target {
        Target::Addr(addr) => Some(Ok(vec![*addr])),
        Target::Name(name, port) => names::of_this_host(name).map(|found| in_turn(name, *port, found)),
    }
}

fn in_turn(name: &str, port: u16, found: Vec<IpAddr>) -> Result<Vec<SocketAddr>, DialError> {
    let found = found.into_iter().map(|ip| SocketAddr::new(ip, port));
    let (mut v6, mut v4): (VecDeque<_>, VecDeque<_>) = found.partition(SocketAddr::is_ipv6);
    let mut addrs = Vec::new();
    while addrs.len() < ADDRESSES_MAX && !(v6.is_empty() && v4.is_empty()) {
        addrs.extend(v6.pop_front());
        addrs.extend(v4.pop_front());
    }
    if addrs.is_empty() {
        let source = io::Error::new(io::ErrorKind::NotFound, "no address");
        return Err(DialError::Resolve { name: name.to_owned(), source });
    }
    Ok(addrs)
}

fn classify(addr: SocketAddr, source: io::Error) -> DialError {
    use io::ErrorKind as K;
    match source.kind() {
        K::ConnectionRefused | K::ConnectionReset | K::ConnectionAborted => DialError::Refused { addr },
        K::TimedOut | K::HostUnreachable | K::NetworkUnreachable | K::NetworkDown => {
            DialError::Unreachable { addr, source }
        }
        _ => DialError::Local { addr, source },
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, net::TcpListener};

    use socket2::{Domain, Socket, Type};
    use tokio::task::LocalSet;

    use super::*;

    const ALLOWED: Duration = Duration::from_secs(20);

    /// An address where nobody answers: Linux drops a SYN when the queue of a listener is full.
    fn silent() -> (SocketAddr, Vec<Socket>) {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let addr = listener.local_addr().unwrap();
        let mut held = vec![listener];
        for _ in 0..4 {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            // In progress: the first fill the queue, the others are not answered.
            assert!(socket.connect(&addr).is_err());
            held.push(socket);
        }
        (addr.as_socket().unwrap(), held)
    }

    /// An address that was free a moment ago.
    fn refusing() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    fn run<T>(test: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, test)
    }

    async fn dial(addrs: &[SocketAddr], allowed: Duration) -> Result<SocketAddr, DialError> {
        let target = Target::Name("a.example".to_owned(), 1);
        let (dialer, deadline) = (Dialer::default(), Instant::now() + allowed);
        dialer.connect(&target, addrs, FirstSpeaker::Unknown, deadline, allowed).await.map(|(_, addr)| addr)
    }

    #[test]
    fn a_bound_dialer_connects_from_its_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let from = IpAddr::from([127, 0, 0, 99]);
        let (target, deadline) = (Target::Addr(addr), Instant::now() + ALLOWED);
        let connect = async |dialer: &Dialer| {
            let connected = dialer.connect(&target, &[addr], FirstSpeaker::Local, deadline, ALLOWED).await?;
            Ok::<_, DialError>(connected.0.stream.local_addr().unwrap().ip())
        };
        run(async {
            assert_eq!(connect(&Dialer::default().bound_to(from)).await.unwrap(), from);
            // An address of the other family.
            let other = Dialer::default().bound_to(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]));
            assert!(matches!(connect(&other).await, Err(DialError::Local { .. })));
        });
    }

    #[test]
    fn an_address_that_is_silent_or_refuses_does_not_keep_the_next_from_being_tried() {
        let well = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = well.local_addr().unwrap();
        let (silent, _held) = silent();
        assert_eq!(run(dial(&[silent, refusing(), addr], ALLOWED)).unwrap(), addr);
    }

    #[test]
    fn when_all_addresses_refuse_it_says_so_and_when_one_is_silent_it_waits_for_the_deadline() {
        let refused = run(dial(&[refusing(), refusing()], ALLOWED)).unwrap_err();
        assert!(matches!(refused, DialError::Refused { .. }), "{refused}");
        let (silent, _held) = silent();
        for addrs in [&[silent][..], &[silent, refusing()][..]] {
            let late = run(dial(addrs, Duration::from_millis(400))).unwrap_err();
            assert!(matches!(late, DialError::Timeout { .. }), "{late}");
        }
    }
}
