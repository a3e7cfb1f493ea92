//! `sk_msg`: redirects what an application and the daemon send to each other past TCP; `look` reports the state of both
//! sockets to the daemon. An object of its own, loaded where a capture asks for it.
//!
//! # Invariants
//! - Nothing is lost: a message goes by TCP where something cannot be looked up or read.
//! - No `SK_DROP`: the kernel would keep that verdict and not ask again (`psock->eval`, net/ipv4/tcp_bpf.c).

#![no_std]
#![no_main]

#[path = "field.rs"]
mod field;

use core::ptr;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_INGRESS, BPF_F_MMAPABLE, BPF_TCP_CLOSE_WAIT, BPF_TCP_ESTABLISHED, sk_action::SK_PASS},
    btf_maps::{Array, SkStorage, SockHash},
    helpers::generated::bpf_sk_storage_get,
    macros::{btf_map, raw_tracepoint, sk_msg},
    programs::{RawTracePointContext, SkMsgContext},
};
use tunnel_common::fastpath::bypass::{
    APPLICATION, DAEMON, Offsets, SLOTS_MAX, Seen, Side, Slot, Tag, Verdict, decide, group_has_memory,
    machine_has_memory,
};

use self::field::read;

/// Both sockets of each pair, by their cookies.
#[btf_map]
static BYPASSED: SockHash<u64, { 2 * SLOTS_MAX }> = SockHash::new();
/// Which pair a socket belongs to.
#[btf_map]
static TAGS: SkStorage<Tag> = SkStorage::new();
/// The pairs, which the daemon has in its memory.
#[btf_map]
static SLOTS: Array<Slot, SLOTS_MAX, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Where the kernel keeps what is to be seen.
#[unsafe(no_mangle)]
static OFFSETS: Global<Offsets> = Global::new(Offsets {
    cookie: 0,
    rmem_alloc: 0,
    rcv_nxt: 0,
    copied_seq: 0,
    write_seq: 0,
    snd_una: 0,
    prot: 0,
    memory_allocated: 0,
    sysctl_mem: 0,
    memcg: 0,
    tcpmem: 0,
    tcpmem_active: 0,
    usage: 0,
    max: 0,
    parent: 0,
});

/// The most control groups, one in the other, that are looked at for a limit of memory.
const GROUPS_MAX: u32 = 16;

/// `sendmsg(2)` and its kin on a socket of the map, under that socket's lock.
#[sk_msg]
fn bypass(ctx: SkMsgContext) -> u32 {
    try_bypass(&ctx).unwrap_or(SK_PASS)
}

/// Looks at both sockets of a pair, for the daemon: the first argument is the slot.
#[raw_tracepoint(tracepoint = "look")]
fn look(ctx: RawTracePointContext) -> i32 {
    let index: u64 = ctx.arg(0);
    #[expect(clippy::cast_possible_truncation, reason = "an index beyond the array finds nothing")]
    let Some(slot) = SLOTS.get_ptr_mut(index as u32) else { return 1 };
    let offsets = OFFSETS.load();
    // SAFETY: a slot of the array; these fields are written here only, when the daemon asks.
    unsafe {
        look_at(&raw mut (*slot).sides[APPLICATION as usize], &offsets);
        look_at(&raw mut (*slot).sides[DAEMON as usize], &offsets);
    }
    0
}

/// # Safety
/// `side` lies in a slot.
#[inline(always)]
unsafe fn look_at(side: *mut Side, offsets: &Offsets) {
    // SAFETY: as the caller says.
    unsafe {
        let sock = ptr::read_volatile(&raw const (*side).sock);
        let alive = is_still(sock, (*side).cookie, offsets);
        (*side).queued = read(sock, offsets.rmem_alloc).unwrap_or(0);
        (*side).unread = distance(sock, offsets.rcv_nxt, offsets.copied_seq).unwrap_or(0);
        (*side).unacked = distance(sock, offsets.write_seq, offsets.snd_una).unwrap_or(0);
        ptr::write_volatile(&raw mut (*side).alive, u32::from(alive));
    }
}

#[inline(always)]
fn try_bypass(ctx: &SkMsgContext) -> Option<u32> {
    let msg = ctx.msg;
    // SAFETY: fields of the context.
    let (sk, size) = unsafe { ((*msg).__bindgen_anon_3.sk, (*msg).size) };
    if sk.is_null() {
        return None;
    }
    // SAFETY: `sk` is the context's socket; without the create flag the value pointer is not read.
    let tag: *const Tag =
        unsafe { bpf_sk_storage_get((&raw const TAGS).cast_mut().cast(), sk.cast(), ptr::null_mut(), 0) }
            .cast();
    // SAFETY: null, or valid for the duration of the program; the daemon writes it before the socket is in the map.
    let tag = unsafe { tag.as_ref() }?;
    let slot = SLOTS.get_ptr_mut(tag.slot)?;
    // SAFETY: a slot of the array. Daemon and programs share it: each field has one writer, and is a word.
    let (generation, gates) = unsafe {
        (ptr::read_volatile(&raw const (*slot).generation), ptr::read_volatile(&raw const (*slot).gates))
    };
    if generation != tag.generation {
        return None;
    }
    // SAFETY: as above; which is whose is known, so both stay inside the slot.
    let (mine, theirs) = unsafe {
        let sides: *mut Side = (&raw mut (*slot).sides).cast();
        if tag.side == APPLICATION { (sides, sides.add(1)) } else { (sides.add(1), sides) }
    };
    let from = if tag.side == APPLICATION { APPLICATION } else { DAEMON };
    let offsets = OFFSETS.load();
    // SAFETY: as above. What this socket sends is decided under its lock, so there is one writer. The address is read
    // back, because the verifier lets nobody calculate with a pointer to a socket.
    let (own, peer, cookie, state) = unsafe {
        ptr::write_volatile(&raw mut (*mine).sock, sk as u64);
        (
            ptr::read_volatile(&raw const (*mine).sock),
            ptr::read_volatile(&raw const (*theirs).sock),
            ptr::read_volatile(&raw const (*theirs).cookie),
            (*sk).state,
        )
    };
    // It has not sent yet, or is gone: its address may be another's now.
    if !is_still(peer, cookie, &offsets) {
        // SAFETY: as above.
        unsafe { (*mine).passed = (*mine).passed.wrapping_add(u64::from(size)) };
        return None;
    }
    let queued = read(peer, offsets.rmem_alloc)?;
    // SAFETY: as above.
    let burst = if queued == 0 { 0 } else { unsafe { (*mine).burst } };
    let verdict = decide(&Seen {
        from,
        size,
        gate: gates & (1 << from) != 0,
        open: state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT,
        unacked: distance(own, offsets.write_seq, offsets.snd_una)?,
        unread: distance(peer, offsets.rcv_nxt, offsets.copied_seq)?,
        queued,
        burst,
        // The daemon's own messages do not depend on it.
        memory: from == DAEMON || has_memory(peer, &offsets)?,
    });
    // SAFETY: as above.
    unsafe {
        match verdict {
            // A miss means that the other has closed: TCP says so to the sender.
            Verdict::Redirect
                if BYPASSED.redirect_msg(ctx, cookie, u64::from(BPF_F_INGRESS)) == i64::from(SK_PASS) =>
            {
                (*mine).burst = burst.wrapping_add(1);
                (*mine).redirected = (*mine).redirected.wrapping_add(u64::from(size));
            }
            Verdict::Redirect | Verdict::Tcp => (*mine).passed = (*mine).passed.wrapping_add(u64::from(size)),
        }
    }
    Some(SK_PASS)
}

/// Whether `sock` can be charged for a message: by the machine, and by its control groups, as `__sk_mem_raise_allocated`
/// (net/core/sock.c) asks them.
#[inline(always)]
fn has_memory(sock: u64, offsets: &Offsets) -> Option<bool> {
    let prot: u64 = read(sock, offsets.prot)?;
    let allocated: i64 = read(read(prot, offsets.memory_allocated)?, 0)?;
    // tcp_mem: low, pressure, high.
    let pressure: i64 = read(read(prot, offsets.sysctl_mem)?, 8)?;
    if !machine_has_memory(allocated, pressure) {
        return Some(false);
    }
    if offsets.memcg == 0 {
        return Some(true);
    }
    let group: u64 = read(sock, offsets.memcg)?;
    if group == 0 || read::<u8>(group, offsets.tcpmem_active)? == 0 {
        return Some(true);
    }
    let mut counter = group.wrapping_add(u64::from(offsets.tcpmem));
    for _ in 0..GROUPS_MAX {
        if !group_has_memory(read(counter, offsets.usage)?, read(counter, offsets.max)?) {
            return Some(false);
        }
        counter = read(counter, offsets.parent)?;
        if counter == 0 {
            return Some(true);
        }
    }
    Some(false)
}

/// Whether `sock` is the socket with that cookie. Sockets' memory is used again for sockets only, and cookies are not.
#[inline(always)]
fn is_still(sock: u64, cookie: u64, offsets: &Offsets) -> bool {
    sock != 0 && cookie != 0 && read::<u64>(sock, offsets.cookie) == Some(cookie)
}

/// How far a sequence number is ahead of another.
#[inline(always)]
fn distance(sock: u64, ahead: u32, behind: u32) -> Option<u32> {
    Some(read::<u32>(sock, ahead)?.wrapping_sub(read::<u32>(sock, behind)?))
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier accepts no program that can get here.
    loop {}
}

/// Reading the kernel's memory is for programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
