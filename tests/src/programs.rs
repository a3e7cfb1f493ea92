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

/// The application of the tests: see `src/bin/tt-app/`.
pub fn app() -> Result<PathBuf> {
    beside("tt-app")
}

/// What shows one behaviour on a socket: see `src/bin/tt-calls/`.
pub fn calls() -> Result<PathBuf> {
    beside("tt-calls")
}

/// The busy application: see `src/bin/tt-busy.rs`.
pub fn busy() -> Result<PathBuf> {
    beside("tt-busy")
}

/// A program that could call splice(2): see `src/bin/tt-splices.rs`.
pub fn splices() -> Result<PathBuf> {
    beside("tt-splices")
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

/// The project's own folder of programs: `TUNNEL_TOOLS_DIR`, or `.tools` in the checkout.
pub fn tools() -> PathBuf {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let elsewhere = env::var_os("TUNNEL_TOOLS_DIR").map(PathBuf::from);
    elsewhere.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools"))
}

/// The Python in whose environment the servers of identities are.
pub fn providers() -> Result<PathBuf> {
    let python = tools().join("providers/bin/python");
    let found = python.is_file().then_some(python);
    found.context("the servers of identities are not installed: cargo xtask setup --only test installs them")
}

/// The Python in whose environment the messages of OpenTelemetry are.
pub fn collector() -> Result<PathBuf> {
    let python = tools().join("collector/bin/python");
    let found = python.is_file().then_some(python);
    found.context("OpenTelemetry's messages are not installed: cargo xtask setup --only test installs them")
}

/// Envoy, in a folder of programs or in the system's.
pub fn envoy(tools: &Path) -> Result<PathBuf> {
    // Where the Python package puts it, inside of a virtual environment.
    let libraries = std::fs::read_dir(tools.join("envoy/lib")).into_iter().flatten().flatten();
    let inside = "site-packages/envoy/_bin/envoy";
    let packaged = libraries.map(|python| python.path().join(inside)).find(|path| path.is_file());
    let found = packaged.or_else(|| system("envoy").ok());
    found.context("Envoy is not installed: cargo xtask setup --only peers installs it")
}

/// The Python that has aioquic, in a folder of programs.
pub fn aioquic(tools: &Path) -> Result<PathBuf> {
    let python = tools.join("aioquic/bin/python");
    ensure!(python.is_file(), "aioquic is not installed: cargo xtask setup --only peers installs it");
    Ok(python)
}

/// Cargo puts programs one folder above the tests.
fn beside(name: &str) -> Result<PathBuf> {
    let test = env::current_exe()?;
    let found = test.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} was not built beside {}", test.display()))
}
