//! The endpoints of one upstream on one worker, and how each fares.
//!
//! # Invariants
//! - An endpoint that stays from one set to the next keeps everything that is known of it.
//! - One that is gone gets no new flows, and its flows go on.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use tokio::{sync::Notify, task::AbortHandle};

use super::{
    discovery::{EndpointSet, Site},
    permit::{Issuer, Permit},
    pick,
};
use crate::config::Percent;

/// One endpoint, and how it fares.
#[derive(Debug)]
pub struct Endpoint {
    /// Where it is.
    pub site: Site,
    /// Its number for consistent hashing.
    seed: u64,
    /// Its flows.
    active: Cell<usize>,
    /// Connections in a row that failed.
    pub(super) failures: Cell<u32>,
    /// Answers of a gateway's in a row that it was at fault for.
    pub(super) refusals: Cell<u32>,
    /// How often in a row it was ejected, without a flow that was opened in between.
    pub(super) ejections: Cell<u32>,
    ejected: Cell<bool>,
    unhealthy: Cell<bool>,
    /// What failed last.
    last: RefCell<String>,
    /// Its checks and probes, which end with it.
    tasks: RefCell<Vec<AbortHandle>>,
}

impl Endpoint {
    fn new(site: Site) -> Rc<Self> {
        Rc::new(Self {
            seed: pick::hash(&site.at),
            site,
            active: Cell::default(),
            failures: Cell::default(),
            refusals: Cell::default(),
            ejections: Cell::default(),
            ejected: Cell::default(),
            unhealthy: Cell::default(),
            last: RefCell::default(),
            tasks: RefCell::default(),
        })
    }

    /// Whether it may get new flows.
    pub fn is_available(&self) -> bool {
        !self.ejected.get() && !self.unhealthy.get()
    }

    /// Whether it is ejected for what flows have met there.
    pub fn is_ejected(&self) -> bool {
        self.ejected.get()
    }

    /// Whether checks have found it unhealthy.
    pub fn is_unhealthy(&self) -> bool {
        self.unhealthy.get()
    }

    /// Its flows.
    pub fn active(&self) -> usize {
        self.active.get()
    }

    /// A permit for one more flow.
    pub fn permit(self: &Rc<Self>) -> Permit {
        self.active.set(self.active.get() + 1);
        let issuer: Rc<dyn Issuer> = Rc::<Self>::clone(self);
        Permit::new(issuer)
    }

    /// Its number for consistent hashing.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// What failed last; empty where nothing has.
    pub fn last_error(&self) -> String {
        self.last.borrow().clone()
    }

    /// Notes what failed.
    pub(super) fn note(&self, why: &str) {
        why.clone_into(&mut self.last.borrow_mut());
    }

    /// Has a task end with it.
    pub(super) fn attach_task(&self, task: AbortHandle) {
        let mut tasks = self.tasks.borrow_mut();
        tasks.retain(|t| !t.is_finished());
        tasks.push(task);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        for task in self.tasks.get_mut() {
            task.abort();
        }
    }
}

impl Issuer for Endpoint {
    fn returned(&self) {
        self.active.set(self.active.get() - 1);
    }
}

/// Endpoints that do not change while they are looked at.
pub type List = Rc<[Rc<Endpoint>]>;

/// The endpoints of one upstream.
pub struct Endpoints {
    all: RefCell<List>,
    available: RefCell<List>,
    /// Why there are none, if there are none.
    reason: RefCell<String>,
    /// Whether anything is known yet.
    known: Cell<bool>,
    /// How often one was ejected.
    ejections: Cell<u64>,
    /// It is, now.
    settled: Notify,
}

impl Default for Endpoints {
    fn default() -> Self {
        let none = || RefCell::new(List::from([]));
        Self {
            all: none(),
            available: none(),
            reason: RefCell::default(),
            known: Cell::default(),
            ejections: Cell::default(),
            settled: Notify::new(),
        }
    }
}

/// What a new set changes.
#[derive(Debug, Default)]
pub struct Changes {
    /// Those that are new.
    pub came: Vec<Rc<Endpoint>>,
    /// Those that are gone.
    pub left: Vec<Rc<Endpoint>>,
}

impl Endpoints {
    /// All of them.
    pub fn all(&self) -> List {
        Rc::clone(&self.all.borrow())
    }

    /// Those that may get new flows.
    pub fn available(&self) -> List {
        Rc::clone(&self.available.borrow())
    }

    /// Whether anything is known of them.
    pub fn are_known(&self) -> bool {
        self.known.get()
    }

    /// Ready once something is known of them.
    pub async fn settled(&self) {
        while !self.known.get() {
            self.settled.notified().await;
        }
    }

    /// Takes a new set.
    pub fn replace(&self, known: &EndpointSet) -> Changes {
        let before = self.all();
        let mut changes = Changes::default();
        let same = |site: &Site| before.iter().find(|e| e.site == *site);
        let all: List = known
            .sites
            .iter()
            .map(|site| {
                same(site).cloned().unwrap_or_else(|| {
                    let new = Endpoint::new(site.clone());
                    changes.came.push(Rc::clone(&new));
                    new
                })
            })
            .collect();
        let stays = |endpoint: &Rc<Endpoint>| all.iter().any(|e| Rc::ptr_eq(e, endpoint));
        changes.left = before.iter().filter(|e| !stays(e)).cloned().collect();
        for gone in &changes.left {
            for task in gone.tasks.borrow().iter() {
                task.abort();
            }
        }
        self.all.replace(all);
        known.unavailable.clone_into(&mut self.reason.borrow_mut());
        self.sort();
        self.known.set(true);
        self.settled.notify_waiters();
        changes
    }

    /// Ejects an endpoint, if no more than this share is ejected then. Whether it was.
    pub fn eject(&self, endpoint: &Endpoint, at_most: Percent) -> bool {
        let all = self.all();
        let ejected = all.iter().filter(|e| e.is_ejected()).count();
        let there = all.iter().any(|e| std::ptr::eq(&**e, endpoint));
        if !there || endpoint.is_ejected() || ejected >= at_most.of(all.len()) {
            return false;
        }
        endpoint.ejected.set(true);
        self.ejections.set(self.ejections.get() + 1);
        self.sort();
        true
    }

    /// How often one was ejected.
    pub fn ejections(&self) -> u64 {
        self.ejections.get()
    }

    /// Takes it back.
    pub fn readmit(&self, endpoint: &Endpoint) {
        endpoint.failures.set(0);
        endpoint.refusals.set(0);
        endpoint.ejected.set(false);
        self.sort();
    }

    /// What its checks say.
    pub fn set_unhealthy(&self, endpoint: &Endpoint, unhealthy: bool) {
        endpoint.unhealthy.set(unhealthy);
        self.sort();
    }

    /// Why nobody can be asked: what failed last, or why there is nobody.
    pub fn unavailable(&self) -> Unavailable {
        match &*self.all.borrow() {
            none if none.is_empty() => Unavailable::Empty(self.reason.borrow().clone()),
            all => Unavailable::Failing(
                all.iter().map(|e| e.last.borrow().clone()).next_back().unwrap_or_default(),
            ),
        }
    }

    fn sort(&self) {
        let available = self.all.borrow().iter().filter(|e| e.is_available()).cloned().collect();
        self.available.replace(available);
    }
}

/// Why nobody can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// There is no endpoint, for this reason.
    Empty(String),
    /// All are ejected or unhealthy; this failed last.
    Failing(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(sites: &[&str]) -> EndpointSet {
        let site = |s: &&str| Site::from(s.parse::<crate::model::flow::Target>().unwrap());
        EndpointSet::new(sites.iter().map(site), "nobody said any".to_owned())
    }

    fn shown(list: &List) -> Vec<String> {
        list.iter().map(|e| e.site.at.to_string()).collect()
    }

    fn percent(text: &str) -> Percent {
        let text = format!(
            "[[listener]]\naddress = \"[::]:1\"\ntls = false\n[[route]]\nto = [{{ upstream = \"u\" }}]\n[[upstream]]\n\
             name = \"u\"\nendpoints = [\"a.test:1\"]\ntls = false\noutlier_detection.max_ejection_percent = {text}\n"
        );
        let file = std::path::Path::new("test.toml");
        let config = crate::config::Config::parse(&text, file, crate::config::CheckFiles::No);
        config.unwrap_or_else(|e| panic!("{e}")).upstreams[0].outlier_detection.max_ejection_percent
    }

    #[test]
    fn an_endpoint_that_stays_keeps_its_state_and_one_that_is_gone_gets_no_new_flows() {
        let endpoints = Endpoints::default();
        assert!(!endpoints.are_known());
        let came = endpoints.replace(&known(&["10.0.0.1:1", "10.0.0.2:1"])).came;
        assert!(endpoints.are_known());
        let gone = Rc::clone(&came[0]);
        let _permits = came.iter().map(Endpoint::permit).collect::<Vec<_>>();
        assert!(endpoints.eject(&came[1], Percent::ALL));
        let changes = endpoints.replace(&known(&["10.0.0.3:1", "10.0.0.2:1"]));
        assert_eq!((changes.came.len(), changes.left.len()), (1, 1));
        assert!(Rc::ptr_eq(&changes.left[0], &gone));
        assert_eq!(shown(&endpoints.all()), ["10.0.0.3:1", "10.0.0.2:1"]);
        assert_eq!(shown(&endpoints.available()), ["10.0.0.3:1"], "still ejected");
        assert_eq!(endpoints.all()[1].active(), 1);
        assert_eq!(gone.active(), 1, "its flow goes on");
        assert!(!endpoints.eject(&gone, Percent::ALL), "there is nothing to leave it out of");
    }

    #[test]
    fn an_endpoint_is_available_when_neither_flows_nor_checks_say_otherwise() {
        let endpoints = Endpoints::default();
        let came = endpoints.replace(&known(&["10.0.0.1:1"])).came;
        endpoints.set_unhealthy(&came[0], true);
        came[0].note("no answer");
        assert!(endpoints.eject(&came[0], Percent::ALL) && !endpoints.eject(&came[0], Percent::ALL));
        endpoints.readmit(&came[0]);
        assert!(endpoints.available().is_empty());
        assert_eq!(endpoints.unavailable(), Unavailable::Failing("no answer".to_owned()));
        endpoints.set_unhealthy(&came[0], false);
        assert_eq!(endpoints.available().len(), 1);
        endpoints.replace(&known(&[]));
        assert_eq!(endpoints.unavailable(), Unavailable::Empty("nobody said any".to_owned()));
    }

    /// Ejection leaves at least as many endpoints in use as `max_ejection_percent` says.
    #[test]
    fn no_more_than_the_share_is_left_out() {
        let endpoints = Endpoints::default();
        let came = endpoints.replace(&known(&["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"])).came;
        let half = percent("50");
        assert!(endpoints.eject(&came[0], half));
        assert!(!endpoints.eject(&came[1], half));
        endpoints.readmit(&came[0]);
        assert!(endpoints.eject(&came[1], half));
        endpoints.replace(&known(&["10.0.0.4:1"]));
        assert!(!endpoints.eject(&endpoints.all()[0], half), "the last one stays");
    }
}
