//! Counters by policy: what each has allowed, denied and reported, and which flows it has ended.
//!
//! # Invariants
//! - A lock is taken when a configuration comes into force, and by who reads; a flow adds to counters that were found before.
//! - No more than [`POLICIES_MAX`] names are kept; what other policies do is counted as that of [`OTHER`].

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::stats::Counter;

/// How many policies of one worker have counters of their own: each is a series for whoever collects them.
pub const POLICIES_MAX: usize = 256;
/// The name of the others.
pub const OTHER: &str = "other";

/// A policy's name, and its counters with their names.
pub type Counted = (Arc<str>, [(&'static str, u64); 4]);

/// Counters of one policy on one worker, its only writer.
#[derive(Debug, Default)]
pub struct PolicyHits {
    /// Requests that it allowed.
    pub allowed: Counter,
    /// Requests that it denied.
    pub denied: Counter,
    /// Requests that it would have decided otherwise, in report mode.
    pub reported: Counter,
    /// Live flows that ended because it denies them now.
    pub ended: Counter,
}

impl PolicyHits {
    /// Every counter with its name.
    pub fn all(&self) -> [(&'static str, u64); 4] {
        [
            ("allowed", self.allowed.get()),
            ("denied", self.denied.get()),
            ("reported", self.reported.get()),
            ("ended", self.ended.get()),
        ]
    }
}

/// The counters of one worker, by the name of the policy.
#[derive(Debug, Default)]
pub struct PolicyCounters(Mutex<BTreeMap<Arc<str>, Arc<PolicyHits>>>);

impl PolicyCounters {
    /// Those of one policy. They go on when it is configured again.
    pub fn of(&self, name: &str) -> Arc<PolicyHits> {
        let mut by_name = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = by_name.len() < POLICIES_MAX || by_name.contains_key(name);
        let name = if own { name } else { OTHER };
        if let Some(hits) = by_name.get(name) {
            return Arc::clone(hits);
        }
        Arc::clone(by_name.entry(name.into()).or_default())
    }

    /// Every policy with its counters.
    pub fn all(&self) -> Vec<Counted> {
        let by_name = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        by_name.iter().map(|(name, hits)| (Arc::clone(name), hits.all())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Policies beyond the bound share one set of counters, and known ones keep theirs.
    #[test]
    fn names_are_bounded_and_the_rest_is_other() {
        let counters = PolicyCounters::default();
        for i in 0..POLICIES_MAX + 10 {
            counters.of(&format!("policy-{i}")).denied.add(1);
        }
        counters.of("policy-0").allowed.add(2);
        let all = counters.all();
        assert_eq!(all.len(), POLICIES_MAX + 1);
        let of =
            |name: &str| all.iter().find(|(n, _)| &**n == name).map(|(_, counters)| counters.map(|(_, n)| n));
        assert_eq!(of("policy-0"), Some([2, 1, 0, 0]));
        assert_eq!(of(OTHER), Some([0, 10, 0, 0]));
    }
}
