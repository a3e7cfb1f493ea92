//! Names that the tests and their application (`src/bin/tt-app.rs`) share.

/// Printed by an application that holds its connections and waits for a line on standard input.
pub const HELD: &str = "held";
