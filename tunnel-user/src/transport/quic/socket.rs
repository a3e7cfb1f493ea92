//! The UDP sockets of QUIC, and the connection ids by which a worker's packets find it.
//!
//! # Invariants
//! - The sockets of one address are bound in the order of the workers, which is their order in the kernel's group
//!   (`reuseport_add_sock`): what a connection id says is a place in it.

use std::{io, net::SocketAddr, os::fd::AsFd as _, sync::Once};

use aws_lc_rs::rand;
use quinn::{ConnectionId, ConnectionIdGenerator};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    kernel::helper,
    model::mark::Mark,
    transport::{
        sockopt::steer_by_connection_id,
        tcp::{self, Own},
    },
};

/// What waits in a UDP socket, each way: 4 MiB are what 1.6 Gbit/s bring in 20 ms, in which a busy worker may be elsewhere.
/// The kernel's default, 208 KiB, loses packets well below that.
pub const BUFFER: usize = 4 << 20;
/// The length of our connection ids: the worker, and 56 bits that nobody guesses.
const ID: usize = 8;

/// Sockets that share one address, one for each worker. Fails where another process has it.
pub fn bind(address: SocketAddr, workers: usize, mark: Option<Mark>) -> io::Result<Vec<Socket>> {
    let alone = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    alone.bind(&address.into())?;
    drop(alone);
    let mut address = address;
    let sockets: Vec<Socket> = (0..workers)
        .map(|_| {
            let socket = udp(address)?;
            socket.set_reuse_port(true)?;
            if let Some(mark) = mark {
                tcp::set_mark(&socket, mark)?;
            }
            socket.bind(&address.into())?;
            let bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
            // Port 0 is the same port for all.
            address.set_port(bound.port());
            Ok(socket)
        })
        .collect::<io::Result<_>>()?;
    if let [first, _, ..] = &sockets[..] {
        steer_by_connection_id(first)?;
    }
    Ok(sockets)
}

/// A socket for connections to peers of the family of `to`, known to our captures.
pub fn client_socket(to: SocketAddr, own: &Own) -> io::Result<Socket> {
    let socket = udp(to)?;
    own.claim(std::os::fd::AsFd::as_fd(&socket))?;
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    socket.bind(&any.into())?;
    Ok(socket)
}

fn udp(address: SocketAddr) -> io::Result<Socket> {
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

/// Connection ids that say whose they are. The number of a worker is no secret: peers see one address, and what they learn
/// is which of our cores serves them.
#[derive(Debug)]
pub(super) struct WorkerIds {
    worker: u8,
}

impl WorkerIds {
    pub(super) fn new(worker: usize) -> Self {
        // Beyond 256 workers, packets find theirs by the addresses alone.
        Self { worker: worker.to_le_bytes()[0] }
    }
}

impl ConnectionIdGenerator for WorkerIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID];
        // Without randomness from the kernel the process would not have come so far.
        if rand::fill(&mut id).is_err() {
            id.fill_with(|| fastrand::u8(..));
        }
        id[0] = self.worker;
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// A packet after the handshake finds the worker that its connection id names, whatever address it comes from; one of a
    /// handshake goes by its address alone.
    #[test]
    fn packets_find_the_worker_of_their_connection_id_from_any_address() {
        let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let sockets: Vec<UdpSocket> = bind(free, 3, None).unwrap().into_iter().map(UdpSocket::from).collect();
        for (worker, socket) in sockets.iter().enumerate() {
            let mut ids = WorkerIds::new(worker);
            for _ in 0..20 {
                let id = ids.generate_cid();
                assert_eq!(id.len(), ids.cid_len());
                let client = UdpSocket::bind("127.0.0.1:0").unwrap();
                client.send_to(&[&[0x40], &id[..]].concat(), free).unwrap();
                let mut got = [0; 20];
                socket.set_nonblocking(false).unwrap();
                socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
                assert_eq!(socket.recv(&mut got).unwrap(), 1 + ID);
            }
        }
        let mut by_address = [0; 3];
        for _ in 0..60 {
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            for _ in 0..2 {
                client.send_to(&[0xc0, 0, 0, 0, 1, 8, 9, 9, 9], free).unwrap();
            }
        }
        for (socket, count) in sockets.iter().zip(&mut by_address) {
            socket.set_nonblocking(true).unwrap();
            while socket.recv(&mut [0; 20]).is_ok() {
                *count += 1;
            }
        }
        assert_eq!(by_address.iter().sum::<u32>(), 120);
        assert!(by_address.iter().all(|n| n % 2 == 0), "{by_address:?}: one address, one worker");
    }

    #[test]
    fn an_address_that_another_process_has_is_not_shared() {
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(bind(taken.local_addr().unwrap(), 1, None).is_err());
    }
}
