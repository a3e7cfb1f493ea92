//! How much a test does: what every merge has time for, or more.
//!
//! `cargo xtask test --thorough`, which is what `cargo xtask verify` runs, says so by an environment variable.

use std::env;

/// Set by `cargo xtask test --thorough`.
const THOROUGH: &str = "TUNNEL_TEST_THOROUGH";

/// The first of both in the suite of every merge, the second where tests are to be thorough.
pub fn amount<T>(brief: T, thorough: T) -> T {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let thorough_wanted = env::var_os(THOROUGH).is_some();
    if thorough_wanted { thorough } else { brief }
}
