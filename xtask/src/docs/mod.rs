//! `cargo xtask docs`: writes the generated pages of the book, checks all documents, and builds the book.
//!
//! CI runs it with `--check`, which writes and builds nothing.
//!
//! # Invariants
//! - A generated page says what the program says: it comes from its schema, its help and its constants.
//! - Every page is in `docs/SUMMARY.md`, every link leads to a file or a heading that exists, and every key of the
//!   configuration, option and file that a page names exists.

mod check;
mod limits;
mod lists;
mod reference;
mod words;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    bpf_build, guide,
    run::{Checkout, bold, foreground, green},
    setup::{self, Group},
};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask docs               writes the generated pages, checks, builds target/book/index.html
  cargo xtask docs --no-build    the same without the book
  cargo xtask docs --check       what CI runs: changes nothing, fails on a stale page or a broken link";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write nothing: fail where a generated page is not current.
    #[arg(long)]
    check: bool,
    /// Do not build the book.
    #[arg(long)]
    no_build: bool,
    /// Ask this `tunnel` for its help and its schema, and build none.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

impl Args {
    /// What CI does, with a `tunnel` that is built.
    pub(crate) fn check(program: PathBuf) -> Self {
        Self { check: true, no_build: true, program: Some(program) }
    }
}

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let program = match &args.program {
        Some(program) => program.clone(),
        None => checkout.build_tunnel(false)?,
    };
    let mut stale = Vec::new();
    for (name, text) in reference::pages(&checkout.root, &program)? {
        let file = checkout.root.join("docs").join(&name);
        let text = text.trim_end().to_owned() + "\n";
        if fs::read_to_string(&file).unwrap_or_default() == text {
            continue;
        }
        if args.check {
            stale.push(format!("docs/{name} is not current: run `cargo xtask docs` and commit it"));
            continue;
        }
        fs::write(&file, text).with_context(|| format!("writing docs/{name}"))?;
        println!("{} docs/{name}", bold("written:"));
    }

    let mistakes = [
        stale,
        check::mistakes(&checkout.root)?,
        guide::mistakes(&checkout.root)?,
        words::mistakes(&checkout.root, &program)?,
    ]
    .concat();
    mistakes.iter().for_each(|mistake| println!("{mistake}"));
    match mistakes.len() {
        0 => println!("{} documents: pages, links, names", green("ok ")),
        n => bail!("{n} mistakes in the documents"),
    }
    if args.check || args.no_build {
        return Ok(());
    }
    setup::ensure(checkout, &[Group::Docs])?;
    build(checkout)
}

fn build(checkout: &Checkout) -> Result<()> {
    let mdbook = bpf_build::tools_dir(&checkout.root).join("bin/mdbook");
    let mdbook = if mdbook.is_file() { mdbook } else { "mdbook".into() };
    let book = checkout.target.join("book");
    let mut command = std::process::Command::new(mdbook);
    command.arg("build").arg("--dest-dir").arg(&book).arg(checkout.root.join("docs"));
    foreground("mdbook", &mut command)?;
    println!("{} {}", bold("the book:"), book.join("index.html").display());
    Ok(())
}

/// The documents that are checked, each with its path from the checkout's root: the book's pages, and those beside it.
pub(crate) fn documents(root: &Path) -> Result<Vec<(String, String)>> {
    let mut names = vec![];
    for entry in fs::read_dir(root)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| name.ends_with(".md"));
    pages(root, "docs", &mut names)?;
    names.sort();
    names
        .into_iter()
        .map(|name| {
            let text = fs::read_to_string(root.join(&name)).with_context(|| format!("reading {name}"))?;
            Ok((name, text))
        })
        .collect()
}

fn pages(root: &Path, folder: &str, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let name = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            pages(root, &name, names)?;
        } else if name.ends_with(".md") {
            names.push(name);
        }
    }
    Ok(())
}
