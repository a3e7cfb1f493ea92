//! The program of the packages: static, without paths of this machine, its symbols beside it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{Arch, Release};
use crate::run::{self, Checkout, foreground, in_path_or_sbin};

/// How it is compiled.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Profile {
    Release,
    Dev,
}

impl Profile {
    fn folder(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "debug",
        }
    }
}

impl Arch {
    fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// What Debian's tools for it begin with, where it is not this machine's.
    fn prefix(self) -> &'static str {
        if self.name() == env::consts::ARCH {
            return "";
        }
        match self {
            Self::X86_64 => "x86_64-linux-gnu-",
            Self::Aarch64 => "aarch64-linux-gnu-",
        }
    }
}

/// Builds it, and strips it: `target/package/tunnel-ARCH`, and `tunnel-ARCH.debug` for debuggers.
pub(super) fn build(checkout: &Checkout, release: &Release, profile: Profile) -> Result<PathBuf> {
    let arch = release.arch;
    let (target, prefix) = (arch.target(), arch.prefix());
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    // What compilers write down of where they were: the same for everybody.
    let places = [(checkout.root.as_path(), "/tunnel"), (cargo_home.as_path(), "/cargo")];
    let mapped = |flag: &str| {
        let flags = places.iter().map(|(from, to)| format!("{flag}={}={to}", from.display()));
        flags.collect::<Vec<_>>().join(" ")
    };
    let mut cargo = checkout.cargo(["build", "--locked", "--package", "tunnel-user", "--bin", "tunnel"]);
    // Named even where it is this machine's: flags are then the program's alone, and not those of build scripts.
    cargo.args(["--target", target, "--target-dir"]).arg(checkout.target.join("package/build"));
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    cargo
        .env("RUSTFLAGS", format!("-C target-feature=+crt-static {}", mapped("--remap-path-prefix")))
        .env("CFLAGS", mapped("-ffile-prefix-map"))
        .env("SOURCE_DATE_EPOCH", release.epoch.to_string())
        // CI has proved that they are what the sources give.
        .env("TUNNEL_BPF", "prebuilt")
        .env_remove("CARGO_PROFILE_DEV_DEBUG");
    if !prefix.is_empty() {
        let gcc = format!("{prefix}gcc");
        ensure!(
            in_path_or_sbin(&gcc).is_some(),
            "{gcc} is missing: apt-get install gcc-{}linux-gnu",
            prefix.trim_end_matches("linux-gnu-")
        );
        let upper = target.to_uppercase().replace('-', "_");
        cargo
            .env(format!("CARGO_TARGET_{upper}_LINKER"), &gcc)
            .env(format!("CC_{}", target.replace('-', "_")), &gcc);
    }
    foreground(&format!("building a static program for {}", arch.name()), &mut cargo).with_context(|| {
        format!("where the compiler has no standard library for it: rustup target add {target}")
    })?;
    let built = checkout.target.join("package/build").join(target).join(profile.folder()).join("tunnel");
    strip(&built, &release.out, release)
}

fn strip(built: &Path, out: &Path, release: &Release) -> Result<PathBuf> {
    let prefix = release.arch.prefix();
    let name = format!("tunnel-{}", release.arch.name());
    let (stripped, symbols) = (out.join(&name), out.join(format!("{name}.debug")));
    let objcopy = |args: &[&str], from: &Path, to: &Path| {
        let mut command = Command::new(format!("{prefix}objcopy"));
        command.args(args).arg(from).arg(to);
        run::output(&mut command).map(drop)
    };
    objcopy(&["--only-keep-debug"], built, &symbols)?;
    // The note's build ID would differ from link to link only if the rest did; `.comment` names the compilers.
    objcopy(
        &["--strip-all", "--remove-section=.comment", "--remove-section=.note.gnu.gold-version"],
        built,
        &stripped,
    )?;
    is_static(&stripped)?;
    fs::metadata(&stripped)?;
    Ok(stripped)
}

/// Nothing is loaded beside it, whatever the linker made of the flags.
fn is_static(program: &Path) -> Result<()> {
    let headers =
        run::output(Command::new("readelf").args(["--program-headers", "--dynamic", "--wide"]).arg(program))?;
    ensure!(
        !headers.contains("INTERP") && !headers.contains("(NEEDED)"),
        "{} is not static:\n{headers}",
        program.display()
    );
    Ok(())
}
