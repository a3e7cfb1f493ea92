//! Sink 2: a CONNECT stream through an upstream: which endpoint, over which connection, and what goes wrong on the way.
//!
//! A flow asks an [`Upstream`] for a stream. That picks an endpoint (`endpoints`, `pick`, `health`), has its [`connector`]
//! check out a connection there (`pool`), and opens the stream on it (`connection`, which `h1`, `h2` and `h3` implement). A
//! connection is made over a socket or over a stream of another upstream (`connect`, `underlay`).
//!
//! # Invariants
//! - No stream is handed out before its 2xx; a refusal says who refused and why.

pub mod alternative;
pub mod connect;
pub mod connection;
pub mod connector;
pub mod discovery;
pub mod endpoints;
mod error;
pub mod failover;
pub mod h1;
pub mod h2;
pub mod h3;
pub mod headers;
pub mod health;
pub mod in_process;
pub mod limit;
pub mod open;
pub mod permit;
pub mod pick;
pub mod pool;
pub mod report;
pub mod settings;
mod signal;
pub mod stream;
pub mod underlay;
pub mod upstreams;

pub use error::{CheckError, ConnectError, TunnelError};
pub use in_process::{InProcessUpstream, Proof};
pub use open::Upstream;
pub use settings::{PoolSettings, UpstreamSettings, UpstreamTls};
pub use stream::Stream;
pub use upstreams::{Next, Upstreams};
