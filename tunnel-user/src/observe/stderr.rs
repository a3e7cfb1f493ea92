//! Standard error, as log lines are written to it: at once where it takes them, else by a thread of its own, so that nobody
//! waits for whoever reads it.
//!
//! # Invariants
//! - What standard error takes is written before the call returns: what a process said last is there, however it ends.
//! - No more than [`WAITING_MAX`] bytes wait to be written. A line that finds no room, or cannot be written, is lost and counted.
//!   How many found no room is written where they would have stood, in the format of the others.
//! - Lines are written whole, and in the order that they came in.

use std::{
    collections::VecDeque,
    io::{self, Write as _},
    os::fd::AsFd as _,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing_subscriber::fmt::{
    format::Writer,
    time::{FormatTime as _, SystemTime},
};

/// A second of a daemon that logs every flow, at 5,000 flows a second and 200 bytes a line.
const WAITING_MAX: usize = 1024 * 1024;
/// A line that says how many were lost.
const NOTICE_MAX: usize = 256;
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
    /// Whether lines are JSON.
    json: bool,
}

impl Queue {
    const fn new() -> Self {
        Self { lines: VecDeque::new(), bytes: 0, writing: false, untold: 0, thread: None, json: false }
    }

    /// Whether there was room.
    fn push(&mut self, line: &[u8]) -> bool {
        let notice = if self.untold > 0 { NOTICE_MAX } else { 0 };
        let room = self.bytes + notice + line.len() <= WAITING_MAX;
        if room {
            // What was lost came before this one.
            let told = self.told();
            for line in told.into_iter().chain([line.into()]) {
                self.bytes += line.len();
                self.lines.push_back(line);
            }
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
            let mut text = format!("{n} log lines were lost here: standard error was not read");
            if self.json {
                text = json(&text);
            }
            text.push('\n');
            text.into_bytes().into()
        })
    }

    fn is_empty(&self) -> bool {
        self.lines.is_empty() && !self.writing && self.untold == 0
    }
}

/// As a line of the JSON format. `text` has nothing that JSON would escape.
fn json(text: &str) -> String {
    let mut now = String::new();
    // A clock that cannot be written leaves it empty.
    let _written = SystemTime.format_time(&mut Writer::new(&mut now));
    format!(
        r#"{{"timestamp":"{now}","level":"WARN","fields":{{"message":"{text}"}},"target":"{}"}}"#,
        module_path!()
    )
}

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on lines are JSON.
pub(super) fn as_json() {
    queue().json = true;
}

/// Writes a line; later where standard error does not take it now.
pub(super) fn write(line: &[u8]) {
    let mut queue = queue();
    // With the queue locked: nobody comes in between.
    let line = if queue.is_empty() { &line[write_some(line)..] } else { line };
    if line.is_empty() {
        return;
    }
    let thread = *queue.thread.get_or_insert_with(|| {
        // It ends with the process.
        thread::Builder::new().name("log".to_owned()).spawn(work).is_ok()
    });
    if !thread {
        drop(queue);
        write_now(line);
        return;
    }
    if queue.push(line) {
        WAITING.notify_one();
    } else {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes as much of a line as standard error takes without waiting; how much.
fn write_some(line: &[u8]) -> usize {
    let stderr = io::stderr();
    // A pipe that has room for so much takes it whole (pipe(7)).
    let mut takes = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if line.len() > libc::PIPE_BUF || !poll(&mut takes, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
        return 0;
    }
    // What fails is tried again by the thread, which counts it.
    nix::unistd::write(&stderr, line).unwrap_or(0)
}

fn write_now(line: &[u8]) {
    // It fails where standard error is closed, or its disk is full; nobody can be told there.
    if io::stderr().write_all(line).is_err() {
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
        // What was lost since the last line that waits.
        let Some(line) = held.pop().or_else(|| held.told()) else {
            WRITTEN.notify_all();
            held = WAITING.wait(held).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        held.writing = true;
        drop(held);
        write_now(&line);
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

    #[test]
    fn what_was_lost_is_told_before_the_line_that_came_next_in_the_format_of_the_log() {
        let mut queue = Queue::new();
        queue.json = true;
        let line = vec![b'x'; WAITING_MAX / 2];
        assert_eq!([(); 4].map(|()| queue.push(&line)), [true, true, false, false]);
        assert!(queue.pop().is_some() && queue.push(b"next\n"));
        assert_eq!(queue.pop().as_deref(), Some(&*line));
        let told: serde_json::Value = serde_json::from_slice(&queue.pop().unwrap()).unwrap();
        assert!(told["fields"]["message"].as_str().unwrap().starts_with("2 log lines were lost"), "{told}");
        assert!(told["level"] == "WARN" && told["timestamp"].as_str().unwrap().ends_with('Z'), "{told}");
        assert_eq!(queue.pop().as_deref(), Some(&b"next\n"[..]));
        assert!(queue.is_empty() && queue.bytes == 0);
    }

    #[test]
    fn a_notice_is_no_longer_than_there_is_room_for() {
        for json in [false, true] {
            let mut queue = Queue { untold: u64::MAX, json, ..Queue::new() };
            assert!(queue.told().is_some_and(|told| told.len() <= NOTICE_MAX));
        }
    }
}
