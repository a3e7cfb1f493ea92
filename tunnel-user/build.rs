//! Puts the kernel programs' objects into `$OUT_DIR`, where their loaders include them (`NAME.bpf.o`).
//!
//! `TUNNEL_BPF` decides: `source` builds them, or fails; `prebuilt` takes the committed objects; `auto` (the
//! default) builds them where a BPF toolchain is present and takes the committed ones elsewhere, so that plain
//! `cargo build` needs nothing but stable Rust and a C compiler.

#![expect(clippy::disallowed_methods, reason = "the environment is cargo's interface to a build script")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};

#[path = "../xtask/src/bpf_build.rs"]
#[expect(dead_code, reason = "shared with xtask, which uses all of it")]
mod bpf_build;

use bpf_build::{OBJECTS, PREBUILT, PROVENANCE, SOURCES, Toolchain};

/// The bytes of each of [`OBJECTS`].
type Objects = [Vec<u8>; OBJECTS.len()];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error={error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR")?);
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR")?);
    let checkout = package.parent().context("the package lies inside the checkout")?;

    for name in ["TUNNEL_BPF", "TUNNEL_TOOLS_DIR", "LLVM_PREFIX"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for path in
        SOURCES.iter().chain(&["Cargo.lock", PREBUILT, "xtask/src/bpf_build.rs", "tunnel-user/build.rs"])
    {
        let path = checkout.join(path);
        // Cargo takes a file that is not there for one that always changes.
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }

    let wanted = env::var("TUNNEL_BPF").unwrap_or_else(|_| "auto".to_owned());
    let objects = match wanted.as_str() {
        "source" => from_source(checkout, &out_dir)?,
        "prebuilt" => committed(checkout)?,
        "auto" => from_either(checkout, &out_dir)?,
        other => bail!("TUNNEL_BPF is {other:?}; it is one of source, prebuilt, auto"),
    };
    for (object, name) in objects.iter().zip(OBJECTS) {
        fs::write(out_dir.join(bpf_build::file_name(name)), object)?;
    }
    Ok(())
}

fn from_either(checkout: &Path, out_dir: &Path) -> Result<Objects> {
    let unchanged = fs::read_to_string(checkout.join(PROVENANCE)).is_ok_and(|provenance| {
        bpf_build::sources_line(checkout).is_ok_and(|line| provenance.lines().any(|l| l == line))
    });
    match Toolchain::find(checkout).map(|_| from_source(checkout, out_dir)) {
        Ok(Ok(objects)) => Ok(objects),
        Ok(Err(error)) if unchanged => {
            println!(
                "cargo::warning=building the kernel programs failed, the committed objects are used: {error:#}"
            );
            committed(checkout)
        }
        Ok(Err(error)) => Err(error),
        Err(missing) => {
            if !unchanged {
                println!(
                    "cargo::warning=the kernel programs' sources have changed, but the committed objects are used: \
                     {missing:#}; `cargo xtask setup --only build` installs it"
                );
            }
            committed(checkout)
        }
    }
}

fn from_source(checkout: &Path, out_dir: &Path) -> Result<Objects> {
    let toolchain = Toolchain::find(checkout).context("`cargo xtask setup --only build` installs it")?;
    toolchain.build(checkout, &bpf_target_dir(out_dir))
}

fn committed(checkout: &Path) -> Result<Objects> {
    let mut objects = Objects::default();
    for (object, name) in objects.iter_mut().zip(OBJECTS) {
        let path = checkout.join(PREBUILT).join(bpf_build::file_name(name));
        *object =
            fs::read(&path).with_context(|| format!("reading the committed object {}", path.display()))?;
    }
    Ok(objects)
}

/// A folder beside the profiles' in the outer target folder: all profiles share one build of the kernel
/// programs, and the outer cargo's lock, which lies in the profile's folder, is not waited for.
fn bpf_target_dir(out_dir: &Path) -> PathBuf {
    let is_target = |folder: &&Path| folder.join(".rustc_info.json").is_file();
    out_dir.ancestors().find(is_target).unwrap_or(out_dir).join("bpf")
}
