//! A dialogue with an application's process, line by line.
//!
//! # Invariants
//! - Each word gets one answer, and an answer to an earlier word is not taken for it.

use anyhow::Result;

use crate::{
    process::Process,
    wait::{PATIENCE, wait_for},
};

/// Writes `word` to the process and waits for the next line `word=ANSWER`; the answer.
pub fn ask(process: &mut Process, word: &str) -> Result<String> {
    let before = answers(process, word).len();
    process.tell(word)?;
    wait_for(&format!("an answer to \"{word}\""), PATIENCE, || answers(process, word).into_iter().nth(before))
        .map_err(|e| e.context(format!("{process}")))
}

/// Every answer so far.
fn answers(process: &Process, word: &str) -> Vec<String> {
    let out = process.stdout();
    let whole = out.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    whole.filter_map(|l| l.strip_prefix(word)?.strip_prefix('=')).map(str::to_owned).collect()
}

/// Whole lines of a log that hold every one of `parts`.
pub fn lines_with(log: &str, parts: &[&str]) -> Vec<String> {
    log.lines().filter(|line| parts.iter().all(|part| line.contains(part))).map(str::to_owned).collect()
}
