//! Many connections on few, and memory that does not grow with what somebody fails to read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use tunnel_tests::{
    Finished, Gateway, TARGET4, World,
    exec::Running,
    gateway, stopped,
    target::{self, Gate},
};

const MIB: u64 = 1 << 20;
/// What is offered to somebody who does not read.
const OFFERED: u64 = 64 * MIB;
/// What both processes together may hold of it.
const BUFFERED_MAX: u64 = 8 * MIB;
/// A round trip of another stream meanwhile. Without anybody stuck it takes a millisecond.
const ROUND_TRIP_MAX_MS: u64 = 1000;

/// 1,000 captured connections need at most twelve tunnel connections.
#[test]
fn heavy_a_thousand_connections_are_carried_on_at_most_twelve_tunnels() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let echo = world.serve(TARGET4, target::echo())?;
    let exec = world.exec(&gateway).flag("--workers", "2").limit(Duration::from_secs(120));
    let mut app = exec.spawn_app(&["many", &echo.addr().to_string(), "1000", "20000"])?;
    app.says("held=1000")?;
    let sockets = world.node().sockets()?;
    let tunnels = sockets.iter().filter(|s| s.established() && s.remote.port() == gateway::PORT).count();
    assert!((1..=12).contains(&tunnels), "{tunnels} connections to the gateway");
    assert_eq!(echo.peers().len(), 1000);
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert_eq!(done.flows()?.len(), 1000);
    let wrong: Vec<_> =
        done.flows()?.iter().filter(|f| f["sent"] != 20000 || f["received"] != 20000).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(echo.outcomes(1000)?.iter().all(Result::is_ok));
    Ok(())
}

/// An application whose streams share one HTTP/2 connection: there is one worker on each side.
fn on_one_connection<'w>(world: &'w World, words: &[&str]) -> Result<(Gateway<'w>, Running)> {
    let gateway = world.gateway().flag("--workers", "1").start()?;
    let exec = world.exec(&gateway).flag("--workers", "1").limit(Duration::from_secs(120));
    let app = exec.spawn_app(words)?;
    Ok((gateway, app))
}

/// What both processes hold in memory of their own.
fn memory(gateway: &mut Gateway<'_>, app: &mut Running) -> Result<u64> {
    Ok(gateway.process().memory()? + app.process().memory()?)
}

/// What the kernel holds: of `taken` bytes the rest is in our processes.
fn in_kernel(world: &World) -> Result<u64> {
    let mut queued = 0;
    for host in [world.node(), world.net()] {
        queued +=
            host.sockets()?.iter().filter(|s| !s.listens()).map(|s| s.send_queue + s.recv_queue).sum::<u64>();
    }
    Ok(queued)
}

fn assert_bounded(world: &World, taken: u64, grown: u64) -> Result<()> {
    let kernel = in_kernel(world)?;
    let held = taken.saturating_sub(kernel);
    println!("taken {taken}, in the kernel {kernel}, in both processes {held}, memory grown by {grown}");
    assert!(taken < OFFERED, "everything was taken: nothing was held back");
    assert!(held < BUFFERED_MAX, "both processes hold {held} bytes of {taken} that were taken");
    assert!(grown < BUFFERED_MAX, "both processes grew by {grown} bytes");
    Ok(())
}

fn assert_pace(done: &Finished, rounds: usize) -> Result<()> {
    let slowest: Vec<u64> = done
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("slowest_ms="))
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    assert_eq!(slowest.len(), rounds, "{done}");
    assert!(
        slowest.iter().all(|&ms| ms < ROUND_TRIP_MAX_MS),
        "the slowest of 200 round trips: {slowest:?} ms"
    );
    assert_eq!(tunnels(done)?, 1, "the streams must share one connection for this to mean anything");
    Ok(())
}

/// How many HTTP/2 connections the flows were on: no stream's number occurs twice on one.
fn tunnels(done: &Finished) -> Result<usize> {
    let mut streams: Vec<_> =
        done.flows()?.iter().map(|f| f["via"]["tunnel"]["stream"].to_string()).collect();
    streams.sort();
    let all = streams.len();
    streams.dedup();
    Ok(all - streams.len() + 1)
}

/// A target that does not read holds a bounded amount of memory and stalls no other flow.
///
/// Failure: misbehaviour.
#[test]
fn heavy_a_target_that_does_not_read_costs_a_bounded_amount_of_memory_and_stops_no_other() -> Result<()> {
    let world = World::new()?;
    let (gate, read) = (Gate::default(), Arc::new(AtomicU64::new(0)));
    let stuck = world.serve(TARGET4, target::slow_reader(&gate, &read))?;
    let echo = world.serve(TARGET4, target::echo())?;
    let words = ["offer", &stuck.addr().to_string(), &echo.addr().to_string(), &OFFERED.to_string()];
    let (mut gateway, mut app) = on_one_connection(&world, &words)?;
    app.says("ready")?;
    let before = memory(&mut gateway, &mut app)?;
    app.tell("offer")?;
    let written: u64 = app.value("written")?.parse()?;
    let grown = memory(&mut gateway, &mut app)?.saturating_sub(before);
    assert_bounded(&world, written, grown)?;
    gate.open();
    app.tell("the rest")?;
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert_pace(&done, 2)?;
    assert_eq!(stuck.outcomes(1)?, [Ok(())]);
    assert_eq!(read.load(Ordering::Relaxed), OFFERED);
    Ok(())
}

/// An application that does not read holds a bounded amount of memory and stalls no other flow.
///
/// Failure: misbehaviour.
#[test]
fn heavy_an_application_that_does_not_read_costs_a_bounded_amount_of_memory_and_stops_no_other() -> Result<()>
{
    let world = World::new()?;
    let taken = Arc::new(AtomicU64::new(0));
    let source = world.serve(TARGET4, target::offer(OFFERED, &taken))?;
    let echo = world.serve(TARGET4, target::echo())?;
    let words = ["read-late", &source.addr().to_string(), &echo.addr().to_string(), &OFFERED.to_string()];
    let (mut gateway, mut app) = on_one_connection(&world, &words)?;
    app.says("ready")?;
    let before = memory(&mut gateway, &mut app)?;
    app.tell("connect")?;
    app.says("waiting")?;
    stopped(&taken)?;
    app.tell("ping")?;
    app.says("paced")?;
    let grown = memory(&mut gateway, &mut app)?.saturating_sub(before);
    assert_bounded(&world, taken.load(Ordering::Relaxed), grown)?;
    app.tell("read")?;
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert_pace(&done, 2)?;
    assert_eq!(source.outcomes(1)?, [Ok(())]);
    Ok(())
}
