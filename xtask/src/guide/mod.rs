//! `cargo xtask verify --only guide`: every command of the guide is run, as it stands on its page.
//!
//! What a page's blocks say after their language is how they are run: see [`blocks`]. What cannot be run here is in [`EXCEPTIONS`],
//! with the reason.
//!
//! # Invariants
//! - Each `sh` block of `docs/guide` is run, or is an exception; an exception that names no block fails, also in CI.
//! - Everything happens in mounts and network namespaces that end with this process.

mod blocks;
mod world;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use self::{
    blocks::{Block, Host, Kind},
    world::World,
};
use crate::{
    leftovers::Snapshot,
    run::{self, Checkout, blue, dim, foreground, green, red, took},
};

/// A page, how a block of it begins, and why that block is not run.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("cookbook", "kubectl apply", "a cluster; cargo xtask package validates the manifest"),
    ("daemon", "sudo systemctl enable", "systemd as init"),
    ("daemon", "sudo tunnel attach", "a process and a container; tests/tests/admin.rs"),
    ("daemon", "sudo tunnel detach", "a daemon that has ended; the page goes on with one that runs"),
    ("envoy", "sudo tunnel exec", "Envoy; tests/tests/interop_envoy.rs"),
    (
        "http-proxies",
        "curl --proxytunnel",
        "the proxy of examples/connect-proxy.toml; tests/tests/interop_proxies.rs",
    ),
    ("install", "cargo build", "ten minutes; all other blocks are run with what it builds"),
    ("install", "cargo xtask demo", "a demonstration with hosts of its own"),
    ("install", "sudo tunnel doctor --json", "jq"),
    ("observing", "curl --unix-socket", "tests/tests/admin.rs"),
    ("observing", "journalctl", "a journal; tests/tests/access_log.rs"),
    ("redirect", "iptables", "a slice of systemd's; tests/tests/redirect.rs"),
    ("upgrade", "sudo systemctl restart", "systemd as init"),
    ("upgrade", "sudo tunnel detach", "a daemon that has ended; the page has one that runs"),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these pages, by their names in docs/guide without `.md`.
    #[arg(value_name = "PAGE")]
    pages: Vec<String>,
    /// The program whose commands they are.
    #[arg(long, value_name = "FILE")]
    program: PathBuf,
}

/// Runs the guide in mounts of its own, so that what pages install is gone afterwards.
pub(crate) fn verify(checkout: &Checkout) -> Result<()> {
    run::require_root("making network namespaces and loading kernel programs, which the guide does,")?;
    let program = checkout.build_tunnel(false)?;
    let before = Snapshot::take(checkout);
    let mut inside = Command::new("unshare");
    inside.args(["--mount", "--propagation", "private", "--kill-child", "--fork"]);
    inside.arg(std::env::current_exe()?).args(["guide-pages", "--program"]).arg(program);
    let told = foreground("the guide", &mut inside);
    let clean = before.compare(checkout);
    told?;
    clean
}

/// What [`verify`] runs in those mounts.
pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    run::catch_interrupts()?;
    let mistakes = mistakes(&checkout.root)?;
    ensure!(mistakes.is_empty(), "{}", mistakes.join("\n"));
    let mut failed = Vec::new();
    world::mounts()?;
    for (page, text) in pages(&checkout.root)? {
        if !args.pages.is_empty() && !args.pages.contains(&page) {
            continue;
        }
        let blocks = blocks::of(&text).with_context(|| format!("docs/guide/{page}.md"))?;
        let excepted = |block: &Block| {
            EXCEPTIONS.iter().any(|(of, begin, _)| *of == page && block.text.starts_with(begin))
        };
        let kept: Vec<_> = blocks.into_iter().filter(|block| !excepted(block)).collect();
        if kept.iter().any(|block| matches!(block.kind, Kind::Run(_))) {
            let started = Instant::now();
            eprintln!("{} {page}", blue("==>"));
            match play(&args.program, &page, &kept) {
                Ok(count) => eprintln!("{} {page}, {count} blocks {}", green("ok "), dim(&took(started))),
                Err(error) if error.is::<run::Interrupted>() => return Err(error),
                Err(error) => {
                    eprintln!("{} {page}: {error:#}", red("bad"));
                    failed.push(page);
                }
            }
        }
    }
    ensure!(failed.is_empty(), "pages whose commands failed: {}", failed.join(", "));
    Ok(())
}

/// Runs the blocks of a page, from the first to the last, on hosts of its own.
fn play(program: &Path, page: &str, blocks: &[Block]) -> Result<usize> {
    let mut world = World::new(program, page)?;
    if !blocks.iter().any(|block| block.text.contains("pki init")) {
        world.certificates()?;
    }
    let of_gateway =
        |block: &Block| matches!(&block.kind, Kind::Run(run) if run.stays && run.host == Host::Gateway);
    if !blocks.iter().any(of_gateway) {
        world.gateway()?;
    }
    let mut count = 0;
    for block in blocks {
        let place = || format!("line {}: {}", block.line, block.text.lines().next().unwrap_or_default());
        match &block.kind {
            Kind::File(name) => world.write(name, &block.text)?,
            Kind::Run(run) => {
                world.play(run, &block.text).with_context(place)?;
                count += 1;
            }
        }
    }
    Ok(count)
}

/// What is wrong with how blocks say they are run, each `FILE: what`; nothing is run for that.
pub(crate) fn mistakes(root: &Path) -> Result<Vec<String>> {
    let mut mistakes = Vec::new();
    let mut unused: Vec<_> = EXCEPTIONS.iter().collect();
    for (page, text) in pages(root)? {
        match blocks::of(&text) {
            Ok(blocks) => unused.retain(|(of, begin, _)| {
                *of != page || !blocks.iter().any(|block| block.text.starts_with(begin))
            }),
            Err(error) => mistakes.push(format!("docs/guide/{page}.md: {error}")),
        }
    }
    for (page, begin, _) in unused {
        mistakes.push(format!(
            "docs/guide/{page}.md: no block begins with {begin:?}: xtask/src/guide/mod.rs excepts it"
        ));
    }
    Ok(mistakes)
}

fn pages(root: &Path) -> Result<Vec<(String, String)>> {
    let folder = root.join("docs/guide");
    let mut pages = Vec::new();
    for entry in fs::read_dir(&folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(page) = name.strip_suffix(".md") {
            pages.push((page.to_owned(), fs::read_to_string(folder.join(&name))?));
        }
    }
    pages.sort();
    Ok(pages)
}
