//! The listening sockets of a daemon: for CONNECT requests, and for connections that rules redirect.
//!
//! # Invariants
//! - A socket that listens at a wanted address already, here or in a daemon that is replaced, is used: what waits in it is
//!   accepted.

use std::{io, net::SocketAddr, sync::Arc};

use socket2::{Domain, Socket, Type};

use super::{bootstrap::Process, identities::Identities};
use crate::{
    config::{self, Redirect},
    daemon::takeover::Listeners,
    kernel::own::OwnListeners,
    model::{
        mark::Mark,
        names::{IdentityName, SourceName},
    },
    process::exit::{Cause, Failure},
    sources::{
        capture::accept::Origins,
        listener::{accept, h3::Quic},
    },
    transport::{
        quic,
        tcp::{self, OnClose},
    },
    worker::{CaptureSocket, ConnectSocket, Listening, QuicSocket, Sockets, Source},
};

/// A listener for CONNECT requests that the workers serve.
#[derive(Clone)]
pub(super) struct ActiveListener {
    pub(super) wanted: config::Listener,
    /// Its address, with the port that it got.
    pub(super) bound: SocketAddr,
    sockets: Arc<Sockets>,
}

impl ActiveListener {
    /// What workers accept from.
    pub(super) fn source(&self) -> Source {
        source(self.wanted.source(), self.wanted.name.as_deref(), None, &self.sockets)
    }
}

/// Where rules redirect connections to.
#[derive(Clone)]
pub(super) struct ActiveRedirect {
    wanted: Redirect,
    sockets: Arc<Sockets>,
}

impl ActiveRedirect {
    /// What workers accept from.
    pub(super) fn source(&self) -> Source {
        let identity = self.wanted.identity.as_ref();
        source(self.wanted.source(), self.wanted.name.as_deref(), identity, &self.sockets)
    }
}

fn source(
    name: SourceName,
    called: Option<&str>,
    identity: Option<&IdentityName>,
    sockets: &Arc<Sockets>,
) -> Source {
    let (called, identity) = (called.map(Arc::from), identity.cloned());
    Source { name, netns: None, called, identity, sockets: Arc::clone(sockets) }
}

/// The listening sockets whose addresses are configured, by them.
pub(super) type Kept = Vec<(SocketAddr, Vec<Socket>)>;

/// Copies of sockets.
pub(super) fn copies(kept: &Kept) -> io::Result<Kept> {
    let copy = |(address, sockets): &(SocketAddr, Vec<Socket>)| {
        let copies: io::Result<Vec<_>> = sockets.iter().map(Socket::try_clone).collect();
        Ok((*address, copies?))
    };
    kept.iter().map(copy).collect()
}

/// Opens what listens for the workers of one daemon.
pub(super) struct Opener<'p> {
    process: &'p Process,
    /// Sockets that listen already.
    existing: Listeners,
    /// Copies of what is wanted, for a daemon that replaces this one, and for a configuration that says something else about
    /// them.
    kept: Kept,
    /// What has listened already gets these options, once nothing can fail any more: see [`set_inherited_options`].
    retuned: Vec<(SocketAddr, OnClose)>,
}

/// Gives sockets that listened for something else the options of what they listen for now.
pub(super) fn set_inherited_options(kept: &Kept, retuned: &[(SocketAddr, OnClose)]) {
    for (address, on_close) in retuned {
        let sockets = kept.iter().filter(|(kept, _)| kept == address).flat_map(|(_, sockets)| sockets);
        for socket in sockets {
            if let Err(error) = tcp::set_inherited_options(socket, *on_close) {
                tracing::error!(%address, %error, "failed to set socket options; its connections lack them");
            }
        }
    }
}

impl<'p> Opener<'p> {
    /// `existing` is what listens already.
    pub(super) fn new(process: &'p Process, existing: Listeners) -> Self {
        Self { process, existing, kept: Kept::new(), retuned: Vec::new() }
    }

    /// What is kept, and what of it gets other options.
    pub(super) fn finish(self) -> (Kept, Vec<(SocketAddr, OnClose)>) {
        (self.kept, self.retuned)
    }

    /// The sockets of one address: those that listen there already, and as many more as there are workers.
    fn open(&mut self, address: SocketAddr, on_close: OnClose) -> Result<Vec<Socket>, Failure> {
        let failed = |e: io::Error| cannot_listen(address, &e);
        let (workers, mark) = (self.process.workers, self.process.own.mark());
        let sockets = match self.existing.remove(&address) {
            None => tcp::listen(address, workers, mark, on_close).map_err(failed)?,
            Some(mut sockets) => {
                let missing = workers.saturating_sub(sockets.len());
                let bound = bound(&sockets, address);
                // They may have listened for something else, and do until all has gone well.
                self.retuned.push((address, on_close));
                sockets.extend(tcp::listen_beside(bound, missing, mark, on_close).map_err(failed)?);
                sockets
            }
        };
        let copies: io::Result<Vec<_>> = sockets.iter().map(Socket::try_clone).collect();
        self.kept.push((address, copies.map_err(failed)?));
        Ok(sockets)
    }

    /// Goes on with what listens at an address.
    pub(super) fn keep(&mut self, address: SocketAddr) {
        self.kept.extend(self.existing.remove_entry(&address));
    }

    /// Opens a listener for CONNECT requests.
    pub(super) fn listener(
        &mut self,
        wanted: &config::Listener,
        identities: &Identities,
    ) -> Result<ActiveListener, Failure> {
        let tls = |check| Ok::<_, Failure>(accept::Tls { store: identities.store(&wanted.identity)?, check });
        let settings = Arc::new(accept::Settings {
            proxy_protocol: wanted.proxy_protocol,
            tls: wanted.check().map(tls).transpose()?,
            protocols: wanted.over_tcp(),
            handshake_timeout: wanted.handshake_timeout,
            max_streams: wanted.max_streams.get(),
            keepalive_interval: wanted.keepalive_interval,
            keepalive_timeout: wanted.keepalive_timeout,
            congestion: wanted.congestion_control,
            idle_timeout: wanted.idle_timeout,
        });
        let (dial_timeout, workers) = (wanted.dial_timeout, self.process.workers);
        let (mut shares, mut at) = (self.shares(), wanted.address);
        if !settings.protocols.is_empty() {
            let opened = self.open(wanted.address, OnClose::Deliver)?;
            at = bound(&opened, at);
            for (i, socket) in opened.into_iter().enumerate() {
                let socket = ConnectSocket { socket, settings: Arc::clone(&settings), dial_timeout };
                shares[i % workers].push(Listening::Requests(socket));
            }
        }
        if wanted.has_h3() {
            let failed = |e: io::Error| cannot_listen_for_quic(at, &e);
            let opened = quic::bind(at, workers, self.process.own.mark()).map_err(failed)?;
            let group: io::Result<Arc<[Socket]>> = opened.iter().map(Socket::try_clone).collect();
            let group = group.map_err(failed)?;
            at = bound(&opened, at);
            for (worker, (share, socket)) in shares.iter_mut().zip(opened).enumerate() {
                let quic =
                    Quic { socket, worker, group: Arc::clone(&group), settings: Arc::clone(&settings) };
                share.push(Listening::Quic(QuicSocket { quic, dial_timeout }));
            }
        }
        let bound = at;
        Ok(ActiveListener { wanted: wanted.clone(), bound, sockets: Sockets::new(shares) })
    }

    /// Opens where rules redirect connections to.
    pub(super) fn redirects(&mut self, redirects: &[Redirect]) -> Result<Vec<ActiveRedirect>, Failure> {
        let addresses: Vec<SocketAddr> = redirects.iter().flat_map(|r| &r.listen).copied().collect();
        let own = Arc::new(OwnListeners::new(&addresses));
        let mut active = Vec::new();
        for wanted in redirects {
            let mut shares = self.shares();
            for address in &wanted.listen {
                for (i, socket) in self.open(*address, OnClose::Abort)?.into_iter().enumerate() {
                    let origins = Origins::Redirected(Arc::clone(&own));
                    let socket = CaptureSocket { socket, origins };
                    shares[i % self.process.workers].push(Listening::Captured(socket));
                }
            }
            active.push(ActiveRedirect { wanted: wanted.clone(), sockets: Sockets::new(shares) });
        }
        Ok(active)
    }

    /// What each worker gets, which is nothing yet.
    fn shares(&self) -> Vec<Vec<Listening>> {
        (0..self.process.workers).map(|_| Vec::new()).collect()
    }
}

fn bound(sockets: &[Socket], configured: SocketAddr) -> SocketAddr {
    sockets.first().and_then(|s| s.local_addr().ok()?.as_socket()).unwrap_or(configured)
}

/// Whether this process may set the mark.
pub(super) fn may_mark(mark: Mark) -> io::Result<()> {
    tcp::set_mark(&Socket::new(Domain::IPV4, Type::STREAM, None)?, mark)
}

/// Fails where our own connections would look like an application's to the operator's rules.
pub(super) fn require_mark(mark: Mark) -> Result<(), Failure> {
    may_mark(mark).map_err(|e| {
        let what = format!(
            "marking our own sockets failed (SO_MARK): {e}; without a mark the rules that redirect connections \
             cannot tell ours from the application's"
        );
        match e.kind() {
            io::ErrorKind::PermissionDenied => Failure::Privilege(Cause::new(
                what,
                "It takes CAP_NET_ADMIN: run it as root, or in a systemd unit with \
                 AmbientCapabilities=CAP_NET_ADMIN.",
            )),
            _ => Failure::Other(Cause::new(what, "")),
        }
    })
}

/// The sockets of QUIC are not handed on: what a connection's packets go by is their place among them.
fn cannot_listen_for_quic(address: SocketAddr, e: &io::Error) -> Failure {
    if e.kind() != io::ErrorKind::AddrInUse {
        return cannot_listen(address, e);
    }
    Failure::Other(Cause::new(
        format!("cannot listen on {address} for HTTP/3 (UDP): {e}"),
        format!(
            "Another process has the port (`ss -ulnp sport = :{}` names it), or this listener has it already: one with \"h3\" \
             cannot be changed, nor taken over by another daemon, while it runs; restart the daemon instead.",
            address.port()
        ),
    ))
}

fn cannot_listen(address: SocketAddr, e: &io::Error) -> Failure {
    let what = format!("cannot listen on {address}: {e}");
    match e.kind() {
        io::ErrorKind::PermissionDenied => Failure::Privilege(Cause::new(
            what,
            "Ports below 1024 take CAP_NET_BIND_SERVICE: run as root, or choose a higher port.",
        )),
        io::ErrorKind::AddrInUse => Failure::Other(Cause::new(
            what,
            format!("Another process listens there: `ss -tlnp sport = :{}` names it.", address.port()),
        )),
        _ => Failure::Other(Cause::new(what, "")),
    }
}
