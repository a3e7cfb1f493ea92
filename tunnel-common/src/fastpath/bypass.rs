//! Bypass: what an application and the daemon send to each other over loopback goes to the receiver's queue, not TCP.
//!
//! # Invariants
//! - Bytes are read in the order in which they were sent, however sends and reads interleave.
//! - What waits in front of a reader is bounded.
//! - Each message is decided by what is seen of both sockets when it is sent.
//!
//! A socket in a sockmap has two queues: that of redirected messages, which a read empties first, and TCP's. So a
//! message may always go by TCP behind redirected ones, and may be redirected only where TCP has nothing in flight: the
//! sender's peer has acknowledged everything (`write_seq == snd_una`), and all of that was read
//! (`rcv_nxt == copied_seq`).
//!
//! A read takes from one queue only. A reader with edge-triggered epoll may take a short read for the end of what there
//! is (epoll(7), question 9), so the application's socket never has something in both: the daemon redirects no more
//! than surely fits ([`Budget`]), and writes by TCP only once all of it was read. The daemon's own socket may have
//! both, and its reader handles that.
//!
//! What is redirected is charged to its reader. Where the kernel refuses that, `sendmsg(2)` fails with ENOMEM, which it
//! never does by TCP. So what an application sends is not redirected while memory is short; the daemon's own writes are
//! tried, because it handles that error, and the order of bytes leaves it no other way.

/// The most that is redirected into one queue: half of a socket's receive buffer as Linux makes it (`tcp_rmem`, 128 KiB),
/// which what is redirected is charged to. The other half is TCP's window; without one TCP would wait for probes.
pub const QUEUE_MAX: u32 = 64 * 1024;
/// The most messages that are redirected while the queue is never seen empty. A message of one byte takes a `struct
/// sk_msg`, 1 KiB, that is charged to nobody: 256 KiB at most.
pub const MESSAGES_MAX: u32 = 256;
/// Sockets in use at once take two entries each of the map of sockets, and one of these.
pub const SLOTS_MAX: usize = 4096;

/// Which socket of a pair.
pub const APPLICATION: u32 = 0;
/// See [`APPLICATION`].
pub const DAEMON: u32 = 1;

/// What is kept with a socket: which slot is its pair's. A slot that was given to another pair has another generation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    /// An index into the slots.
    pub slot: u32,
    /// Which use of the slot.
    pub generation: u32,
    /// [`APPLICATION`] or [`DAEMON`].
    pub side: u32,
    /// Nothing.
    pub reserved: u32,
}

/// One socket of a pair, as programs and daemon share it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// Its cookie: its key in the map of sockets, and the proof that `sock` is still it. Written by the daemon.
    pub cookie: u64,
    /// Its address in the kernel, noted when it first sends; 0 before.
    pub sock: u64,
    /// Bytes that it sent by redirection.
    pub redirected: u64,
    /// Bytes that it offered to TCP. Those that TCP had no room for are counted again when they are offered again.
    pub passed: u64,
    /// Messages redirected since the other's queue was last seen empty.
    pub burst: u32,
    /// What waits in front of this socket, when it was last looked at: its receive buffer as the kernel charges it.
    pub queued: u32,
    /// Bytes that TCP has received and nobody has read, likewise.
    pub unread: u32,
    /// Bytes that it has sent by TCP and nobody has acknowledged, likewise.
    pub unacked: u32,
    /// Whether there still was such a socket, likewise.
    pub alive: u32,
    /// Nothing.
    pub reserved: u32,
}

/// A pair.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Which use of the slot; 0 while it is in none.
    pub generation: u32,
    /// Which directions may be redirected: a bit for each sending side.
    pub gates: u32,
    /// [`APPLICATION`]'s and [`DAEMON`]'s.
    pub sides: [Side; 2],
}

/// Where the fields lie that programs read of the kernel's own structures: from its BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// `struct sock`, `__sk_common.skc_cookie`.
    pub cookie: u32,
    /// `struct sock`, `sk_backlog.rmem_alloc`.
    pub rmem_alloc: u32,
    /// `struct tcp_sock`.
    pub rcv_nxt: u32,
    /// `struct tcp_sock`.
    pub copied_seq: u32,
    /// `struct tcp_sock`.
    pub write_seq: u32,
    /// `struct tcp_sock`.
    pub snd_una: u32,
    /// `struct sock`, `__sk_common.skc_prot`.
    pub prot: u32,
    /// `struct proto`: a pointer.
    pub memory_allocated: u32,
    /// `struct proto`: a pointer to three.
    pub sysctl_mem: u32,
    /// `struct sock`, `sk_memcg`. 0 where the kernel has not all of this and what follows.
    pub memcg: u32,
    /// `struct mem_cgroup`.
    pub tcpmem: u32,
    /// `struct mem_cgroup`.
    pub tcpmem_active: u32,
    /// `struct page_counter`.
    pub usage: u32,
    /// `struct page_counter`.
    pub max: u32,
    /// `struct page_counter`.
    pub parent: u32,
}

/// Whether TCP may have more memory for sure: `net.ipv4.tcp_mem` leaves it in peace below `pressure`, in pages. What CPUs
/// have set aside is not in `allocated`, and others allocate at the same time.
pub const fn machine_has_memory(allocated: i64, pressure: i64) -> bool {
    allocated < pressure - pressure / 16
}

/// The same of a control group that limits it (version 1, `memory.kmem.tcp.limit_in_bytes`), in pages.
pub const fn group_has_memory(usage: u64, max: u64) -> bool {
    usage.saturating_add(max / 8) < max
}

/// What is seen of a pair when one of it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Who sends.
    pub from: u32,
    /// How much.
    pub size: u32,
    /// The daemon allows redirection in this direction.
    pub gate: bool,
    /// The sender has not shut its direction down: established, or close-wait.
    pub open: bool,
    /// Bytes that the sender has sent by TCP and that are not acknowledged.
    pub unacked: u32,
    /// Bytes that the receiver has acknowledged and not read.
    pub unread: u32,
    /// What waits in front of the receiver, in both queues.
    pub queued: u32,
    /// Messages redirected since `queued` was last seen to be nothing.
    pub burst: u32,
    /// The receiver can be charged for it.
    pub memory: bool,
}

/// By which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Into the receiver's queue.
    Redirect,
    /// By TCP.
    Tcp,
}

/// See the module.
#[inline(always)]
pub const fn decide(seen: &Seen) -> Verdict {
    // Where TCP carries something, what follows goes behind it.
    let quiet = seen.unacked == 0 && seen.unread == 0;
    let fits = seen.size <= QUEUE_MAX && seen.queued <= QUEUE_MAX - seen.size && seen.burst < MESSAGES_MAX;
    let charged = seen.memory || seen.from == DAEMON;
    if seen.open && seen.gate && quiet && fits && charged { Verdict::Redirect } else { Verdict::Tcp }
}

/// What the daemon may still redirect to an application that may not have read anything since its queue was last seen
/// empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    bytes: u32,
    messages: u32,
}

/// What one message holds at least where the kernel splits a write: as many pages as a `struct sk_msg` has places, 17.
const SPLIT_MIN: u32 = 16 * 4096;

impl Default for Budget {
    fn default() -> Self {
        Self { bytes: QUEUE_MAX, messages: MESSAGES_MAX }
    }
}

impl Budget {
    /// Nothing more.
    pub const fn spent() -> Self {
        Self { bytes: 0, messages: 0 }
    }

    /// How much the next write may hold. Where the queue is seen to be empty, the budget is whole again.
    pub const fn room(&self) -> u32 {
        if self.messages < 2 { 0 } else { self.bytes }
    }

    /// Whether it is worth to look at the queue before the next write, so that a reader that keeps up is found to do so
    /// while there is still room for a message.
    pub const fn is_low(&self) -> bool {
        self.messages < MESSAGES_MAX / 2 || self.bytes < QUEUE_MAX / 2
    }

    /// So much was written.
    pub const fn spend(&mut self, bytes: u32) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.messages = self.messages.saturating_sub(1 + bytes / SPLIT_MIN);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::{collections::VecDeque, vec::Vec};

    use proptest::prelude::*;

    use super::*;

    /// One direction of a pair: bytes are numbered, a message is a range of numbers.
    #[derive(Clone, Debug)]
    struct Model {
        from: u32,
        gate: bool,
        /// Sent and neither lost nor refused.
        sent: u64,
        read: u64,
        /// Decided to be redirected, and not queued yet: the sender's lock is free meanwhile.
        hand: Option<(u64, u64)>,
        redirected: VecDeque<(u64, u64)>,
        /// Sent by TCP and not received.
        flight: VecDeque<(u64, u64)>,
        /// Received.
        tcp: VecDeque<(u64, u64)>,
        /// Received and not acknowledged (a delayed ACK).
        unacked: u64,
        burst: u32,
        /// The daemon's: while it has one, it redirects; without, it writes by TCP.
        budget: Option<Budget>,
        memory: bool,
        /// A write of the daemon has failed with ENOMEM.
        refused: bool,
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Send(u32),
        /// What is in the sender's hand is queued.
        Land,
        /// TCP receives one segment.
        Deliver,
        Ack,
        Read(u64),
        Gate(bool),
        Memory(bool),
    }

    fn len(queue: &VecDeque<(u64, u64)>) -> u64 {
        queue.iter().map(|(a, b)| b - a).sum()
    }

    impl Model {
        fn new(from: u32) -> Self {
            Self {
                from,
                gate: false,
                sent: 0,
                read: 0,
                hand: None,
                redirected: VecDeque::new(),
                flight: VecDeque::new(),
                tcp: VecDeque::new(),
                unacked: 0,
                burst: 0,
                budget: None,
                memory: true,
                refused: false,
            }
        }

        fn step(&mut self, step: Step) {
            match step {
                Step::Send(size) => self.send(size),
                Step::Land => self.redirected.extend(self.hand.take()),
                Step::Deliver => {
                    if let Some(segment) = self.flight.pop_front() {
                        self.unacked += segment.1 - segment.0;
                        self.tcp.push_back(segment);
                    }
                }
                Step::Ack => self.unacked = 0,
                Step::Read(most) => self.read(most),
                Step::Memory(enough) => self.memory = enough,
                Step::Gate(open) if self.from == APPLICATION => self.gate = open,
                Step::Gate(true) => {
                    if !self.gate {
                        self.budget = Some(Budget::default());
                    }
                    self.gate = true;
                }
                // Never while something is redirected and not read.
                Step::Gate(false) => {
                    if self.hand.is_none() && self.queued() == 0 {
                        self.gate = false;
                        self.budget = None;
                    }
                }
            }
            let waiting = len(&self.redirected);
            assert!(waiting <= u64::from(QUEUE_MAX), "{waiting} bytes redirected");
            assert!(self.redirected.len() <= MESSAGES_MAX as usize, "{} messages", self.redirected.len());
            if self.from == DAEMON {
                assert!(
                    self.redirected.is_empty() || (self.tcp.is_empty() && self.flight.is_empty()),
                    "the application has something in both queues"
                );
            }
        }

        fn queued(&self) -> u32 {
            u32::try_from(len(&self.redirected) + len(&self.tcp)).unwrap()
        }

        fn send(&mut self, mut size: u32) {
            // One thread of the sender is in one call.
            if self.hand.is_some() {
                return;
            }
            let queued = self.queued();
            if self.refused {
                if queued != 0 {
                    return;
                }
                (self.gate, self.budget, self.refused) = (false, None, false);
            }
            if let Some(budget) = &mut self.budget {
                if budget.room() == 0 {
                    if queued != 0 {
                        return;
                    }
                    *budget = Budget::default();
                }
                size = size.min(budget.room());
                budget.spend(size);
            }
            if queued == 0 {
                self.burst = 0;
            }
            let message = (self.sent, self.sent + u64::from(size));
            let verdict = decide(&Seen {
                from: self.from,
                size,
                gate: self.gate,
                open: true,
                unacked: u32::try_from(len(&self.flight) + self.unacked).unwrap(),
                unread: u32::try_from(len(&self.tcp)).unwrap(),
                queued,
                burst: self.burst,
                memory: self.memory,
            });
            match verdict {
                Verdict::Redirect if !self.memory => {
                    assert_eq!(self.from, DAEMON, "an application hears ENOMEM");
                    self.refused = true;
                    return;
                }
                Verdict::Redirect => {
                    self.burst += 1;
                    self.hand = Some(message);
                }
                Verdict::Tcp => self.flight.push_back(message),
            }
            self.sent = message.1;
        }

        /// As `tcp_bpf_recvmsg` does: what was redirected first, and only from one queue.
        fn read(&mut self, most: u64) {
            let queue = if self.redirected.is_empty() { &mut self.tcp } else { &mut self.redirected };
            let mut left = most;
            while left > 0
                && let Some(front) = queue.front_mut()
            {
                assert_eq!(front.0, self.read, "read out of order");
                let n = left.min(front.1 - front.0);
                front.0 += n;
                self.read += n;
                left -= n;
                if front.0 == front.1 {
                    queue.pop_front();
                }
            }
        }

        fn drain(&mut self) {
            self.step(Step::Land);
            while !self.flight.is_empty() {
                self.step(Step::Deliver);
            }
            while self.read < self.sent {
                let before = self.read;
                self.step(Step::Read(u64::MAX));
                assert!(self.read > before, "bytes were lost");
            }
        }
    }

    /// Every interleaving of a few steps, from the start and from the states that those lead to.
    #[test]
    fn bytes_are_read_in_order_whatever_is_interleaved() {
        const STEPS: [Step; 10] = [
            Step::Send(3),
            Step::Send(QUEUE_MAX),
            Step::Land,
            Step::Deliver,
            Step::Ack,
            Step::Read(2),
            Step::Read(u64::MAX),
            Step::Gate(true),
            Step::Gate(false),
            Step::Memory(false),
        ];
        fn walk(model: &Model, left: u32) {
            if left == 0 {
                model.clone().drain();
                return;
            }
            for step in STEPS {
                let mut next = model.clone();
                next.step(step);
                walk(&next, left - 1);
            }
        }
        for from in [APPLICATION, DAEMON] {
            let mut model = Model::new(from);
            walk(&model, 5);
            // Promoted, and the first message is not read yet.
            model.step(Step::Gate(true));
            model.step(Step::Send(3));
            walk(&model, 5);
        }
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (1u32..200_000).prop_map(Step::Send),
            6 => (1u32..20).prop_map(Step::Send),
            8 => Just(Step::Land),
            4 => Just(Step::Deliver),
            4 => Just(Step::Ack),
            4 => (1u64..200_000).prop_map(Step::Read),
            2 => Just(Step::Read(u64::MAX)),
            2 => any::<bool>().prop_map(Step::Gate),
            2 => any::<bool>().prop_map(Step::Memory),
        ];
        proptest::collection::vec(step, 0..600)
    }

    proptest! {
        #[test]
        fn bytes_are_read_in_order_and_what_waits_is_bounded(from in APPLICATION..=DAEMON, steps in steps()) {
            let mut model = Model::new(from);
            for step in steps {
                model.step(step);
            }
            model.drain();
            prop_assert_eq!(model.read, model.sent);
        }
    }

    #[test]
    fn a_reader_that_never_reads_stops_a_sender_of_single_bytes_after_so_many_messages() {
        for from in [APPLICATION, DAEMON] {
            let mut model = Model::new(from);
            model.step(Step::Gate(true));
            for _ in 0..1000 {
                model.step(Step::Send(1));
                model.step(Step::Land);
            }
            assert!(model.redirected.len() <= MESSAGES_MAX as usize);
            assert!(model.redirected.len() >= MESSAGES_MAX as usize - 1);
        }
    }

    #[test]
    fn a_direction_that_was_shut_down_is_left_to_tcp_which_refuses_it() {
        let seen = Seen {
            from: APPLICATION,
            size: 1,
            gate: true,
            open: false,
            unacked: 0,
            unread: 0,
            queued: 0,
            burst: 0,
            memory: true,
        };
        assert_eq!(decide(&seen), Verdict::Tcp);
    }

    #[test]
    fn memory_is_short_before_the_kernel_refuses_it() {
        assert!(machine_has_memory(0, 100_000) && !machine_has_memory(95_000, 100_000));
        assert!(!machine_has_memory(0, 0));
        // What has no limit: PAGE_COUNTER_MAX.
        assert!(group_has_memory(0, u64::MAX / 2 / 4096) && group_has_memory(800, 1000));
        assert!(!group_has_memory(900, 1000) && !group_has_memory(0, 0) && !group_has_memory(u64::MAX, 1000));
    }
}
