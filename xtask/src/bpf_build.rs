//! How the kernel programs are built: the one recipe, shared by `tunnel-user/build.rs` and `cargo xtask`.
//!
//! # Invariants
//! - An object (BTF, no DWARF) depends on the sources and the versions of the tools only, not on the folder, the user or the
//!   environment of the build: a committed object can be checked against its source byte for byte.
//! - Nothing is installed, and of the environment only `TUNNEL_TOOLS_DIR`, `PATH`, `LLVM_PREFIX`, `CARGO` and `CARGO_HOME` are
//!   read.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// The LLVM that Debian's `rustc-web` is built with; bpf-linker has to read the bitcode which that writes.
pub(crate) const LLVM: &str = "22";

/// The objects: one for each program of the package, loaded by itself.
pub(crate) const OBJECTS: [&str; 4] = ["tunnel-ebpf", "splice", "bypass", "steer"];

/// Where the committed objects lie, relative to the checkout.
pub(crate) const PREBUILT: &str = "tunnel-ebpf/prebuilt";

/// What the committed objects were built from and with, relative to the checkout.
pub(crate) const PROVENANCE: &str = "tunnel-ebpf/prebuilt/BUILT-FROM";

/// Everything the objects are made of, relative to the checkout; folders are taken whole.
pub(crate) const SOURCES: [&str; 4] =
    ["tunnel-common/Cargo.toml", "tunnel-common/src", "tunnel-ebpf/Cargo.toml", "tunnel-ebpf/src"];

const TARGET: &str = "bpfel-unknown-none";

/// A compiler, a linker and a stripper for BPF, found on this machine.
pub(crate) struct Toolchain {
    core: Core,
    rustc: PathBuf,
    linker: PathBuf,
    objcopy: PathBuf,
}

/// Where the BPF target's `core` comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Core {
    /// Shipped compiled (Debian's `libstd-rust-web-dev-bpf`).
    Prebuilt,
    /// Compiled along, from nightly's `rust-src` (`-Z build-std`).
    Source,
}

impl Toolchain {
    /// Finds a complete toolchain, or says what is missing.
    pub(crate) fn find(checkout: &Path) -> Result<Self> {
        let (core, rustc) = find_rustc().context(
            "no Rust compiler with a `core` for BPF: neither Debian's rustc-web with libstd-rust-web-dev-bpf, \
             nor a nightly toolchain with rust-src",
        )?;
        let linker = in_folder(&tools_dir(checkout).join("bin"), "bpf-linker")
            .or_else(|| in_path("bpf-linker"))
            .context("no bpf-linker, neither in the project's tools folder nor on PATH")?;
        let objcopy = in_folder(&llvm_prefix().join("bin"), "llvm-objcopy")
            .or_else(|| in_path("llvm-objcopy"))
            .context("no llvm-objcopy")?;
        Ok(Self { core, rustc, linker, objcopy })
    }

    /// The versions that decide what the object looks like, one per line.
    pub(crate) fn versions(&self) -> Result<String> {
        Ok(format!("{}\n{}\n", version(&self.rustc)?, version(&self.linker)?))
    }

    /// The command that compiles (`build`) or examines (`check`) the kernel programs, with nothing inherited
    /// from an outer cargo. `target_dir` must not be the outer cargo's: it holds that folder's lock.
    pub(crate) fn cargo(&self, checkout: &Path, verb: &str, target_dir: &Path) -> Result<Command> {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        for (name, _) in env::vars_os() {
            if is_of_outer_build(&name) {
                command.env_remove(name);
            }
        }
        command
            .current_dir(checkout)
            .args([verb, "--locked", "--package", "tunnel-ebpf", "--release", "--target", TARGET, "--target-dir"])
            .arg(target_dir)
            .env("RUSTC", &self.rustc)
            // Empty, not absent: a wrapper in the user's cargo configuration is switched off as well.
            .env("RUSTC_WRAPPER", "")
            .env("RUSTC_WORKSPACE_WRAPPER", "")
            .env("CARGO_ENCODED_RUSTFLAGS", self.rustflags(checkout)?);
        match self.core {
            // aya-ebpf uses `asm_experimental_arch`, which a stable compiler takes only with this.
            Core::Prebuilt => command.env("RUSTC_BOOTSTRAP", "1"),
            Core::Source => command.args(["-Z", "build-std=core"]),
        };
        Ok(command)
    }

    /// The lints' compiler that belongs to the compiler.
    pub(crate) fn clippy_driver(&self) -> Result<PathBuf> {
        let driver = self.rustc.with_file_name("clippy-driver");
        ensure!(driver.is_file(), "{} is missing", driver.display());
        Ok(driver)
    }

    /// Builds the objects and returns the bytes of each, in the order of [`OBJECTS`].
    pub(crate) fn build(&self, checkout: &Path, target_dir: &Path) -> Result<[Vec<u8>; OBJECTS.len()]> {
        let status = self
            .cargo(checkout, "build", target_dir)?
            .stdin(Stdio::null())
            .status()
            .context("cargo does not start")?;
        ensure!(status.success(), "the kernel programs do not build ({status})");

        let mut objects = OBJECTS.map(|_| Vec::new());
        for (object, name) in objects.iter_mut().zip(OBJECTS) {
            *object = self.strip(&target_dir.join(TARGET).join("release").join(name), target_dir, name)?;
        }
        Ok(objects)
    }

    /// The bytes of a linked program without what only a debugger reads.
    fn strip(&self, linked: &Path, target_dir: &Path, name: &str) -> Result<Vec<u8>> {
        let stripped = target_dir.join(file_name(name));
        let status = Command::new(&self.objcopy)
            .arg("--strip-debug")
            .args([linked, &stripped])
            .status()
            .with_context(|| format!("{} does not start", self.objcopy.display()))?;
        ensure!(status.success(), "{} failed on {}", self.objcopy.display(), linked.display());
        fs::read(&stripped).with_context(|| format!("reading {}", stripped.display()))
    }

    fn rustflags(&self, checkout: &Path) -> Result<OsString> {
        let checkout = checkout.canonicalize()?;
        let mut flags = OsString::from("-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clinker=");
        flags.push(&self.linker);
        // BTF's line information names source files: neither the checkout's place, nor the user's, nor the
        // registry's (a folder per index or mirror) may show. Of two that match, the later one counts.
        let cargo_home = cargo_home()?;
        let indexes = fs::read_dir(cargo_home.join("registry/src")).into_iter().flatten().flatten();
        let indexes = indexes.map(|index| (index.path(), "/cargo/registry"));
        let all = [(cargo_home, "/cargo")].into_iter().chain(indexes).chain([(checkout, "/tunnel")]);
        for (from, to) in all {
            flags.push("\x1f--remap-path-prefix=");
            flags.push(from);
            flags.push("=");
            flags.push(to);
        }
        if self.core == Core::Source {
            flags.push("\x1f--remap-path-prefix=");
            flags.push(sysroot(&self.rustc).context("the nightly compiler does not answer")?);
            flags.push("=/rust");
        }
        Ok(flags)
    }
}

/// The file of one of [`OBJECTS`].
pub(crate) fn file_name(object: &str) -> String {
    format!("{object}.bpf.o")
}

/// The project's own tools folder.
pub(crate) fn tools_dir(checkout: &Path) -> PathBuf {
    env::var_os("TUNNEL_TOOLS_DIR").map_or_else(|| checkout.join(".tools"), PathBuf::from)
}

/// Where the LLVM lives that bpf-linker is linked with.
pub(crate) fn llvm_prefix() -> PathBuf {
    env::var_os("LLVM_PREFIX").map_or_else(|| format!("/usr/lib/llvm-{LLVM}").into(), PathBuf::from)
}

/// What [`PROVENANCE`] has to say when the committed objects are what `checkout`'s sources give.
pub(crate) fn sources_line(checkout: &Path) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&checkout.join(source), &mut files)?;
    }
    files.sort();
    // FNV-1a: this notices a change, it keeps nobody out; byte equality of the object is CI's business.
    let mut digest: u64 = 0xcbf2_9ce4_8422_2325;
    let mut add = |bytes: &[u8]| {
        for byte in bytes.iter().chain(&[0]) {
            digest = (digest ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for file in files {
        let name = file.strip_prefix(checkout).unwrap_or(&file);
        add(name.as_os_str().as_encoded_bytes());
        add(&fs::read(&file).with_context(|| format!("reading {}", file.display()))?);
    }
    Ok(format!("sources {digest:016x}"))
}

/// The first executable called `name` on `PATH`.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).find_map(|folder| in_folder(&folder, name))
}

fn in_folder(folder: &Path, name: &str) -> Option<PathBuf> {
    let file = folder.join(name);
    file.is_file().then_some(file)
}

fn find_rustc() -> Option<(Core, PathBuf)> {
    let debian = PathBuf::from("/usr/bin/rustc");
    if debian.is_file() && sysroot(&debian)?.join("lib/rustlib").join(TARGET).join("lib").is_dir() {
        return Some((Core::Prebuilt, debian));
    }
    let rustup = in_path("rustup")?;
    let found = Command::new(rustup)
        .args(["which", "--toolchain", "nightly", "rustc"])
        // Looking must not download a toolchain.
        .env("RUSTUP_AUTO_INSTALL", "0")
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let nightly = PathBuf::from(String::from_utf8(found.stdout).ok()?.trim_end());
    let complete =
        found.status.success() && sysroot(&nightly)?.join("lib/rustlib/src/rust/library/core").is_dir();
    complete.then_some((Core::Source, nightly))
}

fn sysroot(rustc: &Path) -> Option<PathBuf> {
    let mut command = Command::new(rustc);
    command.args(["--print", "sysroot"]).stderr(Stdio::null());
    for (name, _) in env::vars_os().filter(|(name, _)| is_of_outer_build(name)) {
        command.env_remove(name);
    }
    let answer = command.output().ok()?;
    answer.status.success().then(|| String::from_utf8_lossy(&answer.stdout).trim_end().into())
}

fn version(program: &Path) -> Result<String> {
    let answer = Command::new(program).arg("--version").env_remove("LD_LIBRARY_PATH").output()?;
    ensure!(answer.status.success(), "{} --version failed", program.display());
    Ok(String::from_utf8(answer.stdout)?.lines().next().unwrap_or_default().to_owned())
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    match env::home_dir() {
        Some(home) => Ok(home.join(".cargo")),
        None => bail!("neither CARGO_HOME nor HOME is set"),
    }
}

/// What an outer cargo, rustup or clippy leaves in the environment and a build for another target must not see.
/// Kept: where cargo's home and the registries are, proxies, and the job server.
fn is_of_outer_build(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    const PREFIXES: [&str; 5] =
        ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_", "CARGO_ENCODED_"];
    const NAMES: [&str; 12] = [
        "CARGO_INCREMENTAL",
        "CLIPPY_ARGS",
        // The outer toolchain's own libraries.
        "LD_LIBRARY_PATH",
        "RUSTC",
        "RUSTC_BOOTSTRAP",
        "RUSTC_LINKER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTDOCFLAGS",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
    ];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_file() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}
