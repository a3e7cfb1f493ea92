//! The ways to carry a flow, and a stage for tests of each: two hosts, a cgroup of the first that a daemon captures in
//! the given mode, and programs in it. A counter of the daemon proves the mode, where the mode names one.
//!
//! # Invariants
//! - Each test runs in every mode: [`each_mode`](crate::each_mode) generates them.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    Process, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    pki::GATEWAY_ID,
    world::NET4,
};

/// A way to carry flows.
#[derive(Debug)]
pub struct Mode {
    /// Keys of `[daemon]`.
    pub daemon: &'static str,
    /// Keys of `[[capture]]`.
    pub capture: &'static str,
    /// Where flows go.
    pub sink: Sink,
    /// A counter of the daemon's that tells that it was this way.
    pub proof: Option<&'static str>,
    /// Exchanges before anything is looked at, twice: what treats flows by what they have done so far has to have seen
    /// enough of them.
    pub chat: u32,
    /// Milliseconds in between, in which nothing is on its way.
    pub rest: u32,
}

/// Where flows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Dialled by the daemon: two sockets of ours.
    Direct,
    /// HTTP/2 over mutual TLS, and dialled by the gateway.
    Gateway,
    /// HTTP/1 in plaintext, and dialled by the proxy.
    Http1,
    /// HTTP/2 over mutual TLS, twice: the gateway has the flow dialled by another one.
    Chain,
    /// HTTP/3, and dialled by the gateway.
    Http3,
    /// HTTP/3 to a gateway, and HTTP/2 from there to another one.
    Http3Then2,
    /// HTTP/2 to a gateway, and HTTP/3 from there to another one.
    Http2Then3,
}

/// The far end of a mode, on the host of the targets.
pub struct Far {
    /// The tables of a configuration that sends everything there.
    tables: String,
    _daemons: Vec<Daemon>,
}

/// Where gateways listen.
const FIRST: u16 = 15008;
const SECOND: u16 = 15009;
/// A route that dials.
const DIRECT: &str = "[[route]]\nto = \"direct\"\n";
/// Where targets are.
const ALLOWED: &str = "[\"10.200.0.0/24\", \"fd00:200::/64\"]";

/// What a mode is, but for what it says itself.
pub const COPY: Mode =
    Mode { daemon: "relay = \"copy\"", capture: "", sink: Sink::Direct, proof: None, chat: 25, rest: 10 };

/// Makes a test of each function for each mode: `each_mode! { /// PROMISE\n NAME = FUNCTION; … }`, where a function takes a
/// [`Mode`]. A mode is a line here, and nowhere else.
#[macro_export]
macro_rules! each_mode {
    ($($tests:tt)*) => {
        $crate::mode!(copied, $crate::modes::COPY, $($tests)*);
        $crate::mode!(
            piped,
            $crate::modes::Mode { daemon: "relay = \"pipe\"", proof: Some("bytes_piped"), ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            spliced,
            $crate::modes::Mode { daemon: "relay = \"splice\"", proof: Some("flows_spliced"), ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            past_tcp,
            $crate::modes::Mode { capture: "bypass = \"auto\"", ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            through_a_gateway,
            $crate::modes::Mode { daemon: "", sink: $crate::modes::Sink::Gateway, ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            through_an_http_1_proxy,
            $crate::modes::Mode { daemon: "", sink: $crate::modes::Sink::Http1, ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            through_a_chain,
            $crate::modes::Mode { daemon: "", sink: $crate::modes::Sink::Chain, ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            over_http_3,
            $crate::modes::Mode { daemon: "", sink: $crate::modes::Sink::Http3, ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            over_http_3_and_http_2,
            $crate::modes::Mode { daemon: "", sink: $crate::modes::Sink::Http3Then2, ..$crate::modes::COPY },
            $($tests)*
        );
        $crate::mode!(
            over_http_2_and_http_3,
            $crate::modes::Mode { daemon: "", sink: $crate::modes::Sink::Http2Then3, ..$crate::modes::COPY },
            $($tests)*
        );
    };
}

/// The tests of one mode.
#[macro_export]
macro_rules! mode {
    ($mode:ident, $is:expr, $($(#[$doc:meta])* $name:ident = $test:expr;)*) => {
        mod $mode {
            use super::*;

            $($(#[$doc])*
            #[test]
            fn $name() -> anyhow::Result<()> {
                ($test)(&$is)
            })*
        }
    };
}

/// A node that has a route to the targets, and a group on it that a daemon may capture.
#[derive(Debug)]
pub struct Stage {
    /// Where the daemon pins.
    pub bpffs: BpfFs,
    /// The group.
    pub cgroup: Cgroup,
    /// Both hosts.
    pub world: World,
    /// More keys of every daemon's `[daemon]`.
    keys: &'static str,
}

impl Stage {
    /// Makes them.
    pub fn new() -> Result<Self> {
        let world = World::new()?;
        world.node().ip(&format!("route add default via {NET4}"))?;
        let (bpffs, cgroup) = (BpfFs::new(&world)?, Cgroup::new()?);
        Ok(Self { bpffs, cgroup, world, keys: "" })
    }

    /// The same, with hosts that forget a closed connection within a second, and daemons that ask a silent peer after
    /// another one whether it is there: what takes minutes elsewhere.
    pub fn forgetful() -> Result<Self> {
        let stage = Self::new()?;
        for host in [stage.world.node(), stage.world.net()] {
            host.settings(&[("ipv4/tcp_fin_timeout", "1")])?;
        }
        let keys = "tcp_keepalive = { time = \"1s\", interval = \"1s\", probes = 2 }\n";
        Ok(Self { keys, ..stage })
    }

    /// A gateway, if the mode takes one.
    pub fn gateway(&self, mode: &Mode) -> Result<Option<Far>> {
        let speaking = |protocol: &str, port: u16, to: &str| {
            // A process that is killed says nothing over UDP.
            let silence = "keepalive_interval = \"3s\"\nkeepalive_timeout = \"3s\"\n";
            let keys = if protocol == "h3" { silence } else { "" };
            let listen =
                format!("[[listener]]\naddress = \"{NET4}:{port}\"\nprotocols = [\"{protocol}\"]\n{keys}");
            self.far(&(self.world.pki().named("gateway").toml() + &listen), to)
        };
        let gateway = |port: u16, to: &str| speaking("h2", port, to);
        let through = |port| through(SocketAddr::new(NET4, port), GATEWAY_ID);
        let over_http_3 = |port| through(port) + "protocol = \"h3\"\n";
        let (daemons, to) = match mode.sink {
            Sink::Direct => return Ok(None),
            Sink::Gateway => (vec![gateway(FIRST, DIRECT)?], through(FIRST)),
            Sink::Chain => {
                (vec![gateway(SECOND, DIRECT)?, gateway(FIRST, &through(SECOND))?], through(FIRST))
            }
            Sink::Http3 => (vec![speaking("h3", FIRST, DIRECT)?], over_http_3(FIRST)),
            Sink::Http3Then2 => {
                let second = gateway(SECOND, DIRECT)?;
                (vec![second, speaking("h3", FIRST, &through(SECOND))?], over_http_3(FIRST))
            }
            Sink::Http2Then3 => {
                let second = speaking("h3", SECOND, DIRECT)?;
                (vec![second, gateway(FIRST, &over_http_3(SECOND))?], through(FIRST))
            }
            Sink::Http1 => {
                let listen = format!(
                    "[[listener]]\naddress = \"{NET4}:{FIRST}\"\nprotocols = [\"h1\"]\ntls = false\n"
                );
                let to = format!(
                    "[[route]]\nto = [{{ upstream = \"proxy\" }}]\n[[upstream]]\nname = \"proxy\"\n\
                     endpoints = [\"{NET4}:{FIRST}\"]\nprotocol = \"h1\"\ntls = false\n"
                );
                (vec![self.far(&listen, DIRECT)?], to)
            }
        };
        let identity = match mode.sink {
            Sink::Http1 => String::new(),
            _ => self.world.pki().named("node").toml(),
        };
        Ok(Some(Far { tables: identity + &to, _daemons: daemons }))
    }

    fn far(&self, tables: &str, to: &str) -> Result<Daemon> {
        let policy = format!("[[policy]]\nidentity = \"any\"\ntarget = {ALLOWED}\n");
        let config = format!("[daemon]\n{}{tables}{to}{policy}", self.keys);
        Daemon::start(&self.world, self.world.net(), &config)
    }

    /// Carries what the group connects to, in this mode.
    pub fn daemon(&self, mode: &Mode, gateway: Option<&Far>) -> Result<Daemon> {
        let sink = gateway.map_or(DIRECT, |far| &far.tables);
        let (bpffs, group, keys) = (self.bpffs.toml(), self.cgroup.path().display(), self.keys);
        let Mode { daemon, capture, .. } = mode;
        let config =
            format!("[daemon]\n{bpffs}{keys}{daemon}\n[[capture]]\ncgroup = \"{group}\"\n{capture}\n{sink}");
        Daemon::start(&self.world, self.world.node(), &config)
    }

    /// A program on the node, in the group if it is to be captured.
    pub fn program(&self, program: PathBuf, captured: bool) -> Result<Command> {
        let mut command = self.world.node().command(program);
        if captured {
            self.cgroup.adopt(&mut command)?;
        }
        Ok(command)
    }

    /// Ends a daemon, and has it prove that it was in this mode. Whatever it was, no socket's account of memory was wrong, but
    /// for flows whose mailbox was full because the kernel's worker got no processor.
    pub fn end(&self, daemon: &mut Daemon, mode: &Mode) -> Result<()> {
        daemon.process().stop()?;
        let log = daemon.log();
        let count = |counter: &str| -> u64 {
            let count =
                log.split_once(&format!("(\"{counter}\", ")).and_then(|(_, rest)| rest.split_once(')'));
            count.and_then(|(count, _)| count.parse().ok()).unwrap_or(0)
        };
        let wrong = count("splice_accounts_wrong");
        ensure!(wrong <= 2 * count("splice_forced"), "accounts of memory were wrong: {wrong}\n{log}");
        let Some(counter) = mode.proof else { return Ok(()) };
        ensure!(count(counter) > 0, "it says that it was another way: {counter} is 0\n{log}");
        Ok(())
    }

    /// Waits for a process that is to have ended, and fails with what it is doing when it cannot even be killed.
    pub fn gone(&self, process: &mut Process) -> Result<i32> {
        let status = process.wait(crate::PATIENCE).with_context(|| {
            let stack = std::fs::read_to_string(format!("/proc/{}/stack", process.id())).unwrap_or_default();
            format!("it does not go: {stack}")
        })?;
        Ok(crate::process::code(status))
    }
}
