//! The lines that were logged last, for a report on what has happened.
//!
//! # Invariants
//! - No more than `BYTES_MAX` are kept. A line that is written takes two locks for as long as it is copied; one that the
//!   filter leaves out takes none.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Mutex, PoisonError},
};

use tracing_subscriber::fmt::MakeWriter;

use super::stderr;

/// Of lines that are kept: a few thousand.
const BYTES_MAX: usize = 512 * 1024;

static RECENT: Mutex<Recent> = Mutex::new(Recent { lines: VecDeque::new(), bytes: 0 });

struct Recent {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
}

impl Recent {
    fn push(&mut self, line: &[u8]) {
        let line = &line[..line.len().min(BYTES_MAX)];
        self.bytes += line.len();
        self.lines.push_back(line.into());
        while self.bytes > BYTES_MAX {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.len());
        }
    }
}

/// The lines that are kept, the oldest first.
pub fn lines() -> Vec<u8> {
    let recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
    recent.lines.iter().flat_map(|line| line.iter().copied()).collect()
}

/// Has lines written to standard error, without waiting for that, and keeps them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tee;

impl MakeWriter<'_> for Tee {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

impl Write for Tee {
    // A line comes whole.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        RECENT.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        stderr::write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_lines_go_first_and_the_bytes_are_bounded() {
        let mut recent = Recent { lines: VecDeque::new(), bytes: 0 };
        for n in 0..3000_u32 {
            recent.push(format!("{n:01000}\n").as_bytes());
        }
        assert!(recent.bytes <= BYTES_MAX && recent.lines.len() > 500);
        assert!(recent.lines.back().is_some_and(|line| line.ends_with(b"2999\n")));
        recent.push(&vec![b'x'; 2 * BYTES_MAX]);
        assert_eq!((recent.lines.len(), recent.bytes), (1, BYTES_MAX));
    }
}
