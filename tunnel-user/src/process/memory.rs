//! The memory that peers and their flows make a worker hold, of how much there is for it.
//!
//! Two things are counted apart. What is *held* is in memory now: bytes that were received and not passed on, and bytes that were
//! given to a connection and not sent. What is *taken* is what a peer may make us hold by the windows that it was given.
//!
//! # Invariants
//! - Nothing here crosses a core: each worker has an equal part of the process's budget.
//! - What a peer has taken is never more than its part of that, but for the least window of each of its connections.

use std::{
    cell::{Cell, RefCell},
    fs,
    rc::Rc,
    task::Waker,
};

/// The window of a connection before anything is given (RFC 9113 section 6.9.2): the least that there is.
pub const LEAST_WINDOW: u32 = 65_535;
/// A flow for which not even this is left is refused.
const FLOW_MIN: u64 = 64 * 1024;
/// What one stream may have waiting for its connection where memory is short: two TLS records.
const QUEUE_SHORT: usize = 32 * 1024;
/// Where nothing is known of the machine.
const MEMORY_UNKNOWN: u64 = 1 << 30;
/// The least that a process is given: 16 windows of a connection, as they are at first.
const MEMORY_MIN: u64 = 16 << 20;
/// Of the limit of the daemon's cgroup, one in this many bytes. The other half is for what is not counted: code, TLS, tables,
/// and what the kernel holds for its sockets.
const OF_LIMIT: u64 = 2;
/// Of a machine's memory, where its cgroup has no limit.
const OF_MACHINE: u64 = 4;
/// One peer gets one in this many of all bytes.
const PEERS: u64 = 4;

/// One worker's.
#[derive(Debug)]
pub struct Memory {
    most: Cell<u64>,
    peer_most: Cell<u64>,
    held: Cell<u64>,
    shrunk: Cell<u64>,
}

/// One peer's, or our own for what is not a peer's.
#[derive(Debug)]
pub struct Account {
    memory: Rc<Memory>,
    is_peer: bool,
    taken: Cell<u64>,
    /// Streams that wait until they have less to send.
    waiting: RefCell<Vec<Waker>>,
}

thread_local! {
    /// A worker is a thread.
    static MEMORY: Rc<Memory> = Rc::new(Memory {
        most: Cell::new(MEMORY_UNKNOWN),
        peer_most: Cell::new(MEMORY_UNKNOWN),
        held: Cell::default(),
        shrunk: Cell::default(),
    });
}

impl Memory {
    /// That of the worker on this thread.
    pub fn of_this_worker() -> Rc<Self> {
        MEMORY.with(Rc::clone)
    }

    /// It has so many bytes, and of these one peer so many.
    pub fn give(&self, most: u64, peer_most: u64) {
        self.most.set(most);
        self.peer_most.set(peer_most);
    }

    /// What is in memory now.
    pub fn held(&self) -> u64 {
        self.held.get()
    }

    /// What may be.
    pub fn most(&self) -> u64 {
        self.most.get()
    }

    /// A peer was given a smaller window, for want of memory.
    pub fn shrank(&self) {
        self.shrunk.set(self.shrunk.get() + 1);
    }

    /// How often one was.
    pub fn shrunk(&self) -> u64 {
        self.shrunk.get()
    }

    /// Whether windows are to shrink: half of it is in use.
    pub fn is_short(&self) -> bool {
        self.held.get() >= self.most.get() / 2
    }

    /// Whether all of it is in use.
    pub fn is_full(&self) -> bool {
        self.held.get() + FLOW_MIN > self.most.get()
    }

    /// For one peer.
    pub fn peer(self: &Rc<Self>) -> Rc<Account> {
        self.account(true)
    }

    /// For what is the operator's own.
    pub fn own(self: &Rc<Self>) -> Rc<Account> {
        self.account(false)
    }

    fn account(self: &Rc<Self>, is_peer: bool) -> Rc<Account> {
        Rc::new(Account {
            memory: Rc::clone(self),
            is_peer,
            taken: Cell::default(),
            waiting: RefCell::default(),
        })
    }
}

impl Account {
    /// The worker's.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What a peer may take of it.
    pub fn most(&self) -> u64 {
        if self.is_peer { self.memory.peer_most.get() } else { u64::MAX }
    }

    /// What it has taken.
    pub fn taken(&self) -> u64 {
        self.taken.get()
    }

    /// Takes so many bytes, whatever is left.
    pub fn take(&self, n: u64) {
        self.taken.set(self.taken.get() + n);
    }

    /// Takes so many bytes, if no more than `most` are taken then.
    pub fn try_take(&self, n: u64, most: u64) -> bool {
        let fits = self.taken.get() + n <= most;
        if fits {
            self.take(n);
        }
        fits
    }

    /// Gives so many back.
    pub fn give_back(&self, n: u64) {
        self.taken.set(self.taken.get().saturating_sub(n));
    }

    /// So many bytes more are in memory.
    pub fn hold(&self, n: u64) {
        self.memory.held.set(self.memory.held.get() + n);
    }

    /// So many fewer are.
    pub fn release(&self, n: u64) {
        self.memory.held.set(self.memory.held.get().saturating_sub(n));
    }

    /// So many bytes more wait to be sent.
    pub fn queue(&self, n: u64) {
        self.take(n);
        self.hold(n);
    }

    /// So many fewer do.
    pub fn sent(&self, n: u64) {
        self.give_back(n);
        self.release(n);
        for waiting in self.waiting.take() {
            waiting.wake();
        }
    }

    /// Whether it is to be given no more than it needs.
    pub fn is_short(&self) -> bool {
        self.memory.is_short() || self.taken.get() >= self.most() / 2
    }

    /// Whether a flow more may bring it beyond what it may take.
    pub fn is_full(&self) -> bool {
        self.taken.get().saturating_add(FLOW_MIN) > self.most()
    }

    /// Whether a stream that has so much waiting may have more of it. If not, its task is woken when there is less.
    pub fn may_queue(&self, waiting: usize, waker: &Waker) -> bool {
        if waiting < QUEUE_SHORT || !self.is_short() {
            return true;
        }
        let mut all = self.waiting.borrow_mut();
        if !all.iter().any(|known| known.will_wake(waker)) {
            all.push(waker.clone());
        }
        false
    }
}

/// How many bytes peers may make a process hold, and one of them, if the configuration does not say.
pub fn budget(memory: Option<u64>, peer: Option<u64>) -> (u64, u64) {
    let memory = memory.unwrap_or_else(default_memory);
    (memory, peer.unwrap_or(memory / PEERS))
}

/// Half of the cgroup's limit; without one a quarter of the machine's memory.
fn default_memory() -> u64 {
    let limited = cgroup_limit().map(|limit| limit / OF_LIMIT);
    let machine = machine().map(|memory| memory / OF_MACHINE);
    limited.into_iter().chain(machine).min().unwrap_or(MEMORY_UNKNOWN).max(MEMORY_MIN)
}

/// The least limit of the group that this process is in, and of those above it.
fn cgroup_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut least = None;
    loop {
        let file = format!("/sys/fs/cgroup/{path}/memory.max");
        // "max" is no number, and means that there is none.
        let limit = fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok());
        least = limit.into_iter().chain(least).min();
        path = match path.rsplit_once('/') {
            Some((above, _)) => above,
            None if path.is_empty() => return least,
            None => "",
        };
    }
}

fn machine() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_takes_its_part_and_leaves_the_others_theirs() {
        let memory = Memory::of_this_worker();
        memory.give(64 << 20, 16 << 20);
        let (greedy, other) = (memory.peer(), memory.peer());
        while greedy.try_take(1 << 20, greedy.most()) {}
        assert!(greedy.is_full() && greedy.is_short() && !other.is_short() && !other.is_full());
        assert_eq!(greedy.taken(), 16 << 20);
        greedy.give_back(8 << 20);
        assert!(!greedy.is_full());
        let own = memory.own();
        own.hold(40 << 20);
        assert!(memory.is_short() && other.is_short() && !memory.is_full() && !own.is_full());
        own.hold(24 << 20);
        assert!(memory.is_full());
        own.release(64 << 20);
        assert!(!memory.is_short());
    }

    #[test]
    fn what_is_known_of_the_machine_is_more_than_nothing() {
        let (memory, peer) = budget(None, None);
        assert!(memory >= MEMORY_MIN && peer == memory / PEERS);
        assert_eq!(budget(Some(100), None), (100, 25));
        assert_eq!(budget(Some(100), Some(99)), (100, 99));
    }
}
