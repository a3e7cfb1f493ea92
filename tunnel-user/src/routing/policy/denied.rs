//! Why a peer may not reach a target: as an operator reads it, and as the peer may know it.
//!
//! # Invariants
//! - A peer does not learn what a name resolved to, nor the name of a policy.

use std::{net::SocketAddr, sync::Arc};

use ipnet::IpNet;

use crate::model::flow::Target;

/// Why a peer may not reach a target. Its text is for the operator; [`Denied::public`] is for the peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No policy allows this peer this target.
    #[error("no policy lets {who} reach {target}")]
    NoRule {
        /// The peer.
        who: String,
        /// What it asked for.
        target: Target,
    },
    /// A policy denies it.
    #[error("policy \"{rule}\" denies {who} the target {target}{}", resolved(addr.as_ref()))]
    Rule {
        /// The name of the policy.
        rule: Arc<str>,
        /// Its place in the configuration, from 0.
        place: usize,
        /// The peer.
        who: String,
        /// What it asked for.
        target: Target,
        /// The address that the policy speaks of, where the target is a name.
        addr: Option<SocketAddr>,
    },
    /// The name is allowed only by the addresses it resolves to, and this is none of them.
    #[error("no policy lets {who} reach {addr}, to which {target} resolves")]
    Resolved {
        /// The peer.
        who: String,
        /// What it asked for.
        target: Target,
        /// What that resolved to.
        addr: SocketAddr,
    },
    /// Link-local, metadata, or unspecified.
    #[error("{addr} is in {range}, which only a policy for addresses inside that range opens")]
    Guarded {
        /// The address.
        addr: SocketAddr,
        /// The range.
        range: IpNet,
    },
    /// One of our own listeners.
    #[error("{0} is a listener of this gateway, which only a policy for exactly that address and port opens")]
    OwnListener(SocketAddr),
}

fn resolved(addr: Option<&SocketAddr>) -> String {
    addr.map(|addr| format!(", which resolves to {addr}")).unwrap_or_default()
}

impl Denied {
    /// What the peer that asked for `target` is told.
    pub fn public(&self, target: &Target) -> String {
        let who = match self {
            Self::NoRule { who, .. } | Self::Rule { who, .. } | Self::Resolved { who, .. } => who,
            // The address is what the peer wrote itself.
            Self::Guarded { .. } | Self::OwnListener(_) if matches!(target, Target::Addr(_)) => {
                return self.to_string();
            }
            Self::Guarded { .. } | Self::OwnListener(_) => "this peer",
        };
        format!("no policy lets {who} reach {target}")
    }

    /// The name of the policy that denies it; none where it is that none allows it.
    pub fn rule(&self) -> Option<&Arc<str>> {
        if let Self::Rule { rule, .. } = self { Some(rule) } else { None }
    }
}
