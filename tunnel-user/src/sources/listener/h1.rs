//! CONNECT over HTTP/1.1, and over HTTP/1.0 as older clients send it (RFC 9112, RFC 9110 section 9.3.6).
//!
//! # Invariants
//! - What came behind the head goes nowhere before a 200, and first after it.
//! - A request that could be read in two ways is refused, and its connection ends.
//! - A connection carries one request: after the answer it is the tunnel.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, Version};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    sync::OwnedSemaphorePermit,
    time::timeout,
};

use super::{
    accept::{LINGER, drain_and_close},
    request::{Malformed, RequestError, shown},
};
use crate::{
    model::flow::Target,
    process::books::Connected,
    relay::{IntoLeg, Queue},
    sources::{self, Answer, PendingRequest},
    transport::{
        h1::{HeadError, ReadError, no_fields, read_head},
        io::Wire,
    },
};

/// The head of a request.
#[derive(Debug)]
pub struct Head {
    /// What it asks for.
    pub target: Result<Target, Malformed>,
    /// The version of HTTP that it came by.
    pub version: Version,
    /// Its fields.
    pub headers: HeaderMap,
}

/// One request, on its connection.
pub type Incoming<W> = sources::Incoming<Pending<W>>;

/// A connection whose request waits for its answer.
pub struct Pending<W> {
    wire: W,
    /// What came behind the head.
    early: Bytes,
    /// Its place among the connections of its listener.
    places: Option<(OwnedSemaphorePermit, Connected)>,
}

/// Reads a request. One that is malformed is a request too: it is to be answered. The caller bounds the time.
pub async fn read<W: Wire>(mut wire: W) -> Result<Incoming<W>, ReadError> {
    let mut buf = BytesMut::new();
    let Head { target, version, headers } = match read_head(&mut wire, &mut buf, parse).await {
        Ok(head) => head,
        Err(ReadError::Head(e)) => Head {
            target: Err(Malformed { authority: Box::default(), error: e.into() }),
            version: Version::HTTP_11,
            headers: HeaderMap::new(),
        },
        Err(e) => return Err(e),
    };
    let request = Pending { wire, early: buf.freeze(), places: None };
    Ok(Incoming { target, head: Some((version, headers)), request })
}

impl<W> Pending<W> {
    /// Holds its places among connections until the request is accepted: from then on it is the limit of flows that bounds it.
    pub(super) fn hold(&mut self, places: (OwnedSemaphorePermit, Connected)) {
        self.places = Some(places);
    }
}

impl<W: IntoLeg + 'static> PendingRequest for Pending<W> {
    type Leg = W::Leg;

    async fn left(&mut self) {
        self.wire.failed().await;
    }

    async fn accept(mut self) -> Option<(W::Leg, Queue)> {
        // RFC 9110 section 9.3.6: neither Content-Length nor Transfer-Encoding.
        timeout(LINGER, write(&mut self.wire, b"HTTP/1.1 200 OK\r\n\r\n")).await.ok()?.ok()?;
        let mut early = Queue::default();
        early.push(self.early);
        Some((self.wire.into_leg(0), early))
    }

    /// Closes the connection so that the peer can read the answer.
    async fn refuse(mut self, answer: &impl Answer) {
        let answer = encode(&answer.response());
        if let Ok(Ok(())) = timeout(LINGER, write(&mut self.wire, &answer)).await {
            drain_and_close(self.wire).await;
        }
    }
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// A head without a body, of an answer after which the connection is closed.
fn encode(response: &Response<()>) -> Vec<u8> {
    let status = response.status();
    let reason = status.canonical_reason().unwrap_or_default();
    let mut out = format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).into_bytes();
    for (name, value) in response.headers() {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"content-length: 0\r\nconnection: close\r\n\r\n");
    out
}

/// Parses the head at the front of `bytes`; it and its length, or nothing while it is not whole.
pub fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, HeadError> {
    let mut fields = no_fields();
    let mut request = httparse::Request::new(&mut fields);
    let httparse::Status::Complete(length) = request.parse(bytes)? else { return Ok(None) };
    let authority = request.path.unwrap_or_default();
    let mut headers = HeaderMap::with_capacity(request.headers.len());
    for field in &*request.headers {
        // What the parser takes for a field is one to the other library too.
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| httparse::Error::HeaderName)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| httparse::Error::HeaderValue)?;
        headers.append(name, value);
    }
    let malformed = |error| Malformed { authority: shown(authority).into(), error };
    let head = Head {
        target: target(&request, authority).map_err(malformed),
        version: if request.version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 },
        headers,
    };
    Ok(Some((head, length)))
}

fn target(request: &httparse::Request<'_, '_>, authority: &str) -> Result<Target, RequestError> {
    let method = request.method.unwrap_or_default();
    if method != Method::CONNECT.as_str() {
        // What the parser takes for a method is one.
        return Err(RequestError::Method(Method::from_bytes(method.as_bytes()).unwrap_or_default()));
    }
    // The authority and nothing else (RFC 9112 section 3.2.3).
    let target: Target = authority.parse()?;
    let fields = || request.headers.iter();
    // RFC 9110 section 9.3.6: CONNECT has no content. Whoever announces some may have another idea than we of
    // where the request ends.
    for name in ["content-length", "transfer-encoding"] {
        if fields().any(|f| f.name.eq_ignore_ascii_case(name)) {
            return Err(RequestError::Content(name));
        }
    }
    let mut hosts = fields().filter(|f| f.name.eq_ignore_ascii_case("host"));
    // One says what the target says, or there is none, as in HTTP/1.0 (RFC 9112 section 3.2).
    match (hosts.next(), hosts.next()) {
        (None, _) => Ok(target),
        (Some(host), None) if is_host_of(host.value, &target) => Ok(target),
        _ => Err(RequestError::Host(target)),
    }
}

/// Whether a Host field names the target: with its port, or, as some clients do, without.
fn is_host_of(host: &[u8], target: &Target) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let is_target = |text: &str| text.parse::<Target>().is_ok_and(|t| t == *target);
    is_target(host) || is_target(&format!("{host}:{}", target.port()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::h1::FIELDS_MAX;

    fn status(error: &RequestError) -> u16 {
        error.reason().status().unwrap().as_u16()
    }

    /// The target, or the status of the refusal.
    fn answer(text: &str) -> Result<String, u16> {
        match parse(text.as_bytes()) {
            Ok(Some((head, length))) => {
                assert_eq!(length, text.len());
                head.target.map(|t| t.to_string()).map_err(|e| status(&e.error))
            }
            Ok(None) => panic!("{text:?} is not whole"),
            Err(e) => Err(status(&e.into())),
        }
    }

    #[test]
    fn what_clients_send_is_taken() {
        for (text, target) in [
            ("CONNECT 10.0.0.1:80 HTTP/1.1\r\nHost: 10.0.0.1:80\r\n\r\n", "10.0.0.1:80"),
            ("CONNECT 10.0.0.1:80 HTTP/1.0\r\n\r\n", "10.0.0.1:80"),
            ("CONNECT [2001:db8::1]:443 HTTP/1.1\r\nhost: [2001:0db8::1]\r\n\r\n", "[2001:db8::1]:443"),
            ("CONNECT A.Example:1 HTTP/1.1\r\nHOST: a.example\r\nUser-Agent: x\r\n\r\n", "a.example:1"),
            ("\r\nCONNECT a.example:1 HTTP/1.1\r\nProxy-Connection: Keep-Alive\r\n\r\n", "a.example:1"),
        ] {
            assert_eq!(answer(text), Ok(target.to_owned()), "{text:?}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_or_in_none_is_refused() {
        for (request, status) in [
            ("CONNECT a.example HTTP/1.1\r\n", 400),
            ("CONNECT a.example:0 HTTP/1.1\r\n", 400),
            ("CONNECT a.example:65536 HTTP/1.1\r\n", 400),
            ("CONNECT me@a.example:1 HTTP/1.1\r\n", 400),
            ("CONNECT [fe80::1%eth0]:1 HTTP/1.1\r\n", 400),
            ("CONNECT http://a.example:1/ HTTP/1.1\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nHost: b.example:1\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nHost: a.example:2\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nHost:\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nHost: a.example:1\r\nHost: a.example:1\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nContent-Length: 0\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nx: a\r\n b\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nx: a\rb: c\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nx: a\0b\r\n", 400),
            ("CONNECT a.example:1 HTTP/1.1\r\nx : a\r\n", 400),
            ("CONNECT a\0.example:1 HTTP/1.1\r\n", 400),
            ("CONNECT a.example:1\r\n", 400),
            ("CONNECT  a.example:1 HTTP/1.1\r\n", 400),
            ("CONNECT a.example:1 HTTP/2.0\r\n", 400),
            ("PRI * HTTP/2.0\r\n", 400),
            ("\u{16}\u{3}\u{1}\u{2}\0", 400),
            ("GET / HTTP/1.1\r\nHost: a.example\r\n", 405),
            ("GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n", 405),
            ("connect a.example:1 HTTP/1.1\r\n", 405),
        ] {
            assert_eq!(answer(&format!("{request}\r\n")), Err(status), "{request:?}");
        }
        let many = "x: y\r\n".repeat(FIELDS_MAX + 1);
        assert_eq!(answer(&format!("CONNECT a.example:1 HTTP/1.1\r\n{many}\r\n")), Err(431));
    }

    #[test]
    fn what_is_behind_the_head_is_not_of_it() {
        let (head, length) =
            parse(b"CONNECT a:1 HTTP/1.1\r\n\r\nCONNECT b:2 HTTP/1.1\r\n\r\n").unwrap().unwrap();
        assert_eq!((head.target.unwrap().to_string().as_str(), length), ("a:1", 24));
    }

    #[test]
    fn what_routes_look_at_is_read_too() {
        let head = b"CONNECT a:1 HTTP/1.0\r\nX-Canary: yes\r\nVia: 1.1 one\r\nvia: 1.1 two\r\n\r\n";
        let (head, _) = parse(head).unwrap().unwrap();
        assert_eq!(head.version, Version::HTTP_10);
        assert_eq!(head.headers["x-canary"], "yes");
        assert_eq!(head.headers.get_all("via").iter().count(), 2);
    }

    #[test]
    fn an_answer_ends_its_connection_and_says_why() {
        let answer =
            Response::builder().status(405).header("allow", "CONNECT").header("proxy-status", "tunnel");
        let text = String::from_utf8(encode(&answer.body(()).unwrap())).unwrap();
        assert_eq!(
            text,
            "HTTP/1.1 405 Method Not Allowed\r\nallow: CONNECT\r\nproxy-status: tunnel\r\n\
             content-length: 0\r\nconnection: close\r\n\r\n"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_answer_or_a_question(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _verdict = parse(&bytes);
        }

        #[test]
        fn arbitrary_fields_are_an_answer(
            authority in "[ -~]{0,40}",
            fields in proptest::collection::vec(("[ -~]{0,12}", "[ -~]{0,12}"), 0..6),
        ) {
            let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            let _verdict = parse(format!("CONNECT {authority} HTTP/1.1\r\n{fields}\r\n").as_bytes());
        }

        #[test]
        fn a_head_that_is_cut_is_not_whole_and_whole_it_is_the_same_wherever_it_was_cut(
            port in 1u16..,
            name in "[a-z]{1,10}",
            value in "[ -~]{0,20}",
            behind in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let head = format!("CONNECT {name}.example:{port} HTTP/1.1\r\nx-{name}: {value}\r\n\r\n");
            let all: Vec<u8> = head.bytes().chain(behind).collect();
            for cut in 0..head.len() {
                prop_assert!(matches!(parse(&all[..cut]), Ok(None)), "cut at {}", cut);
            }
            for end in head.len()..=all.len() {
                let (parsed, length) = parse(&all[..end]).unwrap().unwrap();
                prop_assert_eq!(length, head.len());
                prop_assert_eq!(parsed.target.unwrap().to_string(), format!("{name}.example:{port}"));
            }
        }
    }
}
