//! `sockops`: from the socket to the 4-tuple.
//!
//! Enters: TCP events of a captured cgroup. Leaves: a flow in the map from establishment (before the ACK
//! that lets the listener accept it goes out, `tcp_rcv_synsent_state_process`) until the socket closes.
//! Invariant: only sockets with an origin have a flow. It never touches other sockets.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE,
    },
    helpers::bpf_get_netns_cookie,
    programs::SockOpsContext,
};
use aya_log_ebpf::warn;
use tunnel_common::{addr::Endpoint, flow::FlowKey, names::Counter};

use crate::maps;

const AF_INET: u32 = 2;

#[inline(always)]
pub(crate) fn on_event(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => on_established(ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => on_close(ctx),
        _ => {}
    }
}

#[inline(always)]
fn on_established(ctx: &SockOpsContext) {
    // SAFETY: a field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    let Some(origin) = maps::origin(sk) else { return };
    if maps::record_flow(&key(ctx), origin).is_err() {
        // The listener finds no flow and resets the connection: fail closed.
        maps::count(Counter::FlowsFull);
        if maps::may_log(Counter::FlowsFull) {
            warn!(ctx, "flow map is full: the connection will be reset");
        }
        return;
    }
    // Without it the entry would stay until its 4-tuple is used again; the socket does have room for a flag.
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    let _always = ctx.set_cb_flags(flags as i32);
}

#[inline(always)]
fn on_close(ctx: &SockOpsContext) {
    // SAFETY: a field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    if let Some(origin) = maps::origin(sk) {
        maps::forget_flow(&key(ctx), origin.cookie());
    }
}

#[inline(always)]
fn key(ctx: &SockOpsContext) -> FlowKey {
    // The context has the remote port in network order in the upper half (net/core/filter.c,
    // sock_ops_convert_ctx_access), the local one in host order.
    let (local_port, remote_port) = (ctx.local_port() as u16, u32::from_be(ctx.remote_port()) as u16);
    let (local, remote) = if ctx.family() == AF_INET {
        (Endpoint::from_v4_be(ctx.local_ip4(), local_port), Endpoint::from_v4_be(ctx.remote_ip4(), remote_port))
    } else {
        (Endpoint::from_v6_be(ctx.local_ip6(), local_port), Endpoint::from_v6_be(ctx.remote_ip6(), remote_port))
    };
    // SAFETY: the helper takes the context as it is.
    FlowKey::new(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }, local, remote)
}
