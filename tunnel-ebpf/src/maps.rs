//! The maps and globals of the capture's hooks, with typed accessors; those of `group` are in its own file.
//!
//! # Invariants
//! - Every map and global that the daemon opens has its name in `tunnel_common::names`.

use core::ptr;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, BPF_TCP_LISTEN, bpf_sock},
    btf_maps::{HashMap, LpmTrie, PerCpuArray, RingBuf, SkStorage, SockHash, lpm_trie::Key},
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_delete, bpf_sk_storage_get},
    },
    macros::btf_map,
};
use tunnel_common::{
    capture::{Listener, Missing, OnFailure, Rule, SOURCE_NETNS_BITS, SocketKey, SourceV4, SourceV6},
    flow::{FlowKey, Origin},
    names::{COUNTERS_LEN, Counter, FLOWS_MAX, LISTENERS_MAX, RULES_MAX, SOCKETS_MAX, SOURCES_MAX},
};

#[btf_map]
static RULES_V4: LpmTrie<u32, Rule, RULES_MAX> = LpmTrie::new();
#[btf_map]
static RULES_V6: LpmTrie<[u32; 4], Rule, RULES_MAX> = LpmTrie::new();
#[btf_map]
static LISTENERS: HashMap<u64, Listener, LISTENERS_MAX, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
/// Only the daemon writes it, through bpf(2), and what closes is gone from it: a socket that is found here is the daemon's.
#[btf_map]
static SOCKETS: SockHash<SocketKey, SOCKETS_MAX> = SockHash::new();
/// Only the daemon writes it, through bpf(2): what carries it was made by the daemon.
#[btf_map]
static OWN: SkStorage<u32> = SkStorage::new();
#[btf_map]
static SOURCES_V4: LpmTrie<SourceV4, u32, SOURCES_MAX> = LpmTrie::new();
#[btf_map]
static SOURCES_V6: LpmTrie<SourceV6, [u32; 4], SOURCES_MAX> = LpmTrie::new();
// Allocates as it fills: most captures never see FLOWS_MAX connections at once.
#[btf_map]
static FLOWS: HashMap<FlowKey, Origin, FLOWS_MAX, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
#[btf_map]
static ORIGINS: SkStorage<Origin> = SkStorage::new();
#[btf_map]
static COUNTERS: PerCpuArray<u64, COUNTERS_LEN> = PerCpuArray::new();
#[btf_map]
static EVENTS: RingBuf<Missing, 4096> = RingBuf::new();
/// When each reason was last logged, per CPU, in nanoseconds since boot.
#[btf_map]
static LOGGED: PerCpuArray<u64, COUNTERS_LEN> = PerCpuArray::new();

/// What to do while no listener is alive.
#[unsafe(no_mangle)]
static ON_FAILURE: Global<u32> = Global::new(tunnel_common::capture::ON_FAILURE_CLOSED);
/// Whether the kernel has Multipath TCP.
#[unsafe(no_mangle)]
static HAS_MPTCP: Global<u32> = Global::new(0);

/// At most one log line in this time per reason and CPU.
const LOG_INTERVAL_NS: u64 = 1_000_000_000;

/// The lower half: contexts keep ports and families in 32-bit fields.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "what it is for")]
pub(crate) const fn low_half(word: u32) -> u16 {
    word as u16
}

#[inline(always)]
pub(crate) fn on_failure() -> OnFailure {
    ON_FAILURE.load()
}

#[inline(always)]
pub(crate) fn has_mptcp() -> bool {
    HAS_MPTCP.load() != 0
}

/// Whether the daemon made this socket to connect it.
#[inline(always)]
pub(crate) fn is_own(sk: *mut bpf_sock) -> bool {
    // SAFETY: `sk` is the context's socket; without the create flag the value pointer is not read.
    let own =
        unsafe { bpf_sk_storage_get((&raw const OWN).cast_mut().cast(), sk.cast(), ptr::null_mut(), 0) };
    !own.is_null()
}

/// Whether this socket of the daemon's listens. The kernel takes what is closed out of the map, and closes it with the process
/// that held it, so this needs no heartbeat.
#[inline(always)]
pub(crate) fn is_listening(key: &SocketKey) -> bool {
    // SAFETY: the map and a key of it. What is found is a socket, referenced, and released once, here.
    unsafe {
        let sk: *mut bpf_sock =
            bpf_map_lookup_elem((&raw const SOCKETS).cast_mut().cast(), ptr::from_ref(key).cast_mut().cast())
                .cast();
        if sk.is_null() {
            return false;
        }
        let listens = (*sk).state == BPF_TCP_LISTEN;
        bpf_sk_release(sk.cast());
        listens
    }
}

/// The source address that the route to an IPv4 destination would give, in network order.
#[inline(always)]
pub(crate) fn source_v4(netns: u64, dst: u32) -> Option<u32> {
    SOURCES_V4.get(&Key::new(SOURCE_NETNS_BITS + 32, SourceV4::new(netns, dst))).copied()
}

/// The same for IPv6.
#[inline(always)]
pub(crate) fn source_v6(netns: u64, dst: [u32; 4]) -> Option<[u32; 4]> {
    SOURCES_V6.get(&Key::new(SOURCE_NETNS_BITS + 128, SourceV6::new(netns, dst))).copied()
}

#[inline(always)]
pub(crate) fn rule_v4(addr: u32) -> Option<&'static Rule> {
    RULES_V4.get(&Key::new(32, addr))
}

#[inline(always)]
pub(crate) fn rule_v6(addr: [u32; 4]) -> Option<&'static Rule> {
    RULES_V6.get(&Key::new(128, addr))
}

#[inline(always)]
pub(crate) fn listener(netns: u64) -> Option<&'static Listener> {
    // SAFETY: the daemon writes an entry when it opens listeners. One that is read while another takes its place is made
    // of both, finds no socket, and the connection is refused.
    unsafe { LISTENERS.get(netns) }
}

/// Tells the daemon that a namespace has no listener. Lost when the daemon does not read: it also looks
/// by itself.
#[inline(always)]
pub(crate) fn report_missing_listener(missing: Missing) {
    if let Some(entry) = EVENTS.reserve(0) {
        let mut entry = entry;
        entry.write(missing);
        entry.submit(0);
    }
}

/// Records a flow. A leftover entry under the same key belongs to a dead socket: live 4-tuples are unique.
#[inline(always)]
pub(crate) fn record_flow(key: &FlowKey, origin: &Origin) -> Result<(), i32> {
    FLOWS.insert(key, origin, 0)
}

#[inline(always)]
pub(crate) fn flow(key: &FlowKey) -> Option<&'static Origin> {
    // SAFETY: an entry is written once and removed when its socket closes; a reader that races with the
    // removal sees the old bytes, which name a connection that is gone.
    unsafe { FLOWS.get(key) }
}

/// Notes that the socket of a flow has closed, if the flow is still that of socket `cookie`.
#[inline(always)]
pub(crate) fn close_flow(key: &FlowKey, cookie: u64) {
    if let Some(origin) = FLOWS.get_ptr_mut(key) {
        // SAFETY: the entry is there for the duration of the program; one aligned word is written, and
        // only by the thread that closes this socket.
        unsafe {
            if (*origin).cookie() == cookie {
                (*origin).close(bpf_ktime_get_ns());
            }
        }
    }
}

/// Forgets the flow of a socket that nobody has accepted.
#[inline(always)]
pub(crate) fn forget_flow(key: &FlowKey, cookie: u64) {
    if let Some(origin) = flow(key)
        && origin.cookie() == cookie
    {
        let _gone = FLOWS.remove(key);
    }
}

/// Keeps `origin` with the socket until it closes. `false` when the kernel has no memory for it.
#[inline(always)]
pub(crate) fn keep_origin(sk: *mut bpf_sock, origin: Origin) -> bool {
    let mut origin = origin;
    // SAFETY: `sk` is the context's socket, which the verifier knows to be valid; `origin` outlives the
    // call, which copies it.
    let kept = unsafe {
        bpf_sk_storage_get(
            (&raw const ORIGINS).cast_mut().cast(),
            sk.cast(),
            (&raw mut origin).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    }
    .cast::<Origin>();
    if kept.is_null() {
        return false;
    }
    // An earlier connect on this socket failed and left its origin: the initial value is not copied then.
    // SAFETY: not null, and the kernel made it for an Origin; only the thread inside connect() writes it.
    unsafe { *kept = origin };
    true
}

/// What [`keep_origin`] kept.
#[inline(always)]
pub(crate) fn origin(sk: *mut bpf_sock) -> Option<&'static Origin> {
    // SAFETY: as above; without the create flag the value pointer is not read.
    let kept =
        unsafe { bpf_sk_storage_get((&raw const ORIGINS).cast_mut().cast(), sk.cast(), ptr::null_mut(), 0) }
            .cast::<Origin>();
    // SAFETY: null or valid for the duration of the program.
    unsafe { kept.as_ref() }
}

/// See [`Origin::give_up`].
#[inline(always)]
pub(crate) fn give_up(sk: *mut bpf_sock) {
    // SAFETY: as above; written under the socket's lock.
    unsafe {
        let kept = bpf_sk_storage_get((&raw const ORIGINS).cast_mut().cast(), sk.cast(), ptr::null_mut(), 0)
            .cast::<Origin>();
        if let Some(origin) = kept.as_mut() {
            origin.give_up();
        }
    }
}

/// Forgets what an earlier connect on this socket left.
#[inline(always)]
pub(crate) fn drop_origin(sk: *mut bpf_sock) {
    // SAFETY: as above. An error means that there was none.
    let _none = unsafe { bpf_sk_storage_delete((&raw const ORIGINS).cast_mut().cast(), sk.cast()) };
}

#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(n) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: this CPU's own slot.
        unsafe { *n = (*n).wrapping_add(1) };
    }
}

/// Whether it is time to log this reason again.
#[inline(always)]
pub(crate) fn may_log(reason: Counter) -> bool {
    // SAFETY: takes nothing, returns a number.
    let now = unsafe { bpf_ktime_get_ns() };
    let Some(last) = LOGGED.get_ptr_mut(reason as u32) else { return false };
    // SAFETY: this CPU's own slot.
    unsafe {
        if now.wrapping_sub(*last) < LOG_INTERVAL_NS {
            return false;
        }
        *last = now;
    }
    true
}
