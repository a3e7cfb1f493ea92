//! The listening sockets of a daemon: for CONNECT requests, and for connections that rules redirect.
//!
//! Enters: addresses, and the sockets of a daemon that is replaced. Leaves: sockets for every worker, and
//! copies for the daemon that comes next. Invariant: a socket that was taken over is used, so what waits in
//! it is accepted. It never serves anything.

use std::{io, net::SocketAddr, sync::Arc};

use socket2::{Domain, Socket, Type};

use crate::{
    capture::accept::Origins,
    config::Redirect,
    exit::{Cause, Failure},
    own::OwnListeners,
    takeover::Listeners,
    transport::tcp,
    worker::CaptureSocket,
};

/// Opens what listens for the workers of one daemon.
pub(super) struct Opener {
    pub(super) workers: usize,
    pub(super) mark: tcp::Mark,
    /// Sockets of the daemon that this one replaces.
    pub(super) taken: Listeners,
    /// Copies, by the address that is configured, for the daemon that replaces this one.
    pub(super) kept: Vec<(SocketAddr, Vec<Socket>)>,
}

impl Opener {
    /// The sockets of one address: those that were taken over, and as many more as there are workers.
    pub(super) fn open(&mut self, address: SocketAddr) -> Result<Vec<Socket>, Failure> {
        let failed = |e: io::Error| cannot_listen(address, &e);
        let sockets = match self.taken.remove(&address) {
            None => tcp::listen(address, self.workers, self.mark).map_err(failed)?,
            Some(mut sockets) => {
                let missing = self.workers.saturating_sub(sockets.len());
                let bound = sockets.first().and_then(|s| s.local_addr().ok()?.as_socket()).unwrap_or(address);
                sockets.extend(tcp::listen_beside(bound, missing, self.mark).map_err(failed)?);
                sockets
            }
        };
        let copies: io::Result<Vec<_>> = sockets.iter().map(Socket::try_clone).collect();
        self.kept.push((address, copies.map_err(failed)?));
        Ok(sockets)
    }

    /// Opens where rules redirect connections to, and gives every worker its share. Without a mark on our own
    /// sockets no rule could tell them from the application's, and would redirect them as well.
    pub(super) fn open_redirects(
        &mut self,
        redirects: &[Redirect],
        sockets: &mut [Vec<CaptureSocket>],
    ) -> Result<Vec<SocketAddr>, Failure> {
        let addresses: Vec<SocketAddr> = redirects.iter().flat_map(|r| &r.listen).copied().collect();
        let own = Arc::new(OwnListeners::new(&addresses));
        for redirect in redirects {
            let name = redirect.name.as_deref().map(Arc::from);
            for address in &redirect.listen {
                for (i, socket) in self.open(*address)?.into_iter().enumerate() {
                    let origins = Origins::Redirected(Arc::clone(&own));
                    sockets[i % self.workers].push(CaptureSocket { name: name.clone(), socket, origins });
                }
            }
        }
        Ok(addresses)
    }
}

/// Whether this process may set the mark.
pub(super) fn may_mark(mark: u32) -> io::Result<()> {
    Socket::new(Domain::IPV4, Type::STREAM, None)?.set_mark(mark)
}

/// Fails where our own connections would look like an application's to the operator's rules.
pub(super) fn require_mark(mark: u32) -> Result<(), Failure> {
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
