//! Our own listening addresses, as others may write them.
//!
//! Enters: what our listeners are bound to. Leaves: whether a connection to an address would arrive at one
//! of them. Invariant: when that cannot be found out, it would. It keeps no list of addresses: the kernel is asked.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// Addresses that our listeners are bound to.
#[derive(Clone, Debug)]
pub struct OwnListeners {
    listeners: Vec<SocketAddr>,
    /// Whether an address is this host's; `None` where that cannot be found out.
    local: fn(IpAddr) -> Option<bool>,
}

impl OwnListeners {
    /// The addresses, with the ports that they got where the configuration says 0.
    pub fn new(listeners: &[SocketAddr]) -> Self {
        Self::with_local(listeners, is_delivered_here)
    }

    /// The same on a host that has other addresses: for tests.
    pub(crate) fn with_local(listeners: &[SocketAddr], local: fn(IpAddr) -> Option<bool>) -> Self {
        let listeners = listeners.iter().map(|l| SocketAddr::new(l.ip().to_canonical(), l.port())).collect();
        Self { listeners, local }
    }

    /// Whether a connection to `addr` would arrive at one of them.
    pub fn contains(&self, addr: SocketAddr) -> bool {
        let ip = addr.ip().to_canonical();
        self.listeners.iter().filter(|l| l.port() == addr.port()).any(|l| {
            // Linux connects the unspecified address to loopback.
            let same = l.ip() == ip || (ip.is_unspecified() && l.ip().is_loopback());
            let everywhere = l.ip().is_unspecified() && (l.is_ipv6() || ip.is_ipv4());
            same || (everywhere && self.is_local(ip))
        })
    }

    /// Whether `ip` is this host's. When that cannot be found out, it is: the safe mistake.
    fn is_local(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || ip.is_unspecified() || (self.local)(ip).unwrap_or(true)
    }
}

/// Whether the kernel delivers to this host what is sent to `ip`: by one look into its routes, however many interfaces and
/// addresses there are, and as they are now. It is asked only for an address with the port of a listener that is bound to
/// every address.
fn is_delivered_here(ip: IpAddr) -> Option<bool> {
    route_type(ip).ok().map(|kind| kind == Some(RTN_LOCAL))
}

/// Of `linux/rtnetlink.h` and `linux/netlink.h`.
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTN_LOCAL: u8 = 2;
const RTA_DST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
/// As `struct rtmsg` has them (`linux/socket.h`).
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// The sizes of a `struct nlmsghdr`, of a `struct rtmsg`, and of the header of a `struct rtattr`.
const NLMSG: usize = 16;
const RTMSG: usize = 12;
const RTATTR: usize = 4;
/// Where in a `struct rtmsg` its `rtm_type` is.
const RTM_TYPE: usize = 7;

/// What kind of route leads to `ip`; none where none does (rtnetlink(7), RTM_GETROUTE).
fn route_type(ip: IpAddr) -> io::Result<Option<u8>> {
    let (family, addr) = match ip {
        IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
    };
    let length = NLMSG + RTMSG + RTATTR + addr.len();
    let mut asked = Vec::with_capacity(length);
    asked.extend(u32::try_from(length).map_err(io::Error::other)?.to_ne_bytes());
    asked.extend([RTM_GETROUTE.to_ne_bytes(), NLM_F_REQUEST.to_ne_bytes()].as_flattened());
    // Sequence and sender: it is the only message on this socket.
    asked.extend([0; 8]);
    let prefix = u8::try_from(8 * addr.len()).map_err(io::Error::other)?;
    asked.extend([family, prefix, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let attribute = u16::try_from(RTATTR + addr.len()).map_err(io::Error::other)?;
    asked.extend([attribute.to_ne_bytes(), RTA_DST.to_ne_bytes()].as_flattened());
    asked.extend(addr);

    let kernel =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    send(kernel.as_raw_fd(), &asked, MsgFlags::empty())?;
    // The kernel answers before send(2) returns, so nothing is waited for.
    let mut answer = [0; 1024];
    let n = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    let answer = &answer[..n];
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes);
    match kind {
        Some(RTM_NEWROUTE) => answer.get(NLMSG + RTM_TYPE).copied().map(Some),
        // No route: nothing arrives anywhere.
        Some(NLMSG_ERROR) => Some(None),
        _ => None,
    }
    .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_which_addresses_are_this_hosts_and_what_cannot_be_found_out_is_ours() {
        let local = |ip: &str| is_delivered_here(ip.parse().unwrap());
        assert_eq!(local("127.0.0.1"), Some(true));
        // Of TEST-NET-3 (RFC 5737), and of the discard prefix (RFC 6666).
        assert_eq!((local("203.0.113.1"), local("100::1")), (Some(false), Some(false)));
        for ifa in nix::ifaddrs::getifaddrs().unwrap() {
            let Some(addr) = ifa.address else { continue };
            let v4 = addr.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            // One of a link is this host's on that link only.
            let v6 = addr.as_sockaddr_in6().map(|a| a.ip()).filter(|ip| !ip.is_unicast_link_local());
            if let Some(ip) = v4.or(v6.map(IpAddr::V6)) {
                assert_eq!(is_delivered_here(ip), Some(true), "{ip}");
            }
        }
        let unknown = OwnListeners::with_local(&["0.0.0.0:15008".parse().unwrap()], |_| None);
        assert!(unknown.contains("203.0.113.1:15008".parse().unwrap()));
        assert!(!unknown.contains("203.0.113.1:15009".parse().unwrap()));
    }
}
