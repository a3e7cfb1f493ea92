//! Types that every room may use. They do nothing.

pub mod admission;
pub mod end;
pub mod flow;
pub mod mark;
pub mod names;
pub mod san;
pub mod span;
pub mod trust;
