//! Benchmarks: this project against redirection by iptables, and against the programs in its place.
//!
//! Enters: what to run. Leaves: a report, which is a file for programs ([`model`]), a page and a table for
//! people. Invariant: arms take turns within every round, each in network namespaces of its own; a run whose
//! bytes do not all arrive is a fault, not a number.

mod accounting;
mod arms;
pub mod flags;
pub mod hold;
mod machine;
pub mod model;
pub mod peers;
pub mod plan;
pub mod report;
pub mod runner;
pub mod stats;
mod wire;
