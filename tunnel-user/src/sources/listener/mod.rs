//! Source 2: CONNECT requests that peers send to us.
//!
//! Enters: TCP connections of tunnel peers. Leaves: streams and requests, each with a target and the
//! identity of the peer, if it has proved one; and answers. Invariant: where a listener speaks TLS, nothing is
//! asked for a peer before its certificate was verified; one peer's misbehaviour ends its own connection only. It never decides who may reach what.

pub mod accept;
pub mod h1;
pub mod h2;
pub mod handshakes;
pub mod request;
