//! Where a flow would go, and why: the capture, policy and routes in force, asked as the workers ask them. Nothing is sent.

use std::net::{Ipv4Addr, SocketAddr};

use tunnel_common::capture::Kind;

use super::{Running, captures::ActiveCapture, listen::ActiveListener, rules};
use crate::{
    admin::view::{By, Explanation, Question, Share, Step},
    config::Action,
    model::flow::{ClientAddr, Direction, HostName, Identity, Sniffed, SourceKind, Target, Transport},
    routing::{flow::Flow, index::NOBODY, policy::explain as policy, router::Verdict},
    sources::capture::explain::List,
    worker::Shared,
};

/// How many policies that do not match are named, with the reason.
const POLICIES_SHOWN: usize = 20;

/// By what a flow comes, found.
enum Source<'r> {
    Capture(&'r ActiveCapture),
    Listener(&'r ActiveListener),
    /// No capture holds the cgroup.
    Nothing(String),
}

impl Running {
    /// The error says what the question names that is not there.
    pub(super) fn explain(&self, question: &Question) -> Result<Explanation, String> {
        let Some(shared) = &self.shared else { return Err("no configuration is in force yet".to_owned()) };
        let mut explanation = Explanation { to: question.to.to_string(), ..Explanation::default() };
        let source = self.source(&question.by)?;
        let (kind, name) = match source {
            Source::Nothing(why) => {
                explanation.capture = Some(Step { passes: false, why });
                "it is not captured: it connects directly".clone_into(&mut explanation.decision);
                return Ok(explanation);
            }
            Source::Capture(capture) => {
                explanation.by = format!("capture {}", capture.name());
                let Target::Addr(to) = question.to else {
                    return Err("an application connects to an address: resolve the name first".to_owned());
                };
                let (step, decision) = captured(capture, to);
                let passes = step.passes;
                explanation.capture = Some(step);
                if !passes {
                    decision.clone_into(&mut explanation.decision);
                    return Ok(explanation);
                }
                (SourceKind::Capture, capture.wanted.name.clone())
            }
            Source::Listener(listener) => {
                explanation.by = format!("listener {}", listener.bound);
                let identity = question.identity.as_deref().map(|i| Identity(i.into()));
                let step = allowed(shared, identity.as_ref(), &question.to);
                let passes = step.passes;
                explanation.policy = Some(step);
                if !passes {
                    "it is refused by policy (403, policy_denied)".clone_into(&mut explanation.decision);
                    return Ok(explanation);
                }
                (SourceKind::Listener, listener.wanted.name.clone())
            }
        };
        self.explain_routes(question, shared, (kind, name.as_deref()), &mut explanation);
        Ok(explanation)
    }

    fn source(&self, by: &By) -> Result<Source<'_>, String> {
        let named = |of: Option<&str>, name: &str| of == Some(name);
        match by {
            By::AnyCapture => self
                .captures
                .first()
                .map(Source::Capture)
                .ok_or_else(|| "nothing is captured: say listener=".to_owned()),
            By::Capture(name) => {
                let mut captures = self.captures.iter();
                let found = captures
                    .find(|c| named(c.wanted.name.as_deref(), name) || *c.wanted.cgroup.name() == **name);
                found.map(Source::Capture).ok_or_else(|| format!("there is no capture \"{name}\""))
            }
            By::Cgroup(path) => {
                let holding = self.captures.iter().filter(|c| holds(&c.wanted.cgroup.name(), path));
                // Of nested ones the inner.
                let inner = holding.max_by_key(|c| c.wanted.cgroup.name().len());
                let none = || Source::Nothing(format!("no capture is of {path}, or of a cgroup above it"));
                Ok(inner.map_or_else(none, Source::Capture))
            }
            By::Listener(name) => {
                let is = |l: &&ActiveListener| {
                    named(l.wanted.name.as_deref(), name) || l.bound.to_string() == *name
                };
                let found = self.listeners.iter().find(is);
                found.map(Source::Listener).ok_or_else(|| format!("there is no listener \"{name}\""))
            }
        }
    }

    fn explain_routes(
        &self,
        question: &Question,
        shared: &Shared,
        (kind, name): (SourceKind, Option<&str>),
        explanation: &mut Explanation,
    ) {
        let identity = question.identity.as_deref().map(|i| Identity(i.into()));
        let identity = identity.filter(|_| kind == SourceKind::Listener);
        let peer = shared.router.peer(identity.as_ref());
        let inside = |text: &Option<String>| text.as_deref().and_then(HostName::new);
        let sniffed = inside(&question.sni)
            .map(Sniffed::Sni)
            .or_else(|| inside(&question.http_host).map(Sniffed::Host));
        let flow = Flow {
            transport: Transport::Tcp,
            direction: if kind == SourceKind::Capture { Direction::Outbound } else { Direction::Inbound },
            source: kind,
            name,
            target: &question.to,
            client: ClientAddr(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
            identity: identity.as_ref(),
            peer: if kind == SourceKind::Capture { &NOBODY } else { &peer },
            server_name: None,
            request: None,
            sniffed: sniffed.as_ref(),
        };
        explanation.routes = shared.router.explain(&flow);
        let first =
            explanation.routes.iter().find(|r| matches!(r.verdict, Verdict::Takes | Verdict::Depends));
        let Some(first) = first else {
            "it is refused: no route takes it (no_route)".clone_into(&mut explanation.decision);
            return;
        };
        let number = first.route;
        let prefix = if first.verdict == Verdict::Depends {
            "it depends on the first bytes (say sni= or http_host=); if they match, "
        } else {
            ""
        };
        let Some(route) = self.config.routes.get(number) else { return };
        let becomes = match &route.to {
            Action::Deny => format!("route {number} denies it (route_denied)"),
            Action::Direct => format!("route {number}: it is dialled from here"),
            Action::Dial(instead) => format!("route {number}: {instead} is dialled in its place"),
            Action::Upstreams(shares) => {
                let sum: u32 = shares.iter().map(|(_, weight)| weight).sum();
                explanation.upstreams = shares
                    .iter()
                    .map(|(upstream, weight)| Share {
                        upstream: upstream.to_string(),
                        percent: f64::from(*weight) * 100.0 / f64::from(sum.max(1)),
                        ..Share::default()
                    })
                    .collect();
                let names: Vec<_> = shares.iter().map(|(upstream, _)| upstream.as_str()).collect();
                format!("route {number}: through upstream {}", names.join(" or "))
            }
        };
        explanation.decision = format!("{prefix}{becomes}");
    }
}

/// Whether a group is a cgroup, or above it.
fn holds(group: &str, path: &str) -> bool {
    let path = path.trim_end_matches('/');
    if group.starts_with('/') {
        let group = group.trim_end_matches('/');
        return path == group || path.strip_prefix(group).is_some_and(|rest| rest.starts_with('/'));
    }
    // A unit.
    path.split('/').any(|part| part == group)
}

/// What the programs of a capture do with a destination, and what becomes of the connection where they do not capture it.
fn captured(capture: &ActiveCapture, to: SocketAddr) -> (Step, &'static str) {
    let patterns = rules::said(&capture.wanted);
    let by = match patterns.decides(to) {
        None => "no pattern of include contains it".to_owned(),
        Some((list, pattern)) => {
            let list = match list {
                List::Include => "include",
                List::Refuse => "refuse",
                List::Exclude => "exclude",
                List::DefaultExclude => "what is left alone by default",
            };
            format!("{} in {list} is the longest prefix that contains it", pattern.net)
        }
    };
    match capture.programs.rules().look(to) {
        Some(Kind::Captured) => (Step { passes: true, why: by }, ""),
        Some(Kind::Refused) => {
            (Step { passes: false, why: by }, "connect() fails with ENETUNREACH: the capture refuses it")
        }
        Some(Kind::Denied) => {
            let why = format!("{by}; a route denies it by address and port, or no route takes it");
            (Step { passes: false, why }, "connect() fails with ECONNREFUSED: routes deny it")
        }
        None => (Step { passes: false, why: by }, "it is not captured: it connects directly"),
    }
}

/// What the policies say of a peer and a target: of a client address and headers that nobody knows here, those that ask for them
/// do not match.
fn allowed(shared: &Shared, identity: Option<&Identity>, to: &Target) -> Step {
    let client = ClientAddr(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
    let asked = policy::Question { identity, client, target: to, addr: None, headers: None };
    let policy::Explanation { verdict, policies } = shared.policies.explain(&asked);
    let (passes, why) = match verdict {
        policy::Verdict::Allowed(rule) => {
            (true, format!("policy \"{}\" allows it", policies.get(rule).map_or("", |policy| &policy.name)))
        }
        policy::Verdict::Unresolved => (
            true,
            "a policy allows addresses: those that the name resolves to decide, and no upstream gets it"
                .to_owned(),
        ),
        policy::Verdict::Denied(denied) => (false, denied.to_string()),
    };
    let others =
        policies.iter().filter_map(|policy| Some(format!("{}: {}", policy.name, policy.mismatch.as_ref()?)));
    let others: Vec<_> = others.take(POLICIES_SHOWN).collect();
    let others =
        if others.is_empty() { String::new() } else { format!(" (no match: {})", others.join(", ")) };
    Step { passes, why: why + &others }
}
