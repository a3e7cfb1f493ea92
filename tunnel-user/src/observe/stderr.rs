//! Standard error, as log lines are written to it: by a thread of its own, so that nobody waits for whoever reads it.
//!
//! # Invariants
//! - No more than [`WAITING_MAX`] bytes wait to be written. A line that finds no room is lost and counted, and how many were lost
//!   is written as soon as there is room.
//! - Lines are written whole, and in the order that they came in.

use std::{
    collections::VecDeque,
    io::{self, Write as _},
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// A second of a daemon that logs every flow, at 5,000 flows a second and 200 bytes a line.
const WAITING_MAX: usize = 1024 * 1024;
/// How long the end of the process waits for lines that were not written.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

static LOST: AtomicU64 = AtomicU64::new(0);
static QUEUE: Mutex<Queue> = Mutex::new(Queue::new());
/// There is something to write.
static WAITING: Condvar = Condvar::new();
/// Everything is written.
static WRITTEN: Condvar = Condvar::new();

/// Lines that were lost, in the whole process.
pub(super) fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

struct Queue {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    /// A line has been taken out and is not written yet.
    writing: bool,
    /// Lines that were lost and of which nothing was written.
    untold: u64,
    /// Whether there is a thread, once there has been a line.
    thread: Option<bool>,
}

impl Queue {
    const fn new() -> Self {
        Self { lines: VecDeque::new(), bytes: 0, writing: false, untold: 0, thread: None }
    }

    /// Whether there was room.
    fn push(&mut self, line: &[u8]) -> bool {
        let room = self.bytes + line.len() <= WAITING_MAX;
        if room {
            self.bytes += line.len();
            self.lines.push_back(line.into());
        } else {
            self.untold += 1;
        }
        room
    }

    /// What is written next.
    fn pop(&mut self) -> Option<Box<[u8]>> {
        let line = self.lines.pop_front()?;
        self.bytes -= line.len();
        Some(line)
    }

    /// What is written of lines that were lost.
    fn told(&mut self) -> Option<Box<[u8]>> {
        let n = std::mem::take(&mut self.untold);
        (n > 0).then(|| {
            format!("{n} log lines were lost here: standard error was not read\n").into_bytes().into()
        })
    }

    fn is_empty(&self) -> bool {
        self.lines.is_empty() && !self.writing && self.untold == 0
    }
}

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a line, sooner or later.
pub(super) fn write(line: &[u8]) {
    let mut queue = queue();
    let thread = *queue.thread.get_or_insert_with(|| {
        // It ends with the process.
        thread::Builder::new().name("log".to_owned()).spawn(work).is_ok()
    });
    if !thread {
        drop(queue);
        // It fails where standard error is closed; nobody can be told.
        let _closed = io::stderr().write_all(line);
        return;
    }
    if queue.push(line) {
        WAITING.notify_one();
    } else {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits for what was not written, for [`FLUSH_PATIENCE`] at most.
pub(super) fn flush() {
    let queue = queue();
    if queue.thread == Some(true) {
        let _late = WRITTEN.wait_timeout_while(queue, FLUSH_PATIENCE, |queue| !queue.is_empty());
    }
}

fn work() {
    let mut held = queue();
    loop {
        // What was lost came after what waits.
        let Some(line) = held.pop().or_else(|| held.told()) else {
            WRITTEN.notify_all();
            held = WAITING.wait(held).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        held.writing = true;
        drop(held);
        let _closed = io::stderr().write_all(&line);
        held = queue();
        held.writing = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_no_room_is_counted_and_told_after_what_waited() {
        let mut queue = Queue::new();
        let line = vec![b'x'; 1000];
        let taken = (0..2000).filter(|_| queue.push(&line)).count();
        assert_eq!(taken, WAITING_MAX / 1000);
        assert!(queue.bytes <= WAITING_MAX);
        assert!((0..taken).all(|_| queue.pop().is_some_and(|l| *l == *line)));
        assert!(queue.pop().is_none() && !queue.is_empty());
        let told = queue.told().unwrap();
        assert!(String::from_utf8_lossy(&told).starts_with(&format!("{} log lines were lost", 2000 - taken)));
        assert!(queue.is_empty() && queue.told().is_none());
    }
}
