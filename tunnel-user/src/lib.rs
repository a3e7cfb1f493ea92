//! `tunnel`: an eBPF-accelerated transparent tunnel proxy for Linux nodes.
//!
//! The library behind the `tunnel` program, its modules in the order a byte meets them.
//! `ARCHITECTURE.md` tells which room does what; only [`app`] wires rooms together.

pub mod app;
pub mod btf;
pub mod capture;
pub mod cli;
pub mod config;
pub mod dial;
pub mod doctor;
pub mod drain;
pub mod exec;
pub mod exit;
pub mod files;
pub mod firewall;
pub mod flow;
pub mod index;
pub mod inherited;
pub mod inspect;
pub mod kernels;
pub mod limits;
pub mod listener;
pub mod memory;
pub mod names;
pub mod netlink;
pub mod own;
pub mod panics;
pub mod pki;
pub mod policy;
pub mod privileges;
pub mod relay;
pub mod repeats;
pub mod route;
pub mod signal;
pub mod stats;
pub mod takeover;
pub mod telemetry;
pub mod transport;
pub mod tunnel;
pub mod worker;
