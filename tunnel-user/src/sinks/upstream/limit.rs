//! How much one upstream gets from one worker. What is over a limit is refused at once: nobody waits for a permit.

use std::fmt;

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

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn workers_share_a_limit_rounded_up_and_none_stays_none() {
        let limits = config::Limits { streams: NonZeroUsize::new(5), ..config::Limits::default() };
        let share = Limits::share(&limits, 4);
        assert_eq!(share, Limits { streams: Some(2), ..Limits::default() });
    }
}
