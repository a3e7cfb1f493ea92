//! Failures of the program: what went wrong, what to do about it, and the exit code (those of sysexits.h where it has one).

use std::{fmt, process::ExitCode};

use crate::config::ConfigErrors;

/// `EX_USAGE` of sysexits.h: what was typed is wrong.
pub const EXIT_CONFIG: u8 = 64;
/// `EX_UNAVAILABLE`: the kernel lacks something.
pub const EXIT_KERNEL: u8 = 69;
/// `EX_NOPERM`: a privilege is missing.
pub const EXIT_PRIVILEGE: u8 = 77;
/// Everything else.
pub const EXIT_OTHER: u8 = 1;

/// Why the program ends without having done what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The configuration or the command line is wrong.
    Config(Cause),
    /// The kernel lacks what is needed.
    Kernel(Cause),
    /// We may not do what is needed.
    Privilege(Cause),
    /// Something failed while it ran.
    Other(Cause),
}

/// What went wrong, and what helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// What went wrong.
    pub what: String,
    /// What to do about it; empty when there is nothing to add.
    pub remedy: String,
}

impl Cause {
    /// From an error, with its sources, and a remedy ("" for none).
    pub fn new(what: impl fmt::Display, remedy: impl Into<String>) -> Self {
        Self { what: what.to_string(), remedy: remedy.into() }
    }
}

impl Failure {
    /// What scripts see.
    pub fn code(&self) -> u8 {
        match self {
            Self::Config(_) => EXIT_CONFIG,
            Self::Kernel(_) => EXIT_KERNEL,
            Self::Privilege(_) => EXIT_PRIVILEGE,
            Self::Other(_) => EXIT_OTHER,
        }
    }

    fn cause(&self) -> &Cause {
        match self {
            Self::Config(c) | Self::Kernel(c) | Self::Privilege(c) | Self::Other(c) => c,
        }
    }
}

impl From<&Failure> for ExitCode {
    fn from(failure: &Failure) -> Self {
        Self::from(failure.code())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cause { what, remedy } = self.cause();
        f.write_str(what)?;
        if remedy.is_empty() { Ok(()) } else { write!(f, "\n  {remedy}") }
    }
}

impl std::error::Error for Failure {}

impl From<ConfigErrors> for Failure {
    fn from(e: ConfigErrors) -> Self {
        // Each mistake on a line of its own, from its start: editors jump by that.
        let what = match e.mistakes().len() {
            0 => e.to_string(),
            1 => format!("1 mistake in the configuration:\n{e}"),
            n => format!("{n} mistakes in the configuration:\n{e}"),
        };
        Self::Config(Cause::new(
            what,
            "\"tunnel config schema\" lists every key with its meaning and default.",
        ))
    }
}
