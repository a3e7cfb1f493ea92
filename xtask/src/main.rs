//! `cargo xtask`: everything around the code that is not the code.

#![expect(
    clippy::disallowed_methods,
    reason = "a build tool: its children's environment is its interface, and it waits"
)]

mod bench;
mod bpf_build;
mod build;
mod ci;
mod demo;
#[path = "../../tests/src/dmesg.rs"]
#[expect(unreachable_pub, dead_code, reason = "another package's file, of which tests use more")]
mod dmesg;
mod docs;
mod fuzz;
mod guide;
mod leftovers;
mod matrix;
mod package;
mod promises;
mod rooms;
mod run;
mod setup;
mod test;
mod unsafes;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use run::{Checkout, Interrupted};

/// Sets up, builds, demonstrates and tests `tunnel`.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what building from source, testing and linting need; safe to repeat.
    Setup(setup::Args),
    /// Builds the kernel programs and rewrites the committed object.
    BuildEbpf(build::Args),
    /// Shows an unmodified curl reach a server it has no route to.
    Demo(demo::Args),
    /// Runs every test: unit, end-to-end, documentation.
    Test(test::Args),
    /// Measures tunnel against direct TCP, iptables redirection, Envoy and redsocks.
    ///
    /// Every arm runs in network namespaces of its own; runs are interleaved, in an order drawn anew in each round.
    /// Results go to the terminal, to report.html for people and to report.json for programs. Needs root.
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::Args),
    /// Looks for inputs that break what is promised of every input; with an address sanitizer.
    #[command(after_help = fuzz::EXAMPLES)]
    Fuzz(fuzz::Args),
    /// Writes the generated pages of the book, checks all documents, and builds the book.
    #[command(after_help = docs::EXAMPLES)]
    Docs(docs::Args),
    /// Shows which room imports which, and fails where an arrow runs back.
    #[command(after_help = rooms::EXAMPLES)]
    Rooms(rooms::Args),
    /// Shows what is promised and the test that keeps it, and fails where an end-to-end test states no promise.
    #[command(after_help = promises::EXAMPLES)]
    Promises(promises::Args),
    /// Runs tests on Debian's kernels 6.1 and 6.12, under QEMU without KVM; takes minutes.
    ///
    /// Downloads the kernels' packages, unpacks them in target/matrix (nothing is installed), boots each on top of this
    /// machine's files, which it cannot change, and reports what `tunnel doctor` finds there, which tests pass, and what
    /// the kernel complains of. Not part of `cargo xtask ci`.
    #[command(after_help = matrix::EXAMPLES)]
    Matrix(matrix::Args),
    /// What `cargo xtask matrix` runs in the kernels that it boots.
    #[command(hide = true)]
    MatrixGuest(matrix::guest::Args),
    /// What `cargo xtask verify --only guide` runs in mounts of its own.
    #[command(hide = true)]
    GuidePages(guide::Args),
    /// Makes packages: Debian, RPM, a tarball with a static program, an image; and shows that two builds are the same.
    #[command(after_help = package::EXAMPLES)]
    Package(package::Args),
    /// What has to pass before a merge: format, lints, documentation, licences, kernel object, tests.
    Ci,
    /// What has to hold before an issue is closed: the suite under BBR and CUBIC, other kernels, long soaks, a long try to escape.
    #[command(after_help = verify::EXAMPLES)]
    Verify(verify::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = Checkout::find().and_then(|checkout| match cli.task {
        Task::Setup(args) => setup::run(&checkout, &args),
        Task::BuildEbpf(args) => build::run(&checkout, &args),
        Task::Demo(args) => demo::run(&checkout, &args),
        Task::Test(args) => test::run(&checkout, &args),
        Task::Bench(args) => bench::run(&checkout, &args),
        Task::Fuzz(args) => fuzz::run(&checkout, &args),
        Task::Docs(args) => docs::run(&checkout, &args),
        Task::Rooms(args) => rooms::run(&checkout, &args),
        Task::Promises(args) => promises::run(&checkout, &args),
        Task::Matrix(args) => matrix::run(&checkout, &args),
        Task::MatrixGuest(args) => matrix::guest::run(&args),
        Task::GuidePages(args) => guide::run(&checkout, &args),
        Task::Package(args) => package::run(&checkout, &args),
        Task::Ci => ci::run(&checkout),
        Task::Verify(args) => verify::run(&checkout, &args),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("interrupted");
            ExitCode::from(130)
        }
        Err(error) => {
            run::show_error(&error);
            ExitCode::FAILURE
        }
    }
}
