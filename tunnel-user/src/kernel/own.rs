//! Whether an address leads to one of our own listeners. The kernel's routes decide; no list of addresses is kept.
//!
//! If it cannot be determined, the address counts as our own.

use std::net::{IpAddr, SocketAddr};

use crate::kernel::netlink::Netlink;

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
    let route = Netlink::open().and_then(|kernel| kernel.route(ip)).ok()?;
    Some(route.is_some_and(|route| route.local))
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
