//! The TLS handshake: rustls decides, this moves its bytes. The caller bounds the time.
//!
//! # Invariants
//! - A handshake that fails has sent its alert, as far as the peer reads.
//! - What follows the handshake is not lost.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use rustls::{
    CipherSuite, ClientConfig, CommonState, Error, ExtractedSecrets, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::{CertificateDer, ServerName},
    server::{ClientHello, ResolvesServerCert, ServerConnectionData, UnbufferedServerConnection},
    sign::CertifiedKey,
    unbuffered::{AppDataRecord, ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{CIPHERTEXT_MAX, Pace, Session, Stage, TlsStream, buffer::Buffer, session::Kernel};

/// What both sides agreed on, and what the peer has shown.
#[derive(Debug)]
pub struct Agreed {
    /// The protocol above (ALPN, RFC 7301).
    pub alpn: Option<Vec<u8>>,
    /// The peer's certificate, and those behind it.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The cipher suite.
    pub suite: Option<CipherSuite>,
    /// The name by which a client asked for us (SNI, RFC 6066 section 3).
    pub server_name: Option<Box<str>>,
}

/// Shakes hands as the client.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    mut below: S,
) -> io::Result<(TlsStream<S>, Agreed)> {
    let conn = UnbufferedClientConnection::new(config, name).map_err(to_io)?;
    let (session, agreed) = shake(conn, &mut below, None).await?;
    Ok((TlsStream::new(below, session), agreed))
}

/// Shakes hands as the server.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    config: &ServerConfig,
    below: S,
) -> Result<(TlsStream<S>, Agreed), (io::Error, S)> {
    accept_at(config, below, &Pace::default()).await
}

/// Shakes hands as the server, at its `pace` among others. The stream comes back with the error: there may be something to read
/// on it.
pub async fn accept_at<S: AsyncRead + AsyncWrite + Unpin>(
    config: &ServerConfig,
    mut below: S,
    pace: &Pace,
) -> Result<(TlsStream<S>, Agreed), (io::Error, S)> {
    // rustls tells the name that was asked for to nobody but who picks the certificate.
    let asked = Arc::new(RequestedName { pick: Arc::clone(&config.cert_resolver), name: OnceLock::new() });
    let mut config = config.clone();
    config.cert_resolver = Arc::clone(&asked) as Arc<dyn ResolvesServerCert>;
    let shaken = match UnbufferedServerConnection::new(Arc::new(config)) {
        Ok(conn) => shake(conn, &mut below, Some(pace)).await,
        Err(e) => Err(to_io(e)),
    };
    match shaken {
        Ok((session, agreed)) => {
            let server_name = asked.name.get().cloned();
            Ok((TlsStream::new(below, session), Agreed { server_name, ..agreed }))
        }
        Err(e) => Err((e, below)),
    }
}

/// Whoever picks the certificate, and the name that he was told.
#[derive(Debug)]
struct RequestedName {
    pick: Arc<dyn ResolvesServerCert>,
    name: OnceLock<Box<str>>,
}

impl ResolvesServerCert for RequestedName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Some(name) = hello.server_name() {
            self.name.get_or_init(|| name.into());
        }
        self.pick.resolve(hello)
    }
}

/// rustls's connection, of either side.
trait Unbuffered {
    type Data;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn state(&self) -> &CommonState;

    fn into_kernel(self) -> Result<(ExtractedSecrets, Kernel), Error>;
}

impl Unbuffered for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn state(&self) -> &CommonState {
        self
    }

    fn into_kernel(self) -> Result<(ExtractedSecrets, Kernel), Error> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Kernel::Client(kernel)))
    }
}

impl Unbuffered for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn state(&self) -> &CommonState {
        self
    }

    fn into_kernel(self) -> Result<(ExtractedSecrets, Kernel), Error> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Kernel::Server(kernel)))
    }
}

/// What rustls wants next.
enum Step {
    Again,
    Send,
    Receive,
    Ended,
    Done,
    Failed(io::Error),
}

async fn shake<C: Unbuffered, S: AsyncRead + AsyncWrite + Unpin>(
    mut conn: C,
    below: &mut S,
    pace: Option<&Pace>,
) -> io::Result<(Session, Agreed)> {
    // Of both at most what one buffer holds: a flight of certificates, and the peer's first data.
    let (mut received, mut to_send, mut early) = (Buffer::take(), Vec::new(), Vec::new());
    let mut ended = false;
    loop {
        let step = match pace {
            Some(pace) if has_record(received.filled()) => {
                pace.reached(Stage::Spoken);
                pace.in_turn(|| compute(&mut conn, &mut received, &mut to_send, &mut early)).await
            }
            _ => compute(&mut conn, &mut received, &mut to_send, &mut early),
        };
        match step {
            Step::Again => {}
            // All that the peer has to say may come at once.
            Step::Ended if !conn.state().is_handshaking() => ended = true,
            Step::Ended => return Err(closed()),
            Step::Send => {
                send(below, &mut to_send).await?;
                if let Some(pace) = pace {
                    pace.reached(Stage::Answered);
                }
            }
            Step::Receive => receive(below, &mut received).await?,
            // A server may be let speak before the client has finished.
            Step::Done if conn.state().is_handshaking() => receive(below, &mut received).await?,
            Step::Done => break,
            Step::Failed(why) => {
                say_why(&mut conn, &why, &mut received, &mut to_send);
                // It may have gone.
                let _told = send(below, &mut to_send).await;
                return Err(why);
            }
        }
    }
    let state = conn.state();
    let agreed = Agreed {
        alpn: state.alpn_protocol().map(<[u8]>::to_vec),
        certificates: state.peer_certificates().unwrap_or_default().to_vec(),
        suite: state.negotiated_cipher_suite().map(|suite| suite.suite()),
        server_name: None,
    };
    let (secrets, kernel) = conn.into_kernel().map_err(to_io)?;
    let session = Session::new(secrets, kernel, early, received, ended).map_err(io::Error::other)?;
    Ok((session, agreed))
}

/// Whether what has come begins with a whole record: rustls computes with nothing less.
fn has_record(received: &[u8]) -> bool {
    let [_, _, _, high, low, rest @ ..] = received else { return false };
    let len = usize::from(u16::from_be_bytes([*high, *low]));
    // What is too long is an error, and rustls says which.
    len > CIPHERTEXT_MAX || rest.len() >= len
}

/// Has rustls go on with what has come.
fn compute<C: Unbuffered>(
    conn: &mut C,
    received: &mut Buffer,
    to_send: &mut Vec<u8>,
    early: &mut Vec<u8>,
) -> Step {
    let UnbufferedStatus { mut discard, state } = conn.process(received.filled_mut());
    let step = match state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, to_send),
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Step::Send
        }
        Ok(ConnectionState::BlockedHandshake) => Step::Receive,
        Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut step = Step::Again;
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(AppDataRecord { discard: more, payload, .. }) => {
                        discard += more;
                        early.extend_from_slice(payload);
                    }
                    Err(e) => step = Step::Failed(to_io(e)),
                }
            }
            step
        }
        Ok(ConnectionState::PeerClosed) => Step::Ended,
        // Closed; nothing else is switched on.
        Ok(_) => Step::Failed(closed()),
        Err(e) => Step::Failed(to_io(e)),
    };
    received.advance(discard);
    step
}

fn encode<D>(data: &mut EncodeTlsData<'_, D>, to_send: &mut Vec<u8>) -> Step {
    let before = to_send.len();
    let mut needed = 0;
    // RequestedName once how much it is, and then given that.
    for _ in 0..2 {
        to_send.resize(before + needed, 0);
        match data.encode(&mut to_send[before..]) {
            Ok(n) => {
                to_send.truncate(before + n);
                return Step::Again;
            }
            Err(EncodeError::InsufficientSize(size)) => needed = size.required_size,
            Err(EncodeError::AlreadyEncoded) => break,
        }
    }
    to_send.truncate(before);
    Step::Failed(io::Error::other("rustls has nothing to encode"))
}

/// What a failed handshake may leave to be said: a flight that was begun, and the alert.
const MAX_FINAL_RECORDS: usize = 8;

/// The alert that goes with an error.
fn say_why<C: Unbuffered>(conn: &mut C, why: &io::Error, received: &mut Buffer, to_send: &mut Vec<u8>) {
    // A record that cannot be read is still there, and would be read, and complained of, once more; rustls's assertion
    // that it complains once ended the task. Then the alert is all there is to say.
    let once = matches!(
        why.get_ref().and_then(|e| e.downcast_ref()),
        Some(Error::InvalidMessage(_) | Error::PeerSentOversizedRecord | Error::DecryptError)
    );
    for _ in 0..if once { 1 } else { MAX_FINAL_RECORDS } {
        // Messages that wait in it are found there again.
        let Ok(ConnectionState::EncodeTlsData(mut data)) = conn.process(received.filled_mut()).state else {
            return;
        };
        if !matches!(encode(&mut data, to_send), Step::Again) {
            return;
        }
    }
}

async fn send(below: &mut (impl AsyncWrite + Unpin), to_send: &mut Vec<u8>) -> io::Result<()> {
    below.write_all(to_send).await?;
    to_send.clear();
    below.flush().await
}

async fn receive(below: &mut (impl AsyncRead + Unpin), received: &mut Buffer) -> io::Result<()> {
    received.compact();
    if received.room().is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a handshake message is too long"));
    }
    match below.read(received.room()).await? {
        0 => Err(closed()),
        n => {
            received.filled_by(n);
            Ok(())
        }
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection during the TLS handshake")
}

fn to_io(e: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}
