//! An upstream that is this process: a flow goes to a listener of ours without a connection. The listener's own check on its
//! clients holds.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use super::headers::Ask;
use crate::{
    identity::{store::TlsStore, verify::PeerRejected},
    model::{flow::Identity, names::IdentityName, trust::ClientCheck},
};

/// An upstream that is this process.
pub struct InProcessUpstream {
    /// The upstream's name, for logs and statistics.
    pub name: String,
    /// What routes call the listener.
    pub listener: String,
    /// Our certificates, and what they must say there; `None`: that listener has no TLS, and nobody is known to it.
    pub proof: Option<Proof>,
    /// How long a dial for what the listener takes may take.
    pub dial_timeout: Duration,
}

/// Who we are to a listener of our own.
pub struct Proof {
    /// Unless a capture says otherwise.
    pub store: Arc<TlsStore>,
    /// For flows of captures that name an identity of their own.
    pub of_captures: Arc<BTreeMap<IdentityName, Arc<TlsStore>>>,
    /// What the listener demands of its clients.
    pub check: ClientCheck,
}

impl std::fmt::Debug for InProcessUpstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InProcessUpstream")
            .field("name", &self.name)
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

impl InProcessUpstream {
    /// Who we are to the listener, for a flow whose capture says `identity`.
    pub fn identity(&self, identity: Option<&IdentityName>) -> Result<Option<Identity>, PeerRejected> {
        let Some(Proof { store, of_captures, check }) = &self.proof else { return Ok(None) };
        identity.and_then(|name| of_captures.get(name)).unwrap_or(store).as_client(check)
    }
}

/// The way of a flow back into this process.
pub trait DispatchInProcess {
    /// What the flow goes on with.
    type Sink;
    /// Why it does not.
    type Error;

    /// Goes on as if a peer had asked the listener.
    fn dispatch_in_process(
        self,
        to: &InProcessUpstream,
        ask: &Ask<'_>,
    ) -> impl Future<Output = Result<Self::Sink, Self::Error>>;
}
