//! Network-order endpoints, made from addresses of the kernel's contexts or of the standard library. [`Endpoint`] is
//! one form for IPv4, IPv6 and v4-mapped IPv6, so that both ends of a connection, which may name it differently,
//! compute the same key.
//!
//! # Invariants
//! - An IPv4 address is always held v4-mapped (RFC 4291 section 2.5.5.2).

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The third word of a v4-mapped address, `::ffff:0:0/96`; the first two are zero.
const V4_MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// An address and a port, in network order. Words, not bytes: that is how the contexts have them, and a
/// program that takes them apart runs out of registers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    addr: [u32; 4],
    port: u16,
    _zero: u16,
}

impl Endpoint {
    /// From an IPv4 address as the kernel's contexts hold it (network order in memory) and a port in host
    /// order.
    #[inline(always)]
    pub const fn from_v4_be(addr: u32, port: u16) -> Self {
        Self::from_v6_be([0, 0, V4_MAPPED, addr], port)
    }

    /// From an IPv6 address as the kernel's contexts hold it: four words, each network order in memory.
    #[inline(always)]
    pub const fn from_v6_be(addr: [u32; 4], port: u16) -> Self {
        Self { addr, port: port.to_be(), _zero: 0 }
    }

    /// The port, in host order.
    #[inline(always)]
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port)
    }

    /// Whether this is an IPv4 address, mapped or not.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.addr[0] == 0 && self.addr[1] == 0 && self.addr[2] == V4_MAPPED
    }

    /// The IPv4 address where [`Self::is_v4`] holds, as a context's field takes it.
    #[inline(always)]
    pub const fn v4_be(&self) -> u32 {
        self.addr[3]
    }

    /// A number that depends on every bit of the address and the port, evenly spread (the finaliser of MurmurHash3).
    #[inline(always)]
    pub const fn mix(&self) -> u32 {
        const A: u64 = 0xff51_afd7_ed55_8ccd;
        const B: u64 = 0xc4ce_b9fe_1a85_ec53;
        let [a, b, c, d] = self.addr;
        let mut x = (a as u64) << 32 | b as u64;
        x = (x ^ (x >> 33)).wrapping_mul(A) ^ ((c as u64) << 32 | d as u64);
        x = (x ^ (x >> 33)).wrapping_mul(B) ^ self.port as u64;
        x = (x ^ (x >> 33)).wrapping_mul(A);
        x = (x ^ (x >> 33)).wrapping_mul(B);
        (x >> 32) as u32
    }

    /// The IPv6 (or v4-mapped) address as a context's fields take it.
    #[inline(always)]
    pub const fn v6_be(&self) -> [u32; 4] {
        self.addr
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(a: SocketAddr) -> Self {
        let addr = match a.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3] = addr;
        let words = [[a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3], [d0, d1, d2, d3]];
        Self::from_v6_be(words.map(u32::from_ne_bytes), a.port())
    }
}

impl From<Endpoint> for SocketAddr {
    /// A v4-mapped address comes out as the IPv4 address that it is.
    fn from(e: Endpoint) -> Self {
        let [a, b, c, d] = e.addr.map(|word| u128::from(u32::from_be(word)));
        Self::new(Ipv6Addr::from_bits(a << 96 | b << 64 | c << 32 | d).to_canonical(), e.port())
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
