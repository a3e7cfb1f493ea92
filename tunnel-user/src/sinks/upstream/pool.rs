//! The connections of one worker to one upstream, whatever they speak.
//!
//! A connection that carries many streams stays here, and is closed when it is idle; where each stream has a connection of
//! its own, it is the flow's from the beginning, and only counted.
//!
//! # Invariants
//! Each has a test named after it in `pool/tests.rs`:
//! - a connection is shared only by flows whose whole key is equal;
//! - never more dials are in flight than the waiting flows need;
//! - a connection never carries more streams than it takes;
//! - a connection that drains takes no new streams, and its old ones go on;
//! - there are never more connections and dials than the limit;
//! - a slow dial of one key holds up no other;
//! - flows that wait are served in the order in which they came;
//! - a flow that no longer waits takes nobody's permit.

mod slot;
#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    pin::pin,
    rc::{Rc, Weak},
};

use tokio::{
    sync::{Notify, oneshot},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use self::slot::{Slot, Waiting};
use super::{
    ConnectError,
    connect::Key,
    connection::{Connect, Connection, OpenError, OpenRequest},
    permit::{Count, Issuer, Permit, StreamPermits},
    pick,
    settings::PoolSettings,
    signal::Signal,
    stream::{LINGER, Stream},
};
use crate::{
    model::flow::Target,
    observe::{
        histogram::{Buckets, Histogram},
        marks::Made,
    },
};

/// Flows that wait for a connection to the same peer; more are refused at once.
const WAITING_MAX: usize = 4096;
/// Dials in flight to the same peer.
const DIALING_MAX: usize = 4;
/// A flow waits for a permit as long as a connection may take to be made, and once more for others that come before it.
const WAITS_FOR: u32 = 2;

/// The pool of one upstream on one worker. Dropped, it ends its connections.
pub struct Pool<D: Connect>(Rc<Inner<D>>);

struct Inner<D: Connect> {
    dialer: Rc<D>,
    settings: PoolSettings,
    slots: RefCell<HashMap<Key, Rc<Slot<D::Connection>>>>,
    /// Dials and connections. They hold the pool weakly.
    tasks: RefCell<JoinSet<()>>,
    opened: Cell<u64>,
    failed: Cell<u64>,
    /// How long those took that were opened.
    took: Histogram,
    /// Connections, and dials.
    open: Count,
    /// A connection has ended.
    closed: Notify,
}

/// A connection, and what the pool keeps of it.
struct Entry<C: Connection> {
    connection: C,
    /// Where those who wait for a permit are; nowhere for a connection of one stream.
    slot: Weak<Slot<C>>,
    /// Permits that are out.
    active: Cell<usize>,
    idle_since: Cell<Instant>,
    /// Its endpoint is gone: it is closed as soon as it is idle.
    unwanted: Cell<bool>,
    /// The last permit was given back, or it is unwanted.
    changed: Signal,
    /// When its dial was begun, and when it was ready.
    dialled: [std::time::Instant; 2],
    /// Among the connections of the pool, for one that is not a task of it.
    _open: Option<Permit>,
}

impl<C: Connection> Entry<C> {
    fn new(connection: C, begun: std::time::Instant, slot: Weak<Slot<C>>, open: Option<Permit>) -> Rc<Self> {
        Rc::new(Self {
            connection,
            slot,
            active: Cell::default(),
            idle_since: Cell::new(Instant::now()),
            unwanted: Cell::default(),
            changed: Signal::default(),
            dialled: [begun, std::time::Instant::now()],
            _open: open,
        })
    }

    /// Permits that it could give out now.
    fn free(&self) -> usize {
        self.connection.max_streams().saturating_sub(self.active.get())
    }

    /// Ready when it has carried nothing for so long that it is to be closed.
    async fn idle(&self, settings: &PoolSettings) {
        loop {
            if self.active.get() > 0 {
                self.changed.taken().await;
                continue;
            }
            let keep_for =
                if self.unwanted.get() { std::time::Duration::ZERO } else { settings.idle_timeout };
            let idle_at = self.idle_since.get() + keep_for;
            if idle_at <= Instant::now() {
                return;
            }
            tokio::select! {
                () = sleep_until(idle_at) => {}
                () = self.changed.taken() => {}
            }
        }
    }

    /// Runs it to its end; closes it when it is idle.
    async fn run(&self, settings: &PoolSettings, grew: &dyn Fn()) {
        let mut run = pin!(self.connection.run(grew));
        let mut retired = pin!(self.connection.retired());
        loop {
            tokio::select! {
                biased;
                () = &mut run => return,
                () = &mut retired, if !self.unwanted.get() => {
                    self.connection.drain();
                    self.unwanted.set(true);
                }
                () = self.idle(settings) => break,
            }
        }
        self.connection.close();
        let _gave_up = timeout(settings.keepalive_timeout + LINGER, run).await;
    }
}

impl<C: Connection> Issuer for Entry<C> {
    fn returned(&self) {
        self.active.set(self.active.get() - 1);
        if self.active.get() == 0 {
            self.idle_since.set(Instant::now());
            self.changed.set();
        }
        if let Some(slot) = self.slot.upgrade() {
            slot.serve();
        }
    }
}

/// A connection, and a permit for one stream on it; given back when dropped.
pub struct Checkout<C: Connection> {
    entry: Rc<Entry<C>>,
    permit: Permit,
}

impl<C: Connection> Checkout<C> {
    fn new(entry: &Rc<Entry<C>>) -> Self {
        entry.active.set(entry.active.get() + 1);
        let issuer: Rc<dyn Issuer> = Rc::<Entry<C>>::clone(entry);
        Self { entry: Rc::clone(entry), permit: Permit::new(issuer) }
    }

    /// The connection.
    pub fn connection(&self) -> &C {
        &self.entry.connection
    }

    /// How it was made.
    pub fn made(&self) -> Made {
        let [begun, ready] = self.entry.dialled;
        Made { begun, connected: self.entry.connection.connected().unwrap_or(begun), ready }
    }

    /// Opens the stream. `endpoint` is its permit there.
    pub async fn open(self, request: OpenRequest<'_, '_>, endpoint: Permit) -> Result<Stream, OpenError> {
        let Self { entry, permit } = self;
        let permits = StreamPermits { connection: permit, endpoint, upstream: None };
        entry.connection.open(request, permits).await
    }
}

impl<D: Connect> Pool<D> {
    /// An empty pool, of connections that `dialer` makes.
    pub fn new(dialer: D, settings: PoolSettings) -> Self {
        Self(Rc::new(Inner {
            dialer: Rc::new(dialer),
            settings,
            slots: RefCell::default(),
            tasks: RefCell::default(),
            opened: Cell::default(),
            failed: Cell::default(),
            took: Histogram::default(),
            open: Count::default(),
            closed: Notify::new(),
        }))
    }

    /// Connections opened since the start.
    pub fn opened(&self) -> u64 {
        self.0.opened.get()
    }

    /// Connections that could not be made since the start.
    pub fn failed(&self) -> u64 {
        self.0.failed.get()
    }

    /// How long connections took to be made.
    pub fn took(&self) -> Buckets {
        self.0.took.read()
    }

    /// Calls `each` with every endpoint that there are connections to: how many are shared, how many are being made, and how
    /// many flows wait for one.
    pub fn each(&self, mut each: impl FnMut(&Target, usize, usize, usize)) {
        for (key, slot) in self.0.slots.borrow().iter() {
            let (connections, waiting) = (slot.connections.borrow().len(), slot.waiting.borrow().len());
            each(&key.endpoint, connections, slot.dialing.get(), waiting);
        }
    }

    /// Shared connections that are open, all keys together.
    pub fn connections(&self) -> usize {
        self.0.slots.borrow().values().map(|s| s.connections.borrow().len()).sum()
    }

    /// Closes every shared connection once what its streams have handed over is on the wire: the end of a stream is
    /// not the end of its bytes. Ready when all are closed; the caller bounds the time.
    pub async fn close(&self) {
        loop {
            for slot in self.0.slots.borrow().values() {
                for entry in slot.connections.borrow().iter() {
                    entry.connection.close();
                }
            }
            if self.connections() == 0 {
                return;
            }
            self.0.closed.notified().await;
        }
    }

    /// Whether a connection takes one more stream.
    pub fn has_room(&self, key: &Key) -> bool {
        let slot = self.0.slots.borrow().get(key).cloned();
        slot.is_some_and(|s| pick::with_room(&s.connections.borrow(), |c| c.free()).is_some())
    }

    /// Closes the connections to an endpoint that is gone, each when its last stream has ended.
    pub fn forget(&self, endpoint: &Target) {
        for (_, slot) in self.0.slots.borrow().iter().filter(|(key, _)| key.endpoint == *endpoint) {
            for entry in slot.connections.borrow().iter() {
                entry.connection.drain();
                entry.unwanted.set(true);
                entry.changed.set();
            }
        }
    }

    /// A connection with a permit for one stream: at once where there is one, else when a dial is done.
    pub async fn checkout(&self, key: &Key) -> Result<Checkout<D::Connection>, ConnectError> {
        let inner = &self.0;
        if !inner.dialer.is_shared() {
            return inner.dial_for_one(key).await;
        }
        let slot = inner.slot(key);
        if let Some(checkout) = slot.checkout() {
            if slot.dialing.get() == 0 && slot.is_nearly_full() {
                inner.dial(key, &slot);
            }
            return Ok(checkout);
        }
        if slot.waiting.borrow().len() >= WAITING_MAX {
            let endpoint = key.endpoint.clone();
            return Err(ConnectError::Overflow { endpoint, most: WAITING_MAX });
        }
        let (tell, told) = oneshot::channel();
        let _waiting = Waiting::new(&slot, tell);
        inner.dial_for_waiting(key, &slot);
        let after = inner.settings.connect.timeout * WAITS_FOR;
        match timeout(after, told).await {
            Ok(told) => told.unwrap_or(Err(ConnectError::Shutdown)),
            Err(_) => {
                let (endpoint, barred) = (key.endpoint.clone(), slot.is_barred());
                Err(ConnectError::Waited { endpoint, after, barred })
            }
        }
    }

    /// Whether a connection can be made there. One that carries one stream is made beside those of flows, and not counted.
    pub async fn probe(&self, key: &Key) -> Result<(), ConnectError> {
        if self.0.dialer.is_shared() {
            return self.checkout(key).await.map(drop);
        }
        self.0.dialer.connect(key).await.map(drop)
    }

    /// Whether what there is to an endpoint has not answered for a while, and may be lost.
    pub fn is_overdue(&self, key: &Key) -> bool {
        let slot = self.0.slots.borrow().get(key).cloned();
        slot.is_some_and(|slot| {
            let connections = slot.connections.borrow();
            let mut up = connections.iter().filter(|c| c.connection.max_streams() > 0).peekable();
            up.peek().is_some() && up.all(|c| c.connection.is_overdue())
        })
    }
}

impl<D: Connect> Inner<D> {
    fn slot(&self, key: &Key) -> Rc<Slot<D::Connection>> {
        let mut slots = self.slots.borrow_mut();
        if let Some(slot) = slots.get(key) {
            return Rc::clone(slot);
        }
        // A new key is rare: the time to forget those that nobody uses, such as those of old certificates.
        slots.retain(|_, s| s.dialing.get() > 0 || !s.connections.borrow().is_empty());
        Rc::clone(slots.entry(key.clone()).or_default())
    }

    /// A connection that carries one stream is dialled by the flow that needs it, and by nobody once that has left.
    async fn dial_for_one(&self, key: &Key) -> Result<Checkout<D::Connection>, ConnectError> {
        let most = self.settings.max_connections;
        let permit = self.open.take(most).ok_or(ConnectError::Limit { most })?;
        let begun = std::time::Instant::now();
        let connection =
            self.dialer.connect(key).await.inspect_err(|_| self.failed.set(self.failed.get() + 1))?;
        self.opened.set(self.opened.get() + 1);
        self.took.observe(begun.elapsed());
        Ok(Checkout::new(&Entry::new(connection, begun, Weak::new(), Some(permit))))
    }

    /// As many dials as those who wait need. Where there may be none, nobody waits.
    fn dial_for_waiting(self: &Rc<Self>, key: &Key, slot: &Rc<Slot<D::Connection>>) {
        // Who allows no streams on one connection allows none on the next; it may change its mind (SETTINGS).
        if slot.is_barred() {
            return;
        }
        let needed = slot.waiting.borrow().len().div_ceil(self.settings.max_streams).min(DIALING_MAX);
        while slot.dialing.get() < needed {
            if !self.dial(key, slot) {
                if slot.dialing.get() == 0 {
                    slot.fail(&ConnectError::Limit { most: self.settings.max_connections });
                }
                return;
            }
        }
    }

    /// Starts a dial, if there may be one; what comes of it serves those who wait.
    fn dial(self: &Rc<Self>, key: &Key, slot: &Rc<Slot<D::Connection>>) -> bool {
        let Some(permit) = self.open.take(self.settings.max_connections) else { return false };
        slot.dialing.set(slot.dialing.get() + 1);
        let (dialer, settings) = (Rc::clone(&self.dialer), self.settings.clone());
        let (key, slot) = (key.clone(), Rc::clone(slot));
        let pool = Rc::downgrade(self);
        let mut tasks = self.tasks.borrow_mut();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(async move {
            let permit: Permit = permit;
            let begun = std::time::Instant::now();
            let dialled = dialer.connect(&key).await;
            let took = begun.elapsed();
            slot.dialing.set(slot.dialing.get() - 1);
            let connection = match dialled {
                Ok(connection) => connection,
                Err(why) => {
                    tracing::debug!(endpoint = %key.endpoint, "dial failed: {why}");
                    if let Some(inner) = pool.upgrade() {
                        inner.failed.set(inner.failed.get() + 1);
                    }
                    // Another dial may still succeed.
                    if slot.dialing.get() == 0 {
                        slot.fail(&why);
                    }
                    return;
                }
            };
            let entry = Entry::new(connection, begun, Rc::downgrade(&slot), None);
            slot.connections.borrow_mut().push(Rc::clone(&entry));
            slot.serve();
            let Some(inner) = pool.upgrade() else { return };
            inner.opened.set(inner.opened.get() + 1);
            inner.took.observe(took);
            // The peer may allow fewer streams than we thought.
            inner.dial_for_waiting(&key, &slot);
            drop(inner);
            tracing::debug!(endpoint = %key.endpoint, peer = %entry.connection.peer(), "connection opened");
            let served = Rc::downgrade(&slot);
            entry
                .run(&settings, &|| {
                    if let Some(slot) = served.upgrade() {
                        slot.serve();
                    }
                })
                .await;
            tracing::debug!(endpoint = %key.endpoint, why = ?entry.connection.lost(), "connection ended");
            slot.connections.borrow_mut().retain(|c| !Rc::ptr_eq(c, &entry));
            drop(permit);
            if let Some(inner) = pool.upgrade() {
                inner.closed.notify_one();
                inner.dial_for_waiting(&key, &slot);
            }
        });
        true
    }
}
