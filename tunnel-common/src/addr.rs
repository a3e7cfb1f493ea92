//! Network-order endpoints.
//!
//! Enters: addresses as the kernel's contexts or the standard library hold them. Leaves: [`Endpoint`],
//! one form for IPv4, IPv6 and v4-mapped IPv6, so that the two sides of a connection that name it
//! differently still compute the same key. Invariant: an IPv4 address is always held v4-mapped
//! (RFC 4291 section 2.5.5.2). It never resolves, prints or parses.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The first twelve bytes of a v4-mapped address, `::ffff:0:0/96`.
const V4_MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// An address and a port, in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    addr: [u8; 16],
    port: [u8; 2],
}

impl Endpoint {
    /// From an IPv4 address as the kernel's contexts hold it: network order in memory.
    #[inline(always)]
    pub const fn from_v4_be(addr: u32, port: u16) -> Self {
        let [a, b, c, d] = addr.to_ne_bytes();
        let [e, f, g, h, i, j, k, l, m, n, o, p] = V4_MAPPED;
        Self { addr: [e, f, g, h, i, j, k, l, m, n, o, p, a, b, c, d], port: port.to_be_bytes() }
    }

    /// From an IPv6 address as the kernel's contexts hold it: four words, each network order in memory.
    #[inline(always)]
    pub const fn from_v6_be(words: [u32; 4], port: u16) -> Self {
        let [a, b, c, d] = words[0].to_ne_bytes();
        let [e, f, g, h] = words[1].to_ne_bytes();
        let [i, j, k, l] = words[2].to_ne_bytes();
        let [m, n, o, p] = words[3].to_ne_bytes();
        Self { addr: [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p], port: port.to_be_bytes() }
    }

    /// The port, in host order.
    #[inline(always)]
    pub const fn port(&self) -> u16 {
        u16::from_be_bytes(self.port)
    }

    /// Whether this is an IPv4 address, mapped or not.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        self.addr[..12] == V4_MAPPED
    }

    /// The sixteen bytes of the address, in network order.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        self.addr
    }

    /// The last four bytes: the IPv4 address where [`Self::is_v4`] holds.
    #[inline(always)]
    pub const fn v4_octets(&self) -> [u8; 4] {
        [self.addr[12], self.addr[13], self.addr[14], self.addr[15]]
    }

    /// The IPv4 address as a context's field takes it: network order in memory.
    #[inline(always)]
    pub const fn v4_be(&self) -> u32 {
        u32::from_ne_bytes(self.v4_octets())
    }

    /// The IPv6 (or v4-mapped) address as a context's fields take it.
    #[inline(always)]
    pub const fn v6_be(&self) -> [u32; 4] {
        let a = &self.addr;
        [
            u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
            u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
            u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
            u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
        ]
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(a: SocketAddr) -> Self {
        let addr = match a.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        Self { addr, port: a.port().to_be_bytes() }
    }
}

impl From<Endpoint> for SocketAddr {
    /// A v4-mapped address comes out as the IPv4 address that it is.
    fn from(e: Endpoint) -> Self {
        Self::new(Ipv6Addr::from(e.addr).to_canonical(), e.port())
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn both_sides_of_a_connection_name_it_alike() {
        let v4: SocketAddr = "192.0.2.7:8080".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:192.0.2.7]:8080".parse().unwrap();
        let kernel = Endpoint::from_v4_be(u32::from_ne_bytes([192, 0, 2, 7]), 8080);
        assert_eq!(Endpoint::from(v4), Endpoint::from(mapped));
        assert_eq!(Endpoint::from(v4), kernel);
        assert_eq!(SocketAddr::from(kernel), v4);
        assert!(kernel.is_v4());
        assert_eq!(kernel.v4_be().to_ne_bytes(), [192, 0, 2, 7]);
    }

    #[test]
    fn words_of_a_context_round_trip() {
        let a: SocketAddr = "[2001:db8::1:2]:443".parse().unwrap();
        let e = Endpoint::from(a);
        assert!(!e.is_v4());
        assert_eq!(Endpoint::from_v6_be(e.v6_be(), 443), e);
        assert_eq!(SocketAddr::from(e), a);
    }
}
