//! What carries bytes between us and a peer.
//!
//! Enters: addresses, certificates and keys. Leaves: connections whose far end has proved who it is.
//! Invariant: there is no way to a peer's bytes around the checks that the configuration asks for. It
//! never decides what a peer may reach; that is the policy's.

mod constraints;
pub mod h1;
pub mod identity;
pub mod io;
pub mod nested;
mod pem;
pub mod proxy;
pub mod pulse;
pub mod record;
pub mod store;
pub mod tcp;
pub mod tls;
pub mod verify;
pub mod window;

#[cfg(test)]
mod tests;
