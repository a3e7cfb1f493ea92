//! `cgroup/connect4` and `connect6`.
//!
//! Enters: a `connect` of a captured cgroup. Leaves: the same call, to the capture listener of its network
//! namespace, with the original destination kept in the socket. Invariant: a destination is rewritten only
//! after it was recorded. It never captures our own sockets, nor anything but TCP.

use core::mem;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_CURRENT_NETNS, BPF_TCP_LISTEN, bpf_sock, bpf_sock_addr, bpf_sock_tuple},
    helpers::{
        bpf_get_netns_cookie,
        generated::{bpf_get_socket_cookie, bpf_set_retval, bpf_sk_lookup_tcp, bpf_sk_release},
    },
    programs::SockAddrContext,
};
use aya_log_ebpf::warn;
use tunnel_common::{
    addr::Endpoint,
    capture::{Rule, Verdict, decide, is_candidate},
    flow::Origin,
    names::Counter,
};

use crate::maps;

/// 127.0.0.1 in network order.
const LOOPBACK_V4: u32 = u32::from_ne_bytes([127, 0, 0, 1]);
/// The last word of `::1` in network order.
const LOOPBACK_V6_LAST: u32 = u32::from_ne_bytes([0, 0, 0, 1]);
/// The third word of `::ffff:0:0/96` in network order.
const V4_MAPPED_THIRD: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
const ENETUNREACH: i32 = 101;
const ECONNREFUSED: i32 = 111;
/// The parts of `struct bpf_sock_tuple` for each family: two addresses and two ports.
const TUPLE_V4: u32 = 12;
const TUPLE_V6: u32 = 36;

/// Why a connection fails.
pub(crate) enum Refused {
    /// No listener of ours is alive in its network namespace.
    NoListener,
    /// The kernel could not keep the original destination.
    NoMemory,
    /// The routes deny it.
    Denied,
    /// The capture refuses it.
    Unreachable,
}

/// 1: go on. 0: fail, with the error set here.
#[inline(always)]
pub(crate) fn verdict(outcome: Result<(), Refused>) -> i32 {
    let Err(reason) = outcome else { return 1 };
    let (counter, error) = match reason {
        Refused::NoListener => (Counter::RefusedNoListener, ECONNREFUSED),
        Refused::NoMemory => (Counter::RefusedNoMemory, ECONNREFUSED),
        Refused::Denied => (Counter::DeniedByRoute, ECONNREFUSED),
        Refused::Unreachable => (Counter::RefusedByRule, ENETUNREACH),
    };
    maps::count(counter);
    // SAFETY: sets the error of this system call; without it the caller would see EPERM.
    unsafe { bpf_set_retval(-error) };
    0
}

#[inline(always)]
pub(crate) fn try_connect4(ctx: &SockAddrContext) -> Result<(), Refused> {
    let sa = ctx.sock_addr;
    let Some(sk) = candidate(sa) else { return Ok(()) };
    // SAFETY: fields of the context, at the width that the verifier allows.
    let dst = Endpoint::from_v4_be(unsafe { (*sa).user_ip4 }, port(sa));
    let Some(to) = capture(ctx, sk, dst, true, maps::rule_v4(dst.v4_be()))? else { return Ok(()) };
    // SAFETY: as above, for writing.
    unsafe {
        (*sa).user_ip4 = LOOPBACK_V4;
        (*sa).user_port = u32::from(to.to_be());
    }
    Ok(())
}

#[inline(always)]
pub(crate) fn try_connect6(ctx: &SockAddrContext) -> Result<(), Refused> {
    let sa = ctx.sock_addr;
    let Some(sk) = candidate(sa) else { return Ok(()) };
    // SAFETY: fields of the context, at the width that the verifier allows.
    let words = unsafe { [(*sa).user_ip6[0], (*sa).user_ip6[1], (*sa).user_ip6[2], (*sa).user_ip6[3]] };
    let dst = Endpoint::from_v6_be(words, port(sa));
    let v4 = words[0] == 0 && words[1] == 0 && words[2] == V4_MAPPED_THIRD;
    let rule = if v4 { maps::rule_v4(dst.v4_be()) } else { maps::rule_v6(dst.v6_be()) };
    let Some(to) = capture(ctx, sk, dst, v4, rule)? else { return Ok(()) };
    // SAFETY: as above, for writing.
    unsafe {
        (*sa).user_ip6[0] = 0;
        (*sa).user_ip6[1] = 0;
        (*sa).user_ip6[2] = if v4 { V4_MAPPED_THIRD } else { 0 };
        (*sa).user_ip6[3] = if v4 { LOOPBACK_V4 } else { LOOPBACK_V6_LAST };
        (*sa).user_port = u32::from(to.to_be());
    }
    Ok(())
}

/// The socket, if its connections are for us to look at.
#[inline(always)]
fn candidate(sa: *mut bpf_sock_addr) -> Option<*mut bpf_sock> {
    // SAFETY: fields of the context; the verifier knows `sk` to be a valid socket.
    let (protocol, sk, mark) = unsafe {
        let sk = (*sa).__bindgen_anon_1.sk;
        ((*sa).protocol, sk, (*sk).mark)
    };
    if is_candidate(protocol, mark, maps::our_mark()) {
        return Some(sk);
    }
    if protocol == tunnel_common::capture::TCP {
        maps::count(Counter::Own);
    }
    None
}

/// The destination's port. `user_port` holds it in network order in its first two bytes.
#[inline(always)]
fn port(sa: *mut bpf_sock_addr) -> u16 {
    // SAFETY: a field of the context.
    u16::from_be(maps::low_half(unsafe { (*sa).user_port }))
}

/// Decides, and records the original destination. `Some(port)` of the listener when captured.
#[inline(always)]
fn capture(
    ctx: &SockAddrContext,
    sk: *mut bpf_sock,
    dst: Endpoint,
    v4: bool,
    rule: Option<&Rule>,
) -> Result<Option<u16>, Refused> {
    // SAFETY: the helper takes the context as it is.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let alive = |port| listener_is_alive(ctx, v4, port);
    match decide(rule, maps::listener(netns), v4, dst.port(), maps::on_failure(), alive) {
        Verdict::Leave => {
            // A socket may connect again after a captured attempt failed.
            maps::drop_origin(sk);
            maps::count(Counter::Left);
            Ok(None)
        }
        Verdict::Capture(to) => {
            // SAFETY: the helper takes the context as it is.
            let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
            if !maps::keep_origin(sk, Origin::new(cookie, dst)) {
                return Err(Refused::NoMemory);
            }
            maps::count(Counter::Captured);
            Ok(Some(to))
        }
        Verdict::LeaveOpen => {
            maps::drop_origin(sk);
            maps::report_missing_listener(netns);
            maps::count(Counter::LeftOpen);
            if maps::may_log(Counter::LeftOpen) {
                warn!(
                    ctx,
                    "no listener in network namespace {}: left in PLAINTEXT, as on_failure says", netns
                );
            }
            Ok(None)
        }
        Verdict::Refuse => {
            maps::report_missing_listener(netns);
            if maps::may_log(Counter::RefusedNoListener) {
                warn!(ctx, "no listener in network namespace {}: connection refused", netns);
            }
            Err(Refused::NoListener)
        }
        Verdict::Deny => {
            if maps::may_log(Counter::DeniedByRoute) {
                warn!(ctx, "connection to {:i} port {} denied by a route", octets(dst), dst.port());
            }
            Err(Refused::Denied)
        }
        Verdict::Unreachable => Err(Refused::Unreachable),
    }
}

/// The address, as the log takes it; an IPv4 address is v4-mapped.
#[inline(always)]
fn octets(dst: Endpoint) -> [u8; 16] {
    let [a, b, c, d] = dst.v6_be().map(u32::to_ne_bytes);
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
}

/// Whether a listener of the daemon's is alive on a loopback port of this namespace. The kernel closes
/// listeners with the process that held them, so this needs no heartbeat; the mark keeps whoever takes
/// the port afterwards from being handed plaintext.
#[inline(always)]
fn listener_is_alive(ctx: &SockAddrContext, v4: bool, port: u16) -> bool {
    // SAFETY: all zero is a valid tuple: plain integers. The size given to the helper chooses the family;
    // it wants no other padding cleared.
    let sk = unsafe {
        let mut tuple: bpf_sock_tuple = mem::zeroed();
        let size = if v4 {
            tuple.__bindgen_anon_1.ipv4.daddr = LOOPBACK_V4;
            tuple.__bindgen_anon_1.ipv4.dport = port.to_be();
            TUPLE_V4
        } else {
            tuple.__bindgen_anon_1.ipv6.daddr[3] = LOOPBACK_V6_LAST;
            tuple.__bindgen_anon_1.ipv6.dport = port.to_be();
            TUPLE_V6
        };
        bpf_sk_lookup_tcp(ctx.as_ptr(), &raw mut tuple, size, BPF_F_CURRENT_NETNS as u64, 0)
    };
    if sk.is_null() {
        return false;
    }
    // SAFETY: not null, and released once, here.
    unsafe {
        let listens = (*sk).state == BPF_TCP_LISTEN;
        let marked = (*sk).mark == maps::our_mark() || !maps::listener_is_marked();
        bpf_sk_release(sk.cast());
        listens && marked
    }
}
