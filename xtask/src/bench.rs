//! `cargo xtask bench`: builds what is worth measuring, and starts the benchmarks.
//!
//! `tt-bench` measures; this passes its flags on, and checks that the machine is as it was before.

use std::{env, process::Command};

use anyhow::Result;

use crate::{
    bpf_build,
    leftovers::{MARK, Snapshot},
    run::{self, Checkout, foreground, green},
    setup::{self, Group},
};

#[path = "../../tests/src/bench/flags.rs"]
#[expect(unreachable_pub, reason = "another package's file")]
mod flags;

pub(crate) use flags::EXAMPLES;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Installs the programs that are compared with, and runs nothing.
    #[arg(long)]
    peers: bool,

    #[command(flatten)]
    flags: flags::Flags,
}

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    if args.peers {
        return setup::run(checkout, &setup::Args::only(Group::Peers));
    }
    let measures = args.flags.with.is_none() && args.flags.publish.is_none() && args.flags.redraw.is_none();
    if measures {
        run::require_root("loading kernel programs and making network namespaces, which benchmarks do,")?;
    }
    setup::ensure(checkout, &[Group::Demo])?;
    let mut build = checkout.cargo(["build", "--locked", "--release"]);
    build.args(["--package", "tunnel-user", "--package", "tunnel-tests"]);
    build.args(["--bin", "tunnel", "--bin", "tt-load", "--bin", "tt-bench"]);
    foreground("building the programs", &mut build)?;

    run::catch_interrupts()?;
    let before = Snapshot::take(checkout);
    let release = checkout.target.join("release");
    let mut bench = Command::new(release.join("tt-bench"));
    bench.env("TUNNEL_BIN", release.join("tunnel")).env(MARK, std::process::id().to_string());
    bench.arg("--tools").arg(bpf_build::tools_dir(&checkout.root));
    // Every flag is one of the benchmark's own: --peers has been seen to.
    bench.args(env::args_os().skip_while(|word| word != "bench").skip(1));
    let measured = foreground("benchmarks", &mut bench);
    if !measures {
        return measured;
    }
    let clean = before.compare(checkout);
    if let (Err(_), Err(left)) = (&measured, &clean) {
        run::show_error(left);
    }
    measured?;
    clean?;
    println!("{} nothing was left behind", green("ok "));
    Ok(())
}
