//! The accept loop of a listener, and each of its connections from the handshake to its end.
//!
//! # Invariants
//! - A connection that does not complete its handshake brings no flow.
//! - At most [`CONNECTIONS_MAX`] connections of one listener are served by one worker; more wait in the backlog.

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Instant};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::yield_now,
};

use super::{
    accept::{self, Accepted, Link, ServeError, Settings},
    h1, h2,
    handshakes::{Handshakes, Place},
};
use crate::{
    identity::standing::Standing,
    model::flow::PeerAddr,
    process::{
        books::Connected,
        drain::{Tasks, Watch},
    },
    relay::IntoLeg,
    sources::{ACCEPTS_PER_TURN, Event, FlowHandler, SourceHandle, back_off},
    transport::io::Wire,
};

/// Connections of one listener and worker. One of HTTP/2 carries many flows; one of HTTP/1 is a flow, and counts as one as
/// soon as that is accepted.
pub(super) const CONNECTIONS_MAX: usize = 4096;

/// Accepts until the source is told to stop. What waits then is the next daemon's, or its client tries again.
pub async fn serve<H: FlowHandler>(
    handler: Rc<H>,
    socket: TcpListener,
    settings: Arc<Settings>,
    source: Rc<SourceHandle>,
    tasks: Rc<Tasks>,
) {
    let mut watch = source.watch();
    let handshakes = Handshakes::default();
    let mut accepts: u32 = 0;
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        if connections.available_permits() == 0 {
            handler.record(Event::ConnectionLimit(CONNECTIONS_MAX));
        }
        // It is never closed.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = watch.draining() => return,
        };
        match accepted {
            Ok((stream, addr)) => {
                let (handler, source) = (Rc::clone(&handler), Rc::clone(&source));
                let (settings, place) = (Arc::clone(&settings), handshakes.place(addr.ip()));
                tasks.spawn(async move {
                    serve_connection(handler, &settings, stream, addr, source, place, permit).await;
                });
            }
            Err(e) => back_off(&e).await,
        }
        accepts = accepts.wrapping_add(1);
        if accepts.is_multiple_of(ACCEPTS_PER_TURN) {
            yield_now().await;
        }
    }
}

/// Serves one connection to its end. `permit` is its place among them.
async fn serve_connection<H: FlowHandler>(
    handler: Rc<H>,
    settings: &Settings,
    stream: TcpStream,
    addr: SocketAddr,
    source: Rc<SourceHandle>,
    mut place: Place,
    permit: OwnedSemaphorePermit,
) {
    let started = Instant::now();
    let pace = place.pace();
    let accepted = tokio::select! {
        accepted = accept::handshake(settings, stream, addr, &pace) => accepted,
        () = place.needed() => Err(ServeError::Crowded),
    };
    let Accepted { peer, link } = match accepted {
        Ok(accepted) => accepted,
        Err(error) => return handler.record(Event::PeerRejected { peer: PeerAddr(addr), error: &error }),
    };
    drop(place);
    handler.record(Event::PeerAccepted { took: started.elapsed() });
    let (addr, standing) = (PeerAddr(peer.client.0), peer.standing.clone());
    let (client, connected) = match handler.peer(&source, peer) {
        Ok(client) => client,
        Err(error) => return handler.record(Event::PeerRejected { peer: addr, error: &error }),
    };
    let (watch, place) = (source.watch(), (addr, standing));
    match link {
        Link::H2(link) => serve_h2(handler, settings, *link, watch, place, client, &connected).await,
        Link::H2Plain(link) => serve_h2(handler, settings, *link, watch, place, client, &connected).await,
        Link::H1(link) => serve_h1(handler, *link, client, (permit, connected)).await,
        Link::H1Plain(link) => serve_h1(handler, *link, client, (permit, connected)).await,
    }
}

async fn serve_h2<H: FlowHandler, W: Wire>(
    handler: Rc<H>,
    settings: &Settings,
    link: h2::Tunnel<W>,
    watch: Watch,
    (addr, standing): (PeerAddr, Option<Rc<Standing>>),
    client: H::Client,
    connected: &Connected,
) {
    let carry = |incoming| Rc::clone(&handler).carry(client.clone(), incoming);
    match h2::serve(settings, link, connected.memory(), watch, standing, carry).await {
        Ok(()) => {}
        Err(error @ ServeError::Flood(_)) => handler.record(Event::Flooded { peer: addr, error: &error }),
        Err(e) => tracing::debug!(peer = %addr, error = %e, "connection closed"),
    }
}

/// One request, and the flow that comes of it.
async fn serve_h1<H: FlowHandler, W: IntoLeg + 'static>(
    handler: Rc<H>,
    mut link: h1::Incoming<W>,
    client: H::Client,
    places: (OwnedSemaphorePermit, Connected),
) {
    link.request.hold(places);
    handler.carry(client, link).await;
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        time::Duration,
    };

    use http::{Method, Request, Response};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        task::{LocalSet, spawn_local},
        time::timeout,
    };

    use super::*;
    use crate::{
        config::Protocol,
        model::flow::ClientAddr,
        process::{
            books::Books,
            drain::{self, Phase},
        },
        sources::{Answer, Incoming, Peer, PendingRequest},
    };

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Refuses every request, and notes what was asked for.
    #[derive(Default)]
    struct Refuser {
        targets: RefCell<Vec<String>>,
        rejected: Cell<usize>,
    }

    struct Forbidden;

    impl Answer for Forbidden {
        fn response(&self) -> Response<()> {
            let mut response = Response::new(());
            *response.status_mut() = http::StatusCode::FORBIDDEN;
            response
        }
    }

    impl FlowHandler for Refuser {
        type Client = ClientAddr;

        fn captured(&self, _source: &Rc<SourceHandle>, addr: ClientAddr) -> ClientAddr {
            addr
        }

        fn peer(
            &self,
            _source: &Rc<SourceHandle>,
            peer: Peer,
        ) -> Result<(ClientAddr, Connected), ServeError> {
            let connected = Rc::new(Books::default()).connect(1).expect("the first");
            Ok((peer.client, connected))
        }

        async fn carry<P: PendingRequest>(self: Rc<Self>, _client: ClientAddr, incoming: Incoming<P>) {
            let asked = incoming.target.map_or_else(|e| e.error.to_string(), |target| target.to_string());
            self.targets.borrow_mut().push(asked);
            incoming.request.refuse(&Forbidden).await;
        }

        fn record(&self, event: Event<'_>) {
            if let Event::PeerRejected { .. } = event {
                self.rejected.set(self.rejected.get() + 1);
            }
        }
    }

    async fn status_over_h2(addr: SocketAddr, target: &'static str) -> u16 {
        let stream = TcpStream::connect(addr).await.unwrap();
        let (requests, connection) = ::h2::client::handshake(stream).await.unwrap();
        let driving = spawn_local(connection);
        let mut requests = requests.ready().await.unwrap();
        let request = Request::builder().method(Method::CONNECT).uri(target).body(()).unwrap();
        let (response, _body) = requests.send_request(request, false).unwrap();
        let status = response.await.unwrap().status().as_u16();
        driving.abort();
        status
    }

    async fn said_over_h1(addr: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        said
    }

    #[test]
    fn a_handler_answers_a_request_the_same_way_whatever_protocol_it_came_by() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let test = async {
            let settings = Arc::new(Settings {
                proxy_protocol: false,
                tls: None,
                protocols: vec![Protocol::H2, Protocol::H1],
                congestion: Default::default(),
                alt_svc: None,
                handshake_timeout: PATIENCE,
                max_streams: 10,
                keepalive_interval: PATIENCE,
                keepalive_timeout: PATIENCE,
                idle_timeout: PATIENCE,
            });
            let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = socket.local_addr().unwrap();
            let (trigger, watch) = drain::channel();
            let source = Rc::new(SourceHandle::new(None, None, watch));
            let (handler, tasks) = (Rc::new(Refuser::default()), Rc::new(Tasks::default()));
            let serving =
                spawn_local(serve(Rc::clone(&handler), socket, settings, source, Rc::clone(&tasks)));
            assert_eq!(status_over_h2(addr, "a.example:1").await, 403);
            let said = said_over_h1(addr, "CONNECT b.example:2 HTTP/1.1\r\n\r\n").await;
            assert!(said.starts_with("HTTP/1.1 403 "), "{said}");
            assert!(said_over_h1(addr, "GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 403 "));
            // Nothing is asked for: that is no flow.
            assert_eq!(said_over_h1(addr, "CONNECT c.exam").await, "");
            trigger.enter(Phase::Drain);
            serving.await.unwrap();
            tasks.ended().await;
            assert_eq!(*handler.targets.borrow(), ["a.example:1", "b.example:2", "GET is not CONNECT"]);
            assert_eq!(handler.rejected.get(), 1);
        };
        LocalSet::new().block_on(&runtime, async { timeout(PATIENCE, test).await.expect("in time") });
    }
}
