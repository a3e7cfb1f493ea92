//! Where the programs under test are.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

/// The `tunnel` program: `TUNNEL_BIN`, as `cargo xtask test` sets it, or the one built beside the tests.
pub fn tunnel() -> Result<PathBuf> {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let program = match env::var_os("TUNNEL_BIN") {
        Some(program) => PathBuf::from(program),
        None => beside("tunnel")?,
    };
    ensure!(
        program.is_absolute() && program.is_file(),
        "{} is no program: build it (cargo build --package tunnel-user), or run cargo xtask test",
        program.display()
    );
    Ok(program)
}

/// The application of the tests: see `src/bin/tt-app.rs`.
pub fn app() -> Result<PathBuf> {
    beside("tt-app")
}

/// The load generator: see `src/bin/tt-load.rs`.
pub fn load() -> Result<PathBuf> {
    beside("tt-load")
}

/// A Debian program that may lie outside of `PATH`.
pub fn system(name: &str) -> Result<PathBuf> {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed: cargo xtask setup installs it"))
}

/// Cargo puts programs one folder above the tests.
fn beside(name: &str) -> Result<PathBuf> {
    let test = env::current_exe()?;
    let found = test.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} was not built beside {}", test.display()))
}
