//! The host of an HTTP/1 request, without its port.
//!
//! # Invariants
//! - A request that names two hosts names none.

use super::Parse;
use crate::{
    model::flow::{HostName, Sniffed},
    transport::h1::no_fields,
};

/// The longest method: among those that IANA lists the longest is UPDATEREDIRECTREF, with 17 letters.
const METHOD_MAX: usize = 24;
const NOTHING: Parse = Parse::Done(Sniffed::Nothing);

/// Looks at bytes that begin with a capital letter.
pub(super) fn parse(bytes: &[u8]) -> Parse {
    let method = bytes.iter().take_while(|b| b.is_ascii_uppercase() || **b == b'-').count();
    // SSH-2.0-, PING\r\n: other protocols begin with capitals too, and need not wait for the end of a head.
    if method > METHOD_MAX || bytes.get(method).is_some_and(|b| *b != b' ') {
        return NOTHING;
    }
    let mut fields = no_fields();
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => Parse::More,
        Ok(httparse::Status::Complete(_)) => {
            Parse::Done(host(&request).map_or(Sniffed::Nothing, Sniffed::Host))
        }
        // "PRI * HTTP/2.0" among others: the requests of HTTP/2 are not for us to unpack.
        Err(_) => NOTHING,
    }
}

fn host(request: &httparse::Request<'_, '_>) -> Option<HostName> {
    let mut fields = request.headers.iter().filter(|f| f.name.eq_ignore_ascii_case("host"));
    let field = match (fields.next(), fields.next()) {
        (Some(field), None) => Some(std::str::from_utf8(field.value).ok()?),
        (None, _) => None,
        // RFC 9112 section 3.2: such a request is to be refused, which is the server's to do.
        (Some(_), Some(_)) => return None,
    };
    let target = request.path?;
    let authority = match target.split_once("://") {
        // RFC 9112 section 3.2.2: an absolute form wins over the field.
        Some((scheme, rest)) if is_scheme(scheme) => Some(rest.split(['/', '?', '#']).next().unwrap_or(rest)),
        // RFC 9112 section 3.2.3.
        _ if request.method == Some("CONNECT") => Some(target),
        _ => field,
    };
    HostName::new(without_port(authority?))
}

fn is_scheme(text: &str) -> bool {
    ["http", "https"].iter().any(|scheme| text.eq_ignore_ascii_case(scheme))
}

/// The host of an authority. An IPv6 address, which has colons of its own, is no name with or without them.
fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}
