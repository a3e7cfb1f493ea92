//! `cargo xtask build-ebpf`: the committed object, rewritten or checked.

use std::fs;

use anyhow::{Result, bail};

use crate::{
    bpf_build::{self, PREBUILT, PROVENANCE, Toolchain},
    run::{Checkout, bold},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change nothing; fail when the committed object is not, byte for byte, what the sources give.
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
    let object = toolchain.build(&checkout.root, &checkout.target.join("bpf"))?;
    let provenance = format!("{}\n{}", bpf_build::sources_line(&checkout.root)?, toolchain.versions()?);
    let (object_path, provenance_path) = (checkout.root.join(PREBUILT), checkout.root.join(PROVENANCE));

    if args.check {
        let committed = fs::read(&object_path).unwrap_or_default();
        let recorded = fs::read_to_string(&provenance_path).unwrap_or_default();
        if committed != object || recorded != provenance {
            let (was, is) = (recorded.split_once('\n'), provenance.split_once('\n'));
            let why = match (was, is) {
                (None, _) => "it was never committed: run `cargo xtask build-ebpf` and commit the result",
                (Some(was), Some(is)) if was.0 != is.0 => {
                    "the sources have changed: run `cargo xtask build-ebpf` and commit the result"
                }
                (Some(was), Some(is)) if was.1 != is.1 => {
                    "it was built with other tools, so nothing can be said"
                }
                _ => "sources and tools are the same, so the build has ceased to be reproducible",
            };
            bail!(
                "{PREBUILT} ({} bytes) is not what is built here ({} bytes): {why}.\n\
                 committed:\n{recorded}here:\n{provenance}",
                committed.len(),
                object.len(),
            );
        }
        println!("{PREBUILT} is what the sources give: {} bytes", object.len());
        return Ok(());
    }

    if let Some(folder) = object_path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&object_path, &object)?;
    fs::write(&provenance_path, provenance)?;
    println!("{} {} bytes", bold(PREBUILT), object.len());
    Ok(())
}
