//! Against rustls, and against ourselves where a peer has to do what rustls does not.

use std::{fs, sync::Arc};

use proptest::prelude::*;
use rustls::{
    ClientConfig, HandshakeKind, RootCertStore, SupportedCipherSuite,
    crypto::{CryptoProvider, aws_lc_rs::cipher_suite},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::{
    cli::pki::{Ca, IssueRequest, Validity},
    config::Protocol,
    identity::tls::{TlsIdentity, provider},
    model::trust::{ClientCheck, IdentityFiles, ServerCheck},
    transport::record::{CIPHERTEXT_MAX, TlsStream, accept, connect},
};

const NAME: &str = "gw.internal";

/// A certificate for both sides, and the same in PEM.
struct Files {
    identity: TlsIdentity,
    cert: String,
    key: String,
    ca: String,
}

fn files() -> Files {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::generate(Validity::days(1)).unwrap();
    let mut request = IssueRequest::new("spiffe://t.test/both".parse().unwrap());
    request.dns = vec![NAME.to_owned()];
    let issued = ca.issue(&request).unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        path
    };
    let (cert, key) = (file("cert.pem", &issued.cert_pem), file("key.pem", &issued.key_pem));
    let identity = TlsIdentity::load(&IdentityFiles {
        cert,
        key,
        ca: file("ca.pem", ca.cert_pem()),
        insecure_key_permissions: false,
    })
    .unwrap();
    Files { identity, cert: issued.cert_pem.clone(), key: issued.key_pem, ca: ca.cert_pem().to_owned() }
}

fn identity() -> TlsIdentity {
    files().identity
}

/// A client as others configure rustls, which offers one cipher suite.
fn speaks_only(suite: SupportedCipherSuite, files: &Files) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(files.ca.as_bytes()).unwrap()).unwrap();
    let chain = CertificateDer::pem_slice_iter(files.cert.as_bytes()).collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(files.key.as_bytes()).unwrap();
    let provider = CryptoProvider { cipher_suites: vec![suite], ..(*provider()).clone() };
    let config = ClientConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(&[&TLS13]);
    let mut config = config.unwrap().with_root_certificates(roots).with_client_auth_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

fn client(identity: &TlsIdentity) -> Arc<ClientConfig> {
    identity.client_config(&ServerCheck::default(), Protocol::H2)
}

fn server(identity: &TlsIdentity) -> Arc<rustls::ServerConfig> {
    identity.server_config(&ClientCheck::default(), &[Protocol::H2])
}

fn name() -> rustls::pki_types::ServerName<'static> {
    NAME.try_into().unwrap()
}

fn wire() -> (DuplexStream, DuplexStream) {
    duplex(256 * 1024)
}

type Stream = TlsStream<DuplexStream>;

/// Both ends ours: the client's, and the server's.
async fn pair() -> (Stream, Stream) {
    let (identity, (near, far)) = (identity(), wire());
    let config = server(&identity);
    let (near, far) = tokio::join!(connect(client(&identity), name(), near), accept(&config, far));
    (near.unwrap().0, far.map_err(|(e, _)| e).unwrap().0)
}

/// The sessions of both ends, with nothing on the way.
async fn sessions() -> (Session, Session) {
    let (mut near, mut far) = pair().await;
    // The tickets have come by the time that a byte behind them has.
    ping(&mut far, &mut near).await;
    (near.into_parts().1, far.into_parts().1)
}

async fn ping(from: &mut (impl AsyncWrite + Unpin), to: &mut (impl AsyncRead + Unpin)) {
    from.write_all(b"ping").await.unwrap();
    from.flush().await.unwrap();
    let mut got = [0; 4];
    to.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"ping");
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[3]).collect()
}

/// Everything, both ways at once, and each end by itself.
async fn exchange(one: impl AsyncRead + AsyncWrite + Unpin, other: impl AsyncRead + AsyncWrite + Unpin) {
    const BYTES: usize = 3_000_001;
    let (mut one_in, mut one_out) = tokio::io::split(one);
    let (mut other_in, mut other_out) = tokio::io::split(other);
    let sent = pattern(BYTES);
    let send = async |out: &mut (dyn AsyncWrite + Unpin)| {
        let (mut rest, mut step) = (&sent[..], 1);
        while !rest.is_empty() {
            let (chunk, behind) = rest.split_at(step.min(rest.len()));
            out.write_all(chunk).await.unwrap();
            out.flush().await.unwrap();
            (rest, step) = (behind, step * 3 % 100_003 + 1);
        }
        out.shutdown().await.unwrap();
    };
    let (mut there, mut back) = (Vec::new(), Vec::new());
    let ((), (), there_read, back_read) = tokio::join!(
        send(&mut one_out),
        send(&mut other_out),
        other_in.read_to_end(&mut there),
        one_in.read_to_end(&mut back)
    );
    there_read.unwrap();
    back_read.unwrap();
    assert!(there == sent && back == sent);
}

#[tokio::test]
async fn bytes_pass_once_in_order_both_ways_in_either_role_with_every_cipher_suite() {
    let suites: [SupportedCipherSuite; 3] = [
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    let files = files();
    let identity = &files.identity;
    for suite in suites {
        let (near, far) = wire();
        let config = server(identity);
        let connecting = TlsConnector::from(speaks_only(suite, &files)).connect(name(), near);
        let (near, far) = tokio::join!(connecting, accept(&config, far));
        let (far, agreed) = far.map_err(|(e, _)| e).unwrap();
        assert_eq!(agreed.suite, Some(suite.suite()));
        assert_eq!(agreed.server_name.as_deref(), Some(NAME));
        assert_eq!(agreed.alpn.as_deref(), Some(&b"h2"[..]));
        exchange(near.unwrap(), far).await;
    }
    let (near, far) = wire();
    let accepting = TlsAcceptor::from(server(identity)).accept(far);
    let (near, far) = tokio::join!(connect(client(identity), name(), near), accepting);
    exchange(near.unwrap().0, far.unwrap()).await;
}

#[tokio::test]
async fn a_session_resumes_with_a_ticket_that_came_behind_the_handshake() {
    let identity = identity();
    let (client, server) = (client(&identity), server(&identity));
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (near, far) = wire();
        let accepting = TlsAcceptor::from(Arc::clone(&server)).accept(far);
        let (near, far) = tokio::join!(connect(Arc::clone(&client), name(), near), accepting);
        let ((mut near, agreed), mut far) = (near.unwrap(), far.unwrap());
        assert_eq!(far.get_ref().1.handshake_kind(), Some(kind));
        assert_eq!(agreed.certificates.len(), 1, "who it is is known in either case");
        ping(&mut far, &mut near).await;
    }
}

#[tokio::test]
async fn a_new_key_is_followed_and_answered() {
    let identity = identity();
    let (near, far) = wire();
    let accepting = TlsAcceptor::from(server(&identity)).accept(far);
    let (near, far) = tokio::join!(connect(client(&identity), name(), near), accepting);
    let (mut near, mut far) = (near.unwrap().0, far.unwrap());
    for _ in 0..3 {
        // It asks for one of ours too.
        far.get_mut().1.refresh_traffic_keys().unwrap();
        ping(&mut far, &mut near).await;
        ping(&mut near, &mut far).await;
    }
    assert!(near.into_parts().1.tx.records() <= 1, "what we sent last was sealed with a new key");
}

#[tokio::test]
async fn a_key_is_replaced_before_it_has_sealed_too_much() {
    let identity = identity();
    let (near, far) = wire();
    let accepting = TlsAcceptor::from(server(&identity)).accept(far);
    let (near, far) = tokio::join!(connect(client(&identity), name(), near), accepting);
    let (near, far) = (near.unwrap().0, far.unwrap());
    let (below, mut session) = near.into_parts();
    assert_eq!(session.limit, 1 << 24);
    session.limit = 3;
    exchange(TlsStream::new(below, session), far).await;
}

#[tokio::test]
async fn what_comes_with_the_handshake_is_not_lost() {
    let identity = identity();
    let (near, mut far) = wire();
    let connecting = async {
        let (mut near, _) = connect(client(&identity), name(), near).await.unwrap();
        near.write_all(&pattern(40_000)).await.unwrap();
        near.shutdown().await.unwrap();
    };
    // All of it has come before the server looks at any.
    let config = server(&identity);
    let (mut hello, (mut proxy, inner)) = (vec![0; 64 * 1024], wire());
    let relayed = async {
        // The client's first flight, and then nothing until it has sent all that it has.
        let n = far.read(&mut hello).await.unwrap();
        proxy.write_all(&hello[..n]).await.unwrap();
        let n = proxy.read(&mut hello).await.unwrap();
        far.write_all(&hello[..n]).await.unwrap();
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).await.unwrap();
        proxy.write_all(&rest).await.unwrap();
        proxy
    };
    let accepted = async {
        let (mut stream, _) = accept(&config, inner).await.map_err(|(e, _)| e).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        got
    };
    let ((), _proxy, got) = tokio::join!(connecting, relayed, accepted);
    assert!(got == pattern(40_000));
}

#[tokio::test]
async fn an_end_is_close_notify_and_a_stream_that_ends_without_was_cut_off() {
    let (mut near, mut far) = pair().await;
    near.write_all(b"last").await.unwrap();
    near.shutdown().await.unwrap();
    let mut got = Vec::new();
    far.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"last");
    // The other direction goes on.
    ping(&mut far, &mut near).await;
    let (below, _session) = far.into_parts();
    drop(below);
    assert_eq!(near.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    assert_eq!(near.write(b"more").await.unwrap_err().kind(), std::io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn an_altered_record_ends_the_connection_behind_what_came_before_it_and_the_peer_is_told() {
    let (mut near, far) = pair().await;
    let (mut below, mut session) = far.into_parts();
    session.write(&[IoSlice::new(b"good")]).unwrap();
    session.write(&[IoSlice::new(b"bad")]).unwrap();
    let mut records = session.unsent().to_vec();
    *records.last_mut().unwrap() ^= 1;
    below.write_all(&records).await.unwrap();
    let mut got = [0; 100];
    assert_eq!(near.read(&mut got).await.unwrap(), 4);
    for _ in 0..2 {
        let e = near.read(&mut got).await.unwrap_err();
        assert_eq!(e.to_string(), "record cannot be decrypted");
    }
    assert!(near.write(b"x").await.is_err());
    let mut far = TlsStream::new(below, session);
    let e = far.read(&mut got).await.unwrap_err();
    assert_eq!(e.to_string(), "received fatal alert: BadRecordMac");
}

/// Gives a session what its peer has to send.
fn give(to: &mut Session, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let room = to.room();
        let n = room.len().min(bytes.len());
        room[..n].copy_from_slice(&bytes[..n]);
        to.received(n);
        bytes = &bytes[n..];
    }
}

/// A record that says what no session of ours says.
fn seal(from: &mut Session, content: Content, message: &[u8]) -> Vec<u8> {
    let mut record = vec![0; HEADER + message.len() + 1 + TAG];
    let n = from.tx.seal(content, message, &mut record).unwrap();
    assert_eq!(n, record.len());
    record
}

#[tokio::test]
async fn what_has_no_place_after_the_handshake_ends_the_connection() {
    use Content::{Alert, Data, Handshake};
    let update: &[u8] = &[KEY_UPDATE, 0, 0, 1, 0];
    /// A record: what it says that it carries, and what it carries.
    type Said<'a> = (Content, &'a [u8]);
    let cases: &[(&str, &[Said<'_>])] = &[
        ("handshake message after the handshake", &[(Handshake, &[1, 0, 0, 1, 0])]),
        // A server's ticket, said by a client.
        ("handshake message after the handshake", &[(Handshake, &[NEW_SESSION_TICKET, 0, 0, 0])]),
        ("malformed KeyUpdate", &[(Handshake, &[KEY_UPDATE, 0, 0, 1, 2])]),
        ("malformed KeyUpdate", &[(Handshake, &[KEY_UPDATE, 0, 0, 0])]),
        ("malformed KeyUpdate", &[(Handshake, &[KEY_UPDATE, 0, 0, 1, 0, KEY_UPDATE, 0, 0, 1, 0])]),
        ("record of another type within a handshake message", &[(Handshake, &update[..3]), (Data, b"x")]),
        ("malformed alert", &[(Alert, &[1])]),
        ("malformed alert", &[(Alert, &[1, 0, 0])]),
        ("too long", &[(Handshake, &[NEW_SESSION_TICKET, 2, 0, 1])]),
        ("too many empty records", &[(Data, &[] as &[u8]); 1 + EMPTY_MAX as usize]),
        ("too many warning alerts", &[(Alert, &[WARNING, 90] as &[u8]); 1 + WARNINGS_MAX as usize]),
        ("received fatal alert: AccessDenied", &[(Alert, &[FATAL, 49])]),
        ("too long", &[(Data, &[0; PLAIN_MAX + 1])]),
    ];
    for (why, records) in cases {
        let (mut near, mut far) = sessions().await;
        let all: Vec<u8> =
            records.iter().flat_map(|(content, said)| seal(&mut near, *content, said)).collect();
        give(&mut far, &all);
        let e = far.advance().unwrap_err();
        assert!(e.to_string().contains(why), "{why}: {e}");
        assert!(far.advance().is_err() && far.write(&[IoSlice::new(b"x")]).is_err(), "{why}");
        assert_eq!(far.unsent().is_empty(), why.contains("alert: "), "{why}: the peer is told");
    }
    for (why, bytes) in [
        ("not sealed", &[20, 3, 3, 0, 1, 1][..]),
        ("not sealed", &[21, 3, 3, 0, 2, 2, 40]),
        ("too long", &[23, 3, 3, 0x41, 1]),
        ("cannot be decrypted", &[23, 3, 3, 0, 16]),
    ] {
        let (_near, mut far) = sessions().await;
        give(&mut far, bytes);
        let e = far.advance().unwrap_err();
        assert!(e.to_string().contains(why), "{why}: {e}");
    }
    const { assert!(CIPHERTEXT_MAX < 0x4101) };
}

#[tokio::test]
async fn a_peer_that_only_changes_its_keys_is_stopped_and_one_answer_is_enough() {
    let (mut near, mut far) = sessions().await;
    for n in 1..=MESSAGES_MAX + 1 {
        let record = seal(&mut near, Content::Handshake, &[KEY_UPDATE, 0, 0, 1, 1]);
        near.tx = Key::new(near.kernel.next_tx().unwrap()).unwrap();
        give(&mut far, &record);
        match far.advance() {
            Ok(next) => assert_eq!((next, n <= MESSAGES_MAX), (Next::More, true)),
            Err(e) => {
                assert_eq!(n, MESSAGES_MAX + 1);
                assert!(e.to_string().contains("too many handshake messages"), "{e}");
            }
        }
        assert!(far.unsent().len() < 100, "nobody has taken the first answer yet");
    }
}

#[tokio::test]
async fn a_handshake_message_that_comes_byte_by_byte_is_one() {
    let (mut near, mut far) = sessions().await;
    for byte in [KEY_UPDATE, 0, 0, 1, 0] {
        give(&mut far, &seal(&mut near, Content::Handshake, &[byte]));
        assert_eq!(far.advance().unwrap(), Next::More);
    }
    near.tx = Key::new(near.kernel.next_tx().unwrap()).unwrap();
    give(&mut far, &seal(&mut near, Content::Data, b"with the new key"));
    assert_eq!((far.advance().unwrap(), far.data()), (Next::Data, &b"with the new key"[..]));
    assert_eq!(far.message.capacity(), 0, "nothing of it is kept");
}

#[tokio::test]
async fn an_idle_session_holds_no_buffer() {
    let (mut near, mut far) = sessions().await;
    assert_eq!(near.write(&[IoSlice::new(b"some")]).unwrap(), 4);
    let records = near.unsent().to_vec();
    near.sent(records.len());
    give(&mut far, &records[..records.len() - 1]);
    assert_eq!(far.advance().unwrap(), Next::More);
    assert!(far.incoming.is_some(), "a record that is not whole is kept");
    give(&mut far, &records[records.len() - 1..]);
    assert_eq!((far.advance().unwrap(), far.data()), (Next::Data, &b"some"[..]));
    far.taken(4);
    assert_eq!(far.advance().unwrap(), Next::More);
    far.room();
    far.received(0);
    for session in [near, far] {
        assert!(session.incoming.is_none() && session.outgoing.is_none());
        assert!(session.message.capacity() == 0 && session.early.capacity() == 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn records_open_to_what_was_sealed_however_they_are_cut_and_taken(
        parts in proptest::collection::vec(proptest::collection::vec(0usize..40_000, 1..4), 1..12),
        cuts in proptest::collection::vec(1usize..30_000, 1..20),
        takes in proptest::collection::vec(1usize..20_000, 1..20),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (mut near, mut far) = runtime.block_on(sessions());
        let (mut sent, mut records) = (Vec::new(), Vec::new());
        for lens in parts {
            let mut rest: Vec<Vec<u8>> = lens.into_iter().map(pattern).collect();
            while rest.iter().any(|part| !part.is_empty()) {
                let slices: Vec<_> = rest.iter().map(|part| IoSlice::new(part)).collect();
                let n = near.write(&slices).unwrap();
                let flat: Vec<u8> = rest.concat();
                sent.extend_from_slice(&flat[..n]);
                rest = vec![flat[n..].to_vec()];
                let done = near.unsent().len().div_ceil(2);
                records.extend_from_slice(&near.unsent()[..done]);
                near.sent(done);
            }
        }
        near.end().unwrap();
        records.extend_from_slice(near.unsent());
        let (mut got, mut rest) = (Vec::new(), &records[..]);
        let (mut cuts, mut takes) = (cuts.into_iter().cycle(), takes.into_iter().cycle());
        loop {
            match far.advance().unwrap() {
                Next::Data => {
                    let n = far.data().len().min(takes.next().unwrap());
                    got.extend_from_slice(&far.data()[..n]);
                    far.taken(n);
                }
                Next::More => {
                    let room = far.room();
                    let n = cuts.next().unwrap().min(room.len()).min(rest.len());
                    prop_assert!(n > 0, "there is more, and room for it");
                    room[..n].copy_from_slice(&rest[..n]);
                    far.received(n);
                    rest = &rest[n..];
                }
                Next::End => break,
            }
        }
        prop_assert!(got == sent && rest.is_empty());
    }

    #[test]
    fn arbitrary_records_of_a_peer_are_taken_or_refused_for_good(
        records in proptest::collection::vec(
            (0usize..3, prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..40),
                Just(vec![KEY_UPDATE, 0, 0, 1, 1]),
                Just(vec![NEW_SESSION_TICKET, 0, 0, 9, 0, 0, 0]),
                Just(vec![WARNING, 0]),
            ]),
            1..8,
        ),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // A server takes more of a client's than a client of a server's: tickets.
        let (mut far, mut near) = runtime.block_on(sessions());
        let mut failed = false;
        for (content, message) in records {
            let content = [Content::Alert, Content::Handshake, Content::Data][content];
            give(&mut far, &seal(&mut near, content, &message));
            loop {
                match far.advance() {
                    Ok(Next::Data) => {
                        prop_assert!(!failed && far.data() == message, "data is what was sealed as data");
                        far.taken(message.len());
                    }
                    Ok(Next::More) => break,
                    Ok(Next::End) => return Ok(()),
                    Err(_) => {
                        failed = true;
                        break;
                    }
                }
            }
            prop_assert!(!failed || far.advance().is_err());
            if failed {
                break;
            }
            if content == Content::Handshake && message == [KEY_UPDATE, 0, 0, 1, 1] {
                near.tx = Key::new(near.kernel.next_tx().unwrap()).unwrap();
            }
        }
    }

    #[test]
    fn arbitrary_bytes_are_an_error_or_not_enough(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (_near, mut far) = runtime.block_on(sessions());
        give(&mut far, &bytes);
        prop_assert!(!matches!(far.advance(), Ok(Next::Data | Next::End)));
    }
}
