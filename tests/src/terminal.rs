//! A pseudo-terminal: a test types keys and reads what programs show on it.
//!
//! # Invariants
//! - A child in a [`Guarded`] ends with the test.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::pty::openpty;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::wait::PATIENCE;

/// What a terminal's user would see.
pub struct Terminal {
    /// What is typed.
    pub keys: File,
    screen: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    /// Makes one; the other end is for programs.
    pub fn open() -> Result<(Self, OwnedFd)> {
        let pty = openpty(None, None)?;
        let keys = File::from(pty.master);
        let mut reader = keys.try_clone()?;
        let (tell, screen) = mpsc::channel();
        // It ends with EIO when the last process has closed the other end.
        thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n) = reader.read(&mut buf) {
                if n == 0 || tell.send(buf[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok((Self { keys, screen, seen: String::new() }, pty.slave))
    }

    /// Waits until it shows `text`.
    pub fn shows(&mut self, text: &str) -> Result<()> {
        while !self.seen.contains(text) {
            let more = self.screen.recv_timeout(PATIENCE);
            let more = more.with_context(|| format!("no \"{text}\" on the screen: {:?}", self.seen))?;
            self.seen.push_str(&String::from_utf8_lossy(&more));
        }
        Ok(())
    }

    /// What it has shown within so long, or sooner if that holds `text`: words, with a space for each command to the terminal.
    pub fn words_within(&mut self, length: Duration, text: &str) -> String {
        let end = Instant::now() + length;
        loop {
            let words = words(&self.seen);
            if words.contains(text) {
                return words;
            }
            match self.screen.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(more) => self.seen.push_str(&String::from_utf8_lossy(&more)),
                Err(_) => return words,
            }
        }
    }
}

impl Terminal {
    /// Types.
    pub fn types(&mut self, keys: &str) -> Result<()> {
        Ok(self.keys.write_all(keys.as_bytes())?)
    }

    /// Forgets what was shown and has another size: a program that fills the screen draws all of it again.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        while self.screen.try_recv().is_ok() {}
        self.seen.clear();
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.keys, size)?)
    }

    /// What it has shown, with the commands to it.
    pub fn seen(&self) -> &str {
        &self.seen
    }
}

/// Texts without control sequences (ECMA-48 section 5.4), which stand where a screen has other cells or none.
fn words(seen: &str) -> String {
    let mut out = String::new();
    let mut parts = seen.split('\x1b');
    out += parts.next().unwrap_or_default();
    for part in parts {
        let end = part
            .strip_prefix('[')
            .and_then(|part| part.find(|c: char| ('@'..='~').contains(&c)).map(|at| at + 2));
        out.push(' ');
        out += &part[end.unwrap_or_default()..];
    }
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Starts a command with a terminal, of a session of its own.
pub fn spawn_on(mut command: Command, slave: OwnedFd) -> Result<Child> {
    command
        .stdin(Stdio::from(slave.try_clone()?))
        .stdout(Stdio::from(slave.try_clone()?))
        .stderr(Stdio::from(slave));
    let start = || {
        nix::unistd::setsid()?;
        // SAFETY: TIOCSCTTY takes an int; standard input is the terminal.
        match unsafe { libc::ioctl(std::io::stdin().as_raw_fd(), libc::TIOCSCTTY, 0) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec the closure makes two system calls; it does not allocate.
    unsafe { command.pre_exec(start) };
    Ok(command.spawn()?)
}

/// A child that ends with the test, however that ends.
pub struct Guarded(pub Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        // It may have been waited for.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}
