//! The life of a flow, the same for every source: admit, route, sniff, reach, relay or refuse, record.
//!
//! # Invariants
//! - A request is accepted when its target has been reached, and not before, but for a flow whose route depends on what its
//!   client sends; policy has allowed that one's target before a byte of it is read.
//! - Every flow is recorded once.

use std::{cell::RefCell, future::Future, rc::Rc, time::Instant};

use super::{
    EstablishedFlow, Permit, Proxy,
    client::Client,
    reach::{FlowRequest, Sink},
    refusal::Refusal,
};
use crate::{
    identity::standing::EndOfStanding,
    model::{
        admission::HeldHead,
        end::EndReason,
        flow::{ClientAddr, Head, Identity, Target},
    },
    observe::{
        marks::Marks,
        stats::{Destination, Record, Via},
    },
    process::books::Connected,
    relay::{Ahead, Early, EarlySource, Leg, Queue},
    routing::{flow::Flow, router::Decision, sniff::sniff},
    sinks::upstream::headers::received_trace,
    sources::{
        Answered, Event, FlowHandler, Incoming, Peer, PendingRequest, SourceHandle,
        listener::{accept::ServeError, request::Malformed},
    },
};

impl FlowHandler for Proxy {
    type Client = Client;

    fn captured(&self, source: &Rc<SourceHandle>, addr: ClientAddr) -> Client {
        Client::Application { source: Rc::clone(source), addr }
    }

    fn peer(&self, source: &Rc<SourceHandle>, peer: Peer) -> Result<(Client, Connected), ServeError> {
        let (books, connected) = self.connect(&peer)?;
        self.counters.tunnels_accepted.add(1);
        Ok((Client::new_peer(Rc::clone(source), peer, self.setup(), books), connected))
    }

    fn carry<P: PendingRequest>(
        self: Rc<Self>,
        client: Client,
        incoming: Incoming<P>,
    ) -> impl Future<Output = ()> + 'static {
        // Apart: the request, and what it takes to reach its target, are not held as long as the flow.
        let established = Box::pin(establish(Rc::clone(&self), client, incoming));
        async move {
            if let Some((mut leg, flow)) = established.await {
                self.relay(&mut leg, flow).await;
            }
        }
    }

    fn record(&self, event: Event<'_>) {
        self.event(&event);
    }
}

/// The client's leg, and its flow once the target has been reached. One that does not get so far is answered and recorded.
async fn establish<P: PendingRequest>(
    proxy: Rc<Proxy>,
    client: Client,
    incoming: Incoming<P>,
) -> Option<(P::Leg, Box<EstablishedFlow>)> {
    let started = Instant::now();
    let Incoming { target, head, request } = incoming;
    let permit = proxy.admit(&client);
    let (record, admitted) = match target {
        Ok(target) => (client.record(&target), permit.map(|permit| (permit, target))),
        Err(Malformed { authority, error }) => {
            let mut record = client.record(&Target::Name(String::new(), 0));
            record.destination = Destination::Unparsed(authority);
            (record, permit.and(Err(error.into())))
        }
    };
    let (permit, target) = match admitted {
        Ok(admitted) => admitted,
        Err(refusal) => {
            let record = proxy.refused(&refusal, record, client.identity(), started);
            // An application may try as often as it likes: at the limit it would take the place of records of flows.
            if !(client.is_application() && matches!(refusal, Refusal::Limit(_) | Refusal::SourceLimit(_))) {
                proxy.records.push(record);
            }
            request.refuse(&refusal).await;
            return None;
        }
    };
    let marks = Marks::default();
    let mut progress = Progress { record, started, permit, marks: &marks, end: client.end_of_flows() };
    let (context, name, identity) =
        (client.context(&proxy), client.source().name(), client.source().identity());
    let head = head.as_ref().map(|(version, headers)| Head { version: *version, headers });
    if let Some(tracer) = &context.setup().shared.tracer {
        let trace = tracer.begin(head.and_then(|head| received_trace(head.headers)));
        marks.trace.set(Some(trace));
        progress.record.trace = Some(Box::new(trace));
    }
    let admissions = RefCell::default();
    let source = (name.as_ref(), identity.as_ref());
    let wanted = client.request(&proxy, &context, source, &target, head, (&marks, &admissions));
    let wanted = match wanted {
        Ok(wanted) => wanted,
        Err(refusal) => return proxy.refuse(request, &refusal, client.identity(), progress).await,
    };
    match proxy.route(&wanted) {
        // Apart, so that other flows take no more room for it.
        Decision::NeedsSniff => Box::pin(proxy.sniff(request, wanted, progress)).await,
        decision => proxy.reach_and_accept(request, Queue::default(), wanted, decision, progress).await,
    }
}

/// A flow that has not been established yet.
struct Progress<'a> {
    record: Record,
    started: Instant,
    permit: Permit,
    marks: &'a Marks,
    /// When it is to end because its client's connection has lost its standing.
    end: Option<EndOfStanding>,
}

/// Bytes that are kept of a request for policies that come later.
fn size_of_head(head: &HeldHead) -> u64 {
    head.size() as u64
}

impl Proxy {
    /// Accepts a request whose route depends on what its client sends, and routes it again when that has come: a client sends
    /// nothing before it is accepted.
    async fn sniff<P: PendingRequest>(
        &self,
        request: P,
        wanted: FlowRequest<'_>,
        mut progress: Progress<'_>,
    ) -> Option<(P::Leg, Box<EstablishedFlow>)> {
        let Some((mut leg, mut early)) = request.accept().await else { return self.left(progress) };
        let mut stop = self.stop.clone();
        let sniffed = tokio::select! {
            biased;
            sniffed = sniff(&mut leg, &mut early, wanted.setup.shared.sniff_timeout) => Some(sniffed),
            () = stop.stopping() => None,
        };
        let found = match sniffed {
            Some(Ok(found)) => found,
            Some(Err(_)) => return self.left(progress),
            None => {
                leg.abort();
                progress.record.ended(EndReason::DrainTimeout, None);
                self.book(None, progress.record, progress.started);
                return None;
            }
        };
        tracing::debug!(target = %wanted.flow.target, ?found, "sniffed");
        progress.record.host = found.sni().or(found.host()).map(|name| name.as_str().into());
        let wanted = FlowRequest { flow: Flow { sniffed: Some(&found), ..wanted.flow }, ..wanted };
        let decision = self.route(&wanted);
        self.reach_and_accept(Answered(leg), early, wanted, decision, progress).await
    }

    /// Reaches the target, and answers. `early`: what the client has sent already.
    async fn reach_and_accept<P: PendingRequest>(
        &self,
        mut request: P,
        early: Queue,
        wanted: FlowRequest<'_>,
        decision: Decision<'_>,
        mut progress: Progress<'_>,
    ) -> Option<(P::Leg, Box<EstablishedFlow>)> {
        let record = &mut progress.record;
        let reached = if let Some(client) = request.early_data() {
            self.reach_ahead(client, early, &wanted, decision, record).await
        } else {
            let reached = tokio::select! {
                reached = self.reach(&wanted, decision, record, None) => Some(reached),
                () = request.left() => None,
            };
            reached.map(|reached| Ok((reached?, Early { sent: early, ..Early::default() })))
        };
        // Policies may have changed since they were asked.
        let denied = || {
            let changed = !std::ptr::eq(wanted.setup, &*self.setup());
            changed.then(|| self.denies(&self.setup(), &wanted.admissions.borrow())).flatten()
        };
        let reached = match reached {
            Some(Ok(reached)) => Some(denied().map_or(Ok(reached), Err)),
            other => other,
        };
        if matches!(reached, Some(Ok(_))) {
            wanted.marks.reached.set(Some(Instant::now()));
        }
        match reached {
            Some(Ok((sink, mut early))) => match request.accept().await {
                Some((leg, behind)) => {
                    // Nothing went ahead of a request that has something behind it.
                    if !behind.is_empty() {
                        early.sent = behind;
                    }
                    let Progress { mut record, started, mut permit, marks, end } = progress;
                    let mut sink = sink;
                    let ends = end.into_iter().chain(sink.end_of_flow()).collect();
                    self.trace(&mut record, started, marks, None);
                    self.counters.flows_opened.add(1);
                    self.counters.durations.connect.observe(started.elapsed());
                    if matches!(record.via, Via::Direct(_)) {
                        self.counters.flows_dialled.add(1);
                    }
                    self.count_for_istio(|istio| istio.opened(&record));
                    let admissions: Box<[_]> = wanted.admissions.take().into();
                    permit
                        .flowing
                        .keep(admissions.iter().filter_map(|a| a.head.as_ref()).map(size_of_head).sum());
                    let live = self.flows.open(record, started, admissions);
                    // And while it was answered.
                    if !std::ptr::eq(wanted.setup, &*self.setup())
                        && let Some(cause) = self.ends(&self.setup(), &live)
                    {
                        live.end_because(EndReason::PolicyChanged, Some(cause));
                    }
                    // The logs in force, as at its end: those that it began with may be closed.
                    self.setup().shared.access_logs.started(&live);
                    Some((leg, Box::new(EstablishedFlow { sink, early, live, ends, permit })))
                }
                None => self.left(progress),
            },
            Some(Err(refusal)) => self.refuse(request, &refusal, wanted.flow.identity, progress).await,
            None => self.left(progress),
        }
    }

    /// Reaches the target, while what the client sends may go ahead. `None` when the client leaves first.
    async fn reach_ahead(
        &self,
        client: &mut dyn EarlySource,
        early: Queue,
        wanted: &FlowRequest<'_>,
        decision: Decision<'_>,
        record: &mut Record,
    ) -> Option<Result<(Sink, Early), Refusal>> {
        let ahead = Ahead::new(client, early);
        tokio::select! {
            biased;
            reached = self.reach(wanted, decision, record, Some(&ahead)) => {
                Some(reached.map(|sink| (sink, ahead.into_early())))
            }
            _ = ahead.left() => None,
        }
    }

    /// Refuses a request, and records that.
    async fn refuse<P: PendingRequest, T>(
        &self,
        request: P,
        refusal: &Refusal,
        identity: Option<&Identity>,
        progress: Progress<'_>,
    ) -> Option<T> {
        let Progress { mut record, started, permit, marks, .. } = progress;
        drop(permit);
        record.ended(refusal.reason(), Some(refusal.to_string()));
        self.trace(&mut record, started, marks, Some(refusal.reason()));
        self.records.push(self.refused(refusal, record, identity, started));
        request.refuse(refusal).await;
        None
    }

    /// Records a flow whose client did not wait for its answer.
    fn left<T>(&self, progress: Progress<'_>) -> Option<T> {
        let Progress { mut record, started, marks, .. } = progress;
        record.ended(EndReason::ClientLeft, None);
        self.trace(&mut record, started, marks, Some(EndReason::ClientLeft));
        self.book(None, record, started);
        None
    }
}
