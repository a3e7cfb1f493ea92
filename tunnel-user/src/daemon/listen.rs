//! The listening sockets of a daemon: for CONNECT requests, and for connections that rules redirect.
//!
//! # Invariants
//! - A socket that listens at a wanted address already, here or in a daemon that is replaced, is used: what waits in it is
//!   accepted.

use std::{collections::hash_map::Entry, io, net::SocketAddr, sync::Arc};

use http::HeaderValue;
use socket2::{Domain, Socket, Type};

use super::{bootstrap::Process, identities::Identities};
use crate::{
    config::{self, Redirect},
    daemon::takeover::{Groups, Listeners},
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
        quic::Group,
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
    /// UDP sockets, those that are no longer wanted among them.
    groups: Groups,
    /// Which places of them take new peers, once nothing can fail any more.
    steered: Vec<Steered>,
}

/// What is kept of what was opened.
#[derive(Default)]
pub(super) struct Opened {
    pub(super) kept: Kept,
    /// See [`set_inherited_options`].
    retuned: Vec<(SocketAddr, OnClose)>,
    pub(super) groups: Groups,
    steered: Vec<Steered>,
}

/// The places of a listener in the group of its address.
struct Steered {
    address: SocketAddr,
    first: usize,
    count: usize,
}

impl Opened {
    /// Puts it in force.
    pub(super) fn settle(&self) {
        set_inherited_options(&self.kept, &self.retuned);
        for Steered { address, first, count } in &self.steered {
            let steered = self.groups.get(address).map(|group| group.steer(*first, *count));
            if let Some(Err(error)) = steered {
                tracing::error!(%address, %error, "failed to steer packets to workers; peers whose address changes are lost");
            }
        }
    }
}

/// Copies of groups.
pub(super) fn copies_of(groups: &Groups) -> io::Result<Groups> {
    groups.iter().map(|(address, group)| Ok((*address, group.try_clone()?))).collect()
}

/// Gives sockets that listened for something else the options of what they listen for now.
fn set_inherited_options(kept: &Kept, retuned: &[(SocketAddr, OnClose)]) {
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
    pub(super) fn new(process: &'p Process, existing: Listeners, groups: Groups) -> Self {
        Self { process, existing, kept: Kept::new(), retuned: Vec::new(), groups, steered: Vec::new() }
    }

    /// What is kept.
    pub(super) fn finish(self) -> Opened {
        let Self { kept, retuned, groups, steered, .. } = self;
        Opened { kept, retuned, groups, steered }
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
        let (dial_timeout, workers) = (wanted.dial_timeout, self.process.workers);
        let (mut shares, mut at, protocols) = (self.shares(), wanted.address, wanted.over_tcp());
        let over_tcp =
            if protocols.is_empty() { Vec::new() } else { self.open(wanted.address, OnClose::Deliver)? };
        at = bound(&over_tcp, at);
        let settings = Arc::new(accept::Settings {
            proxy_protocol: wanted.proxy_protocol,
            tls: wanted.check().map(tls).transpose()?,
            protocols,
            handshake_timeout: wanted.handshake_timeout,
            max_streams: wanted.max_streams.get(),
            keepalive_interval: wanted.keepalive_interval,
            keepalive_timeout: wanted.keepalive_timeout,
            congestion: wanted.congestion_control,
            idle_timeout: wanted.idle_timeout,
            alt_svc: wanted.has_h3().then(|| offer(at.port())).flatten(),
        });
        for (i, socket) in over_tcp.into_iter().enumerate() {
            let socket = ConnectSocket { socket, settings: Arc::clone(&settings), dial_timeout };
            shares[i % workers].push(Listening::Requests(socket));
        }
        if wanted.has_h3() {
            let (failed, mark) = (|e: io::Error| cannot_listen_for_quic(at, &e), self.process.own.mark());
            let group = match self.groups.entry(wanted.address) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(free) => free.insert(Group::bind(at, mark).map_err(failed)?),
            };
            let places = group.take(workers, mark).map_err(failed)?;
            at = group.address().map_err(failed)?;
            self.steered.push(Steered { address: wanted.address, first: places.first, count: workers });
            for (share, socket) in shares.iter_mut().zip(places.sockets) {
                let quic = Quic { socket, settings: Arc::clone(&settings) };
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

/// HTTP/3 on the same host, on this port, for a day, as where nothing is said (RFC 7838 section 3.1).
fn offer(port: u16) -> Option<HeaderValue> {
    HeaderValue::try_from(format!("h3=\":{port}\"; ma=86400")).ok()
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

fn cannot_listen_for_quic(address: SocketAddr, e: &io::Error) -> Failure {
    if e.kind() != io::ErrorKind::AddrInUse {
        return cannot_listen(address, e);
    }
    Failure::Other(Cause::new(
        format!("cannot listen on {address} for HTTP/3 (UDP): {e}"),
        format!("Another process has the port: `ss -ulnp sport = :{}` names it.", address.port()),
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
