//! The heads of CONNECT requests and their responses (RFC 9114 sections 4.2 to 4.4).
//!
//! # Invariants
//! - A head that could be read in two ways is malformed: a field in upper case, one of the connection's, a pseudo-header that
//!   is missing, unknown, given twice, or behind a field.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};

use super::{
    HEADERS, ProtocolError,
    qpack::{self, DecodeError, Field},
};

/// Why a head is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadError {
    /// It ends the connection.
    Connection(ProtocolError),
    /// It ends its stream (H3_MESSAGE_ERROR): what is wrong with it.
    Malformed(&'static str),
    /// It has more bytes than are taken.
    TooLong,
}

impl From<DecodeError> for HeadError {
    fn from(e: DecodeError) -> Self {
        match e {
            DecodeError::Malformed(e) => Self::Connection(e),
            DecodeError::TooLong => Self::TooLong,
        }
    }
}

/// A request's head.
#[derive(Debug)]
pub struct RequestHead {
    /// What is to be done.
    pub method: Method,
    /// Of a CONNECT request, its target.
    pub authority: String,
    /// Its fields.
    pub headers: HeaderMap,
}

/// A response's head.
#[derive(Debug)]
pub struct ResponseHead {
    /// What became of the request.
    pub status: StatusCode,
    /// Its fields.
    pub headers: HeaderMap,
}

/// Encodes a CONNECT request (RFC 9114 section 4.4).
pub fn encode_connect(authority: &str, headers: &HeaderMap) -> Bytes {
    let pseudo = [(":method", &b"CONNECT"[..]), (":authority", authority.as_bytes())];
    qpack::encode(pseudo.into_iter().chain(fields(headers)))
}

/// Encodes a response.
pub fn encode_response(status: StatusCode, headers: &HeaderMap) -> Bytes {
    qpack::encode([(":status", status.as_str().as_bytes())].into_iter().chain(fields(headers)))
}

fn fields(headers: &HeaderMap) -> impl Iterator<Item = (&str, &[u8])> {
    headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()))
}

/// Decodes a request.
pub fn decode_request(section: &[u8]) -> Result<RequestHead, HeadError> {
    let ([method, authority, scheme, path, protocol, status], headers) = split(section)?;
    let method = method.ok_or(HeadError::Malformed("a request without :method"))?;
    let method = Method::from_bytes(&method).map_err(|_| HeadError::Malformed("a :method that is none"))?;
    if status.is_some() {
        return Err(HeadError::Malformed("a request with :status"));
    }
    if protocol.is_some() {
        return Err(HeadError::Malformed("a request with :protocol, which was not offered (RFC 9220)"));
    }
    let is_connect = method == Method::CONNECT;
    if is_connect && (scheme.is_some() || path.is_some()) {
        return Err(HeadError::Malformed("a CONNECT request with :scheme or :path"));
    }
    if is_connect && authority.is_none() {
        return Err(HeadError::Malformed("a CONNECT request without :authority"));
    }
    if !is_connect && (scheme.is_none() || path.is_none()) {
        return Err(HeadError::Malformed("a request without :scheme or :path"));
    }
    let authority = authority.map(|a| String::from_utf8_lossy(&a).into_owned()).unwrap_or_default();
    Ok(RequestHead { method, authority, headers })
}

/// Decodes a response.
pub fn decode_response(section: &[u8]) -> Result<ResponseHead, HeadError> {
    let ([method, authority, scheme, path, protocol, status], headers) = split(section)?;
    if [method, authority, scheme, path, protocol].iter().any(Option::is_some) {
        return Err(HeadError::Malformed("a response with a request's pseudo-header"));
    }
    let status = status.ok_or(HeadError::Malformed("a response without :status"))?;
    let status =
        StatusCode::from_bytes(&status).map_err(|_| HeadError::Malformed("a :status that is none"))?;
    Ok(ResponseHead { status, headers })
}

/// The pseudo-headers that there are.
const PSEUDO: [&str; 6] = [":method", ":authority", ":scheme", ":path", ":protocol", ":status"];
/// Fields of a connection, which HTTP/3 has not (RFC 9114 section 4.2).
const OF_CONNECTION: [HeaderName; 5] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

type Pseudo = [Option<Bytes>; PSEUDO.len()];

/// The pseudo-headers of a section, and its fields.
fn split(section: &[u8]) -> Result<(Pseudo, HeaderMap), HeadError> {
    let (mut pseudo, mut headers) = (Pseudo::default(), HeaderMap::new());
    for (name, value) in qpack::decode(section, HEADERS)? {
        if name.starts_with(b":") {
            let known = PSEUDO.iter().position(|known| known.as_bytes() == &*name);
            let slot = known.ok_or(HeadError::Malformed("a pseudo-header that is not known"))?;
            if !headers.is_empty() {
                return Err(HeadError::Malformed("a pseudo-header behind a field"));
            }
            if pseudo[slot].replace(value).is_some() {
                return Err(HeadError::Malformed("a pseudo-header that is given twice"));
            }
            continue;
        }
        let (name, value) = field((name, value))?;
        headers.append(name, value);
    }
    Ok((pseudo, headers))
}

fn field((name, value): Field) -> Result<(HeaderName, HeaderValue), HeadError> {
    // In lower case only: `from_bytes` would make it so.
    let known = HeaderName::from_lowercase(&name);
    let name = known.map_err(|_| HeadError::Malformed("a field whose name is none, or in upper case"))?;
    if OF_CONNECTION.contains(&name) || (name == header::TE && &*value != b"trailers") {
        return Err(HeadError::Malformed("a field of a connection"));
    }
    let value = HeaderValue::from_maybe_shared(value);
    Ok((name, value.map_err(|_| HeadError::Malformed("a field whose value is none"))?))
}
