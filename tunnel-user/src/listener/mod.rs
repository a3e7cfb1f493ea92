//! Source 2: CONNECT requests that peers send to us.
//!
//! Enters: TCP connections of tunnel peers. Leaves: streams, each with a target and the identity of the
//! peer; and answers. Invariant: nothing is asked for a peer before its certificate was verified, and one
//! peer's misbehaviour ends its own connection only. It never decides who may reach what.

pub mod h2;
pub mod handshakes;
pub mod request;
