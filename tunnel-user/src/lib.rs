//! `tunnel`: an eBPF-accelerated transparent tunnel proxy for Linux nodes.
//!
//! The library behind the `tunnel` program. Each module is a room; a room imports those that stand further down here, and
//! `cargo xtask rooms` says where one does not. `unsafe` stands in `kernel` and in `transport::sockopt`; the compiler denies it
//! elsewhere. `ARCHITECTURE.md` tells which room does what.

#![deny(unsafe_code)]

pub mod admin;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod identity;
pub mod kernel;
pub mod model;
pub mod observe;
pub mod process;
pub mod proxy;
pub mod relay;
pub mod routing;
pub mod sinks;
pub mod sources;
pub mod transport;
pub mod worker;
