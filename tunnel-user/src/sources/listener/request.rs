//! What a CONNECT request asks for, and what is wrong with one that asks for nothing.

use http::{HeaderMap, Method, Request, header::CONTENT_LENGTH};

use crate::{
    model::{
        end::EndReason,
        flow::{Target, TargetError},
    },
    transport::h1::HeadError,
};

/// What is wrong with a request. All of it is the client's fault.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Another method than CONNECT.
    #[error("{0} is not CONNECT")]
    Method(Method),
    /// The `:authority`, or request target, is no target.
    #[error("bad authority: {0}")]
    Authority(#[from] TargetError),
    /// What came is no HTTP/1 request.
    #[error("{0}")]
    Head(#[from] HeadError),
    /// A CONNECT request that announces content.
    #[error("a CONNECT request has no content, and this one has {0}")]
    Content(&'static str),
    /// A Host field that says something else than the request target, or several.
    #[error("its Host field does not say {0}")]
    Host(Target),
}

impl RequestError {
    /// Which of the ends it is.
    pub fn reason(&self) -> EndReason {
        match self {
            Self::Method(_) => EndReason::BadMethod,
            Self::Authority(_) | Self::Content(_) | Self::Host(_) => EndReason::BadRequest,
            Self::Head(HeadError::Syntax(_)) => EndReason::BadRequest,
            Self::Head(HeadError::LineTooLong) => EndReason::UriTooLong,
            Self::Head(HeadError::TooLong | HeadError::TooManyFields) => EndReason::HeadersTooLarge,
        }
    }
}

/// How much of what a peer asked for is shown in the log: the longest name, and its port.
const SHOWN: usize = 260;

/// What a log may hold of what a peer wrote.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(SHOWN).map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect()
}

/// A request that has no target.
#[derive(Debug)]
pub struct Malformed {
    /// What it asks for, as far as that can be shown.
    pub authority: Box<str>,
    /// What is wrong with it.
    pub error: RequestError,
}

/// What a request over HTTP/2 asks for.
pub fn target(request: &Request<impl Sized>) -> Result<Target, Malformed> {
    let authority = request.uri().authority().map(http::uri::Authority::as_str).unwrap_or_default();
    target_of(request.method(), authority, request.headers())
}

/// The same of the parts of one.
pub fn target_of(method: &Method, authority: &str, headers: &HeaderMap) -> Result<Target, Malformed> {
    let malformed = |error| Malformed { authority: shown(authority).into(), error };
    if method != Method::CONNECT {
        return Err(malformed(RequestError::Method(method.clone())));
    }
    // As over HTTP/1: with one, the library would count the tunnel's bytes against it.
    if headers.contains_key(CONTENT_LENGTH) {
        return Err(malformed(RequestError::Content(CONTENT_LENGTH.as_str())));
    }
    authority.parse().map_err(|e: TargetError| malformed(e.into()))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn request(method: &str, uri: &str) -> Request<()> {
        Request::builder().method(method).uri(uri).body(()).unwrap()
    }

    #[test]
    fn only_connect_with_a_good_authority_has_a_target() {
        assert_eq!(target(&request("CONNECT", "10.0.0.1:80")).unwrap().to_string(), "10.0.0.1:80");
        let status = |r: &Request<()>| target(r).unwrap_err().error.reason().status().unwrap().as_u16();
        assert_eq!(status(&request("GET", "http://10.0.0.1:80/")), 405);
        assert_eq!(status(&request("CONNECT", "example.org")), 400);
        assert_eq!(status(&request("CONNECT", "user@example.org:80")), 400);
        assert_eq!(status(&request("CONNECT", "example.org:0")), 400);
        let mut content = request("CONNECT", "example.org:1");
        content.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        assert_eq!(status(&content), 400);
    }
}
