//! The pool's invariants, each with a test named after it, on connections of which nothing is real but what the pool can see.

use std::{cell::RefCell, future::poll_fn, time::Duration};

use tokio::task::{LocalSet, spawn_local, yield_now};

use super::*;
use crate::{
    model::flow::{FarEnd, Identity, PeerAddr},
    sinks::dial::Dialer,
    sinks::upstream::settings::ConnectSettings,
};

/// Longer than anything here takes, in the time of a paused clock.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection that takes so many streams, and ends when it is told to.
struct Fake {
    peer: FarEnd,
    max_streams: Rc<Cell<usize>>,
    draining: Cell<bool>,
    closed: Signal,
}

impl Fake {
    fn new(key: &Key, max_streams: &Rc<Cell<usize>>) -> Self {
        let Target::Addr(addr) = key.endpoint else { panic!("an address") };
        Self {
            peer: FarEnd::Socket(PeerAddr(addr)),
            max_streams: Rc::clone(max_streams),
            draining: Cell::default(),
            closed: Signal::default(),
        }
    }
}

impl Connection for Fake {
    fn peer(&self) -> &FarEnd {
        &self.peer
    }

    fn identity(&self) -> Option<&Identity> {
        None
    }

    fn max_streams(&self) -> usize {
        if self.draining.get() { 0 } else { self.max_streams.get() }
    }

    fn is_barred(&self) -> bool {
        !self.draining.get() && self.max_streams.get() == 0
    }

    fn is_overdue(&self) -> bool {
        false
    }

    async fn open(&self, _: OpenRequest<'_, '_>, _: StreamPermits) -> Result<Stream, OpenError> {
        Err(OpenError::Dropped("nothing is behind it".to_owned()))
    }

    async fn ping(&self) -> Result<(), String> {
        Ok(())
    }

    fn drain(&self) {
        self.draining.set(true);
    }

    fn close(&self) {
        self.draining.set(true);
        self.closed.set();
    }

    async fn retired(&self) {
        std::future::pending::<()>().await;
    }

    async fn run(&self, _: &dyn Fn()) {
        self.closed.taken().await;
    }

    fn lost(&self) -> Option<String> {
        None
    }
}

/// Dials when it is let, and counts.
#[derive(Clone, Default)]
struct FakeDialer {
    /// Streams that each connection takes.
    max_streams: Rc<Cell<usize>>,
    /// Endpoints whose dials take for ever.
    stuck: Rc<RefCell<Vec<Target>>>,
    dials: Rc<Cell<usize>>,
    /// Dials at once, and the most that there were.
    now: Rc<Cell<(usize, usize)>>,
    is_shared: bool,
}

impl FakeDialer {
    fn new(max_streams: usize) -> Self {
        Self { max_streams: Rc::new(Cell::new(max_streams)), is_shared: true, ..Self::default() }
    }
}

impl Connect for FakeDialer {
    type Connection = Fake;

    fn is_shared(&self) -> bool {
        self.is_shared
    }

    async fn connect(&self, key: &Key) -> Result<Fake, ConnectError> {
        let (now, most) = self.now.get();
        self.dials.set(self.dials.get() + 1);
        self.now.set((now + 1, most.max(now + 1)));
        if self.stuck.borrow().contains(&key.endpoint) {
            std::future::pending::<()>().await;
        }
        yield_now().await;
        self.now.set((self.now.get().0 - 1, self.now.get().1));
        Ok(Fake::new(key, &self.max_streams))
    }
}

fn pool(dialer: &FakeDialer, max_streams: usize, max_connections: usize) -> Rc<Pool<FakeDialer>> {
    Rc::new(Pool::new(
        dialer.clone(),
        PoolSettings {
            max_streams,
            max_connections,
            connect: ConnectSettings { timeout: PATIENCE, dialer: Dialer::default() },
            idle_timeout: PATIENCE,
            keepalive_interval: PATIENCE,
            keepalive_timeout: PATIENCE,
            congestion: Default::default(),
        },
    ))
}

fn key(port: u16) -> Key {
    Key { endpoint: Target::Addr(([127, 0, 0, 1], port).into()), tls: None, via: None }
}

fn run(test: impl Future<Output = ()>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, async { timeout(PATIENCE * 5, test).await.expect("in time") });
}

/// So many flows at once that want a connection.
async fn flows(
    pool: &Rc<Pool<FakeDialer>>,
    key: &Key,
    n: usize,
) -> Vec<Result<Checkout<Fake>, ConnectError>> {
    let each = (0..n).map(|_| {
        let (pool, key) = (Rc::clone(pool), key.clone());
        spawn_local(async move { pool.checkout(&key).await })
    });
    let mut all = Vec::new();
    for flow in each.collect::<Vec<_>>() {
        all.push(flow.await.unwrap());
    }
    all
}

#[test]
fn a_connection_is_shared_only_by_flows_whose_whole_key_is_equal() {
    run(async {
        let dialer = FakeDialer::new(10);
        let pool = pool(&dialer, 10, 100);
        let (one, again) = (pool.checkout(&key(1)).await.unwrap(), pool.checkout(&key(1)).await.unwrap());
        let other = pool.checkout(&key(2)).await.unwrap();
        assert!(Rc::ptr_eq(&one.entry, &again.entry) && !Rc::ptr_eq(&one.entry, &other.entry));
        assert_eq!((dialer.dials.get(), pool.connections()), (2, 2));
    });
}

#[test]
fn never_more_dials_are_in_flight_than_the_waiting_flows_need() {
    run(async {
        let dialer = FakeDialer::new(10);
        let pool = pool(&dialer, 10, 100);
        let all = flows(&pool, &key(1), 9).await;
        assert_eq!((all.len(), dialer.dials.get()), (9, 1));
        drop(all);
        // A peer that takes less than we thought: what is missing is dialled as it shows.
        let dialer = FakeDialer::new(3);
        let pool = self::pool(&dialer, 10, 100);
        let all = flows(&pool, &key(1), 35).await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!((dialer.dials.get(), dialer.now.get().1), (12, DIALING_MAX));
    });
}

#[test]
fn a_connection_never_carries_more_streams_than_it_takes() {
    run(async {
        let dialer = FakeDialer::new(3);
        let pool = pool(&dialer, 10, 100);
        let all = flows(&pool, &key(1), 9).await;
        let most = all.iter().map(|c| c.as_ref().unwrap().entry.active.get()).max();
        assert_eq!((most, pool.connections()), (Some(3), 3));
    });
}

#[test]
fn a_connection_that_drains_takes_no_new_streams_and_its_old_ones_go_on() {
    run(async {
        let dialer = FakeDialer::new(10);
        let pool = pool(&dialer, 10, 100);
        let old = pool.checkout(&key(1)).await.unwrap();
        old.connection().drain();
        let new = pool.checkout(&key(1)).await.unwrap();
        assert!(!Rc::ptr_eq(&old.entry, &new.entry));
        // Until its last stream has ended, and then as long as any that is idle.
        tokio::time::sleep(PATIENCE / 2).await;
        assert_eq!((pool.connections(), old.entry.active.get()), (2, 1));
        drop(old);
        tokio::time::sleep(PATIENCE * 2).await;
        assert_eq!((pool.connections(), new.entry.active.get()), (1, 1));
    });
}

#[test]
fn there_are_never_more_connections_and_dials_than_the_limit() {
    run(async {
        let dialer = FakeDialer::new(2);
        let pool = pool(&dialer, 100, 2);
        let mut all = flows(&pool, &key(1), 5).await;
        assert!(matches!(all.pop(), Some(Err(ConnectError::Limit { most: 2 }))));
        assert!(all.iter().all(Result::is_ok) && dialer.dials.get() == 2);
        drop(all);
        // So where each flow has a connection of its own.
        let dialer = FakeDialer { is_shared: false, ..FakeDialer::new(1) };
        let pool = self::pool(&dialer, 1, 2);
        let mut all = flows(&pool, &key(1), 3).await;
        assert!(matches!(all.pop(), Some(Err(ConnectError::Limit { most: 2 }))));
        assert!(all.pop().is_some_and(|given_back| given_back.is_ok()));
        assert!(pool.checkout(&key(1)).await.is_ok());
        assert_eq!((pool.opened(), pool.connections()), (3, 0));
    });
}

#[test]
fn a_slow_dial_of_one_key_holds_up_no_other() {
    run(async {
        let dialer = FakeDialer::new(10);
        dialer.stuck.borrow_mut().push(key(1).endpoint);
        let pool = pool(&dialer, 10, 100);
        let stuck = {
            let pool = Rc::clone(&pool);
            spawn_local(async move { pool.checkout(&key(1)).await.map(drop) })
        };
        while dialer.dials.get() == 0 {
            yield_now().await;
        }
        let started = Instant::now();
        assert!(pool.checkout(&key(2)).await.is_ok());
        assert_eq!(started.elapsed(), Duration::ZERO);
        assert!(matches!(stuck.await.unwrap(), Err(ConnectError::Waited { barred: false, .. })));
    });
}

#[test]
fn flows_that_wait_are_served_in_the_order_in_which_they_came() {
    run(async {
        let dialer = FakeDialer::new(1);
        dialer.stuck.borrow_mut().push(key(1).endpoint);
        let pool = pool(&dialer, 1, 100);
        let served = Rc::new(RefCell::new(Vec::new()));
        for n in 0..3 {
            let (pool, served) = (Rc::clone(&pool), Rc::clone(&served));
            spawn_local(async move {
                let checkout = pool.checkout(&key(1)).await.unwrap();
                served.borrow_mut().push(n);
                drop(checkout);
            });
            yield_now().await;
        }
        assert!(served.borrow().is_empty());
        // A connection that takes one stream at a time.
        let slot = pool.0.slot(&key(1));
        let fake = Fake::new(&key(1), &dialer.max_streams);
        let entry = Entry::new(fake, std::time::Instant::now(), Rc::downgrade(&slot), None);
        slot.connections.borrow_mut().push(entry);
        slot.serve();
        while served.borrow().len() < 3 {
            yield_now().await;
        }
        assert_eq!(*served.borrow(), [0, 1, 2]);
    });
}

#[test]
fn a_flow_that_no_longer_waits_takes_nobodys_permit() {
    run(async {
        let dialer = FakeDialer::new(1);
        dialer.stuck.borrow_mut().push(key(1).endpoint);
        let pool = pool(&dialer, 1, 100);
        let key = key(1);
        for _ in 0..3 {
            let mut all: Vec<_> = (0..WAITING_MAX).map(|_| Box::pin(pool.checkout(&key))).collect();
            poll_fn(|cx| {
                assert!(all.iter_mut().all(|flow| flow.as_mut().poll(cx).is_pending()));
                std::task::Poll::Ready(())
            })
            .await;
            let over = pool.checkout(&key).await.map(drop).unwrap_err();
            assert!(matches!(over, ConnectError::Overflow { .. }), "{over}");
        }
        assert!(pool.0.slot(&key).waiting.borrow().is_empty());
    });
}

#[test]
fn an_idle_connection_is_closed_and_one_whose_endpoint_is_gone_at_once() {
    run(async {
        let dialer = FakeDialer::new(10);
        let pool = pool(&dialer, 10, 100);
        drop(pool.checkout(&key(1)).await.unwrap());
        tokio::time::sleep(PATIENCE / 2).await;
        assert_eq!(pool.connections(), 1);
        pool.forget(&key(1).endpoint);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(pool.connections(), 0);
        drop(pool.checkout(&key(2)).await.unwrap());
        tokio::time::sleep(PATIENCE * 2).await;
        assert_eq!(pool.connections(), 0);
    });
}
