//! What the machine that was booted reports to this one: one JSON object a line.
//!
//! # Invariants
//! - A line is written whole and at once: when a kernel falls over, everything that had happened by then is known.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// What is to be done inside.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// In this order.
    pub(super) tests: Vec<Test>,
    /// How long one of them may take.
    pub(super) limit_seconds: u64,
    /// Variables of theirs.
    pub(super) env: Vec<(String, String)>,
    /// Whether a warning ends the kernel.
    pub(super) panic_on_warn: bool,
}

/// One test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Test {
    /// The program that it is in.
    pub(super) program: PathBuf,
    /// The file that it is in.
    pub(super) file: String,
    /// What the program calls it.
    pub(super) name: String,
}

impl Test {
    /// What people call it.
    pub(super) fn full_name(&self) -> String {
        format!("{}::{}", self.file, self.name)
    }
}

/// What happened.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    /// The kernel runs programs.
    Booted { release: String, seconds: f64 },
    /// What `tunnel doctor` says of it.
    Doctor(Vec<Finding>),
    /// A test begins.
    Began(String),
    /// It has ended.
    Ended(Trial),
    /// Everything is done; what the kernel complained of outside of tests.
    Done { warnings: Vec<String> },
}

/// An answer of `tunnel doctor`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Finding {
    pub(super) check: String,
    /// `ok`, `info`, `warn` or `fail`.
    pub(super) level: String,
    pub(super) found: String,
}

/// What came of a test.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Trial {
    pub(super) name: String,
    pub(super) outcome: Outcome,
    /// How often it was tried.
    pub(super) attempts: u32,
    /// The last time.
    pub(super) seconds: f64,
    /// What the kernel complained of meanwhile.
    pub(super) warnings: Vec<String>,
    /// Whether it could not have complained.
    pub(super) blind: bool,
    /// The end of what it said each time.
    pub(super) output: String,
}

/// How a test ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    Passed,
    #[default]
    Failed,
    /// It took too long, and was killed.
    TimedOut,
    /// It took too long, and SIGKILL does not end it.
    Stuck,
    /// The machine ended in the middle of it.
    CutOff,
}

/// The folder that both sides see.
pub(super) struct Shared<'a>(pub(super) &'a Path);

impl Shared<'_> {
    fn plan(&self) -> PathBuf {
        self.0.join("plan.json")
    }

    /// Where the programs are that are started inside.
    pub(super) fn programs(&self) -> PathBuf {
        self.0.join("bin")
    }

    fn events(&self) -> PathBuf {
        self.0.join("events")
    }

    /// Outside, before.
    pub(super) fn write_plan(&self, plan: &Plan) -> Result<()> {
        fs::write(self.events(), "")?;
        Ok(fs::write(self.plan(), serde_json::to_vec(plan)?)?)
    }

    /// Inside.
    pub(super) fn read_plan(&self) -> Result<Plan> {
        let text = fs::read(self.plan()).with_context(|| format!("reading {}", self.plan().display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Inside.
    pub(super) fn tell(&self, event: &Event) -> Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let mut file = OpenOptions::new().append(true).create(true).open(self.events())?;
        file.write_all(&line)?;
        Ok(file.sync_all()?)
    }

    /// Outside: those after the first `known` ones, as far as they are whole.
    pub(super) fn heard(&self, known: usize) -> Result<Vec<Event>> {
        let text = fs::read_to_string(self.events()).unwrap_or_default();
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        whole.skip(known).map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
    }
}
