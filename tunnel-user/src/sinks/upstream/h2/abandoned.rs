//! Requests whose clients have left before the answer.
//!
//! Their streams are reset only once the peer has answered: servers count streams that are reset before they have looked at
//! them, and end the connection, and so every other flow on it, once there are too many (CVE-2023-44487).

use std::time::Duration;

use h2::client::ResponseFuture;
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use crate::{relay::Sender, sinks::upstream::permit::StreamPermits};

/// A request that was sent, on its stream.
pub(in crate::sinks::upstream) struct Abandoned {
    pub(super) response: ResponseFuture,
    pub(super) send: Sender,
    pub(super) permits: StreamPermits,
    /// How long the answer may take.
    pub(super) after: Duration,
}

/// A request that waits for its answer; dropped before that, it is left to [`outlive`].
pub(super) struct Unanswered<'u> {
    request: Option<Abandoned>,
    to: &'u mpsc::UnboundedSender<Abandoned>,
}

impl<'u> Unanswered<'u> {
    pub(super) fn new(request: Abandoned, to: &'u mpsc::UnboundedSender<Abandoned>) -> Self {
        Self { request: Some(request), to }
    }

    pub(super) fn get(&mut self) -> Option<&mut Abandoned> {
        self.request.as_mut()
    }

    /// Nobody waits for it any more.
    pub(super) fn answered(mut self) -> Option<Abandoned> {
        self.request.take()
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            // Where nobody takes it any more, the stream is reset at once.
            let _gone = self.to.send(request);
        }
    }
}

/// Holds streams whose clients have left until they are answered; no more than there are permits on connections.
pub(in crate::sinks::upstream) async fn outlive(mut left: mpsc::UnboundedReceiver<Abandoned>) {
    let mut waiting = JoinSet::new();
    loop {
        tokio::select! {
            next = left.recv() => match next {
                Some(mut request) => {
                    waiting.spawn_local(async move {
                        let _reset_now = timeout(request.after, &mut request.response).await;
                    });
                }
                None => return,
            },
            Some(_) = waiting.join_next() => {}
        }
    }
}
