//! The listening sockets of a daemon: for CONNECT requests, and for connections that rules redirect.
//!
//! Enters: addresses, and the sockets of a daemon that is replaced. Leaves: sockets for every worker, and
//! copies for the daemon that comes next. Invariant: a socket that was taken over is used, so what waits in
//! it is accepted. It never serves anything.

use std::{io, net::SocketAddr, sync::Arc};

use socket2::{Domain, Socket, Type};

use super::no_identity;
use crate::model::mark::Mark;
use crate::{
    config::{self, Redirect},
    daemon::takeover::Listeners,
    identity::store::TlsStore,
    kernel::own::OwnListeners,
    process::exit::{Cause, Failure},
    sources::{capture::accept::Origins, listener::accept},
    transport::tcp::{self, OnClose},
    worker::{CaptureSocket, ConnectSocket, SourceId},
};

/// A listener for CONNECT requests that the workers serve.
#[derive(Clone)]
pub(super) struct ActiveListener {
    /// By which they know it.
    pub(super) source: SourceId,
    pub(super) wanted: config::Listener,
    /// Its address, with the port that it got.
    pub(super) bound: SocketAddr,
}

/// What one worker is to accept from.
#[derive(Default)]
pub(super) struct Sockets {
    pub(super) captures: Vec<CaptureSocket>,
    pub(super) listeners: Vec<ConnectSocket>,
}

/// Numbers for captures and listeners; none is given twice.
#[derive(Default)]
pub(super) struct SourceIds(u64);

impl SourceIds {
    pub(super) fn next(&mut self) -> SourceId {
        self.0 += 1;
        SourceId(self.0)
    }
}

/// Opens what listens for the workers of one daemon.
pub(super) struct Opener {
    pub(super) workers: usize,
    pub(super) mark: Option<Mark>,
    /// Sockets of the daemon that this one replaces.
    pub(super) taken: Listeners,
    /// Copies, by the address that is configured, for the daemon that replaces this one.
    pub(super) kept: Vec<(SocketAddr, Vec<Socket>)>,
    /// What has listened already gets these options, once nothing can fail any more: see [`retune`].
    pub(super) retuned: Vec<(SocketAddr, OnClose)>,
}

/// Gives sockets that listened for something else the options of what they listen for now.
pub(super) fn retune(kept: &[(SocketAddr, Vec<Socket>)], retuned: &[(SocketAddr, OnClose)]) {
    for (address, on_close) in retuned {
        let sockets = kept.iter().filter(|(kept, _)| kept == address).flat_map(|(_, sockets)| sockets);
        for socket in sockets {
            if let Err(e) = tcp::bequeath(socket, *on_close) {
                tracing::error!(%address, "its connections lack options: {e}");
            }
        }
    }
}

impl Opener {
    /// The sockets of one address: those that were taken over, and as many more as there are workers.
    fn open(&mut self, address: SocketAddr, on_close: OnClose) -> Result<Vec<Socket>, Failure> {
        let failed = |e: io::Error| cannot_listen(address, &e);
        let sockets = match self.taken.remove(&address) {
            None => tcp::listen(address, self.workers, self.mark, on_close).map_err(failed)?,
            Some(mut sockets) => {
                let missing = self.workers.saturating_sub(sockets.len());
                let bound = sockets.first().and_then(|s| s.local_addr().ok()?.as_socket()).unwrap_or(address);
                // They may have listened for something else, and do until all has gone well.
                self.retuned.push((address, on_close));
                sockets.extend(tcp::listen_beside(bound, missing, self.mark, on_close).map_err(failed)?);
                sockets
            }
        };
        let copies: io::Result<Vec<_>> = sockets.iter().map(Socket::try_clone).collect();
        self.kept.push((address, copies.map_err(failed)?));
        Ok(sockets)
    }

    /// Goes on with what listens at an address.
    pub(super) fn keep(&mut self, address: SocketAddr) {
        self.kept.extend(self.taken.remove_entry(&address));
    }

    /// Opens a listener for CONNECT requests, and gives every worker its share.
    pub(super) fn open_listener(
        &mut self,
        source: SourceId,
        wanted: &config::Listener,
        tls: Option<&Arc<TlsStore>>,
        sockets: &mut [Sockets],
    ) -> Result<ActiveListener, Failure> {
        let proving =
            |check| Ok::<_, Failure>(accept::Tls { store: tls.cloned().ok_or_else(no_identity)?, check });
        let settings = Arc::new(accept::Settings {
            proxy_protocol: wanted.proxy_protocol,
            tls: wanted.check().map(proving).transpose()?,
            protocols: wanted.protocols.clone(),
            handshake_timeout: wanted.handshake_timeout,
            max_streams: wanted.max_streams.get(),
            keepalive_interval: wanted.keepalive_interval,
            keepalive_timeout: wanted.keepalive_timeout,
        });
        let opened = self.open(wanted.address, OnClose::Deliver)?;
        let bound = opened.first().and_then(|s| s.local_addr().ok()?.as_socket()).unwrap_or(wanted.address);
        let name: Option<Arc<str>> = wanted.name.as_deref().map(Arc::from);
        for (i, socket) in opened.into_iter().enumerate() {
            sockets[i % self.workers].listeners.push(ConnectSocket {
                source,
                name: name.clone(),
                socket,
                settings: Arc::clone(&settings),
                dial_timeout: wanted.dial_timeout,
            });
        }
        Ok(ActiveListener { source, wanted: wanted.clone(), bound })
    }

    /// Opens where rules redirect connections to, and gives every worker its share.
    pub(super) fn open_redirects(
        &mut self,
        redirects: &[Redirect],
        sources: &mut SourceIds,
        sockets: &mut [Sockets],
    ) -> Result<Vec<SourceId>, Failure> {
        let addresses: Vec<SocketAddr> = redirects.iter().flat_map(|r| &r.listen).copied().collect();
        let own = Arc::new(OwnListeners::new(&addresses));
        let mut opened = Vec::new();
        for redirect in redirects {
            let source = sources.next();
            let name: Option<Arc<str>> = redirect.name.as_deref().map(Arc::from);
            for address in &redirect.listen {
                for (i, socket) in self.open(*address, OnClose::Abort)?.into_iter().enumerate() {
                    let origins = Origins::Redirected(Arc::clone(&own));
                    let socket = CaptureSocket { source, name: name.clone(), socket, origins };
                    sockets[i % self.workers].captures.push(socket);
                }
            }
            opened.push(source);
        }
        Ok(opened)
    }
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
