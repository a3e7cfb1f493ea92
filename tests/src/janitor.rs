//! Clean-up that happens whatever ends a test.
//!
//! A janitor is a shell that waits for the end of its standard input, which the kernel brings about when
//! the test's process is gone: on return, panic, abort, or SIGKILL. It is the only code that removes
//! what it is for, so there is one way in which that is done.

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

/// Runs a script at its end.
#[derive(Debug)]
pub struct Janitor {
    child: Child,
    /// Its end is the signal to start.
    stdin: Option<ChildStdin>,
}

impl Janitor {
    /// Hires one for `script`, whose `$1` is `argument`.
    pub fn new(script: &str, argument: &str) -> Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", &format!("cat; {script}"), "janitor", argument])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Its own group: who ends the test's group does not end the clean-up.
            .process_group(0)
            .current_dir("/")
            .spawn()
            .context("starting a shell for the clean-up")?;
        let stdin = child.stdin.take();
        Ok(Self { child, stdin })
    }

    /// Has it done now.
    pub fn finish(&mut self) -> Result<()> {
        drop(self.stdin.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "the clean-up failed: {status}");
        Ok(())
    }
}
