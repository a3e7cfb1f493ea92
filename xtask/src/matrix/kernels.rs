//! Debian's kernels: found, fetched, unpacked. Nothing is installed on this machine, and its boot loader is left alone.
//!
//! # Invariants
//! - What is in the cache is whole, because it is put there under its name when it is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::{self, in_path_or_sbin, quiet};

/// Metapackages that follow a line of kernels: the default one of a release, and those that are called by their line,
/// as backports are since Debian 12.
fn metapackages(line: &str) -> [String; 2] {
    [format!("linux-image-{line}-amd64"), "linux-image-amd64".to_owned()]
}

/// A kernel that can be booted.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What was asked for.
    pub(super) line: String,
    /// As `uname -r` says.
    pub(super) release: String,
    /// The package's version.
    pub(super) version: String,
    pub(super) image: PathBuf,
}

/// A package, and where it is.
struct Image {
    package: String,
    version: String,
}

impl Kernel {
    /// Has what `line` names in `cache`; a line is followed to the newest that apt knows.
    pub(super) fn fetch(line: &str, cache: &Path) -> Result<Self> {
        fs::create_dir_all(cache)?;
        let file = Path::new(line);
        if file.extension().is_some_and(|kind| kind == "deb") {
            let file = file.canonicalize().with_context(|| format!("{}", file.display()))?;
            let ask =
                |field: &str| run::output(Command::new("dpkg-deb").arg("--field").arg(&file).arg(field));
            let image =
                Image { package: ask("Package")?.trim().into(), version: ask("Version")?.trim().into() };
            return image.unpack(line, cache, |_| Ok(file));
        }
        let image = Image::find(line)?;
        let wanted = format!("{}={}", image.package, image.version);
        image.unpack(line, cache, |folder| {
            let mut download = Command::new("apt-get");
            // Otherwise it tells that its own user may not write here.
            download.args(["-o", "APT::Sandbox::User=root", "download", &wanted]).current_dir(folder);
            quiet(&format!("downloading {wanted}"), &cache.join("download.log"), &mut download)?;
            only_file(folder, "deb")
        })
    }
}

impl Image {
    /// The image that a metapackage of this line depends on, in any of the releases that apt knows.
    fn find(line: &str) -> Result<Self> {
        ensure!(
            in_path_or_sbin("apt-cache").is_some(),
            "apt is not here, so nothing is known of Debian's kernels: --kernel takes a package's file too, a .deb of \
             linux-image-{line} from Debian's archive"
        );
        for name in metapackages(line) {
            let shown = run::output(Command::new("apt-cache").args(["show", &name])).unwrap_or_default();
            if let Some(found) = shown.split("\n\n").find_map(|stanza| Self::of(stanza, line)) {
                return Ok(found);
            }
        }
        bail!(
            "apt knows no kernel {line}. If its lists are empty or old: apt-get update. If this release has none, add \
             one that has to /etc/apt/sources.list (Debian 12 has 6.1, its security updates and its backports, the \
             suite bookworm-backports, 6.12), or download a package, and name its file: --kernel linux-image-….deb"
        )
    }

    /// What a metapackage's description depends on, if it is of the line.
    fn of(stanza: &str, line: &str) -> Option<Self> {
        let depends = stanza.lines().find_map(|l| l.strip_prefix("Depends: "))?;
        let first = depends.split([',', '|']).next()?;
        let (package, version) = first.split_once(" (= ")?;
        let version = version.trim_end().strip_suffix(')')?.to_owned();
        let package = package.trim();
        let of_line = package.strip_prefix("linux-image-")?.strip_prefix(line)?.starts_with('.');
        of_line.then(|| Self { package: package.to_owned(), version })
    }

    /// Unpacks it, unless it is in the cache; `fetch` says where its file is, and may put it into a folder for that.
    fn unpack(
        self,
        line: &str,
        cache: &Path,
        fetch: impl FnOnce(&Path) -> Result<PathBuf>,
    ) -> Result<Kernel> {
        let folder = cache.join(format!("{}_{}", self.package, self.version.replace([':', '/'], "_")));
        if !folder.is_dir() {
            let making = cache.join(format!("making-{}", std::process::id()));
            let made = self.make(&making, fetch).and_then(|()| Ok(fs::rename(making.join("root"), &folder)?));
            let removed = fs::remove_dir_all(&making);
            made?;
            removed?;
        }
        let boot = folder.join("boot");
        let names = fs::read_dir(&boot).with_context(|| format!("{} has no /boot", self.package))?;
        let mut names = names.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let release = names.find_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned));
        let release = release.with_context(|| format!("{} holds no kernel", self.package))?;
        let image = boot.join(format!("vmlinuz-{release}"));
        Ok(Kernel { line: line.to_owned(), release, version: self.version, image })
    }

    fn make(&self, making: &Path, fetch: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<()> {
        let root = making.join("root");
        fs::create_dir_all(&root)?;
        let package = fetch(making)?;
        let log = making.with_extension("log");
        let mut unpack = Command::new("dpkg");
        quiet(&format!("unpacking {}", self.package), &log, unpack.arg("-x").arg(package).arg(&root))?;
        for modules in fs::read_dir(root.join("lib/modules"))?.flatten() {
            let release = modules.file_name();
            // Packages of Debian 12 have a folder of licences here too.
            if modules.path().join("kernel").is_dir() {
                let depmod = in_path_or_sbin("depmod").context("depmod (kmod) is not installed")?;
                let mut index = Command::new(depmod);
                quiet("indexing its modules", &log, index.arg("-b").arg(&root).arg(release))?;
            }
        }
        Ok(fs::remove_file(log)?)
    }
}

fn only_file(folder: &Path, extension: &str) -> Result<PathBuf> {
    let files = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    let mut files = files.filter(|path| path.extension().is_some_and(|kind| kind == extension));
    files.next().with_context(|| format!("no .{extension} in {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metapackage_leads_to_the_image_of_its_line_and_of_no_other() {
        let stanza = "Package: linux-image-amd64\nVersion: 6.12.9-1\nDepends: linux-image-6.12.9+deb12-amd64 (= 6.12.9-1)";
        let found = Image::of(stanza, "6.12").unwrap();
        assert_eq!(
            (found.package.as_str(), found.version.as_str()),
            ("linux-image-6.12.9+deb12-amd64", "6.12.9-1")
        );
        assert!(Image::of(stanza, "6.1").is_none());
        assert!(Image::of("Package: linux-image-6.12-amd64", "6.12").is_none());
    }
}
