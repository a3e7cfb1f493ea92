//! SIGKILL in the middle of traffic: nobody is stuck, the kernel does not complain, and nothing is left.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tunnel_tests::{
    PATIENCE, TARGET4,
    dmesg::Mark,
    each_mode,
    load::{
        Workload,
        driver::{Client, Server},
        port,
    },
    modes::{Mode, Stage},
    programs, wait_for,
};

/// Traffic in both directions, in all sizes, by programs that block and by one that does not.
const SOAK: Workload = Workload::Soak { connections: 6 };
/// Messages one by one: what a path for flows that chat is for, on whatever machine.
const CHAT: Workload = Workload::Crowd { connections: 3, size: 64, bulk: None };
/// Longer than anybody who is killed lives.
const LONG: Duration = Duration::from_secs(600);
/// How long there is traffic before: for paths that treat flows by what they have done so far.
const BEFORE: Duration = Duration::from_secs(1);
/// How long there is traffic again, to see that there is.
const SHORT: Duration = Duration::from_millis(300);

each_mode! {
    /// A killed daemon resets its flows, and the next one carries new ones.
    ///
    /// Failure: daemon-killed.
    a_daemon_that_is_killed_takes_its_flows_along_and_the_next_one_carries = killed_daemon;
    /// A killed application leaves no connection on either side.
    ///
    /// Failure: daemon-killed.
    an_application_that_is_killed_is_forgotten_on_both_sides = killed_application;
    /// A killed target ends the connections of its applications.
    ///
    /// Failure: daemon-killed.
    a_target_that_is_killed_ends_its_applications_connections = killed_target;
}

/// Starts a captured client that will be at it for so long.
fn client(stage: &Stage, server: &Server, workload: Workload, length: Duration) -> Result<Client> {
    let command = stage.program(programs::load()?, true)?;
    Client::start(command, stage.world.folder(), server.addr(), workload, length, BEFORE)
}

fn serve(stage: &Stage) -> Result<Server> {
    Server::start(stage.world.net(), stage.world.folder(), TARGET4, None)
}

/// Clients that are warm, and at it.
fn busy(stage: &Stage, server: &Server) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    // Who chats comes first: beside a soak, on one emulated processor, a warm-up may take longer than a client's patience.
    for workload in [CHAT, SOAK] {
        let mut client = client(stage, server, workload, LONG)?;
        client.wait_ready()?;
        client.process().tell("go")?;
        clients.push(client);
    }
    let busy = || {
        let sockets = stage.world.node().sockets().ok()?;
        // On one side or the other something is always on its way.
        sockets.iter().any(|s| s.established() && s.send_queue + s.recv_queue > 0).then_some(())
    };
    wait_for("traffic", PATIENCE, busy)?;
    Ok(clients)
}

/// Flows are carried from beginning to end.
fn carries(stage: &Stage, server: &Server) -> Result<()> {
    for workload in [SOAK, CHAT] {
        let mut client = client(stage, server, workload, SHORT)?;
        client.wait_ready()?;
        let outcome = client.measure()?;
        ensure!(outcome.bytes_up > 0 && outcome.bytes_down > 0, "{outcome:?}");
        client.end()?;
    }
    Ok(())
}

/// No connection is up on either host but those of a gateway's upstream.
fn no_flow_is_left(stage: &Stage, server: &Server) -> Result<()> {
    let first = server.addr().port();
    let ports = first..first + port::COUNT;
    let left = || {
        let of = |host: &tunnel_tests::NetNs| host.sockets().unwrap_or_default();
        let all = [of(stage.world.node()), of(stage.world.net())].concat();
        all.into_iter()
            .filter(|s| {
                s.established() && (ports.contains(&s.local.port()) || ports.contains(&s.remote.port()))
            })
            .count()
    };
    wait_for("the end of all connections to the target", PATIENCE, || (left() == 0).then_some(()))
}

fn killed_daemon(mode: &Mode) -> Result<()> {
    let (stage, mut kernel) = (Stage::new()?, Mark::now()?);
    let server = serve(&stage)?;
    let gateway = stage.gateway(mode)?;
    let mut daemon = stage.daemon(mode, gateway.as_ref())?;
    let mut clients = busy(&stage, &server)?;
    daemon.process().kill()?;
    for client in &mut clients {
        // Its sockets are closed by the kernel, with a reset.
        ensure!(stage.gone(client.process())? != 0, "its connections were lost, and it did not notice");
        let said = client.process().stderr();
        ensure!(said.contains("reset"), "{said}");
    }
    no_flow_is_left(&stage, &server)?;
    let mut daemon = stage.daemon(mode, gateway.as_ref())?;
    carries(&stage, &server)?;
    stage.end(&mut daemon, mode)?;
    assert_eq!(kernel.warnings()?, Vec::<String>::new());
    Ok(())
}

fn killed_application(mode: &Mode) -> Result<()> {
    let (stage, mut kernel) = (Stage::new()?, Mark::now()?);
    let server = serve(&stage)?;
    let gateway = stage.gateway(mode)?;
    let mut daemon = stage.daemon(mode, gateway.as_ref())?;
    for mut client in busy(&stage, &server)? {
        client.process().kill()?;
    }
    no_flow_is_left(&stage, &server)?;
    carries(&stage, &server)?;
    stage.end(&mut daemon, mode)?;
    assert_eq!(kernel.warnings()?, Vec::<String>::new());
    Ok(())
}

fn killed_target(mode: &Mode) -> Result<()> {
    let (stage, mut kernel) = (Stage::new()?, Mark::now()?);
    let mut server = serve(&stage)?;
    let gateway = stage.gateway(mode)?;
    let mut daemon = stage.daemon(mode, gateway.as_ref())?;
    let mut clients = busy(&stage, &server)?;
    server.process().kill()?;
    for client in &mut clients {
        ensure!(stage.gone(client.process())? != 0, "its connections were lost, and it did not notice");
    }
    no_flow_is_left(&stage, &server)?;
    drop(server);
    let server = serve(&stage).context("another target in its place")?;
    carries(&stage, &server)?;
    stage.end(&mut daemon, mode)?;
    assert_eq!(kernel.warnings()?, Vec::<String>::new());
    Ok(())
}
