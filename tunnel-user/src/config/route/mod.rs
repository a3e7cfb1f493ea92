//! `[[route]]`: which flows, where to, and on which terms.
//!
//! Enters: tables. Leaves: [`Route`]s. Invariant: the upstreams, listeners and captures that they name are
//! there, and no header that is the tunnel's own to set is copied, added, or taken out where it is needed. It
//! never looks at a flow.

use std::{fmt, str::FromStr, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value as Json, json};

use super::{
    pattern::{AddrPattern, NamePattern},
    reader::{At, Cell, Reader, Section, Value, nearest, schema_of},
    value::{Headers, parse_header_name},
};
use crate::{flow::Target, route::Source, transport::identity::SanPattern};

#[cfg(test)]
mod tests;

/// What a regular expression may take when it is compiled. A page of alternatives takes a tenth of it.
const REGEX_SIZE: usize = 1 << 20;

/// `[[route]]`
#[derive(Clone, Debug)]
pub struct Route {
    /// Which flows.
    pub matches: Match,
    /// Where they go.
    pub to: Action,
    /// On which terms.
    pub terms: Terms,
}

/// Which flows: those of which every condition that is there is true.
#[derive(Clone, Debug, Default)]
pub struct Match {
    /// Flows from where. Empty: from everywhere.
    pub source: Vec<Source>,
    /// Flows from the listeners of these names. With `capture`: from one of either.
    pub listener: Vec<String>,
    /// Flows from the captures of these names. With `listener`: from one of either.
    pub capture: Vec<String>,
    /// Flows to these addresses. With `host`: to one of either, as a target is an address or a name.
    pub destination: Vec<AddrPattern>,
    /// Flows to these names. With `destination`: to one of either.
    pub host: Vec<NamePattern>,
    /// Flows of peers with one of these names.
    pub identity: Vec<SanPattern>,
    /// Flows of peers that asked for one of these names when they connected (SNI, RFC 6066 section 3).
    pub server_name: Vec<NamePattern>,
    /// What the CONNECT request has to say; all of them.
    pub headers: Vec<HeaderMatch>,
}

/// A condition on one header of a CONNECT request.
#[derive(Clone, Debug)]
pub struct HeaderMatch {
    /// Which header.
    pub name: HeaderName,
    /// What it has to say.
    pub value: ValueMatch,
}

/// A condition on a value.
#[derive(Clone, Debug)]
pub enum ValueMatch {
    /// This, byte for byte.
    Exact(String),
    /// This in front.
    Prefix(String),
    /// Something, or nothing.
    Present(bool),
    /// What this describes, from its first byte to its last.
    Regex(Regex),
}

impl HeaderMatch {
    /// Whether one of the header's lines is as wanted. Without a request there are no headers.
    pub fn matches(&self, headers: Option<&HeaderMap>) -> bool {
        let mut lines = headers.into_iter().flat_map(|h| h.get_all(&self.name)).map(HeaderValue::as_bytes);
        match &self.value {
            ValueMatch::Exact(wanted) => lines.any(|line| line == wanted.as_bytes()),
            ValueMatch::Prefix(wanted) => lines.any(|line| line.starts_with(wanted.as_bytes())),
            ValueMatch::Present(wanted) => lines.next().is_some() == *wanted,
            ValueMatch::Regex(wanted) => lines.any(|line| wanted.is_match(line)),
        }
    }
}

/// A regular expression for whole values, which takes time linear in them (the syntax of the `regex` crate, in
/// bytes).
#[derive(Clone, Debug)]
pub struct Regex {
    text: String,
    whole: regex::bytes::Regex,
}

impl Regex {
    /// Whether it describes all of `value`.
    pub fn is_match(&self, value: &[u8]) -> bool {
        self.whole.is_match(value)
    }
}

/// Why a text is no regular expression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegexError {
    /// It cannot be read.
    #[error("not a regular expression: {0}")]
    Syntax(String),
    /// It can, but would take too much memory once it is compiled.
    #[error("the regular expression is too large once it is compiled")]
    TooLarge,
}

impl FromStr for Regex {
    type Err = RegexError;

    fn from_str(s: &str) -> Result<Self, RegexError> {
        let compile = |text: &str| {
            let mut builder = regex::bytes::RegexBuilder::new(text);
            builder.unicode(false).size_limit(REGEX_SIZE).build().map_err(|e| match e {
                regex::Error::CompiledTooBig(_) => RegexError::TooLarge,
                // The last line says what is wrong, the lines before show where.
                other => {
                    let text = other.to_string();
                    let last = text.lines().next_back().unwrap_or_default();
                    RegexError::Syntax(last.strip_prefix("error: ").unwrap_or(last).to_owned())
                }
            })
        };
        // By itself first: what is wrong with it must not be right between the brackets.
        compile(s)?;
        Ok(Self { text: s.to_owned(), whole: compile(&format!("\\A(?:{s})\\z"))? })
    }
}

impl fmt::Display for Regex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Where a route sends a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Through one of these: an index into [`super::Config::upstreams`], and its weight. At least one weight
    /// is not 0.
    Upstreams(Vec<(usize, u32)>),
    /// Dialled by ourselves.
    Direct,
    /// Something else is dialled by ourselves, in place of the target.
    Dial(Target),
    /// Refused.
    Deny,
}

/// On which terms a route sends a flow. The default changes nothing.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// How long the dial, or the answer to CONNECT, may take, in place of what is usual there.
    pub timeout: Option<Duration>,
    /// What the CONNECT request asks for, in place of the target.
    pub authority: Option<Target>,
    /// How the headers of the CONNECT request differ.
    pub headers: HeaderChanges,
}

/// Changes of a CONNECT request's headers, in the order in which they are made.
#[derive(Clone, Debug, Default)]
pub struct HeaderChanges {
    /// Taken over from the CONNECT request that the flow came with.
    pub copy: Vec<HeaderName>,
    /// Taken out, whoever has put them there.
    pub remove: Vec<HeaderName>,
    /// Added.
    pub add: Vec<(HeaderName, HeaderValue)>,
}

impl Section for Match {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let source: Vec<Source> =
            r.default("source", "Flows from where. Empty: from everywhere.", Vec::new());
        let listener = r.default(
            "listener",
            "Flows from listeners of these names. Beside capture: from one of either.",
            Vec::new(),
        );
        let capture = r.default(
            "capture",
            "Flows from captures of these names; one without a name is called by its cgroup or unit. Beside listener: from one of either.",
            Vec::new(),
        );
        let destination = r.default(
            "destination",
            "Flows to which addresses: CIDR[:PORTS]. Beside host: to one of either.",
            Vec::new(),
        );
        let host = r.default(
            "host",
            "Flows to which names: NAME[:PORTS], NAME may be *.suffix. Beside destination: to one of either.",
            Vec::new(),
        );
        let identity = r.default(
            "identity",
            "Flows of peers whose certificate carries one of these names; * stands for a whole segment.",
            Vec::new(),
        );
        let server_name: Vec<At<NamePattern>> = r.default(
            "server_name",
            "Flows of peers that asked for one of these names when they connected to us (SNI); it may be *.suffix.",
            Vec::new(),
        );
        let headers =
            r.default("headers", "What the CONNECT request has to say: every one of these.", Vec::new());
        r.later("path");
        r.later("sni");

        for name in server_name.iter().filter(|name| !name.value.ports().is_all()) {
            r.wrong_at(name, "has ports: it is what a peer called us, and not a target");
        }
        for (key, source_of) in [("listener", Source::Listener), ("capture", Source::Captured)] {
            if r.has(key) && !source.is_empty() && !source.contains(&source_of) {
                r.wrong(key, "names flows that source leaves out: nothing would match");
            }
        }
        let server_name = server_name.into_iter().map(|at| at.value).collect();
        Some(Self { source, listener, capture, destination, host, identity, server_name, headers })
    }
}

impl Section for HeaderMatch {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let name: Option<At<String>> = r.required("name", "Which header of the CONNECT request.");
        let exact = r.optional("exact", "What one of its lines has to be.").map(ValueMatch::Exact);
        let prefix = r.optional("prefix", "What one of its lines has to begin with.").map(ValueMatch::Prefix);
        let present = r.optional("present", "Whether it has to be there.").map(ValueMatch::Present);
        let regex = r
            .optional("regex", "A regular expression that describes the whole of one of its lines.")
            .map(ValueMatch::Regex);

        let mut said = ["exact", "prefix", "present", "regex"].into_iter().filter(|key| r.has(key));
        match (said.next(), said.next()) {
            (None, _) => r.wrong("", "says nothing of the value: exact, prefix, present or regex is missing"),
            (Some(first), Some(second)) => {
                r.wrong(second, format!("stands beside {first}: only one of them can be meant"));
            }
            (Some(_), None) => {}
        }
        let name = name?;
        let parsed = match name.value.parse() {
            Ok(name) => Some(name),
            Err(_) => {
                r.wrong_at(&name, format!("\"{}\" is not a header name", name.value));
                None
            }
        };
        Some(Self { name: parsed?, value: exact.or(prefix).or(present).or(regex)? })
    }
}

impl Value for HeaderMatch {
    fn schema() -> Json {
        schema_of::<Self>()
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        cell.section()
    }
    fn show(&self) -> Json {
        json!({})
    }
}

impl Section for HeaderChanges {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let copy: Vec<At<String>> = r.default(
            "copy",
            "Headers to take over from the CONNECT request that the flow came with. baggage is taken over anyway.",
            Vec::new(),
        );
        let remove: Vec<At<String>> =
            r.default("remove", "Headers to leave out, whoever has put them there.", Vec::new());
        let add = r.default("add", "Headers to add, once others are left out.", Headers::default()).0;

        let copied =
            |at: &At<String>| parse_header_name(&at.value).map_err(|e| r.wrong_at(at, e.to_string())).ok();
        let removed = |at: &At<String>| match at.value.parse::<HeaderName>() {
            Ok(name) if name == http::header::VIA => {
                r.wrong_at(at, "\"via\" has to stay: it is what loops are found by");
                None
            }
            Ok(name) => Some(name),
            Err(_) => {
                r.wrong_at(at, format!("\"{}\" is not a header name", at.value));
                None
            }
        };
        let copy: Vec<_> = copy.iter().map(copied).collect();
        let remove: Vec<_> = remove.iter().map(removed).collect();
        Some(Self {
            copy: copy.into_iter().collect::<Option<_>>()?,
            remove: remove.into_iter().collect::<Option<_>>()?,
            add,
        })
    }
}

/// What a CONNECT request asks for; none: the target.
struct Authority(Option<Target>);

impl Value for Authority {
    fn schema() -> Json {
        json!({ "type": "string", "examples": ["{destination}", "web.internal:443"] })
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        match cell.text("a string: \"{destination}\" or HOST:PORT")? {
            "{destination}" => Some(Self(None)),
            "{host}" => cell.wrong("\"{host}\" is not supported yet"),
            text if text.contains(['{', '}']) => {
                cell.wrong(format!("must be \"{{destination}}\" or HOST:PORT, not \"{text}\""))
            }
            text => match text.parse() {
                Ok(target) => Some(Self(Some(target))),
                Err(e) => cell.wrong(format!("\"{text}\": {e}")),
            },
        }
    }
    fn show(&self) -> Json {
        self.0.as_ref().map_or_else(|| json!("{destination}"), |target| json!(target.to_string()))
    }
}

/// A route whose upstreams are still names.
pub(super) struct RouteByName {
    matches: Match,
    to: ActionByName,
    terms: Terms,
    listeners: Vec<At<String>>,
    captures: Vec<At<String>>,
}

impl Section for RouteByName {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let matches = r.section("match", "Which flows. Without it: every flow.");
        let to = r.required(
            "to",
            "Where they go: \"direct\" (dialled by this process), { dial = \"HOST:PORT\" } (that is dialled in their place), \"deny\", or upstreams by weight.",
        );
        let timeout = r.optional(
            "timeout",
            "How long the dial, or the answer to CONNECT, may take, in place of the dial_timeout of the listener or the response_timeout of the upstream.",
        );
        let Authority(authority) = r.default(
            "authority",
            "What the CONNECT request to the upstream asks for: \"{destination}\", or another HOST:PORT.",
            Authority(None),
        );
        let headers: Option<HeaderChanges> =
            r.section("request_headers", "How the headers of the CONNECT request to the upstream differ.");

        let (listeners, captures) = (r.texts_below("match", "listener"), r.texts_below("match", "capture"));
        if let Some(ActionByName::Fixed(action)) = &to {
            for key in ["authority", "request_headers"].into_iter().filter(|key| r.has(key)) {
                r.wrong(key, "is for the CONNECT request to an upstream, and \"to\" names none");
            }
            if *action == Action::Deny && r.has("timeout") {
                r.wrong("timeout", "has no meaning where \"to\" refuses");
            }
        }
        let matches = if r.has("match") { matches? } else { Match::default() };
        let headers = if r.has("request_headers") { headers? } else { HeaderChanges::default() };
        Some(Self { matches, to: to?, terms: Terms { timeout, authority, headers }, listeners, captures })
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

struct Share {
    upstream: At<String>,
    weight: u32,
}

impl Section for Share {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let upstream = r.required("upstream", "Name of an upstream.");
        let Weight(weight) = r.default(
            "weight",
            "Its share of the route's flows, out of the sum of the weights. 0 takes it out of use.",
            Weight(1),
        );
        Some(Self { upstream: upstream?, weight })
    }
}

struct Rewrite {
    dial: Target,
}

impl Section for Rewrite {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let dial = r.required("dial", "What is dialled in place of the target: HOST:PORT.");
        Some(Self { dial: dial? })
    }
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

/// Turns the names of upstreams into their places, and looks for those of listeners and captures. What has
/// mistakes of its own counts: its name is no mistake.
pub(super) fn resolve(r: &Reader<'_>, routes: Vec<RouteByName>) -> Option<Vec<Route>> {
    let upstreams = r.texts_in("upstream", &["name"]);
    let listeners = r.texts_in("listener", &["name"]);
    let captures = r.texts_in("capture", &["name", "cgroup", "unit"]);
    let find = |kind: &str, names: &[At<String>], name: &At<String>| {
        let found = names.iter().position(|n| n.value == name.value);
        if found.is_none() {
            let near = nearest(&name.value, names.iter().map(|n| n.value.as_str()));
            let hint = near.map(|n| format!(", did you mean \"{n}\"?")).unwrap_or_default();
            r.wrong_at(name, format!("no {kind} is named \"{}\"{hint}", name.value));
        }
        found
    };
    let route = |route: RouteByName| {
        let RouteByName { matches, to, terms, .. } = route;
        for name in &route.listeners {
            find("listener", &listeners, name);
        }
        for name in &route.captures {
            find("capture", &captures, name);
        }
        let to = match to {
            ActionByName::Fixed(action) => action,
            ActionByName::Upstreams(list) => {
                let place =
                    |(name, weight): &(At<String>, u32)| Some((find("upstream", &upstreams, name)?, *weight));
                let placed: Vec<_> = list.iter().map(place).collect();
                Action::Upstreams(placed.into_iter().collect::<Option<_>>()?)
            }
        };
        Some(Route { matches, to, terms })
    };
    let resolved: Vec<_> = routes.into_iter().map(route).collect();
    resolved.into_iter().collect()
}
