//! Who we are and whom we trust.

mod constraints;
pub mod describe;
mod files;
pub mod peer;
mod pem;
pub mod provider;
pub mod quic;
pub mod store;
pub mod tls;
pub mod verify;
