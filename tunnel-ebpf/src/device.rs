//! `setsockopt` for `SO_BINDTODEVICE` and `SO_BINDTOIFINDEX`: on a captured connection the call succeeds, as it would
//! without the capture, and binds nothing. Other options pass unchanged.
//!
//! # Invariants
//! - What a captured socket sends leaves by no device but loopback.

use aya_ebpf::{
    bindings::{BPF_TCP_CLOSE, BPF_TCP_LISTEN, bpf_sock},
    programs::SockoptContext,
};
use tunnel_common::names::Counter;

use crate::maps;

const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SO_BINDTOIFINDEX: i32 = 62;
/// The kernel does nothing more, and the call succeeds (Documentation/bpf/prog_cgroup_sockopt.rst).
const DONE: i32 = -1;
/// The kernel goes on with what the program gave, unchanged and of whatever length.
const AS_GIVEN: i32 = 0;

#[inline(always)]
pub(crate) fn setsockopt(ctx: &SockoptContext) {
    let opt = ctx.sockopt;
    // SAFETY: fields of the context; the verifier knows `sk` to be a valid socket.
    let (level, name, sk) = unsafe { ((*opt).level, (*opt).optname, (*opt).__bindgen_anon_1.sk) };
    let binds = level == SOL_SOCKET && (name == SO_BINDTODEVICE || name == SO_BINDTOIFINDEX);
    let verdict = if binds && is_captured(sk) {
        maps::count(Counter::Unbound);
        DONE
    } else {
        AS_GIVEN
    };
    // SAFETY: a field of the context, for writing.
    unsafe { (*opt).optlen = verdict };
}

/// Whether the socket has a captured connection, or is about to. One whose attempt has failed is bound, and taken off the device
/// when it connects again.
#[inline(always)]
fn is_captured(sk: *mut bpf_sock) -> bool {
    if sk.is_null() || maps::origin(sk).is_none() {
        return false;
    }
    // SAFETY: a field of the socket.
    let state = unsafe { (*sk).state };
    state != BPF_TCP_CLOSE && state != BPF_TCP_LISTEN
}
