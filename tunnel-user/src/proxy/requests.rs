//! What comes through our listeners: connections of peers, and the requests on them.
//!
//! Enters: accepted TCP connections. Leaves: flows that have ended, booked. Invariant: one way through policy,
//! router, dial and limits, whatever the request was written in; a 200 is sent when the target has answered,
//! and not before, but for a flow whose route depends on what its client sends. It never reads a byte of a flow.

use std::{cell::RefCell, future::Future, net::SocketAddr, rc::Rc, sync::Arc, time::Instant};

use http::Request;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{Account, At, Going, Place, Proxy, Setup, back_off, reach::Wish};
use crate::{
    model::{
        end::EndReason,
        flow::{ClientAddr, Head, Identity, PeerAddr, Source, Target},
    },
    observe::stats::{Destination, Record},
    process::drain::Tasks,
    relay::{Ahead, Early, H2Leg, IntoLeg, Queue, Waiting},
    routing::{flow::Flow, index::PeerSet, policy, router::Decision},
    sources::listener::{
        accept::{self, Accepted, Link, ServeError, Settings},
        h1, h2 as h2_listener,
        handshakes::{self, Handshakes},
        request::{self, Refusal},
    },
    transport::io::Wire,
};

/// Tunnel connections of one listener and worker; more wait in the backlog. One of HTTP/2 carries many flows;
/// one of HTTP/1 is a flow, and counts as one, as soon as it is carried.
const TUNNELS_MAX: usize = 4096;

/// Accepts until it is told to stop. What waits then is the next daemon's, or its client tries again.
pub(super) async fn accept_tunnels(
    proxy: Rc<Proxy>,
    socket: TcpListener,
    settings: Arc<Settings>,
    at: Rc<At>,
    flows: Rc<Tasks>,
) {
    let mut watch = at.watch.clone();
    let handshakes = Handshakes::default();
    let tunnels = Arc::new(Semaphore::new(TUNNELS_MAX));
    loop {
        if tunnels.available_permits() == 0 && proxy.lines.full.admit() {
            tracing::warn!(
                "the limit of {TUNNELS_MAX} tunnel connections is reached: more wait in the backlog"
            );
        }
        // It is never closed.
        let Ok(tunnel) = Arc::clone(&tunnels).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = watch.draining() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (proxy, settings, at) = (Rc::clone(&proxy), Arc::clone(&settings), Rc::clone(&at));
                let place = handshakes.place();
                flows.spawn(async move {
                    proxy.serve(&settings, stream, peer, at, place, tunnel).await;
                });
            }
            Err(e) => back_off(&e).await,
        }
    }
}

/// What is known of every request on one connection.
struct Requester {
    at: Rc<At>,
    client: ClientAddr,
    identity: Option<Identity>,
    server_name: Option<Box<str>>,
    known: RefCell<Rc<Known>>,
}

/// What one configuration says of a peer: found out once, for all its requests.
struct Known {
    setup: Rc<Setup>,
    routes: PeerSet,
    policies: policy::Peer,
}

impl Known {
    fn new(setup: Rc<Setup>, identity: Option<&Identity>) -> Rc<Self> {
        let routes = setup.shared.router.peer(identity);
        let policies = setup.shared.policies.peer(identity.cloned());
        Rc::new(Self { setup, routes, policies })
    }
}

impl Proxy {
    /// Serves one connection of a peer. `tunnel` is its place among them.
    pub(super) async fn serve(
        self: &Rc<Self>,
        settings: &Settings,
        stream: TcpStream,
        peer: SocketAddr,
        at: Rc<At>,
        mut place: handshakes::Place,
        tunnel: OwnedSemaphorePermit,
    ) {
        let shaken = tokio::select! {
            shaken = accept::handshake(settings, stream, peer) => shaken,
            () = place.needed() => Err(ServeError::Crowded),
        };
        let Accepted { client, identity, server_name, link } = match shaken {
            Ok(accepted) => accepted,
            Err(e) => {
                self.counters.handshakes_failed.add(1);
                if self.lines.handshakes.admit() {
                    tracing::warn!(peer = %PeerAddr(peer), "not let in: {e}");
                }
                return;
            }
        };
        drop(place);
        self.counters.tunnels_accepted.add(1);
        let from = Rc::new(Requester {
            at,
            client,
            server_name,
            known: RefCell::new(Known::new(self.setup(), identity.as_ref())),
            identity,
        });
        match link {
            Link::H2(link) => self.serve_h2(settings, *link, from).await,
            Link::H2Plain(link) => self.serve_h2(settings, *link, from).await,
            Link::H1(link) => self.serve_h1(*link, &from, tunnel).await,
            Link::H1Plain(link) => self.serve_h1(*link, &from, tunnel).await,
        }
    }

    async fn serve_h2<W: Wire>(
        self: &Rc<Self>,
        settings: &Settings,
        tunnel: h2_listener::Tunnel<W>,
        from: Rc<Requester>,
    ) {
        let handle = |incoming| carry_stream(Rc::clone(self), incoming, Rc::clone(&from));
        if let Err(e) = h2_listener::serve(settings, tunnel, from.at.watch.clone(), handle).await {
            tracing::debug!(peer = %PeerAddr(from.client.0), "tunnel ended: {e}");
        }
    }

    /// One request, and the flow that comes of it. From then on it is the limit of flows that bounds it.
    async fn serve_h1<W: IntoLeg>(
        self: &Rc<Self>,
        incoming: h1::Incoming<W>,
        from: &Requester,
        tunnel: OwnedSemaphorePermit,
    ) {
        let started = Instant::now();
        let h1::Incoming { asked, pending } = incoming;
        let h1::Asked { authority, target, version, headers } = asked;
        let admitted = self.admit(Some(&from.account())).and_then(|place| Ok((place, target?)));
        let (place, target) = match admitted {
            Ok(admitted) => admitted,
            Err(refusal) => {
                self.refused(&refusal, from.unknown(&authority), from.who(), started);
                return pending.refuse(&refusal).await;
            }
        };
        let mut record = from.record(&target);
        let head = Head { version, headers: &headers };
        let reached = {
            let (known, name) = (from.known(self), from.at.name());
            match self.allow(from, &known, name.as_deref(), &target, head) {
                Ok((wish, Decision::Look)) => {
                    match pending.accept().await {
                        Some((mut leg, early)) => {
                            drop(tunnel);
                            let looked = self.look_and_reach(&mut leg, early, wish, record, started);
                            if let Some(going) = Box::pin(looked).await {
                                self.relay(&mut leg, going).await;
                            }
                        }
                        None => self.left(record, started),
                    }
                    return drop(place);
                }
                Ok((wish, decision)) => {
                    let reached = Box::pin(self.reach(&wish, decision, &mut record, None));
                    tokio::select! {
                        reached = reached => Some(reached),
                        _ = pending.wire().failed() => None,
                    }
                }
                Err(refusal) => Some(Err(refusal)),
            }
        };
        match reached {
            Some(Ok(sink)) => match pending.accept().await {
                Some((mut leg, early)) => {
                    drop(tunnel);
                    let early = Early { sent: early, ..Early::default() };
                    self.relay(&mut leg, Box::new(Going { sink, early, record, started })).await;
                }
                None => self.left(record, started),
            },
            Some(Err(refusal)) => {
                drop(place);
                self.refused(&refusal, record, from.who(), started);
                return pending.refuse(&refusal).await;
            }
            None => self.left(record, started),
        }
        drop(place);
    }

    /// Policy, then the router.
    fn allow<'a>(
        &self,
        from: &'a Requester,
        known: &'a Known,
        name: Option<&'a str>,
        target: &'a Target,
        head: Head<'a>,
    ) -> Result<(Wish<'a>, Decision<'a>), Refusal> {
        let Known { setup, routes, policies } = known;
        let permit = setup.shared.policies.check_target(policies, target);
        let permit = permit.map_err(|denied| Refusal::Denied(denied.to_string()))?;
        let flow = Flow {
            source: Source::Listener,
            name,
            target,
            client: from.client,
            identity: from.who(),
            peer: routes,
            server_name: from.server_name.as_deref(),
            request: Some(head),
            inside: None,
        };
        let wish = Wish { setup, flow, permit: Some(permit), dial_timeout: from.at.dial_timeout };
        Ok((wish, self.route(&wish)))
    }
}

impl Requester {
    /// What the configuration that is in force now says of it.
    fn known(&self, proxy: &Proxy) -> Rc<Known> {
        if !Rc::ptr_eq(&self.known.borrow().setup, &*proxy.setup.borrow()) {
            self.known.replace(Known::new(proxy.setup(), self.identity.as_ref()));
        }
        Rc::clone(&self.known.borrow())
    }

    fn who(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Whose flows are counted together: an identity's, or where there is none, an address's.
    fn account(&self) -> Account {
        self.identity.clone().map_or(Account::At(self.client.0.ip().to_canonical()), Account::Known)
    }

    fn record(&self, target: &Target) -> Record {
        let mut record = Record::new(target, self.client);
        record.identity = self.identity.clone();
        record
    }

    /// Of a request that asks for no target.
    fn unknown(&self, asked: &str) -> Record {
        let mut record = Record::new(&Target::Name(String::new(), 0), self.client);
        record.destination = Destination::Asked(asked.into());
        record
    }
}

/// listener → dial or tunnel, over HTTP/2.
fn carry_stream(
    proxy: Rc<Proxy>,
    incoming: h2_listener::Incoming,
    from: Rc<Requester>,
) -> impl Future<Output = ()> {
    // Apart: the request, and what it takes to reach its target, are not held as long as the flow.
    let reached = Box::pin(reach_requested(Rc::clone(&proxy), incoming, from));
    async move {
        if let Some((mut leg, going, place)) = reached.await {
            proxy.relay(&mut leg, going).await;
            drop(place);
        }
    }
}

/// The stream after its 200, and what the flow goes on with. One that does not go on is answered and booked.
async fn reach_requested(
    proxy: Rc<Proxy>,
    incoming: h2_listener::Incoming,
    from: Rc<Requester>,
) -> Option<(H2Leg, Box<Going>, Place)> {
    let started = Instant::now();
    let h2_listener::Incoming { request, respond, share } = incoming;
    let (request, body) = request.into_parts();
    let request = Request::from_parts(request, ());
    let mut waiting = Waiting::new(body, respond, share);
    let asked = || request.uri().authority().map(http::uri::Authority::as_str).unwrap_or_default();
    let place = match proxy.admit(Some(&from.account())) {
        Ok(place) => place,
        Err(refusal) => {
            proxy.refused(&refusal, from.unknown(asked()), from.who(), started);
            waiting.refuse(refusal.response()).await;
            return None;
        }
    };
    let target = match request::target(&request) {
        Ok(target) => target,
        Err(refusal) => {
            drop(place);
            proxy.refused(&refusal, from.unknown(asked()), from.who(), started);
            waiting.refuse(refusal.response()).await;
            return None;
        }
    };
    let mut record = from.record(&target);
    let head = Head { version: request.version(), headers: request.headers() };
    let reached = {
        let (known, name) = (from.known(&proxy), from.at.name());
        match proxy.allow(&from, &known, name.as_deref(), &target, head) {
            // The one 200 that comes before the target has answered: a client sends nothing before it.
            Ok((wish, Decision::Look)) => {
                let Ok(mut leg) = waiting.accept() else {
                    proxy.left(record, started);
                    return None;
                };
                let looked = proxy.look_and_reach(&mut leg, Queue::default(), wish, record, started);
                let going = Box::pin(looked).await?;
                return Some((leg, going, place));
            }
            Ok((wish, decision)) => {
                let ahead = Ahead::new(&mut waiting, Queue::default());
                tokio::select! {
                    biased;
                    reached = proxy.reach(&wish, decision, &mut record, Some(&ahead)) => {
                        Some(reached.map(|sink| (sink, ahead.into_early())))
                    }
                    _ = ahead.left() => None,
                }
            }
            Err(refusal) => Some(Err(refusal)),
        }
    };
    match reached {
        Some(Ok((sink, early))) => match waiting.accept() {
            Ok(leg) => return Some((leg, Box::new(Going { sink, early, record, started }), place)),
            Err(e) => {
                record.ended(EndReason::ClientLeft, Some(e.to_string()));
                proxy.book(record, started);
            }
        },
        Some(Err(refusal)) => {
            drop(place);
            proxy.refused(&refusal, record, from.who(), started);
            waiting.refuse(refusal.response()).await;
        }
        None => proxy.left(record, started),
    }
    None
}
