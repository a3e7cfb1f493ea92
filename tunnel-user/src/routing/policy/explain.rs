//! What the policies say of a request, one after the other, and why each does.
//!
//! This is the definition of a decision: [`Policies::check_target`] and [`Permit::allows_addr`](super::Permit::allows_addr) find
//! the same by look-up. It is for those who ask why, and takes time linear in the number of policies.

use std::{fmt, net::SocketAddr};

use http::HeaderMap;
use ipnet::IpNet;
use serde::{Serialize, Serializer};

use super::{Denied, Kind, Policies, guarding, reached_by};
use crate::{
    config::{AddrPattern, Policy, PolicyAction, PolicyMode, TargetPattern},
    model::flow::{ClientAddr, Identity, Target},
    routing::index::RuleId,
};

/// Who asks for what.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Who the peer has proved to be.
    pub identity: Option<&'a Identity>,
    /// Its address.
    pub client: ClientAddr,
    /// What it asks for.
    pub target: &'a Target,
    /// An address that the target resolves to, where it is a name and has been resolved.
    pub addr: Option<SocketAddr>,
    /// The headers of its request.
    pub headers: Option<&'a HeaderMap>,
}

/// What all of them say together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This policy allows it. Of a name that has not been resolved each address is asked about again: it may still be
    /// denied, guarded, or one of our own listeners.
    Allowed(RuleId),
    /// No policy speaks of the name, and some would allow an address that it could resolve to.
    Unresolved,
    /// It is denied, by a policy or for want of one.
    Denied(Denied),
}

/// What the policies say, together and each.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Together.
    pub verdict: Verdict,
    /// Each, in the order of the configuration.
    pub policies: Vec<PolicyAnswer>,
}

/// What one policy says.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyAnswer {
    /// Its name.
    pub name: String,
    /// What it does with requests that it matches.
    #[serde(serialize_with = "action_word")]
    pub action: PolicyAction,
    /// Whether it is in report mode, and decides nothing.
    pub report: bool,
    /// Why it does not match; none: it does.
    pub mismatch: Option<Mismatch>,
}

fn action_word<S: Serializer>(action: &PolicyAction, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(match action {
        PolicyAction::Allow => "allow",
        PolicyAction::Deny => "deny",
    })
}

/// Why a policy does not match: the first of its conditions that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mismatch {
    /// The peer has no identity, or another one.
    Identity,
    /// The client's address is in none of the networks.
    Client,
    /// The target is in none of the networks, and has none of the names.
    Target,
    /// The target is, but for its port.
    Port,
    /// The name has not been resolved, and the policy speaks of addresses.
    Unresolved,
    /// This header does not say so.
    Header(String),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identity => f.write_str("another identity"),
            Self::Client => f.write_str("another client address"),
            Self::Target => f.write_str("another target"),
            Self::Port => f.write_str("another port"),
            Self::Unresolved => f.write_str("the name has not been resolved"),
            Self::Header(name) => write!(f, "header {name} does not match"),
        }
    }
}

impl Policies {
    /// What the policies say of a request, and why.
    pub fn explain(&self, question: &Question<'_>) -> Explanation {
        let answer = |policy: &Policy| PolicyAnswer {
            name: policy.name.clone(),
            action: policy.action,
            report: policy.mode == PolicyMode::Report,
            mismatch: question.mismatch(policy),
        };
        let policies: Vec<_> = self.all.iter().map(answer).collect();
        Explanation { verdict: self.verdict(question, &policies), policies }
    }

    fn verdict(&self, question: &Question<'_>, answers: &[PolicyAnswer]) -> Verdict {
        let of = |kind: Kind| {
            let rules = self.all.iter().zip(answers).enumerate();
            rules
                .filter(move |(_, (policy, _))| Kind::of(policy) == kind)
                .map(|(rule, (policy, a))| (rule, policy, a))
        };
        let matching = |kind: Kind| of(kind).filter(|(.., answer)| answer.mismatch.is_none());
        let who =
            || question.identity.map_or_else(|| "a peer without identity".to_owned(), ToString::to_string);
        let target = || question.target.clone();
        let name = matches!(question.target, Target::Name(..));
        // By the name first: that is asked before it is resolved.
        let (by_name, addr) = (Question { addr: None, ..*question }, question.addr());
        let of_name = |policy: &Policy| name && by_name.mismatch(policy).is_none();
        let deny = |rule: RuleId, addr| {
            let name = self.names.get(rule).cloned().unwrap_or_else(|| "".into());
            Verdict::Denied(Denied::Rule { rule: name, place: rule, who: who(), target: target(), addr })
        };
        let no_rule = || Verdict::Denied(Denied::NoRule { who: who(), target: target() });
        if let Some((rule, ..)) = matching(Kind::Deny).find(|(_, policy, _)| of_name(policy)) {
            return deny(rule, None);
        }
        let by_its_name = matching(Kind::Allow).find(|(_, policy, _)| of_name(policy));
        if name && by_its_name.is_none() && !of(Kind::Allow).any(|(_, policy, _)| by_name.may_take(policy)) {
            return no_rule();
        }
        if let Some((rule, ..)) = matching(Kind::Deny).next() {
            return deny(rule, addr.filter(|_| name));
        }
        let allowing = by_its_name.or_else(|| matching(Kind::Allow).next()).map(|(rule, ..)| rule);
        let Some(addr) = addr.map(|addr| SocketAddr::new(reached_by(addr.ip()), addr.port())) else {
            return allowing.map_or(Verdict::Unresolved, Verdict::Allowed);
        };
        let patterns = || {
            let patterns = matching(Kind::Allow).flat_map(|(_, policy, _)| policy.targets());
            patterns.filter_map(|pattern| addr_pattern(pattern).filter(|pattern| pattern.contains(addr)))
        };
        let exactly = |pattern: &AddrPattern| {
            pattern.net() == IpNet::from(addr.ip())
                && pattern.ports().ranges() == [(addr.port(), addr.port())]
        };
        let closed = guarding(addr).filter(|range| !patterns().any(|pattern| range.contains(&pattern.net())));
        let guarded = closed.map(|range| Denied::Guarded { addr, range });
        match (allowing, guarded) {
            (None, Some(guarded)) => Verdict::Denied(guarded),
            (None, None) if name => Verdict::Denied(Denied::Resolved { who: who(), target: target(), addr }),
            (None, None) => no_rule(),
            (Some(_), _) if self.own.contains(addr) && !patterns().any(exactly) => {
                Verdict::Denied(Denied::OwnListener(addr))
            }
            (Some(_), Some(guarded)) => Verdict::Denied(guarded),
            (Some(rule), None) => Verdict::Allowed(rule),
        }
    }
}

impl Question<'_> {
    /// The address that would be dialled, as far as it is known.
    fn addr(&self) -> Option<SocketAddr> {
        match self.target {
            Target::Addr(addr) => Some(*addr),
            Target::Name(..) => self.addr,
        }
    }

    fn may_take(&self, policy: &Policy) -> bool {
        matches!(self.mismatch(policy), None | Some(Mismatch::Unresolved))
    }

    /// The first condition of the policy that does not hold.
    fn mismatch(&self, policy: &Policy) -> Option<Mismatch> {
        if !policy.identity.contains(self.identity) {
            return Some(Mismatch::Identity);
        }
        if !policy.takes_client(self.client) {
            return Some(Mismatch::Client);
        }
        if let Some(header) = policy.headers.iter().find(|header| !header.matches(self.headers)) {
            return Some(Mismatch::Header(header.name.to_string()));
        }
        self.target_mismatch(policy)
    }

    fn target_mismatch(&self, policy: &Policy) -> Option<Mismatch> {
        let patterns = policy.targets();
        if patterns.is_empty() || patterns.iter().any(|pattern| self.is_taken_by(pattern, policy.action)) {
            return None;
        }
        let port = self.target.port();
        let unresolved = matches!(self.target, Target::Name(..)) && self.addr.is_none();
        if unresolved
            && patterns.iter().filter_map(addr_pattern).any(|pattern| pattern.ports().contains(port))
        {
            return Some(Mismatch::Unresolved);
        }
        let of_any_port = |pattern: &TargetPattern| match pattern {
            TargetPattern::Addr(pattern) => {
                self.addrs(policy.action).any(|addr| pattern.net().contains(&addr.ip().to_canonical()))
            }
            TargetPattern::Name(pattern) => {
                matches!(self.target, Target::Name(name, _) if pattern.takes_name(name))
            }
        };
        Some(if patterns.iter().any(of_any_port) { Mismatch::Port } else { Mismatch::Target })
    }

    fn is_taken_by(&self, pattern: &TargetPattern, action: PolicyAction) -> bool {
        match (pattern, self.target) {
            (TargetPattern::Addr(pattern), _) => self.addrs(action).any(|addr| pattern.contains(addr)),
            (TargetPattern::Name(pattern), Target::Name(name, port)) => pattern.contains(name, *port),
            (TargetPattern::Name(_), Target::Addr(_)) => false,
        }
    }

    /// The addresses that a policy is compared with: the one that is reached; and for one that denies, the one that was
    /// written too.
    fn addrs(&self, action: PolicyAction) -> impl Iterator<Item = SocketAddr> {
        let reached = self.addr().map(|addr| SocketAddr::new(reached_by(addr.ip()), addr.port()));
        reached.into_iter().chain(self.addr().filter(|_| action == PolicyAction::Deny))
    }
}

fn addr_pattern(pattern: &TargetPattern) -> Option<&AddrPattern> {
    match pattern {
        TargetPattern::Addr(pattern) => Some(pattern),
        TargetPattern::Name(_) => None,
    }
}
