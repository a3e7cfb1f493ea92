//! The metrics that Istio's dashboards expect, with the labels that ztunnel gives them.
//!
//! # Invariants
//! - What is not known is "unknown"; there are no labels of a control plane here.
//! - Bytes are named as Istio names them, from the target's side: sent are those of its answers (istio/istio#32399).

use std::fmt;

use super::{Out, table as m};
use crate::{
    model::flow::SourceKind,
    observe::istio::{Counts, Flag, Istio, Key},
};

/// How many labels every series has.
const LABELS: usize = m::ISTIO_OPENED.labels.len();
const UNKNOWN: &str = "unknown";

/// What stands in the labels of a key.
struct Labels<'k> {
    key: &'k Key,
    /// Who we are, where there is one answer.
    own: &'k str,
}

/// The namespace in a SPIFFE ID of the form that Istio uses: `spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
fn namespace(principal: &str) -> &str {
    let mut parts = principal.strip_prefix("spiffe://").unwrap_or_default().split('/').skip(1);
    match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("ns"), Some(namespace), Some("sa"), Some(_), None) => namespace,
        _ => UNKNOWN,
    }
}

impl<'k> Labels<'k> {
    fn with(&self, flag: Flag) -> [&'k str; LABELS] {
        let peer = self.key.peer.as_deref().unwrap_or(UNKNOWN);
        let (reporter, source, destination) = match self.key.reporter {
            SourceKind::Capture => ("source", self.own, peer),
            SourceKind::Listener => ("destination", peer, self.own),
        };
        let service = self.key.service.as_deref().unwrap_or(UNKNOWN);
        let proven = self.key.peer.is_some() && !self.key.is_other();
        let security = if proven { "mutual_tls" } else { UNKNOWN };
        m::ISTIO_OPENED.labels.iter().map(|label| match *label {
            "reporter" => reporter,
            "source_principal" => source,
            "source_workload_namespace" => namespace(source),
            "destination_principal" => destination,
            "destination_workload_namespace" => namespace(destination),
            "destination_service" | "destination_service_name" => service,
            "request_protocol" => "tcp",
            "response_flags" => flag.word(),
            "connection_security_policy" => security,
            _ => UNKNOWN,
        })
        .collect::<Vec<_>>()
        .try_into()
        // It has as many as it is made of.
        .unwrap_or([UNKNOWN; LABELS])
    }
}

/// Writes them.
pub(super) fn write(out: &mut Out<'_>, istio: &Istio, own: Option<&str>) -> fmt::Result {
    let own = own.unwrap_or(UNKNOWN);
    let all: Vec<_> = istio.all().into_iter().map(|(key, counts)| (Labels { key, own }, counts)).collect();
    let plain = |of: fn(&Counts) -> u64| all.iter().map(move |(l, counts)| (l.with(Flag::None), of(counts)));
    let flagged = |of: fn(&Counts) -> [u64; Flag::ALL.len()]| {
        all.iter().flat_map(move |(labels, counts)| {
            let counted = Flag::ALL.into_iter().zip(of(counts)).filter(|(_, n)| *n > 0);
            counted.map(move |(flag, n)| (labels.with(flag), n))
        })
    };
    out.counter(&m::ISTIO_OPENED, plain(|c| c.opened))?;
    out.counter(&m::ISTIO_CLOSED, flagged(|c| c.closed))?;
    out.counter(&m::ISTIO_FAILED, flagged(|c| c.failed))?;
    out.counter(&m::ISTIO_SENT, plain(|c| c.answered))?;
    out.counter(&m::ISTIO_RECEIVED, plain(|c| c.requested))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sides_of_a_series_depend_on_who_reports() {
        let key = Key {
            reporter: SourceKind::Listener,
            peer: Some("spiffe://example.org/ns/shop/sa/web".into()),
            service: None,
        };
        let labels = Labels { key: &key, own: "spiffe://example.org/gateway" }.with(Flag::Deny);
        let of = |name: &str| {
            labels[m::ISTIO_OPENED
                .labels
                .iter()
                .position(|label| *label == name)
                .unwrap_or_else(|| panic!("{name}"))]
        };
        assert_eq!((of("reporter"), of("source_workload_namespace")), ("destination", "shop"));
        assert_eq!(of("destination_principal"), "spiffe://example.org/gateway");
        assert_eq!((of("destination_workload_namespace"), of("destination_service")), (UNKNOWN, UNKNOWN));
        assert_eq!((of("response_flags"), of("connection_security_policy")), ("DENY", "mutual_tls"));
    }

    /// What stands for many may be of peers that have proved nothing.
    #[test]
    fn what_is_counted_together_is_said_to_have_no_security() {
        let key =
            Key { reporter: SourceKind::Listener, peer: Some("other".into()), service: Some("other".into()) };
        let labels = Labels { key: &key, own: UNKNOWN }.with(Flag::None);
        assert!(labels.contains(&"other") && !labels.contains(&"mutual_tls"), "{labels:?}");
    }
}
