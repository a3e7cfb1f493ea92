//! What can go wrong with kernel programs and their maps.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use super::{blockers, btf::OffsetsError, map::Mismatch};

/// What went wrong with the kernel side. None of it is the application's or a peer's fault.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The object could not be parsed or its maps not be made.
    #[error("cannot load the maps of the programs: {0}")]
    Load(#[source] Box<EbpfError>),
    /// The verifier or the kernel refused a program.
    #[error("the kernel rejected program {name}: {source}")]
    Program {
        /// The program.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<ProgramError>,
    },
    /// The object has no such program or map: it was built from other sources than this daemon.
    #[error("the BPF object has no {0}: it was built for another version")]
    Missing(&'static str),
    /// A map refused an entry.
    #[error("map {name}: {source}")]
    Map {
        /// The map.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: MapError,
    },
    /// A map could not be mapped or waited for.
    #[error("map {name}: {source}")]
    MapIo {
        /// The map.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel does not say where it keeps the names of groups.
    #[error("cannot follow captured cgroups by name: {0}")]
    Offsets(#[from] OffsetsError),
    /// A program of somebody else's keeps ours from being attached.
    #[error(
        "attaching {name} failed: {by} was attached without BPF_F_ALLOW_MULTI, which keeps every other program away"
    )]
    Blocked {
        /// The program.
        name: &'static str,
        /// The other one.
        by: blockers::Program,
    },
    /// As many programs are attached as can be.
    #[error("cannot attach {name}: the cgroup already has 64 programs of that type (BPF_CGROUP_MAX_PROGS)")]
    Full {
        /// The program.
        name: &'static str,
    },
    /// A program could not be attached.
    #[error("cannot attach {name} to the cgroup: {source}")]
    Attach {
        /// The program.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A map that is pinned is not one of this version's.
    #[error("pinned map {name} {why}: {}", path.display())]
    PinnedMap {
        /// The map.
        name: &'static str,
        /// Where.
        path: PathBuf,
        /// In what it differs.
        #[source]
        why: Mismatch,
    },
    /// A pin could not be made, read or removed.
    #[error("pin {}: {source}", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl BpfError {
    /// Whether the kernel lacks something, rather than this process a privilege.
    pub fn is_privilege(&self) -> bool {
        let denied = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES));
        match self {
            Self::Attach { source, .. } | Self::Pin { source, .. } => denied(source),
            other => {
                let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(other);
                while let Some(e) = cause {
                    if e.downcast_ref::<io::Error>().is_some_and(|e| e.raw_os_error() == Some(libc::EPERM)) {
                        return true;
                    }
                    cause = e.source();
                }
                false
            }
        }
    }
}

impl BpfError {
    /// What went wrong with all its causes in one line, without the verifier's pages.
    pub fn summary(&self) -> String {
        let mut out = String::new();
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(e) = cause {
            let text = e.to_string();
            let line = text.lines().next().unwrap_or_default();
            let line = line.split(" Verifier output:").next().unwrap_or_default();
            // Many errors repeat their source.
            if !out.contains(line) {
                if !out.is_empty() {
                    out.push_str(": ");
                }
                out.push_str(line);
            }
            cause = e.source();
        }
        out
    }
}
