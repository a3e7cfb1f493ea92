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
            bail!(
                "{PREBUILT} ({} bytes) is not what the sources give ({} bytes).\n\
                 The committed one was built from and with:\n{recorded}\nhere:\n{provenance}\n\
                 With the same tools, run `cargo xtask build-ebpf` and commit the result; with others, \
                 nothing can be said.",
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
