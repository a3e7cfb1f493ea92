//! HTTP/2 connections and their pool, against a real peer on loopback: TLS, HTTP/2, and a script.

use std::{
    fs,
    future::{Future, poll_fn},
    net::SocketAddr,
    sync::Arc,
    task::Poll,
};

use bytes::Bytes;
use http::{Method, Request, Response};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{LocalSet, spawn_local},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::{
    cli::pki::{Ca, IssueRequest, Validity},
    config::Protocol,
    identity::store::TlsStore,
    model::{
        flow::Target,
        trust::{ClientCheck, IdentityFiles, ServerCheck},
    },
    process::{drain, memory::Memory},
    relay::{Broken, Leg as _},
    sinks::dial::Dialer,
    sinks::upstream::{
        ConnectError,
        connect::{Key, TlsKey},
        connector::{Checkout, HttpDialer},
        permit::Count,
        pool::Pool,
        settings::{ConnectSettings, PoolSettings},
    },
    sources::listener::{
        accept::{self, Link, ServeError},
        h2 as listener,
    },
    transport::record::Pace,
};

const PATIENCE: Duration = Duration::from_secs(10);

fn settings(max_streams: usize) -> PoolSettings {
    PoolSettings {
        max_streams,
        max_connections: usize::MAX,
        idle_timeout: PATIENCE,
        keepalive_interval: PATIENCE,
        keepalive_timeout: PATIENCE,
        congestion: Default::default(),
        connect: ConnectSettings { timeout: PATIENCE, dialer: Dialer::default() },
    }
}

fn identity() -> Arc<TlsStore> {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::generate(Validity::days(1)).unwrap();
    let mut request = IssueRequest::new("spiffe://t.test/both".parse().unwrap());
    request.ip = vec!["127.0.0.1".parse().unwrap()];
    let issued = ca.issue(&request).unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        path
    };
    let files = IdentityFiles {
        cert: file("cert.pem", &issued.cert_pem),
        key: file("key.pem", &issued.key_pem),
        ca: file("ca.pem", ca.cert_pem()),
        insecure_key_permissions: false,
    };
    TlsStore::load(files).unwrap()
}

/// What the peer does with a connection once it has a stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Script {
    /// Answers 200 and keeps the stream open.
    Serve,
    /// The same, and says GOAWAY when told to.
    GoAway,
    /// The same, and answers nothing any more when told so.
    Mute,
    /// Never finishes the TLS handshake.
    Silent,
}

struct Peer {
    addr: SocketAddr,
    accepted: Rc<Cell<usize>>,
    turn: Rc<Notify>,
    held: Rc<RefCell<Vec<h2::SendStream<Bytes>>>>,
}

impl Peer {
    async fn start(tls: &Arc<TlsStore>, script: Script, max_streams: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = Self {
            addr: listener.local_addr().unwrap(),
            accepted: Rc::default(),
            turn: Rc::default(),
            held: Rc::default(),
        };
        let acceptor =
            TlsAcceptor::from(tls.server_config(&ClientCheck::default(), &[Protocol::H2]).unwrap());
        let (accepted, turn, held) =
            (Rc::clone(&peer.accepted), Rc::clone(&peer.turn), Rc::clone(&peer.held));
        spawn_local(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                accepted.set(accepted.get() + 1);
                let (acceptor, turn, held) = (acceptor.clone(), Rc::clone(&turn), Rc::clone(&held));
                spawn_local(async move {
                    if script == Script::Silent {
                        let _keep = stream;
                        return pending().await;
                    }
                    let tls = acceptor.accept(stream).await.unwrap();
                    let mut h2 = h2::server::Builder::new()
                        .max_concurrent_streams(max_streams)
                        .handshake::<_, Bytes>(tls)
                        .await
                        .unwrap();
                    let mut told = false;
                    loop {
                        tokio::select! {
                            request = h2.accept() => match request {
                                Some(Ok((_, mut respond))) => {
                                    held.borrow_mut().push(respond.send_response(Response::new(()), false).unwrap());
                                }
                                _ => return,
                            },
                            () = turn.notified(), if !told => {
                                told = true;
                                match script {
                                    Script::GoAway => h2.graceful_shutdown(),
                                    _ => pending().await,
                                }
                            }
                        }
                    }
                });
            }
        });
        peer
    }

    fn key(&self, tls: &Arc<TlsStore>) -> Key {
        let check = ServerCheck::default();
        let endpoint = Target::Addr(self.addr);
        Key { tls: Some(tls_key(tls, &check, &endpoint)), endpoint, via: None }
    }
}

fn tls_key(tls: &Arc<TlsStore>, check: &ServerCheck, endpoint: &Target) -> TlsKey {
    let ours = tls.current().unwrap();
    let (side, server_name) = (ours.client_side(check, Protocol::H2), check.server_name(endpoint));
    TlsKey { side, server_name, check: check.clone(), store: Arc::clone(tls), ours }
}

/// An empty pool.
fn pool(settings: PoolSettings) -> TestPool {
    let (abandoned, _) = mpsc::unbounded_channel();
    Pool::new(HttpDialer::new(Protocol::H2, settings.clone(), abandoned, None), settings)
}

type TestPool = Pool<HttpDialer>;

/// Opens a stream.
async fn try_open(checkout: Checkout) -> Result<Stream, OpenError> {
    let head = Request::builder().method(Method::CONNECT).uri("a:1").body(()).unwrap();
    let request = OpenRequest { head, timeout: PATIENCE, ahead: None, may_retry: false };
    checkout.open(request, Count::default().take(1).unwrap()).await
}

async fn open(checkout: Checkout) -> Stream {
    try_open(checkout).await.unwrap_or_else(|e| panic!("{e:?}"))
}

/// What comes next on a stream.
async fn recv(stream: &mut Stream) -> Result<Option<Bytes>, Broken> {
    poll_fn(|cx| stream.poll_recv(cx)).await
}

/// A stream on another connection than the one that has been told to go away.
async fn open_on_the_next(pool: &TestPool, key: &Key, peer: &Peer) -> Stream {
    loop {
        // Until the GOAWAY has come, it may still be the old connection; a stream then fails and says that it was not
        // processed, or is there.
        match try_open(pool.checkout(key).await.unwrap()).await {
            Ok(stream) if peer.accepted.get() > 1 => return stream,
            Ok(_) => tokio::task::yield_now().await,
            Err(OpenError::NotProcessed(_)) => {}
            Err(e) => panic!("{e:?}"),
        }
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async { timeout(PATIENCE * 2, test).await.expect("in time") });
}

#[test]
fn a_connection_is_shared_only_by_flows_whose_whole_key_is_equal() {
    run(async {
        let (tls, other) = (identity(), identity());
        let peer = Peer::start(&tls, Script::Serve, 100).await;
        let pool = pool(settings(100));
        let key = peer.key(&tls);
        let first = pool.checkout(&key).await.unwrap();
        let _second = pool.checkout(&key.clone()).await.unwrap();
        assert_eq!(peer.accepted.get(), 1);
        // Another check, another name, another identity: each a connection of its own, or none.
        let san = ServerCheck { name: None, san: vec!["spiffe://t.test/both".parse().unwrap()] };
        let checked = Key { tls: Some(tls_key(&tls, &san, &key.endpoint)), ..key.clone() };
        let _third = pool.checkout(&checked).await.unwrap();
        assert_eq!(peer.accepted.get(), 2);
        let foreign = Key { tls: Some(tls_key(&other, &ServerCheck::default(), &key.endpoint)), ..key };
        let refused = pool.checkout(&foreign).await.map(drop).unwrap_err();
        assert!(matches!(refused, ConnectError::Tls { .. }), "{refused}");
        assert_eq!(peer.accepted.get(), 3);
        drop(first);
    });
}

#[test]
fn never_more_dials_are_in_flight_than_the_waiting_flows_need() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::Serve, 100).await;
        let pool = Rc::new(pool(settings(100)));
        let key = peer.key(&tls);
        let flows: Vec<_> = (0..90)
            .map(|_| {
                let (pool, key) = (Rc::clone(&pool), key.clone());
                spawn_local(async move { pool.checkout(&key).await.unwrap() })
            })
            .collect();
        let mut checkouts = Vec::new();
        for flow in flows {
            checkouts.push(flow.await.unwrap());
        }
        assert_eq!((peer.accepted.get(), pool.opened()), (1, 1));
        // The last tenth opens the next connection before it is needed, and only one.
        let _ninety_first = pool.checkout(&key).await.unwrap();
        let _ninety_second = pool.checkout(&key).await.unwrap();
        while pool.opened() < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(peer.accepted.get(), 2);
    });
}

#[test]
fn a_connection_never_carries_more_streams_than_its_limit_and_the_peers() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::Serve, 3).await;
        let pool = Rc::new(pool(settings(100)));
        let key = peer.key(&tls);
        let mut open_streams = Vec::new();
        for _ in 0..9 {
            open_streams.push(open(pool.checkout(&key).await.unwrap()).await);
        }
        // Three each: the peer would refuse or hold up a fourth.
        assert_eq!(peer.accepted.get(), 3);
        assert_eq!(peer.held.borrow().len(), 9);
    });
}

#[test]
fn a_connection_that_got_goaway_takes_no_new_streams_and_its_old_ones_go_on() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::GoAway, 100).await;
        let pool = pool(settings(100));
        let key = peer.key(&tls);
        let mut old = open(pool.checkout(&key).await.unwrap()).await;
        peer.turn.notify_one();
        let _fresh = open_on_the_next(&pool, &key, &peer).await;
        assert_eq!(peer.accepted.get(), 2);
        // The old stream still carries bytes.
        let mut held = peer.held.borrow_mut().remove(0);
        held.send_data(Bytes::from_static(b"still here"), true).unwrap();
        assert_eq!(recv(&mut old).await.unwrap().unwrap(), "still here");
    });
}

/// A connection that takes no new streams is still the pool's: closing it waits for its old ones.
#[test]
fn a_connection_that_got_goaway_is_waited_for_when_the_pool_closes() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::GoAway, 100).await;
        let pool = Rc::new(pool(settings(100)));
        let key = peer.key(&tls);
        let mut old = open(pool.checkout(&key).await.unwrap()).await;
        peer.turn.notify_one();
        drop(open_on_the_next(&pool, &key, &peer).await);
        let closing = {
            let pool = Rc::clone(&pool);
            spawn_local(async move { pool.close().await })
        };
        let mut held = peer.held.borrow_mut().remove(0);
        held.send_data(Bytes::from_static(b"last words"), true).unwrap();
        assert_eq!(recv(&mut old).await.unwrap().unwrap(), "last words");
        assert!(!closing.is_finished() && pool.connections() >= 1);
        drop(old);
        closing.await.unwrap();
        assert_eq!(pool.connections(), 0);
    });
}

/// Flows that have left do not count among those that wait.
#[test]
fn flows_that_no_longer_wait_take_nobodys_permit() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::Silent, 100).await;
        let pool = Rc::new(pool(settings(100)));
        let key = peer.key(&tls);
        for _ in 0..3 {
            let mut flows: Vec<_> = (0..4096).map(|_| Box::pin(pool.checkout(&key))).collect();
            poll_fn(|cx| {
                assert!(flows.iter_mut().all(|flow| flow.as_mut().poll(cx).is_pending()));
                Poll::Ready(())
            })
            .await;
            let over = pool.checkout(&key).await.map(drop).unwrap_err();
            assert!(matches!(over, ConnectError::Overflow { .. }), "{over}");
        }
    });
}

/// A peer that allows no streams is connected to once, and those who wait are told why.
#[test]
fn a_peer_that_allows_no_streams_is_not_dialled_again_and_again() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::Serve, 0).await;
        let mut short = settings(100);
        short.connect.timeout = Duration::from_millis(500);
        let pool = pool(short);
        for _ in 0..2 {
            let none = pool.checkout(&peer.key(&tls)).await.map(drop).unwrap_err();
            assert!(matches!(none, ConnectError::Waited { barred: true, .. }), "{none}");
        }
        assert_eq!(peer.accepted.get(), 1);
    });
}

#[test]
fn a_slow_dial_of_one_key_holds_up_no_other() {
    run(async {
        let tls = identity();
        let silent = Peer::start(&tls, Script::Silent, 100).await;
        let well = Peer::start(&tls, Script::Serve, 100).await;
        let pool = Rc::new(pool(settings(100)));
        let stuck = {
            let (pool, key) = (Rc::clone(&pool), silent.key(&tls));
            spawn_local(async move { pool.checkout(&key).await.map(drop) })
        };
        while silent.accepted.get() == 0 {
            tokio::task::yield_now().await;
        }
        let _stream = open(pool.checkout(&well.key(&tls)).await.unwrap()).await;
        assert!(!stuck.is_finished());
    });
}

#[test]
fn an_idle_connection_is_closed_and_a_new_one_opened_when_needed() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::Serve, 100).await;
        let pool = pool(PoolSettings { idle_timeout: Duration::from_millis(20), ..settings(100) });
        let key = peer.key(&tls);
        drop(pool.checkout(&key).await.unwrap());
        while pool.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let _again = pool.checkout(&key).await.unwrap();
        assert_eq!(peer.accepted.get(), 2);
    });
}

#[test]
fn there_are_never_more_connections_and_dials_than_the_limit() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::Serve, 2).await;
        let pool = Rc::new(pool(PoolSettings { max_connections: 2, ..settings(100) }));
        let key = peer.key(&tls);
        assert!(!pool.has_room(&key));
        // Five at once, where the peer turns out to take two on each connection.
        let flows: Vec<_> = (0..5)
            .map(|_| {
                let (pool, key) = (Rc::clone(&pool), key.clone());
                spawn_local(async move { pool.checkout(&key).await })
            })
            .collect();
        let mut streams = Vec::new();
        let mut refused = 0;
        for flow in flows {
            match flow.await.unwrap() {
                Ok(checkout) => streams.push(open(checkout).await),
                Err(ConnectError::Limit { most: 2 }) => refused += 1,
                Err(e) => panic!("{e}"),
            }
        }
        assert_eq!((streams.len(), refused, peer.accepted.get()), (4, 1, 2));
        assert!(!pool.has_room(&key));
        assert!(matches!(pool.checkout(&key).await, Err(ConnectError::Limit { most: 2 })));
        // A permit that is given back is there again.
        streams.pop();
        assert!(pool.has_room(&key));
        let _again = pool.checkout(&key).await.unwrap();
        assert_eq!(peer.accepted.get(), 2);
    });
}

#[test]
fn a_connection_to_an_endpoint_that_is_gone_ends_with_its_last_stream() {
    run(async {
        let tls = identity();
        let (gone, stays) =
            (Peer::start(&tls, Script::Serve, 100).await, Peer::start(&tls, Script::Serve, 100).await);
        let pool = pool(settings(100));
        let mut stream = open(pool.checkout(&gone.key(&tls)).await.unwrap()).await;
        drop(pool.checkout(&stays.key(&tls)).await.unwrap());
        pool.forget(&gone.key(&tls).endpoint);
        assert!(!pool.has_room(&gone.key(&tls)) && pool.has_room(&stays.key(&tls)));
        // Its stream goes on.
        let mut held = gone.held.borrow_mut().remove(0);
        held.send_data(Bytes::from_static(b"still here"), true).unwrap();
        assert_eq!(recv(&mut stream).await.unwrap().unwrap(), "still here");
        assert_eq!(pool.connections(), 2);
        drop(stream);
        while pool.connections() > 1 {
            tokio::task::yield_now().await;
        }
        assert!(pool.has_room(&stays.key(&tls)));
    });
}

#[test]
fn a_peer_is_asked_whether_it_is_alive_and_one_that_does_not_answer_is_found_out() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::Mute, 100).await;
        let pool = pool(PoolSettings { keepalive_timeout: Duration::from_millis(300), ..settings(100) });
        let checkout = pool.checkout(&peer.key(&tls)).await.unwrap();
        let connection = checkout.connection();
        let (one, other) = tokio::join!(connection.ping(), connection.ping());
        assert_eq!((one, other), (Ok(()), Ok(())));
        peer.turn.notify_one();
        let silent = loop {
            // It may be told after this one.
            if let Err(why) = connection.ping().await {
                break why;
            }
            tokio::task::yield_now().await;
        };
        assert!(silent.contains("no answer to PING"), "{silent}");
    });
}

#[test]
fn a_peer_that_answers_no_ping_is_given_up_and_its_streams_are_reset() {
    run(async {
        let tls = identity();
        let peer = Peer::start(&tls, Script::Mute, 100).await;
        let pool = pool(PoolSettings {
            keepalive_interval: Duration::from_millis(50),
            keepalive_timeout: Duration::from_millis(200),
            ..settings(100)
        });
        let key = peer.key(&tls);
        let checkout = pool.checkout(&key).await.unwrap();
        let mut stream = open(pool.checkout(&key).await.unwrap()).await;
        peer.turn.notify_one();
        assert!(recv(&mut stream).await.is_err());
        let lost = checkout.connection().lost();
        assert!(lost.as_ref().is_some_and(|why| why.contains("no answer to PING")), "{lost:?}");
        // The next one is on a new connection.
        let _again = pool.checkout(&key).await.unwrap();
        assert_eq!(peer.accepted.get(), 2);
    });
}

#[test]
fn a_listener_gives_up_a_peer_that_answers_no_ping() {
    run(async {
        let tls = identity();
        let settings = accept::Settings {
            alt_svc: None,
            proxy_protocol: false,
            tls: Some(accept::Tls { store: Arc::clone(&tls), check: ClientCheck::default() }),
            protocols: vec![Protocol::H2],
            handshake_timeout: PATIENCE,
            max_streams: 1,
            keepalive_interval: Duration::from_millis(50),
            congestion: Default::default(),
            keepalive_timeout: Duration::from_millis(200),
            idle_timeout: PATIENCE,
        };
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = socket.local_addr().unwrap();
        let check = ServerCheck::default();
        let connector = TlsConnector::from(tls.client_config(&check, Protocol::H2).unwrap());
        let client = spawn_local(async move {
            let stream = TcpStream::connect(addr).await.unwrap();
            let name = check.server_name(&Target::Addr(addr));
            let tls = connector.connect(name, stream).await.unwrap();
            // Its preface is sent, and then it is never polled again.
            let _mute = h2::client::handshake(tls).await.unwrap();
            pending::<()>().await;
        });
        let (stream, peer) = socket.accept().await.unwrap();
        let accepted = accept::handshake(&settings, stream, peer, &Pace::default()).await.unwrap();
        let Link::H2(tunnel) = accepted.link else { panic!("it spoke HTTP/2 over TLS") };
        let (_trigger, watch) = drain::channel();
        let served =
            listener::serve(&settings, *tunnel, &Memory::of_this_worker().peer(), watch, None, |_| async {})
                .await;
        assert!(matches!(served, Err(ServeError::KeepaliveTimeout(_))), "{served:?}");
        client.abort();
    });
}
