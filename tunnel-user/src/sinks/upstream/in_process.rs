//! An upstream that is this process: a flow goes to a listener of ours without a connection. The listener's own check on its
//! clients holds.

use std::{future::Future, sync::Arc, time::Duration};

use super::headers::Ask;
use crate::{
    identity::{store::TlsStore, verify::PeerRejected},
    model::{flow::Identity, trust::ClientCheck},
};

/// An upstream that is this process.
pub struct InProcessUpstream {
    /// The upstream's name, for logs and statistics.
    pub name: String,
    /// What routes call the listener.
    pub listener: String,
    /// Our certificate, and what it must say there; `None`: that listener has no TLS, and nobody is known to it.
    pub proof: Option<(Arc<TlsStore>, ClientCheck)>,
    /// How long a dial for what the listener takes may take.
    pub dial_timeout: Duration,
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
    /// Who we are to the listener.
    pub fn identity(&self) -> Result<Option<Identity>, PeerRejected> {
        self.proof.as_ref().map_or(Ok(None), |(store, check)| store.as_client(check))
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
