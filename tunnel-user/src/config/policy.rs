//! `[[policy]]`: who may reach what through our listeners, one rule each.

use serde_json::{Value as Json, json};

use super::{
    AddrPattern, HeaderMatch, TargetPattern,
    reader::{At, Cell, Reader, Section, Value},
    section::section,
};
use crate::model::{
    flow::{ClientAddr, Identity},
    san::{San, SanPattern},
};

section! {
    /// `[[policy]]`: a rule that allows or denies these peers these targets.
    #[derive(Clone, Debug)]
    pub struct Policy {
        /// Name, for logs, counters and explanations. Default: "policy-N", by its place in the file.
        name: default String = String::new(),
        /// What is done with requests that it matches: "allow", unless a policy denies them; "deny", whatever others allow.
        action: default PolicyAction = PolicyAction::Allow,
        /// "enforce"; or "report": requests that it matches are counted and logged, and nothing else.
        mode: default PolicyMode = PolicyMode::Enforce,
        /// Identities of the peer: a list of names in its certificate, where * matches one path segment and a final /** all
        /// that follow (spiffe://TRUST-DOMAIN/** is a trust domain); or "any".
        identity: required Peers,
        /// Networks (CIDR) of the client's address. Empty: any.
        client: default Vec<AddrPattern> = Vec::new(),
        /// Targets: CIDR\[:PORTS] or NAME\[:PORTS], NAME may be *.suffix; or, with action = "deny", "any".
        target: required Targets,
        /// Headers of the CONNECT request; all have to match.
        headers: default Vec<HeaderMatch> = Vec::new(),
    }
    check |r| {
        match &target {
            Some(Targets::Of(patterns)) if patterns.is_empty() => r.wrong("target", "is empty: it would match nothing"),
            Some(Targets::Any) if action == PolicyAction::Allow => {
                r.wrong("target", "\"any\" is for action = \"deny\"; name the networks (such as \"10.0.0.0/8\") and names that are allowed");
            }
            _ => {}
        }
        for (index, _) in client.iter().enumerate().filter(|(_, net)| !net.ports().is_all()) {
            r.wrong_item("client", index, "has ports: a client's port is not matched");
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

impl Policy {
    /// One that allows these peers these targets.
    pub fn allow(name: impl Into<String>, identity: Peers, target: Vec<TargetPattern>) -> Self {
        Self {
            name: name.into(),
            action: PolicyAction::Allow,
            mode: PolicyMode::Enforce,
            identity,
            client: Vec::new(),
            target: Targets::Of(target),
            headers: Vec::new(),
        }
    }

    /// The targets that it names; none: every target.
    pub fn targets(&self) -> &[TargetPattern] {
        match &self.target {
            Targets::Any => &[],
            Targets::Of(patterns) => patterns,
        }
    }

    /// Whether it speaks of clients at this address.
    pub fn takes_client(&self, client: ClientAddr) -> bool {
        self.client.is_empty() || self.client.iter().any(|net| net.contains(client.0))
    }
}

/// What a policy does with the requests that it matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyAction {
    /// Allows them, unless another one denies them.
    #[default]
    Allow,
    /// Denies them, whatever others allow.
    Deny,
}

/// Whether a policy decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyMode {
    /// It decides.
    #[default]
    Enforce,
    /// It is counted and logged where it would have decided otherwise.
    Report,
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

/// Which targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every one.
    Any,
    /// Those that one of these patterns takes.
    Of(Vec<TargetPattern>),
}

impl Value for Targets {
    fn schema() -> Json {
        json!({ "anyOf": [{ "const": "any" }, Vec::<TargetPattern>::schema()] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        if cell.is_text() {
            return match cell.text("")? {
                "any" => Some(Self::Any),
                other => cell.wrong(format!("must be a list, or \"any\": [\"{other}\"]")),
            };
        }
        Vec::read(cell).map(Self::Of)
    }
    fn show(&self) -> Json {
        Json::Null
    }
}
