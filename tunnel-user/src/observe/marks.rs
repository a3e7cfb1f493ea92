//! How far a flow that is being established has got, and when: what the durations of its record are made of.
//!
//! # Invariants
//! - A mark is the last one of its kind: after a retry it is that of the attempt that counted.

use std::{
    cell::Cell,
    num::NonZeroU32,
    time::{Duration, Instant},
};

use serde::{Serialize, Serializer};

use super::traces::Trace;

/// A duration in a record, in whole microseconds: one at least, and 71 minutes at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Micros(NonZeroU32);

impl From<Duration> for Micros {
    fn from(length: Duration) -> Self {
        let micros = u32::try_from(length.as_micros()).unwrap_or(u32::MAX);
        Self(NonZeroU32::new(micros).unwrap_or(NonZeroU32::MIN))
    }
}

impl Micros {
    /// As a duration.
    pub fn length(self) -> Duration {
        Duration::from_micros(self.0.get().into())
    }

    /// In milliseconds.
    pub fn millis(self) -> f64 {
        f64::from(self.0.get()) / 1e3
    }
}

impl Serialize for Micros {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(self.millis())
    }
}

/// How long the parts of a flow took, as far as it had them; in JSON in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Phases {
    /// It waited for a connection to its upstream, or for one to be made.
    #[serde(rename = "queue_ms", skip_serializing_if = "Option::is_none")]
    pub queue: Option<Micros>,
    /// From the router's decision until its target was reached: dialled, or the upstream's answer. It holds the time in the
    /// queue.
    #[serde(rename = "connect_ms", skip_serializing_if = "Option::is_none")]
    pub connect: Option<Micros>,
    /// From its start until the first byte from the target was passed on.
    #[serde(rename = "first_byte_ms", skip_serializing_if = "Option::is_none")]
    pub first_byte: Option<Micros>,
}

/// How a connection was made.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// When it was begun.
    pub begun: Instant,
    /// When TCP was connected, or a stream of another upstream was open.
    pub connected: Instant,
    /// When its handshakes were done: TLS, and what is spoken on it.
    pub ready: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Marks {
    /// The router has decided.
    pub routed: Cell<Option<Instant>>,
    /// It began to wait for a connection of its upstream, and had one.
    pub queued: Cell<Option<[Instant; 2]>>,
    /// The connection that it got was made while it waited, so.
    pub made: Cell<Option<Made>>,
    /// Its target was reached.
    pub reached: Cell<Option<Instant>>,
    /// The trace that it is part of, where traces are configured.
    pub trace: Cell<Option<Trace>>,
}

impl Marks {
    /// The durations.
    pub fn phases(&self) -> Phases {
        let queue = self.queued.get().map(|[from, until]| until.saturating_duration_since(from).into());
        let connect = self.routed.get().zip(self.reached.get());
        let connect = connect.map(|(from, until)| until.saturating_duration_since(from).into());
        Phases { queue, connect, first_byte: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_microseconds_that_end_at_71_minutes() {
        for (length, millis) in [
            (Duration::ZERO, 0.001),
            (Duration::from_micros(1500), 1.5),
            (Duration::from_secs(7200), 4_294_967.295),
        ] {
            let micros = Micros::from(length);
            assert!((micros.millis() - millis).abs() < 1e-9, "{micros:?}");
        }
    }

    #[test]
    fn a_flow_that_did_not_get_so_far_has_no_duration() {
        let (marks, now) = (Marks::default(), Instant::now());
        assert_eq!(marks.phases(), Phases::default());
        marks.routed.set(Some(now));
        assert_eq!(marks.phases(), Phases::default());
        marks.reached.set(Some(now + Duration::from_millis(3)));
        assert_eq!(marks.phases().connect, Some(Duration::from_millis(3).into()));
    }
}
