//! What has to hold of packages beside their contents: units and manifests are valid, two builds give the same bytes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::tree::files;
use crate::{
    run::{self, Checkout, foreground, green, in_path_or_sbin},
    setup,
};

/// The version of Kubernetes that manifests are validated for.
const KUBERNETES: &str = "1.33";

/// `systemd-analyze verify`, of copies whose program is one that exists.
pub(super) fn units(checkout: &Checkout) -> Result<()> {
    let Some(analyze) = in_path_or_sbin("systemd-analyze") else {
        println!("{} without systemd-analyze: the units were NOT verified", run::red("but"));
        return Ok(());
    };
    let folder = checkout.target.join("package/units");
    fs::create_dir_all(&folder)?;
    let mut verify = Command::new(analyze);
    verify.args(["verify", "--man=no"]);
    for name in ["tunnel-agent.service", "tunnel-gateway.service"] {
        let unit = fs::read_to_string(checkout.root.join("examples/systemd").join(name))?;
        let copy = folder.join(name);
        fs::write(&copy, unit.replace("/usr/bin/tunnel ", "/bin/true "))?;
        verify.arg(copy);
    }
    let said = verify.output()?;
    let text = String::from_utf8_lossy(&said.stderr);
    // It says what it does not know and succeeds all the same.
    let of_ours: Vec<_> = text.lines().filter(|line| line.contains("tunnel-")).collect();
    ensure!(said.status.success() && of_ours.is_empty(), "systemd-analyze verify:\n{text}");
    println!("{} units", green("ok "));
    Ok(())
}

/// Every manifest of examples/kubernetes against the schemas of Kubernetes.
pub(super) fn manifests(checkout: &Checkout) -> Result<()> {
    let folder = checkout.root.join("examples/kubernetes");
    let mut validate = Command::new(setup::kubernetes_validate(checkout));
    validate.args(["--strict", "--kubernetes-version", KUBERNETES]);
    validate.args(files(&folder)?.iter().map(|file| folder.join(file)));
    foreground(&format!("manifests, for Kubernetes {KUBERNETES}"), &mut validate)
}

/// Makes everything once more, from a copy of the commit in another folder, and compares.
pub(super) fn again(
    checkout: &Checkout,
    made: &[PathBuf],
    make: impl FnOnce(&Checkout, &Path) -> Result<Vec<PathBuf>>,
) -> Result<()> {
    let changed =
        run::output(Command::new("git").current_dir(&checkout.root).args(["status", "--porcelain"]))?;
    ensure!(changed.is_empty(), "a copy of the commit would not have what is not committed:\n{changed}");
    let folder = std::env::temp_dir().join(format!("tunnel-reproduce-{}", std::process::id()));
    let compared = in_a_copy(checkout, &folder, made, make);
    fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    compared
}

fn in_a_copy(
    checkout: &Checkout,
    folder: &Path,
    made: &[PathBuf],
    make: impl FnOnce(&Checkout, &Path) -> Result<Vec<PathBuf>>,
) -> Result<()> {
    let copy = folder.join("a-folder-of-another-name");
    let mut clone = Command::new("git");
    clone.args(["clone", "--quiet", "--no-hardlinks"]).arg(&checkout.root).arg(&copy);
    run::output(&mut clone)?;
    let copy = Checkout { target: copy.join("target"), root: copy };
    let others = make(&copy, &folder.join("out"))?;
    ensure!(made.len() == others.len(), "the second time, {} packages were made", others.len());
    for (one, other) in made.iter().zip(&others) {
        let name = one.file_name().context("a package has a name")?.to_string_lossy();
        let (a, b) = (fs::read(one)?, fs::read(other)?);
        let differs = a
            .iter()
            .zip(&b)
            .position(|(a, b)| a != b)
            .or((a.len() != b.len()).then_some(a.len().min(b.len())));
        if let Some(at) = differs {
            let kept = one.with_extension("second");
            fs::copy(other, &kept)?;
            anyhow::bail!(
                "{name} differs from its second build from byte {at} on; that is in {}",
                kept.display()
            );
        }
        println!("{} {name}: the same bytes twice", green("ok "));
    }
    Ok(())
}
