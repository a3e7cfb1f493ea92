//! `[[policy]]`: who may reach what through our listeners.

use super::{
    TargetPattern,
    reader::{At, Reader, Section},
    section::section,
};
use crate::model::{
    flow::Identity,
    san::{San, SanPattern},
};

section! {
    /// `[[policy]]`: these peers may reach these targets.
    #[derive(Clone, Debug)]
    pub struct Policy {
        /// Who: a list of names, or "any".
        identity: required Peers,
        /// Targets: CIDR\[:PORTS] or NAME\[:PORTS], NAME may be *.suffix.
        target: required Vec<TargetPattern>,
    }
    check |r| {
        if target.as_ref().is_some_and(Vec::is_empty) {
            r.wrong("target", "is empty: it would allow nothing");
        }
    }
}

/// A policy and the place of its identity.
impl Section for At<Policy> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let policy = Policy::read(r)?;
        Some(r.at("identity", policy))
    }
}

/// Which peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Every one that was let in.
    Any,
    /// Those with one of these names.
    Of(Vec<SanPattern>),
}

impl Peers {
    /// Whether this peer is one of them. A peer without an identity is one of "any" only.
    pub fn contains(&self, peer: Option<&Identity>) -> bool {
        match (self, peer) {
            (Self::Any, _) => true,
            (Self::Of(_), None) => false,
            (Self::Of(patterns), Some(peer)) => {
                let name = San::from(peer);
                patterns.iter().any(|p| p.matches(&name))
            }
        }
    }
}
