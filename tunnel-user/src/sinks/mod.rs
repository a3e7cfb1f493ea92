//! Where a flow goes: to its target, or through an upstream.

pub mod dial;
pub mod upstream;
