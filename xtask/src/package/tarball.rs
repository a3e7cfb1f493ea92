//! The tarball: the tree below a folder of its own, with the licences, in order and owned by root.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{Release, tree::Tree};
use crate::run::{self, Checkout, quiet};

/// Where it is in the tarball what is below `usr/` in a package: `bin`, `lib`, `share`.
pub(super) fn name(release: &Release) -> String {
    format!("tunnel-{}-{}", release.version, release.arch.name())
}

pub(super) fn make(checkout: &Checkout, release: &Release, tree: &Tree) -> Result<PathBuf> {
    let name = name(release);
    let work = release.out.join("tar");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(&work)?;
    let package = Tree { root: work.join(&name) };
    run::output(release.command("cp").arg("-a").arg(tree.root.join("usr")).arg(&package.root))?;
    for file in ["LICENSE", "LICENSE-APACHE", "LICENSE-MIT", "CHANGELOG.md"] {
        package.write(file, fs::read(checkout.root.join(file))?)?;
    }
    package.date(release)?;
    let file = release.out.join(format!("{name}.tar.gz"));
    archive(release, &work, &[&name], &file)?;
    Ok(file)
}

/// These of a folder as an archive of which every byte depends on the files alone; compressed if its name says so.
pub(super) fn archive(release: &Release, folder: &Path, names: &[&str], file: &Path) -> Result<()> {
    let mut tar = release.command("tar");
    tar.args([
        "--sort=name",
        "--format=posix",
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        &format!("--mtime=@{}", release.epoch),
    ]);
    if file.extension().is_some_and(|kind| kind == "gz") {
        tar.args(["--use-compress-program", "gzip --best --no-name"]);
    }
    tar.arg("--create").arg("--file").arg(file).arg("--directory").arg(folder).args(names);
    quiet("tar", &release.log("tar"), &mut tar)
}
