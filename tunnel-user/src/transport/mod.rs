//! What carries bytes between us and a peer: TCP, TLS records, HTTP/1 heads, HTTP/2 windows, HTTP/3 frames, QUIC, PROXY headers, name resolution.
//!
//! A peer's bytes cannot be reached around the certificate checks that the configuration requires.

pub mod alert;
pub mod h1;
pub mod http2;
pub mod http3;
pub mod io;
pub mod proxy;
pub mod pulse;
pub mod quic;
pub mod record;
pub mod resolver;
pub mod sockopt;
pub mod tcp;
pub mod turn;
pub mod window;

#[cfg(test)]
mod tests;
