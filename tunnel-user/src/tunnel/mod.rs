//! Sink 2: a CONNECT stream through an upstream.
//!
//! Enters: a flow's target and what is known of its client. Leaves: an HTTP/2 stream whose far end has
//! reached the target. Invariant: no stream is handed out before its 200; a refusal says who refused and
//! why. It never relays.

pub mod headers;
pub mod pick;
pub mod pool;
pub mod upstream;

#[cfg(test)]
mod tests;

pub use upstream::{Settings, Stream, TunnelError, Upstream};
