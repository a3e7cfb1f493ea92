//! Benchmarks: this project against redirection by iptables, and against the programs in its place.
//!
//! The result is a report: a file for programs ([`model`]), a page and a table for people.
//!
//! # Invariants
//! - Arms take turns within every round, each in network namespaces of its own.
//! - A run whose bytes do not all arrive is a fault, not a number.

mod accounting;
mod arms;
pub mod flags;
mod footprint;
pub mod hold;
mod machine;
pub mod model;
pub mod peers;
pub mod plan;
pub mod report;
pub mod runner;
pub mod stats;
mod wire;
