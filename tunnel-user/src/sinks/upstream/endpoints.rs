//! The endpoints of one upstream on one worker, and how each fares.
//!
//! Enters: sets of endpoints, as they are known. Leaves: those that are well, for a flow to be given to. Invariant: an
//! endpoint that stays from one set to the next keeps everything that is known of it; one that is gone gets no new
//! flows, and its flows go on. It never connects.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use tokio::{sync::Notify, task::AbortHandle};

use super::{
    discovery::{Known, Site},
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
    /// Its checks, and its way back.
    tended: RefCell<Vec<AbortHandle>>,
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
            tended: RefCell::default(),
        })
    }

    /// Whether it may get new flows.
    pub fn is_well(&self) -> bool {
        !self.ejected.get() && !self.unhealthy.get()
    }

    /// Whether it is left out for what flows have met there.
    pub fn is_ejected(&self) -> bool {
        self.ejected.get()
    }

    /// Whether it is left out for what checks have found.
    pub fn is_unhealthy(&self) -> bool {
        self.unhealthy.get()
    }

    /// Its flows.
    pub fn active(&self) -> usize {
        self.active.get()
    }

    /// Its number for consistent hashing.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Notes what failed.
    pub(super) fn note(&self, why: &str) {
        why.clone_into(&mut self.last.borrow_mut());
    }

    /// Has a task end with it.
    pub(super) fn tend(&self, task: AbortHandle) {
        let mut tended = self.tended.borrow_mut();
        tended.retain(|t| !t.is_finished());
        tended.push(task);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        for task in self.tended.get_mut() {
            task.abort();
        }
    }
}

/// A place among the flows of an endpoint.
pub struct Turn(Rc<Endpoint>);

impl Turn {
    /// One more.
    pub fn new(endpoint: &Rc<Endpoint>) -> Self {
        endpoint.active.set(endpoint.active.get() + 1);
        Self(Rc::clone(endpoint))
    }

    /// Whose.
    pub fn endpoint(&self) -> &Rc<Endpoint> {
        &self.0
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
    }
}

/// Endpoints that do not change while they are looked at.
pub type List = Rc<[Rc<Endpoint>]>;

/// The endpoints of one upstream.
pub struct Endpoints {
    all: RefCell<List>,
    well: RefCell<List>,
    /// Why there are none, if there are none.
    lack: RefCell<String>,
    /// Whether anything is known yet.
    known: Cell<bool>,
    /// It is, now.
    settled: Notify,
}

impl Default for Endpoints {
    fn default() -> Self {
        let none = || RefCell::new(List::from([]));
        Self {
            all: none(),
            well: none(),
            lack: RefCell::default(),
            known: Cell::default(),
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
    pub fn well(&self) -> List {
        Rc::clone(&self.well.borrow())
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
    pub fn replace(&self, known: &Known) -> Changes {
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
            for task in gone.tended.borrow().iter() {
                task.abort();
            }
        }
        self.all.replace(all);
        known.lack.clone_into(&mut self.lack.borrow_mut());
        self.sort();
        self.known.set(true);
        self.settled.notify_waiters();
        changes
    }

    /// Leaves an endpoint out, if no more than this share is left out then. Whether it was.
    pub fn eject(&self, endpoint: &Endpoint, at_most: Percent) -> bool {
        let all = self.all();
        let ejected = all.iter().filter(|e| e.is_ejected()).count();
        let there = all.iter().any(|e| std::ptr::eq(&**e, endpoint));
        if !there || endpoint.is_ejected() || ejected >= at_most.of(all.len()) {
            return false;
        }
        endpoint.ejected.set(true);
        self.sort();
        true
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
    pub fn lack(&self) -> Lack {
        match &*self.all.borrow() {
            none if none.is_empty() => Lack::Empty(self.lack.borrow().clone()),
            all => Lack::Unwell(all.iter().map(|e| e.last.borrow().clone()).next_back().unwrap_or_default()),
        }
    }

    fn sort(&self) {
        let well = self.all.borrow().iter().filter(|e| e.is_well()).cloned().collect();
        self.well.replace(well);
    }
}

/// Why nobody can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lack {
    /// There is no endpoint, for this reason.
    Empty(String),
    /// None is well; this failed last.
    Unwell(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(sites: &[&str]) -> Known {
        let site = |s: &&str| Site::from(s.parse::<crate::model::flow::Target>().unwrap());
        Known::new(sites.iter().map(site), "nobody said any".to_owned())
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
        let turn = Turn::new(&came[0]);
        let _other = Turn::new(&came[1]);
        assert!(endpoints.eject(&came[1], Percent::ALL));
        let changes = endpoints.replace(&known(&["10.0.0.3:1", "10.0.0.2:1"]));
        assert_eq!((changes.came.len(), changes.left.len()), (1, 1));
        assert!(Rc::ptr_eq(&changes.left[0], turn.endpoint()));
        assert_eq!(shown(&endpoints.all()), ["10.0.0.3:1", "10.0.0.2:1"]);
        assert_eq!(shown(&endpoints.well()), ["10.0.0.3:1"], "still ejected");
        assert_eq!(endpoints.all()[1].active(), 1);
        assert_eq!(turn.endpoint().active(), 1, "its flow goes on");
        assert!(!endpoints.eject(turn.endpoint(), Percent::ALL), "there is nothing to leave it out of");
    }

    #[test]
    fn an_endpoint_is_well_when_neither_flows_nor_checks_say_otherwise() {
        let endpoints = Endpoints::default();
        let came = endpoints.replace(&known(&["10.0.0.1:1"])).came;
        endpoints.set_unhealthy(&came[0], true);
        came[0].note("no answer");
        assert!(endpoints.eject(&came[0], Percent::ALL) && !endpoints.eject(&came[0], Percent::ALL));
        endpoints.readmit(&came[0]);
        assert!(endpoints.well().is_empty());
        assert_eq!(endpoints.lack(), Lack::Unwell("no answer".to_owned()));
        endpoints.set_unhealthy(&came[0], false);
        assert_eq!(endpoints.well().len(), 1);
        endpoints.replace(&known(&[]));
        assert_eq!(endpoints.lack(), Lack::Empty("nobody said any".to_owned()));
    }

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
