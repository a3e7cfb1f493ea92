//! Alternative services (RFC 7838): endpoints that say over HTTP/2 that they speak HTTP/3 too, and how that goes.
//!
//! # Invariants
//! - An alternative is on the same host, and has to prove the same name (section 2.1): a peer cannot send flows elsewhere.
//! - While HTTP/3 fails, no flow waits for it: it is tried beside the flows of HTTP/2, ever more rarely.

use std::{cell::RefCell, collections::HashMap, rc::Rc, time::Duration};

use http::HeaderValue;
use tokio::time::Instant;

use super::ConnectError;
use crate::model::flow::Target;

/// How much longer the first flow may take where UDP is dropped: HTTP/3 gets so much of a start. What RFC 8305 section 5 has
/// for addresses of another family.
pub const HEAD_START: Duration = Duration::from_millis(250);
/// HTTP/3 is tried again after this time, and after twice as much each time,
const RETRY_MIN: Duration = Duration::from_secs(1);
/// up to this, in which networks change.
const RETRY_MAX: Duration = Duration::from_secs(300);
/// How long an alternative is believed where its header does not say (RFC 7838 section 3.1).
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// What is known of endpoints, each by where it is.
#[derive(Debug, Default)]
pub struct Alternatives(RefCell<HashMap<Target, Alternative>>);

#[derive(Debug)]
struct Alternative {
    at: Target,
    until: Instant,
    /// In a row.
    failures: u32,
    /// Not before.
    retry_at: Option<Instant>,
    /// Since when a connection is being made.
    trying: Option<Instant>,
}

/// What HTTP/3 is worth to a flow that has no connection of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chance {
    /// It is waited for until then, before TCP is tried too.
    First(Instant),
    /// It is tried beside the flow.
    Beside,
    /// It is not tried now.
    None,
}

impl Alternatives {
    /// The peer at `endpoint` has said this (`alt-svc`), which replaces what it said before.
    pub fn heard(&self, endpoint: &Target, header: &HeaderValue) {
        let Ok(text) = header.to_str() else { return };
        let found = parse(text, endpoint);
        let mut all = self.0.borrow_mut();
        match (found, all.get_mut(endpoint)) {
            (None, _) => drop(all.remove(endpoint)),
            (Some((at, age)), Some(known)) if known.at == at => known.until = Instant::now() + age,
            (Some((at, age)), _) => {
                tracing::debug!(%endpoint, alternative = %at, "endpoint offers HTTP/3");
                let now = Instant::now();
                // A new one is rare: the time to forget those that are too old.
                all.retain(|_, known| now < known.until);
                let until = now + age;
                let new = Alternative { at, until, failures: 0, retry_at: None, trying: None };
                all.insert(endpoint.clone(), new);
            }
        }
    }

    /// Where an endpoint speaks HTTP/3.
    pub fn at(&self, endpoint: &Target) -> Option<Target> {
        let all = self.0.borrow();
        all.get(endpoint).filter(|known| Instant::now() < known.until).map(|known| known.at.clone())
    }

    /// An endpoint that speaks HTTP/3 there, as it said last, and may have said long ago.
    pub fn endpoint_of(&self, at: &Target) -> Option<Target> {
        let all = self.0.borrow();
        all.iter().find(|(_, known)| known.at == *at).map(|(endpoint, _)| endpoint.clone())
    }

    /// An endpoint is gone; where it spoke HTTP/3.
    pub fn forget(&self, endpoint: &Target) -> Option<Target> {
        self.0.borrow_mut().remove(endpoint).map(|known| known.at)
    }

    /// Whether to try it, `beside` a flow that need not wait, or for one that has to. Whoever tries says what came of it.
    pub fn chance(&self, endpoint: &Target, beside: bool) -> Chance {
        let (mut all, now) = (self.0.borrow_mut(), Instant::now());
        let Some(known) = all.get_mut(endpoint) else { return Chance::None };
        if known.failures == 0 && !beside {
            // Those that come meanwhile wait no longer than the first.
            let until = *known.trying.get_or_insert(now) + HEAD_START;
            return Chance::First(until);
        }
        if known.trying.is_some() || known.retry_at.is_some_and(|at| now < at) {
            return Chance::None;
        }
        known.trying = Some(now);
        Chance::Beside
    }

    /// Nothing came of it that would say anything of HTTP/3.
    fn gave_up(&self, endpoint: &Target) {
        if let Some(known) = self.0.borrow_mut().get_mut(endpoint) {
            known.trying = None;
        }
    }

    /// A connection was made, or was not.
    pub fn tried(&self, endpoint: &Target, worked: bool) {
        let (mut all, now) = (self.0.borrow_mut(), Instant::now());
        let Some(known) = all.get_mut(endpoint) else { return };
        known.trying = None;
        if worked {
            (known.failures, known.retry_at) = (0, None);
        } else if known.retry_at.is_none_or(|at| at <= now) {
            let wait = RETRY_MIN.saturating_mul(1 << known.failures.min(16)).min(RETRY_MAX);
            known.failures = known.failures.saturating_add(1);
            known.retry_at = Some(now + wait);
            tracing::info!(%endpoint, retry_after = ?wait, "HTTP/3 does not get through: using HTTP/2");
        }
    }
}

/// HTTP/3 is being tried. Dropped before it is known what came of it, as with the flow that it was for, it can be tried again.
#[derive(Debug)]
pub struct Trial {
    alternatives: Rc<Alternatives>,
    endpoint: Target,
}

impl Trial {
    /// Where there was a [`Chance`].
    pub fn new(alternatives: &Rc<Alternatives>, endpoint: &Target) -> Self {
        Self { alternatives: Rc::clone(alternatives), endpoint: endpoint.clone() }
    }

    /// That came of it. A limit of ours says nothing of UDP.
    pub fn ended<T>(self, done: &Result<T, ConnectError>) {
        match done {
            Ok(_) => self.alternatives.tried(&self.endpoint, true),
            Err(e) if e.is_ours() => {}
            Err(_) => self.failed(),
        }
    }

    /// It takes too long.
    pub fn failed(self) {
        self.alternatives.tried(&self.endpoint, false);
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.alternatives.gave_up(&self.endpoint);
    }
}

/// The first alternative on the same host that speaks HTTP/3, and for how long (RFC 7838 section 3). None of `clear`.
fn parse(text: &str, endpoint: &Target) -> Option<(Target, Duration)> {
    split(text, ',').find_map(|alternative| {
        let mut parts = split(alternative, ';');
        let authority = parts.next()?.strip_prefix("h3=")?;
        let authority = authority.strip_prefix('"')?.strip_suffix('"')?;
        let (host, port) = authority.rsplit_once(':')?;
        let port = port.parse::<u16>().ok().filter(|port| *port != 0)?;
        let at = match endpoint {
            Target::Addr(addr) => Target::Addr((addr.ip(), port).into()),
            Target::Name(name, _) => Target::Name(name.clone(), port),
        };
        if !host.is_empty() && authority.parse() != Ok(at.clone()) {
            return None;
        }
        let age = parts.find_map(|p| p.strip_prefix("ma=")).map(|age| age.trim_matches('"').parse());
        let age = age.map_or(Some(MAX_AGE), |age| age.ok().map(Duration::from_secs))?;
        (!age.is_zero()).then(|| (at, age.min(MAX_AGE * 365)))
    })
}

/// The parts between separators that stand in no quotes, trimmed.
fn split(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c| {
        quoted ^= c == '"';
        c == separator && !quoted
    })
    .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alternative_is_the_first_that_speaks_http_3_on_the_same_host() {
        let of = |endpoint: &str, header: &'static str| {
            let alternatives = Alternatives::default();
            let endpoint: Target = endpoint.parse().unwrap();
            alternatives.heard(&endpoint, &HeaderValue::from_static(header));
            alternatives.at(&endpoint).map(|at| at.to_string())
        };
        let some = |at: &str| Some(at.to_owned());
        assert_eq!(of("10.9.0.1:15008", "h3=\":15008\"; ma=60"), some("10.9.0.1:15008"));
        assert_eq!(of("[fd00::1]:1", "h3=\":2\""), some("[fd00::1]:2"));
        assert_eq!(
            of("a.example:1", "h2=\":1\", h3-29=\":2\", h3=\"A.example:3\";ma=\"5\""),
            some("a.example:3")
        );
        assert_eq!(of("a.example:1", "x=\"a,b;c\" ; y, h3=\":3\""), some("a.example:3"));
        for none in [
            "clear",
            "",
            "h3",
            "h3=:1",
            "h3=\":0\"",
            "h3=\":70000\"",
            "h3=\"b.example:1\"",
            "h3=\":1\"; ma=0",
            "h3=\":1\"; ma=x",
            "H3=\":1\"",
            "\"",
        ] {
            assert_eq!(of("a.example:1", none), None, "{none}");
        }
    }

    #[test]
    fn what_a_peer_says_last_counts() {
        let (alternatives, endpoint) = (Alternatives::default(), "10.9.0.1:1".parse().unwrap());
        for (header, at) in
            [("h3=\":1\"", Some("10.9.0.1:1")), ("h3=\":2\"", Some("10.9.0.1:2")), ("clear", None)]
        {
            alternatives.heard(&endpoint, &HeaderValue::from_static(header));
            assert_eq!(alternatives.at(&endpoint).map(|at| at.to_string()).as_deref(), at);
        }
    }

    /// The first flow waits for HTTP/3 for a bounded time, those that come meanwhile for the rest of it, and later ones not at
    /// all; it is tried again beside them, ever more rarely, and first again once it has worked.
    #[tokio::test(start_paused = true)]
    async fn http_3_that_fails_is_waited_for_once_and_tried_again_beside_other_flows() {
        let (alternatives, endpoint) = (Alternatives::default(), "10.9.0.1:1".parse().unwrap());
        assert_eq!(alternatives.chance(&endpoint, false), Chance::None, "it has said nothing");
        alternatives.heard(&endpoint, &HeaderValue::from_static("h3=\":1\""));
        let until = Instant::now() + HEAD_START;
        assert_eq!(alternatives.chance(&endpoint, false), Chance::First(until));
        tokio::time::advance(HEAD_START / 2).await;
        assert_eq!(alternatives.chance(&endpoint, false), Chance::First(until));
        assert_eq!(alternatives.chance(&endpoint, true), Chance::None, "it is being tried");
        for wait in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            alternatives.tried(&endpoint, false);
            alternatives.tried(&endpoint, false);
            assert_eq!(alternatives.chance(&endpoint, false), Chance::None);
            tokio::time::advance(Duration::from_secs(wait) - Duration::from_millis(1)).await;
            assert_eq!(alternatives.chance(&endpoint, false), Chance::None);
            tokio::time::advance(Duration::from_millis(1)).await;
            assert_eq!(alternatives.chance(&endpoint, false), Chance::Beside);
            assert_eq!(alternatives.chance(&endpoint, true), Chance::None, "it is being tried");
        }
        alternatives.tried(&endpoint, true);
        assert_eq!(alternatives.chance(&endpoint, false), Chance::First(Instant::now() + HEAD_START));
    }

    /// A flow that leaves while it waits, and a limit of ours, say nothing of HTTP/3: it can be tried again at once.
    #[tokio::test(start_paused = true)]
    async fn a_try_that_says_nothing_of_http_3_keeps_nobody_from_the_next() {
        let (alternatives, endpoint) = (Rc::<Alternatives>::default(), "10.9.0.1:1".parse().unwrap());
        alternatives.heard(&endpoint, &HeaderValue::from_static("h3=\":1\""));
        let chance = |beside| alternatives.chance(&endpoint, beside);
        let trial = || Trial::new(&alternatives, &endpoint);
        for done in [None, Some(ConnectError::Limit { most: 1 }), Some(ConnectError::Shutdown)] {
            assert_eq!(chance(true), Chance::Beside);
            assert_eq!(chance(true), Chance::None, "it is being tried");
            let trial = trial();
            if let Some(e) = done {
                trial.ended::<()>(&Err(e));
            }
        }
        assert_eq!(chance(true), Chance::Beside);
        let (endpoint, after) = (endpoint.clone(), HEAD_START);
        trial().ended::<()>(&Err(ConnectError::Timeout { endpoint, after, long_hello: false }));
        assert_eq!(chance(true), Chance::None, "it has failed");
        trial().ended(&Ok(()));
        assert_eq!(chance(true), Chance::Beside);
    }

    /// Those that are too old are forgotten when another endpoint offers HTTP/3.
    #[tokio::test(start_paused = true)]
    async fn what_is_known_of_endpoints_is_bounded_by_those_that_are_believed() {
        let alternatives = Alternatives::default();
        for port in 1..10 {
            let endpoint = Target::Addr(([10, 9, 0, 1], port).into());
            alternatives.heard(&endpoint, &HeaderValue::from_static("h3=\":99\"; ma=5"));
            let at = alternatives.at(&endpoint).unwrap();
            assert_eq!(alternatives.endpoint_of(&at), Some(endpoint));
            tokio::time::advance(Duration::from_secs(5)).await;
            assert_eq!(alternatives.0.borrow().len(), 1);
        }
    }

    /// An alternative is believed as long as it is said to be there.
    #[tokio::test(start_paused = true)]
    async fn an_alternative_that_is_too_old_is_not_used() {
        let (alternatives, endpoint) = (Alternatives::default(), "10.9.0.1:1".parse().unwrap());
        alternatives.heard(&endpoint, &HeaderValue::from_static("h3=\":1\"; ma=5"));
        assert!(alternatives.at(&endpoint).is_some());
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(alternatives.at(&endpoint).is_none());
    }
}
