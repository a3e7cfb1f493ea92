//! Headers: from those of a request to the rules whose conditions on headers may hold.
//!
//! # Invariants
//! - A rule is looked up by one of its conditions: by a whole value where it states one, else by the name of a header that has
//!   to be there. One that only asks that a header is absent may always hold. The rest of its conditions is the caller's.

use std::collections::HashMap;

use http::{HeaderMap, HeaderName};

use super::RuleId;
use crate::config::{HeaderMatch, ValueMatch};

/// The conditions on headers of all rules.
#[derive(Clone, Debug, Default)]
pub struct HeaderIndex {
    /// The rules that may hold whatever the headers are.
    open: Vec<RuleId>,
    by_name: HashMap<HeaderName, ByName>,
}

/// The rules that are looked up by one header.
#[derive(Clone, Debug, Default)]
struct ByName {
    /// Whatever it says.
    any: Vec<RuleId>,
    by_value: HashMap<Box<[u8]>, Vec<RuleId>>,
}

/// The lists of rules that may hold for one request, besides those for any.
#[derive(Clone, Debug, Default)]
pub struct HeaderSet<'a>(Vec<&'a [RuleId]>);

impl HeaderIndex {
    /// From the conditions of each rule, in the order of the rules.
    pub fn new<'a>(rules: impl IntoIterator<Item = &'a [HeaderMatch]>) -> Self {
        let mut index = Self::default();
        for (rule, conditions) in rules.into_iter().enumerate() {
            index.list(conditions).push(rule);
        }
        index
    }

    /// The list in which a rule with these conditions stands.
    fn list(&mut self, conditions: &[HeaderMatch]) -> &mut Vec<RuleId> {
        let exact = conditions.iter().find_map(|condition| match &condition.value {
            ValueMatch::Exact(value) => Some((&condition.name, value.as_bytes())),
            _ => None,
        });
        if let Some((name, value)) = exact {
            let by_name = self.by_name.entry(name.clone()).or_default();
            return by_name.by_value.entry(value.into()).or_default();
        }
        let there =
            conditions.iter().find(|condition| !matches!(condition.value, ValueMatch::Present(false)));
        match there {
            Some(condition) => &mut self.by_name.entry(condition.name.clone()).or_default().any,
            None => &mut self.open,
        }
    }

    /// What may hold for a request with these headers. Allocates nothing where no header is one that rules ask for.
    pub fn set(&self, headers: Option<&HeaderMap>) -> HeaderSet<'_> {
        let mut set = Vec::new();
        for name in headers.into_iter().flat_map(HeaderMap::keys) {
            let Some(by_name) = self.by_name.get(name) else { continue };
            if !by_name.any.is_empty() {
                set.push(by_name.any.as_slice());
            }
            for value in headers.into_iter().flat_map(|headers| headers.get_all(name)) {
                set.extend(by_name.by_value.get(value.as_bytes()).map(Vec::as_slice));
            }
        }
        HeaderSet(set)
    }

    /// The first rule from `from` on that may hold.
    pub fn next(&self, set: &HeaderSet<'_>, from: RuleId) -> Option<RuleId> {
        let first = |rules: &[RuleId]| rules.get(rules.partition_point(|rule| *rule < from)).copied();
        set.0.iter().copied().chain([self.open.as_slice()]).filter_map(first).min()
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 3] = ["x-a", "x-b", "x-c"];

    fn condition() -> impl Strategy<Value = HeaderMatch> {
        let value = prop_oneof![
            "[uv]{0,2}".prop_map(ValueMatch::Exact),
            "[uv]{0,1}".prop_map(ValueMatch::Prefix),
            any::<bool>().prop_map(ValueMatch::Present),
            Just(ValueMatch::Regex("u.*".parse().expect("a regular expression"))),
        ];
        (prop::sample::select(&NAMES[..]), value)
            .prop_map(|(name, value)| HeaderMatch { name: HeaderName::from_static(name), value })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        /// Every rule whose conditions hold is found, in the order of the rules, and none that asks for another whole value.
        #[test]
        fn the_index_finds_what_the_conditions_take(
            rules in prop::collection::vec(prop::collection::vec(condition(), 0..3), 0..8),
            lines in prop::option::of(prop::collection::vec((prop::sample::select(&NAMES[..]), "[uv]{0,2}"), 0..5)),
        ) {
            let headers = lines.map(|lines| {
                let mut headers = HeaderMap::new();
                for (name, value) in lines {
                    headers.append(HeaderName::from_static(name), HeaderValue::from_str(&value).expect("a value"));
                }
                headers
            });
            let index = HeaderIndex::new(rules.iter().map(Vec::as_slice));
            let set = index.set(headers.as_ref());
            let next = |from| index.next(&set, from);
            let found: Vec<_> = std::iter::successors(next(0), |last| next(last + 1)).collect();
            for (rule, conditions) in rules.iter().enumerate() {
                let holds = conditions.iter().all(|condition| condition.matches(headers.as_ref()));
                prop_assert!(!holds || found.contains(&rule), "{rule} of {found:?}");
                let first = conditions.iter().find(|condition| matches!(condition.value, ValueMatch::Exact(_)));
                let other = first.is_some_and(|condition| !condition.matches(headers.as_ref()));
                prop_assert!(!other || !found.contains(&rule), "{rule} of {found:?}");
            }
        }
    }
}
