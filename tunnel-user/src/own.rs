//! Our own listening addresses, as others may write them.
//!
//! Enters: what our listeners are bound to. Leaves: whether a connection to an address would arrive at one
//! of them. Invariant: when that cannot be found out, it would. It never opens a socket.

use std::net::{IpAddr, SocketAddr};

/// Addresses that our listeners are bound to.
#[derive(Clone, Debug)]
pub struct OwnListeners {
    listeners: Vec<SocketAddr>,
    local: fn() -> Option<Vec<IpAddr>>,
}

impl OwnListeners {
    /// The addresses, with the ports that they got where the configuration says 0.
    pub fn new(listeners: &[SocketAddr]) -> Self {
        Self::with_local(listeners, local_addresses)
    }

    /// The same on a host that has other addresses: for tests.
    pub(crate) fn with_local(listeners: &[SocketAddr], local: fn() -> Option<Vec<IpAddr>>) -> Self {
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
        ip.is_loopback() || ip.is_unspecified() || (self.local)().is_none_or(|local| local.contains(&ip))
    }
}

/// The addresses of this host's interfaces, asked anew: they come and go. It is asked only for an address
/// with the port of a listener that is bound to every address.
fn local_addresses() -> Option<Vec<IpAddr>> {
    let ip = |ifa: nix::ifaddrs::InterfaceAddress| {
        let addr = ifa.address?;
        let v4 = addr.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| addr.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    Some(nix::ifaddrs::getifaddrs().ok()?.filter_map(ip).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_its_loopback_address_and_what_cannot_be_found_out_is_ours() {
        assert!(local_addresses().is_some_and(|l| l.contains(&IpAddr::from([127, 0, 0, 1]))));
        let unknown = OwnListeners::with_local(&["0.0.0.0:15008".parse().unwrap()], || None);
        assert!(unknown.contains("203.0.113.1:15008".parse().unwrap()));
        assert!(!unknown.contains("203.0.113.1:15009".parse().unwrap()));
    }
}
