//! Source 1: connections of a control group that the kernel programs, or rules of the operator's, redirect to us.
//!
//! Enters: control groups and patterns. Leaves: accepted sockets with their original destinations.
//! Invariant: what is captured and cannot be carried is reset, never passed on as something else. It
//! never decides where a flow goes.

pub mod accept;
mod before;
pub mod bpf;
mod links;
pub mod redirect;
pub mod ring;
pub mod routes;
pub mod rules;
mod sources;
pub mod steer;
