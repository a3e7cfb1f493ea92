//! Windows of real HTTP/2 connections on real sockets, with a delay between them where it needs one.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future, pending, poll_fn},
    pin::Pin,
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client, server};
use http::{Method, Request, Response};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::{LocalSet, spawn_local},
    time::{Instant, sleep_until, timeout},
};

use super::{Event, Pulse};
use crate::transport::window::{Share, Traffic, WINDOW_MAX, WINDOW_MIN, WINDOW_START, connection_window};

const PATIENCE: Duration = Duration::from_secs(60);
/// Streams of a listener, if nothing else is configured.
const STREAMS: u32 = 200;
/// Over 60 ms there and back 18 MB in a second fill the first window.
const DELAY: Duration = Duration::from_millis(30);

fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let test = async { timeout(PATIENCE, test).await.expect("it did not get on") };
    LocalSet::new().block_on(&runtime, test);
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (one, other) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let pair = (one.unwrap(), other.unwrap().0);
    pair.0.set_nodelay(true).unwrap();
    pair.1.set_nodelay(true).unwrap();
    pair
}

/// The same, with a delay both ways.
async fn far_apart() -> (TcpStream, TcpStream) {
    let ((one, mut left), (other, mut right)) = (pair().await, pair().await);
    spawn_local(async move {
        let (from_left, to_left) = left.split();
        let (from_right, to_right) = right.split();
        tokio::join!(delay(from_left, to_right), delay(from_right, to_left));
    });
    (one, other)
}

async fn delay(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let (queue, more) = (RefCell::new(VecDeque::new()), Notify::new());
    let takes = async {
        loop {
            let mut chunk = Vec::with_capacity(64 * 1024);
            if from.read_buf(&mut chunk).await.unwrap_or(0) == 0 {
                return;
            }
            queue.borrow_mut().push_back((Instant::now() + DELAY, chunk));
            more.notify_one();
        }
    };
    let gives = async {
        loop {
            let Some((at, chunk)) = queue.borrow_mut().pop_front() else {
                more.notified().await;
                continue;
            };
            sleep_until(at).await;
            if to.write_all(&chunk).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = takes => {}
        () = gives => {}
    }
}

/// Serves a connection as listeners do; each stream is handed over.
async fn serve(stream: TcpStream, handle: impl AsyncFn(RecvStream, Share) + Clone + 'static) {
    let mut connection = server::Builder::new()
        .initial_window_size(WINDOW_START)
        .initial_connection_window_size(connection_window(STREAMS))
        .max_concurrent_streams(STREAMS)
        .handshake::<_, Bytes>(stream)
        .await
        .unwrap();
    let traffic = Rc::new(Traffic::default());
    let mut pulse = Pulse::new(connection.ping_pong().unwrap(), PATIENCE, PATIENCE, &traffic);
    loop {
        let event = poll_fn(|cx| pulse.poll(cx, &mut connection, server::Connection::poll_accept)).await;
        match event {
            Event::Of(Some(Ok((request, mut respond)))) => {
                let (handle, share) = (handle.clone(), traffic.share());
                spawn_local(async move {
                    let _send = respond.send_response(Response::new(()), false).unwrap();
                    handle(request.into_body(), share).await;
                });
            }
            Event::Answered => {}
            Event::Of(_) | Event::Flood(_) | Event::Gone(_) => return,
        }
    }
}

/// A client that can send whatever its windows let it.
struct Client {
    requests: client::SendRequest<Bytes>,
    ping: h2::PingPong,
}

impl Client {
    async fn new(stream: TcpStream) -> Self {
        let (requests, mut connection) = client::Builder::new()
            .max_send_buffer_size(WINDOW_MAX as usize)
            .initial_max_send_streams(STREAMS as usize)
            .handshake::<_, Bytes>(stream)
            .await
            .unwrap();
        let ping = connection.ping_pong().unwrap();
        spawn_local(connection);
        let mut client = Self { requests, ping };
        client.hears().await;
        client
    }

    /// What the server does about what it has read, it has said when this returns: the first PING shows it to a
    /// connection that may have read the bytes in the turn before, the second comes behind what that says.
    async fn hears(&mut self) {
        for _ in 0..2 {
            self.ping.ping(h2::Ping::opaque()).await.unwrap();
        }
    }

    fn open(&mut self) -> SendStream<Bytes> {
        let request = Request::builder().method(Method::CONNECT).uri("target:1").body(()).unwrap();
        let (response, send) = self.requests.send_request(request, false).unwrap();
        spawn_local(async move {
            // Held until it is reset.
            let _response = response.await;
            pending::<()>().await;
        });
        send
    }

    /// A stream that is open at both ends, and how much may be sent on it at once.
    async fn open_wide(&mut self) -> (SendStream<Bytes>, usize) {
        let mut send = self.open();
        send.reserve_capacity(WINDOW_MAX as usize);
        let room = poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap();
        (send, room)
    }
}

/// Sends as it may, for ever.
async fn send_on(mut send: SendStream<Bytes>) {
    let chunk = Bytes::from(vec![7; 64 * 1024]);
    loop {
        send.reserve_capacity(chunk.len());
        match poll_fn(|cx| send.poll_capacity(cx)).await {
            Some(Ok(n)) => send.send_data(chunk.slice(..n.min(chunk.len())), false).unwrap(),
            _ => return,
        }
    }
}

async fn take(mut body: RecvStream, mut share: Share, read: bool, taken: &Cell<usize>) {
    while let Some(Ok(chunk)) = body.data().await {
        share.received(chunk.len());
        taken.set(taken.get() + chunk.len());
        if read {
            share.passed_on(chunk.len());
            body.flow_control().release_capacity(chunk.len()).unwrap();
        }
    }
}

#[test]
fn over_a_long_link_a_client_gets_a_larger_window_from_a_listener() {
    run(async {
        let (near, far) = far_apart().await;
        spawn_local(serve(far, async |body, share| take(body, share, true, &Cell::default()).await));
        let mut client = Client::new(near).await;
        spawn_local(send_on(client.open()));
        loop {
            client.hears().await;
            let (mut probe, room) = client.open_wide().await;
            probe.send_reset(h2::Reason::CANCEL);
            if room >= 2 * WINDOW_START as usize {
                return;
            }
        }
    });
}

#[test]
fn over_a_long_link_a_listener_gets_a_larger_window_from_a_client() {
    run(async {
        let (near, far) = far_apart().await;
        let (requests, mut connection) = client::Builder::new()
            .initial_window_size(WINDOW_START)
            .initial_connection_window_size(connection_window(STREAMS))
            .handshake::<_, Bytes>(near)
            .await
            .unwrap();
        let taken = Rc::new(Cell::default());
        let (traffic, of_taken) = (Rc::new(Traffic::default()), Rc::clone(&taken));
        let share = traffic.share();
        let mut pulse = Pulse::new(connection.ping_pong().unwrap(), PATIENCE, PATIENCE, &traffic);
        spawn_local(async move {
            loop {
                let event = poll_fn(|cx| pulse.poll(cx, &mut connection, |c, cx| Pin::new(c).poll(cx))).await;
                if let Event::Of(_) | Event::Gone(_) = event {
                    return;
                }
            }
        });
        spawn_local(async move {
            let request = Request::builder().method(Method::CONNECT).uri("target:1").body(()).unwrap();
            let (response, _send) = requests.ready().await.unwrap().send_request(request, false).unwrap();
            take(response.await.unwrap().into_body(), share, true, &of_taken).await;
        });
        let mut connection = server::Builder::new()
            .max_send_buffer_size(2 * WINDOW_MAX as usize)
            .handshake::<_, Bytes>(far)
            .await
            .unwrap();
        let (_, mut respond) = connection.accept().await.unwrap().unwrap();
        spawn_local(async move { while connection.accept().await.is_some() {} });
        let mut send = respond.send_response(Response::new(()), false).unwrap();
        let chunk = Bytes::from(vec![7; WINDOW_START as usize]);
        let mut sent = 0;
        // What has left and not been taken is never more than the window.
        while sent - taken.get() <= WINDOW_START as usize {
            send.reserve_capacity(chunk.len());
            let room = poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap();
            let room = room.min(chunk.len());
            send.send_data(chunk.slice(..room), false).unwrap();
            sent += room;
        }
    });
}

#[test]
fn streams_that_are_stuck_make_windows_smaller_and_leave_the_others_theirs() {
    run(async {
        let (near, far) = pair().await;
        let (stuck, read) = (Rc::new(Cell::default()), Rc::new(Cell::default()));
        let (count, of_stuck, of_read) = (Cell::new(0), Rc::clone(&stuck), Rc::clone(&read));
        let count = Rc::new(count);
        spawn_local(serve(far, async move |body, share| {
            count.set(count.get() + 1);
            if count.get() < STREAMS {
                take(body, share, false, &of_stuck).await;
            } else {
                take(body, share, true, &of_read).await;
            }
        }));
        let mut client = Client::new(near).await;
        let (mut streams, mut windows, mut sent) = (Vec::new(), Vec::new(), 0);
        for _ in 1..STREAMS {
            let (mut send, room) = client.open_wide().await;
            send.send_data(vec![7; room].into(), false).unwrap();
            sent += room;
            while stuck.get() < sent {
                tokio::task::yield_now().await;
            }
            client.hears().await;
            windows.push(room);
            streams.push(send);
        }
        assert_eq!(windows.first(), Some(&(WINDOW_START as usize)));
        assert!(windows.is_sorted_by(|a, b| a >= b), "{windows:?}");
        assert_eq!(windows.last(), Some(&(WINDOW_MIN as usize)), "{windows:?}");
        let room = connection_window(STREAMS) as usize - sent;
        assert!(room >= WINDOW_MIN as usize, "{room} of the connection's window are left");
        // One that is read goes on and on.
        let reading = client.open();
        let sending = spawn_local(send_on(reading));
        while read.get() < 4 * WINDOW_START as usize {
            tokio::task::yield_now().await;
        }
        sending.abort();
        // And when the others have gone, windows are what they were.
        for mut stream in streams {
            stream.send_reset(h2::Reason::CANCEL);
        }
        loop {
            client.hears().await;
            let (mut probe, room) = client.open_wide().await;
            probe.send_reset(h2::Reason::CANCEL);
            if room == WINDOW_START as usize {
                return;
            }
        }
    });
}
