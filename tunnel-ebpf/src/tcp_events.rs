//! `sockops`: records a captured socket's flow before its SYN goes out (fast open may accept it at once), marks it
//! closed with its socket, and holds back the SYN of a connection that waits for its listener.
//!
//! # Invariants
//! - Only sockets with an origin have a flow.
//! - A flow that may be established is not removed: it may be accepted after the application has closed it.

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_HDR_OPT_LEN_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TIMEOUT_INIT,
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT,
        bpf_sock,
    },
    helpers::{
        bpf_get_netns_cookie,
        generated::{bpf_reserve_hdr_opt, bpf_setsockopt, bpf_skc_to_mptcp_sock, bpf_store_hdr_opt},
    },
    programs::SockOpsContext,
};
use aya_log_ebpf::warn;
use tunnel_common::{
    addr::Endpoint,
    flow::{FlowKey, LOCAL_CONGESTION_CONTROL, Origin},
    names::Counter,
};

use crate::maps;

const AF_INET: u32 = 2;
/// `TCPOPT_MD5SIG` and `TCPOLEN_MD5SIG` of `net/tcp.h`.
const TCPOPT_MD5SIG: u8 = 19;
const MD5_OPTION_LEN: u32 = 18;
/// In jiffies: 5 to 50 ms, by how the kernel was built. The daemon opens its listeners in a few milliseconds. Six doublings
/// (`tcp_syn_retries`) make that half a second to three, after which connect() fails with ETIMEDOUT.
const WAITING_RTO: u32 = 5;
/// What the programs have to be asked for while a SYN is held back: for the option in it, and before it goes out again, because
/// somebody else's program may have switched the former off.
const HOLD_BACK: u32 = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG;
const SOL_TCP: i32 = 6;
const TCP_CONGESTION: i32 = 13;
#[expect(clippy::cast_possible_truncation, reason = "four bytes")]
const NAME_LEN: i32 = LOCAL_CONGESTION_CONTROL.len() as i32;

#[inline(always)]
pub(crate) fn on_event(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => on_connect(ctx),
        BPF_SOCK_OPS_TIMEOUT_INIT => on_timeout_init(ctx),
        BPF_SOCK_OPS_RTO_CB => on_timeout(ctx),
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => on_option_length(ctx),
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB => on_option(ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => on_close(ctx),
        _ => {}
    }
}

/// Before the SYN, with the port and the address that it goes out from.
#[inline(always)]
fn on_connect(ctx: &SockOpsContext) {
    // SAFETY: a field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    let Some(origin) = maps::origin(sk) else { return };
    if maps::record_flow(&key(ctx), origin).is_err() {
        // Fail closed. Over IPv4 nobody listens where the SYN goes to; over IPv6 another program may, so it is held back.
        if !origin.dst().is_v4() {
            maps::give_up(sk);
            let flags = ctx.cb_flags() | HOLD_BACK;
            let _always = ctx.set_cb_flags(flags.cast_signed());
        }
        maps::count(Counter::FlowsFull);
        if maps::may_log(Counter::FlowsFull) {
            warn!(ctx, "flow map is full: connection refused");
        }
        return;
    }
    // Without it an entry that nobody takes would stay until its 4-tuple is used again.
    let mut flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    if origin.is_waiting() {
        flags |= HOLD_BACK;
    }
    let _always = ctx.set_cb_flags(flags.cast_signed());
    spare_local(ctx);
    if maps::has_mptcp() {
        tell_mptcp(sk, *origin);
    }
}

/// How soon the SYN of a connection that waits goes out again; doubled each time (1 s without).
#[inline(always)]
fn on_timeout_init(ctx: &SockOpsContext) {
    if waiting(ctx) || given_up(ctx) {
        // SAFETY: a field of the context, for writing.
        unsafe { (*ctx.ops).__bindgen_anon_1.reply = WAITING_RTO };
    }
}

/// Before a segment goes out again.
#[inline(always)]
fn on_timeout(ctx: &SockOpsContext) {
    if waiting(ctx) || given_up(ctx) {
        let _always = ctx.set_cb_flags((ctx.cb_flags() | HOLD_BACK).cast_signed());
    }
}

/// Whether this socket's SYN is to be held back.
#[inline(always)]
fn waiting(ctx: &SockOpsContext) -> bool {
    // SAFETY: a field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    !sk.is_null() && maps::origin(sk).is_some_and(Origin::is_waiting)
}

/// Whether it is held back for good.
#[inline(always)]
fn given_up(ctx: &SockOpsContext) -> bool {
    // SAFETY: a field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    !sk.is_null() && maps::origin(sk).is_some_and(Origin::is_given_up)
}

/// A SYN that carries an MD5 signature (RFC 2385) which nobody has asked for gets no answer, neither from a listener
/// (`tcp_inbound_md5_hash`, net/ipv4/tcp.c) nor from a host without one (`tcp_v4_send_reset`, "don't send rst if it can't find
/// key"): it is lost, and goes out again a moment later. So nothing is accepted or refused before the daemon listens. On a kernel
/// without such signatures (CONFIG_TCP_MD5SIG), or where other options leave no room, the connection is refused.
#[inline(always)]
fn on_option_length(ctx: &SockOpsContext) {
    // SAFETY: the helper takes the context as it is.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let waits = waiting(ctx);
    if given_up(ctx) || (waits && maps::listener(netns).is_none()) {
        // SAFETY: as above.
        let _no_room = unsafe { bpf_reserve_hdr_opt(ctx.ops, MD5_OPTION_LEN, 0) };
    } else if waits {
        // Of a socket that waits for another capture, whose programs are attached here as well, the flag is not ours.
        let flags = ctx.cb_flags() & !HOLD_BACK;
        let _always = ctx.set_cb_flags(flags.cast_signed());
    }
}

#[inline(always)]
fn on_option(ctx: &SockOpsContext) {
    if !waiting(ctx) && !given_up(ctx) {
        return;
    }
    let mut option = [0u8; MD5_OPTION_LEN as usize];
    option[0] = TCPOPT_MD5SIG;
    #[expect(clippy::cast_possible_truncation, reason = "18")]
    let length = MD5_OPTION_LEN as u8;
    option[1] = length;
    // SAFETY: the context as it is, and an option with its length; the helper copies it.
    let _not_reserved = unsafe { bpf_store_hdr_opt(ctx.ops, option.as_ptr().cast(), MD5_OPTION_LEN, 0) };
}

/// The connection is one over loopback, whatever the application takes it for. What its host's congestion control does for
/// networks costs there and gains nothing, above all where it paces (BBR): see
/// [`tunnel_common::flow::LOCAL_CONGESTION_CONTROL`].
#[inline(always)]
fn spare_local(ctx: &SockOpsContext) {
    let mut name = LOCAL_CONGESTION_CONTROL;
    // SAFETY: the context as it is, and a name with its length; the helper copies it. It fails for sockets that are not
    // TCP's own (MPTCP), which keep what they have.
    let _kept =
        unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_TCP, TCP_CONGESTION, name.as_mut_ptr().cast(), NAME_LEN) };
}

/// The socket that the application holds is not the one that connects, where it is one of Multipath TCP: that one is to
/// answer its questions as well.
#[inline(always)]
fn tell_mptcp(sk: *mut bpf_sock, origin: Origin) {
    // SAFETY: the helper takes the context's socket; null unless that is a subflow of a Multipath TCP socket.
    let application = unsafe { bpf_skc_to_mptcp_sock(sk.cast()) };
    if !application.is_null() {
        let _best_effort = maps::keep_origin(application.cast(), origin);
    }
}

#[inline(always)]
fn on_close(ctx: &SockOpsContext) {
    // SAFETY: a field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    let Some(origin) = maps::origin(sk) else { return };
    if ctx.arg(0) == BPF_TCP_SYN_SENT {
        // Never answered: nobody has it.
        maps::forget_flow(&key(ctx), origin.cookie());
    } else {
        maps::close_flow(&key(ctx), origin.cookie());
    }
}

#[inline(always)]
fn key(ctx: &SockOpsContext) -> FlowKey {
    // The context has the remote port in network order in the upper half (net/core/filter.c,
    // sock_ops_convert_ctx_access), the local one in host order.
    let ops = ctx.ops;
    // Every field is read before the branch, and volatile: LLVM otherwise makes the two branches share
    // their loads through a pointer that it chose, and the verifier says "dereference of modified ctx ptr".
    // SAFETY: fields of the context, each at its own width.
    let (family, local_port, remote_port, local4, remote4, local6, remote6) = unsafe {
        let read = |field: *const u32| ptr::read_volatile(field);
        let read4 = |field: *const [u32; 4]| {
            let word: *const u32 = field.cast();
            [read(word), read(word.add(1)), read(word.add(2)), read(word.add(3))]
        };
        (
            read(&raw const (*ops).family),
            maps::low_half(read(&raw const (*ops).local_port)),
            maps::low_half(u32::from_be(read(&raw const (*ops).remote_port))),
            read(&raw const (*ops).local_ip4),
            read(&raw const (*ops).remote_ip4),
            read4(&raw const (*ops).local_ip6),
            read4(&raw const (*ops).remote_ip6),
        )
    };
    let (local, remote) = if family == AF_INET {
        (Endpoint::from_v4_be(local4, local_port), Endpoint::from_v4_be(remote4, remote_port))
    } else {
        (Endpoint::from_v6_be(local6, local_port), Endpoint::from_v6_be(remote6, remote_port))
    };
    // SAFETY: the helper takes the context as it is.
    FlowKey::new(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }, local, remote)
}
