//! An arm, set up: hosts, proxies, a server, and a group whose connections are captured; a [`Bed`] that clients can be started in.
//!
//! # Invariants
//! - An arm with proxies has no other way to its server: what capture misses is lost, and does not count as the arm's.
//! - One byte has passed before a bed is handed out.
//! - What a program that is not installed would be needed for is [`SetUp::Missing`], and that is not an error.

mod far;
mod iptables;
mod near;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    accounting,
    model::{self, Program, Role, Run, Tls},
    peers::Peers,
    wire::Witness,
};
use crate::{
    bpffs::BpfFs,
    cgroup::Cgroup,
    link::Profile,
    load::{
        Outcome, Workload,
        driver::{Client, PORT, Server},
        port,
    },
    process::Process,
    programs,
    wait::{PATIENCE, wait_for},
    world::{NET4, TARGET4, World},
};

/// Where a capture without a proxy leads to: what answers to `connect`.
const BARE_PORT: u16 = PORT + port::MESSAGES;
/// iperf3's, behind those of the load generator's server.
const IPERF_PORT: u16 = PORT + port::COUNT;
/// How long a client does the same before it measures: the first connections, pages and caches are not what is
/// asked about.
const WARM_UP: Duration = Duration::from_millis(100);
/// Where the proxy on the node takes what iptables redirects.
const NEAR_PORT: u16 = 15001;
/// Where the proxy at the other end listens: HBONE's port.
const FAR: SocketAddr = SocketAddr::new(NET4, 15008);
/// Flows that proxies may have: more than any workload opens, also where one identity gets three quarters of them.
const MAX_FLOWS: u32 = 14_000;

/// How an arm is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Build {
    /// How connections come to the proxy.
    pub(super) capture: Option<Capture>,
    /// Rules that have nothing to do with what is measured.
    pub(super) rules: u32,
    /// The proxy on the node.
    pub(super) near: Option<Near>,
    /// The proxy at the other end.
    pub(super) far: Option<Far>,
    /// Where the server is.
    pub(super) server: Place,
    /// Whether our part in it is the other build of `tunnel`, which this one is compared with.
    pub(super) other: bool,
}

impl Build {
    /// Whether the two proxies speak TLS over TCP, whose handshake can be read off the wire; in QUIC it is encrypted.
    fn shows_tls(&self) -> bool {
        matches!(self.near, Some(Near::Ours | Near::Envoy))
            && matches!(self.far, Some(Far::Ours | Far::Envoy))
    }

    /// Whether any part of it is ours.
    pub(super) fn has_ours(&self) -> bool {
        self.capture == Some(Capture::Ebpf)
            || matches!(self.near, Some(Near::Ours | Near::OursH3 | Near::Dialling(_)))
            || self.far == Some(Far::Ours)
    }
}

/// What lies between the node and everything else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Network {
    /// In place of a cable.
    link: Option<Profile>,
    /// Congestion control of both hosts, by the kernel's name; over loopback there is reno.
    pub(super) congestion: &'static str,
}

impl Network {
    /// A cable, between hosts as Linux and its distributions have them: what the host of the benchmark was set to would
    /// be measured otherwise, and would differ from one to the next.
    pub(super) const CABLE: Self = Self { link: None, congestion: "cubic" };
    /// The same between hosts that send at a measured pace.
    pub(super) const PACED: Self = Self { link: None, congestion: "bbr" };

    /// Such a link, in place of the cable.
    pub(super) const fn over(link: Profile) -> Self {
        Self { link: Some(link), ..Self::CABLE }
    }
}

/// How connections come to a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Capture {
    /// Our hooks.
    Ebpf,
    /// REDIRECT in the nat table, matched by the path of the control group.
    Iptables,
}

/// The proxy on the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Near {
    /// Ours, dialling by itself, moving bytes this way (`daemon.relay`).
    Dialling(&'static str),
    /// Ours, through the far proxy.
    Ours,
    /// The same over HTTP/3.
    OursH3,
    /// Envoy.
    Envoy,
    /// Envoy, over HTTP/3.
    EnvoyH3,
    /// redsocks.
    Redsocks,
}

/// The proxy at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Far {
    /// Ours, over HTTP/2 and HTTP/3.
    Ours,
    /// Envoy.
    Envoy,
    /// Envoy, over HTTP/3.
    EnvoyH3,
    /// tinyproxy.
    Tinyproxy,
}

/// Where the server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On another host.
    Away,
    /// On the node's loopback, where a capture without a proxy leads to.
    Node,
}

/// Whose connection, and where to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// One of the captured group, to what is captured.
    Captured,
    /// One of the captured group, to what is not.
    Excluded,
    /// One of another process on the same node.
    Other,
}

/// What came of setting an arm up.
pub(super) enum SetUp {
    /// It runs.
    Ready(Box<Bed>),
    /// It lacks something that this machine, or this version, does not have.
    Missing(String),
}

/// An arm, running. It goes in the order of its fields: a proxy may still be draining when its world ends.
pub(super) struct Bed {
    build: Build,
    /// What it was started as.
    pub(super) programs: Vec<Program>,
    /// What its tunnel agreed on.
    pub(super) tls: Option<Tls>,
    processes: Vec<Process>,
    iperf: Option<Process>,
    _servers: Vec<Server>,
    _bpffs: Option<BpfFs>,
    groups: BTreeMap<Role, Cgroup>,
    others: Cgroup,
    world: World,
}

impl Bed {
    /// Sets an arm up; a byte has passed when it returns.
    pub(super) fn set_up(build: Build, network: Network, workers: u32, peers: &Peers) -> Result<SetUp> {
        if let Some(missing) = peers.missing(&build) {
            return Ok(SetUp::Missing(missing));
        }
        let world = match network.link {
            Some(profile) => World::with_link(profile)?,
            None => World::new()?,
        };
        world.buffers_of_the_machine()?;
        let groups: BTreeMap<Role, Cgroup> =
            Role::ALL.into_iter().map(|role| Ok((role, Cgroup::new()?))).collect::<Result<_>>()?;
        if build.far.is_some() {
            // Routed, so that iptables gets to see it; and whatever it does not redirect is lost.
            world.node().add_hole("10.200.0.0/24", TARGET4)?;
        } else {
            world.node().ip(&format!("route add {TARGET4} via {NET4}"))?;
        }
        let name = network.congestion;
        for host in [world.node(), world.net()] {
            if !host.congestion_control(name)? {
                return Ok(SetUp::Missing(format!(
                    "this kernel does not have {name} (modprobe tcp_{name} loads it where it is a module)"
                )));
            }
        }
        let (host, at) = match build.server {
            Place::Away => (world.net(), &[IpAddr::V4(Ipv4Addr::UNSPECIFIED)][..]),
            Place::Node => (world.node(), &[IpAddr::V4(Ipv4Addr::LOCALHOST), LOOPBACK_PLAIN][..]),
        };
        let serve = |ip: &IpAddr| Server::start(host, world.folder(), *ip, groups.get(&Role::Server));
        let servers = at.iter().map(serve).collect::<Result<_>>()?;
        let mut bed = Self {
            build,
            programs: Vec::new(),
            tls: None,
            processes: Vec::new(),
            iperf: None,
            _servers: servers,
            _bpffs: None,
            groups,
            others: Cgroup::new()?,
            world,
        };
        bed.far(workers, peers)?;
        let witness = build.shows_tls().then(|| Witness::start(bed.world.node(), FAR)).transpose()?;
        bed.near(workers, peers)?;
        bed.capture()?;
        const PROBE: Workload = Workload::Connect { at_once: 1 };
        bed.run(PROBE, Whose::Captured, Duration::from_millis(50)).context("the first bytes")?;
        bed.tls = witness.and_then(Witness::finish);
        ensure!(
            bed.tls.is_some() || !build.shows_tls(),
            "bytes passed, but no TLS handshake was seen on the wire"
        );
        Ok(SetUp::Ready(Box::new(bed)))
    }

    /// Whether the proxies are still there.
    pub(super) fn check(&mut self) -> Result<()> {
        for process in &mut self.processes {
            let ended = process.ended()?;
            ensure!(ended.is_none(), "it ended by itself\n{process}");
        }
        Ok(())
    }

    /// Runs a workload once.
    pub(super) fn run(&mut self, workload: Workload, whose: Whose, time: Duration) -> Result<Run> {
        let mut client = self.client(workload, whose, time)?;
        client.wait_ready()?;
        let before = accounting::cpu(self.parts(whose))?;
        let outcome = client.measure()?;
        let after = accounting::cpu(self.parts(whose))?;
        client.end()?;
        self.judge(workload, whose, outcome, accounting::spent(&before, &after))
    }

    /// Has iperf3 do bulk.
    pub(super) fn iperf(&mut self, streams: u32, reverse: bool, time: Duration) -> Result<Run> {
        self.iperf_server()?;
        let before = accounting::cpu(self.parts(Whose::Captured))?;
        let mut command = self.world.node().command(programs::system("iperf3")?);
        let to = self.address(Whose::Captured);
        command.args(["--client", &to.ip().to_string(), "--port", &IPERF_PORT.to_string(), "--json"]);
        command.args(["--parallel", &streams.to_string(), "--time", &time.as_secs().max(1).to_string()]);
        if reverse {
            command.arg("--reverse");
        }
        self.groups[&Role::Client].adopt(&mut command)?;
        let mut process = Process::spawn("iperf3", self.world.folder(), command)?;
        let status = process.wait(time + PATIENCE)?;
        ensure!(status.success(), "{process}");
        let said: serde_json::Value = serde_json::from_str(&process.stdout()).context("what iperf3 wrote")?;
        let after = accounting::cpu(self.parts(Whose::Captured))?;
        let sum = &said["end"]["sum_received"];
        let number =
            |key: &str| sum[key].as_f64().with_context(|| format!("iperf3 wrote no {key}: {process}"));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count of bytes")]
        let bytes = number("bytes")? as u64;
        let (bytes_up, bytes_down) = if reverse { (0, bytes) } else { (bytes, 0) };
        let outcome = Outcome { seconds: number("seconds")?, bytes_up, bytes_down, ..Outcome::default() };
        let direction = if reverse { crate::load::Direction::Down } else { crate::load::Direction::Up };
        let workload = Workload::Bulk { streams, direction };
        self.judge(workload, Whose::Captured, outcome, accounting::spent(&before, &after))
    }

    /// What idle connections hold, at each of these numbers of them; they stay until the last is counted. Numbers that
    /// were reached before one was not are in `runs` in any case.
    pub(super) fn idle(&mut self, steps: &[u32], runs: &mut Vec<Run>) -> Result<()> {
        let before = accounting::Held::now(self.parts(Whose::Captured))?;
        let (mut clients, mut there) = (Vec::new(), 0);
        for &step in steps {
            let connections = step - there;
            let mut client = self.client(Workload::Idle { connections }, Whose::Captured, Duration::ZERO)?;
            client.wait_ready().with_context(|| format!("{step} connections"))?;
            let outcome = client.measure()?;
            clients.push(client);
            there = step;
            let held = accounting::Held::now(self.parts(Whose::Captured))?;
            let memory = Some(held.grown(&before, step.into()));
            runs.push(Run { round: 0, turn: 0, outcome, cpu: BTreeMap::new(), memory });
        }
        // Each sends again before it closes: they were all alive.
        for client in clients {
            client.end()?;
        }
        Ok(())
    }

    /// Starts a client; it is told when to go on.
    pub(super) fn client(&self, workload: Workload, whose: Whose, time: Duration) -> Result<Client> {
        let mut command = self.world.node().command(programs::load()?);
        self.group(whose).adopt(&mut command)?;
        Client::start(command, self.world.folder(), self.address(whose), workload, time, WARM_UP)
    }

    /// Where the server is, for a connection of this kind.
    fn address(&self, whose: Whose) -> SocketAddr {
        let ip = match (self.build.server, whose) {
            (Place::Away, Whose::Captured) => TARGET4,
            (Place::Away, _) => NET4,
            (Place::Node, Whose::Captured) if self.build.capture.is_some() => LOOPBACK_CAPTURED,
            (Place::Node, Whose::Captured) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            (Place::Node, _) => LOOPBACK_PLAIN,
        };
        SocketAddr::new(ip, PORT)
    }

    fn group(&self, whose: Whose) -> &Cgroup {
        match whose {
            Whose::Captured | Whose::Excluded => &self.groups[&Role::Client],
            Whose::Other => &self.others,
        }
    }

    /// The groups of all parts, the client's being the one that it ran in.
    pub(super) fn parts(&self, whose: Whose) -> impl Iterator<Item = (Role, &Cgroup)> {
        let client = self.group(whose);
        let plays = |role: &Role| match role {
            Role::Near => self.build.near.is_some(),
            Role::Far => self.build.far.is_some(),
            Role::Client | Role::Server => true,
        };
        let parts = self.groups.iter().filter(move |(role, _)| plays(role));
        parts.map(move |(role, group)| (*role, if *role == Role::Client { client } else { group }))
    }

    /// An outcome that claims nothing, or whose bytes went another way, is none.
    fn judge(
        &self,
        workload: Workload,
        whose: Whose,
        outcome: Outcome,
        cpu: BTreeMap<Role, f64>,
    ) -> Result<Run> {
        ensure!(outcome.bytes_up + outcome.bytes_down > 0, "{workload}: no byte arrived");
        let idle = |role: Role| cpu.get(&role).is_some_and(|seconds| *seconds == 0.0);
        if whose == Whose::Captured {
            for role in [Role::Near, Role::Far] {
                ensure!(!idle(role), "{workload}: the {role} used no processor time: the bytes went past it");
            }
        }
        Ok(Run { round: 0, turn: 0, outcome, cpu, memory: None })
    }

    fn capture(&mut self) -> Result<()> {
        match self.build.capture {
            None | Some(Capture::Ebpf) => Ok(()),
            Some(Capture::Iptables) => {
                let to = if self.build.server == Place::Node { BARE_PORT } else { NEAR_PORT };
                let captured = self.address(Whose::Captured).ip();
                let group = &self.groups[&Role::Client];
                let rules = iptables::redirect(&self.world, group, captured, to, self.build.rules)?;
                let command = "iptables-nft-restore".to_owned();
                let configuration = Some(self.shown(&rules));
                self.programs.push(Program { role: Role::Near, command, configuration });
                Ok(())
            }
        }
    }

    /// Starts a program as one part of the arm.
    fn spawn(&mut self, role: Role, name: &str, mut command: Command) -> Result<&mut Process> {
        self.groups[&role].adopt(&mut command)?;
        let process = Process::spawn(name, self.world.folder(), command)?;
        self.processes.push(process);
        Ok(self.processes.last_mut().expect("it was pushed in the line above"))
    }

    /// The same, and waits until it listens.
    fn spawn_listening(&mut self, role: Role, name: &str, command: Command, port: u16) -> Result<()> {
        self.describe(role, &command);
        let udp = role == Role::Far && self.build.far == Some(Far::EnvoyH3);
        let mut ended = false;
        let process = self.spawn(role, name, command)?;
        let id = process.id();
        let host = if role == Role::Near { self.world.node() } else { self.world.net() };
        let process = self.processes.iter_mut().find(|p| p.id() == id).context("it was just started")?;
        wait_for(&format!("{name} to listen"), PATIENCE, || {
            ended = process.ended().is_ok_and(|status| status.is_some());
            (ended
                || host.listens(port).is_ok_and(|listens| listens)
                || udp && host.takes_udp(port).is_ok_and(|takes| takes))
            .then_some(())
        })
        .with_context(|| format!("{process}"))?;
        ensure!(!ended, "it ended at once\n{process}");
        Ok(())
    }

    /// Notes a command line for the report, with the configuration that it names.
    fn describe(&mut self, role: Role, command: &Command) {
        let words = std::iter::once(command.get_program()).chain(command.get_args()).map(Path::new);
        let mut configuration = None;
        let words = words.map(|word| {
            if word.starts_with(self.world.folder()) {
                configuration = fs::read_to_string(word).ok().map(|text| self.shown(&text));
            }
            // Where it lies says nothing to anybody else.
            let name = if word.is_absolute() { word.file_name() } else { None };
            name.unwrap_or(word.as_os_str()).to_string_lossy().into_owned()
        });
        let command = words.collect::<Vec<_>>().join(" ");
        self.programs.push(Program { role, command, configuration });
    }

    /// A configuration for people: without the folder of a test, and without the ten thousandth rule.
    fn shown(&self, text: &str) -> String {
        const LONGEST: usize = 6 * 1024;
        let mut text = text.replace(&format!("{}/", self.world.folder().display()), "");
        if text.len() > LONGEST {
            let (kept, length) = (text.floor_char_boundary(LONGEST / 2), text.len());
            let last = text.split_off(text.ceil_char_boundary(length - LONGEST / 2));
            text.truncate(kept);
            text = format!("{text} … {} bytes … {last}", length - kept - last.len());
        }
        text
    }

    fn iperf_server(&mut self) -> Result<()> {
        if self.iperf.is_some() {
            return Ok(());
        }
        let mut command = self.world.net().command(programs::system("iperf3")?);
        command.args(["--server", "--port", &IPERF_PORT.to_string()]);
        self.groups[&Role::Server].adopt(&mut command)?;
        let server = Process::spawn("iperf3-server", self.world.folder(), command)?;
        wait_for("iperf3 to listen", PATIENCE, || self.world.net().listens(IPERF_PORT).ok()?.then_some(()))?;
        self.iperf = Some(server);
        Ok(())
    }
}

/// An address of the node's own that nobody listens at: the kernel has all of 127.0.0.0/8.
const LOOPBACK_CAPTURED: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

/// Where connections on the node's loopback go that are not captured. Not where captured ones end: there the same
/// source port may come twice within the two minutes that connection tracking remembers, once redirected and once
/// not, and the second SYN would be dropped.
const LOOPBACK_PLAIN: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3));

/// Addresses that nobody uses (RFC 2544), one for each unrelated rule.
fn unrelated(rules: u32) -> impl Iterator<Item = Ipv4Addr> {
    let first = u32::from(Ipv4Addr::new(198, 18, 0, 0));
    (0..rules).map(move |n| Ipv4Addr::from(first + n))
}

impl model::Arm {
    /// What a bed says about itself, for the report.
    pub(super) fn describe(&mut self, bed: &Bed) {
        self.state = model::State::Ran;
        self.processes.clone_from(&bed.programs);
        self.tls.clone_from(&bed.tls);
    }
}

#[cfg(test)]
mod tests {
    use crate::process;

    use super::*;

    const OURS: Build = Build {
        capture: Some(Capture::Ebpf),
        rules: 0,
        near: Some(Near::Ours),
        far: Some(Far::Ours),
        server: Place::Away,
        other: false,
    };

    #[test]
    fn an_arm_whose_gateway_is_gone_has_an_error_and_no_number() -> Result<()> {
        let SetUp::Ready(mut bed) = Bed::set_up(OURS, Network::CABLE, 1, &Peers::none())? else {
            panic!("nothing of others is needed")
        };
        bed.check()?;
        bed.processes[0].kill()?;
        let time = Duration::from_millis(50);
        let error = bed.run(Workload::Connect { at_once: 1 }, Whose::Captured, time).unwrap_err();
        assert!(format!("{error:#}").contains("connect:1"), "{error:#}");
        let error = bed.check().unwrap_err();
        assert!(error.to_string().contains("ended by itself"), "{error}");
        Ok(())
    }

    #[test]
    fn what_is_not_installed_is_missing_which_is_no_error_and_no_number() -> Result<()> {
        let build = Build { far: Some(Far::Envoy), ..OURS };
        let SetUp::Missing(what) = Bed::set_up(build, Network::CABLE, 1, &Peers::none())? else {
            panic!("it runs without an Envoy")
        };
        assert!(what.contains("Envoy not installed") && what.contains("--peers"), "{what}");
        Ok(())
    }

    #[test]
    fn what_is_captured_and_carried_by_nobody_does_not_count_as_the_arms() -> Result<()> {
        let SetUp::Ready(bed) = Bed::set_up(OURS, Network::CABLE, 1, &Peers::none())? else {
            panic!("nothing of others is needed")
        };
        let outcome = Outcome { seconds: 1.0, operations: 1, bytes_up: 1, bytes_down: 1, latency: None };
        let cpu = BTreeMap::from([(Role::Near, 0.0), (Role::Far, 0.5)]);
        let judged = bed.judge(Workload::FirstByte, Whose::Captured, outcome, cpu);
        assert!(judged.unwrap_err().to_string().contains("went past it"));
        let judged = bed.judge(Workload::FirstByte, Whose::Captured, Outcome::default(), BTreeMap::new());
        assert!(judged.unwrap_err().to_string().contains("no byte arrived"));
        Ok(())
    }

    /// The congestion control of each connection of a host, in front of its addresses.
    fn controls(host: &crate::NetNs) -> Result<Vec<String>> {
        let mut ss = host.command(programs::system("ss")?);
        let sockets = process::output(ss.args(["-tinH", "state", "established"]))?;
        // A line for the addresses of each, and one with what it does.
        let lines: Vec<_> = sockets.lines().collect();
        let words = |pair: &[&str]| {
            let name = pair.get(1)?.split_whitespace().next()?.to_owned();
            let mut addresses = pair[0].split_whitespace().skip(2).map(str::to_owned);
            Some(format!("{name} {} {}", addresses.next()?, addresses.next()?))
        };
        lines.chunks(2).map(|pair| words(pair).with_context(|| sockets.clone())).collect()
    }

    /// Both ends of every connection between the hosts, and of those to a target, have the scenario's congestion control,
    /// whatever the host's default is; what is captured has ours.
    #[test]
    fn both_ends_have_the_congestion_control_of_their_scenario_whatever_the_hosts_default_is() -> Result<()> {
        const DIRECT: Build =
            Build { capture: None, rules: 0, near: None, far: None, server: Place::Away, other: false };
        for network in [Network::CABLE, Network::PACED] {
            for build in [DIRECT, OURS] {
                let SetUp::Ready(bed) = Bed::set_up(build, network, 1, &Peers::none())? else {
                    panic!("this kernel does not have {}", network.congestion)
                };
                let idle = Workload::Idle { connections: 2 };
                let mut client = bed.client(idle, Whose::Captured, Duration::ZERO)?;
                client.wait_ready()?;
                for host in [bed.world.node(), bed.world.net()] {
                    let controls = controls(host)?;
                    assert!(controls.len() >= 2, "{controls:?}");
                    for line in controls {
                        let wanted = if line.contains(" 127.") { "reno" } else { network.congestion };
                        assert!(line.starts_with(&format!("{wanted} ")), "not {wanted}: {line}");
                    }
                }
                client.measure()?;
                client.end()?;
            }
        }
        Ok(())
    }
}
