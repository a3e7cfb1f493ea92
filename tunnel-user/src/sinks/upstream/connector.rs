//! An upstream's connections: shared by many flows, or one for each.
//!
//! Enters: an endpoint. Leaves: a connection to it, or a place on one. Invariant: the key under which a connection is
//! shared holds all that makes it what it is: endpoint, checks, certificate, and what it goes through. It never chooses
//! among endpoints.

use std::{cell::Cell, rc::Rc, time::Duration};

use tokio::time::Instant;

use super::{
    connect::{self, ConnectError, Connected, Key, TlsKey, connect},
    discovery::Site,
    health::Check,
    nested::Via,
    open::{Settings, Tls},
    pool::{Lease, Pool},
};
use crate::{config::Protocol, sinks::dial, transport::tcp::FirstSpeaker};

/// How an upstream's connections are had.
pub struct Lines {
    protocol: Protocol,
    tls: Option<Tls>,
    pub(super) via: Option<Via>,
    connect: connect::Settings,
    kind: Kind,
}

enum Kind {
    /// Shared by many flows.
    Pool(Pool),
    /// One for each flow; how many there were.
    Each(Cell<u64>),
}

/// A connection for one flow.
pub(super) enum Line {
    /// A place on one.
    Shared(Lease),
    /// All of it.
    Own(Box<Connected>),
}

impl Lines {
    pub(super) fn new(settings: &Settings, via: Option<Via>) -> Self {
        let kind = match settings.protocol {
            Protocol::H2 => Kind::Pool(Pool::new(settings.pool.clone())),
            Protocol::H1 => Kind::Each(Cell::default()),
        };
        let Settings { protocol, tls, pool, .. } = settings;
        Self { protocol: *protocol, tls: tls.clone(), via, connect: pool.connect.clone(), kind }
    }

    fn key(&self, site: &Site) -> Key {
        let tls = self.tls.as_ref().map(|Tls { store, check }| TlsKey {
            config: store.client_config(check, self.protocol),
            server_name: check.server_name(&site.named),
            hint: store.hint(),
        });
        Key { endpoint: site.at.clone(), tls, via: self.via.clone() }
    }

    /// Connections opened since the start.
    pub(super) fn opened(&self) -> u64 {
        match &self.kind {
            Kind::Pool(pool) => pool.opened(),
            Kind::Each(opened) => opened.get(),
        }
    }

    /// Closes those that are shared; see [`Pool::close`].
    pub(super) async fn close(&self) {
        if let Kind::Pool(pool) = &self.kind {
            pool.close().await;
        }
    }

    /// Those to an endpoint that is gone get no new flows.
    pub(super) fn forget(&self, site: &Site) {
        if let Kind::Pool(pool) = &self.kind {
            pool.forget(&site.at);
        }
    }

    /// Whether a flow would not have to wait.
    pub(super) fn have_room(&self, site: &Site) -> bool {
        match &self.kind {
            Kind::Pool(pool) => pool.has_room(&self.key(site)),
            Kind::Each(_) => false,
        }
    }

    /// Whether what is up to an endpoint may be lost.
    pub(super) fn is_overdue(&self, site: &Site) -> bool {
        match &self.kind {
            Kind::Pool(pool) => pool.is_overdue(&self.key(site)),
            Kind::Each(_) => false,
        }
    }

    /// A connection, or a place on one.
    pub(super) async fn get(&self, site: &Site) -> Result<Line, ConnectError> {
        let key = self.key(site);
        match &self.kind {
            Kind::Pool(pool) => pool.lease(&key).await.map(Line::Shared),
            Kind::Each(opened) => {
                let connected = connect(&key, self.protocol, &self.connect, async |c| Ok(c)).await?;
                opened.set(opened.get() + 1);
                Ok(Line::Own(Box::new(connected)))
            }
        }
    }

    /// Whether TCP connects there: from here, or from the far end of the upstream that it goes through.
    pub(super) async fn reach(&self, site: &Site, allowed: Duration) -> Result<(), Check> {
        if let Some(via) = &self.via {
            let opened = Box::pin(via.open(&site.at)).await;
            return Ok(opened.map(drop).map_err(|e| ConnectError::Outer(Rc::new(e)))?);
        }
        let failed = |e: dial::DialError| Check::Failed(e.to_string());
        let addrs = dial::resolve(&site.at, &self.connect.own).await.map_err(failed)?;
        let deadline = Instant::now() + allowed;
        let connected =
            dial::connect(&site.at, &addrs, &self.connect.own, FirstSpeaker::Unknown, deadline, allowed)
                .await;
        connected.map(drop).map_err(failed)
    }

    /// Whether a peer there answers a PING, on a connection as flows have it.
    pub(super) async fn ping(&self, site: &Site) -> Result<(), Check> {
        match self.get(site).await? {
            Line::Shared(lease) => lease.ping().await.map_err(Check::Failed),
            Line::Own(_) => Ok(()),
        }
    }
}
