//! `cargo xtask ci`: what has to pass before a merge, in the order in which it fails soonest.

use std::time::Instant;

use anyhow::Result;

use crate::{
    bpf_build::Toolchain,
    build, docs, promises, rooms,
    run::{Checkout, bold, catch_interrupts, foreground, green, took},
    setup::{self, Group},
    test,
};

pub(crate) fn run(checkout: &Checkout) -> Result<()> {
    let started = Instant::now();
    let heading = |text: &str| eprintln!("\n{} {}", bold(&format!("## {text}")), took(started));
    catch_interrupts()?;

    heading("format");
    foreground("cargo fmt", &mut checkout.cargo(["fmt", "--all", "--check"]))?;

    heading("tools");
    setup::ensure(checkout, &[Group::Build, Group::Lint, Group::Test])?;

    heading("kernel programs: lints");
    clippy_bpf(checkout)?;

    heading("kernel programs: the committed objects");
    build::run(checkout, &build::Args::check())?;

    heading("host: lints");
    let mut clippy =
        checkout.cargo(["clippy", "--locked", "--workspace", "--exclude", "tunnel-ebpf", "--all-targets"]);
    foreground("clippy", clippy.args(["--", "-D", "warnings"]).env("TUNNEL_BPF", "source"))?;

    heading("rooms");
    rooms::run(checkout, &rooms::Args::default())?;

    heading("promises");
    promises::run(checkout, &promises::Args::check())?;

    heading("documents: generated pages, links, names");
    // As the tests build them, so that nothing is built twice.
    test::build_programs(checkout)?;
    docs::run(checkout, &docs::Args::check(checkout.target.join("debug/tunnel")))?;

    heading("documentation");
    let mut doc = checkout.cargo(["doc", "--locked", "--workspace", "--exclude", "tunnel-ebpf", "--no-deps"]);
    doc.args(["--document-private-items"]).env("TUNNEL_BPF", "source").env("RUSTDOCFLAGS", "-D warnings");
    foreground("rustdoc", &mut doc)?;

    heading("dependencies: duplicates and bans, licences, sources");
    let mut deny = checkout.cargo(["deny", "--all-features", "check", "bans", "licenses", "sources"]);
    foreground("cargo deny", deny.env("PATH", test::path_with_tools(checkout)?))?;

    heading("tests");
    test::run(checkout, &test::Args::all())?;

    println!("\n{} everything passed in {}", green("ok "), took(started));
    Ok(())
}

/// Clippy for the BPF target, by the compiler that builds for it: Debian's clippy beside Debian's rustc.
fn clippy_bpf(checkout: &Checkout) -> Result<()> {
    let toolchain = Toolchain::find(&checkout.root)?;
    let mut check = toolchain.cargo(&checkout.root, "check", &checkout.target.join("bpf"))?;
    check
        .env("RUSTC_WORKSPACE_WRAPPER", toolchain.clippy_driver()?)
        // As `cargo clippy -- -D warnings` passes it.
        .env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
    foreground("clippy for BPF", &mut check)
}
