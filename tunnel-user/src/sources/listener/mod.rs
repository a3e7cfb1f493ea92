//! CONNECT requests that peers send to our listeners, over HTTP/1, HTTP/2 and HTTP/3.
//!
//! # Invariants
//! - Where a listener speaks TLS, no request is read before the peer's certificate was verified.
//! - What a peer does wrong ends its own connection only.

pub mod accept;
pub mod h1;
pub mod h2;
pub mod h3;
pub mod handshakes;
pub mod request;
mod serve;

pub use serve::serve;
