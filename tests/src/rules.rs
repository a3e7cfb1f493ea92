//! The iptables rules that an operator would write, in a test's own network namespace. They are removed with the host;
//! the machine's own rules are not touched.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::{cgroup, cgroup::Cgroup, netns::NetNs, process, programs};

/// The mark of the daemon's own sockets.
const MARK: &str = "0x1000/0x1000";

/// What the rules are made of, in case that the kernel cannot load it by itself.
pub const NEEDS: &str = "rules take nf_tables with NAT and iptables' matches (where these are modules: modprobe -a nf_tables \
                         nft_compat nft_chain_nat xt_cgroup xt_mark xt_REDIRECT)";

/// Redirects what a group connects to, of both families, to `port`: the commands of `examples/redirect.toml`.
pub fn redirect(host: &NetNs, group: &Cgroup, port: u16) -> Result<()> {
    // iptables counts paths from the root of the hierarchy.
    let within = |root: &Path| group.path().strip_prefix(root).ok().map(Path::to_owned);
    let path =
        cgroup::mounts().iter().find_map(|root| within(root)).context("the group is in no hierarchy")?;
    for program in ["iptables-nft", "ip6tables-nft"] {
        let mut rule = host.command(programs::system(program)?);
        rule.args(["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-m", "cgroup", "--path"]).arg(&path);
        rule.args(["-m", "mark", "!", "--mark", MARK, "-j", "REDIRECT", "--to-ports", &port.to_string()]);
        process::output(&mut rule).context(NEEDS)?;
    }
    Ok(())
}
