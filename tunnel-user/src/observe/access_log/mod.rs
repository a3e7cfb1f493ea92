//! The access log: a line for each flow at its end, where the configuration says so also at its start and once in a while.
//!
//! Workers hand entries over; each log has a thread of its own that writes them out.
//!
//! # Invariants
//! - No flow waits for a log: an entry that finds the queue full is lost, and counted. A full disk, a pipe that nobody reads
//!   and a journal that is away cost lines, never time.
//! - A flow's entries are all written or none, as far as a log's `share` goes.

mod format;
mod output;
mod writer;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, TrySendError},
    },
    time::{Duration, SystemTime},
};

pub use self::{output::OpenError, writer::Writer};
use super::{
    flows::{FlowId, LiveFlow, Snapshot},
    stats::Record,
};
use crate::{
    config::{AccessLog, Only},
    model::end::Fault,
};

/// Entries that wait for the thread of one log: at 1 KiB each 4 MiB, and a tenth of a second of what a core can end.
pub const QUEUE_MAX: usize = 4096;

/// Lines of all logs that were lost since the start.
static LOST: AtomicU64 = AtomicU64::new(0);
/// Lines of all logs that were written.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// Lines of all logs that were lost since the start: for want of room in the queue, or because they could not be written.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Lines of all logs that were written since the start.
pub fn written() -> u64 {
    WRITTEN.load(Ordering::Relaxed)
}

/// What an entry is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The target was reached.
    Start,
    /// It is still there.
    Live,
    /// It has ended, or was refused.
    End,
}

impl Event {
    const fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Live => "live",
            Self::End => "end",
        }
    }
}

/// One line, before it is written out.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) event: Event,
    pub(crate) at: SystemTime,
    /// None of a flow that did not reach its target.
    pub(crate) flow: Option<FlowId>,
    pub(crate) record: Record,
}

/// What a log's thread is told.
enum Message {
    Line(Arc<Entry>),
    /// To look at what else it was told.
    Wake,
}

/// One log, as workers have it.
pub struct Log {
    settings: AccessLog,
    queue: SyncSender<Message>,
    /// Entries that found the queue full, and were not reported yet.
    overflowed: Arc<AtomicU64>,
}

impl Log {
    /// Whether a flow has lines here. `random` is the flow's own.
    fn has(&self, record: &Record, random: u64) -> bool {
        let AccessLog { routes, share, .. } = &self.settings;
        let of_route = |name: &str| routes.iter().any(|wanted| wanted == name);
        (routes.is_empty() || record.route_name.as_deref().is_some_and(of_route)) && share.holds(random)
    }

    fn has_end(&self, record: &Record) -> bool {
        match self.settings.only {
            Only::All => true,
            Only::Failures => record.reason.fault() != Fault::Nobody,
        }
    }

    fn put(&self, entry: &Arc<Entry>) {
        match self.queue.try_send(Message::Line(Arc::clone(entry))) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.overflowed.fetch_add(1, Ordering::Relaxed);
                LOST.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// The logs of one configuration, as workers have them.
#[derive(Clone, Default)]
pub struct Logs(Vec<Arc<Log>>);

impl FromIterator<Arc<Log>> for Logs {
    fn from_iter<I: IntoIterator<Item = Arc<Log>>>(logs: I) -> Self {
        Self(logs.into_iter().collect())
    }
}

impl Logs {
    /// A flow has reached its target.
    pub fn started(&self, flow: &LiveFlow) {
        let random = mixed(flow.id());
        let entry = || Entry {
            event: Event::Start,
            at: SystemTime::now(),
            flow: Some(flow.id()),
            record: flow.record().clone(),
        };
        self.put(|log| log.settings.start && log.has(flow.record(), random), entry);
    }

    /// A flow has ended, or was refused.
    pub fn ended(&self, flow: Option<FlowId>, record: &Record) {
        let random = flow.map_or_else(|| fastrand::u64(..), mixed);
        let entry = || Entry { event: Event::End, at: SystemTime::now(), flow, record: record.clone() };
        self.put(|log| log.has_end(record) && log.has(record, random), entry);
    }

    /// A flow goes on: it has a line where an interval has passed since it was `before` old.
    pub fn live(&self, flow: &LiveFlow, before: Duration, now: Duration) {
        let random = mixed(flow.id());
        let entry = || {
            let Snapshot { id, record, .. } = flow.snapshot();
            Entry { event: Event::Live, at: SystemTime::now(), flow: Some(id), record }
        };
        let due = |log: &Log| log.settings.interval.is_some_and(|every| has_passed(every, before, now));
        self.put(|log| due(log) && log.has(flow.record(), random), entry);
    }

    /// Whether there is a log with lines of flows that go on.
    pub fn have_interval(&self) -> bool {
        self.0.iter().any(|log| log.settings.interval.is_some())
    }

    fn put(&self, which: impl Fn(&Log) -> bool, entry: impl FnOnce() -> Entry) {
        let mut logs = self.0.iter().filter(|log| which(log)).peekable();
        if logs.peek().is_none() {
            return;
        }
        let entry = Arc::new(entry());
        logs.for_each(|log| log.put(&entry));
    }
}

/// Whether a multiple of `every` lies between two ages.
fn has_passed(every: Duration, before: Duration, now: Duration) -> bool {
    let times = |age: Duration| age.as_nanos() / every.as_nanos().max(1);
    times(now) > times(before)
}

/// A number of which each is as likely, the same for each entry of a flow (the finalizer of MurmurHash3).
fn mixed(flow: FlowId) -> u64 {
    let mut n = flow.number() ^ (u64::from(flow.worker()) << 48);
    n = (n ^ (n >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    n = (n ^ (n >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    n ^ (n >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_has_a_line_for_each_interval() {
        let s = Duration::from_secs;
        let lines = (0..600).filter(|age| has_passed(s(120), s(*age), s(age + 1))).count();
        assert_eq!(lines, 5);
        assert!(has_passed(s(2), s(1), s(60)), "a worker that was busy");
    }
}
