//! An upstream that is this process: a flow goes to a listener of ours without a connection. The listener's own check on its
//! clients holds.

use std::{sync::Arc, time::Duration};

use crate::{
    identity::{store::TlsStore, verify::PeerRejected},
    model::{flow::Identity, trust::ClientCheck},
};

/// See the module.
pub struct Itself {
    /// The upstream's name, for logs and statistics.
    pub name: String,
    /// What routes call the listener.
    pub listener: String,
    /// Our certificate, and what it must say there; `None`: that listener has no TLS, and nobody is known to it.
    pub proof: Option<(Arc<TlsStore>, ClientCheck)>,
    /// How long a dial for what the listener takes may take.
    pub dial_timeout: Duration,
}

impl std::fmt::Debug for Itself {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Itself")
            .field("name", &self.name)
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

impl Itself {
    /// Who we are to the listener.
    pub fn identity(&self) -> Result<Option<Identity>, PeerRejected> {
        self.proof.as_ref().map_or(Ok(None), |(store, check)| store.as_client(check))
    }
}
