//! The CONNECT request as HBONE peers send it.
//!
//! Enters: target, client address, what the configuration adds. Leaves: a request with `:method` and
//! `:authority` only (RFC 9113 section 8.5: no `:scheme`, `:path` or `:protocol`), `forwarded` (RFC 7239),
//! `traceparent` (W3C Trace Context) and what was configured. It never passes on what a client sent.

use std::{
    cell::Cell,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::IpAddr,
};

use http::{HeaderName, HeaderValue, Method, Request, Uri, Version, header::FORWARDED};

use crate::flow::{ClientAddr, Target};

/// `traceparent`, W3C Trace Context.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A CONNECT request for `target`.
///
/// # Errors
/// When the target cannot stand in an `:authority`; what parsed as a [`Target`] can.
pub fn connect_request(
    target: &Target,
    client: ClientAddr,
    trace: &Trace,
    configured: &[(HeaderName, HeaderValue)],
) -> Result<Request<()>, http::Error> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri(Uri::builder().authority(target.to_string()).build()?)
        .header(FORWARDED, forwarded(client))
        .header(TRACEPARENT, trace.start())
        .body(())?;
    for (name, value) in configured {
        request.headers_mut().append(name.clone(), value.clone());
    }
    Ok(request)
}

/// `for=192.0.2.43`, `for="[2001:db8::1]"` (RFC 7239 section 6).
fn forwarded(client: ClientAddr) -> String {
    match client.0.ip().to_canonical() {
        IpAddr::V4(ip) => format!("for={ip}"),
        IpAddr::V6(ip) => format!("for=\"[{ip}]\""),
    }
}

/// Makes trace identifiers. They have to be different, not secret.
#[derive(Debug)]
pub struct Trace {
    state: Cell<u64>,
}

impl Default for Trace {
    fn default() -> Self {
        // The standard library's hash keys come from the kernel's random generator.
        Self { state: Cell::new(RandomState::new().build_hasher().finish()) }
    }
}

impl Trace {
    /// A new trace with a new parent, sampled: `00-{32 hex}-{16 hex}-01`.
    fn start(&self) -> String {
        format!("00-{:016x}{:016x}-{:016x}-01", self.random(), self.random(), self.random().max(1))
    }

    /// SplitMix64 (Steele, Lea, Flood 2014): every state is visited once.
    pub fn random(&self) -> u64 {
        let state = self.state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.set(state);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_what_hbone_peers_send() {
        let client = ClientAddr("[2001:db8::7]:40000".parse().unwrap());
        let baggage = (HeaderName::from_static("baggage"), HeaderValue::from_static("k8s.cluster.name=a"));
        let target = "10.0.0.1:80".parse().unwrap();
        let request = connect_request(&target, client, &Trace::default(), &[baggage]).unwrap();
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.uri().to_string(), "10.0.0.1:80");
        assert_eq!(request.headers()["forwarded"], "for=\"[2001:db8::7]\"");
        assert_eq!(request.headers()["baggage"], "k8s.cluster.name=a");
        let trace = request.headers()["traceparent"].to_str().unwrap();
        assert_eq!(trace.len(), 55);
        assert!(trace.starts_with("00-") && trace.ends_with("-01"), "{trace}");
    }

    #[test]
    fn ipv4_clients_are_named_without_quotes_even_when_mapped() {
        for addr in ["192.0.2.43:1", "[::ffff:192.0.2.43]:1"] {
            assert_eq!(forwarded(ClientAddr(addr.parse().unwrap())), "for=192.0.2.43");
        }
    }

    #[test]
    fn ipv6_and_names_stand_in_the_authority() {
        let client = ClientAddr("192.0.2.1:1".parse().unwrap());
        for text in ["[2001:db8::1]:443", "web.internal:80"] {
            let target = text.parse().unwrap();
            let request = connect_request(&target, client, &Trace::default(), &[]).unwrap();
            assert_eq!(request.uri().authority().unwrap(), text);
        }
    }
}
