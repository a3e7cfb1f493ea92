//! The image, built by buildah from examples/container/Containerfile and the tarball, without a network.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};

use super::{Release, tarball, tree::Tree};
use crate::run::{Checkout, in_path_or_sbin, quiet};

pub(super) fn make(checkout: &Checkout, release: &Release, tree: &Tree) -> Result<PathBuf> {
    ensure!(
        in_path_or_sbin("buildah").is_some(),
        "the image needs buildah: apt-get install --no-install-recommends buildah crun"
    );
    tarball::make(checkout, release, tree)?;
    let context = release.out.join("tar").join(tarball::name(release));
    let layout = release.out.join("oci");
    if layout.exists() {
        fs::remove_dir_all(&layout)?;
    }
    let storage = release.out.join("storage");
    let mut build = release.command("buildah");
    // A storage of its own, removed below. Nothing is run in the image, so nothing has to be isolated, and nothing is fetched.
    build.arg("--root").arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
    build.args(["--storage-driver", "vfs", "build", "--isolation", "chroot", "--pull=never"]);
    build.arg("--timestamp").arg(release.epoch.to_string());
    build.arg("--tag").arg(format!("oci:{}:tunnel:{}", layout.display(), release.version));
    build.arg("--file").arg(checkout.root.join("examples/container/Containerfile")).arg(&context);
    let built = quiet("buildah", &release.log("buildah"), &mut build);
    if storage.exists() {
        fs::remove_dir_all(&storage)?;
    }
    built?;
    // Its own archives have the time at which they were written.
    let image = release.out.join(format!("{}.oci.tar", tarball::name(release)));
    tarball::archive(release, &layout, &["blobs", "index.json", "oci-layout"], &image)?;
    Ok(image)
}
