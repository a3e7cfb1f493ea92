//! What is told about flows: counters, records, log lines.

pub mod flows;
pub mod policies;
pub mod repeats;
pub mod stats;
pub mod telemetry;
