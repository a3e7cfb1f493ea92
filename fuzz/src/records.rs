//! A TLS 1.3 record session against a scripted peer.
//!
//! The peer is rustls for the handshake; after it the peer seals whatever the input says with the keys of the connection,
//! so that what lies behind the encryption (content types, padding, handshake messages, alerts) is reached too.

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock},
};

use aws_lc_rs::aead::{self, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::{
    ClientConfig, ConnectionTrafficSecrets, RootCertStore, ServerConfig,
    crypto::aws_lc_rs as provider,
    pki_types::{PrivateKeyDer, ServerName},
    version::TLS13,
};
use tokio::{io::duplex, runtime};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tunnel::transport::record::{Next, PLAIN_MAX, Session, accept, connect};

const NAME: &str = "gw.internal";
/// In front of a record: type, version, length.
const HEADER: usize = 5;
const TAG: usize = 16;
/// What a session may hold to be sent: its buffer has eight full records, and some room beside them.
const UNSENT_MAX: usize = 9 * (HEADER + PLAIN_MAX + 1 + TAG);
/// Steps of one input.
const STEPS_MAX: usize = 512;

/// Runs the script that `input` is.
pub(super) fn run(input: &[u8]) {
    let Some((role, script)) = input.split_first() else { return };
    let (mut session, peer) = establish(role & 1 == 0);
    let mut script = Script(script);
    let mut model = Model::new(peer);
    for _ in 0..STEPS_MAX {
        let Some(step) = script.byte() else { break };
        match step % 9 {
            0 => {
                let len = usize::from(script.word()) % (PLAIN_MAX + 64);
                model.seal(DATA, &pattern(model.sealed, len));
            }
            1 => {
                let content = script.byte().unwrap_or(DATA);
                let len = script.byte().unwrap_or(0);
                model.seal(content, script.bytes(len.into()));
            }
            2 => {
                let len = script.byte().unwrap_or(0);
                model.tamper(script.bytes(len.into()));
            }
            3 => model.flip(script.word().into(), script.byte().unwrap_or(1)),
            4 | 5 => {
                let most = script.word().into();
                model.deliver(&mut session, most, script.byte().unwrap_or(0).into());
            }
            6 => {
                let len = usize::from(script.word());
                let (one, two) = (pattern(model.written, len), pattern(model.written + len as u64, 7));
                let parts = [std::io::IoSlice::new(&one), std::io::IoSlice::new(&two)];
                if let Ok(n) = session.write(&parts) {
                    assert!(!model.said_end, "data behind an end");
                    model.written += n as u64;
                }
            }
            7 => {
                // An end that finds no room is said again by the stream; the session counts it as said.
                let _full = session.end();
                model.said_end = true;
            }
            _ => model.take_sent(&mut session),
        }
        assert!(session.unsent().len() <= UNSENT_MAX, "{} bytes unsent", session.unsent().len());
    }
    model.deliver(&mut session, usize::MAX, usize::MAX);
    model.take_sent(&mut session);
}

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
const KEY_UPDATE: u8 = 24;

/// The input, as it is used up.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte().unwrap_or(0), self.byte().unwrap_or(0)])
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }
}

/// Bytes that say where in a stream they stand.
fn pattern(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]).collect()
}

/// What the session may do, by what it has been given.
struct Model {
    peer: Peer,
    /// Sealed or made up, and not yet received by the session.
    wire: Vec<u8>,
    /// Bytes of the wire that have been received.
    received: usize,
    /// Where on the wire each record begins that was sealed properly, with what may have been read before it.
    records: Vec<(usize, usize, bool)>,
    /// Bytes of the wire that were changed; once each, as a second change could be back to what was sealed.
    flipped: BTreeSet<usize>,
    /// The plaintext that the session may give, in this order.
    expected: Vec<u8>,
    read: usize,
    sealed: u64,
    /// A close_notify is behind what is expected.
    closed: bool,
    /// From here on nothing on the wire was sealed by the peer for this place.
    tampered: bool,
    failed: bool,
    written: u64,
    said_end: bool,
    /// What the peer has opened of the session's data.
    opened: u64,
    /// The session has replaced its key, or said its last word: what follows is not looked at.
    deaf: bool,
}

impl Model {
    fn new(peer: Peer) -> Self {
        Self {
            peer,
            wire: Vec::new(),
            received: 0,
            records: Vec::new(),
            flipped: BTreeSet::new(),
            expected: Vec::new(),
            read: 0,
            sealed: 0,
            closed: false,
            tampered: false,
            failed: false,
            written: 0,
            said_end: false,
            opened: 0,
            deaf: false,
        }
    }

    /// The peer seals a record.
    fn seal(&mut self, content: u8, plain: &[u8]) {
        self.records.push((self.wire.len(), self.expected.len(), self.closed));
        let record = self.peer.seal(content, plain);
        self.wire.extend(record);
        if self.tampered || self.closed {
            return;
        }
        // The type is the last byte that is not zero (RFC 8446 section 5.4).
        let inner = [plain, &[content]].concat();
        let Some(last) = inner.iter().rposition(|b| *b != 0) else { return };
        match (inner[last], &inner[..last]) {
            (DATA, data) if data.len() <= PLAIN_MAX => {
                self.expected.extend_from_slice(data);
                self.sealed += data.len() as u64;
            }
            (ALERT, [_, 0]) => self.closed = true,
            _ => {}
        }
    }

    /// Somebody on the way adds bytes.
    fn tamper(&mut self, bytes: &[u8]) {
        self.wire.extend_from_slice(bytes);
        self.tampered |= !bytes.is_empty();
    }

    /// Somebody on the way changes a byte.
    fn flip(&mut self, at: usize, bits: u8) {
        let at = self.received + at;
        if at >= self.wire.len() || bits == 0 || !self.flipped.insert(at) {
            return;
        }
        // The two bytes of the version are not looked at, but they are sealed along.
        self.wire[at] ^= bits;
        let (_, expected, closed) =
            self.records.iter().copied().rfind(|(from, ..)| *from <= at).unwrap_or((0, 0, false));
        if !self.tampered || expected < self.expected.len() {
            self.expected.truncate(expected.max(self.read));
            self.closed = closed;
        }
        self.tampered = true;
    }

    /// The session receives up to `most` bytes, and gives what it can, `step` bytes at a time.
    fn deliver(&mut self, session: &mut Session, most: usize, step: usize) {
        let mut left = most.min(self.wire.len() - self.received);
        loop {
            match session.advance() {
                Ok(Next::Data) => {
                    assert!(!self.failed, "data after an error");
                    let n = session.data().len().min(step.max(1));
                    let data = &session.data()[..n];
                    assert!(self.expected[self.read..].starts_with(data), "not what the peer has sealed");
                    self.read += n;
                    session.taken(n);
                }
                Ok(Next::End) => {
                    assert!(self.closed && !self.failed, "an end without close_notify");
                    assert_eq!(self.read, self.expected.len(), "an end before the data is read");
                    return;
                }
                Ok(Next::More) if left == 0 => return,
                Ok(Next::More) => {
                    let room = session.room();
                    assert!(!room.is_empty(), "more is wanted, and there is no room");
                    let n = room.len().min(left);
                    room[..n].copy_from_slice(&self.wire[self.received..self.received + n]);
                    session.received(n);
                    self.received += n;
                    left -= n;
                }
                Err(_) => {
                    self.failed = true;
                    assert!(session.data().is_empty(), "data after an error");
                    assert!(session.advance().is_err(), "an error does not go away");
                    return;
                }
            }
        }
    }

    /// The peer receives what the session has to send.
    fn take_sent(&mut self, session: &mut Session) {
        let unsent = session.unsent().to_vec();
        session.sent(unsent.len());
        assert!(session.unsent().is_empty());
        let mut rest = &unsent[..];
        while !rest.is_empty() && !self.deaf {
            let len = HEADER + usize::from(u16::from_be_bytes([rest[3], rest[4]]));
            let (record, behind) = rest.split_at(len);
            assert_eq!(record[..3], [DATA, 3, 3], "records look like data (RFC 8446 section 5.2)");
            let inner = self.peer.open(record).expect("the session seals with its key");
            let (kind, inner) = inner.split_last().expect("a record has a type");
            match *kind {
                DATA => {
                    assert_eq!(inner, pattern(self.opened, inner.len()), "what was written, in order");
                    self.opened += inner.len() as u64;
                    assert!(self.opened <= self.written);
                }
                ALERT => {
                    assert_eq!(inner.len(), 2);
                    assert!(self.failed || self.said_end, "an alert without a reason");
                    // An error may still be said behind an end.
                    self.deaf = inner[0] == 2;
                }
                HANDSHAKE => {
                    assert_eq!(inner, [KEY_UPDATE, 0, 0, 1, 0]);
                    self.deaf = true;
                }
                other => panic!("a record of type {other}"),
            }
            rest = behind;
        }
    }
}

/// The keys of the peer.
struct Peer {
    tx: Key,
    rx: Key,
}

impl Peer {
    fn seal(&mut self, content: u8, plain: &[u8]) -> Vec<u8> {
        let mut text = [plain, &[content]].concat();
        let len = u16::try_from(text.len() + TAG).expect("short enough").to_be_bytes();
        let header = [DATA, 3, 3, len[0], len[1]];
        let nonce = self.tx.nonce();
        self.tx.key.seal_in_place_append_tag(nonce, Aad::from(header), &mut text).expect("it can be sealed");
        [&header[..], &text].concat()
    }

    fn open(&mut self, record: &[u8]) -> Option<Vec<u8>> {
        let (header, text) = record.split_at(HEADER);
        let mut text = text.to_vec();
        let nonce = self.rx.nonce();
        let plain = self.rx.key.open_in_place(nonce, Aad::from(header), &mut text).ok()?;
        Some(plain.to_vec())
    }
}

struct Key {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    seq: u64,
}

impl Key {
    fn new((seq, secrets): (u64, ConnectionTrafficSecrets)) -> Self {
        let ConnectionTrafficSecrets::Aes128Gcm { key, iv } = secrets else { panic!("the only suite") };
        let key = UnboundKey::new(&aead::AES_128_GCM, key.as_ref()).expect("its length");
        Self { key: LessSafeKey::new(key), iv: iv.as_ref().try_into().expect("its length"), seq }
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, seq) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.seq.to_be_bytes()) {
            *byte ^= seq;
        }
        self.seq += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

struct Setup {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    runtime: runtime::Runtime,
}

/// One suite and one group: what is agreed on is not what is tried here.
static SETUP: LazyLock<Setup> = LazyLock::new(|| {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
    let (cert, key) =
        (made.cert.der().clone(), PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into()));
    let mut roots = RootCertStore::empty();
    roots.add(cert.clone()).expect("a certificate");
    let mut crypto = provider::default_provider();
    crypto.cipher_suites = vec![provider::cipher_suite::TLS13_AES_128_GCM_SHA256];
    crypto.kx_groups = vec![provider::kx_group::X25519];
    let crypto = Arc::new(crypto);
    let client = ClientConfig::builder_with_provider(Arc::clone(&crypto)).with_protocol_versions(&[&TLS13]);
    let mut client = client.expect("TLS 1.3").with_root_certificates(roots).with_no_client_auth();
    client.enable_secret_extraction = true;
    client.resumption = rustls::client::Resumption::disabled();
    let server =
        ServerConfig::builder_with_provider(crypto).with_protocol_versions(&[&TLS13]).expect("TLS 1.3");
    let mut server = server.with_no_client_auth().with_single_cert(vec![cert], key).expect("a key");
    server.enable_secret_extraction = true;
    server.send_tls13_tickets = 0;
    let runtime = runtime::Builder::new_current_thread().build().expect("a runtime");
    Setup { client: Arc::new(client), server: Arc::new(server), runtime }
});

/// A session after its handshake, as either side, and its peer's keys.
fn establish(as_client: bool) -> (Session, Peer) {
    let Setup { client, server, runtime } = &*SETUP;
    let name = ServerName::try_from(NAME).expect("a name");
    runtime.block_on(async {
        let (near, far) = duplex(64 * 1024);
        let (session, secrets) = if as_client {
            let theirs = TlsAcceptor::from(Arc::clone(server)).accept(far);
            let (ours, theirs) = tokio::join!(connect(Arc::clone(client), name, near), theirs);
            let ((stream, _), theirs) = (ours.expect("a handshake"), theirs.expect("a handshake"));
            (stream.into_parts().1, theirs.into_inner().1.dangerous_extract_secrets())
        } else {
            let theirs = TlsConnector::from(Arc::clone(client)).connect(name, near);
            let (ours, theirs) = tokio::join!(accept(server, far), theirs);
            let (stream, _) = ours.map_err(|(e, _)| e).expect("a handshake");
            let theirs = theirs.expect("a handshake");
            (stream.into_parts().1, theirs.into_inner().1.dangerous_extract_secrets())
        };
        let secrets = secrets.expect("it was asked for");
        (session, Peer { tx: Key::new(secrets.tx), rx: Key::new(secrets.rx) })
    })
}
