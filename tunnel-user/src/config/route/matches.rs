//! `[route.match]`: which flows.
//!
//!
//! # Invariants
//! - No two conditions leave nothing to match.

use std::{fmt, str::FromStr};

use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value as Json, json};

use super::super::{
    pattern::{AddrPattern, NamePattern},
    reader::{At, Cell, Reader, Section, Value, schema_of},
    section::section,
};
use crate::model::{flow::SourceKind, san::SanPattern};

/// What a regular expression may take when it is compiled. A page of alternatives takes a tenth of it.
const REGEX_SIZE: usize = 1 << 20;

section! {
    /// Which flows: those of which every condition that is there is true.
    #[derive(Clone, Debug, Default)]
    pub struct Match {
        /// Kinds of source. Empty: any.
        source: default Vec<SourceKind> = Vec::new(),
        /// Names of listeners. Together with capture: one of either.
        listener: default Vec<String> = Vec::new(),
        /// Names of captures; the default name is the cgroup or unit. Together with listener: one of either.
        capture: default Vec<String> = Vec::new(),
        /// Target addresses: CIDR\[:PORTS]. Together with host: one of either.
        destination: default Vec<AddrPattern> = Vec::new(),
        /// Target names: NAME\[:PORTS], NAME may be *.suffix. Together with destination: one of either.
        host: default Vec<NamePattern> = Vec::new(),
        /// Identities of the peer: names in its certificate; * matches one segment.
        identity: default Vec<SanPattern> = Vec::new(),
        /// Server names that the peer requested when it connected (SNI); *.suffix is allowed.
        server_name: default Vec<NamePattern> = Vec::new(),
        /// Headers of the CONNECT request; all have to match.
        headers: default Vec<HeaderMatch> = Vec::new(),
        /// Server names in the TLS that the flow carries; *.suffix is allowed. The client's first bytes are sniffed, for
        /// sniff_timeout at most. Together with http_host: one of either.
        sni: default Vec<NamePattern> = Vec::new(),
        /// Hosts of the first HTTP/1 request that the flow carries; *.suffix is allowed. The client's first bytes are
        /// sniffed, for sniff_timeout at most. Together with sni: one of either.
        http_host: default Vec<NamePattern> = Vec::new(),
    }
    check |r| {
        // Read again when the captures are known: they become names of captures.
        let _names: Vec<String> = r.default(
            "cgroup",
            "Cgroups or units of captures, whatever the captures' names; PATH/* matches every captured cgroup below PATH. Together with listener: one of either.",
            Vec::new(),
        );
        r.never(
            "path",
            "can never match: a CONNECT request has no :path (RFC 9113 section 8.5), and one that has is refused before it is routed",
        );

        let called_us = "has ports: it is what a peer called us, and not a target";
        let asked_for = "has ports: it is what a client asks for, and destination says at which port";
        for (key, names, why) in
            [("server_name", &server_name, called_us), ("sni", &sni, asked_for), ("http_host", &http_host, asked_for)]
        {
            for (index, _) in names.iter().enumerate().filter(|(_, name)| !name.ports().is_all()) {
                r.wrong_item(key, index, why);
            }
        }
        if r.has("capture") && r.has("cgroup") {
            r.wrong("cgroup", "stands beside capture: only one of them can be meant");
        }
        for (key, source_of) in
            [("listener", SourceKind::Listener), ("capture", SourceKind::Capture), ("cgroup", SourceKind::Capture)]
        {
            if r.has(key) && !source.is_empty() && !source.contains(&source_of) {
                r.wrong(key, "names flows that source leaves out: nothing would match");
            }
        }
    }
}

impl Match {
    /// Whether it asks for something that only the first bytes of the carried connection tell.
    pub fn needs_sniff(&self) -> bool {
        !self.sni.is_empty() || !self.http_host.is_empty()
    }
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

impl Section for HeaderMatch {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let name: Option<At<String>> = r.required("name", "Name of the header.");
        let exact = r.optional("exact", "Value that one of its lines must have.").map(ValueMatch::Exact);
        let prefix = r.optional("prefix", "Prefix that one of its lines must have.").map(ValueMatch::Prefix);
        let present = r
            .optional("present", "Whether it must be present (true) or absent (false).")
            .map(ValueMatch::Present);
        let regex = r
            .optional("regex", "Regular expression that must match one of its lines entirely.")
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
