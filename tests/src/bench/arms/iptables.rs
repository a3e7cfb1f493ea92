//! Redirection by iptables, as a sidecar sets it up.

use std::{
    fmt::Write as _,
    io::Write as _,
    net::IpAddr,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::unrelated;
use crate::{
    cgroup::{self, Cgroup},
    programs, rules,
    world::World,
};

/// Sends what processes of `group` connect to at `to` to a local port; returns the rules, `rules` unrelated ones in
/// front.
pub(super) fn redirect(world: &World, group: &Cgroup, to: IpAddr, port: u16, rules: u32) -> Result<String> {
    let roots = cgroup::mounts();
    let path = roots.iter().find_map(|root| group.path().strip_prefix(root).ok());
    let path = path.context("the group is in no cgroup2 hierarchy")?.display();
    let mut text = String::from("*nat\n");
    for address in unrelated(rules) {
        writeln!(text, "-A OUTPUT -p tcp -d {address}/32 -j REDIRECT --to-ports 1")?;
    }
    writeln!(
        text,
        "-A OUTPUT -p tcp -m cgroup --path {path} -d {to}/32 -j REDIRECT --to-ports {port}\nCOMMIT"
    )?;
    // In the namespace of this world only: nobody else's connections are tracked.
    let mut restore: Command = world.node().command(programs::system("iptables-nft-restore")?);
    let mut restore = restore.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    restore.stdin.take().context("a pipe was asked for")?.write_all(text.as_bytes())?;
    let done = restore.wait_with_output()?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "iptables-nft-restore: {said}{}", rules::NEEDS);
    Ok(text)
}
