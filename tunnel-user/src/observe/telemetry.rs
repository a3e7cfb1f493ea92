//! Logging: a filter and a format, on standard error.
//!
//! Standard output belongs to the command that is run, or to what was requested. The environment is read by the command line only.

use std::io::IsTerminal as _;

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Human-readable lines.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// A filter such as `info` or `warn,tunnel::relay=debug`, known to be one.
#[derive(Clone, Debug)]
pub struct LogFilter(String);

impl std::str::FromStr for LogFilter {
    type Err = tracing_subscriber::filter::ParseError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        EnvFilter::builder().parse(s).map(|_| Self(s.to_owned()))
    }
}

/// Starts logging, in the whole process. A second call changes nothing.
pub fn init(filter: &LogFilter, format: LogFormat) {
    // Colours would be rubbish in a file or a journal.
    let colours = std::io::stderr().is_terminal();
    let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(colours).with_target(true);
    let registry = tracing_subscriber::registry().with(EnvFilter::new(&filter.0));
    // It fails only when logging has been started: by an earlier call, or by a test.
    let _ = match format {
        LogFormat::Text => registry.with(layer).try_init(),
        LogFormat::Json => registry.with(layer.json()).try_init(),
    };
}
