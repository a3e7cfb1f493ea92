//! CONNECT over HTTP/1.1 as a client (RFC 9112, RFC 9110 section 9.3.6). A connection is asked once, and is the tunnel after
//! a 2xx.
//!
//! # Invariants
//! - Nothing of the flow is sent before the 2xx: unread, a proxy could take it for its next request.

use std::{cell::RefCell, future::Future, io, pin::Pin};

use bytes::{Bytes, BytesMut};
use http::{Request, StatusCode, header::HOST};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

use super::{
    ConnectError,
    connect::{Far, Handshake},
    connection::{Connection, OpenError, OpenRequest},
    permit::StreamPermits,
    stream::{Stream, StreamLeg},
};
use crate::{
    identity::{standing::Standing, verify::explain},
    model::flow::{FarEnd, Identity},
    relay::{IntoLeg, Queue},
    transport::{
        h1::{HeadError, ReadError, no_fields, read_head},
        io::AlertFirst,
    },
};

/// The head of an answer, as far as it concerns us.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// `proxy-status` (RFC 9209).
    pub detail: Option<String>,
}

/// A connection whose one stream has not been opened, or has.
pub struct H1Connection {
    /// `None` once it was asked.
    wire: RefCell<Option<Box<dyn Unasked>>>,
    far: Far,
}

/// Makes a connection of a byte stream: nothing is said on it before the request.
pub(super) struct H1Handshake;

impl Handshake for H1Handshake {
    type Connection = H1Connection;

    async fn shake<W: IntoLeg>(self, wire: W, far: Far) -> Result<H1Connection, ConnectError>
    where
        StreamLeg: From<W::Leg>,
    {
        Ok(H1Connection { wire: RefCell::new(Some(Box::new(wire))), far })
    }
}

/// A byte stream on which nothing was asked yet, of whatever kind.
trait Unasked {
    /// Asks, and waits for the answer. After a 2xx, the byte stream is the tunnel; and its first bytes.
    fn send(self: Box<Self>, request: Vec<u8>) -> Pin<Box<dyn Future<Output = Sent>>>;
}

type Sent = Result<(StreamLeg, Bytes), Closed>;

impl<W: IntoLeg> Unasked for W
where
    StreamLeg: From<W::Leg>,
{
    fn send(self: Box<Self>, request: Vec<u8>) -> Pin<Box<dyn Future<Output = Sent>>> {
        let mut wire = self;
        Box::pin(async move {
            let first = ask_on(&mut *wire, &request).await?;
            Ok((wire.into_leg(first.len()).into(), first))
        })
    }
}

/// Why a connection is no tunnel.
enum Closed {
    Refused(Answer),
    Failed(ReadError),
}

impl From<ReadError> for Closed {
    fn from(e: ReadError) -> Self {
        Self::Failed(e)
    }
}

impl Connection for H1Connection {
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
        usize::from(self.wire.borrow().is_some())
    }

    fn is_barred(&self) -> bool {
        false
    }

    fn is_overdue(&self) -> bool {
        false
    }

    async fn open(&self, request: OpenRequest<'_, '_>, permits: StreamPermits) -> Result<Stream, OpenError> {
        let wire = self.wire.take();
        let wire = wire.ok_or_else(|| OpenError::NotProcessed("the connection is closed".to_owned()))?;
        match timeout(request.timeout, wire.send(encode(&request.head))).await {
            Ok(Ok((leg, first))) => {
                let mut early = Queue::default();
                early.push(first);
                let Far { peer, identity, standing, .. } = self.far.clone();
                let end = standing.as_ref().and_then(Standing::end_of_flows);
                Ok(Stream { leg, early, peer, identity, end, permits })
            }
            Ok(Err(Closed::Refused(Answer { status, detail }))) => Err(OpenError::Refused { status, detail }),
            // What was sent may have been acted on.
            Ok(Err(Closed::Failed(ReadError::Io(e)))) => Err(OpenError::Dropped(explain(&e))),
            Ok(Err(Closed::Failed(e))) => Err(OpenError::Dropped(e.to_string())),
            Err(_) => Err(OpenError::Timeout),
        }
    }

    /// There is no question that a proxy would answer but a request.
    async fn ping(&self) -> Result<(), String> {
        Ok(())
    }

    fn drain(&self) {
        self.wire.take();
    }

    fn close(&self) {
        self.wire.take();
    }

    /// Nothing happens on it but its stream.
    async fn retired(&self) {
        std::future::pending::<()>().await;
    }

    async fn run(&self, _grew: &dyn Fn()) {}

    fn lost(&self) -> Option<String> {
        None
    }
}

async fn ask_on(wire: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &[u8]) -> Result<Bytes, Closed> {
    let mut buf = BytesMut::new();
    // In TLS 1.3 a server judges our certificate after we have finished (RFC 8446 section 4.4.2).
    let answer = exchange(&mut AlertFirst::new(wire), request, &mut buf).await?;
    if answer.status.is_success() { Ok(buf.freeze()) } else { Err(Closed::Refused(answer)) }
}

async fn exchange(
    io: &mut (impl AsyncRead + AsyncWrite + Unpin),
    request: &[u8],
    buf: &mut BytesMut,
) -> Result<Answer, ReadError> {
    io.write_all(request).await?;
    io.flush().await?;
    loop {
        let answer = read_head(io, buf, parse).await?;
        if answer.status == StatusCode::SWITCHING_PROTOCOLS {
            // To what, nobody has asked (RFC 9110 section 15.2.2).
            return Err(io::Error::other("it switched protocols unasked").into());
        }
        if !answer.status.is_informational() {
            return Ok(answer);
        }
    }
}

/// The request as HTTP/1.1 writes it: the authority is the request target, and Host says it again.
fn encode(request: &Request<()>) -> Vec<u8> {
    let authority = request.uri().authority().map(http::uri::Authority::as_str).unwrap_or_default();
    let mut out = format!("CONNECT {authority} HTTP/1.1\r\n{HOST}: {authority}\r\n").into_bytes();
    for (name, value) in request.headers() {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
    out
}

/// Parses the head at the front of `bytes`; it and its length, or nothing while it is not whole. A body that it
/// announces there is not after 2xx (RFC 9110 section 9.3.6), and after anything else nobody reads it.
pub fn parse(bytes: &[u8]) -> Result<Option<(Answer, usize)>, HeadError> {
    let mut fields = no_fields();
    let mut response = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(length) = response.parse(bytes)? else { return Ok(None) };
    let code = response.code.unwrap_or_default();
    let status = StatusCode::from_u16(code).map_err(|_| HeadError::Syntax(httparse::Error::Status))?;
    let detail = response.headers.iter().find(|f| f.name.eq_ignore_ascii_case("proxy-status"));
    let detail = detail.and_then(|f| std::str::from_utf8(f.value).ok()).map(str::to_owned);
    Ok(Some((Answer { status, detail }, length)))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, duplex};

    use super::*;
    use crate::transport::h1::HEAD_MAX;

    fn request() -> Request<()> {
        let mut request = Request::builder().method("CONNECT").uri("a.example:1").body(()).unwrap();
        request.headers_mut().insert("baggage", HeaderValue::from_static("x=y"));
        request
    }

    /// What is made of an answer, and what is left behind it.
    async fn answered(answer: &[u8]) -> (Result<Answer, String>, Vec<u8>) {
        let (mut ours, mut theirs) = duplex(64 * 1024);
        theirs.write_all(answer).await.unwrap();
        theirs.shutdown().await.unwrap();
        let mut buf = BytesMut::new();
        let got = exchange(&mut ours, b"x", &mut buf).await.map_err(|e| e.to_string());
        ours.read_to_end(&mut buf.to_vec()).await.unwrap();
        (got, buf.to_vec())
    }

    #[test]
    fn the_request_names_its_target_twice_and_carries_what_is_configured() {
        assert_eq!(
            String::from_utf8(encode(&request())).unwrap(),
            "CONNECT a.example:1 HTTP/1.1\r\nhost: a.example:1\r\nbaggage: x=y\r\n\r\n"
        );
    }

    #[tokio::test]
    async fn any_2xx_opens_the_tunnel_whatever_it_says_of_a_body_and_1xx_is_not_an_answer() {
        let ok = |detail| Ok(Answer { status: StatusCode::OK, detail });
        for head in [
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.0 200 Connection established\r\nProxy-agent: tinyproxy/1.11.1\r\n\r\n",
            "HTTP/1.1 200\r\nContent-Length: 3\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        ] {
            assert_eq!(
                answered(format!("{head}first").as_bytes()).await,
                (ok(None), b"first".to_vec()),
                "{head:?}"
            );
        }
        let (got, _) = answered(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert!(got.unwrap().status.is_success());
    }

    #[tokio::test]
    async fn what_is_no_answer_is_said() {
        for (answer, why) in [
            ("", "closed before the head was complete"),
            ("HTTP/1.1 200 OK\r\n", "closed before the head was complete"),
            ("HTTP/1.1 100 Continue\r\n\r\n", "closed before the head was complete"),
            ("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n", "unasked"),
            ("HTTP/2.0 200 OK\r\n\r\n", "malformed HTTP/1 head"),
            ("HTTP/1.1 99 x\r\n\r\n", "malformed HTTP/1 head"),
            ("SSH-2.0-OpenSSH_9.2\r\n", "malformed HTTP/1 head"),
            ("\u{15}\u{3}\u{3}\0\u{2}\u{2}F", "malformed HTTP/1 head"),
        ] {
            let (got, _) = answered(answer.as_bytes()).await;
            assert!(got.as_ref().is_err_and(|e| e.contains(why)), "{answer:?}: {got:?}");
        }
        let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(HEAD_MAX));
        let (got, _) = answered(long.as_bytes()).await;
        assert!(got.as_ref().is_err_and(|e| e.contains("longer than")), "{got:?}");
        let (got, _) = answered(b"HTTP/1.1 403 No\r\nProxy-Status: p; error=x\r\n\r\n").await;
        let refused = Answer { status: StatusCode::FORBIDDEN, detail: Some("p; error=x".to_owned()) };
        assert_eq!(got, Ok(refused));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_answer_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _verdict = parse(&bytes);
        }

        #[test]
        fn a_head_that_is_cut_is_not_whole_and_whole_it_is_the_same_wherever_it_was_cut(
            status in 100u16..1000,
            reason in "[ -~]{0,20}",
            value in "[ -~]{0,20}",
            behind in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let head = format!("HTTP/1.1 {status} {reason}\r\nx-y: {value}\r\n\r\n");
            let all: Vec<u8> = head.bytes().chain(behind).collect();
            for cut in 0..head.len() {
                prop_assert!(matches!(parse(&all[..cut]), Ok(None)), "cut at {}", cut);
            }
            for end in head.len()..=all.len() {
                let (answer, length) = parse(&all[..end]).unwrap().unwrap();
                prop_assert_eq!((answer.status.as_u16(), length), (status, head.len()));
            }
        }
    }
}
