//! One HTTP/2 connection to an upstream (RFC 9113): its streams, and what is known of its peer.
//!
//! # Invariants
//! - A connection is there only once its peer has answered a PING.
//! - A request whose client has left is reset only once the peer has answered it.

mod abandoned;
mod drive;
mod handshake;
#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    future::pending,
    rc::Rc,
    time::Duration,
};

use ::h2::{
    Reason,
    client::{ResponseFuture, SendRequest},
};
use http::header::ALT_SVC;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, timeout},
};

use self::{abandoned::Unanswered, drive::Drive};
pub(super) use self::{
    abandoned::{Abandoned, outlive},
    handshake::H2Handshake,
};
use super::{
    alternative::Alternatives,
    connect::Far,
    connection::{Connection, OpenError, OpenRequest},
    permit::StreamPermits,
    signal::Signal,
    stream::Stream,
};
use crate::{
    identity::standing::Standing,
    model::flow::{FarEnd, Identity, Target},
    relay::{H2Leg, Payload, Queue, Sender},
    transport::window::Traffic,
};

/// A peer that was heard of within this time is not asked whether it is there when a stream is opened.
const HEARD: Duration = Duration::from_secs(1);
/// A PING that is not answered within this time is overdue: new streams go to another endpoint, if one is available. A
/// second is more than any round trip, and less than whoever connects takes for a failure.
const OVERDUE: Duration = Duration::from_secs(1);

/// See the module.
pub struct H2Connection {
    /// `None` once it is to end.
    send: RefCell<Option<SendRequest<Payload>>>,
    far: Far,
    /// Our limit; the peer's counts too.
    max_streams: usize,
    /// Got GOAWAY, failed, or is being closed.
    draining: Cell<bool>,
    /// Those who want to know whether the peer is alive,
    askers: RefCell<Vec<oneshot::Sender<()>>>,
    /// and that there is a new one.
    asking: Signal,
    /// When the peer was last heard of, and how much it had sent by then.
    heard: Cell<(Instant, u64)>,
    /// It is to be asked whether it is there.
    poked: Cell<bool>,
    /// When it was asked that, if it has not answered yet.
    asked: Cell<Option<Instant>>,
    is_overdue: Cell<bool>,
    /// It has become overdue, or the connection has ended.
    overdue: Notify,
    /// Why the connection was lost, once it was.
    lost: RefCell<Option<String>>,
    /// What its streams report to, and what sizes their windows.
    traffic: Rc<Traffic>,
    /// Streams whose clients have left before they were answered.
    abandoned: mpsc::UnboundedSender<Abandoned>,
    /// Where it hears what the peer offers beside this, and of which endpoint.
    alternatives: Option<(Target, Rc<Alternatives>)>,
    /// Until it is run.
    driver: RefCell<Option<Box<dyn Drive>>>,
}

impl H2Connection {
    fn heard(&self) {
        self.heard.set((Instant::now(), self.traffic.received()));
    }

    /// A request is about to be sent: has the peer asked whether it is there, if it was not heard of just now.
    fn expect_answer(&self) {
        if self.heard.get().1 != self.traffic.received() {
            return self.heard();
        }
        if self.asked.get().is_none() && self.heard.get().0.elapsed() >= HEARD {
            self.poked.set(true);
            self.asking.set();
        }
    }

    /// Ready when the peer is overdue with its answer to a PING, or the connection has ended.
    async fn overdue(&self) {
        while !self.is_overdue.get() && !self.draining.get() {
            self.overdue.notified().await;
        }
    }

    /// The peer has answered a PING.
    fn answered(&self) {
        self.asked.set(None);
        self.is_overdue.set(false);
        self.heard();
    }

    /// Nothing was sent, nor will be.
    fn not_sent(&self, why: String) -> OpenError {
        self.drain();
        OpenError::NotProcessed(why)
    }

    /// Sends a request.
    async fn send(&self, request: http::Request<()>) -> Result<(ResponseFuture, Sender), OpenError> {
        let sender = self.send.borrow().clone();
        let sender = sender.ok_or_else(|| self.not_sent("the connection was idle".to_owned()))?;
        let mut sender = sender.ready().await.map_err(|e| self.not_sent(e.to_string()))?;
        self.expect_answer();
        let sent = sender.send_request(request, false).map_err(|e| self.not_sent(e.to_string()))?;
        Ok((sent.0, Sender::new(sent.1, &self.traffic.account())))
    }

    /// Why a request was not answered.
    fn unanswered(&self, e: &::h2::Error) -> OpenError {
        let refused = e.reason() == Some(Reason::REFUSED_STREAM);
        if e.is_go_away() && e.is_remote() {
            self.drain();
            return OpenError::NotProcessed(e.to_string());
        }
        if refused {
            return OpenError::NotProcessed(e.to_string());
        }
        // The connection knows better why it was lost than one of its streams.
        OpenError::Dropped(self.lost().unwrap_or_else(|| e.to_string()))
    }
}

impl Connection for H2Connection {
    fn peer(&self) -> &FarEnd {
        &self.far.peer
    }

    fn identity(&self) -> Option<&Identity> {
        self.far.identity.as_ref()
    }

    fn connected(&self) -> Option<std::time::Instant> {
        Some(self.far.connected)
    }

    fn max_streams(&self) -> usize {
        let send = self.send.borrow();
        let Some(send) = send.as_ref().filter(|_| !self.draining.get()) else { return 0 };
        self.max_streams.min(send.current_max_send_streams())
    }

    fn is_barred(&self) -> bool {
        !self.draining.get() && self.max_streams() == 0
    }

    fn is_overdue(&self) -> bool {
        self.is_overdue.get()
    }

    async fn open(&self, request: OpenRequest<'_, '_>, permits: StreamPermits) -> Result<Stream, OpenError> {
        let OpenRequest { head, timeout: after, ahead, may_retry } = request;
        let (response, send) = self.send(head).await?;
        let abandoned = Abandoned { response, send, permits, after };
        let mut unanswered = Unanswered::new(abandoned, &self.abandoned);
        let Some(Abandoned { response, send, .. }) = unanswered.get() else {
            return Err(OpenError::Dropped("the stream is gone".to_owned()));
        };
        let answer = async {
            match ahead {
                Some(ahead) => ahead.until(send, response).await,
                None => response.await,
            }
        };
        // Where the request may be made again elsewhere, and nothing was carried.
        let given_up = async {
            self.overdue().await;
            if !may_retry || ahead.is_some_and(|ahead| ahead.has_carried()) {
                pending::<()>().await;
            }
        };
        let answer = tokio::select! {
            biased;
            answer = timeout(after, answer) => Some(answer),
            () = given_up => None,
        };
        let Some(Abandoned { send, permits, .. }) = unanswered.answered() else {
            return Err(OpenError::Dropped("the stream is gone".to_owned()));
        };
        let response = match answer {
            Some(Ok(Ok(response))) => response,
            Some(Ok(Err(e))) => return Err(self.unanswered(&e)),
            Some(Err(_)) => return Err(OpenError::Timeout),
            None => return Err(OpenError::Dropped("its answer to PING is overdue".to_owned())),
        };
        self.heard();
        // The endpoint of a connection that drains may be gone.
        if let Some((endpoint, alternatives)) = &self.alternatives
            && !self.draining.get()
            && let Some(offered) = response.headers().get(ALT_SVC)
        {
            alternatives.heard(endpoint, offered);
        }
        // Any 2xx (RFC 9110 section 9.3.6).
        if !response.status().is_success() {
            let detail = response.headers().get("proxy-status").and_then(|v| v.to_str().ok());
            let detail = detail.map(str::to_owned);
            return Err(OpenError::Refused { status: response.status(), detail });
        }
        if let Some(ahead) = ahead {
            ahead.answered();
        }
        let leg = H2Leg::client(send, response.into_body(), self.traffic.share()).into();
        let Far { peer, identity, standing, .. } = self.far.clone();
        let end = standing.as_ref().and_then(Standing::end_of_flows);
        Ok(Stream { leg, early: Queue::default(), peer, identity, end, permits })
    }

    async fn ping(&self) -> Result<(), String> {
        let (tell, told) = oneshot::channel();
        {
            let mut askers = self.askers.borrow_mut();
            // Those who no longer wait.
            askers.retain(|asker| !asker.is_closed());
            askers.push(tell);
        }
        self.asking.set();
        told.await.map_err(|_| self.lost().unwrap_or_else(|| "the connection has ended".to_owned()))
    }

    fn drain(&self) {
        self.draining.set(true);
    }

    fn close(&self) {
        self.draining.set(true);
        // Without a handle that could open a stream, the connection says GOAWAY behind its last stream, and ends.
        drop(self.send.take());
    }

    async fn retired(&self) {
        self.far.retired().await;
    }

    async fn run(&self, grew: &dyn Fn()) {
        let driver = self.driver.take();
        if let Some(driver) = driver {
            driver.drive(self, grew).await;
        }
    }

    fn lost(&self) -> Option<String> {
        self.lost.borrow().clone()
    }
}
