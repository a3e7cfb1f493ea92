//! Sink 2: a CONNECT stream through an upstream.
//!
//! Enters: a flow's target and what is known of its client. Leaves: an HTTP/2 stream, or an HTTP/1
//! connection, whose far end has reached the target. Invariant: none is handed out before its 2xx; a refusal says who refused and
//! why. It never relays.

pub mod connect;
pub mod discovery;
pub mod endpoints;
mod error;
pub mod failover;
pub mod h1;
pub mod h2;
pub mod headers;
pub mod health;
pub mod in_process;
pub mod limit;
mod lines;
pub mod nested;
pub mod open;
pub mod pick;
pub mod pool;
pub mod upstreams;

#[cfg(test)]
mod tests;

pub use error::TunnelError;
pub use in_process::InProcessUpstream;
pub use open::{Leg, Settings, Stream, Tls, Upstream};
pub use upstreams::{Next, Upstreams};
