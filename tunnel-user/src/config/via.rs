//! `[[upstream]]` that names another section: the upstream that it goes through (`via`), or the listener that it
//! stands for (`self`).
//!
//! What they name is there, and who goes through whom ends at an upstream that has a socket.

use super::{
    InProcess, Listener, Upstream,
    reader::{At, Reader, Section, nearest},
};

/// An upstream whose other sections are still names.
pub(super) struct UpstreamByName {
    upstream: Upstream,
    via: Option<At<String>>,
    listener: Option<At<String>>,
}

impl Section for UpstreamByName {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let via = r.optional(
            "via",
            "Name of another upstream that its connections go through, each as one CONNECT stream, to any depth. An endpoint that is a name is resolved by that upstream.",
        );
        let listener = r.optional(
            "self",
            "Instead of endpoints: the upstream is this process. Name of the listener that handles its flows as if a peer with our certificate had sent them; policies and routes apply again, and no connection is made.",
        );
        let upstream = Upstream::read(r);
        if r.has("self") {
            for key in r.others(&["name", "self", "identity"]) {
                r.wrong(key, "has no meaning beside self: no connection is made");
            }
        }
        Some(Self { upstream: upstream?, via, listener })
    }
}

/// Checks the names, and copies what is used of listeners. What has mistakes of its own counts: its name is no mistake.
pub(super) fn resolve(
    r: &Reader<'_>,
    upstreams: Vec<UpstreamByName>,
    listeners: &[At<Listener>],
) -> Option<Vec<Upstream>> {
    let (names, listener_names) = (r.texts_in("upstream", &["name"]), r.texts_in("listener", &["name"]));
    let is_there = |kind: &str, all: &[At<String>], name: &At<String>| {
        let found = all.iter().any(|n| n.value == name.value);
        if !found {
            let near = nearest(&name.value, all.iter().map(|n| n.value.as_str()));
            let hint = near.map(|n| format!(", did you mean \"{n}\"?")).unwrap_or_default();
            r.wrong_at(name, format!("no {kind} is named \"{}\"{hint}", name.value));
        }
        found
    };
    let is_self = |name: &str| upstreams.iter().any(|u| u.listener.is_some() && *u.upstream.name == *name);
    for by_name in &upstreams {
        let Some(via) = &by_name.via else { continue };
        if is_self(&via.value) {
            r.wrong_at(
                via,
                format!("\"{}\" is this process itself: there is nothing to go through", via.value),
            );
        } else if let Some(circle) = circle(&upstreams, by_name) {
            r.wrong_at(via, format!("goes around in a circle: {circle}"));
        }
    }
    let resolved = upstreams.into_iter().map(|UpstreamByName { mut upstream, via, listener }| {
        if let Some(via) = via {
            upstream.via = is_there("upstream", &names, &via).then(|| via.value.into());
            upstream.via.as_ref()?;
        }
        if let Some(name) = listener {
            is_there("listener", &listener_names, &name).then_some(())?;
            let listener =
                listeners.iter().map(|at| &at.value).find(|l| l.name.as_ref() == Some(&name.value))?;
            upstream.in_process = Some(InProcess {
                listener: name.value,
                check: listener.check(),
                dial_timeout: listener.dial_timeout,
            });
        }
        Some(upstream)
    });
    let resolved: Vec<_> = resolved.collect();
    resolved.into_iter().collect()
}

/// `a via b via a`, where an upstream goes through itself; said once, of the first in the file.
fn circle(upstreams: &[UpstreamByName], from: &UpstreamByName) -> Option<String> {
    let place = |name: &str| upstreams.iter().position(|u| *u.upstream.name == *name);
    let first = place(&from.upstream.name)?;
    let mut way = from.upstream.name.to_string();
    let mut next = from.via.as_ref();
    for _ in upstreams {
        let at = place(&next?.value)?;
        way = format!("{way} via {}", upstreams[at].upstream.name);
        if at <= first {
            return (at == first).then_some(way);
        }
        next = upstreams[at].via.as_ref();
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::config::tests::{mistakes, parse, with};

    #[test]
    fn an_upstream_goes_through_another_that_is_there_and_never_in_a_circle() {
        let endpoint = "endpoints = [\"10.9.0.2:15008\"]";
        let c = parse(&with("via = \"east\"", endpoint)).unwrap();
        assert_eq!((c.upstreams[0].via.as_deref(), &c.upstreams[1].via), (Some("east"), &None));
        assert_eq!(
            mistakes(&with("via = \"est\"", endpoint)),
            ["16:7: upstream.via: no upstream is named \"est\", did you mean \"east\"?"]
        );
        assert_eq!(
            mistakes(&with("via = \"west\"", endpoint)),
            ["16:7: upstream.via: goes around in a circle: west via west"]
        );
        let circle =
            with("via = \"east\"", endpoint).replace("sni = \"gw.east\"", "sni = \"gw.east\"\nvia = \"far\"");
        let circle = format!(
            "{circle}\n[[upstream]]\nname = \"far\"\nvia = \"west\"\nendpoints = [\"a.example:1\"]\n"
        );
        assert_eq!(
            mistakes(&circle),
            ["16:7: upstream.via: goes around in a circle: west via east via far via west"]
        );
    }

    /// An agent and a gateway in one process.
    const ITSELF: &str = "[[capture]]\nunit = \"legacy.service\"\n[[listener]]\nname = \"gw\"\naddress = \"127.0.0.1:1\"\n\
        tls = false\ndial_timeout = \"3s\"\n[[route]]\nmatch = { source = [\"captured\"] }\nto = [{ upstream = \"here\" }]\n\
        [[route]]\nto = \"direct\"\n[[upstream]]\nname = \"here\"\nself = \"gw\"\n";

    #[test]
    fn an_upstream_that_is_this_process_names_a_listener_and_nothing_else() {
        let c = parse(ITSELF).unwrap();
        let in_process = c.upstreams[0].in_process.as_ref().unwrap();
        assert_eq!((in_process.listener.as_str(), in_process.dial_timeout), ("gw", Duration::from_secs(3)));
        assert!(in_process.check.is_none(), "nobody proves anything where there is no TLS");
        assert_eq!(
            mistakes(&ITSELF.replace("self = \"gw\"", "self = \"gv\"")),
            ["15:8: upstream.self: no listener is named \"gv\", did you mean \"gw\"?"]
        );
        let said = |line: &str, said: &str| {
            assert_eq!(mistakes(&format!("{ITSELF}{line}\n")), [format!("16:{said}")], "{line}");
        };
        for (line, column, key) in [
            ("endpoints = [\"10.9.0.1:1\"]", 13, "endpoints"),
            ("tls = false", 7, "tls"),
            ("protocol = \"h1\"", 12, "protocol"),
            ("response_timeout = \"3s\"", 20, "response_timeout"),
            ("optimistic_data = false", 19, "optimistic_data"),
        ] {
            said(
                line,
                &format!("{column}: upstream.{key}: has no meaning beside self: no connection is made"),
            );
        }
        let through =
            "[[upstream]]\nname = \"b\"\nvia = \"here\"\nendpoints = [\"a.example:1\"]\ntls = false";
        assert_eq!(
            mistakes(&format!("{ITSELF}{through}\n")),
            ["18:7: upstream.via: \"here\" is this process itself: there is nothing to go through"]
        );
        assert_eq!(
            mistakes(&ITSELF.replace("self = \"gw\"\n", "")),
            [
                "13:1: upstream.endpoints: is missing",
                "13:1: upstream: needs a certificate: [identity] is missing",
            ]
        );
    }
}
