//! Types that every room may use. They do nothing.

pub mod flow;
