//! The identity in use, and its replacement when its provider has another one.
//!
//! # Invariants
//! - Material that cannot be fetched, or cannot be used, never replaces what is in use.
//! - An identity that its provider has withdrawn is not used any more.
//! - Connections that are up keep what they were made with; [`Standing`](super::standing::Standing) says how long that holds.

use std::{fmt, io, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;

use crate::{
    config::{KeyExchange, OnExpiry, Protocol},
    identity::{
        describe::Certificate,
        provider::{IdentityError, IdentityProvider, Subscription},
        tls::{TlsIdentity, Wanted},
        verify::PeerRejected,
    },
    model::{
        flow::Identity,
        trust::{ClientCheck, ServerCheck},
    },
};

/// The identity in use.
pub struct TlsStore {
    provider: Box<dyn IdentityProvider>,
    options: TlsOptions,
    current: ArcSwap<Current>,
    /// Counts the changes of `current`.
    news: watch::Sender<u64>,
}

/// What is configured of an identity beside where it comes from.
#[derive(Clone, Debug, Default)]
pub struct TlsOptions {
    /// What becomes of flows whose connection has lapsed.
    pub on_expiry: OnExpiry,
    /// The key exchanges; empty: the default ones.
    pub key_exchange: Vec<KeyExchange>,
}

type Current = Result<Arc<TlsIdentity>, NoIdentity>;

/// There is no identity: it was withdrawn.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoIdentity(Arc<str>);

impl fmt::Debug for TlsStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStore").field("identity", &self.identity()).finish_non_exhaustive()
    }
}

impl TlsStore {
    /// With what the provider has now.
    pub fn load(provider: impl IdentityProvider + 'static) -> Result<Arc<Self>, IdentityError> {
        Self::load_with(Box::new(provider), TlsOptions::default())
    }

    /// The same, with options.
    pub fn load_with(
        provider: Box<dyn IdentityProvider>,
        options: TlsOptions,
    ) -> Result<Arc<Self>, IdentityError> {
        let identity = TlsIdentity::new(provider.fetch()?, &options.key_exchange)?;
        let current = ArcSwap::from_pointee(Ok(Arc::new(identity)));
        Ok(Arc::new(Self { provider, options, current, news: watch::Sender::new(0) }))
    }

    /// Fetches again. `true`: something has changed, and new connections use it from now on; sessions of before cannot be
    /// resumed any more. On an error what is in use stays, unless it was withdrawn.
    pub fn reload(&self) -> Result<bool, IdentityError> {
        let material = match self.provider.fetch() {
            Ok(material) => material,
            Err(e) => {
                if let IdentityError::Withdrawn { .. } = e {
                    self.replace(Err(NoIdentity(e.to_string().into())));
                }
                return Err(e);
            }
        };
        if self.current.load().as_ref().as_ref().is_ok_and(|current| current.is_of(&material)) {
            return Ok(false);
        }
        self.replace(Ok(Arc::new(TlsIdentity::new(material, &self.options.key_exchange)?)));
        Ok(true)
    }

    fn replace(&self, next: Current) {
        self.current.store(Arc::new(next));
        self.news.send_modify(|version| *version += 1);
    }

    /// What new connections are made with.
    pub fn current(&self) -> Result<Arc<TlsIdentity>, NoIdentity> {
        (**self.current.load()).clone()
    }

    /// Tells when that has changed.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    pub(crate) fn on_expiry(&self) -> OnExpiry {
        self.options.on_expiry
    }

    /// See [`TlsIdentity::client_config`].
    pub fn client_config(
        &self,
        check: &ServerCheck,
        protocol: Protocol,
    ) -> Result<Arc<ClientConfig>, NoIdentity> {
        Ok(self.current()?.client_config(check, protocol))
    }

    /// See [`TlsIdentity::server_config`].
    pub fn server_config(
        &self,
        check: &ClientCheck,
        protocols: &[Protocol],
    ) -> Result<Arc<ServerConfig>, NoIdentity> {
        Ok(self.current()?.server_config(check, protocols))
    }

    /// See `TlsIdentity::keep`.
    pub fn keep(&self, wanted: &Wanted) {
        if let Ok(current) = self.current() {
            current.keep(wanted);
        }
    }

    /// See [`TlsIdentity::as_client`].
    pub fn as_client(&self, check: &ClientCheck) -> Result<Option<Identity>, PeerRejected> {
        self.current().map_err(|e| PeerRejected::withdrawn(&e))?.as_client(check)
    }

    /// See [`TlsIdentity::describe`].
    pub fn describe(&self) -> (String, Vec<Certificate>, Vec<Certificate>) {
        match self.current() {
            Ok(current) => current.describe(),
            // It was withdrawn.
            Err(e) => (e.to_string(), Vec::new(), Vec::new()),
        }
    }

    /// Who we are to our peers now.
    pub fn identity(&self) -> Option<Identity> {
        self.current().ok()?.identity().cloned()
    }
}

/// Reloads `store` when its provider has something else; `on_reload` hears of each new identity.
pub fn watch(store: &Arc<TlsStore>, on_reload: impl Fn() + Send + 'static) -> io::Result<Subscription> {
    let reloaded = Arc::clone(store);
    store.provider.subscribe(Box::new(move || match reloaded.reload() {
        Ok(false) => {}
        Ok(true) => {
            let id = reloaded.identity();
            tracing::info!(identity = id.as_ref().map(|i| &*i.0), "identity reloaded");
            on_reload();
        }
        Err(e @ IdentityError::Withdrawn { .. }) => {
            tracing::error!(error = %e, "identity withdrawn: its connections are drained, and no new ones are made");
            on_reload();
        }
        Err(e) => tracing::error!(error = %e, "failed to reload identity; keeping the previous one"),
    }))
}
