//! The fast paths: bytes that the kernel moves without asking the daemon.
//!
//! Enters: what a program sees of a socket's bytes, and what the daemon has told it. Leaves: what becomes of them,
//! and what the daemon may do next. Invariant: bytes arrive once and in order, whichever of both moves them, and
//! what waits in front of a socket is never more than a named bound. It never looks at the bytes.

pub mod bypass;
pub mod splice;
