//! Which rules speak of a target, of a peer or of headers: looked up, not searched, the first of them first.
//!
//! Rules that stand on the same prefix or name, for the same peers, and differ in their ports only are looked
//! at one after the other.
//!
//! # Invariants
//! - The answer is that of the patterns one after the other (tests hold it to that).
//! - The cost does not grow with the number of prefixes, names, identities or values of headers, and nothing is allocated for a
//!   flow of which no rule asks for headers.

mod headers;
mod peers;
mod targets;

pub use headers::{HeaderIndex, HeaderSet};
pub use peers::{NOBODY, PeerIndex, PeerSet};
pub use targets::{Entry, Node, Takers, TargetIndex};

/// A rule: its place in the configuration.
pub type RuleId = usize;
