//! The capture source: connections of a control group that the kernel programs, or rules of the operator's, redirect to us.
//!
//! # Invariants
//! - What is captured and cannot be carried is reset, never passed on as something else.

pub mod accept;
mod before;
pub mod bpf;
pub mod explain;
mod links;
pub mod redirect;
pub mod ring;
pub mod routes;
pub mod rules;
mod sources;
pub mod steer;
