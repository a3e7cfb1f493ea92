//! The Debian package, written by dpkg-deb, which every Debian has.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use anyhow::{Context as _, Result};

use super::{
    Release,
    tree::{DOC, Tree, files, gzip},
};
use crate::run::{self, Checkout, quiet};

const MAINTAINER: &str = "The tunnel authors <tunnel@example.org>";

/// Its scripts start nothing and stop nothing that was not started from the package.
const SCRIPTS: [(&str, &str); 3] = [
    ("postinst", include_str!("postinst.sh")),
    ("prerm", include_str!("prerm.sh")),
    ("postrm", include_str!("postrm.sh")),
];

const OVERRIDES: &str = "\
# Static and position-independent, which lintian takes for a library. Every package has the same program: docs/adr/0051-packages.md.
tunnel: shared-library-lacks-prerequisites [usr/bin/tunnel]
# No Debian bug asks for this package.
tunnel: initial-upload-closes-no-bugs *
";

pub(super) fn make(checkout: &Checkout, release: &Release, tree: &Tree) -> Result<PathBuf> {
    let arch = release.arch.debian();
    let package = Tree { root: release.out.join("deb") };
    if package.root.exists() {
        fs::remove_dir_all(&package.root)?;
    }
    run::output(release.command("cp").arg("-a").arg(&tree.root).arg(&package.root))?;

    package.write(&format!("{DOC}/copyright"), copyright(checkout)?)?;
    package.write("usr/share/lintian/overrides/tunnel", OVERRIDES)?;
    for (name, text) in [
        ("changelog", fs::read_to_string(checkout.root.join("CHANGELOG.md"))?),
        ("changelog.Debian", changelog(release)?),
    ] {
        let file = format!("{DOC}/{name}");
        package.write(&file, text)?;
        gzip(release, &package.root.join(file))?;
    }
    let size: u64 = files(&package.root)?
        .iter()
        .map(|file| package.root.join(file).metadata().map_or(0, |data| data.len().div_ceil(1024)))
        .sum();
    let sums = files(&package.root)?;
    let mut md5 = release.command("md5sum");
    let sums = run::output(md5.current_dir(&package.root).args(&sums))?;
    package.write("DEBIAN/md5sums", sums)?;
    package.write("DEBIAN/control", control(release, size))?;
    for (name, text) in SCRIPTS {
        let file = format!("DEBIAN/{name}");
        package.write(&file, text)?;
        fs::set_permissions(package.root.join(file), fs::Permissions::from_mode(0o755))?;
    }
    package.date(release)?;

    let file = release.out.join(format!("tunnel_{}-1_{arch}.deb", release.version));
    let mut build = release.command("dpkg-deb");
    build.args(["--root-owner-group", "-Zxz", "--build"]).arg(&package.root).arg(&file);
    quiet("dpkg-deb", &release.log("dpkg-deb"), &mut build)?;
    let mut lintian = release.command("lintian");
    // As root it warns that it is.
    lintian.args(["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0"]).arg(&file);
    quiet("lintian", &release.log("lintian"), &mut lintian).context("lintian does not accept the package")?;
    Ok(file)
}

fn control(Release { version, arch, .. }: &Release, size: u64) -> String {
    let arch = arch.debian();
    format!(
        "Package: tunnel\n\
         Version: {version}-1\n\
         Architecture: {arch}\n\
         Maintainer: {MAINTAINER}\n\
         Installed-Size: {size}\n\
         Section: net\n\
         Priority: optional\n\
         Homepage: https://example.org/tunnel\n\
         Recommends: systemd\n\
         Description: transparent TCP tunnel over HTTP CONNECT and mutual TLS\n \
         Captures the TCP connections of a program, a systemd unit or a container\n \
         with eBPF, and carries them inside HTTP/2 or HTTP/3 CONNECT over mutually\n \
         authenticated TLS to a gateway, which dials their targets. The program\n \
         needs no configuration and no route to its target.\n \
         .\n \
         The package has the program, units for an agent and a gateway, which are\n \
         not started, manual pages, completions and examples. Linux 6.1 or newer.\n"
    )
}

fn changelog(release: &Release) -> Result<String> {
    let date =
        release.command("date").arg(format!("--date=@{}", release.epoch)).arg("--rfc-email").output()?;
    let date = String::from_utf8(date.stdout)?;
    Ok(format!(
        "tunnel ({}-1) unstable; urgency=medium\n\n  * Built from the sources of that version; changelog.gz says what has changed.\n\n -- {MAINTAINER}  {}\n",
        release.version,
        date.trim()
    ))
}

/// Both licences, of which the user picks one. That of the Apache Foundation is on every Debian.
fn copyright(checkout: &Checkout) -> Result<String> {
    let mit = fs::read_to_string(checkout.root.join("LICENSE-MIT"))?;
    let mut text = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
                    Upstream-Name: tunnel\n\n\
                    Files: *\n\
                    Copyright: The tunnel authors\n\
                    License: Apache-2.0 or Expat\n\n\
                    License: Apache-2.0\n \
                    On Debian systems, the full text is in /usr/share/common-licenses/Apache-2.0.\n\n\
                    License: Expat\n"
        .to_owned();
    for line in mit.lines() {
        text.push(' ');
        text.push_str(if line.trim().is_empty() { "." } else { line });
        text.push('\n');
    }
    Ok(text)
}
