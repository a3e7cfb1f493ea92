//! `tunnel`: an eBPF-accelerated transparent tunnel proxy for Linux nodes.
//!
//! The library behind the `tunnel` program, its modules in the order a byte meets them.
//! `ARCHITECTURE.md` tells which room does what; only [`app`] wires rooms together.

pub mod capture;
pub mod dial;
pub mod flow;
pub mod pki;
pub mod relay;
pub mod transport;
pub mod tunnel;
