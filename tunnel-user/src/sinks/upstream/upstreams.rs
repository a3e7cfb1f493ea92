//! The upstreams of one worker: each in its place of the configuration, with the one that it goes through.
//!
//! # Invariants
//! - One that goes through another shares that other's connections with everybody; the connections of the innermost are
//!   closed first, because they are streams of the others'.

use std::{rc::Rc, sync::Arc};

use super::{
    itself::Itself,
    open::Upstream,
    settings::UpstreamSettings,
    underlay::{Underlay as _, Via},
};

/// What an upstream of the configuration is: another process, or this one.
#[derive(Clone, Debug)]
pub enum Next<U> {
    /// A gateway or proxy.
    Tunnel(U),
    /// This process.
    Itself(Arc<Itself>),
}

/// One that is to be there.
pub enum Wanted {
    /// It is there already, with its connections and those that it goes through.
    Made(Next<Rc<Upstream>>),
    /// It is new.
    New(Box<Next<UpstreamSettings>>),
}

/// See the module.
pub struct Upstreams(Vec<Option<Next<Rc<Upstream>>>>);

impl Upstreams {
    /// In the configuration's order. No connection is opened.
    pub fn new(wanted: Vec<Wanted>) -> Self {
        let mut made: Vec<_> = wanted.iter().map(|_| None).collect();
        // Whoever goes through another is made after it. Each round makes one at least, or there is none left: the
        // configuration admits no circle, and what was in one would not be there.
        for _ in &wanted {
            for (place, wanted) in wanted.iter().enumerate() {
                if made[place].is_none() {
                    made[place] = Self::make(wanted, &made);
                }
            }
        }
        Self(made)
    }

    fn make(wanted: &Wanted, made: &[Option<Next<Rc<Upstream>>>]) -> Option<Next<Rc<Upstream>>> {
        let new = match wanted {
            Wanted::Made(next) => return Some(next.clone()),
            Wanted::New(new) => &**new,
        };
        let settings = match new {
            Next::Itself(itself) => return Some(Next::Itself(Arc::clone(itself))),
            Next::Tunnel(settings) => settings,
        };
        let via = match settings.via {
            None => None,
            Some(place) => match made.get(place) {
                Some(Some(Next::Tunnel(outer))) => Some(Via::new(Rc::<Upstream>::clone(outer))),
                _ => return None,
            },
        };
        Some(Next::Tunnel(Rc::new(Upstream::new(settings.clone(), via))))
    }

    /// The one in this place of the configuration.
    pub fn get(&self, place: usize) -> Option<&Next<Rc<Upstream>>> {
        self.0.get(place)?.as_ref()
    }

    /// Those that are other processes.
    pub fn tunnels(&self) -> impl Iterator<Item = &Rc<Upstream>> {
        self.0.iter().filter_map(|next| match next {
            Some(Next::Tunnel(upstream)) => Some(upstream),
            _ => None,
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
