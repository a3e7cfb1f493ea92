//! `cargo xtask build-ebpf`: the committed objects, rewritten or checked.

use std::fs;

use anyhow::{Result, bail};

use crate::{
    bpf_build::{self, OBJECTS, PREBUILT, PROVENANCE, Toolchain},
    run::{Checkout, bold, foreground},
    setup,
};

/// How often the objects are linked, at most, until each has come out as it was committed, which proves that it is what the
/// sources give: once in some twenty links bpf-linker puts two names of the type information in another order.
const LINKS: usize = 4;

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
    let target_dir = checkout.target.join("bpf");
    let mut objects = toolchain.build(&checkout.root, &target_dir)?;
    let provenance = format!("{}\n{}", bpf_build::sources_line(&checkout.root)?, toolchain.versions()?);
    let provenance_path = checkout.root.join(PROVENANCE);
    let recorded = fs::read_to_string(&provenance_path).unwrap_or_default();

    fs::create_dir_all(checkout.root.join(PREBUILT))?;
    let committed = OBJECTS.map(|name| {
        fs::read(checkout.root.join(PREBUILT).join(bpf_build::file_name(name))).unwrap_or_default()
    });
    for _ in 1..LINKS {
        if !args.check || recorded != provenance || objects == committed {
            break;
        }
        foreground("removing what was built", &mut toolchain.cargo(&checkout.root, "clean", &target_dir)?)?;
        let again = toolchain.build(&checkout.root, &target_dir)?;
        for ((object, again), committed) in objects.iter_mut().zip(again).zip(&committed) {
            if again == *committed {
                *object = again;
            }
        }
    }
    for ((object, name), committed) in objects.iter().zip(OBJECTS).zip(&committed) {
        let path = checkout.root.join(PREBUILT).join(bpf_build::file_name(name));
        let shown = format!("{PREBUILT}/{}", bpf_build::file_name(name));
        if !args.check {
            fs::write(&path, object)?;
            println!("{} {} bytes", bold(&shown), object.len());
            continue;
        }
        if committed != object || recorded != provenance {
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
