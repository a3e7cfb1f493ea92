//! The seed of each thread's random numbers (`fastrand`).
//!
//! The numbers pick endpoints, spread timers and name traces: they have to differ from those of every other worker and
//! node, and need not be secret.

use std::hash::{BuildHasher as _, RandomState};

/// Seeds this thread's generator with what the kernel's generator gave. `fastrand` by itself takes the time since boot and
/// the number of the thread, which nodes that boot together share, and then their traces would have the same identifiers.
pub fn seed() {
    // The keys of the standard library's tables come from getrandom(2).
    fastrand::seed(RandomState::new().hash_one(0));
}
