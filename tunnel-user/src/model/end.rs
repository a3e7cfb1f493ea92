//! Why a flow ended, or was refused: one list, which the access log, `--stats`, the counters and `proxy-status` share.
//!
//! # Invariants
//! - A word, once released, keeps its meaning: programs match it. What else there is to say is a separate text.

use std::fmt;

use http::StatusCode;
use serde::{Serialize, Serializer};

/// Who could have kept a flow from ending that way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Nobody: it ended in order.
    Nobody,
    /// The application, or the peer that sent the request.
    Client,
    /// The target, the upstream, or the network on the way there.
    Upstream,
    /// This process, its configuration, or the node that it runs on.
    Us,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal, $fault:ident, $status:expr, $error:expr;)+) => {
        /// Why a flow ended, or was refused. See [the table](EndReason::ALL).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum EndReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl EndReason {
            /// All of them.
            pub const ALL: [Self; [$($word),+].len()] = [$(Self::$name),+];

            /// The word by which programs know it.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }

            /// The name of the counter of flows that ended so.
            pub const fn counter(self) -> &'static str {
                match self { $(Self::$name => concat!("ended_", $word),)+ }
            }

            /// What it means, in a sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii_start(),)+ }
            }

            /// Who could have kept it from happening.
            pub const fn fault(self) -> Fault {
                match self { $(Self::$name => Fault::$fault,)+ }
            }

            /// What a CONNECT request that is refused so is answered. None where a flow ends so that was established; for
            /// [`Self::UpstreamRefused`] it is what the next hop answered.
            pub const fn status(self) -> Option<StatusCode> {
                match self { $(Self::$name => $status,)+ }
            }

            /// The error type in `proxy-status` (RFC 9209 section 2.3); none where there is no status.
            pub const fn proxy_error(self) -> Option<&'static str> {
                match self { $(Self::$name => $error,)+ }
            }
        }
    };
}

use StatusCode as S;

reasons! {
    /// Both sides have ended in order.
    Closed = "closed", Nobody, None, None;
    /// The client reset its connection, or its stream.
    ClientReset = "client_reset", Client, None, None;
    /// The client's HTTP/2 or TLS connection was lost, and its streams with it.
    ClientLost = "client_lost", Client, None, None;
    /// The client's HTTP/2 connection was closed because the client flooded it.
    ClientFlood = "client_flood", Client, None, None;
    /// The client acknowledged nothing for as long as the keep-alive settings allow.
    ClientTimeout = "client_timeout", Client, None, None;
    /// The client left before the target had answered.
    ClientLeft = "client_left", Client, None, None;
    /// The target reset its connection, or the upstream its stream.
    TargetReset = "target_reset", Upstream, None, None;
    /// The target acknowledged nothing for as long as the keep-alive settings allow.
    TargetTimeout = "target_timeout", Upstream, None, None;
    /// The connection to the upstream was lost, and its streams with it; before the answer, the stream too.
    UpstreamLost = "upstream_lost", Upstream, Some(S::BAD_GATEWAY), Some("connection_terminated");
    /// It outlasted the drain timeout, or a second signal did not wait for it.
    DrainTimeout = "drain_timeout", Us, None, None;
    /// A policy or a route that came in force since does not allow it any more.
    PolicyChanged = "policy_changed", Us, None, None;
    /// A certificate that its connection rests on has expired, is not trusted any more or was withdrawn, and the identity says
    /// on_expiry = "end".
    IdentityExpired = "identity_expired", Us, None, None;
    /// No byte has moved for as long as a flow may be idle.
    IdleTimeout = "idle_timeout", Us, None, None;
    /// It has lasted as long as a flow may.
    MaxDuration = "max_duration", Us, None, None;
    /// An operator ended it.
    Killed = "killed", Us, None, None;
    /// This process could not carry it on.
    InternalError = "internal_error", Us, None, None;
    /// It was spliced, and the kernel program could not put bytes into its mailbox.
    SpliceOverflow = "splice_overflow", Us, None, None;

    /// The request is malformed.
    BadRequest = "bad_request", Client, Some(S::BAD_REQUEST), Some("http_request_error");
    /// Its method is not CONNECT.
    BadMethod = "bad_method", Client, Some(S::METHOD_NOT_ALLOWED), Some("http_request_error");
    /// Its first line is too long (RFC 9112 section 3).
    UriTooLong = "uri_too_long", Client, Some(S::URI_TOO_LONG), Some("http_request_error");
    /// Its headers are too long, or too many (RFC 6585 section 5).
    HeadersTooLarge = "headers_too_large", Client, Some(S::REQUEST_HEADER_FIELDS_TOO_LARGE), Some("http_request_error");
    /// No policy allows it.
    PolicyDenied = "policy_denied", Client, Some(S::FORBIDDEN), Some("http_request_denied");
    /// A route denies it.
    RouteDenied = "route_denied", Client, Some(S::FORBIDDEN), Some("http_request_denied");
    /// No route matches it.
    NoRoute = "no_route", Client, Some(S::FORBIDDEN), Some("http_request_denied");
    /// The request has passed this process before (RFC 5842 section 7.2).
    Loop = "loop", Us, Some(S::LOOP_DETECTED), Some("proxy_loop_detected");
    /// As many flows as this worker takes are there.
    FlowLimit = "flow_limit", Us, Some(S::SERVICE_UNAVAILABLE), Some("connection_limit_reached");
    /// As many flows as one peer gets are there.
    PeerLimit = "peer_limit", Client, Some(S::SERVICE_UNAVAILABLE), Some("connection_limit_reached");
    /// As many new flows as one peer gets in a second have begun.
    PeerRate = "peer_rate", Client, Some(S::SERVICE_UNAVAILABLE), Some("connection_limit_reached");
    /// As much memory as one peer gets is in use.
    PeerMemory = "peer_memory", Client, Some(S::SERVICE_UNAVAILABLE), Some("connection_limit_reached");
    /// As much memory as there is for all peers is in use.
    MemoryLimit = "memory_limit", Us, Some(S::SERVICE_UNAVAILABLE), Some("connection_limit_reached");
    /// As much as this upstream gets is in use.
    UpstreamLimit = "upstream_limit", Us, Some(S::SERVICE_UNAVAILABLE), Some("connection_limit_reached");

    /// The target's name does not resolve.
    DnsError = "dns_error", Upstream, Some(S::BAD_GATEWAY), Some("dns_error");
    /// The target's name was not resolved in time.
    DnsTimeout = "dns_timeout", Upstream, Some(S::GATEWAY_TIMEOUT), Some("dns_timeout");
    /// Nothing listens at the target.
    TargetRefused = "target_refused", Upstream, Some(S::BAD_GATEWAY), Some("connection_refused");
    /// There is no way to the target.
    TargetUnreachable = "target_unreachable", Upstream, Some(S::SERVICE_UNAVAILABLE), Some("destination_ip_unroutable");
    /// The target did not answer in time.
    ConnectTimeout = "connect_timeout", Upstream, Some(S::GATEWAY_TIMEOUT), Some("connection_timeout");
    /// This node could not connect: it is out of descriptors, ports or memory.
    ConnectFailed = "connect_failed", Us, Some(S::SERVICE_UNAVAILABLE), Some("proxy_internal_error");
    /// No endpoint of the upstream could be connected to.
    UpstreamUnreachable = "upstream_unreachable", Upstream, Some(S::SERVICE_UNAVAILABLE), Some("destination_unavailable");
    /// TLS with the upstream failed.
    UpstreamTls = "upstream_tls", Upstream, Some(S::SERVICE_UNAVAILABLE), Some("destination_unavailable");
    /// Every endpoint of the upstream is ejected.
    NoHealthyEndpoint = "no_healthy_endpoint", Upstream, Some(S::SERVICE_UNAVAILABLE), Some("destination_unavailable");
    /// The upstream has no endpoints, or none is known yet.
    NoEndpoint = "no_endpoint", Upstream, Some(S::SERVICE_UNAVAILABLE), Some("destination_unavailable");
    /// The upstream refused the request, with a status of its own, which is passed on.
    UpstreamRefused = "upstream_refused", Upstream, None, None;
    /// The upstream did not answer the request in time.
    UpstreamTimeout = "upstream_timeout", Upstream, Some(S::GATEWAY_TIMEOUT), Some("http_response_timeout");

    /// Its original destination is not known, so it was not carried.
    NoOriginalDst = "no_original_dst", Us, None, None;
    /// Its original destination is a listener of this process, so carrying it would bring it back.
    ToOurselves = "to_ourselves", Us, None, None;
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Serialize for EndReason {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// `proxy-status` error types (RFC 9209 section 2.3) that we use.
    const REGISTERED: [&str; 14] = [
        "dns_timeout",
        "dns_error",
        "destination_unavailable",
        "destination_ip_unroutable",
        "connection_refused",
        "connection_terminated",
        "connection_timeout",
        "connection_limit_reached",
        "http_request_error",
        "http_request_denied",
        "http_response_timeout",
        "proxy_internal_error",
        "proxy_configuration_error",
        "proxy_loop_detected",
    ];

    #[test]
    fn words_are_unique_and_snake_case() {
        let words: BTreeSet<_> = EndReason::ALL.iter().map(|r| r.word()).collect();
        assert_eq!(words.len(), EndReason::ALL.len());
        for (i, reason) in EndReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, i);
            let word = reason.word();
            assert!(word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{word}");
            assert_eq!(reason.counter().strip_prefix("ended_"), Some(word));
            assert_eq!(serde_json::to_value(reason).unwrap(), word);
            assert!(reason.meaning().ends_with('.'), "{word}: {}", reason.meaning());
        }
    }

    #[test]
    fn what_is_answered_has_an_error_type_of_rfc_9209_and_what_is_not_has_none() {
        for reason in EndReason::ALL {
            assert_eq!(reason.status().is_some(), reason.proxy_error().is_some(), "{reason}");
            let Some(status) = reason.status() else { continue };
            assert!(status.is_client_error() || status.is_server_error(), "{reason}");
            assert!(REGISTERED.contains(&reason.proxy_error().unwrap_or_default()), "{reason}");
            assert_ne!(reason.fault(), Fault::Nobody, "{reason}");
            // That is what a 4xx says.
            assert!(!status.is_client_error() || reason.fault() == Fault::Client, "{reason}");
        }
        let in_order = EndReason::ALL.into_iter().filter(|r| r.fault() == Fault::Nobody);
        assert_eq!(in_order.collect::<Vec<_>>(), [EndReason::Closed]);
    }
}
