//! One direction between two sockets of the daemon, in which the kernel program forwards what arrives: the verdict on
//! each buffer, and when the daemon may write, resume the forwarding, or pass on the end of the stream.
//!
//! Two directions make a flow, and each one's sink is the other one's source. Bytes that are sent on wait on a list in front
//! of their sink. What a socket passes up while something waits in front of it is charged to it without its lock, so that
//! its account of memory can come out wrong; such bytes go to a **mailbox** instead, a Unix socket without an account.
//!
//! # Invariants
//! - The program forwards only while the daemon has written all that was kept for it, in *both* directions of the flow, and
//!   no more than it has granted.
//! - Nothing is passed to a socket while anything waits in front of it, or is about to: it is mailed, within a bound. Beyond
//!   that, where the kernel's worker that sends what waits gets no processor, it is passed all the same, and the flow is
//!   copied from then on: no byte is lost for want of a processor.
//! - Since the gate was last opened, what was mailed comes before what was passed.
//! - The daemon writes only when all that was forwarded has left the kernel's list.
//! - Neither side waits for the other, nor makes a system call for it.
//!
//! Why a stale read is safe: `gate` and `limit` are one word each and `limit` only grows, so the program sees an older
//! state in which it may do less; the program's own words have one writer at a time, as it runs with its socket locked.
//! What the daemon reads of them it reads after a system call that took that lock. The programs of both sockets run at
//! once: each announces what it is about to do ([`Words::announced`], [`Words::kept`]) before it looks at what the
//! other one has announced, with a full barrier in between, so that at least one of them sees the other.

/// What one direction may have under way in the kernel, in [`cost`]: sent on by the program and not yet taken by the
/// other socket's TCP. Such bytes count nowhere in the kernel, so this is the bound of a slow reader (unbounded, a
/// reader that does not read was seen to hold 1.5 GB).
pub const BACKLOG_MAX: u64 = 1 << 20;
/// What a buffer holds besides its bytes: one with 64 bytes takes 768 to 1,280 bytes of kernel memory (`truesize`),
/// with a page of headers or without.
pub const OVERHEAD: u64 = 1280;
/// The gate of a direction that the daemon copies: never what was passed.
pub const SHUT: u64 = u64::MAX;

/// Flows that one instance of the program serves. 256 bytes of words for each.
pub const FLOWS_MAX: usize = 2048;
/// Directions of those. A flow has two that follow each other: `2n` from its client, `2n + 1` from its target.
pub const DIRECTIONS_MAX: usize = 2 * FLOWS_MAX;
/// Bytes of the ring in which the program tells which directions need the daemon: a record takes 16, and a direction
/// has one that was not read, or two where the daemon looked after it for another reason meanwhile.
pub const TOLD_BYTES: usize = 2 * 16 * DIRECTIONS_MAX;

/// What one direction may have in its mailbox, in [`cost`]. TCP opens its window for mailed bytes, so nothing slows their
/// sender down; they are mailed only until what waits in front of the socket has been sent, which is at most what the
/// other socket had room for. What comes beyond it is passed.
pub const MAIL_MAX: u64 = 16 << 20;

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
    /// `struct tcp_sock`.
    pub write_seq: u32,
    /// `struct tcp_sock`.
    pub snd_una: u32,
    /// `struct tcp_sock`.
    pub bytes_acked: u32,
    /// `struct sock`: its `struct sk_psock`, with flags in the lowest bits.
    pub user_data: u32,
    /// `struct sk_psock`, `ingress_skb.qlen`: how many buffers wait in front of the socket.
    pub waiting: u32,
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
/// The number of a direction to the mailbox of the socket where it begins.
pub const MAILBOXES: &str = "MAILBOXES";
/// Ring of directions that need the daemon.
pub const TOLD: &str = "TOLD";

/// What the program and the daemon tell each other of one direction; two cache lines.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Words {
    /// Bytes that the program has left to the daemon, passed or mailed. The program's.
    pub kept: u64,
    /// Bytes of these that it has mailed. The program's.
    pub mailed: u64,
    /// Bytes that it has sent on. The program's.
    pub redirected: u64,
    /// The same, and those that it is about to send on. The program's.
    pub announced: u64,
    /// What it has used of its credit. The program's.
    pub spent: u64,
    /// What its mail has cost. The program's.
    pub mail_spent: u64,
    /// Not 0: nothing waits in front of the socket, nor will until the gate is opened, and what is kept is passed. Set by the
    /// program, cleared by the daemon before it opens the gate.
    pub turned: u64,
    /// Not 0: the daemon was told of kept bytes. Set by the program, cleared by the daemon before it reads.
    pub told: u64,
    /// How much the program has kept when all of that has been written on; [`SHUT`] while the daemon copies. The
    /// daemon's.
    pub gate: u64,
    /// How much the program may spend. The daemon's.
    pub limit: u64,
    /// How much its mail may cost. The daemon's.
    pub mail_limit: u64,
    /// What the sink's TCP has accepted when nothing that was sent on is missing, without what was sent on. The daemon's.
    pub due: u64,
    /// The sequence number of the byte that comes next, with [`KNOWN`]. The program's.
    pub next: u64,
    /// Not 0: bytes are gone, and the flow has to be reset. One of [`UNREADABLE`], [`HOLE`], [`STUCK`] and [`FLOOD`], and
    /// beside it how many bytes. The program's.
    pub broken: u64,
    /// [`FORCED`]: its mailbox was full, and it passes bytes behind what waits; [`PASSING`]: it has, and nothing waits any
    /// more. Set by the program, and to [`PASSING`] by the daemon too.
    pub forced: u64,
    /// So that there are as many as two cache lines have.
    pub unused: u64,
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

    /// Whether everything that was kept has been written on.
    #[inline(always)]
    pub const fn is_open(&self) -> bool {
        self.kept == self.gate
    }
}

/// See [`Words::forced`]. What is passed may not be readable yet, so that an end would seem to come before it.
pub const FORCED: u64 = 1;
/// See [`Words::forced`].
pub const PASSING: u64 = 2;

/// A field of the kernel's could not be read.
pub const UNREADABLE: u64 = 1 << 60;
/// So many bytes are missing in front of a buffer.
pub const HOLE: u64 = 2 << 60;
/// So many bytes could not be taken off a buffer.
pub const STUCK: u64 = 3 << 60;
/// So many bytes could not be put into the mailbox.
pub const FLOOD: u64 = 4 << 60;

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

/// What `len` bytes in one buffer cost.
#[inline(always)]
pub const fn cost(len: u64) -> u64 {
    len + OVERHEAD
}

/// Whether `len` bytes that have arrived may be sent on, as far as this direction knows: then it announces them, and asks
/// whether the other one [`is_open`](Words::is_open). None without bytes: redirected, or passed behind what waits to be
/// sent, a buffer that is only an end would be taken for an error (sk_psock_backlog).
#[inline(always)]
pub const fn may_redirect(words: &Words, len: u64) -> bool {
    len > 0 && words.is_open() && words.spent + cost(len) <= words.limit
}

/// Where bytes go that are not sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// To the socket, where the daemon reads it.
    Passed,
    /// To its mailbox.
    Mailed,
    /// To the socket, although something waits in front of it: the mailbox is full. [`Words::forced`] says so.
    Forced,
}

/// Where `len` bytes go, once they are counted in [`Words::kept`]; `is_empty`: nothing waits in front of the socket.
#[inline(always)]
pub const fn keep(words: &Words, len: u64, is_empty: bool) -> Kept {
    if words.turned != 0 || is_empty {
        Kept::Passed
    } else if words.mail_spent + cost(len) <= words.mail_limit {
        Kept::Mailed
    } else {
        Kept::Forced
    }
}

/// Whether it matters if anything waits in front of the socket.
#[inline(always)]
pub const fn asks_if_empty(words: &Words) -> bool {
    words.turned == 0 || words.forced == FORCED
}

/// Whether nothing waits in front of a socket, nor is about to: its TCP has `accepted` all that the `other` direction, which
/// ends there, has announced, and no buffer is on its list. (A buffer is taken off the list after it was accepted.)
#[inline(always)]
pub const fn is_empty(accepted: u64, other: &Words, waiting: u32) -> bool {
    waiting == 0 && accepted.wrapping_sub(other.due) >= other.announced
}

/// Whether the daemon has to be told of what was kept: not while it copies anyway, and not twice.
#[inline(always)]
pub const fn tells(words: &Words) -> bool {
    words.gate != SHUT && words.told == 0
}

/// What the daemon knows of one direction, since its sockets were given to the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ledger {
    /// What the other socket's TCP had accepted when it began.
    base: u64,
    /// Bytes that the daemon has read and written.
    copied: u64,
    /// Bytes that it has read and not written.
    held: u64,
}

impl Ledger {
    /// Begins: nothing was kept yet, and the other socket's TCP has accepted so much in its life.
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

    /// Whether everything that was kept has been read.
    pub const fn has_read(&self, kept: u64) -> bool {
        self.copied + self.held == kept
    }

    /// What the other socket's TCP has accepted when nothing that was sent on is missing, without that.
    pub const fn due(&self) -> u64 {
        self.base.wrapping_add(self.copied)
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
/// socket takes without a wait. So nothing waits in front of it but for a moment, and what the other direction keeps
/// is mailed no longer than that.
pub const fn grant(spent: u64, room: u64, most: u64) -> u64 {
    spent + if room < most { room } else { most }
}

#[cfg(test)]
mod tests;
