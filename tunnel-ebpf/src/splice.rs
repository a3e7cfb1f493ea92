//! Joins two sockets of the daemon: what one receives, the other sends.
//!
//! Enters: what a socket has received, one buffer at a time, with the socket locked. Leaves: the verdict of
//! `fastpath::splice`, and its words brought up to date. Invariant: a buffer is counted by what became of it, and what
//! cannot be sent on is passed to the daemon. It never looks at the bytes.

#![no_std]
#![no_main]

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_RB_FORCE_WAKEUP,
        sk_action::{SK_DROP, SK_PASS},
    },
    btf_maps::{Array, HashMap, RingBuf, SockMap},
    helpers::bpf_get_socket_cookie,
    macros::{btf_map, stream_verdict},
    programs::SkBuffContext,
};
use tunnel_common::fastpath::splice::{DIRECTIONS_MAX, TOLD_BYTES, Verdict, Words, cost, tells, verdict};

#[btf_map]
static DIRECTIONS: Array<Words, DIRECTIONS_MAX, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static SLOTS: HashMap<u64, u32, DIRECTIONS_MAX, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
#[btf_map]
static SOCKETS: SockMap<DIRECTIONS_MAX> = SockMap::new();
#[btf_map]
static TOLD: RingBuf<u64, TOLD_BYTES> = RingBuf::new();

/// What becomes of what a socket has received.
#[stream_verdict]
fn splice_verdict(ctx: SkBuffContext) -> u32 {
    // What is not in the tables any more is the daemon's to read, or nobody's.
    try_splice(&ctx).unwrap_or(SK_PASS)
}

#[inline(always)]
fn try_splice(ctx: &SkBuffContext) -> Option<u32> {
    // SAFETY: the context's own buffer, which belongs to a socket here.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: four bytes that the daemon writes once.
    let slot = *unsafe { SLOTS.get(cookie) }?;
    let words = DIRECTIONS.get_ptr_mut(slot)?;
    let len = u64::from(ctx.len());
    // SAFETY: the entry is there for good. The program's words are written by it only, with the socket of this
    // direction locked; each of the daemon's is one aligned word, and volatile because the daemon writes it meanwhile.
    let seen = unsafe { ptr::read_volatile(words) };
    match verdict(&seen, len) {
        Verdict::Drop => return Some(SK_DROP),
        // A redirect that does not find the other socket says so before anything was done.
        Verdict::Redirect if SOCKETS.redirect_skb(ctx, slot ^ 1, 0) == i64::from(SK_PASS) => {
            // SAFETY: as above.
            unsafe {
                ptr::write_volatile(&raw mut (*words).spent, seen.spent + cost(len));
                ptr::write_volatile(&raw mut (*words).redirected, seen.redirected + len);
            }
            return Some(SK_PASS);
        }
        Verdict::Redirect | Verdict::Pass => {}
    }
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*words).passed, seen.passed + len) };
    if tells(&seen) {
        // SAFETY: as above; the daemon clears it before it reads what was passed.
        unsafe { ptr::write_volatile(&raw mut (*words).told, 1) };
        // The ring has a place for each direction.
        let _told = TOLD.output(u64::from(slot), u64::from(BPF_RB_FORCE_WAKEUP));
    }
    Some(SK_PASS)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier accepts no program that can get here.
    loop {}
}

/// `bpf_ringbuf_output` and its kin are for programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
