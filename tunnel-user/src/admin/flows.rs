//! `/flows`: the live flows, streamed.
//!
//! # Invariants
//! - A worker is asked for [`PAGE`] flows at a time, and again only when its client has read the ones before: neither a worker
//!   nor this process is held up, or filled, by a list of any length.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use bytes::Bytes;
use http::Response;
use http_body_util::{
    BodyExt as _,
    channel::{Channel, Sender},
};
use serde::{Deserialize, Serialize};

use super::{
    api::fixed_headers,
    server::{Body, Context},
};
use crate::{
    model::end::EndReason,
    observe::{
        flows::{FlowId, Snapshot},
        stats::{Record, Via},
    },
};

/// Flows that one worker copies at a time: about 100 µs of its time.
const PAGE: usize = 256;
/// Pages that wait for the client to read them.
const PAGES_AHEAD: usize = 2;
/// Flows of one answer where the request does not say. More than a daemon carries by default.
const LIMIT: usize = 100_000;

/// One live flow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowView {
    /// By which it is killed.
    pub id: String,
    /// Where it wanted to go.
    pub destination: String,
    /// Whose it is: an application's address, or a peer's.
    pub client: String,
    /// Who that has proved to be.
    pub client_identity: Option<String>,
    /// The capture, or the listener, that it came by.
    pub source: Option<String>,
    /// Which route took it, from 0.
    pub route: Option<usize>,
    /// What the configuration calls that route.
    pub route_name: Option<String>,
    /// Its upstream; none where it was dialled from here.
    pub upstream: Option<String>,
    /// The upstream's endpoint.
    pub endpoint: Option<String>,
    /// The stream's number on its connection.
    pub stream: Option<u64>,
    /// Who its peer has proved to be: the far end's, or the client's.
    pub identity: Option<String>,
    /// By what its bytes are moved.
    pub path: String,
    /// Bytes from the client.
    pub sent: u64,
    /// Bytes from the target.
    pub received: u64,
    /// Since it arrived, in milliseconds.
    pub age_ms: f64,
}

impl From<Snapshot> for FlowView {
    fn from(Snapshot { id, path, record }: Snapshot) -> Self {
        let Record {
            destination,
            client,
            client_identity,
            source,
            route,
            route_name,
            via,
            identity,
            sent,
            received,
            duration_ms,
            ..
        } = record;
        let (upstream, endpoint, stream) = match via {
            Via::Tunnel { upstream, peer, stream } => {
                (Some(upstream.to_string()), Some(peer.to_string()), stream)
            }
            Via::Direct(_) | Via::Nowhere => (None, None, None),
        };
        Self {
            id: id.to_string(),
            destination: destination.to_string(),
            client: client.to_string(),
            client_identity: client_identity.map(|i| i.to_string()),
            source: source.map(|s| s.to_string()),
            route,
            route_name: route_name.map(|n| n.to_string()),
            upstream,
            endpoint,
            stream,
            identity: identity.map(|i| i.to_string()),
            path: path.word().to_owned(),
            sent,
            received,
            age_ms: duration_ms,
        }
    }
}

/// Which flows are wanted.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    limit: Option<usize>,
    min_age: Duration,
    min_bytes: u64,
    /// What fields have to hold.
    texts: Vec<(Field, String)>,
}

#[derive(Clone, Copy, Debug)]
enum Field {
    Destination,
    Client,
    Source,
    Upstream,
    Endpoint,
    Identity,
    Path,
    Route,
}

impl Wanted {
    pub(super) fn new(pairs: impl Iterator<Item = (String, String)>) -> Result<Self, String> {
        let mut wanted = Self::default();
        for (name, value) in pairs {
            let number = || value.parse::<u64>().map_err(|_| format!("{name}: \"{value}\" is no number"));
            let field = match name.as_str() {
                "limit" => {
                    wanted.limit = Some(usize::try_from(number()?).unwrap_or(usize::MAX));
                    continue;
                }
                "min_age" => {
                    wanted.min_age = crate::config::parse_duration(&value)
                        .map_err(|e| format!("{name}: \"{value}\" {e}"))?;
                    continue;
                }
                "min_bytes" => {
                    wanted.min_bytes = number()?;
                    continue;
                }
                "destination" => Field::Destination,
                "client" => Field::Client,
                "source" => Field::Source,
                "upstream" => Field::Upstream,
                "endpoint" => Field::Endpoint,
                "identity" => Field::Identity,
                "path" => Field::Path,
                "route" => Field::Route,
                _ => {
                    return Err(format!(
                        "there is no parameter {name}: destination, client, source, upstream, endpoint, identity, path, route, \
                         min_age, min_bytes and limit are known"
                    ));
                }
            };
            wanted.texts.push((field, value));
        }
        Ok(wanted)
    }

    fn takes(&self, flow: &FlowView) -> bool {
        let is = |field: &Option<String>, wanted: &str| field.as_deref() == Some(wanted);
        let holds = |(field, text): &(Field, String)| match field {
            // Part of it is enough: a port, a network.
            Field::Destination => flow.destination.contains(text.as_str()),
            Field::Client => flow.client.contains(text.as_str()) || of_address(&flow.client, text),
            Field::Identity => flow.identity.as_deref().is_some_and(|i| i.contains(text.as_str())),
            Field::Source => is(&flow.source, text),
            Field::Upstream if text == "direct" => flow.upstream.is_none(),
            Field::Upstream => is(&flow.upstream, text),
            Field::Endpoint => is(&flow.endpoint, text),
            Field::Path => flow.path == *text,
            Field::Route => flow.route.is_some_and(|route| route.to_string() == *text),
        };
        flow.age_ms >= self.min_age.as_secs_f64() * 1e3
            && flow.sent + flow.received >= self.min_bytes
            && self.texts.iter().all(holds)
    }
}

fn of_address(client: &str, wanted: &str) -> bool {
    client.parse::<SocketAddr>().is_ok_and(|addr| addr.ip().to_canonical().to_string() == wanted)
}

/// The answer, which is filled while it is read.
pub(super) fn answer(context: &Rc<Context>, wanted: Wanted) -> Response<Body> {
    let (to, body) = Channel::new(PAGES_AHEAD);
    let filling = Rc::clone(context);
    context.spawn(async move {
        // An error says that the client has left.
        let _left = fill(&filling, &wanted, to).await;
    });
    let mut answer = Response::new(body.boxed_unsync());
    fixed_headers(&mut answer, "application/json");
    answer
}

async fn fill(
    context: &Context,
    wanted: &Wanted,
    mut to: Sender<Bytes>,
) -> Result<(), http_body_util::channel::SendError> {
    let mut left = wanted.limit.unwrap_or(LIMIT);
    let mut lead = "[\n";
    for worker in 0..context.sight.workers() {
        let mut from = Some(0);
        while let Some(place) = from.filter(|_| left > 0) {
            // A worker that has ended has no flows.
            let Some((page, next)) =
                context.sight.ask_one(worker, move |proxy| proxy.flows().page(place, PAGE)).await
            else {
                break;
            };
            from = next;
            let mut text = String::new();
            for flow in page.into_iter().map(FlowView::from).filter(|flow| wanted.takes(flow)).take(left) {
                left -= 1;
                // Texts and numbers can always be written.
                text += lead;
                text += &serde_json::to_string(&flow).unwrap_or_default();
                lead = ",\n";
            }
            if !text.is_empty() {
                to.send_data(text.into()).await?;
            }
        }
    }
    to.send_data(if lead == "[\n" { "[]\n" } else { "\n]\n" }.into()).await
}

/// Has a flow end; how many did.
pub(super) async fn kill(context: &Context, id: FlowId) -> usize {
    let ended =
        context.sight.ask(move |proxy| proxy.flows().end_where(EndReason::Killed, |flow| flow.id() == id));
    ended.await.into_iter().flatten().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(query: &str) -> Result<Wanted, String> {
        Wanted::new(super::super::api::Query(query).pairs())
    }

    #[test]
    fn flows_are_picked_by_all_that_is_asked_for() {
        let flow = FlowView {
            destination: "10.0.0.1:443".to_owned(),
            client: "127.0.0.1:5".to_owned(),
            upstream: Some("gw".to_owned()),
            route: Some(2),
            sent: 10,
            age_ms: 1500.0,
            ..FlowView::default()
        };
        for (query, takes) in [
            ("", true),
            ("destination=:443&upstream=gw", true),
            ("destination=:443&upstream=direct", false),
            ("client=127.0.0.1", true),
            ("route=2&min_age=1s&min_bytes=10", true),
            ("min_age=2s", false),
            ("identity=x", false),
        ] {
            assert_eq!(wanted(query).unwrap().takes(&flow), takes, "{query}");
        }
        for (query, why) in
            [("limit=x", "no number"), ("min_age=1", "min_age"), ("colour=red", "no parameter colour")]
        {
            let e = wanted(query).unwrap_err();
            assert!(e.contains(why), "{e}");
        }
    }
}
