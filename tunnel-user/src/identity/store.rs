//! The identity in use, and its replacement when the files change.
//!
//! Enters: the files' names, and the word that they may have changed. Leaves: the configurations of the newest
//! identity that loaded. Invariant: a bad or half-written set of files never replaces a good one. It never touches
//! connections that are up: they keep what they were made with.

use std::{io, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{ClientConfig, ServerConfig};

use crate::{
    config::Protocol,
    identity::{
        tls::{TlsError, TlsIdentity, Wanted},
        verify::PeerRejected,
    },
    model::{
        flow::Identity,
        trust::{ClientCheck, IdentityFiles, ServerCheck},
    },
    process::files::{self, Watch},
};

/// The identity in use.
pub struct TlsStore {
    files: IdentityFiles,
    current: ArcSwap<TlsIdentity>,
}

impl TlsStore {
    /// Loads the files.
    pub fn load(files: IdentityFiles) -> Result<Arc<Self>, TlsError> {
        let current = ArcSwap::from_pointee(TlsIdentity::load(&files)?);
        Ok(Arc::new(Self { files, current }))
    }

    /// Reads the files again. `true`: they had changed, and new connections use them from now on; sessions
    /// of before cannot be resumed any more. On an error the old identity stays.
    pub fn reload(&self) -> Result<bool, TlsError> {
        if self.current.load().is_current(&self.files)? {
            return Ok(false);
        }
        self.current.store(Arc::new(TlsIdentity::load(&self.files)?));
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

    /// Who we are to our peers now.
    pub fn identity(&self) -> Option<Identity> {
        self.current.load().identity().cloned()
    }
}

/// Reloads `store` when something changes beside its files; `on_reload` hears of each new identity.
pub fn watch(store: Arc<TlsStore>, on_reload: impl Fn() + Send + 'static) -> io::Result<Watch> {
    let IdentityFiles { cert, key, ca } = store.files.clone();
    files::watch([&*cert, &*key, &*ca], "identity-watch", move || match store.reload() {
        Ok(false) => {}
        Ok(true) => {
            let id = store.identity();
            tracing::info!(identity = id.as_ref().map(|i| &*i.0), "identity reloaded");
            on_reload();
        }
        Err(e) => tracing::error!("the identity's files changed, but the old one stays in use: {e}"),
    })
}
