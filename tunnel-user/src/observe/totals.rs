//! What is counted for the whole process, beside the counters of its workers.

use super::{access_log, telemetry, traces};

macro_rules! totals {
    ($($(#[doc = $doc:literal])+ $name:ident = $read:path,)+) => {
        /// Every total with its name.
        pub fn all() -> Vec<(&'static str, u64)> {
            vec![$((stringify!($name), $read()),)+]
        }
    };
}

totals! {
    /// Lines of access logs that were written.
    access_log_lines = access_log::written,
    /// Lines of access logs that were lost: the queue was full, or they could not be written.
    access_log_lost = access_log::lost,
    /// Log lines that were lost: standard error was not read as fast.
    log_lines_lost = telemetry::lost,
    /// Spans that a collector took.
    spans_exported = traces::exported,
    /// Spans that were dropped: the queue was full, or no collector took them.
    spans_dropped = traces::dropped,
}
