//! The tree of files that every package has, laid out once: the program, manuals, completions, units, examples.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::Release;
use crate::run::{self, Checkout};

/// Shells, and where each looks for completions.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/tunnel"),
    ("zsh", "usr/share/zsh/vendor-completions/_tunnel"),
    ("fish", "usr/share/fish/vendor_completions.d/tunnel.fish"),
];

/// Files of `examples/` that a package installs, and where.
const INSTALLED: [(&str, &str); 4] = [
    ("systemd/tunnel-agent.service", "usr/lib/systemd/system/tunnel-agent.service"),
    ("systemd/tunnel-gateway.service", "usr/lib/systemd/system/tunnel-gateway.service"),
    ("systemd/tunnel.sysusers", "usr/lib/sysusers.d/tunnel.conf"),
    ("systemd/tunnel.tmpfiles", "usr/lib/tmpfiles.d/tunnel.conf"),
];

pub(super) const DOC: &str = "usr/share/doc/tunnel";
/// Where units look for their configuration; nothing is installed in it.
pub(super) const ETC: &str = "etc/tunnel";

/// A folder with everything in its place, as root's file system has it.
pub(super) struct Tree {
    pub(super) root: PathBuf,
}

impl Tree {
    pub(super) fn lay(checkout: &Checkout, release: &Release, program: &Path) -> Result<Self> {
        let root = release.out.join("tree");
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        let tree = Self { root };
        let speaks = speaker(checkout, release, program)?;
        tree.put(program, "usr/bin/tunnel", 0o755)?;
        fs::create_dir_all(tree.root.join(ETC))?;
        for (shell, file) in COMPLETIONS {
            let script = run::output(Command::new(&speaks).args(["completions", shell]))?;
            tree.write(file, script)?;
        }
        tree.manuals(&speaks, release)?;
        for (from, to) in INSTALLED {
            tree.put(&checkout.root.join("examples").join(from), to, 0o644)?;
        }
        for file in files(&checkout.root.join("examples"))? {
            let to = Path::new(DOC).join("examples").join(&file);
            tree.put(&checkout.root.join("examples").join(&file), &to.to_string_lossy(), 0o644)?;
        }
        tree.put(&checkout.root.join("README.md"), &format!("{DOC}/README.md"), 0o644)?;
        tree.date(release)?;
        Ok(tree)
    }

    /// Writes a file for everybody to read.
    pub(super) fn write(&self, file: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        let path = self.root.join(file);
        fs::create_dir_all(path.parent().context("a file is in a folder")?)?;
        fs::write(&path, contents)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        Ok(())
    }

    fn put(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        let contents = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.write(to, contents)?;
        fs::set_permissions(self.root.join(to), fs::Permissions::from_mode(mode))?;
        Ok(())
    }

    fn manuals(&self, speaks: &Path, release: &Release) -> Result<()> {
        let folder = self.root.join("usr/share/man/man1");
        run::output(Command::new(speaks).args(["man", "--dir"]).arg(&folder))?;
        let pages = files(&folder)?;
        ensure!(pages.iter().any(|page| page == Path::new("tunnel.1")), "`tunnel man` wrote no tunnel.1");
        for page in pages {
            gzip(release, &folder.join(page))?;
        }
        Ok(())
    }

    /// Folders as everybody has them, and everything of the commit's time: what only looks at files' times sees that.
    pub(super) fn date(&self, release: &Release) -> Result<()> {
        let mut touch = release.command("find");
        touch.arg(&self.root).args(["-type", "d", "-exec", "chmod", "755", "{}", "+"]);
        run::output(&mut touch)?;
        let mut touch = release.command("find");
        touch.arg(&self.root).args([
            "-exec",
            "touch",
            "--no-dereference",
            &format!("--date=@{}", release.epoch),
            "{}",
            "+",
        ]);
        run::output(&mut touch).map(drop)
    }
}

/// Compresses a file as Debian's policy and rpm's macros ask for: without its name and time.
pub(super) fn gzip(release: &Release, file: &Path) -> Result<()> {
    run::output(release.command("gzip").args(["--best", "--no-name", "--force"]).arg(file)).map(drop)
}

/// A program that runs here and knows the same commands: of one for another architecture, the development build.
fn speaker(checkout: &Checkout, release: &Release, program: &Path) -> Result<PathBuf> {
    if release.arch.name() == std::env::consts::ARCH {
        return Ok(program.to_owned());
    }
    checkout.build_tunnel(false)
}

/// The files below a folder, by their names from there, in order.
pub(super) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let name = PathBuf::from(entry.file_name());
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path())?.into_iter().map(|file| name.join(file)));
        } else {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}
