//! The RPM, written by rpmbuild from the tree: Fedora's own, and in Debian.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

use super::{
    Release, text,
    tree::{ETC, Tree, files},
};
use crate::run::{self, quiet};

/// As in the Debian package: nothing is started, and what a capture leaves ends with the program.
const POST: &str = "\
if [ -d /run/systemd/system ]; then
    systemd-sysusers tunnel.conf
    systemd-tmpfiles --create tunnel.conf
    systemctl daemon-reload
fi
exit 0
";
const PREUN: &str = "\
if [ \"$1\" = 0 ]; then
    if [ -d /run/systemd/system ]; then
        systemctl --no-reload disable --now tunnel-agent.service tunnel-gateway.service || :
    fi
    if [ -f /etc/tunnel/agent.toml ]; then
        tunnel detach --config /etc/tunnel/agent.toml || :
    fi
fi
exit 0
";

pub(super) fn make(release: &Release, tree: &Tree) -> Result<PathBuf> {
    let work = release.out.join("rpm");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(&work)?;
    let package = Tree { root: work.join("tree") };
    run::output(release.command("cp").arg("-a").arg(&tree.root).arg(&package.root))?;
    // Where zsh looks on Fedora.
    let site = package.root.join("usr/share/zsh/site-functions");
    fs::rename(package.root.join("usr/share/zsh/vendor-completions"), site)?;
    package.date(release)?;

    let spec = work.join("tunnel.spec");
    fs::write(&spec, self::spec(release, &package)?)?;
    let arch = release.arch.name();
    let mut build = release.command("rpmbuild");
    build.args(["-bb", "--target", &format!("{arch}-linux")]);
    for (name, value) in [
        ("_topdir", text(&work)?),
        ("_rpmdir", text(&work)?),
        ("_dbpath", text(&work.join("db"))?),
        ("_buildhost", "reproducible"),
        ("use_source_date_epoch_as_buildtime", "1"),
        ("clamp_mtime_to_source_date_epoch", "1"),
        ("_build_id_links", "none"),
        ("_binary_payload", "w6.xzdio"),
        // The program is stripped already, and its symbols are beside it.
        ("debug_package", "%{nil}"),
        ("__os_install_post", "%{nil}"),
        ("tree", text(&package.root)?),
    ] {
        build.arg("--define").arg(format!("{name} {value}"));
    }
    quiet("rpmbuild", &release.log("rpmbuild"), build.arg(&spec))?;
    let name = format!("tunnel-{}-1.{arch}.rpm", release.version);
    let file = release.out.join(&name);
    fs::rename(work.join(arch).join(&name), &file).context("rpmbuild has written no package")?;
    Ok(file)
}

fn spec(release: &Release, package: &Tree) -> Result<String> {
    let mut listed = String::new();
    for file in files(&package.root)? {
        let path = file.to_string_lossy();
        let kind = if path.starts_with("usr/share/doc/") { "%doc " } else { "" };
        listed.push_str(&format!("{kind}/{path}\n"));
    }
    Ok(format!(
        "Name: tunnel\n\
         Version: {version}\n\
         Release: 1\n\
         Summary: Transparent TCP tunnel over HTTP CONNECT and mutual TLS\n\
         License: Apache-2.0 OR MIT\n\
         URL: https://example.org/tunnel\n\
         AutoReqProv: no\n\
         \n\
         %description\n\
         Captures the TCP connections of a program, a systemd unit or a container with eBPF, and\n\
         carries them inside HTTP/2 or HTTP/3 CONNECT over mutually authenticated TLS to a gateway,\n\
         which dials their targets. Linux 6.1 or newer.\n\
         \n\
         %install\n\
         mkdir -p %{{buildroot}}\n\
         cp -a %{{tree}}/. %{{buildroot}}/\n\
         \n\
         %post\n\
         {POST}\n\
         %preun\n\
         {PREUN}\n\
         \n\
         %files\n\
         %defattr(-,root,root,-)\n\
         %dir %attr(0755,root,root) /{ETC}\n\
         {listed}",
        version = release.version,
    ))
}
