//! The Debian package in a Debian: installed, replaced, removed and purged in a tree; and, where that is asked for, used under systemd in
//! a virtual machine that boots that tree.
//!
//! # Invariants
//! - The tree is a folder of this run; nothing is installed on this machine.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::tree::files;
use crate::run::{self, Checkout, dim, green, quiet, took};

/// The release that it is tried on.
const SUITE: &str = "bookworm";
const MIRROR: &str = "http://deb.debian.org/debian";
/// What a machine needs to boot and to have something to capture.
const PACKAGES: &str = "systemd-sysv,udev,dbus,curl,busybox,iproute2,zstd,linux-image-amd64,initramfs-tools";
/// What is done in the machine.
const GUEST: &str = include_str!("guest.sh");
/// Without KVM systemd takes a minute to start, and a daemon seconds.
const PATIENCE: Duration = Duration::from_secs(1200);
/// What dpkg and systemctl themselves keep and write.
const DPKG: [&str; 6] = ["var/lib/dpkg", "var/log", "var/cache", "etc/passwd", "etc/group", "run/systemd"];

/// `now` and `next` are packages of two versions.
pub(super) fn verify(checkout: &Checkout, now: &Path, next: &Path, boots: bool) -> Result<()> {
    run::require_root("making a tree of Debian")?;
    let base = base(checkout)?;
    let root = checkout.target.join("package/root");
    let _gone = Tree(root.clone());
    unpack(&base, &root)?;
    in_a_tree(&root, now, next)?;
    if boots { boot(checkout, &root, now, next) } else { Ok(()) }
}

/// Goes with its value.
struct Tree(PathBuf);

impl Drop for Tree {
    fn drop(&mut self) {
        for inside in ["proc", "sys", "dev"] {
            let _unmounted = run::sh(&format!("umount --quiet --lazy {}", self.0.join(inside).display()));
        }
        if self.0.exists()
            && let Err(error) = fs::remove_dir_all(&self.0)
        {
            eprintln!("remove {} by hand: {error}", self.0.display());
        }
    }
}

/// A tree of Debian, made once.
fn base(checkout: &Checkout) -> Result<PathBuf> {
    let archive = checkout.target.join(format!("package/{SUITE}.tar"));
    if archive.is_file() {
        return Ok(archive);
    }
    let folder = checkout.target.join("package/debootstrap");
    let _gone = Tree(folder.clone());
    let mut make = Command::new("debootstrap");
    make.args(["--variant=minbase", &format!("--include={PACKAGES}"), SUITE]).arg(&folder).arg(MIRROR);
    quiet("debootstrap", &checkout.target.join("package/log/debootstrap.log"), &mut make)?;
    let new = archive.with_extension("new");
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "--xattrs", "--create", "--file"])
        .arg(&new)
        .arg("--directory")
        .arg(&folder)
        .arg(".");
    run::output(&mut tar)?;
    fs::rename(&new, &archive)?;
    Ok(archive)
}

fn unpack(archive: &Path, root: &Path) -> Result<()> {
    if root.exists() {
        fs::remove_dir_all(root)?;
    }
    fs::create_dir_all(root)?;
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "--xattrs", "--extract", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(root);
    run::output(&mut tar).map(drop)
}

fn chroot(root: &Path, line: &str) -> Result<String> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--mount-proc"]).arg(format!("--root={}", root.display()));
    command
        .args(["/bin/sh", "-euc", line])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    run::output(&mut command).with_context(|| line.to_owned())
}

/// Installed, looked at, replaced by the next version and by this one again, removed, purged.
fn in_a_tree(root: &Path, now: &Path, next: &Path) -> Result<()> {
    let started = Instant::now();
    let before = listed(root)?;
    for (name, package) in [("now.deb", now), ("next.deb", next)] {
        fs::copy(package, root.join(name))?;
    }
    chroot(root, "dpkg --install /now.deb")?;
    let says = chroot(root, "tunnel --version")?;
    ensure!(says.starts_with("tunnel "), "tunnel --version says {says:?}");
    let page = chroot(root, "zcat /usr/share/man/man1/tunnel-run.1.gz")?;
    ensure!(page.contains(".TH"), "there is no manual page of `tunnel run`");
    chroot(
        root,
        "test -s /usr/share/bash-completion/completions/tunnel && getent passwd tunnel && test -d /etc/tunnel",
    )?;
    for unit in ["tunnel-agent.service", "tunnel-gateway.service"] {
        chroot(root, &format!("systemd-analyze verify --man=no {unit}"))?;
        let enabled = chroot(root, &format!("systemctl is-enabled {unit} || true"))?;
        ensure!(enabled.trim() == "disabled", "{unit} is {enabled:?} after the installation");
    }
    chroot(
        root,
        "echo '# mine' >/etc/tunnel/agent.toml; dpkg --install /next.deb; dpkg --install /now.deb; grep -q mine /etc/tunnel/agent.toml",
    )?;
    chroot(root, "rm /etc/tunnel/agent.toml; dpkg --remove tunnel; test ! -e /usr/bin/tunnel")?;
    chroot(root, "dpkg --purge tunnel; ! getent passwd tunnel")?;
    for name in ["now.deb", "next.deb"] {
        fs::remove_file(root.join(name))?;
    }
    let left: Vec<_> = listed(root)?.difference(&before).cloned().collect();
    ensure!(left.is_empty(), "what purge has left behind:\n  {}", left.join("\n  "));
    println!(
        "{} installed, replaced, removed, purged: nothing is left {}",
        green("ok "),
        dim(&took(started))
    );
    Ok(())
}

fn listed(root: &Path) -> Result<BTreeSet<String>> {
    let mut found = run::output(Command::new("find").arg(root).args(["-mindepth", "1", "-printf", "%P\\n"]))?
        .lines()
        .map(str::to_owned)
        .collect::<BTreeSet<_>>();
    found.retain(|file| !DPKG.iter().any(|of_dpkg| file.starts_with(of_dpkg)));
    Ok(found)
}

/// Boots the tree with systemd as its init, and does there what the script says.
fn boot(checkout: &Checkout, root: &Path, now: &Path, next: &Path) -> Result<()> {
    let started = Instant::now();
    let folder = checkout.target.join("package/guest");
    fs::create_dir_all(&folder)?;
    for (name, package) in [("now.deb", now), ("next.deb", next)] {
        fs::copy(package, root.join(name))?;
    }
    fs::write(root.join("guest.sh"), GUEST)?;
    fs::write(
        root.join("etc/systemd/system/guest.service"),
        "[Service]\nType=oneshot\nExecStart=/bin/bash /guest.sh\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS0\n\
         ExecStopPost=/bin/systemctl poweroff --force\n[Install]\nWantedBy=multi-user.target\n",
    )?;
    chroot(
        root,
        "systemctl enable guest.service; systemctl mask getty@tty1.service serial-getty@ttyS0.service",
    )?;
    let found = |begin: &str| -> Result<PathBuf> {
        let names = files_of(&root.join("boot"))?;
        let name = names.into_iter().find(|name| name.starts_with(begin));
        let name = name.with_context(|| format!("debootstrap has installed no {begin}"))?;
        let copy = folder.join(begin);
        fs::copy(root.join("boot").join(name), &copy)?;
        Ok(copy)
    };
    let (kernel, initrd) = (found("vmlinuz")?, found("initrd")?);
    let disk = folder.join("disk");
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d"]).arg(root).arg(&disk).arg("3G");
    quiet("a disk of the tree", &folder.join("mke2fs.log"), &mut make)?;

    let console = folder.join("console");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        "2G",
        "-nographic",
        "-no-reboot",
    ]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    qemu.args([
        "-append",
        "root=/dev/vda rw console=ttyS0 panic=-1 quiet systemd.show_status=0 net.ifnames=0",
    ]);
    qemu.args([
        "-drive",
        &format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()),
        "-nic",
        "none",
    ]);
    qemu.stdin(Stdio::null()).stdout(File::create(&console)?).stderr(Stdio::inherit());
    let mut machine = qemu.spawn().context("qemu-system-x86_64 does not start")?;
    let watched = watch(&mut machine, &console, started);
    run::stop(&mut machine)?;
    fs::remove_file(&disk)?;
    watched.with_context(|| format!("the whole console is in {}", console.display()))?;
    println!(
        "{} used, upgraded under load, downgraded, removed under systemd {}",
        green("ok "),
        dim(&took(started))
    );
    Ok(())
}

/// Shows what the script says, until it is done.
fn watch(machine: &mut std::process::Child, console: &Path, started: Instant) -> Result<()> {
    let mut file = File::open(console)?;
    let (mut known, mut text) = (0, String::new());
    loop {
        let ended = machine.try_wait()?.is_some();
        file.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        text.clear();
        text.push_str(&String::from_utf8_lossy(&bytes));
        let told: Vec<_> =
            text.lines().filter_map(|line| line.split_once("guest: ")).map(|(_, said)| said.trim()).collect();
        for said in &told[known..] {
            eprintln!("    {} {said}", took(started));
        }
        known = told.len();
        if told.contains(&"done") {
            return Ok(());
        }
        if let Some(failed) = told.iter().find(|said| said.starts_with("FAILED")) {
            let tail: Vec<_> = text.lines().rev().take(60).collect();
            bail!("{failed}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        ensure!(!ended, "the machine ended before everything was done");
        ensure!(started.elapsed() < PATIENCE, "not done within {PATIENCE:?}");
        run::pause(Duration::from_millis(500))?;
    }
}

fn files_of(folder: &Path) -> Result<Vec<String>> {
    Ok(files(folder)?.into_iter().map(|file| file.to_string_lossy().into_owned()).collect())
}
