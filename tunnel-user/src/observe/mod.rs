//! What is told about flows: counters, records, log lines.

pub mod access_log;
pub mod flows;
pub mod histogram;
pub mod istio;
pub mod marks;
pub mod policies;
pub mod recent;
pub mod repeats;
pub mod stats;
mod stderr;
pub mod telemetry;
pub mod totals;
pub mod traces;
