//! What must hold for every input, however it came about.
//!
//! Each function takes bytes, as a peer or an operator could send or write them, and panics where a promise to those who
//! use the parser is broken. `cargo xtask fuzz` looks for inputs; `cargo xtask test` tries the corpora as well.

mod records;

use std::{net::SocketAddr, path::Path, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Uri};
use rustls::pki_types::{CertificateDer, UnixTime};
use tunnel::{
    admin,
    config::{CheckFiles, Config, Peers, Policy, TargetPattern},
    identity::{
        peer::{names_of, peer_identity},
        sds,
        verify::{self, check_expiry},
        workload_api,
    },
    model::flow::{ClientAddr, Identity, Target},
    proxy::Refusal,
    routing::{
        policy::{
            self, Policies,
            explain::{Question, Verdict},
        },
        router::Router,
        sniff::{self, Parse},
    },
    sources::{
        Answer as _,
        listener::{
            h1,
            request::{self, Malformed},
        },
    },
    transport::{
        http3::{
            HEADERS,
            frame::{Frames, Item, Kind, On},
            message, qpack, settings,
        },
        proxy,
    },
};

/// What is asked of an input.
pub type Check = fn(&[u8]);

/// Every check by the name of its corpus.
pub const ALL: [(&str, Check); 12] = [
    ("admin_request", admin_request),
    ("connect_request", connect_request),
    ("h1_head", h1_head),
    ("http3", http3),
    ("sniff", sniff),
    ("proxy_header", proxy_header),
    ("config", config),
    ("records", records),
    ("certificate", certificate),
    ("svid", svid),
    ("sds", sds),
    ("certificate_names", certificate_names),
];

/// A request to the admin interface: method and path with query on the first line, then fields.
pub fn admin_request(input: &[u8]) {
    let mut lines = input.split(|b| *b == b'\n');
    let mut first = lines.next().unwrap_or_default().splitn(2, |b| *b == b' ');
    let method = first.next().and_then(|m| Method::from_bytes(m).ok()).unwrap_or(Method::GET);
    let Ok(uri) = Uri::try_from(first.next().unwrap_or(b"/")) else { return };
    let mut asked = Request::new(());
    (*asked.method_mut(), *asked.uri_mut()) = (method, uri);
    for line in lines {
        let mut parts = line.splitn(2, |b| *b == b':');
        let name = parts.next().and_then(|n| HeaderName::from_bytes(n).ok());
        let value = parts.next().and_then(|v| HeaderValue::from_bytes(v.trim_ascii()).ok());
        if let (Some(name), Some(value)) = (name, value) {
            asked.headers_mut().append(name, value);
        }
    }
    let (read, written) = (admin::admits(&asked, true, false), admin::admits(&asked, true, true));
    admin::admits(&asked, false, false);
    if read {
        // Over TCP nothing is changed, for no other site, and by no name that DNS could give to this machine.
        assert!(written && matches!(*asked.method(), Method::GET | Method::HEAD));
        let site = asked.headers().get("sec-fetch-site").map(|site| site.as_bytes());
        assert!(matches!(site, None | Some(b"same-origin" | b"none")), "{asked:?}");
        let hosts: Vec<_> = asked.headers().get_all("host").iter().collect();
        let host = hosts[0].to_str().expect("a host that is admitted is text");
        let name = host
            .rsplit_once(':')
            .filter(|(_, p)| p.bytes().all(|b| b.is_ascii_digit()))
            .map_or(host, |(n, _)| n);
        let name = name.trim_matches(['[', ']']);
        let loopback = name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback());
        assert!(
            hosts.len() == 1 && (loopback || name.trim_end_matches('.').eq_ignore_ascii_case("localhost")),
            "{host}"
        );
    }
    // Whatever stands in a query, it is one capture and nothing else.
    if let Ok(attach) = admin::capture_of(asked.uri().query().unwrap_or_default())
        && let Ok(layer) = Config::parse_layer(&attach.text, Path::new("attach"))
    {
        assert_eq!(layer.captures.len(), 1, "{}", attach.text);
        let others =
            layer.listeners.len() + layer.routes.len() + layer.policies.len() + layer.upstreams.len();
        assert_eq!(others + layer.identities.len() + layer.redirects.len(), 0, "{}", attach.text);
    }
}

/// A CONNECT request over HTTP/2: lines of method, `:authority`, and fields.
pub fn connect_request(input: &[u8]) {
    let mut lines = input.split(|b| *b == b'\n');
    let method = lines.next().and_then(|m| Method::from_bytes(m).ok());
    let authority = lines.next().unwrap_or_default();
    if let Some(target) = std::str::from_utf8(authority).ok().and_then(|a| a.parse::<Target>().ok()) {
        same_target(&target);
    }
    let Ok(uri) = Uri::try_from(authority) else { return };
    let mut asked = Request::new(());
    *asked.method_mut() = method.unwrap_or(Method::CONNECT);
    *asked.uri_mut() = uri;
    for line in lines {
        let mut parts = line.splitn(2, |b| *b == b':');
        let name = parts.next().and_then(|n| HeaderName::from_bytes(n).ok());
        let value = parts.next().and_then(|v| HeaderValue::from_bytes(v).ok());
        if let (Some(name), Some(value)) = (name, value) {
            asked.headers_mut().append(name, value);
        }
    }
    match request::target(&asked) {
        Ok(target) => {
            assert_eq!(asked.method(), Method::CONNECT);
            same_target(&target);
        }
        Err(malformed) => {
            let refusal = Refusal::Request(malformed.error);
            let response = refusal.response();
            assert!(response.status().is_client_error(), "{refusal}");
            let reason = response.headers().get("proxy-status").expect("a refusal says why");
            assert!(reason.as_bytes().iter().all(|b| (b' '..=b'~').contains(b)), "{reason:?}");
        }
    }
}

/// The head of an HTTP/1 request.
pub fn h1_head(input: &[u8]) {
    let whole = h1::parse(input);
    // However it is cut, it is the same request: nothing is decided before its end.
    for cut in 0..input.len().min(64) {
        match (h1::parse(&input[..cut]), &whole) {
            (Ok(None), _) => {}
            (Ok(Some((_, length))), Ok(Some((_, all)))) => {
                assert_eq!(length, *all, "a head ends where it ends");
            }
            (Ok(Some(_)), _) => panic!("what was a head is none with more behind it"),
            (Err(_), Err(_)) => {}
            (Err(e), Ok(_)) => panic!("what was refused is taken with more behind it: {e}"),
        }
    }
    let Ok(Some((asked, length))) = whole else { return };
    assert!(length <= input.len() && input[..length].ends_with(b"\n"));
    match asked.target {
        Ok(target) => {
            same_target(&target);
            for ambiguous in ["content-length", "transfer-encoding"] {
                assert!(!asked.headers.contains_key(ambiguous), "{ambiguous} could be read in two ways");
            }
            assert!(asked.headers.get_all("host").iter().count() <= 1);
        }
        Err(Malformed { authority, error }) => {
            assert!(authority.chars().all(|c| c.is_ascii_graphic()), "it is logged");
            assert!(error.reason().status().is_some_and(|s| s.is_client_error()), "{error}");
        }
    }
}

/// A stream of HTTP/3: the first byte says which kind, the second how it is cut. And a header section.
pub fn http3(input: &[u8]) {
    let [kind, cut, stream @ ..] = input else { return };
    let on = if kind & 1 == 0 { On::Request } else { On::Control };
    let read = |step: usize| {
        let (mut frames, mut items) = (Frames::new(on), Vec::new());
        for piece in stream.chunks(step.max(1)) {
            frames.push(Bytes::copy_from_slice(piece));
            while let Some(item) = frames.item()? {
                match (items.last_mut(), item) {
                    (Some(Item::Data(before)), Item::Data(more)) => {
                        *before = [&before[..], &more].concat().into();
                    }
                    (_, item) => items.push(item),
                }
            }
        }
        frames.end().map(|()| items)
    };
    let whole = read(usize::MAX);
    assert_eq!(read(usize::from(*cut)), whole, "however it is cut, it says the same");
    for item in whole.iter().flatten() {
        match item {
            Item::Frame(Kind::HEADERS, section) => {
                assert!(section.len() <= HEADERS);
                header_section(section);
            }
            Item::Frame(Kind::SETTINGS, payload) => drop(settings::parse(payload.clone())),
            _ => {}
        }
    }
    header_section(stream);
}

fn header_section(section: &[u8]) {
    if let Ok(fields) = qpack::decode(section, HEADERS) {
        let bytes: usize = fields.iter().map(|(name, value)| name.len() + value.len()).sum();
        assert!(bytes <= HEADERS, "fields are bounded");
    }
    if let Ok(head) = message::decode_request(section) {
        match request::target_of(&head.method, &head.authority, &head.headers) {
            Ok(target) => {
                assert_eq!(head.method, Method::CONNECT);
                same_target(&target);
                let encoded = message::encode_connect(&head.authority, &head.headers);
                let again = message::decode_request(&encoded).expect("what we write can be read");
                assert_eq!((again.authority, again.headers), (head.authority, head.headers));
            }
            Err(Malformed { authority, error }) => {
                assert!(authority.chars().all(|c| c.is_ascii_graphic()), "it is logged");
                assert!(error.reason().status().is_some_and(|s| s.is_client_error()), "{error}");
            }
        }
    }
    let _response = message::decode_response(section);
}

/// The first bytes of a carried connection.
pub fn sniff(input: &[u8]) {
    let whole = sniff::parse(input);
    for cut in 0..input.len().min(64) {
        match sniff::parse(&input[..cut]) {
            Parse::More => {}
            done => assert_eq!(done, whole, "what was found stays found, whatever follows"),
        }
    }
}

/// A PROXY header, and what is behind it.
pub fn proxy_header(input: &[u8]) {
    let whole = proxy::parse(input);
    for cut in 0..input.len().min(64) {
        match proxy::parse(&input[..cut]) {
            Ok(None) => {}
            done => assert_eq!(done, whole, "a header does not depend on what is behind it"),
        }
    }
    let Ok(Some((client, length))) = whole else { return };
    assert!(length <= input.len().min(proxy::V2_MAX));
    let Some(client) = client else { return };
    let destination = client.0;
    let said = proxy::Header { client, destination, name: None, identity: None }.encode();
    let again = proxy::parse(&said).expect("what we write can be read").expect("it is whole");
    let (Some(again), length) = again else { panic!("it has an address") };
    assert_eq!((again.0.ip().to_canonical(), length), (client.0.ip().to_canonical(), said.len()));
}

/// A TLS record session: what its peer seals, what happens to that on the way, and what is written and read meanwhile.
pub fn records(input: &[u8]) {
    records::run(input);
}

/// A peer's certificates, the leaf first, each behind its length in two bytes: what is read of them, before and beside webpki.
pub fn certificate(input: &[u8]) {
    let mut rest = input;
    let mut chain = Vec::new();
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(behind.len());
        chain.push(CertificateDer::from(behind[..length].to_vec()));
        rest = &behind[length..];
    }
    let names = chain.first().map(names_of).unwrap_or_default();
    let identity = peer_identity(&chain);
    assert!(
        identity.is_none_or(|id| names.iter().any(|name| name.to_string() == *id.0)),
        "an identity is one of the names"
    );
    let claims = verify::claims(&chain);
    assert!(claims.is_ok() || !chain.is_empty(), "nobody claims nothing");
}

/// An answer of a Workload API.
pub fn svid(input: &[u8]) {
    if let Ok(material) = workload_api::read_answer(input) {
        assert!(material.bundles.general.is_none(), "roots are of a trust domain");
        assert!(!material.bundles.domains.is_empty() && !material.certificate.cert.is_empty());
        assert!(material.bundles.domains.values().all(|bundle| !bundle.is_empty()));
    }
}

/// An answer of an SDS server.
pub fn sds(input: &[u8]) {
    if let Err(why) = sds::read_answer(input) {
        assert!(!why.is_empty() && !why.contains('\0'), "it is logged");
    }
}

/// A certificate, as a peer shows it before anybody has verified it: its names, and who it says the peer is.
pub fn certificate_names(input: &[u8]) {
    let certs = [CertificateDer::from(input)];
    let names: Vec<String> = names_of(&certs[0]).iter().map(ToString::to_string).collect();
    if let Some(identity) = peer_identity(&certs) {
        assert!(names.contains(&identity.to_string()), "it is one of its names: {identity}");
        let is_spiffe = |name: &str| name.starts_with("spiffe://");
        assert!(is_spiffe(&identity.to_string()) || !names.iter().any(|name| is_spiffe(name)), "{names:?}");
    }
    // Whatever it says of its dates.
    let _checked = check_expiry(&certs, UnixTime::since_unix_epoch(Duration::from_secs(1 << 31)));
}

/// A configuration file.
pub fn config(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match Config::parse(text, Path::new("fuzz.toml"), CheckFiles::No) {
        Ok(config) => {
            let names = config.upstreams.len();
            let router = Router::new(config.routes);
            let _routes = (router.peer(None), names);
            policies(config.policies);
        }
        Err(mistakes) => {
            let said = mistakes.to_string();
            assert!(said.contains("fuzz.toml"), "a mistake has its place: {said}");
        }
    }
}

/// Policies: looked up, they decide as one after the other does.
fn policies(policies: Vec<Policy>) {
    let client = ClientAddr(SocketAddr::from(([10, 0, 0, 1], 1)));
    // Targets and identities that the policies themselves name.
    let named = |policy: &Policy| match policy.targets().first() {
        Some(TargetPattern::Addr(pattern)) => Some(Target::Addr(SocketAddr::new(pattern.net().addr(), 80))),
        Some(TargetPattern::Name(pattern)) => Some(Target::Name(format!("a.{}", pattern.name()), 80)),
        None => None,
    };
    let asked: Vec<_> = policies.iter().take(8).filter_map(named).collect();
    let peers = policies.iter().take(8).filter_map(|policy| match &policy.identity {
        Peers::Any => None,
        Peers::Of(names) => names.first().map(|name| Identity(name.to_string().replace('*', "x").into())),
    });
    let peers: Vec<_> = peers.map(Some).chain([None]).collect();
    let policies = Policies::new(policies, &[]);
    for (identity, target) in peers.iter().flat_map(|peer| asked.iter().map(move |target| (peer, target))) {
        let peer = policies.peer(identity.clone(), client);
        let permit = policies.check_target(policy::Request { who: &peer, target, headers: None });
        let question = Question { identity: identity.as_ref(), client, target, addr: None, headers: None };
        let verdict = policies.explain(&question).verdict;
        match permit {
            Ok(permit) => assert_eq!(permit.rule().map_or(Verdict::Unresolved, Verdict::Allowed), verdict),
            Err(denied) => assert_eq!(Verdict::Denied(denied), verdict),
        }
    }
}

/// A target is what it prints, to whoever reads it next.
fn same_target(target: &Target) {
    let again: Result<Target, _> = target.to_string().parse();
    assert_eq!(again.as_ref(), Ok(target), "it is asked for in these words");
    assert_ne!(target.port(), 0);
}
