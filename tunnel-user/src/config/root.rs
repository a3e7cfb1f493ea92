//! The whole file: which sections there are, and what no section can see by itself.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use super::{
    AccessLog, Capture, CgroupRef, Config, Listener, Peers, Policy, Redirect, Traces,
    capture::AnyCapture,
    identity::{Identities, Named},
    reader::{At, Reader, Section, nearest},
    route::{RouteByName, resolve},
    via::{self, UpstreamByName},
};

impl Section for Config {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let daemon = r.section("daemon", "The process.").unwrap_or_default();
        let admin = r.section("admin", "The admin interface: status, flows, metrics.").unwrap_or_default();
        let identities: Vec<At<Named>> = r.one_or_several(
            "identity",
            "Who this process is, and whom it trusts. One [identity], or several [[identity]] with names.",
        );
        let captures: Vec<At<AnyCapture>> = r.sections(
            "capture",
            "TCP connections to capture: those of a cgroup, or those that firewall rules redirect.",
        );
        let mut listeners: Vec<At<Listener>> =
            r.sections("listener", "Sockets that accept CONNECT requests.");
        let routes: Vec<RouteByName> = r.sections(
            "route",
            "Where flows go. The first route that matches decides; a flow that matches no route is rejected.",
        );
        let upstreams: Vec<UpstreamByName> =
            r.sections("upstream", "A gateway or proxy that flows are sent through.");
        let policies: Vec<At<Policy>> = r.sections(
            "policy",
            "Which peers may reach which targets through the listeners. By default nothing is allowed.",
        );

        let access_logs: Vec<At<AccessLog>> =
            r.sections("access_log", "Where each flow has a line when it ends. Lines are lost, and counted, rather than flows delayed.");

        let traces: Option<Traces> =
            r.section("traces", "Spans of flows, for a collector of OpenTelemetry. Without it: none.");

        check_together(r, &listeners, &captures);
        check_access_logs(r, &access_logs);
        check_peers(r, &listeners, &policies);
        let (mut ebpf, mut redirects) = (Vec::new(), Vec::new());
        for capture in captures {
            match capture.value {
                AnyCapture::Ebpf(capture) => ebpf.push(capture),
                AnyCapture::Redirect { name, listen, identity } => {
                    let listen = listen.into_iter().map(|at| at.value).collect();
                    redirects.push(Redirect { name, listen, identity });
                }
            }
        }
        let routes = resolve(r, routes);
        let mut upstreams = via::resolve(r, upstreams, &listeners);
        let identities = Identities::new(r, identities);
        for at in &mut listeners {
            at.value.identity = identities.resolve(&at.value.identity);
            if at.value.tls && identities.lacks(&at.value.identity) {
                r.wrong_at(at, "needs an identity: there are several, name one of them");
            }
        }
        for upstream in upstreams.iter_mut().flatten() {
            upstream.identity = identities.resolve(&upstream.identity);
            let needs = upstream.tls && upstream.in_process.as_ref().is_none_or(|own| own.check.is_some());
            if needs && identities.lacks(&upstream.identity) {
                let what =
                    format!("\"{}\" needs an identity: there are several, name one of them", upstream.name);
                r.wrong("upstream", what);
            }
        }
        let listeners = listeners.into_iter().map(|l| l.value).collect();
        let policies = policies.into_iter().map(|p| p.value).collect();
        let access_logs = access_logs.into_iter().map(|log| log.value).collect();
        Some(Self {
            daemon,
            admin,
            identities: identities.0,
            captures: ebpf,
            redirects,
            listeners,
            routes: routes?,
            upstreams: upstreams?,
            policies,
            effective: Arc::default(),
            access_logs,
            traces: if r.has("traces") { Some(traces?) } else { None },
        })
    }
}

/// What no section can see by itself.
fn check_together(r: &Reader<'_>, listeners: &[At<Listener>], captures: &[At<AnyCapture>]) {
    if !r.has("capture") && !r.has("listener") && !r.for_exec() {
        r.wrong("", "there is nothing to do: neither [[capture]] nor [[listener]] is there");
    }
    for key in ["listener", "upstream"] {
        if r.has(key) && !r.all_say_or_have(key, "tls", false, "self") && !r.has("identity") {
            r.wrong(key, "needs a certificate: [identity] is missing");
        }
    }
    if r.for_exec() && !r.has("route") {
        r.wrong("", "has no [[route]]: every captured connection would be refused");
    }
    if r.has("listener") && !r.has("route") {
        r.wrong("listener", "has no [[route]]: every request would be refused");
    }
    if r.captures_for_exec()
        && let Some(first) = captures.first()
        && let AnyCapture::Redirect { .. } = first.value
    {
        r.wrong_at(
            first,
            "is \"redirect\", and rules know nothing of the command: `tunnel exec` captures by eBPF. Put another \
             [[capture]] first, or say --capture",
        );
    }
    let mut seen = BTreeMap::<SocketAddr, ()>::new();
    for at in listeners {
        if seen.insert(at.value.address, ()).is_some() {
            r.wrong_at(at, format!("another listener is at {} already", at.value.address));
        }
    }
    let mut groups = Vec::new();
    for capture in captures {
        let AnyCapture::Ebpf(Capture { cgroup, .. }) = &capture.value else { continue };
        // Paths are compared by their components: /app/ and /app are one group.
        if *cgroup != CgroupRef::Fresh && groups.contains(&cgroup) {
            r.wrong_at(capture, format!("another capture is of \"{}\" already", cgroup.name()));
        }
        groups.push(cgroup);
    }
    for capture in captures {
        let AnyCapture::Redirect { listen, .. } = &capture.value else { continue };
        for at in listen {
            if seen.insert(at.value, ()).is_some() {
                r.wrong_at(at, format!("another listener is at {} already", at.value));
            }
        }
    }
    for kind in ["upstream", "listener", "capture", "route"] {
        let mut seen = BTreeMap::<String, ()>::new();
        for name in r.texts_in(kind, &["name"]) {
            if seen.insert(name.value.clone(), ()).is_some() {
                r.wrong_at(&name, format!("another {kind} is named \"{}\" already", name.value));
            }
        }
    }
}

/// Access logs of routes that are not there.
fn check_access_logs(r: &Reader<'_>, logs: &[At<AccessLog>]) {
    let names = r.texts_in("route", &["name"]);
    for log in logs {
        for wanted in &log.value.routes {
            if !names.iter().any(|name| name.value == *wanted) {
                let near = nearest(wanted, names.iter().map(|name| name.value.as_str()));
                let hint = near.map(|near| format!(", did you mean \"{near}\"?")).unwrap_or_default();
                r.wrong_at(log, format!("no route is named \"{wanted}\"{hint}"));
            }
        }
    }
    if logs.len() > ACCESS_LOGS_MAX {
        r.wrong("access_log", format!("there are more than {ACCESS_LOGS_MAX}: each has a thread of its own"));
    }
}

/// Access logs of a process: each has a thread, and every flow is held against each.
const ACCESS_LOGS_MAX: usize = 8;

/// Policies that name peers, where nobody can prove to be one of them.
fn check_peers(r: &Reader<'_>, listeners: &[At<Listener>], policies: &[At<Policy>]) {
    if !r.all_say("listener", "tls", false) || listeners.is_empty() {
        return;
    }
    for at in policies.iter().filter(|at| at.value.identity != Peers::Any) {
        r.wrong_at(
            at,
            "names peers, and no listener has TLS, by which a client could prove to be one: only \"any\" would match",
        );
    }
}
