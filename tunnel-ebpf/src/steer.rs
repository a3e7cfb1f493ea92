//! `sk_lookup`: assigns a captured connection to the daemon's listener. An object of its own, loaded for each network
//! namespace with the maps of its capture.
//!
//! # Invariants
//! - Captured connections go only to sockets that the daemon put into the map, and are refused where there is none.
//! - For everything else, datagrams included, the kernel looks up the socket as usual.

#![no_std]
#![no_main]

use core::{hint::black_box, ptr};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_NO_PREALLOC, BPF_SK_LOOKUP_F_NO_REUSEPORT, bpf_sock,
        sk_action::{SK_DROP, SK_PASS},
    },
    btf_maps::{HashMap, SockHash},
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release},
    macros::{btf_map, sk_lookup},
    programs::SkLookupContext,
};
use tunnel_common::{
    addr::Endpoint,
    capture::{SocketKey, TCP, lane_of},
    flow::{FlowKey, Origin},
    names::{FLOWS_MAX, SOCKETS_MAX, STEER_LANES, STEER_NETNS},
};

#[btf_map]
static FLOWS: HashMap<FlowKey, Origin, FLOWS_MAX, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
#[btf_map]
static SOCKETS: SockHash<SocketKey, SOCKETS_MAX> = SockHash::new();

const AF_INET: u32 = 2;
const LOOPBACK_NET: u8 = 127;
/// The last word of `::1` in network order.
const LOOPBACK_V6_LAST: u32 = u32::from_ne_bytes([0, 0, 0, 1]);

#[sk_lookup]
fn steer(ctx: SkLookupContext) -> u32 {
    let Some((client, key)) = captured(&ctx) else { return SK_PASS };
    // SAFETY: the key is of the map's type. An entry is written before the SYN goes out; one that is removed meanwhile keeps
    // its bytes as long as the program runs, or holds those of another flow, which are as good.
    let Some(origin) = (unsafe { FLOWS.get(key) }) else { return SK_PASS };
    if origin.is_closed() {
        // A SYN with the addresses and ports of a connection that has ended, and that nobody has accepted: somebody else's,
        // which was not captured, or it would have an entry of its own here.
        return SK_PASS;
    }
    let lanes = lanes();
    #[expect(clippy::cast_possible_truncation, reason = "two halves")]
    let (generation, lanes) = ((lanes >> 32) as u32, lanes as u16);
    if origin.generation() != generation {
        // For another daemon: its copy of this program has the last word, if it is there (`BPF_PROG_SK_LOOKUP_RUN_ARRAY`).
        return SK_DROP;
    }
    let key = SocketKey::new(key.netns(), generation, lane_of(&client, lanes), is_v4(&ctx));
    // SAFETY: the map and a key of it. What is found is a socket, referenced, and released once.
    unsafe {
        let sk: *mut bpf_sock = bpf_map_lookup_elem(
            (&raw const SOCKETS).cast_mut().cast(),
            ptr::from_ref(&key).cast_mut().cast(),
        )
        .cast();
        if sk.is_null() {
            return SK_DROP;
        }
        // Another process of this user could join a group of listeners that share a port: it is not asked.
        let failed = bpf_sk_assign(ctx.as_ptr(), sk.cast(), u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT));
        bpf_sk_release(sk.cast());
        if failed == 0 { SK_PASS } else { SK_DROP }
    }
}

/// The application's end, and the key of the flow, of what may be a captured connection.
#[inline(always)]
fn captured(ctx: &SkLookupContext) -> Option<(Endpoint, FlowKey)> {
    let lookup = ctx.lookup;
    // SAFETY: fields of the context, each at the width that the verifier allows.
    unsafe {
        if (*lookup).protocol != TCP {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "a port, in host order")]
        let local_port = (*lookup).local_port as u16;
        let remote_port = u16::from_be((*lookup).remote_port);
        let (client, via) = if (*lookup).family == AF_INET {
            let local = (*lookup).local_ip4;
            if local.to_ne_bytes()[0] != LOOPBACK_NET {
                return None;
            }
            (Endpoint::from_v4_be((*lookup).remote_ip4, remote_port), Endpoint::from_v4_be(local, local_port))
        } else {
            let words = |field: *const [u32; 4]| {
                let word: *const u32 = field.cast();
                let read = |n| ptr::read_volatile(word.add(n));
                [read(0), read(1), read(2), read(3)]
            };
            let local = words(&raw const (*lookup).local_ip6);
            if local != [0, 0, 0, LOOPBACK_V6_LAST] {
                return None;
            }
            let remote = words(&raw const (*lookup).remote_ip6);
            (Endpoint::from_v6_be(remote, remote_port), Endpoint::from_v6_be(local, local_port))
        };
        Some((client, FlowKey::new(netns(), client, via)))
    }
}

#[inline(always)]
fn is_v4(ctx: &SkLookupContext) -> bool {
    // SAFETY: a field of the context.
    unsafe { (*ctx.lookup).family == AF_INET }
}

/// The cookie of the namespace that this copy of the program is loaded for. No helper tells it here, so the loader puts it in
/// place of the constant, which the compiler may not calculate with.
#[inline(always)]
fn netns() -> u64 {
    black_box(STEER_NETNS)
}

/// The generation, and how many lanes there are, in the same way.
#[inline(always)]
fn lanes() -> u64 {
    black_box(STEER_LANES)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier accepts no program that can get here.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
