//! Logging: a filter and a format, on standard error.
//!
//! Standard output belongs to the command that is run, or to what was requested. The environment is read by the command line only.

use std::{
    io::IsTerminal as _,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use clap::ValueEnum;
use tracing_subscriber::{
    EnvFilter, Registry,
    filter::{LevelFilter, ParseError},
    fmt,
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
};

use super::{recent, stderr};

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

impl LogFilter {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for LogFilter {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        EnvFilter::builder().parse(s).map(|_| Self(s.to_owned()))
    }
}

/// The filter in force, and that which logging was started with.
struct Filters {
    handle: reload::Handle<EnvFilter, Registry>,
    first: String,
    now: Mutex<String>,
}

static FILTERS: OnceLock<Arc<Filters>> = OnceLock::new();

/// Dropped, it waits until what was logged is written, a second at most.
#[derive(Debug)]
#[must_use = "what was logged last is lost without it"]
pub struct Logging(());

impl Logging {
    /// Writes a text behind what was logged, for a person.
    pub fn say(&self, text: &str) {
        stderr::write(text.as_bytes());
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        stderr::flush();
    }
}

/// Log lines that were lost: standard error was not read as fast as lines came.
pub fn lost() -> u64 {
    stderr::lost()
}

/// Starts logging, in the whole process. A second call changes nothing.
pub fn init(filter: &LogFilter, format: LogFormat) -> Logging {
    // Colours would be rubbish in a file or a journal.
    let colours = std::io::stderr().is_terminal();
    let layer = fmt::layer().with_writer(recent::Tee).with_ansi(colours).with_target(true);
    let (filtered, handle) = reload::Layer::new(EnvFilter::new(&filter.0));
    let registry = tracing_subscriber::registry().with(filtered);
    // It fails only when logging has been started: by an earlier call, or by a test.
    let started = match format {
        LogFormat::Text => registry.with(layer).try_init(),
        LogFormat::Json => registry.with(layer.json()).try_init(),
    };
    if started.is_ok() {
        if matches!(format, LogFormat::Json) {
            stderr::as_json();
        }
        let (first, now) = (filter.0.clone(), Mutex::new(filter.0.clone()));
        let _set = FILTERS.set(Arc::new(Filters { handle, first, now }));
    }
    Logging(())
}

/// By which the filter is changed while the process runs.
#[derive(Clone, Default)]
pub struct LogHandle(Option<Arc<Filters>>);

impl LogHandle {
    /// That of this process; of one whose logging was not started here it changes nothing.
    pub fn of_process() -> Self {
        Self(FILTERS.get().cloned())
    }

    /// The filter in force.
    pub fn filter(&self) -> String {
        let Some(filters) = &self.0 else { return String::new() };
        filters.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// That which logging was started with.
    pub fn first(&self) -> LogFilter {
        LogFilter(self.0.as_ref().map_or_else(String::new, |filters| filters.first.clone()))
    }

    /// Puts another filter in force; `false`: there is none to be replaced.
    pub fn set(&self, filter: &LogFilter) -> bool {
        let Some(filters) = &self.0 else { return false };
        let mut now = filters.now.lock().unwrap_or_else(PoisonError::into_inner);
        let set = filters.handle.reload(EnvFilter::new(&filter.0)).is_ok();
        if set {
            now.clone_from(&filter.0);
        }
        set
    }

    /// The filter in force with another level for one target, or, with none, for all that have no level of their own. The error
    /// says what is wrong.
    pub fn with(&self, target: Option<&str>, level: &str) -> Result<LogFilter, String> {
        if level.parse::<LevelFilter>().is_err() {
            return Err(format!("\"{level}\" is no level: off, error, warn, info, debug and trace are"));
        }
        let is_target = |target: &str| {
            !target.is_empty() && target.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:-".contains(&b))
        };
        if let Some(target) = target.filter(|target| !is_target(target)) {
            return Err(format!("\"{target}\" is no target, which is a path such as tunnel::relay"));
        }
        with(&self.filter(), target, level).parse().map_err(|e: ParseError| e.to_string())
    }
}

/// A filter with another level for one target.
fn with(filter: &str, target: Option<&str>, level: &str) -> String {
    let directives = filter.split(',').map(str::trim).filter(|d| !d.is_empty());
    let kept = directives.filter(|directive| match (directive.split_once('='), target) {
        (Some((of, _)), Some(target)) => of.trim() != target,
        (None, None) => false,
        _ => true,
    });
    let new = target.map_or_else(|| level.to_owned(), |target| format!("{target}={level}"));
    kept.map(str::to_owned).chain([new]).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::with;

    #[test]
    fn a_level_replaces_that_of_the_same_target_and_no_other() {
        let filter = "info,tunnel::relay=debug,h2=warn";
        assert_eq!(with(filter, Some("tunnel::relay"), "trace"), "info,h2=warn,tunnel::relay=trace");
        assert_eq!(with(filter, None, "warn"), "tunnel::relay=debug,h2=warn,warn");
        assert_eq!(with("", Some("a"), "off"), "a=off");
    }
}
