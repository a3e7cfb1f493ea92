//! Which rules speak of a target, or of a peer: looked up, not searched.
//!
//! Enters: the patterns of every rule, once; then the target and the peer of each flow. Leaves: the rules that
//! take them, the first of them first. Invariant: it decides as the patterns do one after the other (tests
//! hold it to that), and what it costs does not grow with the number of prefixes, names or identities. It
//! never allocates for a flow.
//!
//! Rules that stand on the same prefix or name, for the same peers, and differ in their ports only are looked
//! at one after the other.

mod peers;
mod targets;

pub use peers::{NOBODY, PeerIndex, PeerSet};
pub use targets::{Entry, Node, Takers, TargetIndex};

/// A rule: its place in the configuration.
pub type RuleId = usize;
