//! Who we are and whom we trust.

mod constraints;
pub mod peer;
mod pem;
pub mod store;
pub mod tls;
pub mod verify;
