//! Two hosts, a CA, and what a test adds.
//!
//! `node` runs applications; `net` is where the gateway and the targets are. One cable joins them, or a
//! [`Link`] that takes its time. The
//! targets' addresses exist in `net` only, and `node` has no route to them: what arrives there has come
//! through the gateway. Invariant: when a world ends, nothing that it made is left, or the test fails.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
    unistd::geteuid,
};
use tempfile::TempDir;

use crate::{
    exec::Exec,
    gateway::{self, Gateway},
    leftovers,
    link::{Link, Profile},
    netns::NetNs,
    pki::{Credentials, GATEWAY_ID, NODE_ID, Pki},
    target::{Handler, Target},
    wait::{PATIENCE, wait_for},
};

/// The node's end of the cable.
pub const NODE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
/// The other end, where the gateway listens.
pub const NET4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
/// The node's end of the cable.
pub const NODE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
/// The other end.
pub const NET6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2));
/// Where targets are; the node has no route to it.
pub const TARGET4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 200, 0, 10));
/// Where targets are; the node has no route to it.
pub const TARGET6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x200, 0, 0, 0, 0, 0, 0x10));
/// `net` has a route to it, and whatever takes it disappears.
pub const BLACKHOLE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 201, 0, 99));
/// Nobody has a route to it.
pub const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 202, 0, 1));

/// What the tests with the most connections need.
const DESCRIPTORS: u64 = 20_000;

/// The two hosts of one test.
#[derive(Debug)]
pub struct World {
    /// In place of the cable; goes before its ends.
    link: Option<Link>,
    node: NetNs,
    net: NetNs,
    pki: Pki,
    folder: TempDir,
    /// The processes of `tunnel exec`, by which their groups are named.
    execs: Mutex<Vec<u32>>,
}

impl World {
    /// Makes them. Fails without root: nothing here works without, and nothing is skipped.
    pub fn new() -> Result<Self> {
        Self::joined_by(|node, node_addresses, net, net_addresses| {
            node.join(node_addresses, net, net_addresses).map(|()| None)
        })
    }

    /// Makes them, with such a link for a cable.
    pub fn with_link(profile: Profile) -> Result<Self> {
        Self::joined_by(|node, node_addresses, net, net_addresses| {
            Link::join(node, node_addresses, net, net_addresses, profile).map(Some)
        })
    }

    fn joined_by(
        join: impl FnOnce(&NetNs, &[&str], &NetNs, &[&str]) -> Result<Option<Link>>,
    ) -> Result<Self> {
        ensure!(
            geteuid().is_root(),
            "end-to-end tests make network namespaces and load kernel programs: run them as root"
        );
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let enough = hard.max(DESCRIPTORS);
        setrlimit(Resource::RLIMIT_NOFILE, enough, enough).with_context(|| {
            format!(
                "a process here may have {hard} descriptors, and tests need {DESCRIPTORS}: raise the limit \
                 (ulimit -Hn {DESCRIPTORS}, or LimitNOFILE= of the service that runs them)"
            )
        })?;
        // As every distribution has it: programs that change their user read files of the test.
        umask(Mode::from_bits_truncate(0o022));
        ensure!(
            Path::new("/proc/sys/net/ipv6").is_dir(),
            "this kernel runs without IPv6 (ipv6.disable=1), and every test uses it: boot it without that"
        );
        let folder = tempfile::Builder::new().prefix("tunnel-test-").tempdir()?;
        let (node, net) = (NetNs::new("node")?, NetNs::new("net")?);
        let link = join(
            &node,
            &[&format!("{NODE4}/30"), &format!("{NODE6}/64")],
            &net,
            &[&format!("{NET4}/30"), &format!("{NET6}/64")],
        )?;
        net.add_address(&format!("{TARGET4}/32"), "lo")?;
        net.add_address(&format!("{TARGET6}/128"), "lo")?;
        // As if the targets were on hosts of their own: they see the gateway's address, not their own.
        net.ip(&format!(
            "route replace local {TARGET4} dev lo table local proto kernel scope host src {NET4}"
        ))?;
        // The kernel makes this route when it gets around to it (addrconf_dad_work).
        wait_for("the kernel's route to an IPv6 address of its own", PATIENCE, || {
            net.ip(&format!("-6 route delete local {TARGET6} dev lo table local")).ok()
        })?;
        net.ip(&format!("-6 route add local {TARGET6} dev lo table local src {NET6}"))?;
        net.add_hole("10.201.0.0/24", BLACKHOLE)?;
        let pki = Pki::new(&folder.path().join("pki"))?;
        pki.issue("node", NODE_ID, &[])?;
        pki.issue("gateway", GATEWAY_ID, &["--ip", &NET4.to_string(), "--ip", &NET6.to_string()])?;
        Ok(Self { link, node, net, pki, folder, execs: Mutex::default() })
    }

    /// The host of applications.
    pub fn node(&self) -> &NetNs {
        &self.node
    }

    /// The host of the gateway and of targets.
    pub fn net(&self) -> &NetNs {
        &self.net
    }

    /// What one socket on either host may hold, so that there is room for many (net.ipv4.tcp_wmem and tcp_rmem).
    pub fn buffers_of_64_kib(&self) -> Result<()> {
        const SMALL: &str = "4096 16384 65536";
        [&self.node, &self.net]
            .into_iter()
            .try_for_each(|host| host.settings(&[("ipv4/tcp_wmem", SMALL), ("ipv4/tcp_rmem", SMALL)]))
    }

    /// What the machine's first namespace has of the same, which a new one begins with: benchmarks are compared with ones
    /// that were run so.
    pub fn buffers_of_the_machine(&self) -> Result<()> {
        for which in ["ipv4/tcp_wmem", "ipv4/tcp_rmem"] {
            let value = std::fs::read_to_string(Path::new("/proc/sys/net").join(which)).context(which)?;
            for host in [&self.node, &self.net] {
                host.settings(&[(which, value.trim())])?;
            }
        }
        Ok(())
    }

    /// The link between them, from `node` to `net`; nothing when it is a cable.
    pub fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    /// The CA that both sides believe; `node` and `gateway` are issued.
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// Another CA, which nobody believes, and a certificate of it.
    pub fn stranger(&self, id: &str) -> Result<Credentials> {
        let folder = tempfile::Builder::new().prefix("other-ca-").tempdir_in(self.folder())?.keep();
        Pki::new(&folder)?.issue("stranger", id, &["--ip", &NET4.to_string()])
    }

    /// A folder for files; it goes with the world.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file into that folder.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.folder().join(name);
        std::fs::write(&path, contents).with_context(|| format!("{}", path.display()))?;
        Ok(path)
    }

    /// A gateway, to be set up and started.
    pub fn gateway(&self) -> gateway::Builder<'_> {
        gateway::Builder::new(self)
    }

    /// `tunnel exec` through a gateway, to be set up and run.
    pub fn exec(&self, gateway: &Gateway<'_>) -> Exec<'_> {
        Exec::through(self, gateway)
    }

    /// `tunnel exec` with a configuration file.
    pub fn exec_with(&self, config: &Path) -> Exec<'_> {
        Exec::with_config(self, config)
    }

    /// A target in `net`, at a free port of `ip`.
    pub fn serve(&self, ip: IpAddr, handler: impl Handler) -> Result<Target> {
        Target::start(&self.net, (ip, 0).into(), handler)
    }

    /// Has it checked that the group of a `tunnel exec` is gone in the end.
    pub fn note_exec(&self, pid: u32) {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).push(pid);
    }

    fn clean(&self) -> Result<()> {
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        let groups: Vec<_> = execs.iter().map(|pid| format!("tunnel-exec-{pid}")).collect();
        leftovers::gone("cgroups", || leftovers::cgroups(&groups))?;
        for host in [&self.node, &self.net] {
            leftovers::gone("processes", || host.processes().unwrap_or_default())?;
        }
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        leftovers::report("the end of the test", self.clean());
    }
}
