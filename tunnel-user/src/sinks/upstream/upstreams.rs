//! The upstreams of one worker, by name.
//!
//! # Invariants
//! - An upstream whose configuration is the same keeps its connections.
//! - One that goes through another shares that other's connections with everybody else. The connections of the innermost are
//!   closed first, because they are streams of the others'.

use std::{collections::HashMap, rc::Rc, sync::Arc};

use super::{
    in_process::InProcessUpstream,
    open::Upstream,
    settings::UpstreamSettings,
    underlay::{Underlay as _, Via},
};
use crate::model::names::UpstreamName;

/// What an upstream of the configuration is: another process, or this one.
#[derive(Clone, Debug)]
pub enum Next<U> {
    /// A gateway or proxy.
    Tunnel(U),
    /// This process.
    InProcess(Arc<InProcessUpstream>),
}

impl Next<UpstreamSettings> {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Tunnel(settings) => &settings.name,
            Self::InProcess(own) => &own.name,
        }
    }
}

/// See the module.
pub struct Upstreams(HashMap<UpstreamName, Made>);

struct Made {
    configured: Arc<Next<UpstreamSettings>>,
    next: Next<Rc<Upstream>>,
}

impl Upstreams {
    /// Those that are `configured`. One that is in `before` by the same `Arc` is kept, with its connections and with those
    /// that it goes through; any other is made anew. No connection is opened.
    pub fn new(configured: &[Arc<Next<UpstreamSettings>>], before: Option<&Self>) -> Self {
        let mut made = Self(HashMap::new());
        let mut left: Vec<_> = configured.iter().collect();
        // Whoever goes through another is made after it. Each round makes one at least, because the configuration admits no
        // circle; what was in one would not be there.
        for _ in configured {
            left.retain(|configured| !made.make(configured, before));
        }
        made
    }

    /// Whether it is made, which takes the one that it goes through.
    fn make(&mut self, configured: &Arc<Next<UpstreamSettings>>, before: Option<&Self>) -> bool {
        let name = configured.name();
        let kept =
            before.and_then(|before| before.0.get(name)).filter(|b| Arc::ptr_eq(&b.configured, configured));
        let next = match (kept, &**configured) {
            (Some(kept), _) => kept.next.clone(),
            (None, Next::InProcess(own)) => Next::InProcess(Arc::clone(own)),
            (None, Next::Tunnel(settings)) => {
                let via = match settings.via.as_ref().map(|outer| self.get(outer)) {
                    None => None,
                    Some(Some(Next::Tunnel(outer))) => Some(Via::new(Rc::<Upstream>::clone(outer))),
                    Some(_) => return false,
                };
                Next::Tunnel(Rc::new(Upstream::new(settings.clone(), via)))
            }
        };
        self.0.insert(name.into(), Made { configured: Arc::clone(configured), next });
        true
    }

    /// The one of this name.
    pub fn get(&self, name: &UpstreamName) -> Option<&Next<Rc<Upstream>>> {
        self.0.get(name).map(|made| &made.next)
    }

    /// Those that are other processes.
    pub fn tunnels(&self) -> impl Iterator<Item = &Rc<Upstream>> {
        self.0.values().filter_map(|made| match &made.next {
            Next::Tunnel(upstream) => Some(upstream),
            Next::InProcess(_) => None,
        })
    }

    /// Connections opened since the start.
    pub fn connections_opened(&self) -> u64 {
        self.tunnels().map(|upstream| upstream.connections_opened()).sum()
    }

    /// Closes their connections; see [`Upstream::close`].
    pub async fn close(&self) {
        let mut all: Vec<_> = self.tunnels().collect();
        all.sort_by_key(|upstream| std::cmp::Reverse(upstream.depth()));
        for upstream in all {
            upstream.close().await;
        }
    }
}
