//! Who hands us a flow: a capture, or a peer with a CONNECT request.

pub mod capture;
pub mod listener;
