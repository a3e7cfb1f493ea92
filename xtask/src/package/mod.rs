//! `cargo xtask package`: a Debian package, an RPM, a tarball and an image, all with one static program and from one tree.
//!
//! Not part of `cargo xtask ci`: a release build takes ten minutes. Decision 51 says why the program is static, and why the packages are
//! written by the distributions' own tools.
//!
//! # Invariants
//! - What is packed depends on the commit and the tools' versions alone: no time but the commit's, no path of this machine, names in
//!   order, root as owner.

mod check;
mod container;
mod deb;
mod install;
mod program;
mod rpm;
mod tarball;
mod tree;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    run::{self, Checkout, bold, catch_interrupts, green, took},
    setup::{self, Group},
};
use program::Profile;
use tree::Tree;

#[derive(Clone, clap::Args)]
pub(crate) struct Args {
    /// A Debian package, which lintian has to accept.
    #[arg(long)]
    deb: bool,
    /// An RPM.
    #[arg(long)]
    rpm: bool,
    /// A tarball.
    #[arg(long)]
    tar: bool,
    /// An image of the tarball's program, as an OCI archive. Needs buildah.
    #[arg(long)]
    container: bool,
    /// All of them. Default: all but the image.
    #[arg(long)]
    all: bool,

    /// What to build for. For arm64 with Debian's gcc-aarch64-linux-gnu; that has not been tried to its end.
    #[arg(long, value_enum, value_name = "ARCH", default_value_t = Arch::X86_64)]
    arch: Arch,

    /// Builds everything twice, the second time in a copy of the commit in another folder, and compares the bytes.
    #[arg(long)]
    check_reproducible: bool,

    /// Installs the Debian package in a tree of Debian, replaces it by another version and back, removes and purges it there. Needs
    /// root.
    #[arg(long, requires = "deb")]
    install_test: bool,
    /// Boots that tree with systemd in QEMU, where units are started, used, taken over under load, and the package is removed. Not a
    /// part of `cargo xtask verify`: it has been run as far as the reload of the agent.
    #[arg(long, requires = "install_test", hide = true)]
    boot: bool,

    /// Where the packages go.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,

    /// The profile of the program. With `dev`, packages are for trying the packaging.
    #[arg(long, value_enum, default_value_t = Profile::Release, hide = true)]
    profile: Profile,
    /// Called another version than that of the workspace.
    #[arg(long, value_name = "VERSION", hide = true)]
    package_version: Option<String>,
    /// This program, in place of one that is built.
    #[arg(long, value_name = "FILE", hide = true)]
    program: Option<PathBuf>,
}

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask package                        a .deb, an .rpm and a tarball in target/package
  cargo xtask package --deb --install-test   installed, replaced, removed and purged in a tree of Debian
  cargo xtask package --check-reproducible   twice, in two folders; the same bytes

One release build takes ten minutes on two cores. SOURCE_DATE_EPOCH is that of the commit unless it is set.";

/// What a package is built for.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    #[value(name = "x86_64")]
    X86_64,
    Aarch64,
}

impl Arch {
    /// As the kernel, rpm and the tarball call it.
    fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }
}

/// What all packages have in common.
struct Release {
    version: String,
    arch: Arch,
    /// Seconds since 1970 that every file is dated.
    epoch: u64,
    /// Where packages go.
    out: PathBuf,
}

impl Release {
    /// A command that is told the one time there is.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SOURCE_DATE_EPOCH", self.epoch.to_string()).env("LC_ALL", "C").env("TZ", "UTC");
        command
    }

    fn log(&self, name: &str) -> PathBuf {
        self.out.join("log").join(format!("{name}.log"))
    }
}

impl Args {
    /// The Debian package, tried out.
    pub(crate) fn install_test() -> Self {
        Self {
            deb: true,
            rpm: false,
            tar: false,
            container: false,
            all: false,
            arch: Arch::X86_64,
            check_reproducible: false,
            install_test: true,
            boot: false,
            out: None,
            profile: Profile::Release,
            package_version: None,
            program: None,
        }
    }
}

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let started = Instant::now();
    setup::ensure(checkout, &[Group::Package])?;
    catch_interrupts()?;
    check::units(checkout)?;
    check::manifests(checkout)?;
    let out = args.out.clone().unwrap_or_else(|| checkout.target.join("package"));
    let made = make(checkout, args, &out)?;
    if args.check_reproducible {
        check::again(checkout, &made, |copy, out| make(copy, args, out))?;
    }
    if args.install_test {
        let version = format!("{}+next", version(checkout)?);
        let next = Args {
            program: args.program.clone().or_else(|| Some(out.join(format!("tunnel-{}", args.arch.name())))),
            package_version: Some(version),
            ..args.clone()
        };
        let next = make(checkout, &next, &out.join("next"))?;
        let (Some(now), Some(next)) = (made.first(), next.first()) else { bail!("no package was made") };
        install::verify(checkout, now, next, args.boot)?;
    }
    for file in &made {
        let size = fs::metadata(file)?.len();
        println!("{} {} ({} KiB)", bold("made:"), file.display(), size / 1024);
    }
    println!("{} packages {}", green("ok "), took(started));
    Ok(())
}

/// Makes what was asked for, in the order of its names.
fn make(checkout: &Checkout, args: &Args, out: &Path) -> Result<Vec<PathBuf>> {
    let none = !(args.deb || args.rpm || args.tar || args.container);
    let wanted = |named: bool| named || args.all || none;
    let release = Release {
        version: match &args.package_version {
            Some(version) => version.clone(),
            None => version(checkout)?,
        },
        arch: args.arch,
        epoch: epoch(checkout)?,
        out: out.to_owned(),
    };
    fs::create_dir_all(out)?;
    let program = match &args.program {
        Some(program) => program.clone(),
        None => program::build(checkout, &release, args.profile)?,
    };
    let tree = Tree::lay(checkout, &release, &program)?;
    let mut made = Vec::new();
    if wanted(args.deb) {
        made.push(deb::make(checkout, &release, &tree)?);
    }
    if wanted(args.rpm) {
        made.push(rpm::make(&release, &tree)?);
    }
    if wanted(args.tar) {
        made.push(tarball::make(checkout, &release, &tree)?);
    }
    if args.container || args.all {
        made.push(container::make(checkout, &release, &tree)?);
    }
    Ok(made)
}

/// The workspace's.
fn version(checkout: &Checkout) -> Result<String> {
    let manifest = fs::read_to_string(checkout.root.join("Cargo.toml"))?.parse::<toml::Table>()?;
    let version = &manifest["workspace"]["package"]["version"];
    Ok(version.as_str().context("Cargo.toml: workspace.package.version is no text")?.to_owned())
}

/// SOURCE_DATE_EPOCH: as it is set, or the commit's (<https://reproducible-builds.org/specs/source-date-epoch/>).
fn epoch(checkout: &Checkout) -> Result<u64> {
    if let Ok(set) = env::var("SOURCE_DATE_EPOCH") {
        return set.trim().parse().with_context(|| format!("SOURCE_DATE_EPOCH is {set:?}"));
    }
    let mut git = Command::new("git");
    git.current_dir(&checkout.root).args(["log", "-1", "--format=%ct"]);
    let time = run::output(&mut git)
        .context("the time of the commit; set SOURCE_DATE_EPOCH where there is no git")?;
    time.trim().parse().with_context(|| format!("git says {time:?}"))
}

/// `path` as an argument, which has to be text.
fn text(path: &Path) -> Result<&str> {
    let text = path.to_str();
    ensure!(
        text.is_some_and(|t| !t.contains([' ', '"', '\''])),
        "{}: spaces and quotes are too much for rpm",
        path.display()
    );
    text.context("a path that is not text")
}
