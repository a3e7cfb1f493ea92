//! Permits for connections whose handshake is not complete.
//!
//! # Invariants
//! - Never more than [`HANDSHAKES_MAX`] at once. When all are taken one of them goes: of a source that has more than half, if there
//!   is one; of those that have come the least far; of the source that has the most; the oldest. So silent connections keep out
//!   nobody who speaks, and no source keeps out others, whatever it says.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv6Addr},
    rc::Rc,
};

use tokio::sync::oneshot;

use crate::transport::record::Pace;

/// Handshakes of one listener and worker. A core computes about a thousand in a second; more at once would
/// only make each other late.
pub const HANDSHAKES_MAX: usize = 256;

/// The places of one listener on one worker.
#[derive(Clone, Default)]
pub struct Handshakes(Rc<Places>);

#[derive(Default)]
struct Places {
    next: Cell<u64>,
    /// The oldest first.
    taken: RefCell<VecDeque<Taken>>,
    /// Of each source.
    sources: RefCell<HashMap<IpAddr, usize>>,
}

struct Taken {
    number: u64,
    source: IpAddr,
    pace: Pace,
    /// Dropped, it tells its place.
    _holds: oneshot::Sender<()>,
}

/// One place; free again when dropped.
pub struct Place {
    places: Rc<Places>,
    number: u64,
    pace: Pace,
    needed: oneshot::Receiver<()>,
}

/// Whose it is: an address, and of IPv6 the network, of which a host has as many addresses as it likes (RFC 4291 section 2.5.4).
fn source_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        ip => ip,
    }
}

impl Handshakes {
    /// A place for a connection from this address, which may be somebody else's until now.
    pub fn place(&self, ip: IpAddr) -> Place {
        let places = Rc::clone(&self.0);
        let number = places.next.get();
        places.next.set(number + 1);
        let (holds, needed) = oneshot::channel();
        if places.taken.borrow().len() >= HANDSHAKES_MAX {
            places.evict();
        }
        let (source, pace) = (source_of(ip), Pace::default());
        *places.sources.borrow_mut().entry(source).or_default() += 1;
        places.taken.borrow_mut().push_back(Taken { number, source, pace: pace.clone(), _holds: holds });
        Place { places, number, pace, needed }
    }
}

impl Places {
    fn evict(&self) {
        let sources = self.sources.borrow();
        let taken = self.taken.borrow();
        let rank = |taken: &Taken| {
            let others = sources.get(&taken.source).copied().unwrap_or_default();
            (others <= HANDSHAKES_MAX / 2, taken.pace.stage(), HANDSHAKES_MAX.saturating_sub(others))
        };
        // Of equal ones the first, which is the oldest.
        let victim = taken.iter().enumerate().min_by_key(|(_, taken)| rank(taken)).map(|(at, _)| at);
        drop((sources, taken));
        if let Some(at) = victim {
            self.remove(at);
        }
    }

    fn remove(&self, at: usize) {
        let Some(gone) = self.taken.borrow_mut().remove(at) else { return };
        let mut sources = self.sources.borrow_mut();
        if let Some(places) = sources.get_mut(&gone.source) {
            *places -= 1;
            if *places == 0 {
                sources.remove(&gone.source);
            }
        }
    }
}

impl Place {
    /// How far its handshake has come, to be told.
    pub fn pace(&self) -> Pace {
        self.pace.clone()
    }

    /// Ready when the place is needed for another.
    pub async fn needed(&mut self) {
        // Nothing is ever sent: the other end goes away.
        let _gone = (&mut self.needed).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let at = self.places.taken.borrow().binary_search_by_key(&self.number, |taken| taken.number);
        if let Ok(at) = at {
            self.places.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::record::Stage;

    const NEAR: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const FAR: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    fn told(place: &mut Place) -> bool {
        place.needed.try_recv() != Err(oneshot::error::TryRecvError::Empty)
    }

    #[tokio::test]
    async fn when_all_places_are_taken_the_oldest_of_equals_goes_and_no_other() {
        let handshakes = Handshakes::default();
        let mut places: Vec<_> = (0..HANDSHAKES_MAX).map(|_| handshakes.place(NEAR)).collect();
        // One finishes: its place is the next one's, and nobody has to go.
        drop(places.remove(3));
        places.push(handshakes.place(NEAR));
        assert!(!places.iter_mut().any(told));
        places.push(handshakes.place(NEAR));
        assert!(!places.iter_mut().skip(1).any(told));
        places.remove(0).needed().await;
        assert_eq!(handshakes.0.taken.borrow().len(), HANDSHAKES_MAX);
        drop(places);
        assert!(handshakes.0.taken.borrow().is_empty() && handshakes.0.sources.borrow().is_empty());
    }

    #[test]
    fn silent_ones_go_before_those_that_have_spoken_however_old() {
        let handshakes = Handshakes::default();
        let mut spoken = handshakes.place(NEAR);
        spoken.pace().reached(Stage::Spoken);
        let mut answered = handshakes.place(NEAR);
        answered.pace().reached(Stage::Answered);
        let mut silent: Vec<_> = (0..4 * HANDSHAKES_MAX).map(|_| handshakes.place(NEAR)).collect();
        assert!(!told(&mut spoken) && !told(&mut answered));
        assert_eq!(
            silent.iter_mut().filter_map(|place| told(place).then_some(())).count(),
            3 * HANDSHAKES_MAX + 2
        );
    }

    #[test]
    fn a_source_that_has_most_places_loses_them_to_others() {
        let handshakes = Handshakes::default();
        let mut few: Vec<_> = (0..8).map(|_| handshakes.place(FAR)).collect();
        let _many: Vec<_> = (0..4 * HANDSHAKES_MAX).map(|_| handshakes.place(NEAR)).collect();
        assert!(!few.iter_mut().any(told));
        // A network of IPv6 is one source.
        let v6 = |host: u16| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, host));
        let _more: Vec<_> = (0..2000).map(|host| handshakes.place(v6(host))).collect();
        assert!(!few.iter_mut().any(told));
    }

    #[test]
    fn a_source_whose_handshakes_stop_half_way_keeps_out_nobody_who_has_just_come() {
        let handshakes = Handshakes::default();
        let half_way = || {
            let place = handshakes.place(NEAR);
            place.pace().reached(Stage::Answered);
            place
        };
        let mut many: Vec<_> = (0..HANDSHAKES_MAX).map(|_| half_way()).collect();
        let mut new = handshakes.place(FAR);
        many.extend((0..HANDSHAKES_MAX).map(|_| half_way()));
        assert!(!told(&mut new));
    }
}
