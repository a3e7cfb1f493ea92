//! Envoy with the configurations of `examples/envoy/`, so that the examples are tested as users read them.
//!
//! # Invariants
//! - It has a certificate of its own from the world's CA, one thread and no administration port, and ends with its
//!   guard.
//! - It is not skipped: where Envoy is not installed, the test fails and says how to install it.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    netns::NetNs,
    pki::GATEWAY_ID,
    process::Process,
    programs, servers,
    world::{NET4, World},
};

/// Who Envoys are.
pub const ENVOY_ID: &str = "spiffe://test.tunnel/envoy";

/// A running Envoy.
#[derive(Debug)]
pub struct Envoy(Process);

impl Envoy {
    /// Starts one on `host` with the example of that name, and returns when it listens on `ports`. The example's
    /// gateway is at [`NET4`] here, its certificates are the world's; `changes` are what else is different.
    pub fn start(
        world: &World,
        host: &NetNs,
        example: &str,
        ports: &[u16],
        changes: &[(&str, &str)],
    ) -> Result<Self> {
        Self::start_with(world, host, example, ports, changes, |_| Ok(()))
    }

    /// The same, with something done to the command.
    pub fn start_with(
        world: &World,
        host: &NetNs,
        example: &str,
        ports: &[u16],
        changes: &[(&str, &str)],
        prepare: impl FnOnce(&mut Command) -> Result<()>,
    ) -> Result<Self> {
        let who = world.pki().issue(&format!("envoy-{example}"), ENVOY_ID, &["--ip", &NET4.to_string()])?;
        let (cert, key, ca) =
            (who.cert.display().to_string(), who.key.display().to_string(), who.ca.display().to_string());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/envoy").join(example);
        let mut config = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        for (said, meant) in changes {
            ensure!(config.contains(said), "{example} does not say {said:?}");
            config = config.replace(said, meant);
        }
        for (said, meant) in [
            ("10.9.0.1", NET4.to_string().as_str()),
            (": envoy.pem", &format!(": {cert}")),
            (": envoy-key.pem", &format!(": {key}")),
            (": ca.pem", &format!(": {ca}")),
            ("spiffe://example.org/gateway", GATEWAY_ID),
            ("spiffe://example.org/", "spiffe://test.tunnel/"),
        ] {
            config = config.replace(said, meant);
        }
        let config = world.file(example, config)?;
        let mut command = host.command(programs::envoy(&programs::tools())?);
        command.args(["--disable-hot-restart", "-l", "warn", "--concurrency", "1", "-c"]).arg(config);
        prepare(&mut command)?;
        servers::listening(host, ports, "envoy", world.folder(), command).map(Self)
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.0
    }
}
