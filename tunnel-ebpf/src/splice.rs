//! Joins two sockets of the daemon: each buffer that one receives, the other sends, as `fastpath::splice` decides.
//!
//! # Invariants
//! - A buffer is counted by what became of it: redirected, or kept for the daemon, in its socket or its mailbox.
//! - Nothing is passed to a socket in front of which something waits to be sent, unless its mailbox is full.
//! - Bytes that were seen before are left out (`fastpath::splice::fresh`), and a buffer of a flow that is over or
//!   broken is dropped.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

#[path = "field.rs"]
mod field;

use core::{arch::asm, ptr};

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{
        BPF_F_INGRESS, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_RB_FORCE_WAKEUP,
        sk_action::{SK_DROP, SK_PASS},
    },
    btf_maps::{Array, HashMap, RingBuf, SockMap},
    helpers::bpf_get_socket_cookie,
    macros::{btf_map, stream_verdict},
    programs::SkBuffContext,
};
use tunnel_common::fastpath::splice::{
    DIRECTIONS_MAX, FLOOD, FORCED, Fresh, HOLE, KNOWN, Kept, Offsets, PASSING, STUCK, TOLD_BYTES, UNREADABLE,
    Words, asks_if_empty, cost, fresh, is_empty, keep, may_redirect, tells,
};

/// Where the kernel keeps what is to be seen.
#[unsafe(no_mangle)]
static OFFSETS: Global<Offsets> = Global::new(Offsets {
    seq: 0,
    sk: 0,
    copied_seq: 0,
    write_seq: 0,
    snd_una: 0,
    bytes_acked: 0,
    user_data: 0,
    waiting: 0,
});

#[btf_map]
static DIRECTIONS: Array<Words, DIRECTIONS_MAX, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static SLOTS: HashMap<u64, u32, DIRECTIONS_MAX, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
#[btf_map]
static SOCKETS: SockMap<DIRECTIONS_MAX> = SockMap::new();
#[btf_map]
static MAILBOXES: SockMap<DIRECTIONS_MAX> = SockMap::new();
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
    let other = DIRECTIONS.get_ptr_mut(slot ^ 1)?;
    // SAFETY: the entry is there for good. The program's words are written by it only, with the socket of this
    // direction locked; each of the daemon's is one aligned word, and volatile because the daemon writes it meanwhile.
    let mut seen = unsafe { ptr::read_volatile(words) };
    if seen.broken != 0 {
        return Some(SK_DROP);
    }
    let next = match leave_out(ctx, &seen) {
        Ok(next) => next,
        Err(why) => return Some(give_up(words, slot, why)),
    };
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*words).next, next) };
    // The length as it is now.
    let len = u64::from(ctx.len());
    if len == 0 {
        return Some(SK_DROP);
    }
    if may_redirect(&seen, len) {
        // Before it is asked what the other direction has kept: with a full barrier, as the kernel's atomic operations with a
        // result are.
        // SAFETY: as above.
        unsafe { announce(&raw mut (*words).announced, seen.redirected + len) };
        // SAFETY: words of another direction are read, each as a whole.
        let open = unsafe {
            ptr::read_volatile(&raw const (*other).kept) == ptr::read_volatile(&raw const (*other).gate)
        };
        // A redirect that does not find the other socket says so before anything was done.
        if open && SOCKETS.redirect_skb(ctx, slot ^ 1, 0) == i64::from(SK_PASS) {
            // SAFETY: as above.
            unsafe {
                ptr::write_volatile(&raw mut (*words).spent, seen.spent + cost(len));
                ptr::write_volatile(&raw mut (*words).redirected, seen.redirected + len);
            }
            return Some(SK_PASS);
        }
        // SAFETY: as above.
        unsafe { ptr::write_volatile(&raw mut (*words).announced, seen.redirected) };
    }
    // From here on the other direction sends nothing on, but for what it has announced.
    // SAFETY: as above.
    unsafe { announce(&raw mut (*words).kept, seen.kept + len) };
    seen.kept += len;
    let empty = asks_if_empty(&seen) && nothing_waits(ctx, other).unwrap_or(false);
    let kept = keep(&seen, len, empty);
    match kept {
        Kept::Passed | Kept::Forced if seen.turned == 0 => {
            if kept == Kept::Forced {
                // SAFETY: as above; whoever sees that it has turned sees why.
                unsafe { ptr::write_volatile(&raw mut (*words).forced, FORCED) };
            }
            // SAFETY: as above; the daemon clears it, and has the lock of the socket before it goes on.
            unsafe { ptr::write_volatile(&raw mut (*words).turned, 1) };
        }
        Kept::Passed | Kept::Forced if empty => {
            // SAFETY: as above; the daemon writes nothing else there.
            unsafe { ptr::write_volatile(&raw mut (*words).forced, PASSING) };
        }
        Kept::Passed | Kept::Forced => {}
        Kept::Mailed if MAILBOXES.redirect_skb(ctx, slot, u64::from(BPF_F_INGRESS)) == i64::from(SK_PASS) => {
            // SAFETY: as above.
            unsafe {
                ptr::write_volatile(&raw mut (*words).mail_spent, seen.mail_spent + cost(len));
                ptr::write_volatile(&raw mut (*words).mailed, seen.mailed + len);
            }
        }
        Kept::Mailed => return Some(give_up(words, slot, FLOOD | len)),
    }
    if tells(&seen) {
        // SAFETY: as above; the daemon clears it before it reads what was kept.
        unsafe { ptr::write_volatile(&raw mut (*words).told, 1) };
        // The ring has a place for each direction.
        let _told = TOLD.output(u64::from(slot), u64::from(BPF_RB_FORCE_WAKEUP));
    }
    Some(SK_PASS)
}

/// Writes a word, and lets nothing that follows go ahead of it.
///
/// # Safety
/// `word` is one of the program's words.
#[inline(always)]
unsafe fn announce(word: *mut u64, value: u64) {
    // The target has no atomic exchange in `core`. The kernel's has a full barrier on every machine, as it returns what
    // was there before (Documentation/bpf/standardization/instruction-set.rst, BPF_XCHG; atomic_t.txt).
    // SAFETY: eight aligned bytes of a map's entry, which is there for good; whoever else writes them is the caller's matter.
    unsafe {
        asm!("{value} = xchg_64({word} + 0, {value})", word = in(reg) word, value = inout(reg) value => _);
    };
}

/// The daemon resets the flow: some of its bytes are gone.
#[inline(always)]
fn give_up(words: *mut Words, slot: u32, why: u64) -> u32 {
    // SAFETY: an entry of the map, which is there for good; the word is the program's.
    unsafe { ptr::write_volatile(&raw mut (*words).broken, why) };
    let _told = TOLD.output(u64::from(slot), u64::from(BPF_RB_FORCE_WAKEUP));
    SK_DROP
}

/// Whether nothing waits in front of the buffer's socket, nor is about to. Its lock is held, so its TCP stands still.
#[inline(always)]
fn nothing_waits(ctx: &SkBuffContext, other: *mut Words) -> Option<bool> {
    /// `SK_USER_DATA_PTRMASK`
    const POINTER: u64 = !7;
    let offsets = OFFSETS.load();
    let sk: u64 = field::read(ctx.as_ptr() as u64, offsets.sk)?;
    let written: u32 = field::read(sk, offsets.write_seq)?;
    let acknowledged: u32 = field::read(sk, offsets.snd_una)?;
    let bytes_acked: u64 = field::read(sk, offsets.bytes_acked)?;
    let psock: u64 = field::read(sk, offsets.user_data)?;
    let waiting: u32 = field::read(psock & POINTER, offsets.waiting)?;
    // As `accepted` of the daemon's, which asks TCP for the same (TCP_INFO, SIOCOUTQ).
    let accepted = bytes_acked.wrapping_add(u64::from(written.wrapping_sub(acknowledged)));
    // SAFETY: words of another direction are read, each as a whole.
    let other = unsafe {
        Words {
            due: ptr::read_volatile(&raw const (*other).due),
            announced: ptr::read_volatile(&raw const (*other).announced),
            ..Words::default()
        }
    };
    Some(is_empty(accepted, &other, waiting))
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
