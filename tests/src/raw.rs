//! A peer that speaks HTTP/2 frame by frame (RFC 9113 section 4.1). It enforces no rule of the protocol, so that a test
//! can break any.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{PATIENCE, peer, pki::Credentials, world::NET4};

/// DATA.
pub const DATA: u8 = 0;
/// HEADERS.
pub const HEADERS: u8 = 1;
/// RST_STREAM.
pub const RST_STREAM: u8 = 3;
/// SETTINGS.
pub const SETTINGS: u8 = 4;
/// PING.
pub const PING: u8 = 6;
/// GOAWAY.
pub const GOAWAY: u8 = 7;
/// WINDOW_UPDATE.
pub const WINDOW_UPDATE: u8 = 8;
/// CONTINUATION.
pub const CONTINUATION: u8 = 9;
/// What a client sends first.
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The flag of SETTINGS and PING.
pub const ACK: u8 = 1;
/// The flag of DATA and HEADERS.
pub const END_STREAM: u8 = 1;
/// The flag of HEADERS and CONTINUATION.
pub const END_HEADERS: u8 = 4;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its type.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// The stream it is on.
    pub stream: u32,
    /// What it carries.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The error code of a RST_STREAM or GOAWAY frame.
    pub fn code(&self) -> Option<u32> {
        let at = match self.kind {
            RST_STREAM => 0,
            GOAWAY => 4,
            _ => return None,
        };
        Some(u32::from_be_bytes(self.payload.get(at..at + 4)?.try_into().ok()?))
    }
}

/// The half that sends.
pub struct Sender(Box<dyn AsyncWrite + Unpin>);

/// The half that receives.
pub struct Receiver(Box<dyn AsyncRead + Unpin>);

/// Both, of one stream.
fn halves(stream: impl AsyncRead + AsyncWrite + 'static) -> (Sender, Receiver) {
    let (read, write) = tokio::io::split(stream);
    (Sender(Box::new(write)), Receiver(Box::new(read)))
}

/// TLS, the preface, and empty SETTINGS.
pub async fn connect(gateway: SocketAddr, who: &Credentials) -> Result<(Sender, Receiver)> {
    let tcp = TcpStream::connect(gateway).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::IpAddress(NET4.into());
    let tls = TlsConnector::from(peer::tls(who)?).connect(name, tcp).await.context("TLS")?;
    let (mut sender, receiver) = halves(tls);
    sender.bytes(&PREFACE).await?;
    sender.frame(SETTINGS, 0, 0, &[]).await?;
    Ok((sender, receiver))
}

/// The other side of it: takes a client's preface, and sends these SETTINGS.
pub async fn accept(
    stream: impl AsyncRead + AsyncWrite + 'static,
    settings: &[u8],
) -> Result<(Sender, Receiver)> {
    let (mut sender, mut receiver) = halves(stream);
    let mut preface = [0; PREFACE.len()];
    timeout(PATIENCE, receiver.0.read_exact(&mut preface)).await.context("waiting for the preface")??;
    ensure!(preface == PREFACE, "it begins with {:?}", String::from_utf8_lossy(&preface));
    sender.frame(SETTINGS, 0, 0, settings).await?;
    Ok((sender, receiver))
}

/// Waits until the windows of a gateway are as wide as it opens them: a stream's once its SETTINGS are acknowledged,
/// the connection's with a WINDOW_UPDATE of its own (RFC 9113 sections 6.9.2, 6.9.1). Whoever sends more before
/// violates flow control.
pub async fn settle(sender: &mut Sender, receiver: &mut Receiver) -> Result<()> {
    let settings = receiver.frame().await?.context("no SETTINGS")?;
    ensure!(settings.kind == SETTINGS, "its first frame is {settings:?}");
    sender.frame(SETTINGS, ACK, 0, &[]).await?;
    loop {
        let frame = receiver.frame().await?.context("no WINDOW_UPDATE")?;
        if (frame.kind, frame.stream) == (WINDOW_UPDATE, 0) {
            return Ok(());
        }
    }
}

impl Sender {
    /// Sends bytes as they are.
    pub async fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        timeout(PATIENCE, self.0.write_all(bytes)).await.context("the peer takes no more")??;
        timeout(PATIENCE, self.0.flush()).await.context("the peer takes no more")??;
        Ok(())
    }

    /// Sends a frame.
    pub async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Result<()> {
        self.bytes(&encode(kind, flags, stream, payload)).await
    }
}

/// A frame's bytes.
pub fn encode(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("frames are short").to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// The header block of a CONNECT request (RFC 7541: literals without indexing, no Huffman code).
pub fn connect_block(authority: &str) -> Vec<u8> {
    // The static table has :authority at 1 and :method at 2.
    let mut out = vec![2, 7];
    out.extend(b"CONNECT");
    out.push(1);
    out.push(u8::try_from(authority.len()).expect("authorities are short"));
    out.extend(authority.as_bytes());
    out
}

/// A field of a header block, by whatever name: a literal without indexing, no Huffman code.
pub fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = vec![0];
    for text in [name, value] {
        length(text.len(), &mut out);
        out.extend(text);
    }
    out
}

/// A string's length (RFC 7541 sections 5.1, 5.2).
fn length(mut n: usize, out: &mut Vec<u8>) {
    const PREFIX: usize = 127;
    let low = |n: usize| u8::try_from(n & 127).expect("seven bits");
    if n < PREFIX {
        out.push(low(n));
        return;
    }
    out.push(127);
    n -= PREFIX;
    while n > 127 {
        out.push(low(n) | 128);
        n >>= 7;
    }
    out.push(low(n));
}

/// The status at the front of a response's header block, as an encoder writes it that has not sent this one before on
/// its connection: by the static table, or its digits, in the Huffman code (RFC 7541 appendices A, B) or not.
pub fn status(block: &[u8]) -> Option<u16> {
    let (first, rest) = block.split_first()?;
    match first {
        0x88 => return Some(200),
        0x8c => return Some(400),
        0x8d => return Some(404),
        0x8e => return Some(500),
        // A literal with the name at 8, to be indexed or not.
        0x48 | 0x08 => {}
        _ => return None,
    }
    let (length, text) = rest.split_first()?;
    let text = text.get(..usize::from(length & 127))?;
    if length & 128 == 0 {
        return std::str::from_utf8(text).ok()?.parse().ok();
    }
    let mut bits = text.iter().flat_map(|byte| (0..8).rev().map(move |bit| u16::from(byte >> bit & 1)));
    let mut digit = || {
        let five = bits.by_ref().take(5).fold(0, |sum, bit| sum * 2 + bit);
        // 0, 1 and 2 take five bits, the others six.
        if five <= 2 { Some(five) } else { (five * 2 + bits.next()?).checked_sub(22).filter(|d| *d <= 9) }
    };
    Some(digit()? * 100 + digit()? * 10 + digit()?)
}

impl Receiver {
    /// The next frame; `None` when the peer has closed the connection, in whatever way.
    pub async fn frame(&mut self) -> Result<Option<Frame>> {
        let mut head = [0; 9];
        let got = timeout(PATIENCE, self.0.read_exact(&mut head)).await.context("waiting for a frame")?;
        if got.is_err() {
            return Ok(None);
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length)?];
        if timeout(PATIENCE, self.0.read_exact(&mut payload)).await.context("waiting for a frame")?.is_err() {
            return Ok(None);
        }
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        Ok(Some(Frame { kind: head[3], flags: head[4], stream, payload }))
    }

    /// Every frame until the peer closes the connection.
    pub async fn to_the_end(mut self) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        while let Some(frame) = self.frame().await? {
            frames.push(frame);
        }
        Ok(frames)
    }
}
