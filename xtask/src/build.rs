//! `cargo xtask build-ebpf`: the committed objects, rewritten or checked.

use std::fs;

use anyhow::{Result, bail};

use crate::{
    bpf_build::{self, OBJECTS, PREBUILT, PROVENANCE, Toolchain},
    run::{Checkout, bold},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change nothing; fail when a committed object is not, byte for byte, what the sources give.
    #[arg(long)]
    check: bool,
}

impl Args {
    /// Check only.
    pub(crate) fn check() -> Self {
        Self { check: true }
    }
}

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    setup::ensure(checkout, &[setup::Group::Build])?;
    let toolchain = Toolchain::find(&checkout.root)?;
    let objects = toolchain.build(&checkout.root, &checkout.target.join("bpf"))?;
    let provenance = format!("{}\n{}", bpf_build::sources_line(&checkout.root)?, toolchain.versions()?);
    let provenance_path = checkout.root.join(PROVENANCE);
    let recorded = fs::read_to_string(&provenance_path).unwrap_or_default();

    fs::create_dir_all(checkout.root.join(PREBUILT))?;
    for (object, name) in objects.iter().zip(OBJECTS) {
        let path = checkout.root.join(PREBUILT).join(bpf_build::file_name(name));
        let shown = format!("{PREBUILT}/{}", bpf_build::file_name(name));
        if !args.check {
            fs::write(&path, object)?;
            println!("{} {} bytes", bold(&shown), object.len());
            continue;
        }
        let committed = fs::read(&path).unwrap_or_default();
        if committed != *object || recorded != provenance {
            bail!(
                "{shown} ({} bytes) is not what is built here ({} bytes): {}.\n\
                 committed:\n{recorded}here:\n{provenance}",
                committed.len(),
                object.len(),
                why_not(&recorded, &provenance),
            );
        }
        println!("{shown} is what the sources give: {} bytes", object.len());
    }
    if !args.check {
        fs::write(&provenance_path, provenance)?;
    }
    Ok(())
}

/// Why a committed object may differ.
fn why_not(recorded: &str, provenance: &str) -> &'static str {
    match (recorded.split_once('\n'), provenance.split_once('\n')) {
        (None, _) => "it was never committed: run `cargo xtask build-ebpf` and commit the result",
        (Some(was), Some(is)) if was.0 != is.0 => {
            "the sources have changed: run `cargo xtask build-ebpf` and commit the result"
        }
        (Some(was), Some(is)) if was.1 != is.1 => "it was built with other tools, so nothing can be said",
        _ => "sources and tools are the same, so the build has ceased to be reproducible",
    }
}
