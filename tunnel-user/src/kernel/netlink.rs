//! Questions to the kernel about routes (rtnetlink(7)).
//!
//! A socket belongs to the network namespace in which it was made, so its answers do too, whichever thread asks.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
};

use ipnet::IpNet;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
    },
};

/// Of `linux/rtnetlink.h` and `linux/netlink.h`.
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_PREFSRC: u16 = 7;
/// The kind of an attribute without its flags.
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
/// `RTMGRP_IPV4_IFADDR`, `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV4_RULE`, `RTMGRP_IPV6_IFADDR`, `RTMGRP_IPV6_ROUTE`.
const CHANGES: u32 = 0x10 | 0x40 | 0x80 | 0x100 | 0x400;
/// As `struct rtmsg` has them (`linux/socket.h`).
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// The sizes of a `struct nlmsghdr`, of a `struct rtmsg`, and of the header of a `struct rtattr`.
const NLMSG: usize = 16;
const RTMSG: usize = 12;
const RTATTR: usize = 4;
/// Where in a `struct rtmsg` its family, the length of its destination and its type are.
const RTM_FAMILY: usize = 0;
const RTM_DST_LEN: usize = 1;
const RTM_TYPE: usize = 7;
/// What the kernel puts into one message of a dump at most (`netlink_dump`, net/netlink/af_netlink.c).
const DUMP_MAX: usize = 32 * 1024;

/// A way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The address is this host's own.
    pub local: bool,
    /// What an unbound socket gets for its own address.
    pub source: Option<IpAddr>,
}

/// A socket for questions, or for news.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Opens one in the namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let kernel = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self(kernel))
    }

    /// Opens one that becomes readable when an address, a route or a rule changes in the namespace of the calling thread.
    pub fn watch() -> io::Result<Self> {
        let news = Self::open()?;
        bind(news.0.as_raw_fd(), &NetlinkAddr::new(0, CHANGES))?;
        Ok(news)
    }

    /// Reads the news; whether there were any. Some that were lost count: something changed.
    pub fn read_news(&self) -> bool {
        let mut buffer = vec![0; DUMP_MAX];
        let mut any = false;
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(0) | Err(Errno::EAGAIN) => return any,
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => any = true,
                Err(_) => return true,
            }
        }
    }

    /// The route to `ip`; none where none leads there.
    pub fn route(&self, ip: IpAddr) -> io::Result<Option<Route>> {
        let (family, addr) = match ip {
            IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
            IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
        };
        self.ask(family, NLM_F_REQUEST, Some(&addr))?;
        // The kernel answers before send(2) returns, so nothing is waited for.
        let mut answer = [0; 1024];
        let n = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let message = Message::parse(&answer[..n]).next().ok_or(io::ErrorKind::InvalidData)?;
        match message.kind {
            RTM_NEWROUTE => Ok(Some(Route {
                local: message.byte(RTM_TYPE) == Some(RTN_LOCAL),
                source: message.attribute(RTA_PREFSRC).and_then(address),
            })),
            // No route: nothing arrives anywhere.
            NLMSG_ERROR => Ok(None),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The destinations of all routes to elsewhere, of every table, no more than `most`.
    pub fn destinations(&self, most: usize) -> io::Result<Vec<IpNet>> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            self.ask(family, NLM_F_REQUEST | NLM_F_DUMP, None)?;
            let mut buffer = vec![0; DUMP_MAX];
            'dump: loop {
                let n = match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    Err(Errno::EINTR) => continue,
                    n => n?,
                };
                for message in Message::parse(&buffer[..n]) {
                    match message.kind {
                        NLMSG_DONE | NLMSG_ERROR => break 'dump,
                        // Read to its end, or the next answer would be the rest of this one.
                        _ if found.len() >= most => {}
                        _ => found.extend(message.destination()),
                    }
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Sends a question about routes of a family: about an address, or all.
    fn ask(&self, family: u8, flags: u16, addr: Option<&[u8]>) -> io::Result<()> {
        let attribute = addr.map_or(0, |addr| RTATTR + addr.len());
        let length = NLMSG + RTMSG + attribute;
        let mut asked = Vec::with_capacity(length);
        asked.extend(u32::try_from(length).map_err(io::Error::other)?.to_ne_bytes());
        asked.extend([RTM_GETROUTE.to_ne_bytes(), flags.to_ne_bytes()].as_flattened());
        // Sequence and sender: one question at a time is asked on a socket.
        asked.extend([0; 8]);
        let prefix = addr.map_or(0, |addr| 8 * addr.len());
        let prefix = u8::try_from(prefix).map_err(io::Error::other)?;
        asked.extend([family, prefix, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        if let Some(addr) = addr {
            let attribute = u16::try_from(attribute).map_err(io::Error::other)?;
            asked.extend([attribute.to_ne_bytes(), RTA_DST.to_ne_bytes()].as_flattened());
            asked.extend(addr);
        }
        send(self.0.as_raw_fd(), &asked, MsgFlags::empty())?;
        Ok(())
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One message of an answer.
struct Message<'a> {
    kind: u16,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The messages of a datagram; those that are cut off are none.
    fn parse(datagram: &'a [u8]) -> impl Iterator<Item = Self> {
        let mut rest = datagram;
        std::iter::from_fn(move || {
            let length = usize::try_from(u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?)).ok()?;
            let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
            let body = rest.get(NLMSG..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some(Self { kind, body })
        })
    }

    /// A byte of the `struct rtmsg`.
    fn byte(&self, at: usize) -> Option<u8> {
        self.body.get(at).copied()
    }

    fn attribute(&self, wanted: u16) -> Option<&'a [u8]> {
        let mut rest = self.body.get(RTMSG..)?;
        loop {
            let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
            let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
            let value = rest.get(RTATTR..length)?;
            if kind & NLA_TYPE_MASK == wanted {
                return Some(value);
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
    }

    /// Of a route to elsewhere.
    fn destination(&self) -> Option<IpNet> {
        if self.kind != RTM_NEWROUTE || self.byte(RTM_TYPE)? != RTN_UNICAST {
            return None;
        }
        let unspecified = match self.byte(RTM_FAMILY)? {
            AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return None,
        };
        let ip = self.attribute(RTA_DST).map_or(Some(unspecified), address)?;
        IpNet::new(ip, self.byte(RTM_DST_LEN)?).ok().map(|net| net.trunc())
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_or_empty_is_no_message() {
        assert_eq!(Message::parse(&[]).count(), 0);
        assert_eq!(Message::parse(&[0; 64]).count(), 0);
        let mut one = vec![28, 0, 0, 0, 24, 0, 0, 0];
        one.extend([0; 20]);
        assert_eq!(Message::parse(&one).count(), 1);
        assert_eq!(Message::parse(&one[..27]).count(), 0);
        let message = Message::parse(&one).next().unwrap();
        assert!(message.destination().is_none() && message.attribute(RTA_DST).is_none());
    }

    #[test]
    fn the_kernel_tells_what_an_unbound_socket_gets() {
        let kernel = Netlink::open().unwrap();
        let route = kernel.route(Ipv4Addr::LOCALHOST.into()).unwrap().unwrap();
        assert!(route.local && route.source == Some(Ipv4Addr::LOCALHOST.into()));
        for net in kernel.destinations(usize::MAX).unwrap() {
            assert!(!net.addr().is_loopback(), "{net}");
        }
        assert!(!Netlink::watch().unwrap().read_news());
    }
}
