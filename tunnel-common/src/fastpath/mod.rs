//! Decisions of the fast paths, on which the kernel moves bytes without the daemon. None depends on the bytes.
//!
//! # Invariants
//! - Bytes arrive once and in order, whether the kernel or the daemon moves them.
//! - What waits in front of a socket is at most a named bound.

pub mod bypass;
pub mod splice;
