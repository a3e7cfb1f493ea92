//! The HTTP/2 connections of one worker.
//!
//! Enters: a key. Leaves: a place for one stream on a connection. Invariants, each with a test named
//! after it in `tests.rs`:
//! - a connection is shared only by flows whose whole key is equal;
//! - for one key, never more dials are in flight than the waiting flows need;
//! - a connection never carries more streams than its limit and the peer's;
//! - a connection that got GOAWAY takes no new streams, and its old ones go on;
//! - there are never more connections and dials than the limit;
//! - no lock is held across a handshake: a slow dial of one key holds up no other.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    rc::{Rc, Weak},
    time::Duration,
};

use h2::client::SendRequest;
use tokio::{
    sync::{Notify, oneshot},
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{
    connect::{self, ConnectError, Key},
    h2::{Conn, open},
    limit::{Count, Taken},
    pick,
};
use crate::{
    model::flow::{FarEnd, Identity, Target},
    relay::Payload,
    transport::window::Share,
};

/// Flows that wait for a connection to the same peer; more are refused at once.
const WAITING_MAX: usize = 4096;
/// Dials in flight to the same peer.
const DIALING_MAX: usize = 4;
/// A flow waits for a place as long as a connection may take to be made, and once more for others that come before it.
const WAITS_FOR: u32 = 2;

/// How connections of one pool are made and kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Streams on one connection; the peer's limit counts too.
    pub max_streams: usize,
    /// Connections, those being made too.
    pub max_connections: usize,
    /// How they are made.
    pub connect: connect::Settings,
    /// A connection without streams is closed after this.
    pub idle_timeout: Duration,
    /// Between two PINGs.
    pub keepalive_interval: Duration,
    /// A PING unanswered for this long means that the connection is lost.
    pub keepalive_timeout: Duration,
}

/// The pool of one upstream on one worker. Dropped, it ends its connections.
pub struct Pool(Rc<Inner>);

struct Inner {
    settings: Settings,
    slots: RefCell<HashMap<Key, Rc<Slot>>>,
    /// Dials and connections. They hold the pool weakly.
    tasks: RefCell<JoinSet<()>>,
    opened: Cell<u64>,
    /// Connections, and dials.
    open: Count,
    /// A connection has ended.
    closed: Notify,
}

/// What tells a flow that waits.
type Tell = oneshot::Sender<Result<Lease, ConnectError>>;

/// The connections of one key.
#[derive(Default)]
struct Slot {
    connections: RefCell<Vec<Rc<Conn>>>,
    dialing: Cell<usize>,
    /// In the order in which they came.
    waiting: RefCell<VecDeque<(u64, Tell)>>,
    /// The number of the next one that waits.
    next: Cell<u64>,
    /// Places are being given away, and there is one more.
    serving: Cell<bool>,
    again: Cell<bool>,
}

/// A flow that waits; no longer when it is dropped.
struct Waiting<'s> {
    slot: &'s Slot,
    number: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waiting = self.slot.waiting.borrow_mut();
        if let Ok(at) = waiting.binary_search_by_key(&self.number, |(number, _)| *number) {
            waiting.remove(at);
        }
    }
}

/// A place for one stream; given back when dropped.
pub struct Lease {
    conn: Rc<Conn>,
    slot: Weak<Slot>,
}

impl Lease {
    fn take(conn: &Rc<Conn>, slot: &Rc<Slot>) -> Self {
        conn.active.set(conn.active.get() + 1);
        Self { conn: Rc::clone(conn), slot: Rc::downgrade(slot) }
    }

    /// A handle to open the stream with; `None` when the connection has just been closed for idleness.
    pub fn sender(&self) -> Option<SendRequest<Payload>> {
        self.conn.send.borrow().clone()
    }

    /// The far end of the connection.
    pub fn peer(&self) -> &FarEnd {
        &self.conn.peer
    }

    /// What the stream reports to.
    pub fn share(&self) -> Share {
        self.conn.traffic.share()
    }

    /// Who the far end has proved to be.
    pub fn identity(&self) -> Option<Identity> {
        self.conn.identity.clone()
    }

    /// The peer has answered something.
    pub fn heard(&self) {
        self.conn.heard();
    }

    /// A request is about to be sent: has the peer asked whether it is there, if it was not heard of just now.
    pub fn expect_answer(&self) {
        self.conn.expect_answer();
    }

    /// Ready when the peer is overdue with its answer to a PING.
    pub async fn overdue(&self) {
        self.conn.overdue().await;
    }

    /// The connection takes no new streams: it got GOAWAY, or failed.
    pub fn retire(&self) {
        self.conn.retired.set(true);
    }

    /// Ready when the peer has answered a PING, sent now. The caller bounds the time.
    pub async fn ping(&self) -> Result<(), String> {
        let (tell, told) = oneshot::channel();
        {
            let mut askers = self.conn.askers.borrow_mut();
            // Those who no longer wait.
            askers.retain(|asker| !asker.is_closed());
            askers.push(tell);
        }
        self.conn.idle.notify_one();
        told.await.map_err(|_| self.lost().unwrap_or_else(|| "the connection has ended".to_owned()))
    }

    /// Why the connection was lost, if it was.
    pub fn lost(&self) -> Option<String> {
        self.conn.lost.borrow().clone()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.conn.active.set(self.conn.active.get() - 1);
        if self.conn.active.get() == 0 {
            self.conn.idle_since.set(Instant::now());
            self.conn.idle.notify_one();
        }
        if let Some(slot) = self.slot.upgrade() {
            slot.serve();
        }
    }
}

impl Slot {
    /// A place on a connection that has one.
    fn lease(self: &Rc<Self>) -> Option<Lease> {
        let connections = self.connections.borrow();
        let room = |c: &Rc<Conn>| if c.is_overdue() { 0 } else { c.free() };
        let found =
            pick::with_room(&connections, room).or_else(|| pick::with_room(&connections, |c| c.free()));
        found.map(|c| Lease::take(c, self))
    }

    /// Whether a connection is up that takes no streams at all: its peer allows none.
    fn is_barred(&self) -> bool {
        self.connections.borrow().iter().any(|c| c.is_barred())
    }

    /// Whether it is time to open the next connection.
    fn is_nearly_full(&self) -> bool {
        pick::is_nearly_full(&self.connections.borrow(), |c| c.free(), |c| c.limit())
    }

    /// Gives free places to those who wait, in order.
    fn serve(self: &Rc<Self>) {
        // A flow that went away while it waited gives its place back, which comes here again.
        if self.serving.replace(true) {
            return self.again.set(true);
        }
        loop {
            self.again.set(false);
            while !self.waiting.borrow().is_empty()
                && let Some(lease) = self.lease()
            {
                let next = self.waiting.borrow_mut().pop_front();
                if let Some((_, next)) = next {
                    drop(next.send(Ok(lease)));
                }
            }
            if !self.again.get() {
                break;
            }
        }
        self.serving.set(false);
    }

    /// Everybody who waits gets the error.
    fn fail(&self, why: &ConnectError) {
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        for (_, next) in waiting {
            drop(next.send(Err(why.clone())));
        }
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(settings: Settings) -> Self {
        Self(Rc::new(Inner {
            settings,
            slots: RefCell::default(),
            tasks: RefCell::default(),
            opened: Cell::default(),
            open: Count::default(),
            closed: Notify::new(),
        }))
    }

    /// Connections opened since the start.
    pub fn opened(&self) -> u64 {
        self.0.opened.get()
    }

    /// Connections that are open, all keys together.
    pub fn connections(&self) -> usize {
        self.0.slots.borrow().values().map(|s| s.connections.borrow().len()).sum()
    }

    /// Closes every connection once what its streams have handed over is on the wire: the end of a stream is
    /// not the end of its bytes. Ready when all are closed; the caller bounds the time.
    pub async fn close(&self) {
        loop {
            for slot in self.0.slots.borrow().values() {
                for conn in slot.connections.borrow().iter() {
                    conn.retired.set(true);
                    conn.send.borrow_mut().take();
                }
            }
            if self.connections() == 0 {
                return;
            }
            self.0.closed.notified().await;
        }
    }

    /// Whether a connection has a place for one more stream.
    pub fn has_room(&self, key: &Key) -> bool {
        let slot = self.0.slots.borrow().get(key).cloned();
        slot.is_some_and(|s| pick::with_room(&s.connections.borrow(), |c| c.free()).is_some())
    }

    /// Closes the connections to an endpoint that is gone, each when its last stream has ended.
    pub fn forget(&self, endpoint: &Target) {
        for (_, slot) in self.0.slots.borrow().iter().filter(|(key, _)| key.endpoint == *endpoint) {
            for conn in slot.connections.borrow().iter() {
                conn.retired.set(true);
                conn.unwanted.set(true);
                conn.idle.notify_one();
            }
        }
    }

    /// A place for one stream: at once where a connection has one, else when a dial is done.
    pub async fn lease(&self, key: &Key) -> Result<Lease, ConnectError> {
        let inner = &self.0;
        let slot = inner.slot(key);
        if let Some(lease) = slot.lease() {
            if slot.dialing.get() == 0 && slot.is_nearly_full() {
                inner.dial(key, &slot);
            }
            return Ok(lease);
        }
        if slot.waiting.borrow().len() >= WAITING_MAX {
            let endpoint = key.endpoint.clone();
            return Err(ConnectError::Overflow { endpoint, most: WAITING_MAX });
        }
        let (tell, told) = oneshot::channel();
        let number = slot.next.replace(slot.next.get() + 1);
        slot.waiting.borrow_mut().push_back((number, tell));
        let _waiting = Waiting { slot: &slot, number };
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

    /// Whether what there is to an endpoint has not answered its PING for a while, and may be lost.
    pub fn is_overdue(&self, key: &Key) -> bool {
        let slot = self.0.slots.borrow().get(key).cloned();
        slot.is_some_and(|slot| {
            let connections = slot.connections.borrow();
            let mut up = connections.iter().filter(|c| c.limit() > 0).peekable();
            up.peek().is_some() && up.all(|c| c.is_overdue())
        })
    }
}

impl Inner {
    fn slot(&self, key: &Key) -> Rc<Slot> {
        let mut slots = self.slots.borrow_mut();
        if let Some(slot) = slots.get(key) {
            return Rc::clone(slot);
        }
        // A new key is rare: the time to forget those that nobody uses, such as those of old certificates.
        slots.retain(|_, s| s.dialing.get() > 0 || !s.connections.borrow().is_empty());
        Rc::clone(slots.entry(key.clone()).or_default())
    }

    /// As many dials as those who wait need. Where there may be none, nobody waits.
    fn dial_for_waiting(self: &Rc<Self>, key: &Key, slot: &Rc<Slot>) {
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
    fn dial(self: &Rc<Self>, key: &Key, slot: &Rc<Slot>) -> bool {
        let Some(open) = self.open.take(self.settings.max_connections) else { return false };
        slot.dialing.set(slot.dialing.get() + 1);
        let (key, slot, settings) = (key.clone(), Rc::clone(slot), self.settings.clone());
        let pool = Rc::downgrade(self);
        let mut tasks = self.tasks.borrow_mut();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(async move {
            let open: Taken = open;
            let dialled = self::open(&key, &settings).await;
            slot.dialing.set(slot.dialing.get() - 1);
            let opened = match dialled {
                Ok(opened) => opened,
                Err(why) => {
                    tracing::debug!(endpoint = %key.endpoint, "dial failed: {why}");
                    // Another dial may still succeed.
                    if slot.dialing.get() == 0 {
                        slot.fail(&why);
                    }
                    return;
                }
            };
            let conn = Rc::clone(opened.conn());
            slot.connections.borrow_mut().push(Rc::clone(&conn));
            slot.serve();
            let Some(inner) = pool.upgrade() else { return };
            inner.opened.set(inner.opened.get() + 1);
            // The peer may allow fewer streams than we thought.
            inner.dial_for_waiting(&key, &slot);
            drop(inner);
            let suite = opened.suite();
            tracing::debug!(endpoint = %key.endpoint, peer = %conn.peer, ?suite, "connection opened");
            let grown = Rc::downgrade(&slot);
            opened
                .drive(&settings, &|| {
                    if let Some(slot) = grown.upgrade() {
                        slot.serve();
                    }
                })
                .await;
            tracing::debug!(endpoint = %key.endpoint, why = ?conn.lost.borrow(), "connection ended");
            slot.connections.borrow_mut().retain(|c| !Rc::ptr_eq(c, &conn));
            drop(open);
            if let Some(inner) = pool.upgrade() {
                inner.closed.notify_one();
                inner.dial_for_waiting(&key, &slot);
            }
        });
        true
    }
}
