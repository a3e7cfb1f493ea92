//! Who we are and whom we trust.

pub mod configured;
mod constraints;
pub mod describe;
mod files;
mod grpc;
pub mod peer;
mod pem;
pub mod provider;
mod pushed;
pub mod quic;
pub mod sds;
pub mod standing;
pub mod store;
mod svid;
pub mod tls;
mod trust;
pub mod verify;
pub mod workload_api;
