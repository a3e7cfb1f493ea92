//! Ahead of an answer over HTTP/2, against a real peer in memory.

use std::{
    cell::Cell,
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    time::Duration,
};

use http::{Method, Request, Response};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex},
    task::{LocalSet, spawn_local},
    time::timeout,
};

use super::*;
use crate::relay::{Payload, Sender};

/// A client that has said this, and says no more.
struct Said(VecDeque<Option<Bytes>>);

impl EarlySource for Said {
    fn prefetches(&self) -> bool {
        false
    }

    fn poll_next(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        self.0.pop_front().map_or(Poll::Pending, |said| Poll::Ready(Ok(said)))
    }

    fn poll_gone(&mut self, _cx: &mut Context<'_>) -> Poll<Broken> {
        Poll::Pending
    }
}

/// Counts what is written, in calls.
struct Counted(DuplexStream, Rc<Cell<usize>>);

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.1.set(self.1.get() + 1);
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.1.set(self.1.get() + 1);
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

type Streams = h2::server::Connection<DuplexStream, Bytes>;

/// Both sides of a connection; what ours has written, in calls.
async fn connected() -> (h2::client::SendRequest<Payload>, Streams, Rc<Cell<usize>>) {
    let (ours, theirs) = duplex(1 << 20);
    let writes = Rc::new(Cell::new(0));
    let ours = Counted(ours, Rc::clone(&writes));
    let (client, server) =
        tokio::join!(h2::client::Builder::new().handshake(ours), h2::server::handshake(theirs));
    let ((requests, mut connection), mut server) = (client.unwrap(), server.unwrap());
    let mut ping = connection.ping_pong().unwrap();
    spawn_local(async move { connection.await.unwrap() });
    // Once it is answered, nobody has anything more to say.
    tokio::select! {
        pong = ping.ping(h2::Ping::opaque()) => drop(pong.unwrap()),
        _ = server.accept() => panic!("nothing was asked"),
    }
    (requests, server, writes)
}

fn request() -> Request<()> {
    Request::builder().method(Method::CONNECT).uri("a:1").body(()).unwrap()
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let patience = Duration::from_secs(10);
    LocalSet::new().block_on(&runtime, async { timeout(patience, test).await.expect("in time") });
}

#[test]
fn a_request_and_what_has_come_leave_in_one_write() {
    run(async {
        for bytes in [1, 300, 5000] {
            let (mut requests, mut server, writes) = connected().await;
            let before = writes.get();
            let asking = spawn_local(async move {
                let mut client = Said([Some(Bytes::from(vec![7; bytes]))].into());
                let ahead = Ahead::new(&mut client, Queue::default());
                let (response, send) = requests.send_request(request(), false).unwrap();
                let mut send = Sender::new(send, &crate::process::memory::Memory::of_this_worker().own());
                ahead.until(&mut send, response).await.unwrap();
                ahead.answered();
                let early = ahead.into_early();
                assert_eq!((early.passed, early.sent.is_empty(), early.ended), (bytes, true, false));
                (requests, send)
            });
            let (asked, mut respond) = server.accept().await.unwrap().unwrap();
            let mut body = asked.into_body();
            let hear = async {
                assert_eq!(body.data().await.unwrap().unwrap().len(), bytes);
                assert_eq!(writes.get() - before, 1, "{bytes} bytes");
                respond.send_response(Response::new(()), false).unwrap();
                let _open = asking.await.unwrap();
            };
            tokio::select! {
                () = hear => {}
                _ = server.accept() => panic!("nothing more was asked"),
            }
        }
    });
}

#[test]
fn what_was_refused_is_there_for_whoever_is_asked_or_dialled_next() {
    run(async {
        let (mut requests, mut server, _) = connected().await;
        spawn_local(async move {
            while let Some(Ok((_, mut respond))) = server.accept().await {
                let refusal = Response::builder().status(502).body(()).unwrap();
                respond.send_response(refusal, true).unwrap();
            }
        });
        let all: Vec<u8> = (0..=250).cycle().take(EARLY_MAX + 1000).collect();
        let parts = [0..1, 1..9, 9..5000, 5000..5001, 5001..all.len()];
        let said = parts.map(|part| Some(Bytes::copy_from_slice(&all[part])));
        let mut client = Said(said.into_iter().chain([None]).collect());
        let ahead = Ahead::new(&mut client, Queue::default());
        for _ in 0..3 {
            let (response, send) = requests.send_request(request(), false).unwrap();
            let mut send = Sender::new(send, &crate::process::memory::Memory::of_this_worker().own());
            let refused = ahead.until(&mut send, response).await.unwrap();
            assert_eq!(refused.status(), 502);
            let waiting = ahead.0.borrow();
            assert_eq!((waiting.sent, waiting.finished), (EARLY_MAX, false));
        }
        let mut early = ahead.into_early();
        assert_eq!((early.passed, early.finished), (0, false));
        let mut left = Vec::new();
        while !early.sent.is_empty() {
            early.sent.front_len();
            left.extend_from_slice(&early.sent.take(usize::MAX));
        }
        assert!(left == all, "{} bytes of {}", left.len(), all.len());
    });
}
