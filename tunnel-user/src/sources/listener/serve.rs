//! The accept loop of a listener, and each of its connections from the handshake to its end.
//!
//! # Invariants
//! - A connection that does not complete its handshake brings no flow.
//! - At most [`CONNECTIONS_MAX`] connections of one listener are served by one worker; more wait in the backlog.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{
    accept::{self, Accepted, Link, ServeError, Settings},
    h1, h2,
    handshakes::{Handshakes, Place},
};
use crate::{
    model::flow::PeerAddr,
    process::drain::{Tasks, Watch},
    relay::IntoLeg,
    sources::{Event, FlowHandler, SourceHandle, back_off},
    transport::io::Wire,
};

/// Connections of one listener and worker. One of HTTP/2 carries many flows; one of HTTP/1 is a flow, and counts as one as
/// soon as that is accepted.
const CONNECTIONS_MAX: usize = 4096;

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
                let (settings, place) = (Arc::clone(&settings), handshakes.place());
                tasks.spawn(async move {
                    serve_connection(handler, &settings, stream, addr, source, place, permit).await;
                });
            }
            Err(e) => back_off(&e).await,
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
    let accepted = tokio::select! {
        accepted = accept::handshake(settings, stream, addr) => accepted,
        () = place.needed() => Err(ServeError::Crowded),
    };
    let Accepted { peer, link } = match accepted {
        Ok(accepted) => accepted,
        Err(error) => return handler.record(Event::PeerRejected { peer: PeerAddr(addr), error: &error }),
    };
    drop(place);
    let addr = PeerAddr(peer.client.0);
    let client = handler.peer(&source, peer);
    match link {
        Link::H2(link) => serve_h2(handler, settings, *link, source.watch(), addr, client).await,
        Link::H2Plain(link) => serve_h2(handler, settings, *link, source.watch(), addr, client).await,
        Link::H1(link) => serve_h1(handler, *link, client, permit).await,
        Link::H1Plain(link) => serve_h1(handler, *link, client, permit).await,
    }
}

async fn serve_h2<H: FlowHandler, W: Wire>(
    handler: Rc<H>,
    settings: &Settings,
    link: h2::Tunnel<W>,
    watch: Watch,
    addr: PeerAddr,
    client: H::Client,
) {
    let carry = |incoming| Rc::clone(&handler).carry(client.clone(), incoming);
    if let Err(e) = h2::serve(settings, link, watch, carry).await {
        tracing::debug!(peer = %addr, error = %e, "connection closed");
    }
}

/// One request, and the flow that comes of it.
async fn serve_h1<H: FlowHandler, W: IntoLeg + 'static>(
    handler: Rc<H>,
    mut link: h1::Incoming<W>,
    client: H::Client,
    permit: OwnedSemaphorePermit,
) {
    link.request.hold(permit);
    handler.carry(client, link).await;
}
