//! One HTTP/3 connection to an upstream (RFC 9114): its streams, and what is known of its peer.
//!
//! # Invariants
//! - A connection is there only once its peer has accepted our certificate and said what it takes.
//! - A connection is closed only when its peer has acknowledged everything, or does not answer.

mod handshake;

use std::{
    cell::{Cell, RefCell},
    future::{Future, pending, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    time::Duration,
};

use bytes::BytesMut;
use http::{HeaderMap, Request};
use quinn::{ConnectionError, RecvStream, SendStream};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};

pub(super) use self::handshake::Quic;
use super::{
    connect::Far,
    connection::{Connection, OpenError, OpenRequest},
    permit::StreamPermits,
    stream::{Stream, StreamLeg},
};
use crate::{
    identity::standing::Standing,
    model::flow::{FarEnd, Identity},
    relay::{H3Leg, HeadFailure, Open, Queue},
    transport::{
        http3::{
            Code,
            message::{self, HeadError, ResponseHead},
            varint,
        },
        quic::{self, Control, Ended},
    },
};

/// A peer that has sent nothing for so long after a request is overdue: new streams go to another endpoint, if one is
/// available. As over HTTP/2.
const OVERDUE: Duration = Duration::from_secs(1);
/// How long a stream may wait for the peer to allow one more, which it does when it has seen the end of another: longer than
/// any round trip.
const CREDIT: Duration = Duration::from_secs(1);
/// How long it is believed that a peer allows no more than it did: it says only how many there may ever be, not how many at
/// once.
const BELIEVED: Duration = Duration::from_secs(10);
/// A type of streams that is there to be ignored (RFC 9114 section 6.2.3).
const RESERVED: u64 = 0x21;
/// Informational responses in front of the one that counts; more are an attack.
const INFORMATIONAL_MAX: usize = 16;

/// See the module.
pub struct H3Connection {
    connection: quinn::Connection,
    far: Far,
    /// Our limit; the peer's counts too.
    max_streams: usize,
    /// The peer's, as far as it has shown, and until when that is believed.
    allowed: Cell<Option<(usize, Instant)>>,
    open: Open,
    /// Got GOAWAY, is lost, or is being closed.
    draining: Rc<Draining>,
    /// What had come from the peer when it was found overdue.
    overdue: Cell<Option<u64>>,
    /// Why the connection was lost, once it was.
    lost: RefCell<Option<String>>,
    /// What reads the peer's control stream, until it is run.
    watching: RefCell<Option<Watching>>,
    _control: Control,
}

type Watching = Pin<Box<dyn Future<Output = Ended>>>;

#[derive(Default)]
struct Draining {
    is: Cell<bool>,
    /// The first request that the peer has refused by GOAWAY.
    from: Cell<Option<u64>>,
    /// One of these has changed, or what the connection is believed to allow.
    changed: Notify,
}

impl Draining {
    fn begin(&self) {
        self.is.set(true);
        self.changed.notify_one();
    }

    fn goaway(&self, from: u64) {
        self.from.set(Some(from));
        self.begin();
    }

    /// Whether the peer has not acted on a request, and will not.
    fn refuses(&self, id: u64) -> bool {
        self.from.get().is_some_and(|from| id >= from)
    }
}

impl H3Connection {
    /// Datagrams that have come from the peer.
    fn heard(&self) -> u64 {
        self.connection.stats().udp_rx.datagrams
    }

    /// A new stream, if the peer allows one.
    async fn stream(&self) -> Result<(SendStream, RecvStream), OpenError> {
        let refused = |why: String| {
            self.draining.begin();
            OpenError::NotProcessed(why)
        };
        let others = self.open.count();
        match timeout(CREDIT, self.connection.open_bi()).await {
            Ok(Ok(halves)) => Ok(halves),
            Ok(Err(e)) => Err(refused(quic::why_lost(&e))),
            Err(_) => {
                self.allowed.set(Some((others, Instant::now() + BELIEVED)));
                self.draining.changed.notify_one();
                Err(OpenError::NotProcessed("the peer allows no more streams".to_owned()))
            }
        }
    }

    /// Why a request was not answered.
    fn unanswered(&self, id: u64, why: HeadFailure) -> OpenError {
        if self.draining.refuses(id) {
            return OpenError::NotProcessed("the peer has sent GOAWAY".to_owned());
        }
        match why {
            HeadFailure::Reset(code) if code == Code::REQUEST_REJECTED => {
                OpenError::NotProcessed(code.to_string())
            }
            HeadFailure::Reset(code) => OpenError::Dropped(format!("stream reset: {code}")),
            HeadFailure::Incomplete => OpenError::Dropped("the stream ended without an answer".to_owned()),
            HeadFailure::TooLong => OpenError::Dropped("the answer has too many headers".to_owned()),
            HeadFailure::Lost(why) => OpenError::Dropped(self.lost().unwrap_or(why)),
        }
    }

    /// Ready when the peer has sent nothing since a request, for too long.
    async fn silent(&self) {
        let before = self.heard();
        sleep(OVERDUE).await;
        if self.heard() != before {
            pending::<()>().await;
        }
        tracing::debug!(peer = %self.far.peer, "answer overdue");
        self.overdue.set(Some(before));
    }
}

/// The response that counts: those before it are informational (RFC 9114 section 4.1).
async fn answer(leg: &mut crate::relay::Receiver) -> Result<ResponseHead, HeadFailure> {
    for _ in 0..INFORMATIONAL_MAX {
        let head = match message::decode_response(&leg.head().await?) {
            Ok(head) => head,
            Err(HeadError::TooLong) => return Err(HeadFailure::TooLong),
            Err(HeadError::Malformed(why)) => {
                return Err(HeadFailure::Lost(format!("malformed answer: {why}")));
            }
            Err(HeadError::Connection(e)) => return Err(HeadFailure::Lost(leg.wrong(&e))),
        };
        if !head.status.is_informational() {
            return Ok(head);
        }
    }
    Err(HeadFailure::TooLong)
}

impl Connection for H3Connection {
    fn peer(&self) -> &FarEnd {
        &self.far.peer
    }

    fn identity(&self) -> Option<&Identity> {
        self.far.identity.as_ref()
    }

    fn connected(&self) -> Option<std::time::Instant> {
        Some(self.far.connected)
    }

    fn max_streams(&self) -> usize {
        if self.draining.is.get() {
            return 0;
        }
        match self.allowed.get() {
            Some((allowed, until)) if Instant::now() < until => self.max_streams.min(allowed),
            _ => self.max_streams,
        }
    }

    fn is_barred(&self) -> bool {
        !self.draining.is.get() && self.max_streams() == 0
    }

    fn is_overdue(&self) -> bool {
        self.overdue.get().is_some_and(|heard| heard == self.heard())
    }

    async fn open(&self, request: OpenRequest<'_, '_>, permits: StreamPermits) -> Result<Stream, OpenError> {
        let OpenRequest { head, timeout: after, ahead, may_retry } = request;
        let mut leg = H3Leg::client(&self.connection, self.stream().await?, self.open.clone());
        let id = leg.id();
        leg.send.put_headers(encode(&head));
        let (send, recv) = (RefCell::new(&mut leg.send), &mut leg.recv);
        // The request leaves as this is polled.
        let answer = async {
            let mut answer = pin!(answer(recv));
            poll_fn(|cx| {
                send.borrow_mut().poll_flush(cx);
                answer.as_mut().poll(cx)
            })
            .await
        };
        let answer = async {
            match ahead {
                Some(ahead) => {
                    let mut early = &send;
                    let mut answered = pin!(ahead.until(&mut early, answer));
                    // What has gone ahead in this poll leaves with it.
                    poll_fn(|cx| {
                        let answered = answered.as_mut().poll(cx);
                        if answered.is_pending() {
                            send.borrow_mut().poll_flush(cx);
                        }
                        answered
                    })
                    .await
                }
                None => answer.await,
            }
        };
        // Where the request may be made again elsewhere, and nothing was carried.
        let given_up = async {
            self.silent().await;
            if !may_retry || ahead.is_some_and(|ahead| ahead.has_carried()) {
                pending::<()>().await;
            }
        };
        let answered = tokio::select! {
            biased;
            answer = timeout(after, answer) => Some(answer),
            () = given_up => None,
        };
        let ResponseHead { status, headers } = match answered {
            Some(Ok(Ok(head))) => head,
            Some(Ok(Err(e))) => return Err(self.unanswered(id, e)),
            Some(Err(_)) => return Err(OpenError::Timeout),
            None => return Err(OpenError::Dropped("its answer is overdue".to_owned())),
        };
        // Any 2xx (RFC 9110 section 9.3.6).
        if !status.is_success() {
            let detail = headers.get("proxy-status").and_then(|v| v.to_str().ok()).map(str::to_owned);
            return Err(OpenError::Refused { status, detail });
        }
        if let Some(ahead) = ahead {
            ahead.answered();
        }
        let Far { peer, identity, standing, .. } = self.far.clone();
        let end = standing.as_ref().and_then(Standing::end_of_flows);
        let leg = StreamLeg::H3(Box::new(leg));
        Ok(Stream { leg, early: Queue::default(), peer, identity, end, permits })
    }

    /// By a stream of a reserved type, which the peer reads or refuses, either of which it says (RFC 9114 section 6.2.3): quinn
    /// has no PING that can be waited for.
    async fn ping(&self) -> Result<(), String> {
        let lost = |e: ConnectionError| quic::why_lost(&e);
        let mut stream = self.connection.open_uni().await.map_err(lost)?;
        let mut kind = BytesMut::new();
        varint::put(&mut kind, RESERVED);
        // Of a stream that has failed before its end nothing more is heard.
        let _gone = stream.write_chunk(kind.freeze()).await;
        let _gone = stream.finish();
        stream.stopped().await.map(drop).map_err(|e| e.to_string())
    }

    fn drain(&self) {
        self.draining.begin();
    }

    fn close(&self) {
        self.draining.begin();
    }

    async fn retired(&self) {
        self.far.retired().await;
    }

    async fn run(&self, grew: &dyn Fn()) {
        let Some(mut watching) = self.watching.take() else { return };
        let _ends_with_this = Closing(&self.connection);
        let ended = loop {
            let believed = self.allowed.get().map(|(_, until)| until);
            tokio::select! {
                ended = &mut watching => break ended,
                () = self.draining.changed.notified(), if !self.draining.is.get() => {}
                () = self.open.none(), if self.draining.is.get() => {
                    quic::close_clean(&self.connection).await;
                    break Ended::Lost(ConnectionError::LocallyClosed);
                }
                () = tokio::time::sleep_until(believed.unwrap_or_else(Instant::now)), if believed.is_some() => {
                    self.allowed.set(None);
                    grew();
                }
            }
        };
        self.draining.begin();
        self.lost.replace(match ended {
            Ended::Wrong(e) => Some(e.to_string()),
            Ended::Lost(e) if quic::is_clean(&e) => None,
            Ended::Lost(e) => Some(quic::why_lost(&e)),
        });
    }

    fn lost(&self) -> Option<String> {
        self.lost.borrow().clone()
    }
}

/// Dropped, it ends its connection at once.
struct Closing<'c>(&'c quinn::Connection);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        // Of one that has ended nothing is heard.
        self.0.close(quic::wire_code(Code::NO_ERROR), &[]);
    }
}

fn encode(request: &Request<()>) -> bytes::Bytes {
    let authority = request.uri().authority().map(http::uri::Authority::as_str).unwrap_or_default();
    let headers: &HeaderMap = request.headers();
    message::encode_connect(authority, headers)
}
