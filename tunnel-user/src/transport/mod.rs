//! What carries bytes between us and a peer.
//!
//! Enters: addresses, certificates and keys. Leaves: connections whose far end has proved who it is.
//! Invariant: there is no way to a peer's bytes around the checks that the configuration asks for. It
//! never decides what a peer may reach; that is the policy's.

pub mod alert;
pub mod h1;
pub mod http2;
pub mod io;
pub mod proxy;
pub mod pulse;
pub mod record;
pub mod resolver;
pub mod sockopt;
pub mod tcp;
pub mod window;

#[cfg(test)]
mod tests;
