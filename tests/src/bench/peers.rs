//! The programs that stand in this project's place.
//!
//! Enters: the project's tools folder and `PATH`. Leaves: where they are, and which versions. Invariant: a
//! program that is not there is said to be missing, with the remedy; nothing stands in for it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::arms::{Build, Capture, Far, Near};
use crate::programs;

/// What installs what is missing.
const REMEDY: &str = "cargo xtask bench --peers installs it";

/// Which of them are on this machine.
#[derive(Clone, Debug)]
pub struct Peers {
    envoy: Option<PathBuf>,
}

impl Peers {
    /// Looks for them; `tools` is the project's own folder of programs.
    pub fn find(tools: &Path) -> Self {
        // Where the Python package puts it, inside of a virtual environment.
        let libraries = std::fs::read_dir(tools.join("envoy/lib")).into_iter().flatten().flatten();
        let inside = "site-packages/envoy/_bin/envoy";
        let packaged = libraries.map(|python| python.path().join(inside)).find(|path| path.is_file());
        Self { envoy: packaged.or_else(|| programs::system("envoy").ok()) }
    }

    /// Where Envoy is.
    pub(super) fn envoy(&self) -> Result<&Path> {
        self.envoy.as_deref().with_context(|| format!("Envoy is not installed: {REMEDY}"))
    }

    /// What an arm lacks.
    pub(super) fn missing(&self, build: &Build) -> Option<String> {
        let lacks = |name: &str| programs::system(name).is_err().then(|| name.to_owned());
        let envoy = build.near == Some(Near::Envoy) || build.far == Some(Far::Envoy);
        let missing: Vec<String> = [
            (envoy && self.envoy.is_none()).then(|| "Envoy".to_owned()),
            (build.near == Some(Near::Redsocks)).then(|| lacks("redsocks")).flatten(),
            (build.far == Some(Far::Tinyproxy)).then(|| lacks("tinyproxy")).flatten(),
            (build.capture == Some(Capture::Iptables)).then(|| lacks("iptables-nft-restore")).flatten(),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!missing.is_empty()).then(|| format!("{} not installed: {REMEDY}", missing.join(", ")))
    }

    /// Versions of everything that can take part, as the programs say them.
    pub(super) fn versions(&self) -> BTreeMap<String, String> {
        let mut versions = BTreeMap::new();
        let mut note = |name: &str, program: Option<PathBuf>, flag: &str| {
            let Some(output) = program.and_then(|p| Command::new(p).arg(flag).output().ok()) else { return };
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            if let Some(line) =
                text.lines().map(str::trim).find(|line| line.contains(|c: char| c.is_ascii_digit()))
            {
                versions.insert(name.to_owned(), line.to_owned());
            }
        };
        let system = |name: &str| programs::system(name).ok();
        note("tunnel", programs::tunnel().ok(), "--version");
        note("Envoy", self.envoy.clone(), "--version");
        note("redsocks", system("redsocks"), "-v");
        note("tinyproxy", system("tinyproxy"), "-v");
        note("iptables", system("iptables-nft"), "--version");
        note("iperf3", system("iperf3"), "--version");
        versions
    }
}
