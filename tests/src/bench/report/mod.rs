//! What people and programs get of a [`Report`]: a table, plots, a page, a comparison, and the file itself.
//!
//! The same report gives the same bytes. [`save`] and [`load`] alone touch files, [`Progress`] alone the terminal.
//!
//! # Invariants
//! - What was not measured is named as such, never drawn or printed as 0.
//! - Commands, versions and errors are escaped wherever they go.
//!
//! [`Report`]: super::model::Report

pub use compare::{Basis, Change, Comparison, FEWEST, Verdict, beside, compare};
pub use files::{ReadError, WriteError, load, save};
pub use html::html;
pub use markdown::{PublishError, publish};
pub use plots::{Plot, plots, ratios};
pub use progress::Progress;
pub use table::table;

mod compare;
mod files;
#[cfg(test)]
mod fixture;
mod html;
mod markdown;
mod number;
mod plots;
mod progress;
mod table;
mod words;
