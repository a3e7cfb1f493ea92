//! A stream through one of a route's upstreams: the one that was picked, and, as often as the route says, another one after it.
//!
//! # Invariants
//! - A request is retried only where nobody can have acted on it, or where the answer says that its target was not reached.

use http::StatusCode;

use super::{
    Next, Stream, TunnelError, Upstream, Upstreams,
    headers::{Ask, is_loop},
    in_process::DispatchInProcess,
};
use crate::{
    model::{flow::Target, names::UpstreamName},
    relay::Ahead,
};

/// Answers after which another upstream is tried: the target, or the next hop, was not reached.
const RETRIABLE: [StatusCode; 3] =
    [StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];

/// What a flow goes on with.
#[expect(clippy::large_enum_variant, reason = "the sink in process holds a stream too; it is moved once")]
pub enum Opened<'u, S> {
    /// A stream through this upstream.
    Stream(&'u Upstream, Stream),
    /// What a listener of this process has for it.
    InProcess(S),
}

/// Why there is no stream.
#[derive(Debug)]
pub enum OpenError {
    /// The upstream is not among those of the worker.
    Unknown(Target),
    /// The request has passed this process before.
    Loop,
    /// The last one that was tried has failed.
    Upstream(TunnelError),
}

/// Opens a stream through the upstream `first`; where that fails, and the route has it retried, through another one, or
/// another endpoint. `another`: one more of the route's, without those that were tried.
pub async fn open<'u, 's, D>(
    upstreams: &'u Upstreams,
    first: &'s UpstreamName,
    another: impl Fn(&[&'s UpstreamName]) -> Option<&'s UpstreamName>,
    ask: &Ask<'_>,
    ahead: Option<&Ahead<'_>>,
    in_process: D,
) -> Result<Opened<'u, D::Sink>, D::Error>
where
    D: DispatchInProcess,
    D::Error: From<OpenError>,
{
    let mut upstream = first;
    let mut left = ask.terms.retries;
    let mut tried = Vec::new();
    // All were tried: the next endpoint of one, when it is the only one.
    let next_endpoint = |tried: &mut Vec<&'s UpstreamName>| {
        tried.clear();
        another(tried)
    };
    loop {
        let unknown = || OpenError::Unknown(ask.target.clone());
        let chosen = match upstreams.get(upstream).ok_or_else(unknown)? {
            Next::Tunnel(chosen) => chosen,
            Next::InProcess(own) => {
                return in_process.dispatch_in_process(own, ask).await.map(Opened::InProcess);
            }
        };
        // What is dialled here goes around no further.
        if ask.received.is_some_and(|r| is_loop(r.headers, ask.pseudonym)) {
            return Err(OpenError::Loop.into());
        }
        let failed = match chosen.connect(ask, ahead).await {
            Ok(stream) => return Ok(Opened::Stream(chosen, stream)),
            Err(e) => e,
        };
        tried.push(upstream);
        let next = match &failed {
            _ if left == 0 => None,
            // All of its endpoints were tried, or none may be.
            TunnelError::Connect { .. }
            | TunnelError::NoEndpoint { .. }
            | TunnelError::Empty { .. }
            | TunnelError::Limit { .. } => another(&tried),
            TunnelError::Refused { status, .. } if RETRIABLE.contains(status) => {
                another(&tried).or_else(|| next_endpoint(&mut tried))
            }
            // The connection was lost, or seems to be, and nothing was carried on it.
            TunnelError::Dropped { .. } if ahead.is_none_or(|ahead| !ahead.has_carried()) => {
                another(&tried).or_else(|| next_endpoint(&mut tried))
            }
            // Somebody has, or may have, acted on it; or will say the same again.
            _ => None,
        };
        let Some(next) = next else { return Err(OpenError::Upstream(failed).into()) };
        tracing::debug!(target = %ask.target, upstream = %chosen.name(), error = %failed, "retrying");
        left -= 1;
        upstream = next;
    }
}
