//! Which requests are answered at all: a browser on this machine must not be made to use the interface by a site that it
//! visits.
//!
//! # Invariants
//! - A request that a browser sends for another site is rejected, whatever it asks for (Fetch, section "Sec-Fetch-Site").
//! - Over TCP the host must be this machine by a name that no DNS server can give to another one (DNS rebinding).
//! - What changes something is a POST.

use std::net::IpAddr;

use http::{HeaderMap, Method, Request, StatusCode, header};

/// By what a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The Unix socket.
    Unix,
    /// TCP over loopback.
    Tcp,
}

/// Why a request is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rejected {
    pub(super) status: StatusCode,
    pub(super) why: &'static str,
}

const fn forbidden(why: &'static str) -> Result<(), Rejected> {
    Err(Rejected { status: StatusCode::FORBIDDEN, why })
}

/// Whether a request is answered.
pub(super) fn check<B>(request: &Request<B>, way: Way, writes_over_tcp: bool) -> Result<(), Rejected> {
    let headers = request.headers();
    let host = match one(headers, &header::HOST) {
        Ok(host) => host,
        Err(()) => return forbidden("the request has several Host headers, or one that is no text"),
    };
    if way == Way::Tcp && !host.is_some_and(is_this_machine) {
        return forbidden(
            "the Host header is neither a loopback address nor localhost: connect to 127.0.0.1, [::1] or localhost",
        );
    }
    match headers.get("sec-fetch-site").map(|site| site.as_bytes()) {
        None | Some(b"same-origin" | b"none") => {}
        Some(_) => return forbidden("a browser sent the request for another site"),
    }
    match one(headers, &header::ORIGIN) {
        Ok(None) => {}
        Ok(Some(origin)) if host.is_some() && origin.strip_prefix("http://") == host => {}
        _ => return forbidden("a browser sent the request for another site"),
    }
    match *request.method() {
        Method::GET | Method::HEAD => Ok(()),
        Method::POST if way == Way::Tcp && !writes_over_tcp => forbidden(
            "requests that change something are accepted on the Unix socket only, unless admin.write_over_tcp is set",
        ),
        Method::POST => Ok(()),
        _ => {
            Err(Rejected { status: StatusCode::METHOD_NOT_ALLOWED, why: "only GET, HEAD and POST are known" })
        }
    }
}

/// A header that is there once at most.
fn one<'h>(headers: &'h HeaderMap, name: &header::HeaderName) -> Result<Option<&'h str>, ()> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(drop),
        (Some(_), Some(_)) => Err(()),
    }
}

/// Whether a Host names this machine by a loopback address or as `localhost` (RFC 6761 section 6.3).
fn is_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    if name.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let literal = name.strip_prefix('[').and_then(|v6| v6.strip_suffix(']')).unwrap_or(name);
    literal.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(way: Way, method: Method, headers: &[(&str, &str)]) -> Result<(), StatusCode> {
        let mut request = Request::builder().method(method).uri("/metrics");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        check(&request.body(()).unwrap(), way, false).map_err(|r| r.status)
    }

    #[test]
    fn over_tcp_the_host_is_this_machine() {
        for good in [
            "127.0.0.1:15000",
            "127.8.8.8",
            "localhost:1",
            "LOCALHOST",
            "[::1]:15000",
            "[::ffff:127.0.0.1]:1",
        ] {
            assert_eq!(asked(Way::Tcp, Method::GET, &[("host", good)]), Ok(()), "{good}");
        }
        for bad in [
            "evil.example:15000",
            "localhost.evil.example",
            "127.0.0.1.evil.example:1",
            "10.0.0.1",
            "[::2]",
            "",
            "localhost:",
        ] {
            assert_eq!(asked(Way::Tcp, Method::GET, &[("host", bad)]), Err(StatusCode::FORBIDDEN), "{bad}");
        }
        assert_eq!(asked(Way::Tcp, Method::GET, &[]), Err(StatusCode::FORBIDDEN));
        assert!(asked(Way::Tcp, Method::GET, &[("host", "localhost"), ("host", "evil.example")]).is_err());
        assert_eq!(asked(Way::Unix, Method::GET, &[("host", "tunnel")]), Ok(()));
    }

    #[test]
    fn a_browser_is_answered_for_our_own_page_only() {
        let host = ("host", "localhost:1");
        for site in ["same-origin", "none"] {
            assert_eq!(asked(Way::Tcp, Method::GET, &[host, ("sec-fetch-site", site)]), Ok(()));
        }
        for site in ["cross-site", "same-site", "else"] {
            assert!(asked(Way::Tcp, Method::GET, &[host, ("sec-fetch-site", site)]).is_err());
            assert!(asked(Way::Unix, Method::POST, &[host, ("sec-fetch-site", site)]).is_err());
        }
        assert_eq!(asked(Way::Tcp, Method::GET, &[host, ("origin", "http://localhost:1")]), Ok(()));
        for origin in ["http://evil.example", "https://localhost:1", "null", "http://localhost:2"] {
            assert!(asked(Way::Tcp, Method::GET, &[host, ("origin", origin)]).is_err(), "{origin}");
            assert!(asked(Way::Unix, Method::POST, &[host, ("origin", origin)]).is_err(), "{origin}");
        }
    }

    #[test]
    fn changes_come_by_the_unix_socket() {
        let host = ("host", "localhost:1");
        assert_eq!(asked(Way::Unix, Method::POST, &[host]), Ok(()));
        assert_eq!(asked(Way::Tcp, Method::POST, &[host]), Err(StatusCode::FORBIDDEN));
        assert_eq!(asked(Way::Unix, Method::PUT, &[host]), Err(StatusCode::METHOD_NOT_ALLOWED));
        let request = Request::post("/drain").header("host", "localhost").body(()).unwrap();
        assert_eq!(check(&request, Way::Tcp, true), Ok(()));
    }
}
