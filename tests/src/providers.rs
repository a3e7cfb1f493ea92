//! Servers that push identities, whose wire types are not ours: a SPIFFE Workload API and a secret discovery service.
//!
//! # Invariants
//! - A server ends with its guard.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{netns::NetNs, pki::Credentials, process::Process, programs, world::World};

/// A server of identities.
#[derive(Debug)]
pub struct Provider {
    process: Process,
    socket: PathBuf,
    start: (&'static str, String),
}

impl Provider {
    /// A Workload API that sends `state` to whoever asks.
    pub fn workload_api(world: &World, host: &NetNs, name: &str, state: &Value) -> Result<Self> {
        Self::start(world, host, "workload_api", name, state)
    }

    /// A secret discovery service that sends `state` to whoever asks.
    pub fn sds(world: &World, host: &NetNs, name: &str, state: &Value) -> Result<Self> {
        Self::start(world, host, "sds", name, state)
    }

    fn start(world: &World, host: &NetNs, kind: &'static str, name: &str, state: &Value) -> Result<Self> {
        let socket = world.folder().join(format!("{name}.sock"));
        let process = Self::spawn(world, host, kind, name, &socket)?;
        let mut provider = Self { process, socket, start: (kind, name.to_owned()) };
        provider.send(state)?;
        provider.process.wait_for_line("listening")?;
        Ok(provider)
    }

    fn spawn(world: &World, host: &NetNs, kind: &str, name: &str, socket: &Path) -> Result<Process> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("providers/{kind}.py"));
        let mut command = host.command(programs::providers()?);
        command.arg(script).arg(socket);
        Process::spawn_with_input(name, world.folder(), command)
    }

    /// Sends another state to everybody.
    pub fn send(&mut self, state: &Value) -> Result<()> {
        self.process.tell(&state.to_string())
    }

    /// Kills it; its socket stays.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Starts it again, on the same socket.
    pub fn start_again(&mut self, world: &World, host: &NetNs, state: &Value) -> Result<()> {
        let _gone = std::fs::remove_file(&self.socket);
        let (kind, name) = &self.start;
        self.process = Self::spawn(world, host, kind, name, &self.socket)?;
        self.send(state)?;
        self.process.wait_for_line("listening").map(drop)
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its address, as a configuration names it.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }
}

/// An identity as a Workload API has it.
pub fn svid(id: &str, who: &Credentials) -> Value {
    json!({ "id": id, "cert": who.cert, "key": who.key, "bundle": who.ca })
}

/// The state of a Workload API with this identity only.
pub fn svids(id: &str, who: &Credentials) -> Value {
    json!({ "svids": [svid(id, who)] })
}

/// The state of a secret discovery service with a certificate, named so, and the roots of its CA.
pub fn secrets(name: &str, who: &Credentials) -> Value {
    json!({ name: { "cert": who.cert, "key": who.key }, "ROOTCA": { "ca": who.ca } })
}
