//! What Istio's dashboards ask of a proxy, counted by who talks to whom, where the configuration wants it.
//!
//! # Invariants
//! - Each worker counts for itself, when a flow is opened and when it has ended; what is moved between is read from the registry.
//! - No more than [`SERIES_MAX`] keys have counters of their own, whatever peers call themselves and ask for; those beyond are
//!   counted together. What has a series keeps it.
//! - A name that nobody was let reach has no series.

use std::{collections::HashMap, sync::Arc};

use super::stats::{Destination, Record};
use crate::model::{
    end::{EndReason, Fault},
    flow::{Identity, SourceKind, Target},
};

/// Keys of all workers together, of which each has its share: each is a series of four counters and more.
pub const SERIES_MAX: usize = 2_000;
/// What stands for the parts of a key beyond.
const OTHER: &str = "other";

/// What ztunnel says of how a connection ended (`response_flags`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flag {
    /// In order, or in a way that has no flag.
    None,
    /// A policy or a route refused it.
    Deny,
    /// The target, or the upstream, could not be reached.
    Connect,
    /// TLS with the upstream failed.
    Tls,
}

impl Flag {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::None, Self::Deny, Self::Connect, Self::Tls];

    /// As it is written.
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::Tls => "TLS_FAILURE",
        }
    }

    const fn of(reason: EndReason) -> Self {
        use EndReason as R;
        match reason {
            R::PolicyDenied | R::RouteDenied | R::NoRoute | R::PolicyChanged => Self::Deny,
            R::UpstreamTls => Self::Tls,
            R::DnsError
            | R::DnsTimeout
            | R::TargetRefused
            | R::TargetUnreachable
            | R::ConnectTimeout
            | R::ConnectFailed
            | R::UpstreamUnreachable
            | R::NoHealthyEndpoint
            | R::NoEndpoint
            | R::UpstreamRefused
            | R::UpstreamTimeout => Self::Connect,
            _ => Self::None,
        }
    }
}

/// Who talks to whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// A capture is the side of the source, a listener that of the destination.
    pub reporter: SourceKind,
    /// The other side, as it has proved to be.
    pub peer: Option<Arc<str>>,
    /// The name that was asked for, where it was one.
    pub service: Option<Arc<str>>,
}

impl Key {
    fn of(record: &Record) -> Self {
        let peer = match record.kind {
            SourceKind::Capture => &record.identity,
            SourceKind::Listener => &record.client_identity,
        };
        let asked = match &record.destination {
            Destination::Target(Target::Name(name, _)) => Some(name.as_str()),
            _ => None,
        };
        Self {
            reporter: record.kind,
            peer: peer.as_ref().map(|Identity(name)| Arc::clone(name)),
            service: record.host.as_deref().or(asked).map(Arc::from),
        }
    }

    fn other(reporter: SourceKind) -> Self {
        Self { reporter, peer: Some(OTHER.into()), service: Some(OTHER.into()) }
    }

    /// Whether it stands for those beyond.
    pub fn is_other(&self) -> bool {
        *self == Self::other(self.reporter)
    }
}

/// What is counted of one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Flows that have reached their target.
    pub opened: u64,
    /// Of these: that have ended, by [`Flag`].
    pub closed: [u64; Flag::ALL.len()],
    /// Flows that did not reach their target.
    pub failed: [u64; Flag::ALL.len()],
    /// Bytes from clients to targets.
    pub requested: u64,
    /// Bytes from targets to clients.
    pub answered: u64,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.opened += other.opened;
        self.requested += other.requested;
        self.answered += other.answered;
        let flags = self.closed.iter_mut().zip(other.closed).chain(self.failed.iter_mut().zip(other.failed));
        flags.for_each(|(sum, n)| *sum += n);
    }
}

/// Counters by key, of one worker or of all.
#[derive(Clone, Debug, Default)]
pub struct Istio {
    counts: HashMap<Key, Counts>,
    most: usize,
}

impl Istio {
    /// With counters for so many keys.
    pub fn new(most: usize) -> Self {
        Self { counts: HashMap::new(), most }
    }

    fn of(&mut self, key: Key) -> &mut Counts {
        let known = self.counts.len() < self.most || self.counts.contains_key(&key);
        let key = if known { key } else { Key::other(key.reporter) };
        self.counts.entry(key).or_default()
    }

    /// A flow has reached its target.
    pub fn opened(&mut self, record: &Record) {
        self.of(Key::of(record)).opened += 1;
    }

    /// One that had has ended.
    pub fn closed(&mut self, record: &Record) {
        let counts = self.of(Key::of(record));
        counts.closed[Flag::of(record.reason) as usize] += 1;
        counts.requested += record.sent;
        counts.answered += record.received;
    }

    /// One did not.
    pub fn failed(&mut self, record: &Record) {
        // What its client gave up is no failure.
        if record.reason.fault() != Fault::Nobody && record.reason != EndReason::ClientLeft {
            let key = Key::of(record);
            // Who is refused whatever it asks for takes no series from the others.
            let key = if self.counts.contains_key(&key) { key } else { Key { service: None, ..key } };
            self.of(key).failed[Flag::of(record.reason) as usize] += 1;
        }
    }

    /// One that goes on has moved so much.
    pub fn live(&mut self, record: &Record, sent: u64, received: u64) {
        let counts = self.of(Key::of(record));
        counts.requested += sent;
        counts.answered += received;
    }

    /// Takes in those of another worker.
    pub fn add(&mut self, other: Self) {
        for (key, counts) in other.counts {
            // Each worker's own are bounded. Another bound here would have a key's numbers go to and fro.
            self.counts.entry(key).or_default().add(&counts);
        }
    }

    /// Every key with its counts, in the same order each time.
    pub fn all(&self) -> Vec<(&Key, &Counts)> {
        let mut all: Vec<_> = self.counts.iter().collect();
        all.sort_by_key(|(key, _)| (key.reporter == SourceKind::Listener, &key.peer, &key.service));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::flow::ClientAddr;

    fn record(to: &str) -> Record {
        let client = ClientAddr("10.0.0.1:1".parse().unwrap());
        let mut record = Record::new(&to.parse().unwrap(), client);
        record.identity = Some(Identity("spiffe://example.org/gateway".into()));
        record
    }

    /// A peer that asks for ever new names gets one series for all that are too many.
    #[test]
    fn keys_are_bounded_and_nothing_is_lost() {
        let mut istio = Istio::new(500);
        for i in 0..550 {
            istio.opened(&record(&format!("host-{i}.example:80")));
        }
        let mut all = Istio::default();
        all.add(istio.clone());
        all.add(istio);
        assert_eq!(all.all().len(), 501);
        let other = all.all().into_iter().find(|(key, _)| key.is_other()).unwrap();
        assert_eq!(other.1.opened, 100);
        assert_eq!(all.all().iter().map(|(_, c)| c.opened).sum::<u64>(), 1100);
    }

    /// A peer that is refused whatever it asks for gets one series.
    #[test]
    fn names_that_nobody_was_let_reach_have_no_series() {
        let mut istio = Istio::new(500);
        istio.opened(&record("a.example:80"));
        for to in ["a.example:80", "b.example:80", "c.example:80"] {
            let mut refused = record(to);
            refused.ended(EndReason::PolicyDenied, None);
            istio.failed(&refused);
        }
        let failed: Vec<_> =
            istio.all().iter().map(|(key, counts)| (key.service.as_deref(), counts.failed)).collect();
        assert_eq!(failed, [(None, [0, 2, 0, 0]), (Some("a.example"), [0, 1, 0, 0])]);
    }

    #[test]
    fn ends_have_the_flags_of_ztunnel() {
        let mut istio = Istio::new(500);
        let mut ended = record("a.example:80");
        istio.opened(&ended);
        istio.live(&ended, 3, 4);
        (ended.sent, ended.received) = (10, 20);
        ended.ended(EndReason::TargetReset, None);
        istio.closed(&ended);
        for reason in [EndReason::PolicyDenied, EndReason::TargetRefused, EndReason::ClientLeft] {
            ended.ended(reason, None);
            istio.failed(&ended);
        }
        let all = istio.all();
        assert_eq!(all.len(), 1);
        let expected =
            Counts { opened: 1, closed: [1, 0, 0, 0], failed: [0, 1, 1, 0], requested: 13, answered: 24 };
        assert_eq!(*all[0].1, expected);
    }
}
