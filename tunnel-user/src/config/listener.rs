//! `[[listener]]`: where CONNECT requests arrive.

use std::{collections::HashSet, net::SocketAddr, num::NonZeroU32, time::Duration};

use super::{
    Congestion, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, Protocol,
    reader::{At, Reader, Section},
    section::section,
};
use crate::model::{
    names::{IdentityName, SourceName},
    san::SanPattern,
    trust::ClientCheck,
};

/// How long a dial to a target may take; Linux sends its fourth SYN after 7 s (1 + 2 + 4).
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take for its TLS handshake. As long as a dial, of which it is the second half.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer's connection may be without a stream. Clients pool theirs: Envoy closes its own after an hour.
pub(super) const LISTENER_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// CONNECT streams that a listener takes on one connection: twice what our own client opens.
pub const LISTENER_STREAMS: NonZeroU32 = NonZeroU32::new(200).expect("not 0");

section! {
    /// `[[listener]]`
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Listener {
        /// Name, for routes.
        name: optional String,
        /// Address to listen on: ADDRESS:PORT.
        address: required SocketAddr,
        /// The HTTP versions to take: with TLS the first that the client offers too (ALPN; "h1" when it offers none), in
        /// plaintext what its first bytes say. "h3" is HTTP/3, on the same port over UDP; with "h3" alone nothing listens for
        /// TCP. It takes TLS, and there is no PROXY header in front of it.
        protocols: default Vec<Protocol> = vec![Protocol::H2],
        /// Whether it speaks TLS. Without it no client can prove who it is: only policies for "any" match.
        tls: default bool = true,
        /// Whether every connection begins with a PROXY header (version 1 or 2), whose client address is used. Only for
        /// listeners that nothing but a load balancer can reach. Connections without a header are closed.
        proxy_protocol: default bool = false,
        /// Whether clients must present a certificate.
        client_auth: default ClientAuth = ClientAuth::Required,
        /// Who we are to clients, where it speaks TLS.
        identity: other IdentityName = IdentityName::default(),
        /// Names (SAN); a client's certificate must have one of them to be accepted. Empty: any certificate of the CA.
        verify: default Vec<SanPattern> = Vec::new(),
        /// Timeout for dialling a target.
        dial_timeout: default Duration = DIAL_TIMEOUT,
        /// Timeout for the TLS handshake and the start of HTTP; over HTTP/1, the whole head of the request.
        handshake_timeout: default Duration = HANDSHAKE_TIMEOUT,
        /// Maximum of concurrent CONNECT streams on one connection.
        max_streams: default NonZeroU32 = LISTENER_STREAMS,
        /// Who decides how fast is sent over HTTP/3: "cubic", "bbr". Over TCP it is the kernel.
        congestion_control: default Congestion = Congestion::Cubic,
        /// Interval of PINGs on an idle connection of HTTP/2 or HTTP/3. With keepalive_timeout it bounds how long a peer may be
        /// suspended before its flows are reset.
        keepalive_interval: default Duration = KEEPALIVE_INTERVAL,
        /// Timeout for the answer to a PING.
        keepalive_timeout: default Duration = KEEPALIVE_TIMEOUT,
        /// How long an HTTP/2 connection may be without a stream before it is closed.
        idle_timeout: default Duration = LISTENER_IDLE_TIMEOUT,
    }
    check |r| {
        let identity = r.optional(
            "identity",
            "Name of the identity that clients are shown, and whose CA certificates they are verified with. Default: the only identity, or the one named \"default\".",
        ).unwrap_or(identity);
        if protocols.is_empty() {
            r.wrong("protocols", "is empty: nobody could speak to it");
        }
        if protocols.len() > protocols.iter().collect::<HashSet<_>>().len() {
            r.wrong("protocols", "says the same twice");
        }
        if !tls {
            for key in ["client_auth", "verify", "identity"] {
                if r.has(key) {
                    r.wrong(key, "has no meaning with tls = false: clients show certificates in TLS only");
                }
            }
        }
        if protocols.contains(&Protocol::H3) {
            if !tls {
                r.wrong("protocols", "has \"h3\", which there is with TLS only");
            }
            if proxy_protocol {
                r.wrong("protocols", "has \"h3\", in front of which there is no PROXY header");
            }
        } else if r.has("congestion_control") {
            r.wrong("congestion_control", "has no meaning without \"h3\": over TCP it is the kernel's");
        }
        if protocols == [Protocol::H1] {
            for key in ["max_streams", "keepalive_interval", "keepalive_timeout", "idle_timeout"] {
                if r.has(key) {
                    r.wrong(key, "has no meaning without \"h2\": over HTTP/1 a connection carries one flow");
                }
            }
        }
    }
    defaults new;
}

impl Listener {
    /// Its stable name.
    pub fn source(&self) -> SourceName {
        SourceName::Listener(self.address)
    }

    /// What it speaks over TCP.
    pub fn over_tcp(&self) -> Vec<Protocol> {
        self.protocols.iter().copied().filter(|p| *p != Protocol::H3).collect()
    }

    /// Whether it speaks HTTP/3, over UDP.
    pub fn has_h3(&self) -> bool {
        self.protocols.contains(&Protocol::H3)
    }

    /// What its clients must prove; without TLS nothing.
    pub fn check(&self) -> Option<ClientCheck> {
        self.tls.then(|| ClientCheck { san: self.verify.clone() })
    }
}

/// A listener and the place of its address.
impl Section for At<Listener> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let listener = Listener::read(r)?;
        Some(r.at("address", listener))
    }
}

/// Whether clients must present a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientAuth {
    /// They must.
    #[default]
    Required,
}
