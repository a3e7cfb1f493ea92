//! Why a flow goes where it goes: of each route, in order, whether it takes the flow, and which conditions say no.
//!
//! # Invariants
//! - The first route that takes a flow here is that which [`Router::decide`] takes (a test holds it to that).

use serde::{Deserialize, Serialize};

use super::{Router, matches_sniffed, takes};
use crate::{
    config::{Match, Route},
    model::flow::{SourceKind, Target},
    routing::flow::Flow,
};

/// What one route says of a flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// Its place in the configuration, from 0.
    pub route: usize,
    /// What it says.
    pub verdict: Verdict,
    /// The conditions that are not met, by their keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unmet: Vec<String>,
}

/// Whether a route takes a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It takes it.
    Takes,
    /// It takes it, or not: that depends on what its client sends first.
    Depends,
    /// A condition is not met.
    #[default]
    NotMet,
    /// It is not asked: an earlier one takes the flow.
    Behind,
}

impl Router {
    /// What every route says.
    pub fn explain(&self, flow: &Flow<'_>) -> Vec<Explained> {
        let mut taken = false;
        let each = self.routes.iter().enumerate().map(|(number, route)| {
            if taken {
                return Explained { route: number, verdict: Verdict::Behind, unmet: Vec::new() };
            }
            let unmet = self.unmet(number, route, flow);
            let verdict = match (&flow.sniffed, unmet.is_empty()) {
                (_, false) => Verdict::NotMet,
                (None, true) if route.needs_sniff() => Verdict::Depends,
                (_, true) => Verdict::Takes,
            };
            taken = verdict == Verdict::Takes;
            Explained { route: number, verdict, unmet }
        });
        each.collect()
    }

    /// The keys of the conditions that a flow does not meet.
    fn unmet(&self, number: usize, route: &Route, flow: &Flow<'_>) -> Vec<String> {
        let wanted = &route.matches;
        let target = (wanted.destination.is_empty() && wanted.host.is_empty())
            || match flow.target {
                Target::Addr(addr) => wanted.destination.iter().any(|p| p.contains(*addr)),
                Target::Name(name, port) => wanted.host.iter().any(|p| p.contains(name, *port)),
            };
        let none = Match::default;
        let alone = |part: Match| takes(&part, flow);
        let named = || match flow.source {
            SourceKind::Capture => "capture",
            SourceKind::Listener => "listener",
        };
        let checks = [
            ("source", alone(Match { source: wanted.source.clone(), ..none() })),
            (
                named(),
                alone(Match { listener: wanted.listener.clone(), capture: wanted.capture.clone(), ..none() }),
            ),
            (if wanted.destination.is_empty() { "host" } else { "destination" }, target),
            ("identity", self.peers.admits(flow.peer, number)),
            ("server_name", alone(Match { server_name: wanted.server_name.clone(), ..none() })),
            ("headers", alone(Match { headers: wanted.headers.clone(), ..none() })),
            (
                if wanted.sni.is_empty() { "http_host" } else { "sni" },
                flow.sniffed.is_none_or(|sniffed| matches_sniffed(wanted, sniffed)),
            ),
        ];
        checks.into_iter().filter(|(_, met)| !met).map(|(key, _)| key.to_owned()).collect()
    }
}
