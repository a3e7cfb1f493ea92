//! `relay = "pipe"`: captured, dialled directly, and moved in the kernel; nobody sees a difference.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use tunnel_tests::{
    Exec, Finished, PATIENCE, TARGET4, TARGET6, World,
    target::{self, Gate},
    wait_for,
    world::{NET4, NET6},
};

const MIB: u64 = 1 << 20;

/// A node with a route to the targets, and what it captures goes there by itself.
struct Node {
    world: World,
    config: PathBuf,
}

impl Node {
    fn new() -> Result<Self> {
        let world = World::new()?;
        world.node().ip(&format!("route add default via {NET4}"))?;
        world.node().ip(&format!("-6 route add default via {NET6}"))?;
        let config = "[daemon]\nworkers = 1\nrelay = \"pipe\"\n[[route]]\nto = \"direct\"\n";
        let config = world.file("direct.toml", config)?;
        Ok(Self { world, config })
    }

    fn exec(&self) -> Exec<'_> {
        // The counters are logged at the end.
        self.world.exec_with(&self.config).flag("--log", "info").limit(Duration::from_secs(120))
    }
}

/// A counter, as it is logged at the end.
fn counter(done: &Finished, name: &str) -> Option<u64> {
    let (_, rest) = done.stderr.split_once(&format!("(\"{name}\", "))?;
    rest.split_once(')')?.0.parse().ok()
}

/// All of it went through pipes.
fn assert_piped(done: &Finished, bytes: u64) {
    assert_eq!(counter(done, "bytes_piped").unwrap_or(0), bytes, "{done}");
    assert_eq!(counter(done, "pipes_missed"), None, "{done}");
}

/// With `relay = "pipe"` 64 MiB in each direction at once arrive unchanged.
#[test]
fn heavy_64_mib_each_way_at_once_arrive_unchanged_through_pipes() -> Result<()> {
    const BYTES: u64 = 64 * MIB;
    let node = Node::new()?;
    for ip in [TARGET4, TARGET6] {
        let target = node.world.serve(ip, target::duplex(BYTES))?;
        let done = node.exec().run_app(&["duplex", &target.addr().to_string(), &BYTES.to_string()])?;
        assert!(done.success(), "{done}");
        assert_eq!(target.outcomes(1)?, [Ok(())]);
        let flow = &done.flows()?[0];
        assert_eq!((flow["sent"].as_u64(), flow["received"].as_u64()), (Some(BYTES), Some(BYTES)), "{flow}");
        assert_eq!(flow["via"], "direct", "{flow}");
        assert_piped(&done, 2 * BYTES);
    }
    Ok(())
}

/// With `relay = "pipe"` half-close works, whichever side ends first.
#[test]
fn whichever_side_ends_first_the_other_is_heard_through_pipes() -> Result<()> {
    let node = Node::new()?;
    for bytes in [0, 1, 300_000, 4 * MIB] {
        let text = bytes.to_string();
        let target = node.world.serve(TARGET4, target::answer_after_end())?;
        let done = node.exec().run_app(&["half-close", &target.addr().to_string(), &text])?;
        assert!(done.success(), "{bytes} bytes: {done}");
        assert_eq!(done.value("answer")?, text);
        assert_piped(&done, 2 * bytes);

        let target = node.world.serve(TARGET4, target::end_then_listen(bytes))?;
        let done = node.exec().run_app(&["hear-end-first", &target.addr().to_string(), &text])?;
        assert!(done.success(), "{bytes} bytes: {done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "{bytes} bytes");
        assert_piped(&done, 2 * bytes);
    }
    Ok(())
}

/// With `relay = "pipe"` a reset of either side resets the other.
#[test]
fn a_reset_of_either_side_resets_the_other_through_pipes() -> Result<()> {
    let node = Node::new()?;
    for bytes in [1, 200_000] {
        let text = bytes.to_string();
        let target = node.world.serve(TARGET4, target::reset_after(bytes))?;
        let done = node.exec().run_app(&["expect-reset", &target.addr().to_string(), &text])?;
        assert_eq!(done.value("ended")?, "ECONNRESET", "after {bytes} bytes: {done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "after {bytes} bytes");
        assert_eq!(done.flows()?[0]["reason"], "target_reset", "{done}");

        let target = node.world.serve(TARGET4, target::expect_reset_after(bytes))?;
        let mut app = node.exec().spawn_app(&["reset", &target.addr().to_string(), &text])?;
        app.says("answered")?;
        app.tell("reset")?;
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "after {bytes} bytes");
        assert_eq!(done.flows()?[0]["reason"], "client_reset", "{done}");
    }
    Ok(())
}

/// With `relay = "pipe"` a target that does not read stalls its application and no other flow.
#[test]
fn heavy_a_target_that_does_not_read_stops_the_application_and_no_other_flow() -> Result<()> {
    const OFFERED: u64 = 128 * MIB;
    /// Two pairs of socket buffers as Linux grows them (net.ipv4.tcp_rmem, tcp_wmem), and a pipe.
    const TAKEN_MAX: u64 = 32 * MIB;
    let node = Node::new()?;
    let (gate, read) = (Gate::default(), Arc::new(AtomicU64::new(0)));
    let stuck = node.world.serve(TARGET4, target::slow_reader(&gate, &read))?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    let words = ["offer", &stuck.addr().to_string(), &echo.addr().to_string(), &OFFERED.to_string()];
    let mut app = node.exec().spawn_app(&words)?;
    app.says("ready")?;
    let before = app.process().memory()?;
    app.tell("offer")?;
    let written: u64 = app.value("written")?.parse()?;
    let grown = app.process().memory()?.saturating_sub(before);
    assert!(written < TAKEN_MAX, "{written} bytes were taken: nothing was held back");
    assert!(grown < MIB, "it grew by {grown} bytes: they were to stay in the kernel");
    gate.open();
    app.tell("the rest")?;
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert_eq!(stuck.outcomes(1)?, [Ok(())]);
    assert_eq!(read.load(Ordering::Relaxed), OFFERED);
    Ok(())
}

/// 1,000 idle flows hold no pipes.
#[test]
fn heavy_a_thousand_idle_flows_hold_no_pipes() -> Result<()> {
    let node = Node::new()?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    let mut app = node.exec().spawn_app(&["many", &echo.addr().to_string(), "1000", "20000"])?;
    app.says("held=1000")?;
    let folder = format!("/proc/{}/fd", app.process().id());
    let pipes = || -> Result<usize> {
        let links = std::fs::read_dir(&folder)?.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
        Ok(links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count())
    };
    // The few that are kept, and our own standard input.
    wait_for("the pipes to be given back", PATIENCE, || (pipes().ok()? <= 2 * 16 + 1).then_some(()))?;
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert_piped(&done, 2 * 1000 * 20000);
    Ok(())
}
