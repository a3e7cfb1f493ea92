//! Joins two sockets of the daemon: each buffer that one receives, the other sends, as `fastpath::splice` decides.
//!
//! # Invariants
//! - A buffer is counted by what became of it: redirected, or passed to the daemon where it cannot be redirected.
//! - Bytes that were seen before are left out (`fastpath::splice::fresh`), and a buffer of a flow that is over or
//!   broken is dropped.

#![no_std]
#![no_main]

#[path = "field.rs"]
mod field;

use core::ptr;

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{
        BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_RB_FORCE_WAKEUP,
        sk_action::{SK_DROP, SK_PASS},
    },
    btf_maps::{Array, HashMap, RingBuf, SockMap},
    helpers::bpf_get_socket_cookie,
    macros::{btf_map, stream_verdict},
    programs::SkBuffContext,
};
use tunnel_common::fastpath::splice::{
    DIRECTIONS_MAX, Fresh, HOLE, KNOWN, Offsets, STUCK, TOLD_BYTES, UNREADABLE, Verdict, Words, cost, fresh,
    tells, verdict,
};

/// Where the kernel keeps what is to be seen.
#[unsafe(no_mangle)]
static OFFSETS: Global<Offsets> = Global::new(Offsets { seq: 0, sk: 0, copied_seq: 0 });

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
    // A socket without a direction is about to be closed: its flow is over. Passed, and not read before it is closed,
    // bytes would be given back to a socket that has settled its account of memory already (a warning of
    // inet_sock_destruct).
    try_splice(&ctx).unwrap_or(SK_DROP)
}

#[inline(always)]
fn try_splice(ctx: &SkBuffContext) -> Option<u32> {
    // SAFETY: the context's own buffer, which belongs to a socket here.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: four bytes that the daemon writes once.
    let slot = *unsafe { SLOTS.get(cookie) }?;
    let words = DIRECTIONS.get_ptr_mut(slot)?;
    if ctx.len() == 0 {
        return Some(SK_DROP);
    }
    // SAFETY: the entry is there for good. The program's words are written by it only, with the socket of this
    // direction locked; each of the daemon's is one aligned word, and volatile because the daemon writes it meanwhile.
    let seen = unsafe { ptr::read_volatile(words) };
    if seen.broken != 0 {
        return Some(SK_DROP);
    }
    let next = match leave_out(ctx, &seen) {
        Ok(next) => next,
        Err(why) => {
            // SAFETY: as above. The daemon resets the flow: some of its bytes are gone.
            unsafe { ptr::write_volatile(&raw mut (*words).broken, why) };
            let _told = TOLD.output(u64::from(slot), u64::from(BPF_RB_FORCE_WAKEUP));
            return Some(SK_DROP);
        }
    };
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*words).next, next) };
    // The length as it is now.
    let len = u64::from(ctx.len());
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

/// Takes off a buffer's head what has come before: what comes next, or why that cannot be.
#[inline(always)]
fn leave_out(ctx: &SkBuffContext, seen: &Words) -> Result<u64, u64> {
    let offsets = OFFSETS.load();
    // The context of a program is the kernel's own buffer.
    let seq: u32 = field::read(ctx.as_ptr() as u64, offsets.seq).ok_or(UNREADABLE)?;
    let expected = match seen.expected() {
        Some(next) => next,
        None => {
            let sk: u64 = field::read(ctx.as_ptr() as u64, offsets.sk).ok_or(UNREADABLE)?;
            field::read(sk, offsets.copied_seq).ok_or(UNREADABLE)?
        }
    };
    let (old, next) = match fresh(expected, seq, ctx.len()) {
        Fresh::From(old) => (old, seq.wrapping_add(ctx.len())),
        Fresh::Nothing => (ctx.len(), expected),
        Fresh::Hole => return Err(HOLE | u64::from(seq.wrapping_sub(expected))),
    };
    take_off(ctx, old).ok_or(STUCK | u64::from(old))?;
    Ok(KNOWN | u64::from(next))
}

/// Takes so many bytes off a buffer's head.
#[inline(always)]
fn take_off(ctx: &SkBuffContext, mut bytes: u32) -> Option<()> {
    /// The most that the helper takes at once (`sk_skb_adjust_room`),
    const ONCE: u32 = 0xfff;
    /// and how often: a buffer that was put together from what came out of order may be longer than 64 KiB.
    const TIMES: u32 = 256;
    for _ in 0..TIMES {
        if bytes == 0 {
            return Some(());
        }
        let now = if bytes < ONCE { bytes } else { ONCE };
        ctx.skb.adjust_room(-now.cast_signed(), 0, 0).ok()?;
        bytes -= now;
    }
    (bytes == 0).then_some(())
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
