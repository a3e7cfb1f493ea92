//! The UDP sockets of one address, over the lives of those who use them: the workers of this daemon, those of one that it has
//! replaced, and those of a listener that was changed, while their connections last.
//!
//! # Invariants
//! - No socket of a group is closed while another one is in use: connection ids say places in it, and the kernel moves the last
//!   socket of a group to the place of one that is closed (`reuseport_detach_sock`).
//! - A place has one user. It is given to another one when the last connection there has ended, or the process.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use quinn::{
    AsyncUdpSocket, Runtime as _, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::socket::udp;
use crate::{
    model::mark::Mark,
    transport::{sockopt::steer_by_connection_id, tcp},
};

/// See the module.
#[derive(Debug)]
pub struct Group {
    /// In the order in which they were bound, which is that of the kernel's group (`reuseport_add_sock`).
    sockets: Vec<Socket>,
    uses: Vec<Use>,
}

/// Places that somebody has.
#[derive(Debug)]
struct Use {
    places: Range<usize>,
    /// Ends when the other end is closed by all who have it, at the latest with the last process.
    ended: UnixStream,
}

impl Use {
    fn is_over(&self) -> bool {
        matches!((&self.ended).read(&mut [0]), Ok(0))
    }
}

/// What one daemon gets of a group: a place for each worker.
#[derive(Debug)]
pub struct Places {
    /// The number of the first; the others follow.
    pub first: usize,
    /// In their order.
    pub sockets: Vec<PlacedSocket>,
}

/// A socket, and its place in its group.
#[derive(Debug)]
pub struct PlacedSocket {
    socket: Socket,
    place: usize,
    held: Arc<UnixStream>,
}

/// What a group is handed on as.
#[derive(Debug)]
pub struct Parts<S> {
    /// In their order.
    pub sockets: Vec<S>,
    /// Which places are in use, and what tells how long.
    pub uses: Vec<(Range<usize>, S)>,
}

impl<S> Default for Parts<S> {
    fn default() -> Self {
        Self { sockets: Vec::new(), uses: Vec::new() }
    }
}

impl Group {
    /// A socket that shares its address with those that follow. Fails where another process has it.
    pub fn bind(address: SocketAddr, mark: Option<Mark>) -> io::Result<Self> {
        let alone = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        alone.bind(&address.into())?;
        drop(alone);
        Ok(Self { sockets: vec![shared(address, mark)?], uses: Vec::new() })
    }

    /// Its address, with the port that it got.
    pub fn address(&self) -> io::Result<SocketAddr> {
        let first = self.sockets.first().ok_or(io::ErrorKind::NotConnected)?;
        Ok(first.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?)
    }

    /// As many places as there are workers, next to each other. Nothing comes there that does not name them, until
    /// [`Group::steer`].
    pub fn take(&mut self, workers: usize, mark: Option<Mark>) -> io::Result<Places> {
        self.uses.retain(|used| !used.is_over());
        let mut first = 0;
        let taken = |first: usize| {
            let wanted = first..first + workers;
            self.uses.iter().find(|u| u.places.start < wanted.end && wanted.start < u.places.end)
        };
        while let Some(before) = taken(first) {
            first = before.places.end;
        }
        let (places, address) = (first..first + workers, self.address()?);
        while self.sockets.len() < places.end {
            self.sockets.push(shared(address, mark)?);
        }
        let (held, ended) = UnixStream::pair()?;
        ended.set_nonblocking(true)?;
        let held = Arc::new(held);
        let place = |place: usize| {
            let socket = self.sockets[place].try_clone()?;
            Ok(PlacedSocket { socket, place, held: Arc::clone(&held) })
        };
        let sockets = places.clone().map(place).collect::<io::Result<_>>()?;
        self.uses.push(Use { places, ended });
        Ok(Places { first, sockets })
    }

    /// Has new peers come to these places, each by its address. Those whose packets name a place go on there.
    pub fn steer(&self, first: usize, count: usize) -> io::Result<()> {
        let any = self.sockets.first().ok_or(io::ErrorKind::NotConnected)?;
        let number = |n| u16::try_from(n).map_err(io::Error::other);
        steer_by_connection_id(any, number(first)?, number(count)?)
    }

    /// Whether anybody uses one of its places.
    pub fn is_used(&self) -> bool {
        self.uses.iter().any(|used| !used.is_over())
    }

    /// A copy, for another process or another configuration.
    pub fn try_clone(&self) -> io::Result<Self> {
        let one = |used: &Use| Ok(Use { places: used.places.clone(), ended: used.ended.try_clone()? });
        Ok(Self {
            sockets: self.sockets.iter().map(Socket::try_clone).collect::<io::Result<_>>()?,
            uses: self.uses.iter().map(one).collect::<io::Result<_>>()?,
        })
    }

    /// What another process is handed.
    pub fn parts(&self) -> Parts<BorrowedFd<'_>> {
        let uses = self.uses.iter().map(|used| (used.places.clone(), used.ended.as_fd()));
        Parts { sockets: self.sockets.iter().map(AsFd::as_fd).collect(), uses: uses.collect() }
    }

    /// What another process has handed over.
    pub fn of(parts: Parts<OwnedFd>) -> Self {
        let uses = parts.uses.into_iter().map(|(places, ended)| Use { places, ended: ended.into() });
        Self { sockets: parts.sockets.into_iter().map(Socket::from).collect(), uses: uses.collect() }
    }
}

/// A socket that others can be bound beside.
fn shared(address: SocketAddr, mark: Option<Mark>) -> io::Result<Socket> {
    let socket = udp(address)?;
    socket.set_reuse_port(true)?;
    if let Some(mark) = mark {
        tcp::set_mark(&socket, mark)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

impl PlacedSocket {
    /// Its place, which connection ids name.
    pub(super) fn place(&self) -> usize {
        self.place
    }

    /// For an endpoint, in the runtime of its worker.
    pub(super) fn placed(self) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let socket = TokioRuntime.wrap_udp_socket(self.socket.into())?;
        Ok(Arc::new(Placed { socket, _held: self.held }))
    }
}

/// The socket of an endpoint, which has its place until the endpoint and its connections are gone.
#[derive(Debug)]
struct Placed {
    socket: Arc<dyn AsyncUdpSocket>,
    _held: Arc<UnixStream>,
}

impl AsyncUdpSocket for Placed {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::UdpSocket,
        time::{Duration, Instant},
    };

    use quinn::ConnectionIdGenerator as _;

    use super::*;
    use crate::transport::quic::socket::PlaceIds;

    fn any() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    /// How many datagrams come to each, which are read: `all` together, or those that have come after a while.
    fn waiting(places: &Places, all: usize) -> Vec<usize> {
        let count = |placed: &PlacedSocket| {
            let socket: UdpSocket = placed.socket.try_clone().unwrap().into();
            std::iter::from_fn(|| socket.recv(&mut [0; 64]).ok()).count()
        };
        let (mut counts, deadline) = (vec![0; places.sockets.len()], Instant::now() + Duration::from_secs(2));
        loop {
            counts.iter_mut().zip(&places.sockets).for_each(|(n, placed)| *n += count(placed));
            if counts.iter().sum::<usize>() >= all || Instant::now() >= deadline {
                return counts;
            }
            std::thread::yield_now();
        }
    }

    /// New peers, each of which says something twice.
    fn newcomers(count: usize, to: SocketAddr) {
        for _ in 0..count {
            let client = UdpSocket::bind(any()).unwrap();
            for _ in 0..2 {
                client.send_to(&[0xc0, 0, 0, 0, 1, 8, 9, 9, 9, 9, 9, 9, 9, 9], to).unwrap();
            }
        }
    }

    /// A packet that names a place finds it from any address, in the handshake and after it; one that names none goes to the
    /// places that newcomers are steered to, by its address.
    #[test]
    fn packets_find_the_place_of_their_connection_id_from_any_address_whoever_takes_newcomers() {
        for family in [any(), "[::1]:0".parse().unwrap()] {
            let mut group = Group::bind(family, None).unwrap();
            let old = group.take(2, None).unwrap();
            let address = group.address().unwrap();
            group.steer(old.first, 2).unwrap();
            let client = || UdpSocket::bind((address.ip(), 0)).unwrap();
            for i in 0..60 {
                let client = client();
                client.send_to(&[0xc0, 0, 0, 0, 1, 8, i], address).unwrap();
                client.send_to(&[0xc0, 0, 0, 0, 1, 8, i], address).unwrap();
            }
            let by_address = waiting(&old, 120);
            assert_eq!(by_address.iter().sum::<usize>(), 120);
            assert!(
                by_address.iter().all(|n| *n > 0 && n % 2 == 0),
                "{by_address:?}: one address, one place"
            );
            let new = group.take(3, None).unwrap();
            assert_eq!((old.first, new.first), (0, 2));
            group.steer(new.first, 3).unwrap();
            for places in [&old, &new] {
                for (i, placed) in places.sockets.iter().enumerate() {
                    let mut ids = PlaceIds::new(placed.place()).unwrap();
                    for _ in 0..20 {
                        let id = ids.generate_cid();
                        assert_eq!(id.len(), ids.cid_len());
                        client().send_to(&[&[0x40], &id[..]].concat(), address).unwrap();
                        let length = u8::try_from(id.len()).unwrap();
                        client().send_to(&[&[0xe0, 0, 0, 0, 1, length], &id[..]].concat(), address).unwrap();
                    }
                    let mut got = waiting(places, 40);
                    assert_eq!(got.remove(i), 40);
                    assert!(got.iter().all(|n| *n == 0), "{got:?}");
                }
            }
        }
    }

    /// What is handed on goes on: those who had places keep them until they have closed them, and their places are used again
    /// when all have.
    #[test]
    fn places_are_used_again_when_all_who_had_them_are_gone() {
        let mut first = Group::bind(any(), None).unwrap();
        let mut before = first.take(2, None).unwrap();
        first.steer(before.first, 2).unwrap();
        let handed = first.try_clone().unwrap();
        let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let parts = handed.parts();
        let mut next = Group::of(Parts {
            sockets: parts.sockets.into_iter().map(owned).collect(),
            uses: parts.uses.into_iter().map(|(places, end)| (places, owned(end))).collect(),
        });
        drop(handed);
        let after = next.take(2, None).unwrap();
        assert_eq!(after.first, 2);
        next.steer(after.first, 2).unwrap();
        newcomers(20, next.address().unwrap());
        assert_eq!(waiting(&after, 40).iter().sum::<usize>(), 40);
        assert_eq!(waiting(&before, 0).iter().sum::<usize>(), 0);
        // One of them is still there.
        drop(first);
        before.sockets.pop();
        assert_eq!(next.take(2, None).unwrap().first, 4);
        drop(before);
        assert_eq!(next.take(1, None).unwrap().first, 0);
        assert!(next.is_used());
        drop(after);
        assert!(!next.is_used());
    }

    #[test]
    fn an_address_that_another_process_has_is_not_shared() {
        let taken = UdpSocket::bind(any()).unwrap();
        assert!(Group::bind(taken.local_addr().unwrap(), None).is_err());
    }
}
