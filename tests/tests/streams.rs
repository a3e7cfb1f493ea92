//! One connection is a byte stream with two ends, and stays one through the tunnel.
//!
//! End, reset and abort are three things; each arrives as what it was.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use anyhow::Result;
use tunnel_tests::{
    BLACKHOLE, Finished, NOWHERE, TARGET4, World,
    target::{self, Gate},
};

const MIB: u64 = 1 << 20;

/// A target that is not there: the port was free a moment ago.
fn nobody(world: &World) -> Result<String> {
    Ok(world.serve(TARGET4, target::echo())?.addr().to_string())
}

/// What the application of a flow that got nowhere sees: it is connected, and then reset. Never a clean end.
fn assert_reset(done: &Finished) -> Result<()> {
    assert_eq!(done.value("connect")?, "ok", "{done}");
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    assert_eq!(done.value("received")?, "0", "{done}");
    Ok(())
}

/// 64 MiB in each direction at once arrive unchanged on one connection.
#[test]
fn heavy_64_mib_each_way_at_once_on_one_connection_arrive_unchanged() -> Result<()> {
    const BYTES: u64 = 64 * MIB;
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let done = world.exec(&gateway).run_app(&["duplex", &target.addr().to_string(), &BYTES.to_string()])?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    let flow = &done.flows()?[0];
    assert_eq!((flow["sent"].as_u64(), flow["received"].as_u64()), (Some(BYTES), Some(BYTES)), "{flow}");
    Ok(())
}

/// A target that answers after the application's half-close is heard.
#[test]
fn a_target_that_answers_after_the_applications_end_is_heard() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::answer_after_end())?;
    for bytes in ["0", "1", "300000"] {
        let done = world.exec(&gateway).run_app(&["half-close", &target.addr().to_string(), bytes])?;
        assert!(done.success(), "{bytes} bytes: {done}");
        assert_eq!(done.value("answer")?, bytes);
    }
    assert_eq!(target.outcomes(3)?, [Ok(()), Ok(()), Ok(())]);
    Ok(())
}

/// An application that answers after the target's half-close is heard.
#[test]
fn an_application_that_answers_after_the_targets_end_is_heard() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    // The last ones are the ones that a process that ends too early would take along.
    for bytes in [0, 1, 300_000, 300_000, 300_000, 4 * MIB] {
        let target = world.serve(TARGET4, target::end_then_listen(bytes))?;
        let addr = target.addr().to_string();
        let done = world.exec(&gateway).run_app(&["hear-end-first", &addr, &bytes.to_string()])?;
        assert!(done.success(), "{bytes} bytes: {done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "{bytes} bytes");
    }
    Ok(())
}

/// Bytes that a command wrote before it exited arrive.
#[test]
fn what_a_command_wrote_before_it_ended_arrives() -> Result<()> {
    const BYTES: u64 = 8 * MIB;
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for _ in 0..5 {
        let (gate, read) = (Gate::default(), Arc::new(AtomicU64::new(0)));
        let target = world.serve(TARGET4, target::slow_reader(&gate, &read))?;
        gate.open();
        let done =
            world.exec(&gateway).run_app(&["write", &target.addr().to_string(), &BYTES.to_string()])?;
        assert!(done.success(), "{done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "{} bytes arrived: {done}", read.load(Ordering::Relaxed));
        assert_eq!(read.load(Ordering::Relaxed), BYTES);
    }
    Ok(())
}

/// A reset by the target resets the application.
#[test]
fn a_target_that_resets_resets_the_application() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for bytes in [0, 1, 200_000] {
        let target = world.serve(TARGET4, target::reset_after(bytes))?;
        let addr = target.addr().to_string();
        let done = world.exec(&gateway).run_app(&["expect-reset", &addr, &bytes.to_string()])?;
        assert_eq!(done.value("connect")?, "ok", "{done}");
        assert_eq!(done.value("ended")?, "ECONNRESET", "after {bytes} bytes: {done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "after {bytes} bytes");
    }
    Ok(())
}

/// A reset by the application resets the target.
#[test]
fn an_application_that_resets_resets_the_target() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for bytes in [1, 200_000] {
        let target = world.serve(TARGET4, target::expect_reset_after(bytes))?;
        let mut app =
            world.exec(&gateway).spawn_app(&["reset", &target.addr().to_string(), &bytes.to_string()])?;
        // Only when everything has arrived: a reset may overtake what is on its way.
        app.says("answered")?;
        app.tell("reset")?;
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "after {bytes} bytes");
    }
    Ok(())
}

/// Killing an application ends its connection at the target.
#[test]
fn an_application_that_is_killed_ends_its_connection() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut app = world.exec(&gateway).spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held")?;
    app.tell("ping")?;
    app.says("ping=ok")?;
    app.process().signal(nix::sys::signal::Signal::SIGTERM)?;
    let done = app.ended()?;
    assert_eq!(done.code(), 128 + 15, "{done}");
    // What a dead process's kernel sends is an end; nothing was unread.
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    Ok(())
}

/// A target that refuses resets the application, never a clean end.
///
/// Failure: target-fails.
#[test]
fn a_target_that_refuses_resets_the_application() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    for bytes in ["0", "1000"] {
        let done = world.exec(&gateway).run_app(&["expect-reset", &nobody(&world)?, bytes])?;
        assert_reset(&done)?;
        let flows = done.flows()?;
        assert_eq!(flows.len(), 1, "{flows:?}");
        assert!(flows[0]["detail"].as_str().is_some_and(|d| d.contains("502")), "{flows:?}");
    }
    gateway.logs("refused")?;
    Ok(())
}

/// A target without a route resets the application.
#[test]
fn a_target_without_a_route_resets_the_application() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let done = world.exec(&gateway).run_app(&["expect-reset", &format!("{NOWHERE}:80"), "0"])?;
    assert_reset(&done)?;
    assert!(done.flows()?[0]["detail"].as_str().is_some_and(|d| d.contains("503")), "{:?}", done.flows()?);
    Ok(())
}

/// A target that never answers resets the application after the dial timeout.
///
/// Failure: target-fails.
#[test]
fn a_target_that_never_answers_resets_the_application_after_the_dial_timeout() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().flag("--dial-timeout", "1s").start()?;
    let done = world.exec(&gateway).run_app(&["expect-reset", &format!("{BLACKHOLE}:80"), "0"])?;
    assert_reset(&done)?;
    let after: u64 = done.value("after_ms")?.parse()?;
    assert!((1000..5000).contains(&after), "the dial timeout is 1 s; it took {after} ms");
    assert!(done.flows()?[0]["detail"].as_str().is_some_and(|d| d.contains("504")), "{:?}", done.flows()?);
    Ok(())
}

/// A target that policy denies resets the application and is never dialled.
///
/// Failure: refused.
#[test]
fn a_target_that_policy_forbids_resets_the_application_and_is_never_dialled() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().allow_only(&["10.200.0.0/24:1"]).start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let done = world.exec(&gateway).run_app(&["expect-reset", &target.addr().to_string(), "1000"])?;
    assert_reset(&done)?;
    assert!(done.flows()?[0]["detail"].as_str().is_some_and(|d| d.contains("403")), "{:?}", done.flows()?);
    assert_eq!(target.peers(), []);
    // Who wanted what.
    let line = gateway.logs(&target.addr().to_string())?;
    assert!(line.contains(tunnel_tests::pki::NODE_ID), "{line}");
    Ok(())
}

/// Without a reachable gateway the application is reset.
#[test]
fn without_a_gateway_the_application_is_reset() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    gateway.kill()?;
    let done = world.exec(&gateway).run_app(&["expect-reset", &target.addr().to_string(), "1000"])?;
    assert_reset(&done)?;
    Ok(())
}
