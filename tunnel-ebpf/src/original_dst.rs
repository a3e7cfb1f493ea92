//! `getpeername4/6`, `getsockname4/6` and `getsockopt` for `SO_ORIGINAL_DST`: on a captured socket they return its
//! original destination, and the source address that its route would have given it.
//!
//! # Invariants
//! - Calls on other sockets pass unchanged, and no call fails that would have succeeded.

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_TCP_CLOSE, BPF_TCP_LISTEN, bpf_sock, bpf_sockopt},
    helpers::bpf_get_netns_cookie,
    programs::{SockAddrContext, SockoptContext},
};
use tunnel_common::{addr::Endpoint, flow::FlowKey, names::Counter};

use crate::maps;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const SOL_IP: i32 = 0;
const SOL_IPV6: i32 = 41;
/// `SO_ORIGINAL_DST` of `linux/netfilter_ipv4.h`; `IP6T_SO_ORIGINAL_DST` has the same number.
const SO_ORIGINAL_DST: i32 = 80;
/// `struct sockaddr_in`, `struct sockaddr_in6`.
const SOCKADDR_IN: i32 = 16;
const SOCKADDR_IN6: i32 = 28;
/// Beyond it the kernel shows the program only a part of the answer, and wants `optlen` zero to keep its
/// own (Documentation/bpf/prog_cgroup_sockopt.rst).
const PAGE_SIZE: i32 = 4096;

#[inline(always)]
pub(crate) fn peer_name4(ctx: &SockAddrContext) {
    // SAFETY: fields of the context, at the width that the verifier allows.
    unsafe {
        let Some(origin) = maps::origin((*ctx.sock_addr).__bindgen_anon_1.sk) else { return };
        let dst = origin.dst();
        (*ctx.sock_addr).user_ip4 = dst.v4_be();
        (*ctx.sock_addr).user_port = u32::from(dst.port().to_be());
    }
    maps::count(Counter::PeerNames);
}

#[inline(always)]
pub(crate) fn peer_name6(ctx: &SockAddrContext) {
    // SAFETY: as above.
    unsafe {
        let Some(origin) = maps::origin((*ctx.sock_addr).__bindgen_anon_1.sk) else { return };
        let dst = origin.dst();
        let words = dst.v6_be();
        (*ctx.sock_addr).user_ip6[0] = words[0];
        (*ctx.sock_addr).user_ip6[1] = words[1];
        (*ctx.sock_addr).user_ip6[2] = words[2];
        (*ctx.sock_addr).user_ip6[3] = words[3];
        (*ctx.sock_addr).user_port = u32::from(dst.port().to_be());
    }
    maps::count(Counter::PeerNames);
}

#[inline(always)]
pub(crate) fn sock_name4(ctx: &SockAddrContext) {
    // SAFETY: a field of the context, at the width that the verifier allows.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    let Some(dst) = routed(sk) else { return };
    // SAFETY: the helper takes the context as it is.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    if let Some(source) = maps::source_v4(netns, dst.v4_be()) {
        // SAFETY: as above, for writing.
        unsafe { (*ctx.sock_addr).user_ip4 = source };
        maps::count(Counter::SockNames);
    }
}

#[inline(always)]
pub(crate) fn sock_name6(ctx: &SockAddrContext) {
    // SAFETY: a field of the context, at the width that the verifier allows.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    let Some(dst) = routed(sk) else { return };
    // SAFETY: the helper takes the context as it is.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let source = if dst.is_v4() {
        let mapped = |v4| Endpoint::from_v4_be(v4, 0).v6_be();
        maps::source_v4(netns, dst.v4_be()).map(mapped)
    } else {
        maps::source_v6(netns, dst.v6_be())
    };
    let Some(source) = source else { return };
    // SAFETY: as above, for writing.
    unsafe {
        (*ctx.sock_addr).user_ip6[0] = source[0];
        (*ctx.sock_addr).user_ip6[1] = source[1];
        (*ctx.sock_addr).user_ip6[2] = source[2];
        (*ctx.sock_addr).user_ip6[3] = source[3];
    }
    maps::count(Counter::SockNames);
}

/// Where a captured connection wanted to go whose socket got its address by its route.
#[inline(always)]
fn routed(sk: *mut bpf_sock) -> Option<Endpoint> {
    let origin = maps::origin(sk).filter(|origin| origin.lacks_source())?;
    // SAFETY: a field of the context's socket.
    let state = unsafe { (*sk).state };
    // After an attempt that failed the socket has no address.
    if state == BPF_TCP_CLOSE || state == BPF_TCP_LISTEN { None } else { Some(origin.dst()) }
}

#[inline(always)]
pub(crate) fn getsockopt(ctx: &SockoptContext) {
    let opt = ctx.sockopt;
    // SAFETY: fields of the context.
    let (level, name, len) = unsafe { ((*opt).level, (*opt).optname, (*opt).optlen) };
    if name != SO_ORIGINAL_DST || (level != SOL_IP && level != SOL_IPV6) {
        if len > PAGE_SIZE {
            // SAFETY: as above, for writing.
            unsafe { (*opt).optlen = 0 };
        }
        return;
    }
    if let Some(dst) = original_dst(ctx)
        && answer(opt, level, dst)
    {
        maps::count(Counter::OriginalDsts);
    }
}

/// Where the connection of this socket was meant to go: the application's own socket, or the one that a
/// proxy behind our capture accepted.
#[inline(always)]
fn original_dst(ctx: &SockoptContext) -> Option<Endpoint> {
    // SAFETY: a field of the context; the verifier knows `sk` to be a valid socket.
    let sk: *mut bpf_sock = unsafe { (*ctx.sockopt).__bindgen_anon_1.sk };
    if sk.is_null() {
        return None;
    }
    if let Some(origin) = maps::origin(sk) {
        return Some(origin.dst());
    }
    // Read before the branch, and volatile, for the reason given in tcp_events.rs.
    // SAFETY: fields of the socket, each at the width that the verifier allows.
    let (family, own_port, peer_port, own4, peer4, own6, peer6) = unsafe {
        let read = |field: *const u32| ptr::read_volatile(field);
        let read4 = |field: *const [u32; 4]| {
            let word: *const u32 = field.cast();
            [read(word), read(word.add(1)), read(word.add(2)), read(word.add(3))]
        };
        (
            read(&raw const (*sk).family),
            maps::low_half(read(&raw const (*sk).src_port)),
            u16::from_be(ptr::read_volatile(&raw const (*sk).dst_port)),
            read(&raw const (*sk).src_ip4),
            read(&raw const (*sk).dst_ip4),
            read4(&raw const (*sk).src_ip6),
            read4(&raw const (*sk).dst_ip6),
        )
    };
    let (own, peer) = match family {
        AF_INET => (Endpoint::from_v4_be(own4, own_port), Endpoint::from_v4_be(peer4, peer_port)),
        AF_INET6 => (Endpoint::from_v6_be(own6, own_port), Endpoint::from_v6_be(peer6, peer_port)),
        _ => return None,
    };
    // SAFETY: the helper takes the context as it is.
    let key = FlowKey::new(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }, peer, own);
    maps::flow(&key).map(|origin| origin.dst())
}

/// Writes a socket address into the caller's buffer. `false` when it does not fit, or when the address is
/// of the other family: the kernel's own answer then stands.
#[inline(always)]
fn answer(opt: *mut bpf_sockopt, level: i32, dst: Endpoint) -> bool {
    let v4 = dst.is_v4();
    if v4 != (level == SOL_IP) {
        return false;
    }
    let size = if v4 { SOCKADDR_IN } else { SOCKADDR_IN6 };
    // SAFETY: the verifier checks every store against `optval_end`. Volatile, because LLVM merges the
    // stores to `optlen` and `retval` into one of eight bytes, which the verifier refuses.
    unsafe {
        let start = (*opt).__bindgen_anon_2.optval.cast::<u8>();
        let end = (*opt).__bindgen_anon_3.optval_end.cast::<u8>();
        if start.add(SOCKADDR_IN as usize) > end {
            return false;
        }
        if v4 {
            ptr::write_volatile(start.cast::<u16>(), maps::low_half(AF_INET));
            ptr::write_volatile(start.add(2).cast::<u16>(), dst.port().to_be());
            ptr::write_volatile(start.add(4).cast::<u32>(), dst.v4_be());
            ptr::write_volatile(start.add(8).cast::<u64>(), 0);
        } else {
            if start.add(SOCKADDR_IN6 as usize) > end {
                return false;
            }
            let words = dst.v6_be();
            ptr::write_volatile(start.cast::<u16>(), maps::low_half(AF_INET6));
            ptr::write_volatile(start.add(2).cast::<u16>(), dst.port().to_be());
            ptr::write_volatile(start.add(4).cast::<u32>(), 0);
            ptr::write_volatile(start.add(8).cast::<u32>(), words[0]);
            ptr::write_volatile(start.add(12).cast::<u32>(), words[1]);
            ptr::write_volatile(start.add(16).cast::<u32>(), words[2]);
            ptr::write_volatile(start.add(20).cast::<u32>(), words[3]);
            ptr::write_volatile(start.add(24).cast::<u32>(), 0);
        }
        ptr::write_volatile(&raw mut (*opt).optlen, size);
        ptr::write_volatile(&raw mut (*opt).retval, 0);
    }
    true
}
