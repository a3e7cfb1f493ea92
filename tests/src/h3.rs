//! A client of HTTP/3 that says what it likes: QUIC by a library, every frame by hand.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use quinn::{
    ClientConfig, Connecting, Connection, ConnectionError, Endpoint, ReadError, RecvStream, SendStream,
    crypto::rustls::QuicClientConfig,
};
use tokio::time::timeout;

use crate::{peer, pki::Credentials, wait::PATIENCE};

/// Frames (RFC 9114 section 7.2).
pub const DATA: u64 = 0x0;
/// A header section.
pub const HEADERS: u64 = 0x1;
/// What an end takes.
pub const SETTINGS: u64 = 0x4;
/// No more requests.
pub const GOAWAY: u64 = 0x7;

/// A connection to a listener.
pub struct Peer {
    /// Streams are opened on it.
    pub connection: Connection,
    endpoint: Endpoint,
    /// Ours, with SETTINGS; its end would be an error.
    control: Option<SendStream>,
}

/// What comes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comes {
    /// An answer with this status.
    Status(u16),
    /// The stream was reset with this code.
    Reset(u64),
    /// The connection was closed with this code.
    Closed(u64),
}

impl Peer {
    /// Begins a handshake, of which the first flight leaves soon. Dropped, it is given up.
    pub fn begin(to: SocketAddr, who: &Credentials) -> Result<(Endpoint, Connecting)> {
        let mut tls = (*peer::tls(who)?).clone();
        tls.alpn_protocols = vec![b"h3".to_vec()];
        let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        let endpoint = Endpoint::client(SocketAddr::from(([0, 0, 0, 0], 0)))?;
        let connecting = endpoint.connect_with(config, to, &to.ip().to_string())?;
        Ok((endpoint, connecting))
    }

    /// Connects, and says nothing. In the network namespace of the listener's clients.
    pub async fn silent(to: SocketAddr, who: &Credentials) -> Result<Self> {
        let (endpoint, connecting) = Self::begin(to, who)?;
        let connection = timeout(PATIENCE, connecting).await??;
        Ok(Self { connection, endpoint, control: None })
    }

    /// The same, with a control stream that says nothing of interest.
    pub async fn connect(to: SocketAddr, who: &Credentials) -> Result<Self> {
        let mut peer = Self::silent(to, who).await?;
        peer.control = Some(peer.one_way(&[&[0][..], &frame(SETTINGS, b"")].concat()).await?);
        Ok(peer)
    }

    /// Opens a stream of one direction with these bytes.
    pub async fn one_way(&self, bytes: &[u8]) -> Result<SendStream> {
        let mut stream = self.connection.open_uni().await?;
        stream.write_all(bytes).await?;
        Ok(stream)
    }

    /// Opens a request with these bytes; it ends behind them, if it is to end.
    pub async fn request(&self, bytes: &[u8], ends: bool) -> Result<(SendStream, RecvStream)> {
        let (mut send, recv) = self.connection.open_bi().await?;
        send.write_all(bytes).await?;
        if ends {
            send.finish()?;
        }
        Ok((send, recv))
    }

    /// What comes of a request.
    pub async fn asks(&self, bytes: &[u8], ends: bool) -> Result<Comes> {
        let (_send, mut recv) = self.request(bytes, ends).await?;
        timeout(PATIENCE, self.comes(&mut recv)).await.context("nothing comes of it")?
    }

    /// What comes on a stream first.
    pub async fn comes(&self, recv: &mut RecvStream) -> Result<Comes> {
        let mut heard = Vec::new();
        loop {
            let mut byte = [0];
            match recv.read(&mut byte).await {
                Ok(Some(_)) => heard.push(byte[0]),
                Ok(None) => bail!("it ended with {heard:?}"),
                Err(ReadError::Reset(code)) => return Ok(Comes::Reset(code.into_inner())),
                Err(ReadError::ConnectionLost(_)) => return self.closed().await.map(Comes::Closed),
                Err(e) => bail!("{e}"),
            }
            // Frames of these lengths have heads of two bytes, or three; the prefix of the section has two; and a status that
            // is in the table, one or two.
            if let [0x01, length, 0, 0, rest @ ..] = &heard[..]
                && heard.len() >= 2 + usize::from(*length & 0x3f)
            {
                return status(rest).map(Comes::Status).with_context(|| format!("no status: {heard:x?}"));
            }
            if let [0x01, long, low, 0, 0, rest @ ..] = &heard[..]
                && long & 0xc0 == 0x40
                && heard.len() >= 3 + (usize::from(long & 0x3f) << 8 | usize::from(*low))
            {
                return status(rest).map(Comes::Status).with_context(|| format!("no status: {heard:x?}"));
            }
        }
    }

    /// The code with which the listener closes the connection.
    pub async fn closed(&self) -> Result<u64> {
        match timeout(PATIENCE, self.connection.closed()).await.context("it is not closed")? {
            ConnectionError::ApplicationClosed(closed) => Ok(closed.error_code.into_inner()),
            other => bail!("{other}"),
        }
    }

    /// Has its packets come from another port from now on, as behind a NAT that has forgotten it.
    pub fn moves(&self) -> Result<()> {
        Ok(self.endpoint.rebind(std::net::UdpSocket::bind("0.0.0.0:0")?)?)
    }

    /// Ends it in order, and has that on the wire.
    pub async fn leaves(self) {
        self.connection.close(0x100_u32.into(), b"");
        let _late = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }
}

/// An integer (RFC 9000 section 16), as short as it can be.
pub fn integer(value: u64) -> Vec<u8> {
    match value {
        0..0x40 => value.to_be_bytes()[7..].to_vec(),
        0x40..0x4000 => (value | 0x4000).to_be_bytes()[6..].to_vec(),
        0x4000..0x4000_0000 => (value | 0x8000_0000).to_be_bytes()[4..].to_vec(),
        _ => (value | 0xc000_0000_0000_0000).to_be_bytes().to_vec(),
    }
}

/// A frame.
pub fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
    [&integer(kind)[..], &integer(payload.len() as u64), payload].concat()
}

/// A HEADERS frame, of fields that no table has (RFC 9204 section 4.5.6).
pub fn headers(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut section = vec![0, 0];
    for (name, value) in fields {
        text(&mut section, 0x20, 3, name);
        text(&mut section, 0, 7, value);
    }
    frame(HEADERS, &section)
}

/// A HEADERS frame that asks for a tunnel.
pub fn connect(authority: &str) -> Vec<u8> {
    headers(&[(":method", "CONNECT"), (":authority", authority)])
}

fn text(out: &mut Vec<u8>, flags: u8, prefix: u32, text: &str) {
    let most = (1_usize << prefix) - 1;
    let low = |n: usize| n.to_le_bytes()[0];
    match text.len().checked_sub(most) {
        None => out.push(flags | low(text.len())),
        Some(mut rest) => {
            out.push(flags | low(most));
            while rest >= 0x80 {
                out.push(low(rest) & 0x7f | 0x80);
                rest >>= 7;
            }
            out.push(low(rest));
        }
    }
    out.extend_from_slice(text.as_bytes());
}

/// The status that a section begins with: by its index in the static table (RFC 9204 appendix A), or as a value.
fn status(section: &[u8]) -> Option<u16> {
    let index = match section {
        // :status is a name of the table, whose index does not fit in four bits, and its value three digits.
        [0x5f, _, 3, a, b, c, ..] => {
            return std::str::from_utf8(&[*a, *b, *c]).ok()?.parse().ok();
        }
        [0xff, more, ..] => 63 + u16::from(*more),
        [first, ..] if first & 0xc0 == 0xc0 => u16::from(first & 0x3f),
        _ => return None,
    };
    let known = [(24, 103), (25, 200), (26, 304), (27, 404), (28, 503), (67, 400), (68, 403), (71, 500)];
    known.iter().find(|(known, _)| *known == index).map(|(_, status)| *status)
}
