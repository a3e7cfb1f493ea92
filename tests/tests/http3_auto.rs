//! Upstreams over HTTP/3 where UDP does not get through: `protocol = "auto"`, which uses HTTP/2 then, and health checks.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tunnel_tests::{
    NET4, NetNs, PATIENCE, Process, TARGET4, Target, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    dialogue::ask,
    gateway,
    pki::GATEWAY_ID,
    process, programs, target, wait_for,
};

const HBONE: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// Connections that nobody uses are closed soon, and not between two flows.
const SOON: &str = "idle_timeout = \"2s\"\n";
/// What HTTP/3 may cost a flow where UDP is dropped (`sinks/upstream/alternative.rs`).
const HEAD_START: Duration = Duration::from_millis(250);

/// A gateway that speaks `protocols`, and an agent that speaks `protocol` to it, whose group applications are put in.
struct Stage<'w> {
    world: &'w World,
    agent: Daemon,
    target: Target,
    cgroup: Cgroup,
    _gateway: Daemon,
    _bpffs: BpfFs,
}

impl<'w> Stage<'w> {
    fn new(world: &'w World, protocols: &str, protocol: &str, keys: &str) -> Result<Self> {
        world.node().ip(&format!("route add default via {NET4}"))?;
        let gateway = format!(
            "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{HBONE}\"\nprotocols = [{protocols}]\n[[route]]\n\
             to = \"direct\"\n[[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
            world.pki().named("gateway").toml()
        );
        let gateway = Daemon::start(world, world.net(), &gateway)?;
        let target = world.serve(TARGET4, target::echo())?;
        let (cgroup, bpffs) = (Cgroup::new()?, BpfFs::new(world)?);
        let agent = format!(
            "[daemon]\nworkers = 1\n{}{}[[capture]]\ncgroup = \"{}\"\n{}protocol = \"{protocol}\"\n{keys}",
            bpffs.toml(),
            world.pki().named("node").toml(),
            cgroup.path().display(),
            through(HBONE, GATEWAY_ID),
        );
        let agent = Daemon::start(world, world.node(), &agent)?;
        Ok(Self { world, agent, target, cgroup, _gateway: gateway, _bpffs: bpffs })
    }

    /// One connection, and one byte there and back; how long they took.
    fn flow(&self) -> Result<Duration> {
        let mut command = self.world.node().command(programs::app()?);
        command.args(["hold", &self.target.addr().to_string()]);
        self.cgroup.adopt(&mut command)?;
        let mut app = Process::spawn_with_input("app", self.world.folder(), command)?;
        app.wait_for_line("held=1")?;
        let begun = Instant::now();
        assert_eq!(ask(&mut app, "again")?, "ok", "{}", self.agent.log());
        let took = begun.elapsed();
        app.hang_up();
        app.wait(PATIENCE)?;
        Ok(took)
    }

    /// How often the agent's log says this.
    fn said(&self, what: &str) -> usize {
        self.agent.log().matches(what).count()
    }

    /// Until no connection of the agent is open.
    fn until_cold(&self) -> Result<()> {
        let cold = || (self.said("connection ended") == self.said("connection opened")).then_some(());
        wait_for("the end of all connections", PATIENCE, cold).with_context(|| self.agent.log())
    }

    /// Until there is a connection of HTTP/3, which flows bring about.
    fn until_over_http_3(&self) -> Result<()> {
        let before = self.said(QUIC);
        wait_for("a connection of HTTP/3", PATIENCE, || {
            self.flow().ok()?;
            (self.said(QUIC) > before).then_some(())
        })
        .with_context(|| self.agent.log())
    }
}

/// What an agent says of a connection of HTTP/3.
const QUIC: &str = "QUIC handshake completed";

/// What it says when a flow waits for one.
const RACE: &str = "trying HTTP/3 first";

/// And when that has failed.
const FAILED: &str = "HTTP/3 does not get through";

/// Drops what comes to the gateway's host over a protocol, until it is dropped.
struct Dropped<'h>(&'h NetNs, &'static str);

impl<'h> Dropped<'h> {
    fn new(host: &'h NetNs, protocol: &'static str) -> Result<Self> {
        let dropped = Self(host, protocol);
        dropped.rule("-A")?;
        Ok(dropped)
    }

    fn rule(&self, does: &str) -> Result<()> {
        let mut rule = self.0.command(programs::system("iptables-nft")?);
        rule.args([does, "INPUT", "-p", self.1, "--dport", &HBONE.port().to_string(), "-j", "DROP"]);
        process::output(&mut rule).map(drop)
    }
}

impl Drop for Dropped<'_> {
    fn drop(&mut self) {
        // It goes with its host otherwise.
        let _gone = self.rule("-D");
    }
}

/// An upstream with "auto" goes on to HTTP/3 when its endpoint offers it, while no flow waits for that, and carries flows over
/// it although TCP does not get through any more.
#[test]
fn an_upstream_with_auto_goes_on_to_http_3_where_it_is_offered() -> Result<()> {
    let world = World::new()?;
    let stage = Stage::new(&world, "\"h2\", \"h3\"", "auto", "")?;
    stage.until_over_http_3()?;
    assert_eq!(stage.said(RACE), 0, "it was tried beside flows of HTTP/2");
    let _no_tcp = Dropped::new(world.net(), "tcp")?;
    stage.flow()?;
    Ok(())
}

/// An upstream with "auto" stays with HTTP/2 where nothing else is offered.
#[test]
fn an_upstream_with_auto_stays_with_http_2_where_nothing_else_is_offered() -> Result<()> {
    let world = World::new()?;
    let stage = Stage::new(&world, "\"h2\"", "auto", "")?;
    for _ in 0..3 {
        stage.flow()?;
    }
    assert_eq!(stage.said("endpoint offers HTTP/3") + stage.said(QUIC), 0);
    Ok(())
}

/// Where UDP is dropped, an upstream with "auto" goes back to HTTP/2: the first flow without a connection waits 250 ms more,
/// later ones do not wait, and HTTP/3 is used again once it gets through.
#[test]
fn where_udp_is_dropped_the_first_flow_waits_250_ms_and_later_ones_do_not() -> Result<()> {
    let world = World::new()?;
    let stage = Stage::new(&world, "\"h2\", \"h3\"", "auto", SOON)?;
    stage.until_over_http_3()?;
    // Nothing is being tried any more.
    stage.flow()?;
    stage.until_cold()?;
    let (waited, failed) = (stage.said(RACE), stage.said(FAILED));
    let no_udp = Dropped::new(world.net(), "udp")?;
    // Of the flow that it holds too.
    let begun = Instant::now();
    stage.flow()?;
    assert!(begun.elapsed() >= HEAD_START, "{:?}", begun.elapsed());
    assert!(stage.said(RACE) > waited && stage.said(FAILED) == failed + 1, "{}", stage.agent.log());
    let waited = stage.said(RACE);
    stage.until_cold()?;
    stage.flow()?;
    assert_eq!(stage.said(RACE), waited, "{}", stage.agent.log());
    drop(no_udp);
    stage.until_over_http_3()
}

/// Health checks ask an endpoint over HTTP/3: it is unhealthy while UDP is dropped, and healthy again afterwards.
#[test]
fn health_checks_over_http_3_tell_whether_its_endpoint_answers() -> Result<()> {
    const CHECK: &str = "[upstream.health_check]\ntype = \"ping\"\ninterval = \"200ms\"\ntimeout = \"1s\"\n\
                         unhealthy_threshold = 1\nhealthy_threshold = 2\n";
    let world = World::new()?;
    let mut stage = Stage::new(&world, "\"h3\"", "h3", CHECK)?;
    stage.flow()?;
    assert_eq!(stage.said("unhealthy"), 0, "{}", stage.agent.log());
    let no_udp = Dropped::new(world.net(), "udp")?;
    stage.agent.process().wait_for_line("unhealthy: ")?;
    drop(no_udp);
    stage.agent.process().wait_for_line("healthy upstream=")?;
    stage.flow()?;
    Ok(())
}
