//! Where the endpoints of an upstream come from, and what is known of them now.
//!
//! # Invariants
//! - Names are resolved and files read once for the whole process.
//! - What is known stays while nothing better is.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{config::ENDPOINTS_MAX, model::flow::Target};

pub mod dns;
pub mod file;

/// One endpoint, wherever it is known from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Site {
    /// What is connected to.
    pub at: Target,
    /// What it is called: its certificate speaks of that. The same, unless a name was resolved.
    pub named: Target,
}

impl From<Target> for Site {
    fn from(at: Target) -> Self {
        Self { named: at.clone(), at }
    }
}

/// The endpoints that are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSet {
    /// The endpoints, each once, at most [`ENDPOINTS_MAX`].
    pub sites: Vec<Site>,
    /// Why there are none, if there are none.
    pub unavailable: String,
}

impl EndpointSet {
    /// These, or a reason. Of two at the same place the first is taken.
    pub fn new(sites: impl IntoIterator<Item = Site>, unavailable: String) -> Self {
        let mut once = Vec::<Site>::new();
        let mut seen = std::collections::HashSet::new();
        for site in sites {
            if once.len() == ENDPOINTS_MAX {
                break;
            }
            if seen.insert(site.at.clone()) {
                once.push(site);
            }
        }
        Self { sites: once, unavailable }
    }

    /// As a log line has it.
    fn shown(&self) -> String {
        if self.sites.is_empty() {
            return format!("none ({})", self.unavailable);
        }
        self.sites.iter().map(|s| s.at.to_string()).collect::<Vec<_>>().join(", ")
    }
}

/// Where a worker learns of an upstream's endpoints. Whatever finds them out lives as long as a copy of this.
#[derive(Clone)]
pub enum EndpointSource {
    /// They are these.
    Fixed(Arc<[Site]>),
    /// They change.
    Fed(Feed),
}

impl EndpointSource {
    /// Endpoints that stay.
    pub fn fixed(targets: &[Target]) -> Self {
        Self::Fixed(targets.iter().cloned().map(Site::from).collect())
    }
}

impl std::fmt::Debug for EndpointSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(sites) => f.debug_tuple("Fixed").field(sites).finish(),
            Self::Fed(feed) => f.debug_tuple("Fed").field(&*feed.told.borrow()).finish(),
        }
    }
}

/// News of a set of endpoints.
#[derive(Clone)]
pub struct Feed {
    told: watch::Receiver<Option<EndpointSet>>,
    /// What finds them out.
    _keeper: Arc<dyn Send + Sync>,
}

impl Feed {
    /// What comes through `told`; `keeper` is dropped with the last copy.
    pub fn new(told: watch::Receiver<Option<EndpointSet>>, keeper: impl Send + Sync + 'static) -> Self {
        Self { told, _keeper: Arc::new(keeper) }
    }

    /// The newest set that is known, once it is another than the last that this has returned. Pending for ever when
    /// nobody will know any more.
    pub async fn next(&mut self) -> EndpointSet {
        loop {
            if self.told.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            if let Some(known) = &*self.told.borrow_and_update() {
                return known.clone();
            }
        }
    }

    /// What is known already; [`next`](Self::next) does not return it again.
    pub fn now(&mut self) -> Option<EndpointSet> {
        self.told.borrow_and_update().clone()
    }
}

/// Says what is known, if it is news.
fn tell(upstream: &str, feed: &watch::Sender<Option<EndpointSet>>, known: EndpointSet) {
    feed.send_if_modified(|now| {
        if now.as_ref() == Some(&known) {
            return false;
        }
        tracing::info!(upstream, endpoints = known.shown(), "endpoints");
        *now = Some(known);
        true
    });
}
