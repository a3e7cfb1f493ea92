//! A gRPC client for streams of messages, over HTTP/2 in plaintext (gRPC's PROTOCOL-HTTP2): a Workload API and a secret
//! discovery service are spoken to over a socket of this node.
//!
//! # Invariants
//! - A message is bounded by [`MESSAGE_MAX`], and what waits for one by the stream's window.

use std::{io, time::Duration};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::{
    RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request, header::CONTENT_TYPE};
use prost::Message;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    task::JoinSet,
    time::timeout,
};

use crate::config::ProviderAddr;

/// The longest message that is taken, which is gRPC's own default.
pub(super) const MESSAGE_MAX: usize = 4 << 20;
/// Of the compression flag and the length, in front of each message.
const PREFIX: usize = 5;
/// How long a provider may take to accept a connection. It is on this node.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A server that is silent for so long is asked whether it is there, and as often again: we only ever wait for it.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// What a peer's description of an error may take up in a log.
const DETAIL_MAX: usize = 512;

/// `PERMISSION_DENIED` and `NOT_FOUND` (gRPC's status codes).
pub(super) const PERMISSION_DENIED: u32 = 7;
pub(super) const NOT_FOUND: u32 = 5;

/// Why a stream has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum GrpcError {
    /// Nobody listens there, or not for us.
    #[error("connecting failed: {0}")]
    Connect(#[from] io::Error),
    /// HTTP/2 failed.
    #[error("HTTP/2: {0}")]
    Http(#[from] h2::Error),
    /// The server has ended the stream, and says why.
    #[error("{}", status_text(*.code, .detail))]
    Status {
        /// gRPC's code.
        code: u32,
        /// What it says.
        detail: String,
    },
    /// The server does not speak gRPC, or not this method.
    #[error("{0}")]
    Protocol(String),
}

fn status_text(code: u32, detail: &str) -> String {
    let word = match code {
        0 => "the server has ended the stream",
        1 => "CANCELLED",
        3 => "INVALID_ARGUMENT",
        4 => "DEADLINE_EXCEEDED",
        NOT_FOUND => "NOT_FOUND",
        PERMISSION_DENIED => "PERMISSION_DENIED",
        12 => "UNIMPLEMENTED",
        13 => "INTERNAL",
        14 => "UNAVAILABLE",
        16 => "UNAUTHENTICATED",
        _ => return format!("gRPC status {code}: {detail}"),
    };
    if detail.is_empty() { word.to_owned() } else { format!("{word}: {detail}") }
}

/// A connection to a server.
pub(super) struct Channel {
    requests: SendRequest<Bytes>,
    authority: &'static str,
    /// Drives the connection; ends with this.
    _driving: JoinSet<()>,
}

impl Channel {
    /// Connects. In a runtime.
    pub(super) async fn connect(to: &ProviderAddr) -> Result<Self, GrpcError> {
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let connected = async {
            match to {
                ProviderAddr::Unix(path) => Self::over(UnixStream::connect(path).await?).await,
                ProviderAddr::Tcp(addr) => {
                    let tcp = TcpStream::connect(addr).await?;
                    let keepalive =
                        TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(3);
                    SockRef::from(&tcp).set_tcp_keepalive(&keepalive)?;
                    Self::over(tcp).await
                }
            }
        };
        timeout(CONNECT_TIMEOUT, connected).await.map_err(late)?
    }

    async fn over(below: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Self, GrpcError> {
        let (requests, connection) = h2::client::handshake(below).await?;
        let mut driving = JoinSet::new();
        // How it ends, its streams say.
        driving.spawn(async move { drop(connection.await) });
        Ok(Self { requests, authority: "localhost", _driving: driving })
    }

    /// Begins a call of `/SERVICE/METHOD`.
    pub(super) async fn call(
        &self,
        method: &str,
        metadata: &[(&'static str, &'static str)],
    ) -> Result<Call, GrpcError> {
        let mut request = Request::post(format!("http://{}{method}", self.authority))
            .header(CONTENT_TYPE, "application/grpc")
            .header("te", "trailers");
        for (name, value) in metadata {
            request = request.header(*name, *value);
        }
        let request = request.body(()).map_err(|e| GrpcError::Protocol(e.to_string()))?;
        let mut requests = self.requests.clone().ready().await?;
        let (response, send) = requests.send_request(request, false)?;
        Ok(Call { send, answer: Answer::Awaited(response), received: BytesMut::new() })
    }
}

/// A call whose messages go both ways.
pub(super) struct Call {
    send: SendStream<Bytes>,
    answer: Answer,
    received: BytesMut,
}

enum Answer {
    Awaited(ResponseFuture),
    Body(RecvStream),
}

impl Call {
    /// Sends a message; `last`: no other follows.
    pub(super) fn send(&mut self, message: &impl Message, last: bool) -> Result<(), GrpcError> {
        let length = message.encoded_len();
        let mut bytes = BytesMut::with_capacity(PREFIX + length);
        bytes.put_u8(0);
        bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        message.encode(&mut bytes).map_err(|e| GrpcError::Protocol(e.to_string()))?;
        // Ours are short: they are within any window.
        Ok(self.send.send_data(bytes.freeze(), last)?)
    }

    /// The next message. An error ends the call. Dropped before it is ready, nothing is lost.
    pub(super) async fn next<M: Message + Default>(&mut self) -> Result<M, GrpcError> {
        if let Answer::Awaited(response) = &mut self.answer {
            let response = response.await?;
            let headers = response.headers();
            if !response.status().is_success() {
                return Err(GrpcError::Protocol(format!(
                    "the server answers with HTTP {}",
                    response.status()
                )));
            }
            if let Some(status) = status_of(headers) {
                return Err(status);
            }
            self.answer = Answer::Body(response.into_body());
        }
        let Answer::Body(body) = &mut self.answer else {
            return Err(GrpcError::Protocol("there was no answer".to_owned()));
        };
        loop {
            if let Some(message) = take_message(&mut self.received)? {
                return M::decode(message)
                    .map_err(|e| GrpcError::Protocol(format!("a message cannot be decoded: {e}")));
            }
            match body.data().await {
                Some(chunk) => {
                    let chunk = chunk?;
                    body.flow_control().release_capacity(chunk.len())?;
                    self.received.extend_from_slice(&chunk);
                }
                None => {
                    let trailers = body.trailers().await?.unwrap_or_default();
                    let none =
                        || GrpcError::Protocol("the server ended the stream without a status".to_owned());
                    return Err(status_of(&trailers).unwrap_or_else(none));
                }
            }
        }
    }
}

/// The message at the front, if it is whole.
fn take_message(received: &mut BytesMut) -> Result<Option<Bytes>, GrpcError> {
    let Some((prefix, rest)) = received.split_first_chunk::<PREFIX>() else { return Ok(None) };
    let [compressed, length @ ..] = *prefix;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if compressed != 0 {
        return Err(GrpcError::Protocol("a message is compressed, which was not asked for".to_owned()));
    }
    if length > MESSAGE_MAX {
        return Err(GrpcError::Protocol(format!("a message of {length} bytes is longer than {MESSAGE_MAX}")));
    }
    if rest.len() < length {
        return Ok(None);
    }
    received.advance(PREFIX);
    Ok(Some(received.split_to(length).freeze()))
}

/// The status in trailers, or in headers where those are all there is.
fn status_of(fields: &HeaderMap) -> Option<GrpcError> {
    let text = |name: &str| fields.get(name).and_then(|v| v.to_str().ok());
    let code = text("grpc-status")?.parse().unwrap_or(2);
    let detail = text("grpc-message").unwrap_or_default();
    let detail: String = detail.chars().filter(|c| matches!(c, ' '..='~')).take(DETAIL_MAX).collect();
    Some(GrpcError::Status { code, detail: detail.replace("%20", " ") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_taken_when_it_is_whole_and_one_that_is_too_long_is_an_error() {
        let mut received = BytesMut::from(&[0, 0, 0, 0, 2, 7][..]);
        assert!(take_message(&mut received).unwrap().is_none());
        received.extend_from_slice(&[8, 0, 0]);
        assert_eq!(take_message(&mut received).unwrap().unwrap().as_ref(), [7, 8]);
        assert_eq!(received.as_ref(), [0, 0], "what follows stays");
        let mut long = BytesMut::from(&[0, 0xff, 0, 0, 0][..]);
        assert!(take_message(&mut long).is_err());
        let mut compressed = BytesMut::from(&[1, 0, 0, 0, 0][..]);
        assert!(take_message(&mut compressed).is_err());
    }

    #[test]
    fn a_status_is_read_with_what_the_server_says() {
        let mut fields = HeaderMap::new();
        assert!(status_of(&fields).is_none());
        fields.insert("grpc-status", "7".parse().unwrap());
        fields.insert("grpc-message", "no%20identity issued".parse().unwrap());
        assert_eq!(status_of(&fields).unwrap().to_string(), "PERMISSION_DENIED: no identity issued");
    }
}
