//! What a process is made of: its start, its limits and its memory, its signals, its end.

pub mod books;
pub mod drain;
pub mod exit;
pub mod files;
pub mod limits;
pub mod memory;
pub mod nice;
pub mod panics;
pub mod random;
pub mod service;
pub mod signal;
