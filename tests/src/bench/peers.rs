//! The programs that stand in this project's place: where they are, in the project's tools folder and `PATH`, and which versions.
//!
//! A program that is missing is named with the remedy; nothing stands in for it.

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
    other: Option<PathBuf>,
}

impl Peers {
    /// Looks for them; `tools` is the project's own folder of programs.
    pub fn find(tools: &Path) -> Self {
        Self { envoy: programs::envoy(tools).ok(), other: None }
    }

    /// As if none were there.
    pub fn none() -> Self {
        Self { envoy: None, other: None }
    }

    /// With another build of `tunnel` to compare with.
    pub fn beside(self, tunnel: PathBuf) -> Self {
        Self { other: Some(tunnel), ..self }
    }

    /// The `tunnel` of an arm.
    pub(super) fn tunnel(&self, build: &Build) -> Result<PathBuf> {
        if !build.other {
            return programs::tunnel();
        }
        self.other.clone().context("an arm with another build of tunnel, and none was named")
    }

    /// Where Envoy is.
    pub(super) fn envoy(&self) -> Result<&Path> {
        self.envoy.as_deref().with_context(|| format!("Envoy is not installed: {REMEDY}"))
    }

    /// What an arm lacks.
    pub(super) fn missing(&self, build: &Build) -> Option<String> {
        let lacks = |name: &str| programs::system(name).is_err().then(|| name.to_owned());
        let envoy = matches!(build.near, Some(Near::Envoy | Near::EnvoyH3))
            || matches!(build.far, Some(Far::Envoy | Far::EnvoyH3));
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
            if let Some(version) = version(&String::from_utf8_lossy(&text)) {
                versions.insert(name.to_owned(), version.to_owned());
            }
        };
        let system = |name: &str| programs::system(name).ok();
        note("tunnel", programs::tunnel().ok(), "--version");
        note("Envoy", self.envoy.clone(), "--version");
        note("redsocks", system("redsocks"), "-v");
        note("tinyproxy", system("tinyproxy"), "-v");
        note("iptables", system("iptables-nft"), "--version");
        note("iperf3", system("iperf3"), "--version");
        if let Some(commit) = commit() {
            versions.insert("commit".to_owned(), commit);
        }
        versions
    }
}

/// The first word that looks like one: `1.40.0` of `envoy version: 9e55…/1.40.0/Clean`, `1.8.9` of `iptables v1.8.9`.
fn version(text: &str) -> Option<&str> {
    let words = text.split(|c: char| c.is_whitespace() || c == '/');
    words.map(|word| word.trim_start_matches('v')).find(|word| {
        let mut parts = word.split('.');
        let number = |part: Option<&str>| part.is_some_and(|p| p.starts_with(|c: char| c.is_ascii_digit()));
        number(parts.next()) && number(parts.next())
    })
}

/// What was built, if it was built in a checkout.
fn commit() -> Option<String> {
    let mut git = Command::new("git");
    git.args(["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty", "--exclude=*"]);
    let output = git.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_what_programs_say() {
        for (text, found) in [
            ("/opt/python3.11/bin/envoy  version: 9e55/1.40.0/Clean/RELEASE/BoringSSL", Some("1.40.0")),
            ("iptables v1.8.9 (nf_tables)", Some("1.8.9")),
            ("redsocks/0.5", Some("0.5")),
            ("iperf 3.12 (cJSON 1.7.15)", Some("3.12")),
            ("tunnel 0.1.0", Some("0.1.0")),
            ("unknown option", None),
        ] {
            assert_eq!(version(text), found, "{text}");
        }
    }
}
