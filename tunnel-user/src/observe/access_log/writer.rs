//! The thread of one access log.
//!
//! # Invariants
//! - It ends when its [`Writer`] is dropped, with what has been written by then: within [`FLUSH`], or it is left behind where
//!   a file system does not answer.
//! - An idle thread does not wake.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    LOST, Log, Message, OpenError, QUEUE_MAX, WRITTEN,
    output::{Target, Wrote},
};
use crate::config::AccessLog;

/// How long it lets entries gather before it takes more: workers wake it a hundred times a second at most.
const GATHER: Duration = Duration::from_millis(10);
/// How often losses are logged.
const REPORT: Duration = Duration::from_secs(10);
/// How long what waits is written for when the log is closed, and how long that is waited for.
const FLUSH: Duration = Duration::from_secs(1);

/// What a thread is told beside entries.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
    reopen: AtomicBool,
}

/// The owner of a log: its thread ends with it.
pub struct Writer {
    log: Arc<Log>,
    queue: SyncSender<Message>,
    orders: Arc<Orders>,
    /// Locked by nobody but the end.
    ended: Mutex<Receiver<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    /// Opens a log, and starts its thread.
    pub fn open(settings: &AccessLog) -> Result<Self, OpenError> {
        let target = Target::open(settings)?;
        let (queue, entries) = sync_channel(QUEUE_MAX);
        let (overflowed, orders) = (Arc::<AtomicU64>::default(), Arc::<Orders>::default());
        let (end, ended) = mpsc::channel();
        let state = State {
            target,
            entries,
            overflowed: Arc::clone(&overflowed),
            orders: Arc::clone(&orders),
            losses: Losses::default(),
            stop_at: None,
        };
        let thread = thread::Builder::new().name("access-log".to_owned()).spawn(move || {
            let _ends_with_it: mpsc::Sender<()> = end;
            state.run();
        });
        let thread = Some(thread.map_err(OpenError::Thread)?);
        let log = Arc::new(Log { settings: settings.clone(), queue: queue.clone(), overflowed });
        Ok(Self { log, queue, orders, ended: Mutex::new(ended), thread })
    }

    /// What workers write to.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// What it was opened with.
    pub fn settings(&self) -> &AccessLog {
        &self.log.settings
    }

    /// Has its file opened by its name again, as after it was renamed.
    pub fn reopen(&self) {
        self.orders.reopen.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // Where there is no room it is awake, and looks soon.
        let _full = self.queue.try_send(Message::Wake);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.orders.stop.store(true, Ordering::Release);
        self.wake();
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        match ended.recv_timeout(2 * FLUSH) {
            Err(RecvTimeoutError::Timeout) => tracing::error!("an access log does not end: a write hangs"),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
                    tracing::error!("the thread of an access log panicked");
                }
            }
        }
    }
}

/// Lines that were lost, until that is logged.
#[derive(Default)]
struct Losses {
    lines: u64,
    why: Option<io::Error>,
    reported: Option<Instant>,
}

/// Entries that are taken before orders are looked at: a journal that does not read costs 100 ms for each.
const TAKEN_MAX: usize = 64;

struct State {
    target: Target,
    entries: Receiver<Message>,
    overflowed: Arc<AtomicU64>,
    orders: Arc<Orders>,
    losses: Losses,
    /// When it gives up what is left.
    stop_at: Option<Instant>,
}

impl State {
    fn run(mut self) {
        let mut ended = false;
        while !ended {
            ended = self.wait();
            // Everything that has come, in writes of a bounded size.
            loop {
                let last = self.take();
                self.flush();
                if last {
                    break;
                }
                self.report(false);
                self.obey();
            }
            self.report(false);
            if self.is_stopping() {
                break;
            }
            thread::park_timeout(GATHER);
        }
        self.report(true);
    }

    /// Waits for an entry, or an order; whether there will be none.
    fn wait(&mut self) -> bool {
        let told = if self.losses.lines > 0 || self.overflowed.load(Ordering::Relaxed) > 0 {
            self.entries.recv_timeout(REPORT)
        } else {
            self.entries.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match told {
            Ok(message) => self.handle(message),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return true,
        }
        self.obey();
        false
    }

    /// Reopens the file, if it was told to.
    fn obey(&mut self) {
        if !self.orders.reopen.swap(false, Ordering::AcqRel) {
            return;
        }
        match self.target.reopen() {
            Ok(()) => tracing::info!(output = self.target.name(), "reopened access log"),
            Err(error) => {
                tracing::error!(%error, "failed to reopen the access log: the open file stays in use");
            }
        }
    }

    /// Takes entries, until there are none or there is enough to write; whether it was the former.
    fn take(&mut self) -> bool {
        let mut left = if matches!(self.target, Target::Journal { .. }) { TAKEN_MAX } else { usize::MAX };
        while left > 0 && !self.target.is_full() {
            left -= 1;
            match self.entries.try_recv() {
                Ok(message) => self.handle(message),
                Err(_) => return true,
            }
        }
        false
    }

    fn handle(&mut self, message: Message) {
        let Message::Line(entry) = message else { return };
        // An order to stop bounds the time of a journal that does not read, too.
        if self.is_late() {
            return self.lost(1, None);
        }
        match self.target.put(&entry) {
            Wrote::Failed { lines, error } => self.lost(lines, Some(error)),
            Wrote::All | Wrote::Later => {
                WRITTEN.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn flush(&mut self) {
        loop {
            match self.target.flush() {
                Wrote::All => return,
                Wrote::Failed { lines, error } => return self.unwritten(lines, Some(error)),
                Wrote::Later if self.is_late() => {
                    if let Target::Stream(stream) = &mut self.target {
                        let lines = stream.abandon();
                        self.unwritten(lines, None);
                    }
                    return;
                }
                Wrote::Later => self.report(false),
            }
        }
    }

    /// Lines that were counted as written, and were not.
    fn unwritten(&mut self, lines: usize, why: Option<io::Error>) {
        WRITTEN.fetch_sub(lines as u64, Ordering::Relaxed);
        self.lost(lines, why);
    }

    fn lost(&mut self, lines: usize, why: Option<io::Error>) {
        LOST.fetch_add(lines as u64, Ordering::Relaxed);
        self.losses.lines += lines as u64;
        self.losses.why = why.or(self.losses.why.take());
    }

    fn is_stopping(&self) -> bool {
        self.orders.stop.load(Ordering::Acquire)
    }

    fn is_late(&mut self) -> bool {
        if !self.is_stopping() {
            return false;
        }
        Instant::now() >= *self.stop_at.get_or_insert_with(|| Instant::now() + FLUSH)
    }

    /// Logs what was lost, the first loss at once, later ones once in a while, and the last ones at the end.
    fn report(&mut self, last: bool) {
        let overflowed = self.overflowed.swap(0, Ordering::Relaxed);
        self.losses.lines += overflowed;
        let due = self.losses.reported.is_none_or(|at| at.elapsed() >= REPORT);
        if self.losses.lines == 0 || !(due || last) {
            return;
        }
        let Losses { lines: lost, why, .. } = std::mem::take(&mut self.losses);
        self.losses.reported = Some(Instant::now());
        let why = why.map_or_else(|| "it is not read, or not fast enough".to_owned(), |why| why.to_string());
        tracing::warn!(output = self.target.name(), lost, error = why, "access log lines lost");
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::{
        config::{FuturePath, LineFormat, Only, Output},
        model::{end::EndReason, flow::ClientAddr},
        observe::{access_log::Logs, stats::Record},
    };

    fn settings(path: &Path) -> AccessLog {
        let text = format!("[[access_log]]\noutput = \"file\"\npath = \"{}\"\n", path.display());
        let listener = "[[listener]]\naddress = \"127.0.0.1:1\"\ntls = false\n[[route]]\nto = \"direct\"\n";
        let config = crate::config::Config::parse(
            &format!("{text}{listener}"),
            Path::new("x.toml"),
            crate::config::CheckFiles::No,
        );
        config.unwrap_or_else(|e| panic!("{e}")).access_logs.remove(0)
    }

    fn record(reason: EndReason) -> Record {
        let mut record = Record::new(&"a:1".parse().unwrap(), ClientAddr("127.0.0.1:9".parse().unwrap()));
        record.ended(reason, None);
        record
    }

    #[test]
    fn what_was_handed_over_is_written_when_the_log_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let writer = Writer::open(&settings(&path)).unwrap();
        assert_eq!(writer.settings().output, Output::File);
        let logs: Logs = [Arc::clone(writer.log())].into_iter().collect();
        for _ in 0..1000 {
            logs.ended(None, &record(EndReason::Closed));
        }
        drop(writer);
        assert_eq!(fs::read_to_string(path).unwrap().lines().count(), 1000);
    }

    #[test]
    fn failures_only_leaves_out_what_ended_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let only = AccessLog { only: Only::Failures, format: LineFormat::Text, ..settings(&path) };
        let writer = Writer::open(&only).unwrap();
        let logs: Logs = [Arc::clone(writer.log())].into_iter().collect();
        logs.ended(None, &record(EndReason::Closed));
        logs.ended(None, &record(EndReason::DnsError));
        drop(writer);
        let text = fs::read_to_string(path).unwrap();
        assert!(text.lines().count() == 1 && text.contains(" reason=dns_error fault=upstream "), "{text}");
    }

    #[test]
    fn a_pipe_that_nobody_reads_costs_lines_and_no_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(Writer::open(&settings(&path)), Err(OpenError::File { .. })), "nobody reads");
        // Held open, and not read.
        let _reader = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let log = AccessLog { path: Some(FuturePath(path.clone())), ..settings(&path) };
        let writer = Writer::open(&log).unwrap();
        let logs: Logs = [Arc::clone(writer.log())].into_iter().collect();
        let (before, started) = (super::super::lost(), Instant::now());
        for _ in 0..3 * QUEUE_MAX {
            logs.ended(None, &record(EndReason::Closed));
        }
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        drop(writer);
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        assert!(super::super::lost() - before > QUEUE_MAX as u64, "{}", super::super::lost() - before);
    }
}
