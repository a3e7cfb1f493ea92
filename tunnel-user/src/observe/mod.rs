//! What is told about flows: counters, records, log lines.

pub mod flows;
pub mod histogram;
pub mod recent;
pub mod repeats;
pub mod stats;
pub mod telemetry;
