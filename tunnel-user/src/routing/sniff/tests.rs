//! Tests of what a client's first bytes say: by example, on arbitrary bytes, and over real sockets. The reference is
//! rustls: where it reads a server name, so does the parser.

use std::{io, net::Shutdown, sync::Arc, time::Duration};

use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::aws_lc_rs, server::Acceptor};
use socket2::SockRef;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    time::Instant,
};

use super::*;
use crate::relay::TcpLeg;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);
const GET: &[u8] = b"GET / HTTP/1.1\r\nUser-Agent: x\r\nHost: web.internal:8080\r\n\r\n";

fn sni(name: &str) -> Sniffed {
    Sniffed::Sni(crate::model::flow::HostName::new(name).unwrap())
}

fn host(name: &str) -> Sniffed {
    Sniffed::Host(crate::model::flow::HostName::new(name).unwrap())
}

fn found(bytes: &[u8]) -> Sniffed {
    match parse(bytes) {
        Parse::Done(found) => found,
        Parse::More => panic!("{} bytes are not whole", bytes.len()),
    }
}

/// The records that rustls opens a connection with.
fn hello_of(name: &str, fragment: Option<usize>) -> Vec<u8> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.max_fragment_size = fragment;
    let name = name.to_owned().try_into().unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut out = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut out).unwrap();
    }
    out
}

/// What rustls's own server reads.
fn by_rustls(mut records: &[u8]) -> Option<String> {
    let mut acceptor = Acceptor::default();
    while !records.is_empty() {
        acceptor.read_tls(&mut records).unwrap();
        if let Some(accepted) = acceptor.accept().ok()? {
            return accepted.client_hello().server_name().map(str::to_owned);
        }
    }
    None
}

fn prefixed(length: usize, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).unwrap().to_be_bytes();
    [&size[4 - length..], bytes].concat()
}

fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &prefixed(2, data)].concat()
}

fn name_extension(names: &[(u8, &[u8])]) -> Vec<u8> {
    let list: Vec<u8> =
        names.iter().flat_map(|(kind, name)| [&[*kind][..], &prefixed(2, name)].concat()).collect();
    extension(0, &prefixed(2, &list))
}

/// A ClientHello as the oldest clients of TLS 1.2 send it, in one record.
fn hello(extensions: Option<&[u8]>) -> Vec<u8> {
    let mut body =
        [&[3, 3][..], &[7; 32], &prefixed(1, &[9; 32]), &prefixed(2, &[0, 0x2f]), &[1, 0]].concat();
    if let Some(extensions) = extensions {
        body.extend(prefixed(2, extensions));
    }
    record(22, &[&[1][..], &prefixed(3, &body)].concat())
}

fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 3, 1][..], &prefixed(2, payload)].concat()
}

#[test]
fn tls_clients_say_where_they_want_to_go() {
    let records = hello_of("Web.Internal", None);
    assert_eq!(found(&records), sni("web.internal"));
    assert_eq!(by_rustls(&records).as_deref(), Some("web.internal"));
    assert_eq!(found(&hello_of("a.b.c.example", Some(64))), sni("a.b.c.example"), "in many records");
    // Nobody's business but the server's: no signature_algorithms, a cipher from long ago, GREASE (RFC 8701).
    let old = hello(Some(&[extension(0x1a1a, &[]), name_extension(&[(0, b"old.internal")])].concat()));
    assert_eq!(found(&old), sni("old.internal"));
    assert_eq!(by_rustls(&old), None);
}

#[test]
fn what_names_nothing_or_two_things_is_nothing_found() {
    let name = || name_extension(&[(0, b"a.internal")]);
    for (what, records) in [
        ("no extensions at all", hello(None)),
        ("no name", hello(Some(&extension(16, b"\0\x03\x02h2")))),
        ("an address", hello(Some(&name_extension(&[(0, b"10.0.0.1")])))),
        ("no host name", hello(Some(&name_extension(&[(0, b"a b")])))),
        ("an empty name", hello(Some(&name_extension(&[(0, b"")])))),
        ("another type of name", hello(Some(&name_extension(&[(1, b"a.internal")])))),
        ("two names", hello(Some(&name_extension(&[(0, b"a.internal"), (0, b"b.internal")])))),
        ("two extensions", hello(Some(&[name(), name()].concat()))),
        ("an extension that is longer than the hello", hello(Some(b"\0\0\xff\xff"))),
        ("bytes behind the list", hello(Some(&extension(0, b"\0\x04\0\0\x01ax")))),
        ("an alert", record(21, &[2, 40])),
        ("a ServerHello", record(22, &[2, 0, 0, 0])),
        ("an empty record", record(22, &[])),
        ("a record that is too long", vec![22, 3, 1, 0x40, 1]),
        ("a hello that is too long", record(22, &[1, 1, 0, 0])),
        ("another version of records", vec![22, 2]),
        ("data in the middle", [&record(22, &[1, 0, 1, 0])[..], &record(23, b"x")].concat()),
    ] {
        assert_eq!(found(&records), Sniffed::Nothing, "{what}");
    }
}

#[test]
fn http_requests_say_where_they_want_to_go() {
    for (request, wanted) in [
        ("GET / HTTP/1.1\r\nHost: Web.Internal\r\n\r\n", host("web.internal")),
        ("GET / HTTP/1.0\r\nhost: web.internal.:8080 \r\n\r\n", host("web.internal")),
        ("GET http://one.internal:81/x?y HTTP/1.1\r\nHost: two.internal\r\n\r\n", host("one.internal")),
        ("GET HTTP://one.internal HTTP/1.0\r\n\r\n", host("one.internal")),
        ("CONNECT one.internal:443 HTTP/1.1\r\nHost: one.internal:443\r\n\r\n", host("one.internal")),
        ("OPTIONS * HTTP/1.1\r\nHost: a_b.internal\r\n\r\n", host("a_b.internal")),
        ("M-SEARCH * HTTP/1.1\r\nHost: a.internal\r\n\r\n", host("a.internal")),
        ("GET /?u=http://b.internal/ HTTP/1.1\r\nHost: a.internal\r\n\r\n", host("a.internal")),
        ("GET / HTTP/1.1\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost: 10.0.0.1:80\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost: me@a.internal\r\n\r\n", Sniffed::Nothing),
        ("GET http://me@a.internal/ HTTP/1.1\r\nHost: a.internal\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost: a.internal\r\nHost: a.internal\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost : a.internal\r\n\r\n", Sniffed::Nothing),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Sniffed::Nothing),
    ] {
        assert_eq!(found(request.as_bytes()), wanted, "{request:?}");
    }
    let many = "x: y\r\n".repeat(crate::transport::h1::FIELDS_MAX);
    let request = format!("GET / HTTP/1.1\r\nHost: a.internal\r\n{many}\r\n");
    assert_eq!(found(request.as_bytes()), Sniffed::Nothing, "more fields than anybody reads");
}

#[test]
fn what_is_neither_is_known_by_its_first_bytes() {
    for bytes in [
        &b"\0\0\0\x08\x04\xd2\x16\x2f"[..],
        b"*1\r\n",
        b"get / HTTP/1.1",
        b"SSH-2.0-x",
        b"PING\r\n",
        b"EHLO client.internal\r\n",
        b"\x80",
        b"\r\nGET",
        b"\x15\x03",
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    ] {
        assert_eq!(parse(bytes), Parse::Done(Sniffed::Nothing), "{bytes:?}");
    }
    for bytes in [&b""[..], b"\x16", b"\x16\x03", b"G", b"GET", b"GET / HTTP/1.1\r\nHost: a.internal\r\n"] {
        assert_eq!(parse(bytes), Parse::More, "{bytes:?}");
    }
}

/// Records that carry `message`, cut at these places.
fn cut(message: &[u8], places: &[usize]) -> Vec<u8> {
    let mut places: Vec<_> = places.iter().map(|place| place % message.len()).filter(|p| *p > 0).collect();
    places.push(message.len());
    places.sort_unstable();
    places.dedup();
    let from = |i: usize| i.checked_sub(1).map_or(0, |before| places[before]);
    places.iter().enumerate().flat_map(|(i, to)| record(22, &message[from(i)..*to])).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _verdict = parse(&bytes);
    }

    #[test]
    fn no_bytes_behind_a_good_beginning_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200), lie in any::<u8>(), at in any::<prop::sample::Index>(),
    ) {
        let _verdict = parse(&record(22, &[&[1][..], &prefixed(3, &bytes)].concat()));
        let _verdict = parse(&hello(Some(&bytes)));
        let mut records = hello(Some(&name_extension(&[(0, b"a.internal")])));
        let at = at.index(records.len());
        records[at] = lie;
        let _verdict = parse(&records);
    }

    #[test]
    fn wherever_a_hello_is_cut_into_records_and_reads_it_says_the_same(
        name in "[a-z]{1,10}(\\.[a-z]{1,10}){0,3}",
        places in proptest::collection::vec(any::<usize>(), 0..6),
        padding in 0usize..600,
        behind in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let extensions = [extension(21, &vec![0; padding]), name_extension(&[(0, name.as_bytes())])].concat();
        let records = cut(&hello(Some(&extensions))[5..], &places);
        let whole = [&records[..], &behind].concat();
        for end in 0..records.len() {
            prop_assert_eq!(parse(&whole[..end]), Parse::More, "cut at {}", end);
        }
        for end in records.len()..=whole.len() {
            prop_assert_eq!(parse(&whole[..end]), Parse::Done(sni(&name)));
        }
    }

    #[test]
    fn where_rustls_reads_a_name_so_do_we(name in "[a-z]([a-z0-9-]{0,8}[a-z0-9])?(\\.[a-z]{1,8}){0,3}", split in 32usize..200) {
        let records = hello_of(&name, Some(split));
        prop_assert_eq!(by_rustls(&records), Some(name.clone()));
        prop_assert_eq!(parse(&records), Parse::Done(sni(&name)));
    }

    #[test]
    fn wherever_a_request_is_cut_it_says_the_same(
        name in "[a-z]{1,10}\\.internal", value in "[ -~]{0,20}", behind in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let head = format!("POST /x HTTP/1.1\r\nx-y: {value}\r\nHost: {name}:80\r\n\r\n");
        let whole: Vec<u8> = head.bytes().chain(behind).collect();
        for end in 0..head.len() {
            prop_assert_eq!(parse(&whole[..end]), Parse::More, "cut at {}", end);
        }
        for end in head.len()..=whole.len() {
            prop_assert_eq!(parse(&whole[..end]), Parse::Done(host(&name)));
        }
    }
}

async fn pair() -> (TcpStream, TcpLeg) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    client.set_nodelay(true).unwrap();
    (client, TcpLeg::new(listener.accept().await.unwrap().0))
}

fn drained(mut queue: Queue) -> Vec<u8> {
    let mut out = Vec::new();
    while queue.front_len() > 0 {
        out.extend_from_slice(&queue.take(usize::MAX));
    }
    out
}

#[tokio::test]
async fn every_byte_that_was_read_is_handed_on_however_they_came() {
    let records = hello_of("web.internal", Some(64));
    let (mut client, mut leg) = pair().await;
    let mut early = Queue::default();
    early.push(records[..2].to_vec().into());
    let dripped = async {
        for byte in &records[2..] {
            client.write_all(&[*byte]).await.unwrap();
            // A segment each: the other side looks in between.
            tokio::task::yield_now().await;
        }
    };
    let (found, ()) = tokio::join!(sniff(&mut leg, &mut early, PATIENCE), dripped);
    assert_eq!(found.unwrap(), sni("web.internal"));
    assert_eq!(drained(early), records);
}

#[tokio::test]
async fn what_came_before_may_be_enough() {
    let (_client, mut leg) = pair().await;
    let mut early = Queue::default();
    early.push(GET.into());
    assert_eq!(sniff(&mut leg, &mut early, PATIENCE).await.unwrap(), host("web.internal"));
    assert_eq!(drained(early), GET);
}

#[tokio::test]
async fn a_silent_client_is_waited_for_no_longer_than_the_limit() {
    const LIMIT: Duration = Duration::from_millis(50);
    let (mut client, mut leg) = pair().await;
    for start in [&b""[..], &GET[..9]] {
        client.write_all(start).await.unwrap();
        let (started, mut early) = (Instant::now(), Queue::default());
        assert_eq!(sniff(&mut leg, &mut early, LIMIT).await.unwrap(), Sniffed::Nothing);
        assert!(started.elapsed() >= LIMIT);
        assert_eq!(drained(early), start);
    }
}

#[tokio::test]
async fn an_end_is_nothing_found_and_is_still_there_and_a_reset_is_a_reset() {
    for start in [&b""[..], &GET[..9]] {
        let (mut client, mut leg) = pair().await;
        client.write_all(start).await.unwrap();
        SockRef::from(&client).shutdown(Shutdown::Write).unwrap();
        let mut early = Queue::default();
        assert_eq!(sniff(&mut leg, &mut early, PATIENCE).await.unwrap(), Sniffed::Nothing);
        assert_eq!(drained(early), start);
        assert!(poll_fn(|cx| leg.poll_recv(cx)).await.unwrap().is_none());
    }
    let (client, mut leg) = pair().await;
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let broken = sniff(&mut leg, &mut Queue::default(), PATIENCE).await.unwrap_err();
    assert!(
        matches!(broken, Broken::Reset(crate::relay::Cause::Tcp(e)) if e.kind() == io::ErrorKind::ConnectionReset)
    );
}

#[tokio::test]
async fn no_more_is_read_than_a_hello_can_take() {
    let (mut client, mut leg) = pair().await;
    let endless = async {
        client.write_all(b"GET /").await.unwrap();
        // Until nobody reads any more.
        while timeout(Duration::from_millis(200), client.write_all(&[b'x'; 4096])).await.is_ok() {}
    };
    let mut early = Queue::default();
    let (found, ()) = tokio::join!(sniff(&mut leg, &mut early, PATIENCE), endless);
    assert_eq!(found.unwrap(), Sniffed::Nothing);
    let read = drained(early).len();
    assert!((BYTES_MAX..BYTES_MAX + 64 * 1024).contains(&read), "{read}");
}
