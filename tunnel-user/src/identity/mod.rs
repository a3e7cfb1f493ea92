//! Who we are and whom we trust.

mod constraints;
mod pem;
pub mod san;
pub mod store;
pub mod tls;
pub mod verify;
