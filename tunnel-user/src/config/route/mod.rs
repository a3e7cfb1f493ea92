//! `[[route]]`: which flows, where to, and on which terms.
//!
//!
//! # Invariants
//! - The upstreams, listeners and captures that a route names are there.

mod matches;
mod terms;
#[cfg(test)]
mod tests;

use serde_json::{Value as Json, json};

use self::terms::Retries;
pub use self::{
    matches::{HeaderMatch, Match, Regex, RegexError, ValueMatch},
    terms::{Authority, HeaderChanges, ProxyProtocol, Terms},
};
use super::{
    reader::{At, Cell, Reader, Section, Value, nearest, schema_of},
    section::section,
};
use crate::model::{flow::Target, names::UpstreamName};

/// `[[route]]`
#[derive(Clone, Debug)]
pub struct Route {
    /// What logs call it; without a name "route-N", by its place.
    pub name: Option<String>,
    /// Which flows.
    pub matches: Match,
    /// Where they go.
    pub to: Action,
    /// On which terms.
    pub terms: Terms,
}

impl Route {
    /// One without a name, on the usual terms.
    pub fn new(matches: Match, to: Action) -> Self {
        Self { name: None, matches, to, terms: Terms::default() }
    }

    /// Whether it needs to know what only the first bytes of the carried connection tell.
    pub fn needs_sniff(&self) -> bool {
        self.matches.needs_sniff() || self.terms.authority.needs_sniff()
    }
}

/// Where a route sends a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Through one of these upstreams, by weight. At least one weight is not 0.
    Upstreams(Vec<(UpstreamName, u32)>),
    /// Dialled by ourselves.
    Direct,
    /// Something else is dialled by ourselves, in place of the target.
    Dial(Target),
    /// Refused.
    Deny,
}

/// A route whose upstreams are still names.
pub(super) struct RouteByName {
    name: Option<String>,
    matches: Match,
    to: ActionByName,
    terms: Terms,
    listeners: Vec<At<String>>,
    captures: Vec<At<String>>,
    cgroups: Vec<At<String>>,
}

impl Section for RouteByName {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let name = r.optional(
            "name",
            "Name, for logs and explanations. Default: \"route-N\", by its place in the file.",
        );
        let matches = r.section("match", "Conditions. Without it: every flow.");
        let to = r.required(
            "to",
            "Where they go: \"direct\" (dialled by this process), { dial = \"HOST:PORT\" } (that is dialled in their place), \"deny\", or upstreams by weight.",
        );
        let timeout = r.optional(
            "timeout",
            "Timeout for the dial, or for the answer to CONNECT, instead of the listener's dial_timeout or the upstream's response_timeout.",
        );
        let Retries(retries) = r.default(
            "retries",
            "How often the CONNECT request to the upstream is retried if no endpoint of it can be connected to or has capacity, or if the answer was 502, 503 or 504: through another upstream of the route, or another endpoint. Never once a byte was carried.",
            Retries(0),
        );
        let authority = r.default(
            "authority",
            "Target of the CONNECT request to the upstream: \"{destination}\"; \"{sni}\" or \"{host}\", the name in the TLS or HTTP/1 request that the flow carries, with the port of the destination (without a name, the destination); or another HOST:PORT.",
            Authority::Destination,
        );
        let proxy_protocol = r.optional(
            "proxy_protocol",
            "What a target that is dialled from here is told before anything else: \"v2\", a PROXY header with the address and the proven name of the client.",
        );
        let headers: Option<HeaderChanges> =
            r.section("request_headers", "Changes to the headers of the CONNECT request to the upstream.");

        let [listeners, captures, cgroups] =
            ["listener", "capture", "cgroup"].map(|key| r.texts_below("match", key));
        if let Some(ActionByName::Fixed(action)) = &to {
            for key in ["retries", "authority", "request_headers"].into_iter().filter(|key| r.has(key)) {
                r.wrong(key, "is for the CONNECT request to an upstream, and \"to\" names none");
            }
            for key in ["timeout", "proxy_protocol"].into_iter().filter(|key| r.has(key)) {
                if *action == Action::Deny {
                    r.wrong(key, "has no meaning where \"to\" refuses");
                }
            }
        }
        if let Some(ActionByName::Upstreams(_)) = &to
            && r.has("proxy_protocol")
        {
            r.wrong("proxy_protocol", "is for what is dialled from here, and \"to\" names upstreams");
        }
        let matches = if r.has("match") { matches? } else { Match::default() };
        let never = match authority {
            Authority::Sni => matches.sni.is_empty() && !matches.http_host.is_empty(),
            Authority::Host => matches.http_host.is_empty() && !matches.sni.is_empty(),
            Authority::Destination | Authority::Is(_) => false,
        };
        if never {
            r.wrong(
                "authority",
                "is what no connection has that match takes: it is TLS, or HTTP, and not both",
            );
        }
        let headers = if r.has("request_headers") { headers? } else { HeaderChanges::default() };
        Some(Self {
            name,
            matches,
            to: to?,
            terms: Terms { timeout, retries, authority, headers, proxy_protocol },
            listeners,
            captures,
            cgroups,
        })
    }
}

/// Where a route goes, its upstreams still by name.
enum ActionByName {
    Upstreams(Vec<(At<String>, u32)>),
    Fixed(Action),
}

/// How many parts of the whole an upstream of a route gets. 0 takes it out of use.
#[derive(Clone, Copy, Debug)]
struct Weight(u32);

impl Value for Weight {
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 0, "maximum": 10_000 })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        // Bounded so that the sum over a route's upstreams stays far inside a u32.
        cell.integer(0, 10_000).and_then(|n| u32::try_from(n).ok()).map(Self)
    }
    fn show(&self) -> Json {
        json!(self.0)
    }
}

section! {
    /// One of the upstreams of a route.
    struct Share {
        /// Name of an upstream.
        upstream: required At<String>,
        /// Share of the route's flows, relative to the sum of the weights. 0 disables it.
        weight: default u32 [Weight] = Weight(1),
    }
    check |r| {
        let Weight(weight) = weight;
    }
}

section! {
    /// `{ dial = "HOST:PORT" }`
    struct Rewrite {
        /// Address that is dialled instead of the target: HOST:PORT.
        dial: required Target,
    }
    check |r| {}
}

impl Value for ActionByName {
    fn schema() -> Json {
        json!({ "anyOf": [
            { "enum": ["direct", "deny"] },
            schema_of::<Rewrite>(),
            { "type": "array", "items": schema_of::<Share>(), "minItems": 1 },
        ] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        if cell.is_text() {
            return match cell.text("")? {
                "direct" => Some(Self::Fixed(Action::Direct)),
                "deny" => Some(Self::Fixed(Action::Deny)),
                other => cell.wrong(format!(
                    "must be \"direct\", \"deny\", {{ dial = \"..\" }} or [{{ upstream = \"{other}\" }}], not \"{other}\""
                )),
            };
        }
        if cell.is_table() {
            return cell.section().map(|Rewrite { dial }| Self::Fixed(Action::Dial(dial)));
        }
        let items = cell.items("\"direct\", \"deny\", { dial = \"..\" } or [{ upstream = \"..\" }]")?;
        if items.is_empty() {
            return cell.wrong("is empty; \"deny\" refuses");
        }
        let read: Vec<_> = items.iter().map(Cell::section::<Share>).collect();
        let shares: Vec<Share> = read.into_iter().collect::<Option<_>>()?;
        if shares.iter().all(|s| s.weight == 0) {
            return cell.wrong("the weights are all 0; \"deny\" refuses");
        }
        Some(Self::Upstreams(shares.into_iter().map(|s| (s.upstream, s.weight)).collect()))
    }
    fn show(&self) -> Json {
        Json::Null
    }
}

/// Checks that the upstreams, listeners and captures that routes name are there. What has
/// mistakes of its own counts: its name is no mistake.
pub(super) fn resolve(r: &Reader<'_>, routes: Vec<RouteByName>) -> Option<Vec<Route>> {
    let upstreams = r.texts_in("upstream", &["name"]);
    let listeners = r.texts_in("listener", &["name"]);
    let captures = r.texts_in("capture", &["name", "cgroup", "unit"]);
    let groups = r.pairs_in("capture", &["name", "cgroup", "unit"], &["cgroup", "unit"]);
    let is_there = |kind: &str, names: &[At<String>], name: &At<String>| {
        let found = names.iter().any(|n| n.value == name.value);
        if !found {
            let near = nearest(&name.value, names.iter().map(|n| n.value.as_str()));
            let hint = near.map(|n| format!(", did you mean \"{n}\"?")).unwrap_or_default();
            r.wrong_at(name, format!("no {kind} is named \"{}\"{hint}", name.value));
        }
        found
    };
    let route = |route: RouteByName| {
        let RouteByName { name, mut matches, to, terms, .. } = route;
        for name in &route.listeners {
            is_there("listener", &listeners, name);
        }
        for name in &route.captures {
            is_there("capture", &captures, name);
        }
        for wanted in &route.cgroups {
            let found = groups.iter().filter(|(_, group)| is_group(&wanted.value, group));
            let before = matches.capture.len();
            matches.capture.extend(found.map(|(name, _)| name.clone()));
            if matches.capture.len() == before {
                r.wrong_at(wanted, format!("no capture is of \"{}\"", wanted.value));
            }
        }
        let to = match to {
            ActionByName::Fixed(action) => action,
            ActionByName::Upstreams(list) => {
                let share = |(name, weight): (At<String>, u32)| {
                    is_there("upstream", &upstreams, &name).then(|| (name.value.into(), weight))
                };
                let shares: Vec<_> = list.into_iter().map(share).collect();
                Action::Upstreams(shares.into_iter().collect::<Option<_>>()?)
            }
        };
        Some(Route { name, matches, to, terms })
    };
    let resolved: Vec<_> = routes.into_iter().map(route).collect();
    resolved.into_iter().collect()
}

/// Whether a capture's cgroup or unit is the one that is wanted, or below it.
fn is_group(wanted: &str, group: &str) -> bool {
    match wanted.strip_suffix("/*") {
        Some(above) => group.strip_prefix(above).is_some_and(|rest| rest.len() > 1 && rest.starts_with('/')),
        None => wanted == group,
    }
}
