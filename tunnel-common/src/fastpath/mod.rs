//! What moves bytes in the kernel decides here, as pure functions that the programs only feed.

pub mod bypass;
