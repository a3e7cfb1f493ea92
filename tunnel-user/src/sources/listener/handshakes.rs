//! Permits for connections whose handshake is not complete.
//!
//! # Invariants
//! - Never more than [`HANDSHAKES_MAX`] at once. When all are taken the oldest goes: a peer that means well has finished by
//!   then, and one that says nothing keeps nobody out.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
};

use tokio::sync::oneshot;

/// Handshakes of one listener and worker. A core computes about a thousand in a second; more at once would
/// only make each other late.
pub const HANDSHAKES_MAX: usize = 256;

/// The places of one listener on one worker.
#[derive(Clone, Default)]
pub struct Handshakes(Rc<Places>);

#[derive(Default)]
struct Places {
    next: Cell<u64>,
    /// The oldest first. Dropping a sender tells its place.
    taken: RefCell<VecDeque<(u64, oneshot::Sender<()>)>>,
}

/// One place; free again when dropped.
pub struct Place {
    places: Rc<Places>,
    number: u64,
    needed: oneshot::Receiver<()>,
}

impl Handshakes {
    /// A place, which may be somebody else's until now.
    pub fn place(&self) -> Place {
        let places = Rc::clone(&self.0);
        let number = places.next.get();
        places.next.set(number + 1);
        let (holds, needed) = oneshot::channel();
        let mut taken = places.taken.borrow_mut();
        if taken.len() >= HANDSHAKES_MAX {
            taken.pop_front();
        }
        taken.push_back((number, holds));
        drop(taken);
        Place { places, number, needed }
    }
}

impl Place {
    /// Ready when the place is needed for another.
    pub async fn needed(&mut self) {
        // Nothing is ever sent: the other end goes away.
        let _gone = (&mut self.needed).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.borrow_mut();
        if let Ok(at) = taken.binary_search_by_key(&self.number, |(number, _)| *number) {
            taken.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn when_all_places_are_taken_the_oldest_goes_and_no_other() {
        let handshakes = Handshakes::default();
        let mut places: Vec<_> = (0..HANDSHAKES_MAX).map(|_| handshakes.place()).collect();
        // One finishes: its place is the next one's, and nobody has to go.
        drop(places.remove(3));
        places.push(handshakes.place());
        let told = |place: &mut Place| place.needed.try_recv() != Err(oneshot::error::TryRecvError::Empty);
        assert!(!places.iter_mut().any(told));
        places.push(handshakes.place());
        assert!(!places.iter_mut().skip(1).any(told));
        places.remove(0).needed().await;
        assert_eq!(handshakes.0.taken.borrow().len(), HANDSHAKES_MAX);
        drop(places);
        assert!(handshakes.0.taken.borrow().is_empty());
    }
}
