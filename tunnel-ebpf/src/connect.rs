//! `cgroup/connect4` and `connect6`: redirects a captured connect(2) to the listener of its network namespace.
//!
//! # Invariants
//! - A destination is rewritten only after it was recorded with the socket.
//! - A redirected connection stays on the machine: a socket bound to a network device is unbound, or refused.
//! - Only TCP is captured, and no socket that the daemon created.

use core::mem;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_CURRENT_NETNS, BPF_TCP_LISTEN, bpf_sock, bpf_sock_addr, bpf_sock_tuple},
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_netns_cookie,
        generated::{
            bpf_get_socket_cookie, bpf_set_retval, bpf_setsockopt, bpf_sk_lookup_tcp, bpf_sk_release,
        },
    },
    programs::SockAddrContext,
};
use aya_log_ebpf::warn;
use tunnel_common::{
    addr::Endpoint,
    capture::{DAEMON, Listener, Missing, Rule, TCP, Verdict, decide},
    flow::Origin,
    names::Counter,
};

use crate::{group, maps};

/// The third word of `::ffff:0:0/96` in network order.
const V4_MAPPED_THIRD: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
const ENETUNREACH: i32 = 101;
const ECONNREFUSED: i32 = 111;
const SOL_SOCKET: i32 = 1;
const SO_BINDTOIFINDEX: i32 = 62;
/// The parts of `struct bpf_sock_tuple` for each family: two addresses and two ports.
const TUPLE_V4: u32 = 12;
const TUPLE_V6: u32 = 36;

/// Why a connection fails.
pub(crate) enum Refused {
    /// No listener of ours is alive in its network namespace.
    NoListener,
    /// The kernel could not keep the original destination.
    NoMemory,
    /// The socket could not be taken off its network device.
    Bound,
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
        Refused::Bound => (Counter::RefusedBound, ECONNREFUSED),
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
    let Some(sk) = candidate(ctx) else { return Ok(()) };
    // SAFETY: fields of the context, at the width that the verifier allows.
    let (dst, unbound) = unsafe { (Endpoint::from_v4_be((*sa).user_ip4, port(sa)), (*sk).src_ip4 == 0) };
    let Some(via) = capture(ctx, sk, dst, true, unbound, maps::rule_v4(dst.v4_be()))? else { return Ok(()) };
    // SAFETY: as above, for writing.
    unsafe {
        (*sa).user_ip4 = via.v4_be();
        (*sa).user_port = u32::from(via.port().to_be());
    }
    Ok(())
}

#[inline(always)]
pub(crate) fn try_connect6(ctx: &SockAddrContext) -> Result<(), Refused> {
    let sa = ctx.sock_addr;
    let Some(sk) = candidate(ctx) else { return Ok(()) };
    // SAFETY: fields of the context and of its socket, at the width that the verifier allows.
    let (words, unbound) = unsafe {
        let own = [(*sk).src_ip6[0], (*sk).src_ip6[1], (*sk).src_ip6[2], (*sk).src_ip6[3]];
        (
            [(*sa).user_ip6[0], (*sa).user_ip6[1], (*sa).user_ip6[2], (*sa).user_ip6[3]],
            own[0] | own[1] | own[2] | own[3] == 0,
        )
    };
    let dst = Endpoint::from_v6_be(words, port(sa));
    let v4 = words[0] == 0 && words[1] == 0 && words[2] == V4_MAPPED_THIRD;
    let rule = if v4 { maps::rule_v4(dst.v4_be()) } else { maps::rule_v6(dst.v6_be()) };
    let Some(via) = capture(ctx, sk, dst, v4, unbound, rule)? else { return Ok(()) };
    let words = via.v6_be();
    // SAFETY: as above, for writing.
    unsafe {
        (*sa).user_ip6[0] = words[0];
        (*sa).user_ip6[1] = words[1];
        (*sa).user_ip6[2] = words[2];
        (*sa).user_ip6[3] = words[3];
        (*sa).user_port = u32::from(via.port().to_be());
    }
    Ok(())
}

/// The socket, if its connections are for us to look at.
#[inline(always)]
fn candidate(ctx: &SockAddrContext) -> Option<*mut bpf_sock> {
    let sa = ctx.sock_addr;
    // SAFETY: fields of the context; the verifier knows `sk` to be a valid socket.
    let (protocol, sk) = unsafe { ((*sa).protocol, (*sa).__bindgen_anon_1.sk) };
    if protocol != TCP || sk.is_null() {
        return None;
    }
    if !group::is_captured() {
        // Of an attempt that was captured, by somebody who has left since or given the socket away.
        leave(ctx, sk);
        return None;
    }
    if maps::is_own(sk) {
        maps::count(Counter::Own);
        return None;
    }
    Some(sk)
}

/// The destination's port. `user_port` holds it in network order in its first two bytes.
#[inline(always)]
fn port(sa: *mut bpf_sock_addr) -> u16 {
    // SAFETY: a field of the context.
    u16::from_be(maps::low_half(unsafe { (*sa).user_port }))
}

/// Decides, and records the original destination. `Some` of where the connection goes when captured. `unbound`: the socket
/// has no local address yet.
#[inline(always)]
fn capture(
    ctx: &SockAddrContext,
    sk: *mut bpf_sock,
    dst: Endpoint,
    v4: bool,
    unbound: bool,
    rule: Option<&Rule>,
) -> Result<Option<Endpoint>, Refused> {
    // SAFETY: the helper takes the context as it is.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let listener = maps::listener(netns);
    let alive = |listener: &Listener, via: &Endpoint| {
        if listener.is_own() {
            maps::is_listening(&listener.first(netns, v4))
        } else {
            proxy_is_listening(ctx, via, v4)
        }
    };
    let daemon =
        || maps::listener(DAEMON).is_some_and(|daemon| maps::is_listening(&daemon.first(DAEMON, true)));
    match decide(rule, listener, &dst, v4, maps::on_failure(), alive, daemon) {
        Verdict::Leave => {
            // A socket may connect again after a captured attempt failed.
            leave(ctx, sk);
            maps::count(Counter::Left);
            Ok(None)
        }
        Verdict::Capture(via) => {
            let generation = listener.map_or(0, Listener::generation);
            keep(ctx, sk, Origin::new(0, dst).of_generation(generation), unbound)?;
            maps::count(Counter::Captured);
            Ok(Some(via))
        }
        Verdict::Wait(via) => {
            let generation = maps::listener(DAEMON).map_or(0, Listener::generation);
            keep(ctx, sk, Origin::new(0, dst).of_generation(generation).waiting(), unbound)?;
            report_missing_listener(ctx, netns);
            maps::count(Counter::Waiting);
            Ok(Some(via))
        }
        Verdict::LeaveOpen => {
            leave(ctx, sk);
            report_missing_listener(ctx, netns);
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
            report_missing_listener(ctx, netns);
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

/// Takes the socket off its network device, and keeps the origin with it.
#[inline(always)]
fn keep(ctx: &SockAddrContext, sk: *mut bpf_sock, origin: Origin, unbound: bool) -> Result<(), Refused> {
    // SAFETY: the helper takes the context as it is; a field of the socket.
    let (cookie, device) = unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), (*sk).bound_dev_if) };
    let mut origin = origin.of_socket(cookie);
    if unbound {
        origin = origin.without_source();
    }
    if device != 0 {
        // What goes to 127.0.0.0/8 by a device asks for it on the wire.
        if !bind_to_device(ctx, 0) {
            return Err(Refused::Bound);
        }
        origin = origin.bound_to(device);
        maps::count(Counter::Unbound);
    } else if let Some(before) = maps::origin(sk) {
        // Taken off by an attempt that failed.
        origin = origin.bound_to(before.device());
    }
    if maps::keep_origin(sk, origin) { Ok(()) } else { Err(Refused::NoMemory) }
}

/// Tells the daemon by whom it finds the namespace.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "two halves")]
fn report_missing_listener(ctx: &SockAddrContext, netns: u64) {
    let ids = bpf_get_current_pid_tgid();
    // SAFETY: the helper takes the context as it is.
    let socket = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    maps::report_missing_listener(Missing { netns, socket, process: (ids >> 32) as u32, thread: ids as u32 });
}

/// Forgets what a captured attempt left with the socket, which goes its own way now: by the device that it was bound to.
#[inline(always)]
fn leave(ctx: &SockAddrContext, sk: *mut bpf_sock) {
    if let Some(origin) = maps::origin(sk) {
        let device = origin.device();
        if device != 0 {
            let _as_it_was = bind_to_device(ctx, device);
        }
        maps::drop_origin(sk);
    }
}

/// Binds the socket to a network device; 0 is none.
#[inline(always)]
fn bind_to_device(ctx: &SockAddrContext, device: u32) -> bool {
    let mut device = device.cast_signed();
    // SAFETY: the context as it is, and a number with its length; the helper copies it.
    let failed =
        unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTOIFINDEX, (&raw mut device).cast(), 4) };
    failed == 0
}

/// Whether anybody listens where the operator says that a proxy does. The kernel closes listeners with the process that held
/// them, so this needs no heartbeat.
#[inline(always)]
fn proxy_is_listening(ctx: &SockAddrContext, via: &Endpoint, v4: bool) -> bool {
    // SAFETY: all zero is a valid tuple: plain integers. The size given to the helper chooses the family;
    // it wants no other padding cleared.
    let sk = unsafe {
        let mut tuple: bpf_sock_tuple = mem::zeroed();
        let size = if v4 {
            tuple.__bindgen_anon_1.ipv4.daddr = via.v4_be();
            tuple.__bindgen_anon_1.ipv4.dport = via.port().to_be();
            TUPLE_V4
        } else {
            tuple.__bindgen_anon_1.ipv6.daddr = via.v6_be();
            tuple.__bindgen_anon_1.ipv6.dport = via.port().to_be();
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
        bpf_sk_release(sk.cast());
        listens
    }
}
