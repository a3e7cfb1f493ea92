//! `[admin]`: where operators and monitoring reach a running daemon.

use std::{net::SocketAddr, path::PathBuf};

use super::{section::section, value::FuturePath};

/// Metrics beside those of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricSet {
    /// Those of Istio's proxies.
    Istio,
}

section! {
    /// `[admin]`
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Admin {
        /// Whether there is an admin interface.
        enabled: default bool = true,
        /// Its Unix socket, which only the daemon's user can connect to (mode 0600). Default:
        /// /run/tunnel/admin-NAME.sock, where NAME is the configuration file's without its extension; of another user than
        /// root, /run/user/UID/tunnel or /tmp/tunnel-UID in place of /run/tunnel.
        socket: optional PathBuf [FuturePath],
        /// A loopback address to serve it on over TCP too, such as 127.0.0.1:15000, for Prometheus. Whoever can connect to it
        /// can read it. Requests that change something are rejected there, and so is every request that a browser sends for
        /// another site.
        listen: optional SocketAddr,
        /// Whether requests that change something are accepted over TCP too, from every local user.
        write_over_tcp: default bool = false,
        /// More metrics: "istio" for those that Istio's dashboards ask of a proxy (istio_tcp_...), by identity and name.
        metrics: default Vec<MetricSet> = Vec::new(),
    }
    check |r| {
        if listen.is_some_and(|address| !address.ip().is_loopback()) {
            r.wrong("listen", "is not a loopback address: everybody who can connect can read the configuration and all flows");
        }
        if listen.is_none() && write_over_tcp {
            r.wrong("write_over_tcp", "has no effect without listen");
        }
        let socket = socket.map(|FuturePath(path)| path);
    }
    defaults new;
}

impl Default for Admin {
    fn default() -> Self {
        Self::new()
    }
}
