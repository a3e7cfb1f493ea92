//! What one peer of the listeners uses of a worker: connections, flows, new flows in a second, memory.
//!
//! # Invariants
//! - What is counted is counted back when its guard is dropped.

use std::{
    cell::Cell,
    rc::Rc,
    time::{Duration, Instant},
};

use super::memory::{Account, Memory};

/// What one worker gives one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerLimits {
    /// Connections at a time.
    pub connections: usize,
    /// New flows in a second, and at once.
    pub flows_per_second: u32,
}

/// One peer's.
#[derive(Debug)]
pub struct Books {
    connections: Cell<usize>,
    flows: Cell<usize>,
    rate: Rate,
    memory: Rc<Account>,
}

/// New flows, by a bucket of tokens that holds a second's worth.
#[derive(Debug, Default)]
struct Rate {
    used: Cell<f64>,
    since: Cell<Option<Instant>>,
}

impl Rate {
    fn admit(&self, per_second: u32, now: Instant) -> bool {
        let most = f64::from(per_second);
        let passed = self.since.replace(Some(now)).map_or(Duration::ZERO, |since| now.duration_since(since));
        let used = (self.used.get() - passed.as_secs_f64() * most).max(0.0);
        let admitted = used + 1.0 <= most;
        self.used.set(if admitted { used + 1.0 } else { used });
        admitted
    }
}

impl Default for Books {
    fn default() -> Self {
        Self {
            connections: Cell::default(),
            flows: Cell::default(),
            rate: Rate::default(),
            memory: Memory::of_this_worker().peer(),
        }
    }
}

/// A connection among those of its peer.
#[derive(Debug)]
pub struct Connected(Rc<Books>);

/// A flow among those of its peer.
#[derive(Debug)]
pub struct Flowing {
    books: Rc<Books>,
    /// What is kept of its request.
    kept: u64,
}

impl Flowing {
    /// So much is kept of its request, as long as it lasts.
    pub fn keep(&mut self, n: u64) {
        self.kept += n;
        self.books.memory.queue(n);
    }
}

impl Books {
    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.connections.get()
    }

    /// How many flows there are.
    pub fn flows(&self) -> usize {
        self.flows.get()
    }

    /// The memory that it makes us hold.
    pub fn memory(&self) -> &Rc<Account> {
        &self.memory
    }

    /// Whether nothing of it is here, and was not a second ago.
    pub fn is_unused(&self) -> bool {
        let recent = self.rate.since.get().is_some_and(|since| since.elapsed() < Duration::from_secs(1));
        self.connections.get() == 0 && self.flows.get() == 0 && !recent
    }

    /// A connection more, if it may have one.
    pub fn connect(self: &Rc<Self>, most: usize) -> Option<Connected> {
        (self.connections.get() < most).then(|| {
            self.connections.set(self.connections.get() + 1);
            Connected(Rc::clone(self))
        })
    }

    /// Whether a flow more is within so many a second.
    pub fn may_begin(&self, per_second: u32) -> bool {
        self.rate.admit(per_second, Instant::now())
    }

    /// A flow more.
    pub fn flow(self: &Rc<Self>) -> Flowing {
        self.flows.set(self.flows.get() + 1);
        Flowing { books: Rc::clone(self), kept: 0 }
    }
}

impl Connected {
    /// The memory that its peer makes us hold.
    pub fn memory(&self) -> &Rc<Account> {
        self.0.memory()
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
    }
}

impl Drop for Flowing {
    fn drop(&mut self) {
        self.books.flows.set(self.books.flows.get() - 1);
        if self.kept > 0 {
            self.books.memory.sent(self.kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_admits_its_flows_and_the_next_one_as_many() {
        let (rate, start) = (Rate::default(), Instant::now());
        let admitted =
            |ms: u64| (0..100).filter(|_| rate.admit(10, start + Duration::from_millis(ms))).count();
        assert_eq!(admitted(0), 10);
        assert_eq!(admitted(0), 0);
        assert_eq!(admitted(500), 5);
        assert_eq!(admitted(10_000), 10);
    }

    #[test]
    fn what_a_peer_has_is_given_back_with_its_guard() {
        let books = Rc::new(Books::default());
        let one = books.connect(1).unwrap();
        assert!(books.connect(1).is_none());
        let flow = books.flow();
        assert_eq!((books.connections(), books.flows(), books.is_unused()), (1, 1, false));
        let mut flow = flow;
        let held = Memory::of_this_worker().held();
        flow.keep(16_000);
        assert_eq!((books.memory().taken(), Memory::of_this_worker().held() - held), (16_000, 16_000));
        drop((one, flow));
        assert_eq!((books.memory().taken(), Memory::of_this_worker().held()), (0, held));
        assert!(books.is_unused());
    }
}
