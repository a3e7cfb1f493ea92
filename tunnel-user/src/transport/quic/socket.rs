//! A UDP socket of QUIC, and the connection ids by which packets find the socket of their worker.

use std::{io, net::SocketAddr, os::fd::AsFd as _, sync::Once};

use aws_lc_rs::rand;
use quinn::{ConnectionId, ConnectionIdGenerator};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{kernel::helper, transport::tcp::Own};

/// What waits in a UDP socket, each way: 4 MiB are what 1.6 Gbit/s bring in 20 ms, in which a busy worker may be elsewhere.
/// The kernel's default, 208 KiB, loses packets well below that.
pub const BUFFER: usize = 4 << 20;
/// The length of our connection ids: a place, `TAG`, and 64 bits that nobody guesses. Clients that make up the first id of a
/// connection make it of another length, mostly of 8 bytes (RFC 9000 section 7.2 asks for 8 at least).
pub const ID_LEN: u8 = 11;
/// By which an id of ours is told from one of this length that a client has made up.
pub const ID_TAG: u8 = 0x74;

/// A socket for connections to peers of the family of `to`, known to our captures.
pub fn client_socket(to: SocketAddr, own: &Own) -> io::Result<Socket> {
    let socket = udp(to)?;
    own.claim(socket.as_fd())?;
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    socket.bind(&any.into())?;
    Ok(socket)
}

/// With buffers, not bound.
pub(super) fn udp(address: SocketAddr) -> io::Result<Socket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::UDP))?;
    // With CAP_NET_ADMIN beyond the limit of the system.
    if helper::force_buffers(socket.as_fd(), BUFFER, Some(BUFFER)).is_err() {
        socket.set_recv_buffer_size(BUFFER)?;
        socket.set_send_buffer_size(BUFFER)?;
    }
    // The kernel doubles what it is told, for its own books (socket(7)).
    let got = socket.recv_buffer_size()?.min(socket.send_buffer_size()?) / 2;
    if got < BUFFER {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            tracing::warn!(
                wanted = BUFFER,
                got,
                "the kernel cuts the buffers of UDP sockets, and HTTP/3 will lose packets under load: \
                 raise net.core.rmem_max and net.core.wmem_max, or run with CAP_NET_ADMIN"
            );
        });
    }
    Ok(socket)
}

/// Connection ids that say whose they are. A place is no secret: peers see one address, and what they learn is which of our
/// cores serves them.
#[derive(Debug)]
pub(super) struct PlaceIds {
    place: [u8; 2],
}

impl PlaceIds {
    /// For a place in a group; there are 65,536, of which the kernel takes one less.
    pub(super) fn new(place: usize) -> io::Result<Self> {
        Ok(Self { place: u16::try_from(place).map_err(io::Error::other)?.to_be_bytes() })
    }
}

impl ConnectionIdGenerator for PlaceIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_LEN as usize];
        // Without randomness from the kernel the process would not have come so far.
        if rand::fill(&mut id).is_err() {
            id.fill_with(|| fastrand::u8(..));
        }
        id[..2].copy_from_slice(&self.place);
        id[2] = ID_TAG;
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_LEN.into()
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}
