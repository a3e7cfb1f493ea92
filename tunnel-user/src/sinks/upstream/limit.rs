//! How much one upstream gets from one worker.
//!
//! Enters: a limit. Leaves: places, each given back when it is dropped. Invariant: never more are out than the
//! limit. It never waits for one: what is over the limit is refused at once.

use std::{cell::Cell, fmt, rc::Rc};

use crate::config;

/// One worker's share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Connections, those being made too.
    pub connections: Option<usize>,
    /// Flows, those being opened too.
    pub streams: Option<usize>,
    /// Flows that wait for a connection.
    pub pending: Option<usize>,
}

impl Limits {
    /// The share of one of `workers`, rounded up: what they count together would cross cores for every flow.
    pub fn share(limits: &config::Limits, workers: usize) -> Self {
        let share = |n: Option<std::num::NonZeroUsize>| n.map(|n| n.get().div_ceil(workers.max(1)));
        Self {
            connections: share(limits.connections),
            streams: share(limits.streams),
            pending: share(limits.pending),
        }
    }
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limited {
    /// Connections.
    Connections,
    /// Flows.
    Streams,
    /// Flows that wait for a connection.
    Pending,
}

impl fmt::Display for Limited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connections => "connections",
            Self::Streams => "flows",
            Self::Pending => "flows that wait for a connection",
        })
    }
}

/// Counts places.
#[derive(Clone, Debug, Default)]
pub struct Count(Rc<Cell<usize>>);

/// A place.
#[derive(Debug)]
pub struct Taken(Rc<Cell<usize>>);

impl Count {
    /// One more place, unless `most` are out.
    pub fn take(&self, most: usize) -> Option<Taken> {
        let out = self.0.get();
        (out < most).then(|| {
            self.0.set(out + 1);
            Taken(Rc::clone(&self.0))
        })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn never_more_places_are_out_than_the_limit_and_those_given_back_are_taken_again() {
        let count = Count::default();
        let one = count.take(2).unwrap();
        let _two = count.take(2).unwrap();
        assert!(count.take(2).is_none());
        drop(one);
        assert!(count.take(2).is_some() && count.take(0).is_none());
    }

    #[test]
    fn workers_share_a_limit_rounded_up_and_none_stays_none() {
        let limits = config::Limits { streams: NonZeroUsize::new(5), ..config::Limits::default() };
        let share = Limits::share(&limits, 4);
        assert_eq!(share, Limits { streams: Some(2), ..Limits::default() });
    }
}
