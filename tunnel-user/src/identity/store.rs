//! The identity in use, and its replacement when its provider has another one.
//!
//! # Invariants
//! - Material that cannot be fetched, or cannot be used, never replaces what is in use.
//! - Connections that are up keep what they were made with.

use std::{fmt, io, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{ClientConfig, ServerConfig};

use crate::{
    config::Protocol,
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
    current: ArcSwap<TlsIdentity>,
}

impl fmt::Debug for TlsStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStore").field("identity", &self.identity()).finish_non_exhaustive()
    }
}

impl TlsStore {
    /// With what the provider has now.
    pub fn load(provider: impl IdentityProvider + 'static) -> Result<Arc<Self>, IdentityError> {
        let current = ArcSwap::from_pointee(TlsIdentity::load(&provider)?);
        Ok(Arc::new(Self { provider: Box::new(provider), current }))
    }

    /// Fetches again. `true`: something has changed, and new connections use it from now on; sessions of before cannot be
    /// resumed any more. On an error what is in use stays.
    pub fn reload(&self) -> Result<bool, IdentityError> {
        let material = self.provider.fetch()?;
        if self.current.load().is_of(&material) {
            return Ok(false);
        }
        self.current.store(Arc::new(TlsIdentity::new(material)?));
        Ok(true)
    }

    /// See [`TlsIdentity::client_config`].
    pub fn client_config(&self, check: &ServerCheck, protocol: Protocol) -> Arc<ClientConfig> {
        self.current.load().client_config(check, protocol)
    }

    /// See [`TlsIdentity::server_config`].
    pub fn server_config(&self, check: &ClientCheck, protocols: &[Protocol]) -> Arc<ServerConfig> {
        self.current.load().server_config(check, protocols)
    }

    /// See `TlsIdentity::keep`.
    pub fn keep(&self, wanted: &Wanted) {
        self.current.load().keep(wanted);
    }

    /// See [`TlsIdentity::as_client`].
    pub fn as_client(&self, check: &ClientCheck) -> Result<Option<Identity>, PeerRejected> {
        self.current.load().as_client(check)
    }

    /// See [`TlsIdentity::hint`].
    pub(crate) fn hint(&self) -> Option<Arc<str>> {
        self.current.load().hint()
    }

    /// See [`TlsIdentity::describe`].
    pub fn describe(&self) -> (String, Vec<Certificate>, Vec<Certificate>) {
        self.current.load().describe()
    }

    /// Who we are to our peers now.
    pub fn identity(&self) -> Option<Identity> {
        self.current.load().identity().cloned()
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
        Err(e) => tracing::error!(error = %e, "failed to reload identity; keeping the previous one"),
    }))
}
