//! The CONNECT request as HBONE peers send it: `:method` and `:authority` only (RFC 9113 section 8.5: no `:scheme`, `:path` or
//! `:protocol`), `forwarded` (RFC 7239), `traceparent` (W3C Trace Context), and in a chain `via` (RFC 9110 section 7.6.3).
//!
//! # Invariants
//! - Of what a client sent, nothing is passed on but what stands here: `forwarded` and `via`, which grow by us; a trace and its
//!   baggage; and what a route copies.

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::{CONNECTION, FORWARDED, VIA},
    uri::Authority,
};

use crate::{
    config::Terms,
    model::{
        flow::{ClientAddr, Head, Target},
        names::IdentityName,
    },
    observe::{
        marks::Marks,
        traces::{Received, Trace},
    },
};

/// `traceparent`, W3C Trace Context section 3.2.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// `tracestate`, W3C Trace Context section 3.3.
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// `baggage`, W3C Baggage section 3.
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// What an upstream is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Where the flow is to end.
    pub target: &'a Target,
    /// Who opened it; nobody in particular where it is to carry a connection that many flows share.
    pub client: Option<ClientAddr>,
    /// Who we are to be for it, where its capture says so.
    pub identity: Option<&'a IdentityName>,
    /// The request that it came with, in a chain.
    pub received: Option<Head<'a>>,
    /// What is asked for in its place, because the route says so.
    pub instead: Option<&'a Target>,
    /// What we call ourselves in `via`.
    pub pseudonym: &'a str,
    /// What the route changes.
    pub terms: &'a Terms,
    /// Where it is noted how far the flow has got; nowhere for what is not a flow's.
    pub marks: Option<&'a Marks>,
}

impl Ask<'_> {
    /// What stands in the `:authority`.
    pub fn authority(&self) -> &Target {
        self.instead.unwrap_or(self.target)
    }
}

/// A CONNECT request. `configured` are the headers of the upstream.
///
/// # Errors
/// When the target cannot stand in an `:authority`; what parsed as a [`Target`] can.
pub fn connect_request(
    ask: &Ask<'_>,
    configured: &[(HeaderName, HeaderValue)],
) -> Result<Request<()>, http::Error> {
    let mut text = Text(BytesMut::with_capacity(WRITTEN));
    let authority = Authority::from_maybe_shared(text.of(format_args!("{}", ask.authority())))?;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri(Uri::builder().authority(authority).build()?)
        .body(())?;
    let headers = request.headers_mut();
    let changes = &ask.terms.headers;
    let trace = ask.marks.and_then(|marks| marks.trace.get());
    match ask.received {
        None => {
            if let Some(client) = ask.client {
                headers.insert(FORWARDED, text.value(format_args!("{}", Forwarded(client)))?);
            }
            let parent = match trace {
                Some(trace) => as_parent(trace, &mut text),
                None => start_trace(&mut text),
            };
            headers.insert(TRACEPARENT, parent?);
        }
        Some(Head { version, headers: received }) => {
            if let Some(client) = ask.client {
                headers.insert(FORWARDED, appended(received, &FORWARDED, &Forwarded(client).to_string())?);
            }
            headers.insert(VIA, appended(received, &VIA, &via(version, ask.pseudonym))?);
            let continued = received_trace(received);
            let parent = match (trace, continued) {
                (Some(trace), _) => as_parent(trace, &mut text)?,
                (None, Some(trace)) => continue_trace(trace, &mut text)?,
                (None, None) => start_trace(&mut text)?,
            };
            headers.insert(TRACEPARENT, parent);
            if continued.is_some() {
                copy(received, &TRACESTATE, headers);
            }
            copy(received, &BAGGAGE, headers);
            for name in &changes.copy {
                copy(received, name, headers);
            }
        }
    }
    for (name, value) in configured {
        headers.append(name.clone(), value.clone());
    }
    for name in &changes.remove {
        headers.remove(name);
    }
    for (name, value) in &changes.add {
        headers.append(name.clone(), value.clone());
    }
    Ok(request)
}

/// What a flow that this process hands to a listener of its own has for a request: what a gateway would pass on
/// of the one that it came with, as the route changes it. It has not left the process: nobody is added to
/// `forwarded` and `via`, and the trace has no new parent.
pub fn handed_over(ask: &Ask<'_>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let changes = &ask.terms.headers;
    if let Some(Head { headers: received, .. }) = ask.received {
        for name in [FORWARDED, VIA, TRACEPARENT, TRACESTATE, BAGGAGE].iter().chain(&changes.copy) {
            copy(received, name, &mut headers);
        }
    }
    for name in &changes.remove {
        headers.remove(name);
    }
    for (name, value) in &changes.add {
        headers.append(name.clone(), value.clone());
    }
    headers
}

/// Whether a request has passed this process already: its pseudonym stands in `via`.
pub fn is_loop(received: &HeaderMap, pseudonym: &str) -> bool {
    // "1.1 name", "HTTP/2 name (a comment)", with commas between them.
    let by = |hop: &str| hop.split_ascii_whitespace().nth(1) == Some(pseudonym);
    received.get_all(VIA).iter().filter_map(|v| v.to_str().ok()).any(|line| line.split(',').any(by))
}

/// The lines of a header as they came, in place of what is there. One that `connection` names was meant for us
/// alone (RFC 9110 section 7.6.1).
fn copy(received: &HeaderMap, name: &HeaderName, headers: &mut HeaderMap) {
    let names_it =
        |line: &str| line.split(',').any(|option| option.trim().eq_ignore_ascii_case(name.as_str()));
    if received.get_all(CONNECTION).iter().filter_map(|v| v.to_str().ok()).any(names_it) {
        return;
    }
    headers.remove(name);
    for value in received.get_all(name) {
        headers.append(name.clone(), value.clone());
    }
}

/// The list that came in this header, and one more member at its end.
fn appended(received: &HeaderMap, name: &HeaderName, last: &str) -> Result<HeaderValue, http::Error> {
    let mut list = Vec::new();
    for value in received.get_all(name) {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(last.as_bytes());
    Ok(HeaderValue::from_bytes(&list)?)
}

/// `2 tunnel-0123456789abcdef`: the version of what was received, without the name "HTTP" (RFC 9110 section
/// 7.6.3).
fn via(version: Version, pseudonym: &str) -> String {
    let version = match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        Version::HTTP_3 => "3",
        _ => "1.1",
    };
    format!("{version} {pseudonym}")
}

/// `for=192.0.2.43`, `for="[2001:db8::1]"` (RFC 7239 section 6).
struct Forwarded(ClientAddr);

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.0.ip().to_canonical() {
            IpAddr::V4(ip) => write!(f, "for={ip}"),
            IpAddr::V6(ip) => write!(f, "for=\"[{ip}]\""),
        }
    }
}

/// Room for the texts of one request, before it grows: an address with its port, the client's, and a trace.
const WRITTEN: usize = 192;

/// What is written for one request, in one piece of memory.
struct Text(BytesMut);

impl Text {
    fn of(&mut self, what: fmt::Arguments<'_>) -> Bytes {
        // Writing to memory does not fail.
        let _written = self.0.write_fmt(what);
        self.0.split().freeze()
    }

    fn value(&mut self, what: fmt::Arguments<'_>) -> Result<HeaderValue, http::Error> {
        Ok(HeaderValue::from_maybe_shared(self.of(what))?)
    }

    /// The same of what no other request will say. It is kept out of the tables of HPACK (RFC 7541 section 6.2.3),
    /// where it would push out what others do say.
    fn unique(&mut self, what: fmt::Arguments<'_>) -> Result<HeaderValue, http::Error> {
        let mut value = self.value(what)?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// A new trace with a new parent, sampled: `00-{32 hex}-{16 hex}-01`. Its identifiers have to be different, not secret.
fn start_trace(text: &mut Text) -> Result<HeaderValue, http::Error> {
    let (id, parent) = (fastrand::u128(1..), fastrand::u64(1..));
    text.unique(format_args!("00-{id:032x}-{parent:016x}-01"))
}

/// The trace of a request, with us as the parent.
fn continue_trace(Received { id, flags, .. }: Received, text: &mut Text) -> Result<HeaderValue, http::Error> {
    let parent = fastrand::u64(1..);
    text.unique(format_args!("00-{id:032x}-{parent:016x}-{flags:02x}"))
}

/// The trace of a flow that has spans of its own, with the one of its request as the parent.
fn as_parent(Trace { id, connect, flags, .. }: Trace, text: &mut Text) -> Result<HeaderValue, http::Error> {
    text.unique(format_args!("00-{id:032x}-{connect:016x}-{flags:02x}"))
}

/// The trace that a request is part of; `None` where its `traceparent` is missing or malformed.
pub fn received_trace(received: &HeaderMap) -> Option<Received> {
    let mut lines = received.get_all(&TRACEPARENT).iter();
    let only = lines.next().filter(|_| lines.next().is_none());
    only.and_then(|v| trace_of(v.to_str().ok()?))
}

/// Of the flags those that version 00 knows: sampled, and random (W3C Trace Context section 3.2). A later version may have
/// more behind them.
fn trace_of(text: &str) -> Option<Received> {
    const KNOWN: u8 = 0b11;
    let mut parts = text.splitn(5, '-');
    let (version, id, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |s: &str, length| {
        s.len() == length && s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let zero = |s: &str| s.bytes().all(|b| b == b'0');
    let well_formed = hex(version, 2) && hex(id, 32) && hex(parent, 16) && hex(flags, 2);
    let ends = version != "00" || parts.next().is_none();
    (well_formed && ends && version != "ff" && !zero(id) && !zero(parent))
        .then(|| {
            let id = u128::from_str_radix(id, 16).ok()?;
            let parent = u64::from_str_radix(parent, 16).ok()?;
            Some(Received { id, parent, flags: u8::from_str_radix(flags, 16).ok()? & KNOWN })
        })
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HeaderChanges;

    const PSEUDONYM: &str = "tunnel-0123456789abcdef";

    fn request(ask: Ask<'_>, configured: &[(HeaderName, HeaderValue)]) -> Request<()> {
        connect_request(&ask, configured).unwrap()
    }

    fn client(addr: &str) -> ClientAddr {
        ClientAddr(addr.parse().unwrap())
    }

    fn lines(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let line = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        let mut map = HeaderMap::new();
        for (name, value) in lines.iter().map(line) {
            map.append(name, value);
        }
        map
    }

    /// What is asked for a flow that came with these headers, under these changes.
    fn chained(
        received: &HeaderMap,
        headers: HeaderChanges,
        configured: &[(HeaderName, HeaderValue)],
    ) -> HeaderMap {
        let target = "10.0.0.1:80".parse().unwrap();
        let received = Some(Head { version: Version::HTTP_2, headers: received });
        let terms = Terms { headers, ..Terms::default() };
        let client = Some(client("192.0.2.9:1"));
        let ask = Ask {
            target: &target,
            instead: None,
            client,
            identity: None,
            received,
            pseudonym: PSEUDONYM,
            terms: &terms,
            marks: None,
        };
        request(ask, configured).headers().clone()
    }

    fn all<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
        headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect()
    }

    #[test]
    fn the_request_is_what_hbone_peers_send() {
        let baggage = (BAGGAGE, HeaderValue::from_static("k8s.cluster.name=a"));
        let (target, terms) = ("10.0.0.1:80".parse().unwrap(), Terms::default());
        let client = Some(client("[2001:db8::7]:40000"));
        let ask = Ask {
            identity: None,
            target: &target,
            instead: None,
            client,
            received: None,
            pseudonym: PSEUDONYM,
            terms: &terms,
            marks: None,
        };
        let request = request(ask, &[baggage]);
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.uri().to_string(), "10.0.0.1:80");
        assert_eq!(request.headers()["forwarded"], "for=\"[2001:db8::7]\"");
        assert_eq!(request.headers()["baggage"], "k8s.cluster.name=a");
        let trace = request.headers()["traceparent"].to_str().unwrap();
        assert_eq!(trace.len(), 55);
        assert!(trace.starts_with("00-") && trace.ends_with("-01"), "{trace}");
        assert_eq!(request.headers().len(), 3, "nothing was received, so there is no via");
    }

    #[test]
    fn a_request_for_a_connection_of_many_names_no_client() {
        let (target, terms) = ("gw.internal:15008".parse().unwrap(), Terms::default());
        let ask = Ask {
            identity: None,
            target: &target,
            instead: None,
            client: None,
            received: None,
            pseudonym: PSEUDONYM,
            terms: &terms,
            marks: None,
        };
        let request = request(ask, &[]);
        let names: Vec<_> = request.headers().keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["traceparent"]);
    }

    #[test]
    fn in_a_chain_forwarded_and_via_grow_and_nothing_else_is_passed_on_unasked() {
        let received = lines(&[
            ("forwarded", "for=192.0.2.1"),
            ("forwarded", "for=192.0.2.2;proto=http"),
            ("via", "1.1 first (a, comment)"),
            ("baggage", "a=1"),
            ("baggage", "b=2"),
            ("x-route", "canary"),
            ("x-secret", "s"),
            ("tracestate", "of=nothing"),
        ]);
        let asked = chained(&received, HeaderChanges::default(), &[]);
        assert_eq!(asked["forwarded"], "for=192.0.2.1, for=192.0.2.2;proto=http, for=192.0.2.9");
        assert_eq!(asked["via"], format!("1.1 first (a, comment), 2 {PSEUDONYM}"));
        assert_eq!(all(&asked, "baggage"), ["a=1", "b=2"]);
        let mut names: Vec<_> = asked.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["baggage", "forwarded", "traceparent", "via"], "no trace, so no state of one");
    }

    #[test]
    fn headers_are_copied_then_those_of_the_upstream_come_then_some_go_then_some_are_added() {
        let received =
            lines(&[("x-route", "canary"), ("x-route", "blue"), ("x-team", "a"), ("baggage", "a=1")]);
        let name = HeaderName::from_static;
        let of_upstream = [
            (name("x-route"), HeaderValue::from_static("upstream")),
            (name("x-gone"), HeaderValue::from_static("1")),
        ];
        let changes = HeaderChanges {
            copy: vec![name("x-route"), name("x-absent"), name("baggage")],
            remove: vec![name("x-gone"), name("forwarded")],
            add: vec![(name("x-gone"), HeaderValue::from_static("2"))],
        };
        let asked = chained(&received, changes, &of_upstream);
        assert_eq!(all(&asked, "x-route"), ["canary", "blue", "upstream"]);
        assert_eq!(all(&asked, "x-gone"), ["2"]);
        assert_eq!(all(&asked, "baggage"), ["a=1"], "copied once");
        assert!(!asked.contains_key("x-team") && !asked.contains_key("forwarded"), "{asked:?}");
    }

    #[test]
    fn what_connection_names_was_meant_for_us_alone() {
        let received = lines(&[
            ("connection", "keep-alive, X-Team"),
            ("connection", "baggage"),
            ("x-team", "a"),
            ("x-route", "canary"),
            ("baggage", "a=1"),
        ]);
        let copy = ["x-team", "x-route"].map(HeaderName::from_static).to_vec();
        let asked = chained(&received, HeaderChanges { copy, ..HeaderChanges::default() }, &[]);
        assert_eq!(all(&asked, "x-route"), ["canary"]);
        assert!(!asked.contains_key("x-team") && !asked.contains_key("baggage"), "{asked:?}");
    }

    #[test]
    fn a_trace_goes_on_with_a_new_parent_and_one_that_is_none_begins_anew() {
        const ID: &str = "0af7651916cd43dd8448eb211c80319c";
        const PARENT: &str = "b7ad6b7169203331";
        let go_on = |values: &[String]| {
            let mut received = lines(&[("tracestate", "vendor=1")]);
            for value in values {
                received.append(TRACEPARENT, value.try_into().unwrap());
            }
            let asked = chained(&received, HeaderChanges::default(), &[]);
            let state = asked.contains_key("tracestate");
            (asked["traceparent"].to_str().unwrap().to_owned(), state)
        };
        for (version, tail, flags) in
            [("00", "00", "00"), ("00", "01", "01"), ("00", "ff", "03"), ("42", "01-more", "01")]
        {
            let (parent, state) = go_on(&[format!("{version}-{ID}-{PARENT}-{tail}")]);
            assert!(
                parent.starts_with(&format!("00-{ID}-")) && parent.ends_with(&format!("-{flags}")),
                "{parent}"
            );
            assert!(!parent.contains(PARENT) && state, "{parent}");
        }
        let zeros = "0".repeat(32);
        for none in [
            vec![format!("ff-{ID}-{PARENT}-01")],
            vec![format!("00-{zeros}-{PARENT}-01")],
            vec![format!("00-{ID}-{}-01", &zeros[..16])],
            vec![format!("00-{ID}-{PARENT}-01-more")],
            vec![format!("00-{}-{PARENT}-01", ID.to_uppercase())],
            vec![format!("00-{ID}-{PARENT}")],
            vec![format!("00-{ID}-{PARENT}-01"); 2],
            vec!["nonsense".to_owned()],
        ] {
            let (parent, state) = go_on(&none);
            assert!(parent.len() == 55 && !parent.contains(ID) && !state, "{none:?}: {parent}");
        }
    }

    #[test]
    fn only_our_own_pseudonym_is_a_loop() {
        for (value, is) in [
            ("2 tunnel-0123456789abcdef", true),
            ("1.1 a, HTTP/2 tunnel-0123456789abcdef (us), 2 b", true),
            ("1.1 a,2  tunnel-0123456789abcdef", true),
            ("2 tunnel-0123456789abcdee", false),
            ("2 tunnel-0123456789abcdef0", false),
            ("tunnel-0123456789abcdef", false),
            ("", false),
        ] {
            assert_eq!(is_loop(&lines(&[("via", "1.0 z"), ("via", value)]), PSEUDONYM), is, "{value}");
        }
        assert!(!is_loop(&HeaderMap::new(), PSEUDONYM));
    }

    #[test]
    fn ipv4_clients_are_named_without_quotes_even_when_mapped() {
        for addr in ["192.0.2.43:1", "[::ffff:192.0.2.43]:1"] {
            assert_eq!(Forwarded(client(addr)).to_string(), "for=192.0.2.43");
        }
    }

    #[test]
    fn ipv6_and_names_stand_in_the_authority_and_so_does_what_a_route_puts_there() {
        let client = Some(client("192.0.2.1:1"));
        let (terms, other) = (Terms::default(), "other.internal:81".parse().unwrap());
        for text in ["[2001:db8::1]:443", "web.internal:80"] {
            let target = text.parse().unwrap();
            for (instead, wanted) in [(None, text), (Some(&other), "other.internal:81")] {
                let received = None;
                let ask = Ask {
                    target: &target,
                    instead,
                    client,
                    identity: None,
                    received,
                    pseudonym: PSEUDONYM,
                    terms: &terms,
                    marks: None,
                };
                assert_eq!(request(ask, &[]).uri().authority().unwrap(), wanted);
            }
        }
    }
}
