//! What the kernel says about TCP sockets (`Documentation/networking/proc_net_tcp.rst`).

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result};

/// `TCP_ESTABLISHED` and `TCP_LISTEN` of `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

/// One socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's.
    pub remote: SocketAddr,
    /// As in `include/net/tcp_states.h`.
    pub state: u8,
    /// Bytes that the peer has not acknowledged; of a listener, nothing.
    pub send_queue: u64,
    /// Bytes that the program has not read; of a listener, connections that were not accepted.
    pub recv_queue: u64,
}

impl Socket {
    /// Whether it is a listener.
    pub fn listens(&self) -> bool {
        self.state == LISTEN
    }

    /// Whether it is up.
    pub fn established(&self) -> bool {
        self.state == ESTABLISHED
    }
}

/// Those of the namespace that this thread is in.
pub fn table() -> Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for name in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{name}"))?;
        for line in text.lines().skip(1) {
            sockets.push(parse(line).with_context(|| format!("a line of /proc/net/{name}: {line}"))?);
        }
    }
    Ok(sockets)
}

fn parse(line: &str) -> Option<Socket> {
    let mut words = line.split_whitespace().skip(1);
    let (local, remote) = (address(words.next()?)?, address(words.next()?)?);
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    let (send, recv) = words.next()?.split_once(':')?;
    let queue = |hex| u64::from_str_radix(hex, 16).ok();
    Some(Socket { local, remote, state, send_queue: queue(send)?, recv_queue: queue(recv)? })
}

/// Words of the address as this machine's numbers, then the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for at in (0..ip.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    }
    let ip: IpAddr = match bytes.len() {
        4 => Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into(),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into(),
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernel_is_understood() {
        let line =
            "   0: 0100007F:1F90 020011AC:A001 01 00000010:00000001 00:00000000 00000000     0        0 1";
        let socket = parse(line).unwrap();
        assert_eq!(socket.local, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(socket.remote, "172.17.0.2:40961".parse().unwrap());
        assert!(socket.established());
        assert_eq!((socket.send_queue, socket.recv_queue), (16, 1));
        let six = address("00000000000000000000000001000000:0050");
        assert_eq!(six, Some("[::1]:80".parse().unwrap()));
    }
}
