//! A gateway that dies takes its flows along, and nothing else.

use std::time::{Duration, Instant};

use anyhow::Result;
use tunnel_tests::{PATIENCE, TARGET4, World, dialogue::ask, target, wait_for};

/// From the gateway's first listen until flows work: an ejected endpoint is probed every second at most,
/// and a handshake takes part of another on a loaded machine.
const BACK: Duration = Duration::from_secs(4);

/// A killed gateway resets its flows, and new ones work as soon as it is back.
///
/// Failure: connection-lost.
#[test]
fn a_gateway_killed_under_load_resets_its_flows_and_new_ones_work_as_soon_as_it_is_back() -> Result<()> {
    const FLOWS: usize = 50;
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let addr = target.addr().to_string();
    let mut app = world.exec(&gateway).spawn_app(&["swarm", &addr, &FLOWS.to_string()])?;
    app.says("swarm=")?;
    for _ in 0..2 {
        gateway.kill()?;
        // Reset, each of them: no clean end, and nothing hangs.
        assert_eq!(app.says("ends=")?, "ends=ECONNRESET");
        for outcome in target.outcomes(FLOWS)?.iter().take(FLOWS) {
            assert!(outcome.as_ref().is_err_and(|e| e.contains("reset")), "{outcome:?}");
        }
        // Long enough for the endpoint to be ejected; each of them fails at once, by a reset.
        for _ in 0..5 {
            let asked = Instant::now();
            assert_eq!(ask(app.process(), "again")?, "ECONNRESET");
            assert!(asked.elapsed() < PATIENCE / 4, "it took {:?}", asked.elapsed());
        }
        gateway.start_again()?;
        // Each worker finds it by itself: until then those that it gets are refused.
        let mut in_a_row = 0;
        wait_for("ten flows in a row through the restarted gateway", BACK, || {
            let well = ask(app.process(), "again").ok()? == "ok";
            in_a_row = if well { in_a_row + 1 } else { 0 };
            (in_a_row == 10).then_some(())
        })?;
    }
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert!(done.stderr.contains("ejected") && !done.stderr.contains("panicked"), "{done}");
    Ok(())
}

/// A gateway that is stopped drains: its flows finish, and it accepts no new ones.
#[test]
fn a_gateway_that_is_stopped_lets_its_flows_finish_and_takes_no_new_ones() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut app = world.exec(&gateway).spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    gateway.process().signal(nix::sys::signal::Signal::SIGTERM)?;
    gateway.logs("draining")?;
    for _ in 0..3 {
        assert_eq!(ask(app.process(), "ping")?, "ok");
    }
    assert_eq!(ask(app.process(), "again")?, "ECONNRESET");
    assert_eq!(ask(app.process(), "ping")?, "ok");
    assert!(app.finish()?.success());
    assert!(gateway.process().wait(PATIENCE)?.success());
    Ok(())
}
