//! One direction between two sockets of the daemon, in which the kernel program forwards what arrives: the verdict on
//! each buffer, and when the daemon may write, resume the forwarding, or pass on the end of the stream.
//!
//! # Invariants
//! - The program forwards only while the daemon has written all that it was passed, and no more than it has granted.
//! - The daemon writes only when all that was forwarded has left the kernel's list.
//! - Neither side waits for the other, nor makes a system call for it.
//!
//! Why a stale read is safe: `gate` and `limit` are one word each and `limit` only grows, so the program sees an older
//! state in which it may do less; the program's own words have one writer at a time, as it runs with its socket locked.
//! What the daemon reads of them it reads after a system call that took that lock.

/// What one direction may have under way in the kernel, in [`cost`]: sent on by the program and not yet taken by the
/// other socket's TCP. Such bytes count nowhere in the kernel, so this is the bound of a slow reader (unbounded, a
/// reader that does not read was seen to hold 1.5 GB).
pub const BACKLOG_MAX: u64 = 1 << 20;
/// What a buffer holds besides its bytes: one with 64 bytes takes 768 to 1,280 bytes of kernel memory (`truesize`),
/// with a page of headers or without.
pub const OVERHEAD: u64 = 1280;
/// The gate of a direction that the daemon copies: never what was passed.
pub const SHUT: u64 = u64::MAX;

/// Flows that one instance of the program serves. 128 bytes of words for each.
pub const FLOWS_MAX: usize = 2048;
/// Directions of those. A flow has two that follow each other: `2n` from its client, `2n + 1` from its target.
pub const DIRECTIONS_MAX: usize = 2 * FLOWS_MAX;
/// Bytes of the ring in which the program tells which directions need the daemon: a record takes 16, and a direction
/// has one that was not read, or two where the daemon looked after it for another reason meanwhile.
pub const TOLD_BYTES: usize = 2 * 16 * DIRECTIONS_MAX;

/// Where the fields lie that the program reads of the kernel's own structures: from its BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// `struct sk_buff`, `cb`, taken for a `struct tcp_skb_cb`.
    pub seq: u32,
    /// `struct sk_buff`.
    pub sk: u32,
    /// `struct tcp_sock`.
    pub copied_seq: u32,
}

/// [`Offsets`]; a global.
pub const OFFSETS: &str = "OFFSETS";
/// The program.
pub const PROGRAM: &str = "splice_verdict";
/// Array of [`Words`], which the daemon maps.
pub const DIRECTIONS: &str = "DIRECTIONS";
/// The cookie of a socket to the number of the direction that begins there.
pub const SLOTS: &str = "SLOTS";
/// The number of a direction to the socket where it begins.
pub const SOCKETS: &str = "SOCKETS";
/// Ring of directions that need the daemon.
pub const TOLD: &str = "TOLD";

/// What the program and the daemon tell each other of one direction; a cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// Bytes that the program has passed to the daemon. The program's.
    pub passed: u64,
    /// Bytes that it has sent on. The program's.
    pub redirected: u64,
    /// What it has used of its credit. The program's.
    pub spent: u64,
    /// Not 0: the daemon was told of passed bytes. Set by the program, cleared by the daemon before it reads.
    pub told: u64,
    /// How much the program has passed when all of that has been written on; [`SHUT`] while the daemon copies. The
    /// daemon's.
    pub gate: u64,
    /// How much the program may spend. The daemon's.
    pub limit: u64,
    /// The sequence number of the byte that comes next, with [`KNOWN`]. The program's.
    pub next: u64,
    /// Not 0: bytes are gone, and the flow has to be reset. One of [`UNREADABLE`], [`HOLE`] and [`STUCK`], and beside it how
    /// many bytes. The program's.
    pub broken: u64,
}

/// Beside a sequence number: it is one.
pub const KNOWN: u64 = 1 << 32;

impl Words {
    /// The sequence number that comes next, once a buffer has come.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is the number")]
    pub const fn expected(&self) -> Option<u32> {
        if self.next & KNOWN == 0 { None } else { Some(self.next as u32) }
    }
}

/// A field of the kernel's could not be read.
pub const UNREADABLE: u64 = 1 << 60;
/// So many bytes are missing in front of a buffer.
pub const HOLE: u64 = 2 << 60;
/// So many bytes could not be taken off a buffer.
pub const STUCK: u64 = 3 << 60;

/// What of a buffer has not come before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// What is behind so many bytes.
    From(u32),
    /// None of it.
    Nothing,
    /// Something is missing in front of it, which TCP never does.
    Hole,
}

/// A segment that was sent again together with new bytes comes to the program as it is (`tcp_read_skb`), and so does one
/// of which the daemon had read a part before the program had the socket: the buffer begins at `seq`, and `expected` comes
/// next.
#[inline(always)]
pub const fn fresh(expected: u32, seq: u32, len: u32) -> Fresh {
    let old = expected.wrapping_sub(seq).cast_signed();
    if old < 0 {
        Fresh::Hole
    } else if old.cast_unsigned() >= len {
        Fresh::Nothing
    } else {
        Fresh::From(old.cast_unsigned())
    }
}

/// What becomes of what has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The daemon reads it.
    Pass,
    /// The other socket sends it.
    Redirect,
    /// It is nothing: an end without bytes, of which the socket knows already. Redirected, or passed behind what
    /// waits to be sent, it would be taken for an error (sk_psock_backlog).
    Drop,
}

/// What `len` bytes in one buffer cost.
#[inline(always)]
pub const fn cost(len: u64) -> u64 {
    len + OVERHEAD
}

/// The program's decision.
#[inline(always)]
pub const fn verdict(words: &Words, len: u64) -> Verdict {
    if len == 0 {
        return Verdict::Drop;
    }
    if words.passed != words.gate || words.spent + cost(len) > words.limit {
        return Verdict::Pass;
    }
    Verdict::Redirect
}

/// Whether the daemon has to be told of what was passed: not while it copies anyway, and not twice.
#[inline(always)]
pub const fn tells(words: &Words) -> bool {
    words.gate != SHUT && words.told == 0
}

/// What the daemon knows of one direction, since its sockets were given to the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// What the other socket's TCP had accepted when it began.
    base: u64,
    /// Bytes that the daemon has read and written.
    copied: u64,
    /// Bytes that it has read and not written.
    held: u64,
}

impl Ledger {
    /// Begins: nothing was passed yet, and the other socket's TCP has accepted so much in its life.
    pub const fn new(accepted: u64) -> Self {
        Self { base: accepted, copied: 0, held: 0 }
    }

    /// So many bytes were read.
    pub const fn took(&mut self, n: u64) {
        self.held += n;
    }

    /// So many of them were written.
    pub const fn gave(&mut self, n: u64) {
        self.held -= n;
        self.copied += n;
    }

    /// So many were read and written while nobody kept this ledger, those that it held first; nothing is held now.
    pub const fn copied(&mut self, n: u64) {
        self.held = 0;
        self.copied += n;
    }

    /// Whether everything that was passed has been read.
    pub const fn has_read(&self, passed: u64) -> bool {
        self.copied + self.held == passed
    }

    /// Whether the other socket's TCP has all that was sent on: then the daemon may write, or pass an end on.
    /// `redirected` was read before `accepted` was asked for.
    pub const fn is_drained(&self, redirected: u64, accepted: u64) -> bool {
        accepted.wrapping_sub(self.base) >= self.copied + redirected
    }

    /// The gate that lets the program go on; none while something is held.
    pub const fn gate(&self) -> Option<u64> {
        if self.held == 0 { Some(self.copied) } else { None }
    }
}

/// The limit for a direction that has drained: `spent` was read before it was found to have, `room` is what the other
/// socket takes without a wait. So nothing waits in front of it but for a moment, and what the other direction passes
/// does not queue up behind that.
pub const fn grant(spent: u64, room: u64, most: u64) -> u64 {
    spent + if room < most { room } else { most }
}

#[cfg(test)]
mod tests;
