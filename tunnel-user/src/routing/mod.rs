//! Which sink a flow gets, and whether its peer may have it.

pub mod flow;
pub mod index;
pub mod policy;
pub mod router;
pub mod sniff;
