//! What a connection's right to carry new streams rests on, for as long as it is up: the certificates of both sides, and that
//! the peer's still leads to a root that is trusted.
//!
//! # Invariants
//! - What a handshake has verified once is verified again whenever the roots change; a connection whose peer would not pass
//!   a handshake now has lapsed.

use std::{cell::Cell, fmt, pin::Pin, sync::Arc, time::Duration};

use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::time::sleep;

use super::{
    store::TlsStore,
    tls::TlsIdentity,
    verify::{explain, not_after},
};
use crate::{
    config::OnExpiry,
    model::{
        san::SanPattern,
        trust::{ClientCheck, ServerCheck},
    },
};

/// How long the clock is trusted to go on as it did: when it is set, dates are compared again within this time.
const CLOCK: Duration = Duration::from_secs(30);

/// See the module.
pub struct Standing {
    store: Arc<TlsStore>,
    ours: Arc<TlsIdentity>,
    /// The peer's certificates, the leaf first.
    chain: Vec<CertificateDer<'static>>,
    peer: Peer,
    /// When the first of both leaves expires, and whose that is.
    not_after: (u64, Whose),
    /// Under which roots the chain was verified last, and whether it passed.
    verified: Cell<(u64, bool)>,
    /// When the next certificate above the peer's leaf expires, and the chain is verified again.
    again_at: Cell<u64>,
}

/// How the peer was verified.
enum Peer {
    Server { name: ServerName<'static>, san: Vec<SanPattern> },
    Client { san: Vec<SanPattern> },
}

/// Whose certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whose {
    /// Our own.
    Ours,
    /// The peer's.
    Peers,
}

/// Why a connection may carry no new streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lapse {
    /// A certificate has expired.
    Expired(Whose),
    /// The peer's certificate would not be accepted any more; and why.
    Untrusted(String),
    /// Our identity was withdrawn.
    Withdrawn,
}

impl fmt::Display for Lapse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expired(Whose::Ours) => f.write_str("our certificate has expired"),
            Self::Expired(Whose::Peers) => f.write_str("the peer's certificate has expired"),
            Self::Untrusted(why) => f.write_str(why),
            Self::Withdrawn => f.write_str("our identity was withdrawn"),
        }
    }
}

/// Ready when the flow that holds it is to end, and why.
pub type EndOfStanding = Pin<Box<dyn Future<Output = Lapse>>>;

impl Standing {
    /// Of a connection to a server, which presented `chain`.
    pub fn of_server(
        store: Arc<TlsStore>,
        ours: Arc<TlsIdentity>,
        chain: Vec<CertificateDer<'static>>,
        name: ServerName<'static>,
        check: &ServerCheck,
    ) -> Self {
        Self::new(store, ours, chain, Peer::Server { name, san: check.san.clone() })
    }

    /// Of a connection of a client, which presented `chain`.
    pub fn of_client(
        store: Arc<TlsStore>,
        ours: Arc<TlsIdentity>,
        chain: Vec<CertificateDer<'static>>,
        check: &ClientCheck,
    ) -> Self {
        Self::new(store, ours, chain, Peer::Client { san: check.san.clone() })
    }

    fn new(
        store: Arc<TlsStore>,
        ours: Arc<TlsIdentity>,
        chain: Vec<CertificateDer<'static>>,
        peer: Peer,
    ) -> Self {
        let theirs = chain.first().and_then(not_after).unwrap_or(0);
        let not_after = (ours.not_after(), Whose::Ours).min((theirs, Whose::Peers));
        let verified = Cell::new((ours.trust().fingerprint, true));
        // One that has expired already counts: a resumed session was not verified now.
        let again_at = Cell::new(next_expiry(&chain, 0));
        Self { store, ours, chain, peer, not_after, verified, again_at }
    }

    /// Whether it has lapsed, and why.
    pub fn lapse(&self) -> Option<Lapse> {
        let now = UnixTime::now();
        if now.as_secs() > self.not_after.0 {
            return Some(Lapse::Expired(self.not_after.1));
        }
        let Ok(current) = self.store.current() else { return Some(Lapse::Withdrawn) };
        let trust = current.trust();
        if self.verified.get() == (trust.fingerprint, true) && now.as_secs() <= self.again_at.get() {
            return None;
        }
        let verified = match (self.chain.split_first(), &self.peer) {
            (None, _) => Ok(()),
            (Some((leaf, above)), Peer::Server { name, san }) => {
                trust.verify_server(leaf, above, name, san, now)
            }
            (Some((leaf, above)), Peer::Client { san }) => trust.verify_client(leaf, above, san, now),
        };
        self.verified.set((trust.fingerprint, verified.is_ok()));
        self.again_at.set(next_expiry(&self.chain, now.as_secs()));
        verified.err().map(|e| Lapse::Untrusted(explain(&e)))
    }

    /// Ready when it has lapsed. Any number of tasks may wait.
    pub async fn lapsed(&self) -> Lapse {
        let mut news = self.store.news();
        loop {
            news.borrow_and_update();
            if let Some(lapse) = self.lapse() {
                return lapse;
            }
            let left = Duration::from_secs(self.not_after.0.saturating_sub(UnixTime::now().as_secs()) + 1);
            tokio::select! {
                () = sleep(left.min(CLOCK)) => {}
                // The store, which this holds, has the other end.
                _ = news.changed() => {}
            }
        }
    }

    /// Ready when it has lapsed, or new connections are made with another certificate, or other roots, than this one.
    pub async fn superseded(&self) -> Option<Lapse> {
        let replaced = async {
            let mut news = self.store.news();
            loop {
                news.borrow_and_update();
                if self.store.current().is_ok_and(|now| !Arc::ptr_eq(&now, &self.ours)) {
                    return;
                }
                if news.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            lapse = self.lapsed() => Some(lapse),
            () = replaced => None,
        }
    }

    /// Ready when the flows on the connection are to end; `None`: they may go on after it has lapsed.
    pub fn end_of_flows(self: &std::rc::Rc<Self>) -> Option<EndOfStanding> {
        let standing = std::rc::Rc::clone(self);
        match self.store.on_expiry() {
            OnExpiry::Drain => None,
            OnExpiry::End => Some(Box::pin(async move { standing.lapsed().await })),
        }
    }
}

/// Of the certificates above the leaf, when the first expires that has not before `now`. One that nobody needs may expire:
/// verification tells.
fn next_expiry(chain: &[CertificateDer<'static>], now: u64) -> u64 {
    chain.iter().skip(1).filter_map(not_after).filter(|at| *at >= now).min().unwrap_or(u64::MAX)
}

impl fmt::Debug for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standing").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}
